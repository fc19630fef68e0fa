"""Writes a network's weights for PyTorch, as the published ones are, with a card beside them.

A pre-trained encoder, or all of a network for segmentation (MONAI's SwinUNETR) or classification.
"""

import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import voco_jax
from voco_jax.config.common import WEIGHT_SUFFIXES
from voco_jax.config.load import command_parser, load, parse_arguments
from voco_jax.errors import InputError
from voco_jax.files import write_aside
from voco_jax.interop.card import card_path
from voco_jax.interop.files.weights import SAFETENSORS_SUFFIX, serialise
from voco_jax.interop.match import grouped
from voco_jax.interop.names import to_torch
from voco_jax.models.encoder import PROJECTOR, Usage, classifier_sizes
from voco_jax.models.encoders import find_encoder
from voco_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Where weights come from."""

    config: Mapping[str, Any]  # the experiment, as `voco_jax.config.load.to_dict` returns it
    step: int  # completed updates
    network: str  # which of the run's, as `teacher` or `student`
    data_fingerprint: str  # of the volumes it was trained on


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    weights: Path
    card: Path  # the JSON file beside it
    tensors: int  # how many, PyTorch's buffers included
    parameters: int  # how many numbers, without the buffers
    usage: Usage

    def text(self) -> str:
        """What was written and how to use it."""
        return (
            f"wrote {self.weights}: {self.tensors} tensors, {self.parameters:,} parameters\n"
            f"wrote {self.card}\n"
            f"to load it into {self.usage.library}:\n\n"
            + "".join(f"    {line}\n" if line else "\n" for line in self.usage.snippet.splitlines())
        )


def check_output(output: str | PathLike[str]) -> Path:
    """The path to export to; call it before a long training, not only after.

    Raises:
        InputError: a folder, another suffix than .pt and .safetensors, or .pt without torch.
    """
    path = Path(output)
    if path.suffix not in WEIGHT_SUFFIXES:
        raise InputError(
            f"{path}: found suffix {path.suffix!r}, expected {' or '.join(WEIGHT_SUFFIXES)}"
        )
    if path.suffix == ".pt" and importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path}: writing .pt needs torch, which is not installed: pip install torch, or "
            f"write {SAFETENSORS_SUFFIX}"
        )
    if path.is_dir():
        raise InputError(f"{path}: found a folder, expected a file to write")
    return path


def export(
    params: Params, output: str | PathLike[str], card: Card, *, with_projector: bool = False
) -> Exported:
    """Writes parameters as a flat dict of float32 tensors with PyTorch's names, and the card.

    Both files appear complete or not at all. The buffers that PyTorch's model has are included.

    Args:
        params: one network's parameters, nested dicts of arrays (NumPy or fetchable): of an
            encoder and a projector, a decoder or a classifier, see `models.network`.
        output: a .pt or .safetensors file; an old one is replaced.
        card: where the weights come from.
        with_projector: also the projector, which is no part of the encoder.

    Raises:
        InputError: the suffix, an unwritable folder, .pt without torch, values that are not finite,
            or parameters that are not of the config's model.
    """
    path = check_output(output)
    kept = {key: tree for key, tree in params.items() if with_projector or key != PROJECTOR}
    tensors = {name: array.astype(np.float32, copy=False) for name, array in to_torch(kept).items()}
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(
            f"{path}: not written, found NaN or infinite values in {'; '.join(grouped(broken))}; "
            "export an earlier step (--step)"
        )
    items = card.config["model"].items()
    model = SimpleNamespace(**{k: tuple(v) if isinstance(v, list) else v for k, v in items})
    encoder = find_encoder(model.encoder)
    shapes = {name: array.shape for name, array in tensors.items()}
    try:
        settings = encoder.card(model, shapes)
    except ValueError as error:
        raise InputError(
            f"{path}: not written, the parameters are not of the config's model: {error} differ"
        ) from error
    parameters = sum(array.size for array in tensors.values())
    tensors |= encoder.buffers(model, tensors)
    usage = encoder.usage(path.name, settings, shapes)
    classifier = classifier_sizes(shapes)
    content = {
        "file": path.name,
        "tensors": len(tensors),
        "parameters": parameters,
        "voco_jax": voco_jax.__version__,
        "task": card.config["task"],
        **({"recipe": card.config["recipe"]} if "recipe" in card.config else {}),
        "network": card.network,
        "step": card.step,
        "total_steps": card.config["total_steps"],
        "encoder": model.encoder,
        **settings,
        "projector": PROJECTOR in kept,
        **({"classifier": classifier} if classifier else {}),
        "data_fingerprint": card.data_fingerprint,
        **usage.card,
        "usage": usage.snippet,
        **_images(card.config),
        "config": without_folders(card.config),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_both(path, tensors, content)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error}); free space or mend permissions, or choose "
            "another --output"
        ) from error
    return Exported(path, card_path(path), len(tensors), parameters, usage)


def without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment as it may be published: which data it saw is `data_fingerprint`'s to say.

    Args:
        config: as in `Card`.

    Returns:
        The same without the names of folders and lists, which tell of a hospital's disk; it is
        still a whole experiment.
    """
    public = dict(config)
    for field in ("init_from", "export_to"):
        if field in public:
            public[field] = Path(public[field]).name
    if "data" in public:
        sources = {
            name: {**source, "cache": name, "roots": [], "lists": []}
            for name, source in public["data"]["sources"].items()
        }
        public["data"] = {**public["data"], "sources": sources}
    return public


