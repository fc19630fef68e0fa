"""What a weight file says of a tensor, whatever the format."""

import math
from dataclasses import dataclass

import numpy as np

ITEM_SIZES = {"bfloat16": 2} | {
    name: np.dtype(name).itemsize
    for name in (
        *("float64", "float32", "float16", "int64", "int32", "int16", "int8"),
        *("uint64", "uint32", "uint16", "uint8", "bool"),
    )
}
"""Bytes of an element of each dtype that is read; PyTorch's names, which are NumPy's."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor of a file, not read.

    Attributes:
        shape: as stored.
        dtype: of `ITEM_SIZES`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """What the tensor takes in memory, by its shape."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]
