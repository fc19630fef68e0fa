"""The voxels of a cache: one Zarr v3 array (volume, x, y, z), one file or object a volume.

Volumes of one size are one chunk each. Of a source whose volumes keep their own size
(`fit="random_crop"`) each is one shard with room for the largest; inside it lie chunks of 64x64x64
behind an index, so that a part is read without the rest, and empty room takes no space.
"""

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import tensorstore
from numcodecs.checksum32 import CRC32C

from voco_jax.config.common import Chain
from voco_jax.data.storage import Folder, as_os_error
from voco_jax.errors import InputError
from voco_jax.types import Size

# Callers have threads of their own.
numcodecs.blosc.use_threads = False
ARRAY = "volumes"
CHUNK = 64  # voxels along each axis, inside a shard
_PIECE = 128 * 2**10  # bytes
_memory = threading.local()
LARGEST = (1024, 1024, 2048)  # voxels of a volume that keeps its own size


def largest(chain: Chain) -> Size:
    """The largest volume that a cache of these settings takes, voxels x y z."""
    return LARGEST if chain.fit == "random_crop" else chain.volume_size


def chunk_name(slot: int) -> str:
    """The name of one volume's file below `ARRAY`."""
    return f"c.{slot}.0.0.0"


def open_array(folder: Folder, create: Chain | None = None) -> Any:
    """Opens the array of a cache; with settings to `create` it, makes it if it is missing.

    Raises:
        InputError: not such an array.
    """
    below = Folder(f"{folder.path}/{ARRAY}")
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": below.spec(),
        # A slot without its file is an error, not a volume of zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        # No cache in memory: every volume is read once an epoch. One thread: callers have theirs.
        "context": {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}},
    }
    if create is not None:
        spec["metadata"] = _metadata(create)
        if below.read("zarr.json") is None:
            spec["metadata"]["shape"] = [0, *largest(create)]
    try:
        return tensorstore.open(spec, open=True, create=create is not None).result()
    except ValueError as error:
        raise InputError(f"{below.path}: not the array of a cache ({error})") from error


def read_chunk(path: str, slot: int, out: np.ndarray) -> None:
    """Reads a volume that is one chunk into memory that is there already.

    Half of the time that TensorStore takes: it allocates and copies on the way.

    Args:
        path: of the cache, on this machine.
        slot: of the volume.
        out: x y z, C order, in the cache's dtype and of its size.

    Raises:
        OSError: the file cannot be read now.
        ValueError: it is damaged or gone; in TensorStore's words, as it says so too.
    """
    try:
        raw = read_file(f"{path}/{ARRAY}/{chunk_name(slot)}")
        packed = CRC32C(location="end").decode(raw)
        size = int.from_bytes(packed[4:8].tobytes(), "little")  # of Blosc's header
        if size != out.nbytes:
            raise ValueError(f"found {size} bytes, expected {out.nbytes}")
        numcodecs.blosc.decompress(packed, out.reshape(-1))
    except FileNotFoundError as error:
        raise ValueError(f"NOT_FOUND: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"DATA_LOSS: {error}") from error


def read_file(path: str | Path) -> np.ndarray:
    """The bytes of a file, in memory that the next call of the same thread uses again.

    In pieces: of a file that is read at once Linux copies nothing before the disk is done.

    Raises:
        OSError: it cannot be read now.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        memory = getattr(_memory, "raw", None)
        if memory is None or len(memory) < size:
            memory = _memory.raw = np.empty(size, np.uint8)
        room, done = memory.data[:size], 0
        while count := file.readinto(room[done : done + _PIECE]):
            done += count
    return memory[:done]


def write_volume(path: str, slot: int, voxels: np.ndarray) -> None:
    """Writes one volume's file, complete or not at all.

    Args:
        path: of the cache: absolute, or a URL.
        slot: one of `CacheWriter.reserve`.
        voxels: x y z, in the cache's dtype; at most of the size `largest`.

    Raises:
        OSError: disk full, no permission, store out of reach.
    """
    part = tuple(slice(0, size) for size in voxels.shape)
    with as_os_error():
        open_array(Folder(path))[slot][part].write(voxels).result()


def count_in_chunks(labels: np.ndarray, classes: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Where each class is: what `manifest.Label.chunks` says.

    Args:
        labels: x y z, numbers of classes.
        classes: how many there are, the background included.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in range(1, classes)]
    for number, corner in enumerate(chunk_corners(labels.shape)):
        part = tuple(slice(first, first + CHUNK) for first in corner)
        counts = np.bincount(labels[part].ravel(), minlength=classes).tolist()
        for own, count in zip(found, counts[1:], strict=True):
            if count:
                own.append((number, count))
    return tuple(map(tuple, found))


def chunk_corners(shape: Sequence[int]) -> list[Size]:
    """The first voxel of each chunk of an array of this shape, in C order."""
    x, y, z = (range(0, size, CHUNK) for size in shape)
    return list(itertools.product(x, y, z))


def _metadata(chain: Chain) -> dict[str, Any]:
    wide = chain.dtype == "float16"
    # LZ4 takes a sixth more disk than Zstandard and half its time to read.
    lz4 = {"cname": "lz4", "clevel": 5, "blocksize": 0}
    lz4 |= (
        {"shuffle": "shuffle", "typesize": 2} if wide else {"shuffle": "noshuffle", "typesize": 1}
    )
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs: list[Any] = [
        little_endian if wide else "bytes",
        {"name": "blosc", "configuration": lz4},
        {"name": "crc32c"},
    ]
    if chain.fit == "random_crop":
        shard = {
            "chunk_shape": [1, CHUNK, CHUNK, CHUNK],
            "codecs": codecs,
            "index_codecs": [little_endian, {"name": "crc32c"}],
            "index_location": "start",  # no store is asked for a file's last bytes
        }
        codecs = [{"name": "sharding_indexed", "configuration": shard}]
    return {
        "data_type": chain.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *largest(chain)]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "dimension_names": ["volume", "x", "y", "z"],
        "codecs": codecs,
    }
