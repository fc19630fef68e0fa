"""AdamW as PyTorch's, with or without AMSGrad, and the published learning-rate schedule."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from voco_jax.config.common import Optimizer


class AdamState(NamedTuple):
    """First moment, second moment and, with AMSGrad, the maximum of the second moments."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def scale_by_adam(
    beta1: float, beta2: float, eps: float, *, amsgrad: bool
) -> optax.GradientTransformation:
    """Adam's direction, as torch.optim.AdamW's; with AMSGrad by the maximum of second moments.

    PyTorch keeps the maximum before bias correction and corrects the maximum; optax's
    `scale_by_amsgrad` keeps the maximum of corrected moments, which is another optimizer.
    """

    def init(params: optax.Params) -> AdamState:
        def zeros() -> optax.Updates:
            return jax.tree.map(jnp.zeros_like, params)

        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros() if amsgrad else ())

    def update(
        updates: optax.Updates, state: AdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdamState]:
        del params
        step = state.step + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, updates)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsgrad else ()
        correction1, correction2 = _bias_correction(beta1, step), _bias_correction(beta2, step)
        direction = jax.tree.map(
            lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps),
            mu,
            nu_max if amsgrad else nu,
        )
        return direction, AdamState(step, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


def _bias_correction(beta: float, step: jax.Array) -> jax.Array:
    """1 - beta^step without the cancellation that costs float32 four digits at 0.999."""
    if beta == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(step.astype(jnp.float32) * math.log(beta))


def schedule(settings: Optimizer, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then 0.5 (1 + cos(pi * progress)) down to 0 at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=total_steps,
    )


def make_optimizer(
    settings: Optimizer, total_steps: int, *, amsgrad: bool = True, rates: Any = None
) -> optax.GradientTransformation:
    """AdamW: decoupled weight decay on every parameter, as torch.optim.AdamW does.

    Args:
        settings: of the config.
        total_steps: of the run.
        amsgrad: see `scale_by_adam`.
        rates: tree like the parameters: factors of each one's learning rate, 0: it stays as it is.
            None: 1 for all.
    """
    parts = [
        scale_by_adam(settings.beta1, settings.beta2, settings.eps, amsgrad=amsgrad),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(schedule(settings, total_steps)),
    ]
    if rates is not None:
        parts.append(
            optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, rates))
        )
    return optax.chain(*parts)
