"""Losses with labels, in the semantics of MONAI."""

import jax
import jax.numpy as jnp
import optax


def dice_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    include_background: bool,
    smooth_nr: float,
    smooth_dr: float,
    batch: bool,
) -> jax.Array:
    """Soft Dice loss of softmax probabilities: MONAI's DiceLoss(softmax=True, to_onehot_y=True).

    Args:
        logits: `b x y z classes`, float32 or wider.
        labels: `b x y z`, integers.
        include_background: whether class 0 counts.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.
        batch: sum over the crops of the batch too, before the quotient.

    Returns:
        Scalar: 1 - (2 sum(p t) + smooth_nr) / (sum(p) + sum(t) + smooth_dr), the mean over classes
        (and crops).
    """
    first = 0 if include_background else 1
    probabilities = jax.nn.softmax(logits, axis=-1)[..., first:]
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)[..., first:]
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    both = jnp.sum(probabilities * targets, axes)
    total = jnp.sum(probabilities, axes) + jnp.sum(targets, axes)
    return jnp.mean(1 - (2 * both + smooth_nr) / (total + smooth_dr))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all voxels (or samples), as PyTorch's CrossEntropyLoss.

    Args:
        logits: `... classes`.
        labels: `...`, integers.
    """
    # By products: the gradient of picking a value is a scatter, slow to compile and to run.
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))
