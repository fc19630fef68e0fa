"""What all tasks of fine-tuning have in common: program, data, the weights to start from."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from voco_jax.config.finetuning import Finetuning
from voco_jax.config.load import to_dict
from voco_jax.data.pipeline import Draw, Part, fingerprint, stream_batches
from voco_jax.data.sources import (
    describe_volumes,
    fill_caches,
    open_caches,
    read_volumes,
    write_volumes,
)
from voco_jax.errors import InputError
from voco_jax.finetune import augment
from voco_jax.finetune.step import (
    State,
    Terms,
    abstract_state,
    init_state,
    make_predict,
    make_train_step,
)
from voco_jax.interop.export import Card, check_output, export
from voco_jax.interop.load import load_into
from voco_jax.interop.names import torch_name
from voco_jax.models.attention import Attend, attend
from voco_jax.models.conv_blocks import largest_divisor
from voco_jax.models.encoders import find_encoder
from voco_jax.models.initial_values import describe_parameters, shuffle_weights
from voco_jax.training import mesh as meshes
from voco_jax.training.attention_backend import choose_attention
from voco_jax.training.compile import build_program
from voco_jax.training.distributed import run_on_all, run_on_process_0
from voco_jax.training.optimizer import make_optimizer, schedule
from voco_jax.training.task import LogLine, Program, Task, Validation
from voco_jax.types import Batch, Params, Size

Build = Callable[[Attend], Any]
"""Attention -> a network of `models.network` that has an encoder."""


def make_program(
    experiment: Finetuning,
    mesh: Mesh,
    build: Build,
    *,
    loss: Callable[[jax.Array, jax.Array], Terms],
    label_shape: tuple[int, ...] | Size,
) -> Program[State]:
    """Builds everything that runs on the devices; compiles nothing.

    Args:
        experiment: the settings.
        mesh: of the devices.
        build: the network.
        loss: (logits, labels) -> terms, see `make_train_step`.
        label_shape: of the label of one image: its voxels, or () for one number.

    Raises:
        InputError: settings that the network cannot take, or a batch that does not split.
    """
    meshes.check_batch_size(experiment.batch_size, mesh)
    network = _checked_network(experiment, build)
    settings, size = experiment.optimizer, experiment.crops.size
    channels = experiment.data.channels
    encoder = frozenset(describe_parameters(network.encoder, size, channels))
    optimizer = make_optimizer(
        settings,
        experiment.total_steps,
        amsgrad=settings.amsgrad,
        rates=_rates(network, experiment, encoder),
    )

    def unshard(params: Params) -> Any:
        if experiment.mesh.fsdp == 1:
            return params
        return jax.lax.with_sharding_constraint(params, meshes.replicated(mesh))

    sharded = build(choose_attention(experiment.model, mesh))
    step = make_train_step(
        sharded,
        optimizer,
        loss=loss,
        draw=partial(augment.draw, **dataclasses.asdict(experiment.augment)),
        frozen=encoder if settings.freeze_encoder else frozenset(),
        seed=experiment.seed,
        microbatches=_count_microbatches(experiment, mesh),
        unshard=unshard,
    )

    def init(shardings: State) -> State:
        return init_state(network, optimizer, size, channels, experiment.seed, shardings)

    images, labels = ((experiment.batch_size, *shape) for shape in ((*size, channels), label_shape))
    return build_program(
        mesh,
        state=abstract_state(network, optimizer, size, channels),
        batch={
            "images": jax.ShapeDtypeStruct(images, jnp.dtype(experiment.data.dtype)),
            "labels": jax.ShapeDtypeStruct(labels, jnp.uint8),
        },
        init=init,
        step=step,
        predict=make_predict(sharded, unshard),
    )


def _checked_network(experiment: Finetuning, build: Build) -> Any:
    """The network with XLA's attention, checked against the crops.

    Raises:
        InputError: settings that the network cannot take.
    """
    try:
        find_encoder(experiment.model.encoder).check_size(experiment.crops.size)
    except InputError as error:
        raise InputError(f"crops.size: {error}") from error
    try:
        network = build(attend)
        describe_parameters(network, experiment.crops.size, experiment.data.channels)
    except InputError as error:
        raise InputError(f"model.{error}") from error
    return network


def _rates(
    network: nn.Module, experiment: Finetuning, encoder: frozenset[str]
) -> dict[str, Any] | None:
    """Factors of the learning rate for each parameter; None: 1 for all."""
    settings = experiment.optimizer
    if settings.layer_decay == 1 and not settings.freeze_encoder:
        return None
    level = find_encoder(experiment.model.encoder).level

    def rate(path: tuple[Any, ...], leaf: Any) -> float:
        names = [str(part.key) for part in path]
        if names[0] not in encoder:
            return 1.0
        if settings.freeze_encoder:
            return 0.0
        return float(settings.layer_decay ** (level(torch_name(names)) + 1))

    boxes = describe_parameters(network, experiment.crops.size, experiment.data.channels)
    return jax.tree_util.tree_map_with_path(rate, nn.unbox(boxes))


def _count_microbatches(experiment: Finetuning, mesh: Mesh) -> int:
    """Into how many parts each device's crops are cut, by `model.crops_per_pass`."""
    crops = experiment.batch_size // mesh.devices.size
    limit = experiment.model.crops_per_pass or crops
    return crops // largest_divisor(crops, limit)


