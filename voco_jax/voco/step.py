"""The training step of all recipes and its validation: (state, batch) -> (state, metrics).

The teacher is as much of the student's network as its parameters are: all of it (scope `network`),
the projector on the student's own pooled features (`projector`), or nothing (`none`).
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from voco_jax.models.encoder import PROJECTOR
from voco_jax.models.initial_values import describe_parameters, initial_parameters
from voco_jax.models.projector import cosine, unit
from voco_jax.training.images import resize, to_unit
from voco_jax.training.streams import stream
from voco_jax.types import Batch, Params, Size
from voco_jax.voco import augment, losses

Scope = Literal["none", "network", "projector"]


@flax.struct.dataclass
class State:
    """Everything that training changes. `step` is the number of completed updates."""

    step: jax.Array
    student: Params
    teacher: Params  # see `teacher_part`
    optimizer: optax.OptState


@flax.struct.dataclass
class Embeddings:
    """Projected crops of one network."""

    x: jax.Array  # (b, s, d) sub-volumes
    bases: jax.Array  # (b, n, d) base crops


def teacher_part(params: Params, scope: Scope) -> Params:
    """What a teacher of this scope has of a network's parameters."""
    if scope == "network":
        return params
    return {PROJECTOR: params[PROJECTOR]} if scope == "projector" else {}


def abstract_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    encoder_size: Size,
    scope: Scope = "network",
) -> State:
    """The state's shapes and dtypes, as `jax.ShapeDtypeStruct`."""
    params = nn.unbox(describe_parameters(network, encoder_size))
    return State(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        student=params,
        teacher=teacher_part(params, scope),
        optimizer=jax.eval_shape(optimizer.init, params),
    )


def init_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    encoder_size: Size,
    seed: int,
    scope: Scope = "network",
    shardings: State | None = None,
) -> State:
    """Random student and, independently, random teacher (as published).

    Args:
        network: a `voco_jax.models.network.Network`.
        optimizer: of the student.
        encoder_size: of the crops, voxels.
        seed: the same values come of it whatever the shardings.
        scope: of the teacher.
        shardings: of each array; None: the default device.
    """
    places = shardings or State(None, None, None, None)  # type: ignore[arg-type]
    key = jax.random.key(seed)
    draw = functools.partial(initial_parameters, network, encoder_size, shardings=places.student)
    student = draw(key=stream(key, "student"))
    return State(
        step=jax.device_put(jnp.zeros((), jnp.int32), places.step),
        student=student,
        teacher={} if scope == "none" else teacher_part(draw(key=stream(key, "teacher")), scope),
        optimizer=jax.jit(optimizer.init, out_shardings=places.optimizer)(student),
    )


def prepare(batch: Batch, encoder_size: Size) -> jax.Array:
    """Cached crops of a batch -> (b * (s + n), x, y, z) float32, sub-volumes first per volume.

    Args:
        batch: subs (b, s, x, y, z), bases (b, n, x, y, z), labels (b, s, n).
        encoder_size: voxels of the result's crops.
    """
    crops = jnp.concatenate([batch["subs"], batch["bases"]], axis=1)
    crops = crops.reshape(-1, *crops.shape[2:])
    return resize(to_unit(crops), encoder_size)


