"""Paths, and files that others may have written."""

import errno
import json
import os
import re
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from voco_jax.errors import InputError


def compilation_cache() -> str:
    """Where compiled programs are kept, unless JAX_COMPILATION_CACHE_DIR names a folder.

    "": nowhere, as there is no home folder.
    """
    folder = os.path.expanduser("~/.cache/voco_jax/xla")  # as in launch/
    return folder if os.path.isabs(folder) else ""


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that it is there complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_aside(path, text.encode()).replace(path)


def write_aside(path: Path, content: bytes) -> Path:
    """Writes what a file shall hold to NAME.part, to be moved in place.

    Where a kill leaves it, its name says what it is, and the next writing takes its place.

    Raises:
        OSError: it cannot be written, or is a folder; nothing is left of it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder, expected a file", str(path))
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # with whatever mode it was made
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part


def is_utf8(path: str | PathLike[str]) -> bool:
    """Whether a path is text; Python carries other bytes of names as lone surrogates."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str | PathLike[str]) -> str:
    """A path as text that can be written anywhere: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def expand(path: str | PathLike[str]) -> Path:
    """A path with a `~` in front as shells expand it; they do not do so in --flag=~/data."""
    return Path(os.path.expanduser(path))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        ValueError: it holds none, or one nested so deep that it cannot be read.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, no object")
    return found


def say(text: object) -> None:
    """Prints a line; that its reader has gone, as with a closed terminal, ends nothing."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def local_path(field: str, path: str | PathLike[str]) -> Path:
    """A path of the file system; "gs://..." would be one, too: of a folder named "gs:".

    Args:
        field: for the error.
        path: as the user gave it.

    Raises:
        InputError: it is a URL.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise InputError(
            f"{field}: found {str(path)!r}, expected a folder of a file system that all machines "
            "see, as NFS or Lustre; only caches may be in gs:// or s3://"
        )
    return expand(path)
