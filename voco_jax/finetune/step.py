"""The training step with labels: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from voco_jax.finetune import augment
from voco_jax.models.initial_values import describe_parameters, initial_parameters
from voco_jax.training.images import to_unit
from voco_jax.training.streams import stream
from voco_jax.types import Batch, Params, Size

Terms = dict[str, jax.Array]


@flax.struct.dataclass
class State:
    """Everything that training changes. `step` is the number of completed updates."""

    step: jax.Array
    params: Params
    optimizer: optax.OptState


def abstract_state(
    network: nn.Module, optimizer: optax.GradientTransformation, size: Size, channels: int
) -> State:
    """The state's shapes and dtypes, as `jax.ShapeDtypeStruct`."""
    params = nn.unbox(describe_parameters(network, size, channels))
    return State(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        params=params,
        optimizer=jax.eval_shape(optimizer.init, params),
    )


def init_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    size: Size,
    channels: int,
    seed: int,
    shardings: State,
) -> State:
    """Random parameters; the same values come of a seed whatever the shardings."""
    key = stream(jax.random.key(seed), "network")
    params = initial_parameters(network, size, key, shardings.params, channels)
    return State(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=params,
        optimizer=jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params),
    )


def make_train_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    loss: Callable[[jax.Array, jax.Array], Terms],
    draw: Callable[[jax.Array, int], augment.Draws],
    frozen: frozenset[str],
    seed: int,
    microbatches: int = 1,
    unshard: Callable[[Params], Params] = lambda params: params,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """One update.

    Args:
        network: of images `b x y z channels` and `train`.
        optimizer: of its parameters.
        loss: (logits, labels) -> terms, one of them `loss`, which is minimised.
        draw: (key, number of crops) -> augmentation.
        frozen: the parameters at these names, at the top level, are not differentiated by.
        seed: of augmentation and drop path; each step's keys are folded in from its number and the
            stream's name, so that a resumed run needs no random state.
        microbatches: the network runs over so many equal parts of the batch one after the other,
            and recomputes them in the gradient; terms are the parts' means.
        unshard: replicates what is sharded over devices, where the network is about to be used.

    Returns:
        The step: (state, batch) -> (state, metrics). Batch: images (b, x, y, z, c) as cached,
        labels (b, x, y, z) or (b,) uint8. Metrics are float32 scalars.
    """
    base_key = jax.random.key(seed)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(base_key, state.step)
        path_key = stream(step_key, "drop_path")
        images, labels = to_unit(jnp.asarray(batch["images"])), jnp.asarray(batch["labels"])
        images, labels = augment.apply(
            images, labels.astype(jnp.int32), draw(stream(step_key, "augment"), images.shape[0])
        )

        def terms(trained: Params) -> tuple[jax.Array, Terms]:
            params = unshard({**state.params, **trained})

            def one(images: jax.Array, labels: jax.Array, key: jax.Array) -> Terms:
                rngs = {"dropout": key}
                logits = network.apply({"params": params}, images, True, rngs=rngs)
                return loss(jnp.asarray(logits), labels)

            found = _in_parts(one, microbatches, images, labels, path_key)
            return found["loss"], found

        trained = {name: tree for name, tree in state.params.items() if name not in frozen}
        (_, found), gradients = jax.value_and_grad(terms, has_aux=True)(trained)
        norm = optax.tree.norm(gradients)
        gradients |= {name: jax.tree.map(jnp.zeros_like, state.params[name]) for name in frozen}
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        new_state = State(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
        )
        return new_state, {**found, "gradient_norm": norm}

    return step


def _in_parts(
    function: Callable[..., Terms],
    microbatches: int,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> Terms:
    """The mean of the terms of equal parts of a batch, computed one after the other."""
    if microbatches == 1:
        return function(images, labels, key)

    # Every part takes crops from the whole range, so that all devices work on every part.
    def split(one: jax.Array) -> jax.Array:
        return one.reshape(-1, microbatches, *one.shape[1:]).swapaxes(0, 1)

    parts = (split(images), split(labels), jax.random.split(key, microbatches))
    found = jax.lax.map(jax.checkpoint(lambda part: function(*part)), parts)
    return jax.tree.map(jnp.mean, found)


def make_predict(
    network: nn.Module, unshard: Callable[[Params], Params] = lambda params: params
) -> Callable[[State, Batch], Any]:
    """(state, batch with `images` (b, x, y, z, c) as cached) -> logits, float32."""

    def predict(state: State, batch: Batch) -> Any:
        images = to_unit(jnp.asarray(batch["images"]))
        return network.apply({"params": unshard(state.params)}, images, False)

    return predict
