"""A file that says who is at work in a folder, and keeps others out."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from voco_jax.errors import InUseError

RENEW_SECONDS = 15.0
DEAD_SECONDS = 60.0  # an owner on another machine that has not renewed its lock for so long is dead


def this_process() -> str:
    """Who this process is, as JSON for a lock."""
    who = {"host": socket.gethostname(), "process": os.getpid(), "machine": _machine()}
    return json.dumps(who | {"token": uuid.uuid4().hex, "time": time.time()})


def _machine() -> str:
    """Another text on each machine, and after each start of it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


def describe_owner(owner: str) -> str:
    """A lock's owner in words."""
    try:
        who = json.loads(owner)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["time"]))
        return f"process {who['process']} on {who['host']}, since {since}"
    except (ValueError, TypeError, KeyError, OverflowError):
        return f"found {owner[:80]!r}"


@contextlib.contextmanager
def locked(
    path: Path,
    owner: str,
    log: Callable[[str], object] = print,
    lost: Callable[[str], object] | None = None,
) -> Iterator[None]:
    """Holds a lock file: for one process at a time, and not for one that is dead.

    On one machine the kernel knows whether its owner lives. On others some file systems of a
    network do not say so (flock is local there, or a server keeps the lock of a machine that has
    lost its power). So the owner renews the file's time, and where it is of another machine it is
    watched for `DEAD_SECONDS`. On a file system without any locks two starts in the same moment
    are not noticed.

    Args:
        path: of the file; in it, while it is held, is the owner. Empty: it is free.
        owner: of `this_process`.
        log: told before a minute of watching.
        lost: told who has taken the lock while this process was not running, if one has.

    Raises:
        InUseError: another process holds it; says which.
        OSError: the file cannot be written.
    """
    with path.open("a+", encoding="utf-8") as file:
        free = _flock(file.fileno())
        file.seek(0)
        before = file.read()
        ours = _machine() in before
        if free is False and (ours or not before):
            raise InUseError(describe_owner(before))
        if before and not (free and ours):
            log(f"{path}: of {describe_owner(before)}; watching for a minute whether it lives ...")
            if _is_renewed(path):
                raise InUseError(describe_owner(before))
        file.truncate(0)  # what is written is appended
        file.write(owner)
        file.flush()
        ended = threading.Event()
        renewing = threading.Thread(target=_renew, args=(path, owner, ended, lost), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            if _content(path) == owner:
                file.truncate(0)  # a copy of this folder looks as free as it is


def _flock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None: this file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return True


def _content(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None


def _is_renewed(path: Path) -> bool:
    """Whether a sign of life comes; each look opens the file, as NFS else answers from memory."""

    def look() -> int:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    first, end = look(), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end:
        time.sleep(DEAD_SECONDS / 60)
        if look() != first:
            return True
    return False


def _renew(
    path: Path, owner: str, ended: threading.Event, lost: Callable[[str], object] | None
) -> None:
    while not ended.wait(RENEW_SECONDS):
        found = _content(path)
        if found is not None and found != owner:  # None: of a server that is away for a while
            if lost is not None:
                lost(describe_owner(found))
            return
        with contextlib.suppress(OSError):
            os.utime(path)
