"""What a weight file says of a tensor, whatever the format."""

import math
from dataclasses import dataclass

ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
}  # fmt: skip
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
