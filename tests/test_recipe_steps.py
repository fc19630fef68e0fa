"""A whole training step of the recipes on real CT: metrics, gradient and teacher.

The step runs once, jitted, in float64. What it should have found is put together here: pooled
features from a separate `encode`, then PyTorch's projector and the oracle's losses, with
PyTorch's gradients. voco_10k's step is compared with a whole PyTorch model in test_step.py.
"""

import functools

import by_rule
import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import optax
import pytest
import torch
import voco_reference as oracle
from conftest import shared_file
from networks import network, shapes

from configs import voco_10k
from voco_jax.config.load import parse
from voco_jax.data.crops import base_origins, cut, overlap_labels
from voco_jax.data.volumes import prepare_volume, quantise
from voco_jax.training.optimizer import scale_by_adam
from voco_jax.training.streams import stream
from voco_jax.voco import losses
from voco_jax.voco import step as voco_step

GRID, CROP, ENCODER_SIZE = (2, 1, 2), (24, 32, 16), (32, 32, 64)  # neither cubic nor one layer
WEIGHTS = {"pos": 0.5, "neg": 2.0, "reg": 0.25, "inter": 3.0}
MOMENTUM, SEED, RATE = 0.9, 5, 0.4
# CTs and the corner of their sub-volume, which shares nothing with some base crops.
CTS = {"abdomen_totalseg": (0, 0, 5), "heart_totalseg": (7, 0, 0)}


@functools.cache
def _batch():
    """Two volumes of real CT as the chain makes them: uint8 crops, one sub-volume each."""
    config = voco_10k.get_config()
    config.crops.grid, config.crops.crop_size = GRID, CROP
    chain = config.data.sources.ct.chain
    chain.volume_size = tuple(np.multiply(GRID, CROP).tolist())
    chain = parse(config).data.sources["ct"].chain
    batch = {"subs": [], "bases": [], "labels": []}
    for name, origin in CTS.items():
        volume = quantise(
            prepare_volume(shared_file("ct", "images", f"{name}.nii.gz"), chain).voxels, chain.dtype
        )
        origins = np.array([origin])
        batch["subs"].append(cut(volume, origins, CROP))
        batch["bases"].append(cut(volume, base_origins(GRID, CROP), CROP))
        batch["labels"].append(overlap_labels(origins, GRID, CROP).astype(np.float32))
    return {key: np.stack(values) for key, values in batch.items()}


SCOPES = {"paper": "none", "voco_v2": "projector"}
DROP = {"voco_v2": functools.partial(voco_step.dropout, rate=RATE, kind="embedding")}


@functools.cache
def _network():
    """In float64; parameters by the golden files' rule, and others for a teacher.

    The smallest: Swin without v2 blocks and without the convolution encoders, which compiles in
    half the time. To a step they make no difference, and test_step.py has them.
    """
    options = {
        "feature_size": 12,
        "window_size": (4, 4, 4),
        "depths": (1, 1, 1, 1),
        "use_v2": False,
        "conv_encoders": False,
        "projector_size": 16,
    }
    template = shapes(network(**options), ENCODER_SIZE)
    networks = (_parameters(template, prefix) for prefix in ("", "teacher."))
    return network(**options, dtype=jnp.float64), *networks


@functools.cache
def _pooled():
    """The student's features of all crops."""
    network, student, _ = _network()
    with jax.enable_x64(True):
        crops = voco_step.prepare(_batch(), ENCODER_SIZE)
        return np.asarray(jax.jit(functools.partial(voco_step.encode, network))(student, crops))


