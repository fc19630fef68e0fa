"""PyTorch's weight files (.pt, .pth, .ckpt, .bin), which anyone may have written.

Files of `torch.save` are uncompressed zip archives since PyTorch 1.6.
"""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.errors import InputError
from voco_jax.interop.files.kinds import check_kind
from voco_jax.interop.files.pickles import Storage, read_pickle
from voco_jax.interop.files.tensors import MAX_HEADER, TensorSpec
from voco_jax.interop.match import printable


def describe(path: Path) -> Any:
    """What a PyTorch file holds, with a `TensorSpec` for each tensor; reads no tensor, needs no
    torch.

    Raises:
        InputError: not a PyTorch file, damaged, in need of code, or claims more than it has.
    """
    check_kind(path, safetensors=False)
    with _archive(path) as archive:
        entries = archive.infolist()
        _check_entries(path, entries)
        sizes = {entry.filename: entry.file_size for entry in entries}
        pickles = [name for name in sizes if name.endswith("data.pkl") and name.count("/") == 1]
        folder = entries[0].filename.partition("/")[0]
        if pickles != [f"{folder}/data.pkl"]:
            raise InputError(
                f"{path}: found a zip archive without one {printable(folder[:200])}/data.pkl, "
                "expected what torch.save writes"
            )
        if f"{folder}/constants.pkl" in sizes:
            raise InputError(
                f"{path}: found a TorchScript program, expected weights; save the network's "
                "state_dict() alone"
            )
        if sizes[pickles[0]] > MAX_HEADER:
            raise InputError(
                f"{path}: its data.pkl has {sizes[pickles[0]]} bytes, expected at most "
                f"{MAX_HEADER}; save the network's state_dict() alone"
            )
        content = archive.read(pickles[0])

    def check(storage: Storage) -> None:
        found = sizes.get(f"{folder}/data/{storage.key}")
        if found != storage.nbytes:
            raise InputError(
                f"{path}: storage {printable(storage.key[:200])} claims {storage.nbytes} bytes, "
                f"the file has {'none' if found is None else found} for it; fetch the file again"
            )

    return read_pickle(content, str(path), check)


def load(path: Path) -> tuple[Any, type]:
    """What a PyTorch file that `describe` accepted holds, and the type of the tensors in it.

    Raises:
        InputError: damaged, or torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: a PyTorch file needs torch, which is not installed: pip install torch, "
            "or convert the file to .safetensors"
        ) from error
    _check_sums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds; all mean that the file is unusable
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise InputError(
            f"{path}: torch.load(weights_only=True) refuses it: {reason[:300]}; fetch it again, "
            "or save the network's state_dict() alone"
        ) from error
    return content, torch.Tensor


def to_numpy(tensor: Any, spec: TensorSpec, source: str) -> np.ndarray:
    """A copy of a torch tensor as an array; half precision becomes float32.

    Raises:
        InputError: not a plain tensor of the described shape.
    """
    import torch

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tuple(tensor.shape) != spec.shape:
        raise InputError(f"{source}: found {type(tensor)} {tensor.shape}, expected {spec}")
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.to(torch.float32)
    return np.array(tensor.detach().resolve_neg().numpy(), order="C")


def serialise(tensors: dict[str, np.ndarray]) -> bytes:
    """What a file of a flat dict of tensors holds, of torch.save."""
    import torch

    file = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, file)
    return file.getvalue()


class _Bounded(io.FileIO):
    """A file of which zipfile reads no longer directory: of each entry it makes an object."""

    def read(self, size: int | None = -1, /) -> Any:
        if size is not None and size > MAX_HEADER:
            raise ValueError(f"a directory of {size} bytes, of at most {MAX_HEADER}")
        return super().read(size)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except InputError:
        raise
    except Exception as error:  # zipfile raises many kinds where an archive is damaged
        raise InputError(
            f"{path}: truncated or damaged, found an unreadable zip archive "
            f"({printable(str(error))[:200]}), expected an intact one; fetch the file again"
        ) from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Everything in the archive is stored as it is, within the file, once."""
    if not entries:
        raise InputError(f"{path}: found an empty zip archive, expected what torch.save writes")
    names = set()
    for entry in entries:
        name = printable(entry.filename[:200])
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise InputError(
                f"{path}: {name} is compressed or claims another size than it has "
                f"({entry.file_size} of {entry.compress_size} bytes); PyTorch stores plainly: "
                "save it again with torch.save"
            )
        if entry.filename in names:
            raise InputError(f"{path}: {name} is in the archive twice; fetch the file again")
        names.add(entry.filename)
    places = sorted((entry.header_offset, entry.file_size) for entry in entries)
    ends = [offset for offset, _ in places[1:]] + [path.stat().st_size]
    for (offset, size), end in zip(places, ends, strict=True):
        if offset + size > end:
            raise InputError(
                f"{path}: an entry of {size} bytes at {offset} reaches beyond {end}, where the "
                "next one or the end is; fetch the file again"
            )


def _check_sums(path: Path) -> None:
    with _archive(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise InputError(
            f"{path}: {printable(bad)} does not have its checksum, the file was damaged on its "
            "way; fetch it again (or save it again, where checksums were switched off)"
        )
