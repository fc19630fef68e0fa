"""VoCo pre-training as a task: what runs on the devices, and what feeds and judges it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from voco_jax.config.load import to_dict
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.pipeline import batches, fingerprint
from voco_jax.data.sources import (
    describe_volumes,
    fill_caches,
    open_caches,
    read_volumes,
    write_volumes,
)
from voco_jax.errors import InputError
from voco_jax.interop.export import Card, check_output, export
from voco_jax.interop.load import load_into
from voco_jax.models.attention import Attend, attend
from voco_jax.models.encoder import PROJECTOR
from voco_jax.models.encoders import build_encoder, find_encoder
from voco_jax.models.initial_values import describe_parameters
from voco_jax.models.network import Network
from voco_jax.training import mesh as meshes
from voco_jax.training.attention_backend import choose_attention
from voco_jax.training.compile import build_program, platform
from voco_jax.training.distributed import run_on_all, run_on_process_0
from voco_jax.training.optimizer import make_optimizer, schedule
from voco_jax.training.task import LogLine, Method, Program, Task
from voco_jax.types import Batch, Params
from voco_jax.voco import augment, losses
from voco_jax.voco.health import blind_loss, few_volumes
from voco_jax.voco.step import (
    State,
    abstract_state,
    dropout,
    init_state,
    make_predict,
    make_train_step,
)
from voco_jax.voco.validation import Validator


def make_program(experiment: Pretraining, mesh: Mesh) -> Program[State]:
    """Builds everything that runs on the devices; compiles nothing.

    Raises:
        InputError: settings that the encoder cannot take, or a batch that does not split.
    """
    meshes.check_batch_size(experiment.batch_size, mesh)  # before crops are counted by it
    network = make_network(experiment, mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.total_steps)
    size, crops = experiment.crops.encoder_size, experiment.crops
    recipe, scope = losses.RECIPES[experiment.recipe], experiment.teacher.scope

    def unshard(params: Params) -> Any:
        if experiment.mesh.fsdp == 1:
            return params
        return jax.lax.with_sharding_constraint(params, meshes.replicated(mesh))

    sharded = build_network(experiment, mesh, choose_attention(experiment.model, mesh))
    step = make_train_step(
        sharded,
        optimizer,
        encoder_size=size,
        recipe=recipe,
        weigh=weigh(experiment),
        momentum=experiment.teacher.momentum,
        draw=partial(augment.draw, **dataclasses.asdict(experiment.augment)),
        drop=partial(dropout, rate=experiment.dropout.rate, kind=experiment.dropout.kind)
        if experiment.dropout.rate
        else None,
        seed=experiment.seed,
        microbatches=count_microbatches(experiment, mesh, crops.sub_volumes),
        unshard=unshard,
    )
    predict = make_predict(
        sharded,
        encoder_size=size,
        recipe=recipe,
        microbatches=count_microbatches(experiment, mesh, experiment.validation.sub_volumes),
        unshard=unshard,
    )

    def init(shardings: State) -> State:
        return init_state(network, optimizer, size, experiment.seed, scope, shardings)

    volumes, bases = experiment.batch_size, math.prod(crops.grid)
    cached, labels = jnp.dtype(experiment.data.dtype), (volumes, crops.sub_volumes, bases)
    return build_program(
        mesh,
        state=abstract_state(network, optimizer, size, scope),
        batch={
            "subs": jax.ShapeDtypeStruct((*labels[:2], *crops.crop_size), cached),
            "bases": jax.ShapeDtypeStruct((volumes, bases, *crops.crop_size), cached),
            "labels": jax.ShapeDtypeStruct(labels, jnp.float32),
        },
        init=init,
        step=step,
        predict=predict,
    )


def weigh(experiment: Pretraining) -> Callable[[losses.Losses], jax.Array]:
    """Terms of the loss -> what is minimised."""
    return partial(losses.weighted_total, **dataclasses.asdict(experiment.loss))


def make_network(experiment: Pretraining, mesh: Mesh) -> Network:
    """The student's and teacher's network with XLA's attention, checked against the crops.

    Raises:
        InputError: settings that the encoder cannot take.
    """
    try:
        find_encoder(experiment.model.encoder).check_size(experiment.crops.encoder_size)
    except InputError as error:
        raise InputError(f"crops.encoder_size: {error}") from error
    network = build_network(experiment, mesh, attend)
    try:
        describe_parameters(network, experiment.crops.encoder_size)
    except InputError as error:
        raise InputError(f"model.{error}") from error
    return network


def build_network(experiment: Pretraining, mesh: Mesh, attention: Attend) -> Network:
    """The network of an experiment, for the devices of a mesh."""
    model = experiment.model
    encoder = build_encoder(model, platform(mesh), attention)
    return Network(encoder, experiment.projector_size, jnp.dtype(model.dtype))


def count_microbatches(experiment: Pretraining, mesh: Mesh, sub_volumes: int) -> int:
    """Into how many parts each device's crops are cut, by `model.crops_per_pass`."""
    volumes = experiment.batch_size // mesh.devices.size
    crops = volumes * (sub_volumes + math.prod(experiment.crops.grid))
    limit = experiment.model.crops_per_pass or crops
    return next(
        count for count in range(1, crops + 1) if crops % count == 0 and crops // count <= limit
    )


