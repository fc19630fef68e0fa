"""Reading weight files of all kinds into flat names and arrays. Files are untrusted."""

import os
from os import PathLike
from pathlib import Path

import numpy as np

from voco_jax.errors import InputError
from voco_jax.interop.files import pt, safetensors
from voco_jax.interop.files.tensors import TensorSpec
from voco_jax.interop.layout import Selection, select
from voco_jax.interop.match import printable

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"


def describe(path: str | PathLike[str], network: str = "teacher") -> Selection:
    """The tensors of a weight file as `TensorSpec`s: no tensor is read and torch is not needed.

    Args:
        path: a .pt, .pth, .ckpt, .bin or .safetensors file.
        network: `teacher` or `student`: which of them, where the file holds both.

    Raises:
        InputError: the file is not what it should be; the message says how.
    """
    file = _existing(path)
    tree = safetensors.describe(file) if _is_safetensors(file) else pt.describe(file)
    selection = select(tree, TensorSpec, network, str(file))
    claimed = sum(spec.nbytes for spec in selection.tensors.values())
    if claimed > file.stat().st_size:
        raise InputError(
            f"{file}: its tensors claim {claimed} bytes in all, the file has "
            f"{file.stat().st_size}; many share one storage: save them with .clone()"
        )
    return selection


def read(path: str | PathLike[str], network: str = "teacher") -> dict[str, np.ndarray]:
    """Reads a weight file: bare PyTorch names -> arrays.

    Opens the wrappers and strips the prefixes that exist in the wild (see `layout`), renames
    `swin_vit` to `swinViT`.

    Args:
        path: .pt, .pth, .ckpt or .bin (read with weights_only: no code of the file runs) or
            .safetensors (without torch).
        network: `teacher` or `student`: which of them to take where the file holds both. Where it
            holds one or names none, that is taken.

    Returns:
        Name -> array in PyTorch's axes; half precision as float32, else the file's dtype.

    Raises:
        InputError: the file is missing, damaged, needs more than weights_only, claims more memory
            than it has, or two keys stand for one name; the message says how to mend it.
    """
    return read_weights(path, network)[0]


def read_weights(
    path: str | PathLike[str], network: str = "teacher"
) -> tuple[dict[str, np.ndarray], Selection]:
    """As `read`, with where the tensors were in the file."""
    file = _existing(path)
    selection = describe(file, network)
    if _is_safetensors(file):
        stored = safetensors.load(file, selection.sources.values())
        return {name: stored[key] for name, key in selection.sources.items()}, selection
    loaded = select(*pt.load(file), network, str(file))
    if loaded.sources != selection.sources:
        raise InputError(
            f"{file}: torch reads other keys than its pickle holds; fetch the file again"
        )
    tensors = {
        name: pt.to_numpy(tensor, selection.tensors[name], f"{file}: {printable(name)}")
        for name, tensor in loaded.tensors.items()
    }
    return tensors, selection


def serialise(tensors: dict[str, np.ndarray], suffix: str) -> bytes:
    """What a .pt or .safetensors file of a flat dict of tensors holds.

    In memory: the libraries' own writing has errors of its own for a full disk, and safetensors
    writes files that their owner alone may read, by way of hidden ones.
    """
    return (safetensors if suffix == SAFETENSORS_SUFFIX else pt).serialise(tensors)


def _is_safetensors(file: Path) -> bool:
    return file.suffix.lower() == SAFETENSORS_SUFFIX


def _existing(path: str | PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix.lower() not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        raise InputError(
            f"{file}: found suffix {file.suffix!r}, expected a weight file: "
            f"{', '.join(TORCH_SUFFIXES)} or {SAFETENSORS_SUFFIX} (a training run's folder is "
            "exported with python -m voco_jax.interop.export --checkpoint FOLDER)"
        )
    if not file.is_file():
        raise InputError(f"{file}: no such file, expected a weight file; check the path")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file}: no permission to read it; mend it with chmod u+r")
    return file
