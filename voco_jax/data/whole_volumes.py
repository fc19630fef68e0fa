"""Volumes and their classes for training and validation, as large as the network takes them."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from voco_jax.config.common import ClassifiedChain, class_table
from voco_jax.config.finetuning import MiddleCrops
from voco_jax.data.cache import Cache, Entry
from voco_jax.data.resample import middle_corner
from voco_jax.errors import InputError
from voco_jax.types import Size


class ClassBatch(TypedDict):
    """What goes to the device.

    images: (batch, x, y, z, 1) in the cache's dtype; labels: (batch,) uint8, numbers of classes.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class DrawnVolume:
    """A volume that will be read, from a corner on."""

    cache: Cache
    entry: Entry
    corner: Size


def draw_volume(
    cache: Cache, entry: Entry, *, crops: MiddleCrops, generator: np.random.Generator
) -> DrawnVolume:
    """The middle of a volume, moved by up to `crops.shift`, as far as there is something."""
    seed = int(generator.integers(2**63))
    stream = np.random.default_rng((seed, zlib.crc32(b"corner")))
    corner = []
    middle = middle_corner(entry.stored, crops.size)
    for first, shift, stored, size in zip(
        middle, crops.shift, entry.stored, crops.size, strict=True
    ):
        low, high = max(first - shift, 0), min(first + shift, stored - size)
        corner.append(int(stream.integers(low, high + 1)))
    x, y, z = corner
    return DrawnVolume(cache, entry, (x, y, z))


def middle_of(cache: Cache, entry: Entry, crops: MiddleCrops) -> DrawnVolume:
    """A volume for validation."""
    return DrawnVolume(cache, entry, middle_corner(entry.stored, crops.size))


def collate_volumes(drawn: Sequence[DrawnVolume], *, crops: MiddleCrops) -> ClassBatch:
    """Reads the volumes of a batch."""
    dtype = np.dtype(drawn[0].cache.chain.dtype)
    batch = ClassBatch(
        images=np.empty((len(drawn), *crops.size, 1), dtype),
        labels=np.array([class_of(one.cache, one.entry) for one in drawn], np.uint8),
    )
    for row, one in enumerate(drawn):
        batch["images"][row] = one.cache.read_channels(one.entry, one.corner, crops.size)
    return batch


def class_of(cache: Cache, entry: Entry) -> int:
    """The number of a volume's class.

    Raises:
        InputError: it has no label, or one of no class.
    """
    assert isinstance(cache.chain, ClassifiedChain)
    table = class_table(cache.chain.classes)
    if entry.class_label not in table:
        found = "no label" if entry.class_label is None else f"the label {entry.class_label!r}"
        raise InputError(
            f"{cache.path}: {entry.id}: found {found}, expected one of {', '.join(table)}; prepare "
            "this cache with a list that has it, or change chain.classes"
        )
    return table[entry.class_label]
