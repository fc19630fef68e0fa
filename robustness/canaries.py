"""Files that nothing may read: Linux tells who opens them, whatever the mount's options."""

import ctypes
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import SimpleITK

from robustness.samples import sample

_IN_OPEN = 0x20  # of <sys/inotify.h>
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


class Canaries:
    """Files that would be good voxels if they were read, and who opens them.

    Args:
        folder: to be made.
        image: a volume, for the DICOM slice.
        scratch: a folder to write in.

    Raises:
        OSError: openings cannot be seen here.
    """

    def __init__(self, folder: Path, image: SimpleITK.Image, scratch: Path) -> None:
        folder.mkdir()
        voxels = np.full(image.GetNumberOfPixels(), 1717, "<i2")
        voxels[::2] = -1000
        (folder / "canary.raw").write_bytes(voxels.tobytes() * 2)
        (folder / "canary.raw.gz").write_bytes(gzip.compress(voxels.tobytes() * 2))
        slices = sample(image, "series", scratch).files
        (folder / "canary.dcm").write_bytes(slices[max(slices)])
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._names = {
            libc.inotify_add_watch(self._events, os.fsencode(file), _IN_OPEN): file.name
            for file in sorted(folder.iterdir())
        }
        if self._events < 0 or len(self._names) < 3:
            raise OSError(ctypes.get_errno(), "inotify cannot watch files here")
        (folder / "canary.raw").read_bytes()
        if self.opened() != {"canary.raw"}:
            raise OSError("inotify does not tell what is opened here")

    def opened(self) -> set[str]:
        """The names of those that any process has opened since the last call."""
        found: set[str] = set()
        while True:
            try:
                events = os.read(self._events, 2**16)
            except BlockingIOError:
                return found
            for watch, _, _, _ in _EVENT.iter_unpack(events):  # a watched file's have no name
                found.add(self._names.get(watch, "too many to tell"))
