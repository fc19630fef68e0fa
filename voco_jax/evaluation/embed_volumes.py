"""The volumes that `embed` takes, from files or from a prepared cache, and the masks of organs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voco_jax.config.common import Chain
from voco_jax.config.finetuning import SegmentationFinetuning
from voco_jax.data.cache import SETTINGS, Cache, Entry, checksum, read_chain
from voco_jax.data.formats.stored import StoredVolume, VolumeError
from voco_jax.data.labels import fit_labels
from voco_jax.data.storage import is_remote
from voco_jax.data.volumes import Box, check_same_grid, prepare_files, quantise
from voco_jax.errors import InputError
from voco_jax.evaluation.encoder import Encoder
from voco_jax.evaluation.journal import Signatures, signatures
from voco_jax.evaluation.load_encoder import chain_differences
from voco_jax.evaluation.masks import Classes, find, load_mask, parse_classes, without_suffix
from voco_jax.evaluation.predict import find_channels
from voco_jax.types import Size

MOST_ORGANS = 255


@dataclass(frozen=True)
class Prepared:
    """A volume as a cache keeps it, and what its file was."""

    voxels: np.ndarray  # x y z channels, in the chain's dtype
    spacing: tuple[float, float, float]  # of the file, mm, RAS
    shape: Size  # of the file, RAS
    affine: np.ndarray | None  # of the file, RAS; None: a cache does not know it
    box: Box
    digest: str  # of the voxels, as in a cache's manifest


@dataclass(frozen=True)
class Volume:
    """A volume that can be read.

    Attributes:
        id: its name.
        path: of its (first) file.
        files: tell whether it has changed since.
        read: reads and prepares it; an InputError if it is unusable.
    """

    id: str
    path: str
    files: Signatures
    read: Callable[[], Prepared]


def is_cache(path: str | Path) -> bool:
    """Whether an input is a prepared cache."""
    return is_remote(path) or Path(path, SETTINGS).is_file()


def volumes_of_files(
    path: str | Path, encoder: Encoder, take_doubtful: bool = False
) -> list[Volume]:
    """The volumes in a folder, or the one that a file (or a folder of DICOM files) is.

    Args:
        path: a file or folder.
        encoder: says how they are prepared.
        take_doubtful: see `prepare_files`.

    Raises:
        InputError: there is none, two of one name, or one lacks a channel.
    """
    chain = encoder.chain
    names = getattr(chain, "channels", ())
    found = find(path)
    of_each = find_channels(found, names) if names else {name: (p,) for name, p in found.items()}

    def read(files: Sequence[Path]) -> Prepared:
        channels = prepare_files(files, chain, take_doubtful)
        stored = [quantise(one.voxels, chain.dtype) for one in channels]
        first = channels[0]
        return Prepared(
            np.stack(stored, axis=-1),
            first.spacing,
            first.shape,
            first.affine,
            first.box,
            " ".join(map(checksum, stored)),
        )

    return [
        Volume(name, str(files[0]), signatures(files), lambda files=files: read(files))  # type: ignore[misc]
        for name, files in of_each.items()
    ]


def volumes_of_cache(path: str | Path, encoder: Encoder) -> list[Volume]:
    """The volumes of a prepared cache.

    Raises:
        InputError: no cache, an empty one, or prepared by another chain than the encoder's.
    """
    chain = read_chain(path)
    changed = chain_differences(chain, encoder.chain)
    if changed:
        raise InputError(
            f"{path}: this cache was prepared otherwise than the weights' card says (cache -> "
            f"card): {'; '.join(changed)}; give the files themselves, or prepare them with the "
            "settings of the card"
        )
    cache = Cache.open(path, chain)

    def read(entry: Entry) -> Prepared:
        return Prepared(
            cache.read_channels(entry),
            entry.spacing,
            entry.shape,
            None,
            entry.box,
            " ".join([entry.checksum, *(channel.checksum for channel in entry.channels)]),
        )

    return [
        Volume(entry.id, entry.path, [[entry.digest]], lambda entry=entry: read(entry))  # type: ignore[misc]
        for entry in cache.entries
    ]


def parse_organs(arguments: Sequence[str], encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Names and labels of organs.

    Args:
        arguments: of --organs, each a class of fine-tuned weights, a label, or NAME=LABEL,LABEL;
            or one JSON file, see `parse_classes`; none: all classes of fine-tuned weights.
        encoder: whose weights' card may have classes, with the labels of their label files.

    Raises:
        InputError: a name that the card does not have, or what is no organ.
    """
    experiment, classes = encoder.experiment, {}
    if isinstance(experiment, SegmentationFinetuning):
        classes = dict(next(iter(experiment.data.sources.values())).chain.classes[1:])
    if not arguments:
        if not classes:
            raise InputError(
                "--organs: found none, and the weights' card has no classes; name labels as "
                'liver=6, or a JSON file as {"liver": 6}'
            )
        return classes
    found: dict[str, tuple[int, ...]] = {}
    others = []
    for argument in arguments:
        if argument in classes:
            found[argument] = classes[argument]
        elif argument.isdecimal():
            others.append(f"{argument}={argument}")
        elif "=" in argument or (len(arguments) == 1 and Path(argument).is_file()):
            others.append(argument)
        else:
            known = f"one of {', '.join(classes)}" if classes else "liver=6"
            raise InputError(
                f"--organs: found {argument!r}, expected {known}, a label, or a JSON file alone"
            )
    found |= parse_classes(others, "--organs") if others else {}
    if len({label for labels in found.values() for label in labels}) > MOST_ORGANS:
        raise InputError(f"--organs: found more than {MOST_ORGANS} labels, expected fewer")
    return found