@pytest.mark.parametrize("recipe", SCOPES)
def test_step_on_real_ct(recipe):
    batch, pooled, drop = _batch(), _pooled(), DROP.get(recipe)
    network, student, other = _network()
    teacher = voco_step.teacher_part(other, SCOPES[recipe])
    optimizer = optax.chain(scale_by_adam(0.9, 0.999, 1e-8, amsgrad=True), optax.scale(-1e-3))
    with jax.enable_x64(True):
        state = voco_step.State(jnp.zeros((), jnp.int32), student, teacher, optimizer.init(student))
        step = voco_step.make_train_step(
            network,
            optimizer,
            encoder_size=ENCODER_SIZE,
            recipe=losses.RECIPES[recipe],
            weigh=functools.partial(losses.weighted_total, **WEIGHTS),
            momentum=MOMENTUM,
            draw=None,
            drop=drop,
            seed=SEED,
        )
        new, metrics = jax.device_get(jax.jit(step)(state, batch))
        dropped = pooled
        if drop is not None:
            step_key = jax.random.fold_in(jax.random.key(SEED), 0)
            dropped = np.asarray(drop(pooled, stream(step_key, "dropout")))
            kept = (dropped != 0).any(axis=1)
            assert kept.any()
            assert not kept.all()

    averaged = jax.tree.map(
        lambda t, s: MOMENTUM * t + (1 - MOMENTUM) * s,
        teacher,
        {name: student[name] for name in teacher},
    )
    _check_close(by_rule.flatten(new.teacher), by_rule.flatten(averaged), 1e-12)

    ours = Projector(student["proj_head"])
    rows = _split("student", ours(dropped), batch)
    if teacher:
        with torch.no_grad():
            rows |= _split("teacher", Projector(averaged["proj_head"])(pooled), batch)
    terms = oracle.terms(recipe, rows, torch.from_numpy(batch["labels"]).double())
    loss = sum(WEIGHTS[name] * term for name, term in terms.items())
    loss.backward()
    if recipe == "paper":
        del terms["inter"]
    assert metrics.keys() == terms.keys() | {"loss", "gradient_norm"}
    for name, value in (terms | {"loss": loss}).items():
        assert value > 0
        np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-5, err_msg=name)

    # The first moment after a step is a tenth of the gradient: of the weighted loss, and here
    # of the projector, which follows from the pooled features alone.
    gradient = {name: moment / 0.1 for name, moment in by_rule.flatten(new.optimizer[0].mu).items()}
    expected = {
        f"proj_head.{name}": by_rule.our_layout(name, value)
        for name, value in reference.gradients(ours.layers).items()
    }
    _check_close({name: gradient[name] for name in expected}, expected, 1e-5)
    norm = np.sqrt(sum(np.sum(value**2) for value in gradient.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)


def _parameters(template, prefix):
    """By the golden files' rule, of other keys for the teacher."""
    values = {
        name: by_rule.weight_by_rule(prefix + name, by_rule.torch_shape(name, leaf))
        for name, leaf in by_rule.flatten(template).items()
    }
    return jax.tree.map(np.float64, by_rule.load(template, values))


class Projector:
    """The published projector in PyTorch, with our parameters."""

    def __init__(self, params):
        flat = {
            name: torch.tensor(value if value.ndim == 1 else value.T)
            for name, value in by_rule.flatten(params).items()
        }

        def layer(name):
            inputs, outputs = flat[f"{name}.0.weight"].shape[::-1]
            return torch.nn.Linear(inputs, outputs, dtype=torch.float64)

        def norm(width):
            return torch.nn.BatchNorm1d(width, affine=False, track_running_stats=False)

        width = len(flat["layer1.0.bias"])
        self.layers = torch.nn.ModuleDict(
            {
                "layer1": torch.nn.Sequential(layer("layer1"), norm(width), torch.nn.ReLU()),
                "layer2": torch.nn.Sequential(layer("layer2"), norm(width), torch.nn.ReLU()),
                "layer3": torch.nn.Sequential(layer("layer3")),
            }
        )
        self.layers.load_state_dict(flat)

    def __call__(self, pooled):
        x = torch.tensor(np.asarray(pooled))
        for layer in self.layers.values():
            x = layer(x)
        return x


def _split(who, rows, batch):
    """Rows of all crops, sub-volumes first per volume -> x and bases."""
    volumes, count = batch["labels"].shape[:2]
    rows = rows.reshape(volumes, -1, rows.shape[-1])
    return {f"x_{who}": rows[:, :count], f"bases_{who}": rows[:, count:]}


def _check_close(found, expected, tolerance):
    """By norms; what is 0 but for rounding, as the gradient of a bias before a norm, by a floor."""
    assert found.keys() == expected.keys()
    floor = tolerance / 10 * max((np.linalg.norm(value) for value in expected.values()), default=0)
    for name, value in expected.items():
        distance = np.linalg.norm(found[name] - value)
        assert distance <= tolerance * np.linalg.norm(value) + floor, name
