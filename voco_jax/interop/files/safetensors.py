"""Safetensors files: the library checks the header against the file, here its size is bounded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from voco_jax.errors import InputError
from voco_jax.interop.files.kinds import check_kind
from voco_jax.interop.files.tensors import MAX_HEADER, TensorSpec
from voco_jax.interop.match import printable

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def describe(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file; reads the header only.

    Raises:
        InputError: the header is damaged, claims more than the file has, or names a dtype that is
            not read.
    """
    specs: dict[str, TensorSpec] = {}
    with _opened(path) as file:
        for name in file.offset_keys():
            stored = file.get_slice(name)
            dtype = stored.get_dtype()
            if dtype not in _DTYPES:
                raise InputError(
                    f"{path}: {printable(name[:200])} has dtype {dtype}, expected one of "
                    f"{', '.join(_DTYPES)}; save it as F32"
                )
            specs[name] = TensorSpec(shape=tuple(stored.get_shape()), dtype=_DTYPES[dtype])
    return specs


def load(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads tensors of a file that `describe` accepted; half precision becomes float32.

    Raises:
        InputError: a shape that NumPy does not take.
    """
    tensors: dict[str, np.ndarray] = {}
    with _opened(path) as file:
        for name in names:
            array = file.get_tensor(name)
            half = array.dtype in (np.float16, ml_dtypes.bfloat16)
            tensors[name] = array.astype(np.float32) if half else array
    return tensors


def serialise(tensors: dict[str, np.ndarray]) -> bytes:
    """What a file of a flat dict of tensors holds."""
    return save(tensors, metadata={"format": "pt"})


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    check_kind(path, safetensors=True)
    with path.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
    # The library takes 100 MB, which become 1.5 GB of memory.
    limit = min(path.stat().st_size - 8, MAX_HEADER)
    if size > limit:
        raise InputError(
            f"{path}: its header claims {size} bytes, expected at most {max(limit, 0)}; "
            "truncated, or no safetensors file: fetch it again"
        )
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except InputError:
        raise
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{path}: its header is damaged ({printable(str(error))[:300]}); truncated, or no "
            "safetensors file: fetch it again"
        ) from error