@dataclass(frozen=True)
class Organs:
    """Masks of organs beside volumes.

    Attributes:
        files: masks by name.
        classes: names and labels.
    """

    files: Mapping[str, Path]
    classes: Classes

    def find(self, volume: Volume) -> Path:
        """The mask of a volume: of its name, without a suffix or without its first folder.

        Raises:
            VolumeError: there is none.
        """
        name = without_suffix(volume.id)
        for one in (volume.id, name, name.partition("/")[2], name.rpartition("/")[2]):
            if one in self.files:
                return self.files[one]
        raise VolumeError(volume.path, f"no mask: found none named {name!r} among the --masks")

    def read(self, path: Path, prepared: Prepared, chain: Chain) -> np.ndarray:
        """A mask on the grid of a prepared volume: numbers for `members`, uint8.

        Raises:
            InputError: no usable mask, or it lies on another grid than the volume's file.
        """
        mask = load_mask(path)
        if prepared.affine is None:
            same = np.allclose(mask.spacing, prepared.spacing, rtol=1e-3)
            if mask.labels.shape != prepared.shape or not same:
                raise VolumeError(path, _other_grid(mask.labels.shape, mask.spacing, prepared))
        else:
            stored = StoredVolume(path, mask.labels, 1.0, 0.0, mask.affine, "RAS")
            check_same_grid(stored, prepared.shape, prepared.affine)
        numbers = np.zeros(65536, np.uint8)
        numbers[self._labels()] = np.arange(1, len(self._labels()) + 1)
        size = prepared.voxels.shape[:3]
        return fit_labels(numbers[mask.labels], prepared.spacing, chain, prepared.box, size)

    @property
    def members(self) -> np.ndarray:
        """(organs, numbers) float32: which of the numbers that `read` gives are part of each."""
        labels = self._labels()
        return np.array(
            [[False, *(label in own for label in labels)] for own in self.classes.values()],
            np.float32,
        )

    def _labels(self) -> list[int]:
        return sorted({label for own in self.classes.values() for label in own})


def _other_grid(shape: Size, spacing: Sequence[float], volume: Prepared) -> str:
    def text(shape: Size, spacing: Sequence[float]) -> str:
        return f"{'x'.join(map(str, shape))} voxels of {'x'.join(f'{s:.4g}' for s in spacing)} mm"

    return (
        f"another grid: found {text(shape, spacing)} in RAS order, expected "
        f"{text(volume.shape, volume.spacing)} as its image has; resample it to its image"
    )
