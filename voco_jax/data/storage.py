"""Folders on this machine, in Google Cloud Storage (gs://) and in S3 (s3://), all used alike.

TensorStore's key-value stores do the work. Credentials are found as by the vendors' own tools:
for gs:// what `gcloud auth application-default login` left, or the machine's service account; for
s3:// the usual AWS_* variables and files. AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) and AWS_REGION
(or AWS_DEFAULT_REGION) name another S3 server.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore

from voco_jax.errors import InputError
from voco_jax.files import expand, is_utf8, printable

_DRIVERS = {"gs": "gcs", "s3": "s3"}
UNFINISHED = ".__lock"  # ends the name of a file that TensorStore is writing
ABSENT = b"\x02"  # TensorStore's "generation" of an object that is not there


def is_remote(path: str | Path) -> bool:
    """Whether a path is a gs:// or s3:// URL."""
    return str(path).partition("://")[0] in _DRIVERS and "://" in str(path)


@dataclass(frozen=True)
class Folder:
    """A folder; on object stores a prefix of names. Picklable.

    All methods raise OSError, with the store's own words, if the store cannot be used.

    Args:
        path: of this machine, or gs://BUCKET/PATH or s3://BUCKET/PATH.
    """

    path: str

    @classmethod
    def at(cls, path: str | Path) -> "Folder":
        """The folder of an absolute or relative path or of a URL.

        Raises:
            InputError: its name is not UTF-8.
        """
        if not is_utf8(path):
            raise InputError(f"{printable(path)}: found a name that is not UTF-8: rename it")
        return cls(str(path).rstrip("/") if is_remote(path) else str(expand(path).resolve()))

    @classmethod
    def of(cls, url: str) -> tuple["Folder", str]:
        """The folder and the last name of a URL without a slash at its end."""
        folder, _, name = url.rpartition("/")
        return cls(folder), name

    @property
    def remote(self) -> bool:
        """Whether it is in an object store."""
        return is_remote(self.path)

    def spec(self) -> dict[str, Any]:
        """TensorStore's description of it."""
        if not self.remote:
            return {"driver": "file", "path": f"{self.path}/"}
        scheme, _, rest = self.path.partition("://")
        bucket, _, path = rest.partition("/")
        path = f"{path}/" if path else ""
        spec: dict[str, Any] = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": path}
        if scheme == "s3":
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                spec["endpoint"], region = endpoint, region or "us-east-1"
            if region:
                spec["aws_region"] = region
            if "AWS_ACCESS_KEY_ID" in os.environ:  # otherwise it complains of files not there
                spec["aws_credentials"] = {"type": "environment"}
        return spec

    def read(self, name: str) -> bytes | None:
        """The content of a file; None: there is none."""
        with as_os_error():
            found = self._store.read(name).result()
        return found.value if found.state == "value" else None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, so that it is there complete or not at all."""
        with as_os_error():
            self._store.write(name, content).result()

    def write_new(self, name: str, content: bytes) -> bool:
        """Writes a file if there is none of this name; whether it did (S3: best effort)."""
        with as_os_error():
            return bool(self._store.write(name, content, if_equal=ABSENT).result().generation)

    def delete(self, name: str) -> None:
        """Deletes a file, if there is one."""
        if not self.remote:  # TensorStore does not touch the unfinished files that a kill leaves
            Path(self.path, name).unlink(missing_ok=True)
            return
        with as_os_error():
            self._store.write(name, None).result()

    def names(self, below: str = "") -> list[str]:
        """The names of the files and folders in it, or in a folder below."""
        if not self.remote:
            try:
                return os.listdir(os.path.join(self.path, below))
            except FileNotFoundError:
                return []
        inside = self.all_names(f"{below}/" if below else "")
        return sorted({name.split("/")[0] for name in inside})

    def all_names(self, prefix: str = "") -> list[str]:
        """The names of all files whose names begin so, without this beginning; also in folders."""
        start = prefix.encode()
        limits = None
        if start:
            limits = tensorstore.KvStore.KeyRange(start, start[:-1] + bytes([start[-1] + 1]))
        with as_os_error():
            found = self._store.list(limits, len(start)).result()
        return sorted(name.decode(errors="surrogateescape") for name in found)

    def generation(self, name: str) -> bytes | None:
        """What the store calls this version of a file; None: there is none. Reads no content."""
        with as_os_error():
            found = self._store.read(name, byte_range=slice(0, 0)).result()
        return found.stamp.generation if found.state == "value" else None

    def size(self, below: str) -> int | None:
        """Bytes of all files in a folder below; None: the store cannot say in one go."""
        if self.remote:
            return None
        with os.scandir(os.path.join(self.path, below)) as files:
            return sum(file.stat().st_size for file in files)

    @contextmanager
    def log(self, name: str) -> Iterator[Callable[[str], None]]:
        """For adding lines to a new text file; in an object store it is there at the end only."""
        if not self.remote:
            with open(os.path.join(self.path, name), "w", encoding="utf-8", buffering=1) as file:
                yield lambda line: print(line, file=file)
            return
        lines: list[str] = []
        try:
            yield lines.append
        finally:
            self.write(name, "".join(f"{line}\n" for line in lines).encode())

    @property
    def _store(self) -> Any:
        return _open(json.dumps(self.spec()))


@functools.lru_cache(maxsize=64)
def _open(spec: str) -> Any:
    return tensorstore.KvStore.open(json.loads(spec)).result()


@contextmanager
def as_os_error() -> Iterator[None]:
    """What TensorStore raises becomes an OSError with its words."""
    try:
        yield
    except ValueError as error:  # TensorStore's only kind
        raise OSError(str(error)) from error
