"""Crops of volumes and their segmentations for training, balanced by what is in them."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from voco_jax.config.finetuning import LabelledCrops
from voco_jax.data.array import CHUNK, chunk_corners
from voco_jax.data.cache import Cache, Entry
from voco_jax.data.crops import draw_corner
from voco_jax.types import Size


class LabelledBatch(TypedDict):
    """What goes to the device.

    images: (batch, x, y, z, channels) in the cache's dtype; labels: (batch, x, y, z) uint8, numbers
    of classes.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class DrawnCrop:
    """A crop that will be read: around a voxel of a class, or at a corner."""

    cache: Cache
    entry: Entry
    corner: Size  # used where there is no voxel
    voxel: tuple[int, int, int] | None  # chunk, class, and which of its voxels there, in C order


def draw_crop(
    cache: Cache, entry: Entry, *, crops: LabelledCrops, generator: np.random.Generator
) -> DrawnCrop:
    """Draws where a volume will be cropped; each stream by its name, so that another moves none.

    As MONAI's RandCropByPosNegLabel, or with `balance="classes"` RandCropByLabelClasses without
    background, but that crops which need no class lie anywhere, whatever is in their middle. A
    volume without any class is cropped anywhere.
    """
    seed = int(generator.integers(2**63))

    def stream(name: str) -> np.random.Generator:
        return np.random.default_rng((seed, zlib.crc32(name.encode())))

    assert entry.label is not None
    corner = draw_corner(stream("corner"), entry.stored, crops.size)
    present = [number for number, chunks in enumerate(entry.label.chunks, 1) if chunks]
    if not present or stream("foreground").random() >= crops.foreground:
        return DrawnCrop(cache, entry, corner, None)
    choose = stream("voxel")
    if crops.balance == "classes":
        present = [present[choose.integers(len(present))]]
    places = [
        (chunk, number, count)
        for number in present
        for chunk, count in entry.label.chunks[number - 1]
    ]
    ends = np.cumsum([count for *_, count in places])
    drawn = int(choose.integers(ends[-1]))
    place = int(np.searchsorted(ends, drawn, side="right"))
    chunk, number, count = places[place]
    return DrawnCrop(cache, entry, corner, (chunk, number, drawn - int(ends[place]) + count))


def collate_crops(drawn: Sequence[DrawnCrop], *, crops: LabelledCrops) -> LabelledBatch:
    """Reads the crops of a batch and their labels."""
    dtype = np.dtype(drawn[0].cache.chain.dtype)
    batch = LabelledBatch(
        images=np.empty((len(drawn), *crops.size, len(drawn[0].entry.channels) + 1), dtype),
        labels=np.empty((len(drawn), *crops.size), np.uint8),
    )
    for row, one in enumerate(drawn):
        corner = _corner(one, crops.size)
        batch["images"][row] = one.cache.read_channels(one.entry, corner, crops.size)
        batch["labels"][row] = one.cache.read_label(one.entry, corner, crops.size)
    return batch


def _corner(drawn: DrawnCrop, size: Size) -> Size:
    """Where the crop begins: its voxel in the middle, or as near to it as the volume allows."""
    if drawn.voxel is None:
        return drawn.corner
    number, wanted, place = drawn.voxel
    stored = drawn.entry.stored
    first = chunk_corners(stored)[number]
    extent = tuple(min(CHUNK, end - start) for start, end in zip(first, stored, strict=True))
    labels = drawn.cache.read_label(drawn.entry, first, (extent[0], extent[1], extent[2]))
    inside = np.unravel_index(np.flatnonzero(labels == wanted)[place], labels.shape)
    x, y, z = (
        int(np.clip(start + own - length // 2, 0, end - length))
        for start, own, length, end in zip(first, inside, size, stored, strict=True)
    )
    return x, y, z