def encode(
    network: nn.Module,
    params: Params,
    crops: jax.Array,
    dropout_key: jax.Array | None = None,
    microbatches: int = 1,
) -> jax.Array:
    """All crops through one encoder.

    Args:
        network: a `voco_jax.models.network.Network`.
        params: of the network.
        crops: (n, x, y, z).
        dropout_key: for drop path; None turns it off.
        microbatches: the encoder, which takes each crop for itself, runs over so many equal parts
            of the crops one after the other and keeps nothing between them but pooled features.

    Returns:
        (n, pooled features) float32.
    """

    def one(part: jax.Array, key: jax.Array | None) -> jax.Array:
        pooled = network.apply(
            {"params": params},
            part[..., None],
            key is not None,
            rngs={} if key is None else {"dropout": key},
            method=lambda module, x, train: module.encode(x, train).pooled,
        )
        return jnp.asarray(pooled)

    if microbatches == 1:
        return one(crops, dropout_key)
    # Every part takes crops from the whole range, so that all devices work on every part.
    parts = crops.reshape(-1, microbatches, *crops.shape[1:]).swapaxes(0, 1)
    keys = None if dropout_key is None else jax.random.split(dropout_key, microbatches)
    pooled = jax.lax.map(jax.checkpoint(lambda part: one(*part)), (parts, keys))
    return pooled.swapaxes(0, 1).reshape(crops.shape[0], -1)


def project(network: nn.Module, params: Params, pooled: jax.Array, labels: jax.Array) -> Embeddings:
    """Pooled features through one projector; its batch norm sees the whole batch.

    Args:
        network: a `voco_jax.models.network.Network`.
        params: of the network; only its projector's are used.
        pooled: (b * (s + n), features), sub-volumes first per volume.
        labels: (b, s, n); only its shape is used.
    """
    batch, sub_volumes, bases = labels.shape
    rows = network.apply({"params": {PROJECTOR: params[PROJECTOR]}}, pooled, method="project")
    rows = jnp.asarray(rows).reshape(batch, sub_volumes + bases, -1)
    return Embeddings(x=rows[:, :sub_volumes], bases=rows[:, sub_volumes:])


def dropout(
    pooled: jax.Array, key: jax.Array, rate: float, kind: Literal["embedding", "feature"]
) -> jax.Array:
    """Zeroes a share `rate` at random and divides the rest by 1 - rate.

    Args:
        pooled: (n, features).
        key: the same on any number of devices.
        rate: 0 or more, less than 1.
        kind: "embedding": all features of a crop together, as published:
            `torch.nn.functional.dropout1d` takes two axes for (channels, length) and zeroes
            channels; "feature": each number alone.
    """
    shape = (pooled.shape[0], 1) if kind == "embedding" else pooled.shape
    kept = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(kept, pooled / (1 - rate), 0)


def ema(teacher: Params, student: Params, momentum: float) -> Params:
    """momentum * teacher + (1 - momentum) * student, leaf by leaf."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, student)


def make_train_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    encoder_size: Size,
    recipe: losses.Recipe,
    weigh: Callable[[losses.Losses], jax.Array] = lambda terms: terms.total,
    momentum: float,
    draw: Callable[[jax.Array, int], augment.Draws] | None,
    drop: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    seed: int,
    microbatches: int = 1,
    unshard: Callable[[Params], Params] = lambda params: params,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """One update, in the published order.

    Student forward; teacher = momentum * teacher + (1 - momentum) * student; teacher forward;
    loss; gradient; optimizer.

    Args:
        network: a `voco_jax.models.network.Network`.
        optimizer: of the student.
        encoder_size: crops are resized to it.
        recipe: one of `losses.RECIPES`.
        weigh: terms -> what is minimised.
        momentum: of the teacher.
        draw: (key, number of crops) -> augmentation; None: no augmentation.
        drop: (pooled features, key) -> what the student's projector takes; None: the same.
        seed: of augmentation, dropout and drop path; each step's keys are folded in from its
            number and the stream's name, so that a resumed run needs no random state.
        microbatches: see `encode`.
        unshard: replicates what is sharded over devices, where a network is about to be used.

    Returns:
        The step: (state, batch) -> (state, metrics); metrics are float32 scalars.
    """
    base_key = jax.random.key(seed)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(base_key, state.step)
        path_key = stream(step_key, "drop_path")
        crops, labels = prepare(batch, encoder_size), batch["labels"]
        if draw is not None:
            crops = augment.apply(crops, draw(stream(step_key, "augment"), crops.shape[0]))
        followed = {name: state.student[name] for name in state.teacher}
        teacher = ema(state.teacher, followed, momentum)

        def loss(student: Params) -> tuple[jax.Array, losses.Losses]:
            params = unshard(student)
            pooled = encode(network, params, crops, path_key, microbatches)
            dropped = pooled if drop is None else drop(pooled, stream(step_key, "dropout"))
            s = project(network, params, dropped, labels)
            t = _teach(network, unshard(teacher), crops, pooled, labels, microbatches)
            terms = recipe.loss(**_names(s, t), labels=labels)
            return weigh(terms), terms

        (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(state.student)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.student)
        metrics = {
            "loss": total,
            "pos": terms.pos,
            "neg": terms.neg,
            "reg": terms.reg,
            **({"inter": terms.inter} if recipe.inter else {}),
            "gradient_norm": optax.tree.norm(gradients),
        }
        new_state = State(
            step=state.step + 1,
            student=optax.apply_updates(state.student, updates),
            teacher=teacher,
            optimizer=optimizer_state,
        )
        return new_state, metrics

    return step


def _teach(
    network: nn.Module,
    teacher: Params,
    crops: jax.Array,
    pooled: jax.Array,
    labels: jax.Array,
    microbatches: int,
) -> Embeddings | None:
    """What the teacher makes of the crops, or of the student's pooled features; no gradient."""
    if not teacher:
        return None
    if set(teacher) != {PROJECTOR}:
        pooled = encode(network, teacher, crops, microbatches=microbatches)
    return project(network, teacher, jax.lax.stop_gradient(pooled), labels)


