"""Masks on disk: which there are, which belong together, their labels and classes; writing them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from voco_jax.data.collect import scan
from voco_jax.data.formats.dicom_series import is_series
from voco_jax.data.formats.readers import SUFFIXES, load
from voco_jax.data.formats.stored import StoredVolume
from voco_jax.data.series import Choice, choose, look
from voco_jax.data.volumes import orient_ras
from voco_jax.errors import InputError

MAX_LABEL = 65535
MOST_CLASSES = 255  # without --classes; more different values are an image's
_STEP_TOLERANCE = 1e-3  # of a voxel's steps, relative
_PLACE_TOLERANCE = 0.1  # of the first voxel, in voxels
_ROUNDING = 1e-3  # of a label that its header scales

Classes = Mapping[str, tuple[int, ...]]
"""Names and the labels that make each; a label may belong to several."""


@dataclass(frozen=True)
class Mask:
    """A label map in RAS."""

    path: Path
    labels: np.ndarray  # (x, y, z) uint16, in Fortran's order
    values: tuple[int, ...]  # that occur, without 0
    affine: np.ndarray  # (4, 4), voxel index to mm
    spacing: tuple[float, float, float]  # mm


def find(
    path: str | Path, beside: Mapping[str, Path] | None = None, series: str | None = None
) -> dict[str, Path]:
    """The volumes in a folder, or the one that a file (or a folder of DICOM files) is, by name.

    Args:
        path: a file or folder; a folder with several DICOM series is as many volumes, and
            FOLDER/NAME one of them (see `data.formats.dicom_series`).
        beside: other volumes; a single volume belongs to the only one there, whatever its name.
        series: of DICOM only series in whose "SeriesNumber SeriesDescription" this regular
            expression is found.

    Returns:
        By path below the folder without the format's suffix.

    Raises:
        InputError: nothing there, two volumes of one name, or no such series.
    """
    path = Path(path).resolve()
    if path.is_file():
        found = {without_suffix(path.name): path}
    elif is_series(path):
        found = {path.name: path}
    elif path.is_dir():
        found = {}
        looked = look(scan(path, segmentations=True), [], progress=False)
        if choice := Choice.of(series, None):
            looked = choose(looked, choice, [])
        for volume in (one.volume for one in looked):
            place, (_, _, inside) = Path(volume.path), volume.id.partition("/")
            whole = place.is_dir() or is_series(place)
            name = inside if whole else without_suffix(inside)
            name = path.name if name == "." else name
            if name in found:
                raise InputError(
                    f"{path}: two volumes are named {name!r}, {found[name].name} and {place.name}; "
                    "keep one of them there"
                )
            found[name] = place
    else:
        raise InputError(f"{path}: no such file or folder")
    if beside and len(beside) == 1 and list(found.values()) == [path]:
        return dict(zip(beside, found.values(), strict=True))
    return found


def load_mask(path: str | Path) -> Mask:
    """Reads a label map, in any of the formats that are read.

    Raises:
        InputError: no usable volume, or a value that is no whole number from 0 to MAX_LABEL.
    """
    stored = orient_ras(load(path))
    labels = np.empty(stored.voxels.shape, np.uint16, order="F")
    seen = np.zeros(MAX_LABEL + 1, bool)
    plain = (stored.slope, stored.intercept) == (1.0, 0.0) and stored.voxels.dtype.kind in "biu"
    for index in range(stored.voxels.shape[2]):
        plane = stored.voxels[:, :, index]
        values = plane if plain else stored.hounsfield(plane)
        whole = values if plain else np.rint(values)
        if not plain:
            bad = ~(np.abs(values - whole) <= _ROUNDING)  # also where it is not finite
            if bad.any():
                _refuse(path, values[bad][0])
        if whole.min() < 0 or whole.max() > MAX_LABEL:
            _refuse(path, whole.min() if whole.min() < 0 else whole.max())
        labels[:, :, index] = whole
        seen[labels[:, :, index]] = True
    seen[0] = False
    found = tuple(np.flatnonzero(seen).tolist())
    # A header in float32 has 0.800000012 mm: a tolerance of a voxel would fail by that.
    x, y, z = (round(step, 6) for step in stored.spacing)
    return Mask(Path(path), labels, found, stored.affine, (x, y, z))


def load_image(path: str | Path) -> StoredVolume:
    """Reads an image and turns it to RAS; its voxels are as stored.

    Raises:
        InputError: no usable volume.
    """
    return orient_ras(load(path))


def check_grid(what: str, mask: Mask, other: Mask | StoredVolume, name: str) -> None:
    """Refuses a volume that does not lie voxel for voxel on another.

    Args:
        what: the mask is.
        mask: that gives the grid.
        other: that is compared, in RAS.
        name: what the other is.

    Raises:
        InputError: another shape, voxels that differ by more than 0.1 %, or a first voxel more
            than a tenth of a voxel away.
    """
    shape = (other.labels if isinstance(other, Mask) else other.voxels).shape
    size = min(mask.spacing)
    steps = np.abs(mask.affine[:3, :3] - other.affine[:3, :3]).max()
    place = np.abs(mask.affine[:3, 3] - other.affine[:3, 3]).max()
    same = steps <= _STEP_TOLERANCE * size and place <= _PLACE_TOLERANCE * size
    if mask.labels.shape == shape and same:
        return
    raise InputError(
        f"another grid: the {what} has {_grid(mask.labels.shape, mask.affine)}, the {name} "
        f"{_grid(shape, other.affine)}; resample the {name} to the {what}'s grid"
    )


def parse_classes(arguments: Sequence[str], flag: str = "--classes") -> dict[str, tuple[int, ...]]:
    """Names and labels from NAME=1 NAME=2,3 ..., or from one JSON file.

    Args:
        arguments: of a flag. The file holds {"name": label or [labels]}, or that as its "labels",
            as nnU-Net's dataset.json; a name whose only label is 0 is background and left aside.
        flag: its name.

    Raises:
        InputError: neither, a label that is none, or a name twice.
    """
    pairs: list[tuple[str, Any]] = []
    if len(arguments) == 1 and "=" not in arguments[0]:
        try:
            content = json.loads(Path(arguments[0]).read_text("utf-8-sig"))
        except OSError as error:
            raise InputError(
                f"{flag}: found {arguments[0]!r}, expected NAME=1 ... or a JSON file: "
                f"{error.strerror or error}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{flag}: {arguments[0]}: not JSON ({error})") from error
        if isinstance(content, dict) and isinstance(content.get("labels"), dict):
            content = content["labels"]
        if not isinstance(content, dict):
            raise InputError(
                f"{flag}: {arguments[0]}: found a JSON {type(content).__name__}, expected "
                '{"name": label or [labels], ...}'
            )
        pairs = [(name, value) for name, value in content.items() if value not in (0, [0])]
    else:
        for argument in arguments:
            name, equals, text = argument.rpartition("=")
            if not (name and equals and re.fullmatch(r"\d+(,\d+)*", text)):
                raise InputError(
                    f"{flag}: found {argument!r}, expected NAME=LABEL or NAME=LABEL,LABEL as "
                    "liver=6"
                )
            pairs.append((name, [int(label) for label in text.split(",")]))
    classes: dict[str, tuple[int, ...]] = {}
    for name, value in pairs:
        labels = value if isinstance(value, list) else [value]
        if not labels or not all(type(v) is int and 1 <= v <= MAX_LABEL for v in labels):
            raise InputError(
                f"{flag}: {name}: found {value!r}, expected whole numbers from 1 to {MAX_LABEL} "
                "(0 is background)"
            )
        if name in classes:
            raise InputError(f"{flag}: {name!r} is named twice; put its labels together: 1,2")
        classes[name] = tuple(sorted(set(labels)))
    if not classes:
        raise InputError(f"{flag}: found none, expected at least one, as liver=6")
    return classes


def classes_of(values: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """A class for each value, named as it.

    Raises:
        InputError: more than MOST_CLASSES.
    """
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"found {len(values)} different values, expected at most {MOST_CLASSES}: are these "
            "images, not masks? If they are masks, give --classes"
        )
    return {str(value): (value,) for value in sorted(values)}


def _refuse(path: str | Path, value: float) -> None:
    raise InputError(
        f"{path}: found the value {value:g}, expected whole numbers from 0 to {MAX_LABEL}; is it a "
        "mask, and not an image or a map of probabilities?"
    )


def without_suffix(name: str) -> str:
    """A file's name without the suffix of its format."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _grid(shape: tuple[int, ...], affine: np.ndarray) -> str:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    origin = ", ".join(f"{place:.2f}" for place in affine[:3, 3])
    return (
        f"{'x'.join(map(str, shape))} voxels of {'x'.join(f'{s:.4g}' for s in spacing)} mm from "
        f"({origin})"
    )