def make_task(
    experiment: Pretraining,
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
    for line in describe_volumes(training, held_out):
        log(line)
    data_fingerprint = fingerprint(training)

    def batches_from(step: int) -> Iterator[Batch]:
        return batches(
            training,
            experiment.crops,
            seed=seed,
            batch_size=experiment.batch_size,
            rows=meshes.local_rows(experiment.batch_size, program.mesh),
            start_step=step,
            workers=data.workers,
            prefetch=data.prefetch,
        )

    def finish(state: State) -> str:
        network = experiment.networks[0]
        params = meshes.fetch(getattr(state, network), program.mesh)
        card = Card(
            config=settings,
            step=int(state.step),
            network=network,
            data_fingerprint=data_fingerprint,
        )
        return run_on_process_0(lambda: export(params, experiment.export_to, card).text())

    return Task(
        program=program,
        batches=batches_from,
        warm_start=partial(initialise_from, experiment, mesh=program.mesh, log=log)
        if experiment.init_from
        else None,
        validate=Validator(experiment, training, held_out, program) if held_out else None,
        finish=finish if experiment.export_to else None,
        data_fingerprint=data_fingerprint,
        learning_rate=schedule(experiment.optimizer, experiment.total_steps),
        experiment=settings,
        networks=experiment.networks,
        console=("pos", "neg", "reg", "inter"),
        findings=tuple(few_volumes(training, experiment.crops.grid, experiment.batch_size)),
        blind_loss=cache(  # a flat run asks for it at every log line
            partial(
                blind_loss, losses.RECIPES[experiment.recipe], experiment.crops, weigh(experiment)
            )
        ),
    )


def initialise_from(experiment: Pretraining, state: State, mesh: Mesh, log: LogLine) -> State:
    """Replaces both networks' weights by those of `init_from`, and says what matched.

    A teacher that is only a projector takes that of the file, if it has one.

    Raises:
        InputError: the file cannot be read or does not fit.
    """

    def load(params: Any) -> tuple[Any, Any]:
        values = meshes.fetch(params, mesh)
        found, report = run_on_all(
            lambda: load_into(
                values,
                experiment.init_from,
                experiment.init.allow_missing,
                experiment.init.allow_unexpected,
                model=experiment.model,
            )
        )
        return jax.device_put(found, jax.tree.map(lambda leaf: leaf.sharding, params)), report

    student, report = load(state.student)
    teacher = state.teacher
    if experiment.teacher.scope == "network":
        teacher, _ = load(teacher)
    elif any(name.startswith(f"{PROJECTOR}.") for name in report.matched):
        teacher = {name: student[name] for name in teacher}
    log(report.text())
    return state.replace(student=student, teacher=teacher)  # type: ignore[attr-defined]


def check(experiment: Pretraining) -> None:
    """Checks what is needed at the end only.

    Raises:
        InputError: the weights cannot be written to `export_to`.
    """
    if experiment.export_to:
        check_output(experiment.export_to)


METHOD = Method(make_program=make_program, make_task=make_task, check=check)
