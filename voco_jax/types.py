"""Types that all folders share."""

from collections.abc import Mapping
from typing import Any

Size = tuple[int, int, int]
"""x, y, z: voxels, or cells of a grid."""
Params = Mapping[str, Any]
"""A network's parameters: nested dicts of arrays, as `module.init(...)["params"]`."""
Batch = Mapping[str, Any]
"""Arrays by name; the first axis of each is the batch."""