def write_mask(labels: np.ndarray, stored: StoredVolume, path: Path) -> None:
    """Writes a mask as NIfTI, voxel for voxel on its image.

    Args:
        labels: RAS.
        stored: the image as its file has it; the header of a NIfTI file is kept.
        path: a .nii.gz file.
    """
    voxels = np.ascontiguousarray(to_file_axes(labels, stored))
    image = nibabel.Nifti1Image(voxels, stored.affine)
    original = _nifti_header(stored)
    if original is not None:
        image = nibabel.Nifti1Image(voxels, None, original)
    image.header.set_data_dtype(voxels.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"], image.header["cal_max"] = 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part_{path.name}")
    nibabel.save(image, part)
    part.replace(path)


def to_file_axes(labels: np.ndarray, stored: StoredVolume) -> np.ndarray:
    """Turns labels from RAS to the axes of their image's file: a view."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.io_orientation(stored.affine)
    )
    return nibabel.apply_orientation(labels, turn)


def _nifti_header(stored: StoredVolume) -> nibabel.Nifti1Header | None:
    """The header of an image that is a NIfTI-1 file of its axes; else None."""
    name = stored.path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return None
    header = nibabel.load(stored.path).header
    if type(header) is not nibabel.Nifti1Header or header.get_data_shape() != stored.voxels.shape:
        return None
    return header.copy()
