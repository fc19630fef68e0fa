"""What a weight file says of a tensor, whatever the format."""

import math
from dataclasses import dataclass

ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
}  # fmt: skip
"""Bytes of an element of each dtype that is read; PyTorch's names, which are NumPy's."""
MAX_HEADER = 2 * 2**20
"""Bytes of what in a file says names and shapes; a tensor takes 150 to 250, no network has 5,000.

More would take seconds and hundreds of megabytes to read.
"""
MAX_DIMENSIONS = 64
"""As in PyTorch and NumPy."""
MAX_EXTENT = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor of a file, not read.

    Attributes:
        shape: as stored.
        dtype: of `ITEM_SIZES`.

    Raises:
        ValueError: a shape that no tensor has.
    """

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_DIMENSIONS:
            raise ValueError(
                f"a tensor of {len(self.shape)} dimensions, of at most {MAX_DIMENSIONS}"
            )
        if any(type(n) is not int or not 0 <= n <= MAX_EXTENT for n in self.shape):
            raise ValueError(f"a shape with other numbers than 0 to {MAX_EXTENT}")

    @property
    def nbytes(self) -> int:
        """What the tensor takes in memory, by its shape."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]
