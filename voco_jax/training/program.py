"""What runs on the devices: a config and a mesh -> sharded, compiled functions."""

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from voco_jax.config import Config
from voco_jax.errors import InputError
from voco_jax.models.swin_unetr import VoCoNetwork, check_crop_size
from voco_jax.training import mesh as meshes
from voco_jax.training.kernels import choose_attention
from voco_jax.training.optimizer import make_optimizer
from voco_jax.voco import augment, losses
from voco_jax.voco.step import (
    State,
    abstract_state,
    dropout,
    init_state,
    make_predict,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions of a run; both are jitted and can be lowered for devices that are not here.

    Attributes:
        state: abstract state with its shardings.
        batch: abstract global batch with its shardings; see `voco_jax.voco.step.Batch`.
        init: () -> random state, sharded.
        step: (state, batch) -> (state, metrics); the state given is used up.
        predict: (state, batch) -> predictions, whole on every process.
    """

    state: State
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], State]
    step: Any
    predict: Any


def make_program(config: Config, mesh: Mesh) -> Program:
    """Builds everything; compiles nothing.

    Raises:
        InputError: settings that the encoder cannot take, or a batch that does not split.
    """
    meshes.check_batch_size(config.batch_size, mesh)
    network = make_network(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    size, crops = config.crops.encoder_size, config.crops
    replicated, by_volume = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    recipe, scope = losses.RECIPES[config.recipe], config.teacher.scope
    state = abstract_state(network, optimizer, size, scope)
    shardings = meshes.state_sharding(mesh, state)

    def whole(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, replicated)

    gather = whole if config.mesh.fsdp > 1 else lambda params: params
    options = compiler_options(mesh)
    spread = network.clone(attention=choose_attention(config.model, mesh))
    step = jax.jit(
        make_train_step(
            spread,
            optimizer,
            encoder_size=size,
            recipe=recipe,
            weigh=partial(losses.weighted_total, **dataclasses.asdict(config.loss)),
            momentum=config.teacher.momentum,
            draw=partial(
                augment.draw,
                flip_probability=config.augment.flip_probability,
                rotate_probability=config.augment.rotate_probability,
                shift_probability=config.augment.shift_probability,
                shift=config.augment.shift,
            ),
            drop=partial(dropout, rate=config.dropout.rate, kind=config.dropout.kind)
            if config.dropout.rate
            else None,
            seed=config.seed,
            passes=count_passes(config, mesh, crops.sub_volumes),
            gather=gather,
        ),
        in_shardings=(shardings, by_volume),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=options,
    )
    predict = jax.jit(
        make_predict(
            spread,
            encoder_size=size,
            recipe=recipe,
            passes=count_passes(config, mesh, config.validation.sub_volumes),
            gather=gather,
        ),
        in_shardings=(shardings, by_volume),
        out_shardings=replicated,
        compiler_options=options,
    )
    bases, dtype = math.prod(crops.grid), jnp.dtype(config.data.dtype)
    shapes = {
        "subs": ((crops.sub_volumes, *crops.crop_size), dtype),
        "bases": ((bases, *crops.crop_size), dtype),
        "labels": ((crops.sub_volumes, bases), jnp.float32),
    }
    return Program(
        state=jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            state,
            shardings,
        ),
        batch={
            name: jax.ShapeDtypeStruct((config.batch_size, *shape), kind, sharding=by_volume)
            for name, (shape, kind) in shapes.items()
        },
        init=partial(init_state, network, optimizer, size, config.seed, scope, shardings, options),
        step=step,
        predict=predict,
    )


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """For `jax.jit`; None: XLA's own.

    On a CPU, XLA would merge recomputed activations with the first ones, so that remat would save
    nothing; and a small step would compile for twice as long (docs/benchmarks.md). What XLA_FLAGS
    names is left to it.
    """
    if _platform(mesh) != "cpu":
        return None
    options: dict[str, Any] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    sooner = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}
    named = os.environ.get("XLA_FLAGS", "")
    sooner = {name: value for name, value in sooner.items() if f"--{name}=" not in named}
    try:
        jax.jit(lambda: 0, compiler_options=sooner)()
    except jax.errors.JaxRuntimeError:  # an XLA that has these options no more
        return options
    return options | sooner


def make_network(config: Config, mesh: Mesh) -> nn.Module:
    """The student's and teacher's network, checked against the crops.

    Raises:
        InputError: settings that the encoder cannot take.
    """
    model = config.model
    convolution = model.convolution
    if convolution == "auto":
        convolution = "planes" if _platform(mesh) == "cpu" else "lax"
    try:
        check_crop_size(config.crops.encoder_size)
    except ValueError as error:
        raise InputError(f"crops.encoder_size: {error}") from error
    network = VoCoNetwork(
        feature_size=model.feature_size,
        depths=model.depths,
        num_heads=model.num_heads,
        window_size=model.window_size,
        patch_merging=model.patch_merging,
        use_v2=model.use_v2,
        conv_encoders=model.conv_encoders,
        drop_path_rate=model.drop_path_rate,
        projector_size=model.projector_size,
        remat=model.remat,
        dtype=jnp.dtype(model.dtype),
        convolution=convolution,
    )
    # Tracing the initialisation checks every other setting without computing anything.
    crops = jax.ShapeDtypeStruct((2, *config.crops.encoder_size, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: network.init(jax.random.key(0), x, False), crops)
    except InputError as error:
        raise InputError(f"model.{error}") from error
    return network


def count_passes(config: Config, mesh: Mesh, sub_volumes: int) -> int:
    """Into how many parts each device's crops are cut, by `model.crops_per_pass`."""
    volumes = config.batch_size // mesh.devices.size
    crops = volumes * (sub_volumes + math.prod(config.crops.grid))
    limit = config.model.crops_per_pass or crops
    return next(
        passes for passes in range(1, crops + 1) if crops % passes == 0 and crops // passes <= limit
    )


def _platform(mesh: Mesh) -> str:
    return str(mesh.devices.flat[0].platform)