def _names(s: Embeddings, t: Embeddings | None) -> dict[str, jax.Array | None]:
    """The arguments of a recipe's functions."""
    return {
        "x_student": s.x,
        "bases_student": s.bases,
        "x_teacher": None if t is None else t.x,
        "bases_teacher": None if t is None else t.bases,
    }


@flax.struct.dataclass
class Predictions:
    """What validation looks at."""

    similarities: jax.Array  # (b, s, n) predicted overlaps
    labels: jax.Array  # (b, s, n) true overlaps, of the whole batch on every process
    spread: jax.Array  # scalar, see `embedding_spread`
    bases: jax.Array  # (b, n, d) unit embeddings of base crops, the teacher's where there is one
    pooled: jax.Array  # (b, features) the student's, mean over the base crops


def make_predict(
    network: nn.Module,
    *,
    encoder_size: Size,
    recipe: losses.Recipe,
    microbatches: int = 1,
    unshard: Callable[[Params], Params] = lambda params: params,
) -> Callable[[State, Batch], Predictions]:
    """Predictions without augmentation and dropout, else as the training loss sees them.

    Args: see `make_train_step`.
    """

    def predict(state: State, batch: Batch) -> Predictions:
        crops, labels = prepare(batch, encoder_size), batch["labels"]
        student = unshard(state.student)
        pooled = encode(network, student, crops, microbatches=microbatches)
        s = project(network, student, pooled, labels)
        t = _teach(network, unshard(state.teacher), crops, pooled, labels, microbatches)
        return Predictions(
            similarities=recipe.predict(**_names(s, t)),
            labels=labels,
            spread=embedding_spread(s),
            bases=unit((t or s).bases),
            pooled=pooled.reshape(len(labels), -1, pooled.shape[-1])[:, len(labels[0]) :].mean(1),
        )

    return predict


def embedding_spread(embeddings: Embeddings) -> jax.Array:
    """1 - |mean of the unit embeddings|^2: 0 where all crops have one embedding, 1 at most."""
    rows = jnp.concatenate([embeddings.x, embeddings.bases], axis=1)
    rows = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32)
    # cosine() is all pairs' product; its mean over all pairs is |mean unit row|^2.
    return 1 - jnp.mean(cosine(rows, rows))
