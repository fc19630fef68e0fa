"""The encoder of a weight file, with all that its card or a config says of it."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from voco_jax.config.common import Chain
from voco_jax.config.finetuning import SegmentationFinetuning
from voco_jax.config.load import AnyExperiment, differences, load
from voco_jax.config.pretraining import Pretraining
from voco_jax.errors import InputError
from voco_jax.evaluation.encoder import Encoder, File, crop_corners
from voco_jax.evaluation.ensemble import experiment_of_card
from voco_jax.interop.card import file_sha256
from voco_jax.interop.files.weights import describe
from voco_jax.interop.load import load_into
from voco_jax.interop.names import torch_shapes
from voco_jax.models.attention import attend
from voco_jax.models.encoder import CLASSIFIER, PROJECTOR
from voco_jax.models.encoders import build_decoder, build_encoder
from voco_jax.models.initial_values import describe_parameters, initial_parameters
from voco_jax.models.network import Network, SegmentationNetwork

ASIDE = ("decoder*", "out.*", f"{PROJECTOR}.*", f"{CLASSIFIER}.*")
"""What files hold besides an encoder: patterns of names."""


def load_encoder(
    weights: File,
    config: File | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    source: str | None = None,
    batch: int | None = None,
) -> Encoder:
    """Loads the encoder of a weight file; what else the file holds is left aside.

    Args:
        weights: .safetensors, .pt and the like: pre-trained or fine-tuned by this package, MONAI's
            SwinUNETR, or published VoCo weights.
        config: config file that made it; None: as the card beside the weights says.
        settings: of the config, by dotted name, as {"model.patch_merging": "legacy"}.
        source: whose chain prepares volumes, by its name in the config; None: the only one.
        batch: crops at a time; None: one on a CPU, else up to eight.

    Raises:
        InputError: a file that cannot be read or does not fit, no card and no config, or sources of
            different chains; the message says what to do.
    """
    encoder = read_encoder(weights, config, settings=settings, source=source, batch=batch)
    for note in encoder.notes:
        warnings.warn(f"{encoder.weights}: {note}", stacklevel=2)
    return encoder


def read_encoder(
    weights: File,
    config: File | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    source: str | None = None,
    like: Chain | None = None,
    random: int | None = None,
    batch: int | None = None,
) -> Encoder:
    """As `load_encoder`; what it would warn of are the result's `notes`.

    Args:
        weights, config, settings, source, batch: see there.
        like: of several sources, the one that prepares images as this chain is taken.
        random: seed of random weights, which are taken instead of the file's; None: the file's.
    """
    path = Path(weights)
    if config is None and settings:
        raise InputError(f"settings: found {', '.join(settings)} without a config file; name it")
    experiment = load(config, settings) if config is not None else experiment_of_card(path)
    chain = _chain(experiment, source, like)
    if isinstance(experiment, Pretraining):
        crop_size, encoder_size = experiment.crops.crop_size, experiment.crops.encoder_size
    else:
        crop_size = encoder_size = experiment.crops.size
    model = dataclasses.replace(experiment.model, remat=False, dtype="float32")
    device = jax.devices()[0]
    channels = len(getattr(chain, "channels", ())) or 1
    shapes = {name: spec.shape for name, spec in describe(path).tensors.items()}
    projector_size, *_ = shapes.get(f"{PROJECTOR}.layer1.0.weight", (0,))
    module = build_encoder(model, device.platform, attend, channels)
    network = Network(module, projector_size or 1, jnp.dtype("float32"))
    template = dict(nn.unbox(describe_parameters(network, encoder_size, channels)))
    if not projector_size:
        del template[PROJECTOR]
    aside = [*ASIDE, *experiment.init.allow_unexpected]
    if isinstance(experiment, SegmentationFinetuning):
        decoder = build_decoder(model, device.platform, len(experiment.data.classes))
        whole = describe_parameters(SegmentationNetwork(module, decoder), encoder_size, channels)
        aside += torch_shapes(nn.unbox(whole)).keys() - torch_shapes(template).keys()
    params, report = load_into(template, path, (), aside, model=model)
    if random is not None:
        drawn = initial_parameters(network, encoder_size, jax.random.key(random), channels=channels)
        params = {name: drawn[name] for name in params}
    most = batch or (1 if device.platform == "cpu" else 8)
    if chain.fit != "random_crop":  # as even as can be: the last batch is filled up
        corners, _ = crop_corners(chain.volume_size, crop_size)
        most = -(-len(corners) // -(-len(corners) // most))
    return Encoder(
        weights=path,
        digest=file_sha256(path) if random is None else f"random weights, seed {random}",
        experiment=experiment,
        chain=chain,
        crop_size=crop_size,
        encoder_size=encoder_size,
        size=module.pooled_size,
        has_projector=bool(projector_size),
        notes=report.notes,
        batch=most,
        _network=network,
        _params=jax.device_put(params, device),
    )


def chain_differences(found: Chain, expected: Chain) -> list[str]:
    """What two chains do otherwise with an image, a line `field: found -> expected` each."""
    names = [one.name for one in dataclasses.fields(Chain)]
    old, new = ({name: getattr(chain, name) for name in names} for chain in (found, expected))
    old["channels"], new["channels"] = (getattr(one, "channels", ()) for one in (found, expected))
    return differences(old, new)


def _chain(experiment: AnyExperiment, source: str | None, like: Chain | None) -> Chain:
    sources = experiment.data.sources
    if source is not None and source not in sources:
        raise InputError(f"source: found {source!r}, expected one of {', '.join(sources)}")
    chains = [sources[source].chain] if source else [one.chain for one in sources.values()]
    for chain in chains:
        if like is not None and not chain_differences(like, chain):
            return chain
    if any(chain != chains[0] for chain in chains):
        raise InputError(
            f"source: found none named, and the weights' sources {', '.join(sources)} prepare "
            "volumes differently; name the one that yours are like (--source, or source=...)"
        )
    return chains[0]
