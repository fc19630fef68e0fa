"""Classification as a task: what runs on the devices, and what feeds and judges it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from voco_jax.config.finetuning import ClassificationFinetuning
from voco_jax.data.pipeline import Part
from voco_jax.data.whole_volumes import class_of, collate_volumes, draw_volume
from voco_jax.errors import InputError
from voco_jax.finetune import losses, task
from voco_jax.finetune.class_validation import ClassValidator
from voco_jax.finetune.step import State, Terms
from voco_jax.models.attention import Attend
from voco_jax.models.encoders import build_classification_network
from voco_jax.models.network import ClassificationNetwork
from voco_jax.training.compile import platform
from voco_jax.training.task import LogLine, Method, Program, Task


def make_program(experiment: ClassificationFinetuning, mesh: Mesh) -> Program[State]:
    """Builds everything that runs on the devices; compiles nothing.

    Raises:
        InputError: settings that the network cannot take, or a batch that does not split.
    """
    return task.make_program(
        experiment,
        mesh,
        partial(build_network, experiment, mesh),
        loss=compute_loss,
        label_shape=(),
    )


def build_network(
    experiment: ClassificationFinetuning, mesh: Mesh, attention: Attend
) -> ClassificationNetwork:
    """The network of an experiment, for the devices of a mesh."""
    return build_classification_network(
        experiment.model,
        platform(mesh),
        len(experiment.data.classes),
        experiment.head.hidden,
        attention,
    )


def compute_loss(logits: jax.Array, labels: jax.Array) -> Terms:
    """The cross entropy, and the share of the labels that are right."""
    right = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
    return {"loss": losses.cross_entropy(logits, labels), "accuracy": right}


def make_task(
    experiment: ClassificationFinetuning,
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
        draw=partial(draw_volume, crops=experiment.crops),
        collate=partial(collate_volumes, crops=experiment.crops),
        describe=partial(describe_classes, names=experiment.data.classes),
        make_validator=lambda held_out: ClassValidator(experiment, held_out, program),
        console=("accuracy",),
    )


def describe_classes(
    training: Sequence[Part], held_out: Sequence[Part], names: Sequence[str]
) -> list[str]:
    """How many volumes there are of each class, for people.

    Raises:
        InputError: a volume without a class, or all that are trained on are of one.
    """
    counts = [
        [sum(number == one for one in numbers) for number in range(len(names))]
        for numbers in (
            [class_of(part.cache, entry) for part in parts for entry in part.entries]
            for parts in (training, held_out)
        )
    ]
    present = [name for name, count in zip(names, counts[0], strict=True) if count]
    if len(present) < 2:
        raise InputError(
            f"data: all {sum(counts[0])} training volumes are of the class {present[0]!r}, "
            "expected two classes at least; are chain.classes right?"
        )
    lines = [
        f"  class {number} {name}: {ours} training volumes, {theirs} held out"
        for number, (name, ours, theirs) in enumerate(zip(names, *counts, strict=True))
    ]
    if missing := [name for name in names if name not in present]:
        lines.append(
            f"WARNING: no training volume is {', '.join(missing)}: it will never be predicted"
        )
    return lines


METHOD = Method(make_program=make_program, make_task=make_task, check=task.check)