def make_task(
    experiment: Finetuning,
    program: Program[State],
    *,
    workdir: Path,
    resumes: bool,
    log: LogLine,
    draw: Draw,
    collate: Callable[[Sequence[Any]], Any],
    describe: Callable[[Sequence[Part], Sequence[Part]], list[str]],
    make_validator: Callable[[Sequence[Part]], Callable[[State, int], Validation]],
    console: tuple[str, ...],
) -> Task[State]:
    """Fills and opens the caches and splits their volumes; see `voco_jax.training.task.MakeTask`.

    Args:
        experiment: the settings.
        program: of `make_program`.
        workdir: of the run.
        resumes: whether there is a checkpoint to go on from.
        log: for what people should know.
        draw: see `stream_batches`.
        collate: see `stream_batches`.
        describe: training and held-out volumes -> lines about their labels; InputError for labels
            that nothing can be learned from.
        make_validator: of the held-out volumes.
        console: metrics for a log line.

    Raises:
        InputError: data that cannot be used.
    """
    data, seed, settings = experiment.data, experiment.seed, to_dict(experiment)
    if summary := run_on_process_0(lambda: fill_caches(data, seed, workdir)):
        log(summary)
    caches = run_on_all(lambda: open_caches(data))
    if not resumes:
        run_on_process_0(lambda: write_volumes(caches, data, seed, workdir))
    training, held_out = run_on_all(lambda: read_volumes(caches, data, workdir))
    for line in [*describe_volumes(training, held_out), *describe(training, held_out)]:
        log(line)
    data_fingerprint = fingerprint(training)
    validates = experiment.validation.every_steps > 0

    def batches_from(step: int) -> Iterator[Batch]:
        return stream_batches(
            training,
            draw,
            collate,
            seed=seed,
            batch_size=experiment.batch_size,
            rows=meshes.local_rows(experiment.batch_size, program.mesh),
            start_step=step,
            workers=data.workers,
            prefetch=data.prefetch,
        )

    def finish(state: State) -> str:
        params = meshes.fetch(state.params, program.mesh)
        card = Card(
            config=settings,
            step=int(state.step),
            network=experiment.networks[0],
            data_fingerprint=data_fingerprint,
        )
        return run_on_process_0(lambda: export(params, experiment.export_to, card).text())

    return Task(
        program=program,
        batches=batches_from,
        warm_start=partial(initialise_from, experiment, mesh=program.mesh, log=log),
        validate=make_validator(held_out) if held_out and validates else None,
        finish=finish if experiment.export_to else None,
        data_fingerprint=data_fingerprint,
        learning_rate=schedule(experiment.optimizer, experiment.total_steps),
        experiment=settings,
        networks=experiment.networks,
        console=console,
    )


def initialise_from(experiment: Finetuning, state: State, mesh: Mesh, log: LogLine) -> State:
    """Replaces the weights by those of `init_from`, and says what matched, key by key.

    Raises:
        InputError: the file cannot be read or does not fit.
    """
    twin = experiment.init.twin
    if not experiment.init_from or twin == "scratch":
        left = f"; {experiment.init_from} is left aside (init.twin)" if experiment.init_from else ""
        log(f"weights: random{left}")
        return state
    values = meshes.fetch(state.params, mesh)
    found, report = run_on_all(
        lambda: load_into(
            values,
            experiment.init_from,
            experiment.init.allow_missing,
            experiment.init.allow_unexpected,
            model=experiment.model,
        )
    )
    log(report.text())
    if twin == "shuffled":
        found = shuffle_weights(found, experiment.seed)
        log("weights: those of the file, each array's values in a random order (init.twin)")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    return state.replace(params=jax.device_put(found, shardings))  # type: ignore[attr-defined]


def check(experiment: Finetuning) -> None:
    """Checks what is needed at the end only.

    Raises:
        InputError: the weights cannot be written to `export_to`.
    """
    if experiment.export_to:
        check_output(experiment.export_to)
