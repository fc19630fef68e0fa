"""Volumes in object stores: what belongs to one, whether it has changed, copies to read."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voco_jax.data.formats.readers import DETACHED
from voco_jax.data.storage import Folder, is_remote


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A volume's files on this machine: themselves, or copies that are deleted afterwards.

    Args:
        path: of a file, or of a folder with one DICOM series; local or a URL.

    Yields:
        The local path. It does not exist if the URL's object does not.

    Raises:
        OSError: the store cannot be read, or no space for the copy.
    """
    if not is_remote(path):
        yield Path(path)
        return
    source, name = Folder.of(str(path))
    with tempfile.TemporaryDirectory(prefix="voco_fetch_") as folder:
        for file in _files(source, name):
            content = source.read(file)
            if content is not None:
                target = Path(folder, file)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(content)
                del content
        yield Path(folder, name)


def remote_signature(url: str) -> str:
    """Another text once any of a volume's objects has changed. No content is read.

    Raises:
        OSError: there is no such object, or the store cannot be read.
    """
    source, name = Folder.of(url)
    digest = hashlib.blake2b(digest_size=16)
    for file in _files(source, name):
        generation = source.generation(file)
        if generation is None:
            raise FileNotFoundError(f"{url}: no such object")
        digest.update(file.encode(errors="surrogateescape") + b"\0" + generation + b"\0")
    return digest.hexdigest()


def _files(source: Folder, name: str) -> list[str]:
    """The files of one volume: one, a few of one name, or all in a folder."""
    suffix = next((end for end in DETACHED if name.lower().endswith(end)), None)
    if suffix is not None:
        stem = name[: -len(suffix)]
        return [f"{stem}.{rest}" for rest in source.all_names(f"{stem}.") if "/" not in rest]
    if source.generation(name) is not None:
        return [name]
    inside = [key for key in source.all_names(f"{name}/") if key and "/" not in key]
    return [f"{name}/{key}" for key in inside] or [name]
