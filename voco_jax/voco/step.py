"""The voco_10k training step and its validation: (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from voco_jax.voco import augment, losses

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]  # subs (b, s, x, y, z), bases (b, n, x, y, z), labels (b, s, n)


@flax.struct.dataclass
class State:
    """Everything that training changes. `step` is the number of completed updates."""

    step: jax.Array
    student: Params
    teacher: Params
    optimizer: optax.OptState


@flax.struct.dataclass
class Embeddings:
    """Projected crops of one network."""

    x: jax.Array  # (b, s, d) sub-volumes
    bases: jax.Array  # (b, n, d) base crops


def abstract_state(
    network: nn.Module, optimizer: optax.GradientTransformation, encoder_size: augment.Size
) -> State:
    """The state's shapes and dtypes, as `jax.ShapeDtypeStruct`."""
    params = jax.eval_shape(_initialiser(network, encoder_size), jax.random.key(0))
    return State(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        student=params,
        teacher=params,
        optimizer=jax.eval_shape(optimizer.init, params),
    )


def init_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    encoder_size: augment.Size,
    seed: int,
    shardings: State | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> State:
    """Random student and, independently, random teacher (as published).

    One network's initialisation is compiled and called twice: compiling takes most of the time.

    Args:
        network: a `VoCoNetwork`.
        optimizer: of the student.
        encoder_size: of the crops, voxels.
        seed: the same values come of it whatever the shardings.
        shardings: of each array; None: the default device.
        compiler_options: of `jax.jit`.
    """
    places = shardings or State(None, None, None, None)  # type: ignore[arg-type]
    student_key, teacher_key = jax.random.split(jax.random.key(seed))
    initialise = jax.jit(
        _initialiser(network, encoder_size),
        out_shardings=places.student,
        compiler_options=compiler_options,
    )
    student = initialise(student_key)
    return State(
        step=jax.device_put(jnp.zeros((), jnp.int32), places.step),
        student=student,
        teacher=initialise(teacher_key),
        optimizer=jax.jit(optimizer.init, out_shardings=places.optimizer)(student),
    )


def _initialiser(network: nn.Module, encoder_size: augment.Size) -> Callable[[jax.Array], Params]:
    crops = jnp.zeros((2, *encoder_size, 1), jnp.float32)
    return lambda key: network.init(key, crops, False)["params"]


def prepare(batch: Batch, encoder_size: augment.Size) -> jax.Array:
    """Cached crops of a batch -> (b * (s + n), x, y, z) float32, sub-volumes first per volume."""
    crops = jnp.concatenate([batch["subs"], batch["bases"]], axis=1)
    crops = crops.reshape(-1, *crops.shape[2:])
    return augment.resize(augment.to_unit(crops), encoder_size)


def embed(
    network: nn.Module,
    params: Params,
    crops: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array | None = None,
    passes: int = 1,
) -> Embeddings:
    """All crops through one network; the projector's batch norm sees the whole batch.

    Args:
        network: a `VoCoNetwork`.
        params: of the network.
        crops: (b * (s + n), x, y, z).
        labels: (b, s, n); only its shape is used.
        dropout_key: for drop path; None turns it off.
        passes: the encoder, which takes each crop for itself, runs over so many equal parts of
            the crops one after the other and keeps nothing between them but pooled features.
    """
    batch, sub_volumes, bases = labels.shape

    def encode(part: jax.Array, key: jax.Array | None) -> jax.Array:
        pooled = network.apply(
            {"params": params},
            part[..., None],
            key is not None,
            rngs={} if key is None else {"dropout": key},
            method=lambda module, x, train: module.encode(x, train).pooled,
        )
        return jnp.asarray(pooled)

    if passes == 1:
        pooled = encode(crops, dropout_key)
    else:
        # Every part takes crops from the whole range, so that all devices work on every part.
        parts = crops.reshape(-1, passes, *crops.shape[1:]).swapaxes(0, 1)
        keys = None if dropout_key is None else jax.random.split(dropout_key, passes)
        pooled = jax.lax.map(jax.checkpoint(lambda part: encode(*part)), (parts, keys))
        pooled = pooled.swapaxes(0, 1).reshape(crops.shape[0], -1)
    rows = network.apply({"params": params}, pooled, method="project")
    rows = jnp.asarray(rows).reshape(batch, sub_volumes + bases, -1)
    return Embeddings(x=rows[:, :sub_volumes], bases=rows[:, sub_volumes:])


