"""Random keys by name: a stream that is added moves no other one."""

import zlib

import jax
import numpy as np


def stream(key: jax.Array, name: str) -> jax.Array:
    """The key of a named stream.

    Args:
        key: of a seed, a step, or another stream.
        name: of the stream; its CRC-32 is folded in.
    """
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