def _images(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of an experiment with classes says how images are prepared, and what the classes are.

    The chain is the first source's; sources of one experiment may differ in spacing and window.
    """
    sources: Mapping[str, Any] = config.get("data", {}).get("sources", {})
    chain: Mapping[str, Any] = next((one["chain"] for one in sources.values()), {})
    if "classes" not in chain:
        return {}
    names = [name for name, _ in chain["classes"]]
    return {"classes": names, "chain": chain, "crop_size": config["crops"]["size"]}


def _write_both(path: Path, tensors: dict[str, np.ndarray], content: dict[str, Any]) -> None:
    """Writes both files aside, then moves them in place; a card never stands by other weights."""
    weights, beside = serialise(tensors, path.suffix), card_path(path)
    content = {**content, "sha256": hashlib.sha256(weights).hexdigest()}
    parts: dict[Path, Path] = {}
    try:
        parts[path] = write_aside(path, weights)
        parts[beside] = write_aside(beside, (json.dumps(content, indent=2) + "\n").encode())
        beside.unlink(missing_ok=True)
        for target, part in parts.items():
            part.replace(target)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser(
        "-m voco_jax.interop.export",
        "Export a training run's weights for PyTorch.",
        """
--checkpoint runs/voco_10k --output voco.safetensors
--checkpoint runs/voco_10k --output voco.pt --step 100000
--checkpoint runs/demo --config configs/demo.py
""",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="the training run's --workdir")
    add("--output", metavar="FILE", help="a .pt or .safetensors file")
    add(
        "--config",
        metavar="PY",
        help="config file: without --output its export_to, as at the end of the run; "
        "--config.export_to=FILE as ever",
    )
    add("--network", help="as teacher or student; default: the teacher, if it has an encoder")
    add("--step", type=int, help="completed updates; default: the latest saved")
    add("--with-projector", action="store_true", help="also the projector's weights (proj_head.*)")
    try:
        options, overrides = parse_arguments(parser, arguments)
        if options.config is None and (options.output is None or overrides):
            raise InputError("--output: give a .pt or .safetensors file, or --config")
        output = options.output
        if options.config is not None:
            experiment = load(options.config, overrides, options.checkpoint)
            output = output or experiment.export_to
        if not output:
            raise InputError("--output: missing, and the config's export_to is empty; give one")
        check_output(output)
        from voco_jax.training.checkpoint import read_network

        params, info = read_network(options.checkpoint, options.network, options.step)
        card = Card(**{field.name: info[field.name] for field in dataclasses.fields(Card)})
        exported = export(params, output, card, with_projector=options.with_projector)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(exported.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