def ema(teacher: Params, student: Params, momentum: float) -> Params:
    """momentum * teacher + (1 - momentum) * student, leaf by leaf."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, student)


def make_train_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    encoder_size: augment.Size,
    momentum: float,
    draw: Callable[[jax.Array, int], augment.Draws] | None,
    seed: int,
    passes: int = 1,
    gather: Callable[[Params], Params] = lambda params: params,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """One update, in the published order.

    Student forward; teacher = momentum * teacher + (1 - momentum) * student; teacher forward;
    loss; gradient; optimizer.

    Args:
        network: see `embed`.
        optimizer: of the student.
        encoder_size: crops are resized to it.
        momentum: of the teacher.
        draw: (key, number of crops) -> augmentation; None: no augmentation.
        seed: of augmentation and drop path; each step's key is folded in from its number, so
            that a resumed run needs no random state.
        passes: see `embed`.
        gather: makes whole what is sharded over devices, where a network is about to be used.

    Returns:
        The step: (state, batch) -> (state, metrics); metrics are float32 scalars.
    """
    base_key = jax.random.key(seed)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(base_key, state.step))
        crops, labels = prepare(batch, encoder_size), batch["labels"]
        if draw is not None:
            crops = augment.apply(crops, draw(augment_key, crops.shape[0]))
        teacher = ema(state.teacher, state.student, momentum)

        def loss(student: Params) -> tuple[jax.Array, losses.Losses]:
            s = embed(network, gather(student), crops, labels, dropout_key, passes)
            t = embed(network, gather(teacher), crops, labels, passes=passes)
            terms = losses.voco_10k(
                x_student=s.x,
                bases_student=s.bases,
                x_teacher=t.x,
                bases_teacher=t.bases,
                labels=labels,
            )
            return terms.total, terms

        gradients, terms = jax.grad(loss, has_aux=True)(state.student)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.student)
        metrics = {
            "loss": terms.total,
            "pos": terms.pos,
            "neg": terms.neg,
            "reg": terms.reg,
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


@flax.struct.dataclass
class Predictions:
    """What validation looks at."""

    similarities: jax.Array  # (b, s, n) predicted overlaps
    labels: jax.Array  # (b, s, n) true overlaps, of the whole batch on every process
    spread: jax.Array  # scalar, see `embedding_spread`


def make_predict(
    network: nn.Module,
    *,
    encoder_size: augment.Size,
    passes: int = 1,
    gather: Callable[[Params], Params] = lambda params: params,
) -> Callable[[State, Batch], Predictions]:
    """Predictions without augmentation, as the training loss sees them; see `make_train_step`."""

    def predict(state: State, batch: Batch) -> Predictions:
        crops, labels = prepare(batch, encoder_size), batch["labels"]
        s = embed(network, gather(state.student), crops, labels, passes=passes)
        t = embed(network, gather(state.teacher), crops, labels, passes=passes)
        return Predictions(
            similarities=losses.voco_10k_prediction(
                x_student=s.x, bases_student=s.bases, x_teacher=t.x, bases_teacher=t.bases
            ),
            labels=labels,
            spread=embedding_spread(s),
        )

    return predict


def embedding_spread(embeddings: Embeddings) -> jax.Array:
    """1 - |mean of the unit embeddings|^2: 0 where all crops have one embedding, 1 at most."""
    rows = jnp.concatenate([embeddings.x, embeddings.bases], axis=1)
    rows = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32)
    # cosine() is all pairs' product; its mean over all pairs is |mean unit row|^2.
    return 1 - jnp.mean(losses.cosine(rows, rows))
