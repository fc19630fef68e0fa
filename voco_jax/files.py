"""Paths and writing."""

import os
import re
import sys
from os import PathLike
from pathlib import Path

from voco_jax.errors import InputError

COMPILATION_CACHE = "~/.cache/voco_jax/xla"  # as in launch/
"""Where compiled programs are kept, unless JAX_COMPILATION_CACHE_DIR names a folder."""


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that it is there complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


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
    return Path(path)
