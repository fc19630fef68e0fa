"""Segmentation as a task: what runs on the devices, and what feeds and judges it."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from voco_jax.config.finetuning import Finetuning, SegmentationLoss
from voco_jax.config.load import to_dict
from voco_jax.data.labelled_crops import collate_crops, draw_crop
from voco_jax.data.pipeline import Part, fingerprint, stream_batches
from voco_jax.data.sources import (
    describe_volumes,
    fill_caches,
    open_caches,
    read_volumes,
    write_volumes,
)
from voco_jax.errors import InputError
from voco_jax.finetune import augment, losses
from voco_jax.finetune.step import (
    State,
    Terms,
    abstract_state,
    init_state,
    make_predict,
    make_train_step,
)
from voco_jax.finetune.validation import Validator
from voco_jax.interop.export import Card, check_output, export
from voco_jax.interop.load import load_into
from voco_jax.interop.names import torch_name
from voco_jax.models.attention import Attend, attend
from voco_jax.models.encoders import build_segmentation_network, find_encoder
from voco_jax.models.initial_values import describe_parameters, shuffle_weights
from voco_jax.models.network import SegmentationNetwork
from voco_jax.training import mesh as meshes
from voco_jax.training.attention_backend import choose_attention
from voco_jax.training.compile import build_program, platform
from voco_jax.training.distributed import run_on_all, run_on_process_0
from voco_jax.training.optimizer import make_optimizer, schedule
from voco_jax.training.task import LogLine, Method, Program, Task
from voco_jax.types import Batch, Params


def make_program(experiment: Finetuning, mesh: Mesh) -> Program[State]:
    """Builds everything that runs on the devices; compiles nothing.

    Raises:
        InputError: settings that the network cannot take, or a batch that does not split.
    """
    meshes.check_batch_size(experiment.batch_size, mesh)
    network = make_network(experiment, mesh)
    encoder = _encoder_names(network, experiment)
    settings, size = experiment.optimizer, experiment.crops.size
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

    sharded = build_network(experiment, mesh, choose_attention(experiment.model, mesh))
    step = make_train_step(
        sharded,
        optimizer,
        loss=partial(compute_loss, settings=experiment.loss),
        draw=partial(augment.draw, **dataclasses.asdict(experiment.augment)),
        frozen=encoder if settings.freeze_encoder else frozenset(),
        seed=experiment.seed,
        microbatches=_count_microbatches(experiment, mesh),
        unshard=unshard,
    )

    def init(shardings: State) -> State:
        return init_state(network, optimizer, size, experiment.seed, shardings)

    shape = (experiment.batch_size, *size)
    return build_program(
        mesh,
        state=abstract_state(network, optimizer, size),
        batch={
            "images": jax.ShapeDtypeStruct(shape, jnp.dtype(experiment.data.dtype)),
            "labels": jax.ShapeDtypeStruct(shape, jnp.uint8),
        },
        init=init,
        step=step,
        predict=make_predict(sharded, unshard),
    )


def make_network(experiment: Finetuning, mesh: Mesh) -> SegmentationNetwork:
    """The network with XLA's attention, checked against the crops.

    Raises:
        InputError: settings that the network cannot take.
    """
    try:
        find_encoder(experiment.model.encoder).check_size(experiment.crops.size)
    except InputError as error:
        raise InputError(f"crops.size: {error}") from error
    try:
        network = build_network(experiment, mesh, attend)
        describe_parameters(network, experiment.crops.size)
    except InputError as error:
        raise InputError(f"model.{error}") from error
    return network


def build_network(experiment: Finetuning, mesh: Mesh, attention: Attend) -> SegmentationNetwork:
    """The network of an experiment, for the devices of a mesh."""
    classes = len(experiment.data.classes)
    return build_segmentation_network(experiment.model, platform(mesh), classes, attention)


def compute_loss(logits: jax.Array, labels: jax.Array, settings: SegmentationLoss) -> Terms:
    """MONAI's DiceCELoss and its terms, unweighted."""
    dice = losses.dice_loss(
        logits,
        labels,
        include_background=settings.include_background,
        smooth_nr=settings.smooth_nr,
        smooth_dr=settings.smooth_dr,
        batch=settings.batch,
    )
    cross_entropy = losses.cross_entropy(logits, labels)
    total = settings.dice * dice + settings.cross_entropy * cross_entropy
    return {"loss": total, "dice": dice, "cross_entropy": cross_entropy}


def _encoder_names(network: SegmentationNetwork, experiment: Finetuning) -> frozenset[str]:
    """The encoder's part of the parameters, by names at the top level."""
    return frozenset(describe_parameters(network.encoder, experiment.crops.size))


def _rates(
    network: SegmentationNetwork, experiment: Finetuning, encoder: frozenset[str]
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

    boxes = describe_parameters(network, experiment.crops.size)
    return jax.tree_util.tree_map_with_path(rate, nn.unbox(boxes))


def _count_microbatches(experiment: Finetuning, mesh: Mesh) -> int:
    """Into how many parts each device's crops are cut, by `model.crops_per_pass`."""
    crops = experiment.batch_size // mesh.devices.size
    limit = experiment.model.crops_per_pass or crops
    return next(n for n in range(1, crops + 1) if crops % n == 0 and crops // n <= limit)


def make_task(
    experiment: Finetuning,
    program: Program[State],
    *,
    workdir: Path,
    resumes: bool,
    log: LogLine,
) -> Task[State]:
    """Fills and opens the caches and splits their volumes; see `voco_jax.training.task.MakeTask`.

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
    for line in [*describe_volumes(training, held_out), *describe_classes(training, data.classes)]:
        log(line)
    data_fingerprint = fingerprint(training)

    def batches_from(step: int) -> Iterator[Batch]:
        return stream_batches(
            training,
            partial(draw_crop, crops=experiment.crops),
            partial(collate_crops, crops=experiment.crops),
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
        validate=Validator(experiment, held_out, program) if held_out else None,
        finish=finish if experiment.export_to else None,
        data_fingerprint=data_fingerprint,
        learning_rate=schedule(experiment.optimizer, experiment.total_steps),
        experiment=settings,
        networks=experiment.networks,
        console=("dice", "cross_entropy"),
    )


def describe_classes(training: Sequence[Part], names: Sequence[str]) -> list[str]:
    """Which classes there are in the training volumes, for people.

    Raises:
        InputError: there is no class in any of them.
    """
    voxels = [0] * len(names)
    volumes = [0] * len(names)
    for part in training:
        for entry in part.entries:
            assert entry.label is not None
            for number, chunks in enumerate(entry.label.chunks, 1):
                voxels[number] += sum(count for _, count in chunks)
                volumes[number] += bool(chunks)
    if not any(voxels):
        raise InputError(
            f"data: all {sum(len(part.entries) for part in training)} training volumes are "
            "background alone, expected some class in some of them; are chain.classes right?"
        )
    lines = [
        f"  class {number} {names[number]}: in {volumes[number]} training volumes, "
        f"{voxels[number]:,} voxels"
        for number in range(1, len(names))
    ]
    missing = [name for name, count in zip(names, voxels, strict=True) if not count][1:]
    if missing:
        lines.append(
            f"WARNING: no training volume has {', '.join(missing)}: it will never be predicted"
        )
    return lines


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


METHOD = Method(make_program=make_program, make_task=make_task, check=check)
