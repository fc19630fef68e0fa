"""Segmentation as a task: what runs on the devices, and what feeds and judges it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from voco_jax.config.finetuning import SegmentationFinetuning, SegmentationLoss
from voco_jax.data.labelled_crops import collate_crops, draw_crop
from voco_jax.data.pipeline import Part
from voco_jax.errors import InputError
from voco_jax.finetune import losses, task
from voco_jax.finetune.step import State, Terms
from voco_jax.finetune.validation import Validator
from voco_jax.models.attention import Attend
from voco_jax.models.encoders import build_segmentation_network
from voco_jax.models.network import SegmentationNetwork
from voco_jax.training.compile import platform
from voco_jax.training.task import LogLine, Method, Program, Task


def make_program(experiment: SegmentationFinetuning, mesh: Mesh) -> Program[State]:
    """Builds everything that runs on the devices; compiles nothing.

    Raises:
        InputError: settings that the network cannot take, or a batch that does not split.
    """
    return task.make_program(
        experiment,
        mesh,
        partial(build_network, experiment, mesh),
        loss=partial(compute_loss, settings=experiment.loss),
        label_shape=experiment.crops.size,
    )


def build_network(
    experiment: SegmentationFinetuning, mesh: Mesh, attention: Attend
) -> SegmentationNetwork:
    """The network of an experiment, for the devices of a mesh."""
    data = experiment.data
    return build_segmentation_network(
        experiment.model, platform(mesh), data.channels, len(data.classes), attention
    )


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


def make_task(
    experiment: SegmentationFinetuning,
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
    return task.make_task(
        experiment,
        program,
        workdir=workdir,
        resumes=resumes,
        log=log,
        draw=partial(draw_crop, crops=experiment.crops),
        collate=partial(collate_crops, crops=experiment.crops),
        describe=lambda training, _: describe_classes(training, experiment.data.classes),
        make_validator=lambda held_out: Validator(experiment, held_out, program),
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


METHOD = Method(make_program=make_program, make_task=make_task, check=task.check)
