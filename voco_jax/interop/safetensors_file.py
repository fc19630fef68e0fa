"""Safetensors files, which anyone may have written: no torch, and the header is checked first.

Format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, place), the data.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.errors import InputError
from voco_jax.interop.match import printable
from voco_jax.interop.pickles import ITEM_SIZES, TensorSpec

MAX_HEADER = 16 * 2**20
"""Bytes; a header takes about 150 for each tensor."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def describe(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file; reads the header only.

    Raises:
        InputError: the header is damaged or claims more than the file has.
    """
    return {name: spec for name, (spec, _) in _header(path).items()}


def load(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads tensors of a safetensors file; half precision becomes float32.

    Raises:
        InputError: as `describe`.
    """
    header = _header(path)
    tensors: dict[str, np.ndarray] = {}
    with path.open("rb") as file:
        for name in names:
            spec, place = header[name]
            stored = "<u2" if spec.dtype == "bfloat16" else np.dtype(spec.dtype).newbyteorder("<")
            file.seek(place)
            flat = np.fromfile(file, stored, math.prod(spec.shape))
            if spec.dtype == "bfloat16":  # the upper half of a float32
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
            wide = np.float32 if spec.dtype in ("float16", "bfloat16") else np.dtype(spec.dtype)
            tensors[name] = flat.astype(wide, copy=False).reshape(spec.shape)
    return tensors


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a flat dict of tensors."""
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _header(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """Name -> tensor and its place in the file."""
    total = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if total < 8 or size > min(total - 8, MAX_HEADER):
            raise InputError(
                f"{path}: its header claims {size} bytes, expected at most "
                f"{max(min(total - 8, MAX_HEADER), 0)}; truncated, or no safetensors file: fetch "
                "it again"
            )
        text = file.read(size)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is no dict")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value) for name, value in header.items()}
        end = 0
        for name, (_, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
            if begin != end:
                raise ValueError(f"{name} starts at {begin}, expected {end}")
            end = stop
        if end != total - 8 - size:
            raise ValueError(f"its tensors take {end} bytes, the file has {total - 8 - size}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path}: its header is damaged ({printable(str(error))[:300]}); truncated, or no "
            "safetensors file: fetch it again"
        ) from error
    return {name: (spec, 8 + size + begin) for name, (spec, begin, _) in entries.items()}


def _entry(name: str, value: Any) -> tuple[TensorSpec, int, int]:
    shape, (begin, stop), stored = value["shape"], value["data_offsets"], value["dtype"]
    if stored not in _DTYPES:
        raise ValueError(f"{name} has dtype {stored}, expected one of {', '.join(_DTYPES)}")
    spec = TensorSpec(shape=tuple(shape), dtype=_DTYPES[stored])
    numbers = (begin, stop, *spec.shape)
    nbytes = math.prod(spec.shape) * ITEM_SIZES[spec.dtype]
    if any(type(n) is not int or n < 0 for n in numbers) or stop - begin != nbytes:
        raise ValueError(f"{name} of shape {shape} takes bytes {begin} to {stop}")
    return spec, begin, stop


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values
