"""Which files in a folder are slices of which series, and why the others are not.

What lies beside slices is set aside, each file with a reason: files that are no DICOM; objects
without an image (reports, structures, DICOMDIR, of private classes too); colour pages, as of dose
and protocol; localisers, in a series of their own or in the CT's; series of at most
LOCALISER_SLICES images; copies of a slice. What may be a damaged slice is an error.
"""

import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.data.formats.stored import Aside, FormatError, check_name, file_inside

SUFFIXES = (".dcm", ".dicom", ".ima")
LOCALISER_SLICES = 3  # scouts have one to three
DIRECTION_TOLERANCE = 1e-3  # of a unit vector: headers have six digits
_MAGIC_AT, _MAGIC = 128, b"DICM"
_HEAD = 4096  # bytes that hold the class and the series of a file
_PROBES = 3  # files without a suffix that are looked into, in a folder that may be a series
_OTHER_VIEW = 0.9  # cosine of the angle between two stacks: a scout's is 0
# The class of an object: in the file's header, or, where it has none, among the first elements.
_CLASS = re.compile(rb"[\x02\x08]\0[\x02\x16]\0(?:UI..|..\0\0)([0-9.]{8,64})", re.DOTALL)
_SERIES = re.compile(rb"\x20\0\x0e\0(?:UI..|..\0\0)([0-9.]{1,64})", re.DOTALL)


@dataclass(frozen=True)
class Image:
    """What the header of one image says; NaN where it says nothing."""

    name: str
    tags: dict[str, str]  # of _TAGS
    shape: tuple[int, int]  # columns and rows: x y
    spacing: tuple[float, float]  # of neighbouring columns, of rows; mm
    directions: np.ndarray  # 2 3: along a row, along a column; x to the left, y to the back
    position: np.ndarray  # 3, of the first voxel, mm
    dtype: np.dtype  # of the rescaled voxels, as ITK reads them; void: not one number each
    fault: str = ""  # why it can be no slice: a few fixed words, a colon, details

    @property
    def kind(self) -> tuple[str, str]:
        """Series and class of object."""
        return self.tags["series"], self.tags["class"]

    @cached_property
    def normal(self) -> np.ndarray:
        """Of its plane."""
        return np.cross(self.directions[0], self.directions[1])


_TAGS = {
    "type": "0008|0008",
    "class": "0008|0016",
    "uid": "0008|0018",
    "modality": "0008|0060",
    "study": "0020|000d",
    "series": "0020|000e",
    "description": "0008|103e",
    "number": "0020|0013",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "photometric": "0028|0004",
    "pixel spacing": "0028|0030",
    # What volumes differ in that share a series:
    "SeriesNumber": "0020|0011",
    "AcquisitionNumber": "0020|0012",
    "TemporalPositionIdentifier": "0020|0100",
    "NominalPercentageOfCardiacPhase": "0020|9241",
    "EchoNumbers": "0018|0086",
    "KVP": "0018|0060",
    "ConvolutionKernel": "0018|1210",
}
VOLUME_TAGS = tuple(name for name in _TAGS if name[0].isupper())


@dataclass(frozen=True, eq=False)
class Stack:
    """The images of one series and class, seen from one side; in no order."""

    images: tuple[Image, ...]
    fault: str = ""  # a damaged image among them: a few fixed words, a colon, details
    damaged: tuple[str, ...] = ()  # names of those, which are not in `images`

    def with_damaged(self, name: str, fault: str) -> "Stack":
        """The stack with one more damaged image."""
        return replace(self, fault=self.fault or fault, damaged=(*self.damaged, name))


def find_stacks(folder: Path) -> tuple[list[Stack], list[Aside]]:
    """The stacks in a folder that can be volumes, at least one, and the files set aside.

    Raises:
        FormatError: no DICOM, nothing but localisers of several series, or a damaged file.
        OSError: the folder cannot be read.
    """
    names, aside = _dicom_files(folder)
    images, unreadable = [], {}
    for name in names:
        try:
            images.append(read_image(folder, name))
        except FormatError as error:
            unreadable[name] = str(error)
    if not images:
        if unreadable:
            raise FormatError(next(iter(unreadable.values())))
        raise FormatError(
            "no DICOM: found a folder without DICOM images, expected the slices of one CT"
        )
    stacks, others = _stacks(images)
    classes = {stack.images[0].tags["class"] for stack in stacks}
    for name, problem in unreadable.items():
        found = _find(_CLASS, folder / name)
        if found != "" and found not in classes:
            aside.append((name, f"no image: a DICOM object of class {found}"))
            continue
        series = _find(_SERIES, folder / name)
        of = [n for n, one in enumerate(stacks) if one.images[0].tags["series"] == series]
        if len(of) != 1:
            raise FormatError(problem)  # nobody knows whose slice it is
        stacks[of[0]] = stacks[of[0]].with_damaged(name, problem)
    return stacks, aside + others


def is_dicom(path: str | Path) -> bool:
    """Whether a file begins as DICOM does; False for what cannot be read."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode) and _begins_as_dicom(_head(path))
    except OSError:
        return False


def series_in(names: Sequence[str], folder: str | None) -> list[str]:
    """Whether a folder is a series; see `readers.Format.volumes`.

    Files named .dcm are taken at their word; a few without a suffix are looked into, of the
    commonest kinds of names.
    """
    if any(name.lower().endswith(SUFFIXES) for name in names):
        return ["."]
    patterns = Counter(
        _pattern(name) for name in names if _may_be_slice(name) and name != "DICOMDIR"
    )
    first = {_pattern(name): name for name in sorted(names, reverse=True)}
    probes = [first[pattern] for pattern, _ in patterns.most_common(_PROBES)] if folder else []
    return ["."] if any(is_dicom(f"{folder}/{name}") for name in probes) else []


def files_in(folder: Path) -> list[str]:
    """The names of the files in a folder but hidden ones, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and not e.is_dir())


def open_image(path: Path) -> Any:
    """SimpleITK's reader after it has read a file's header.

    Raises:
        FormatError: it cannot.
    """
    import SimpleITK  # a quarter of a second: not for those who have NIfTI only

    check_name(path)  # of another one SimpleITK ends the process
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")  # no other one looks at the file
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = f"unreadable: {itk_message(error)}; copy it again or convert it ({path.name})"
        raise FormatError(reason) from error
    return reader


def itk_message(error: RuntimeError) -> str:
    """What ITK says, in one line: the innermost message, without places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not re.search(r"xx:\d+|^Reason: ", line)]
    message = re.sub(r"(itk::|ITK |sitk::)ERROR: (\w+\(0x\w+\): )?", "", (lines or ["?"])[-1])
    return f"ITK found: {message[:300]}"


def read_image(folder: Path, name: str) -> Image:
    """The header of one file.

    Raises:
        FormatError: it holds no image that ITK reads.
    """
    reader = open_image(folder / name)
    # Text of any file: what is no text becomes a mark, not an error.
    tags = {
        key: str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""
        for key, tag in _TAGS.items()
    }
    size = tuple(reader.GetSize())
    rows, columns = _numbers(tags["pixel spacing"], 2).tolist()
    image = Image(
        name,
        tags,
        (size[0], size[1]),
        (columns, rows),
        _numbers(tags["orientation"], 6).reshape(2, 3),
        _numbers(tags["position"], 3),
        _dtype(reader),
    )
    return replace(image, fault=_fault(image, size[2] if len(size) > 2 else 1, reader))


def _fault(image: Image, frames: int, reader: Any) -> str:
    """Why an image can be no slice, or ""."""
    import SimpleITK

    tags, name = image.tags, image.name
    if {"LOCALIZER", "SCOUT"} & set(tags["type"].upper().split("\\")):
        return f"localiser: ImageType of {name} is {tags['type'][:100]}"
    if image.dtype == np.void:
        kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
        return (
            f"not a grey image: voxels are {kind}, {reader.GetNumberOfComponents()} numbers each, "
            f"expected HU, one number each ({name})"
        )
    if frames > 1:
        return (
            f"several frames: {name} holds {frames} images, expected one for each file; "
            "convert it to NIfTI"
        )
    if tags["photometric"] != "MONOCHROME2":
        found = tags["photometric"][:30]
        return f"not a grey image: {name} is {found!r}, expected MONOCHROME2"
    spacing = np.array(image.spacing)
    fields = {"position": image.position, "orientation": image.directions, "pixel spacing": spacing}
    for what, value in fields.items():
        if not np.isfinite(value).all():
            return (
                f"no {what}: found {tags[what][:100]!r} in {name}, expected numbers; "
                "such images have no place in space"
            )
    off = image.directions @ image.directions.T - np.eye(2)
    if np.abs(off).max() > DIRECTION_TOLERANCE:
        return f"absurd orientation: the rows and columns of {name} are no unit vectors"
    return ""


def _dtype(reader: Any) -> np.dtype:
    """The numpy type of an image's voxels; void: they are not one number each."""
    import SimpleITK

    names = ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64")
    kinds = {
        getattr(SimpleITK, f"sitk{name}"): np.dtype(name.lower())
        for name in (*names, "Float32", "Float64")
    }
    one = reader.GetNumberOfComponents() == 1
    return kinds.get(reader.GetPixelID(), np.dtype(np.void)) if one else np.dtype(np.void)


def _numbers(text: str, count: int) -> np.ndarray:
    """So many numbers; NaN where the text is anything else."""
    with contextlib.suppress(ValueError):
        values = np.array([float(part) for part in text.split("\\")])
        if len(values) == count:
            return values
    return np.full(count, np.nan)


def _stacks(images: Sequence[Image]) -> tuple[list[Stack], list[Aside]]:
    """The images by series, class and view; why those of localisers and pages are none of them."""
    stacks: list[list[Image]] = []
    for image in images:
        if image.fault:
            continue
        for stack in stacks:
            if image.kind == stack[0].kind and _same_view(image, stack[0]):
                stack.append(image)
                break
        else:
            stacks.append([image])
    if not stacks:
        raise FormatError(images[0].fault)
    long = [stack for stack in stacks if len(stack) > LOCALISER_SLICES]
    if not long and len(stacks) > 1:
        told = ", ".join(f"{s[0].tags['series'] or 'none'} ({len(s)} images)" for s in stacks)
        raise FormatError(
            f"several series: {told[:1000]}; expected more than {LOCALISER_SLICES} images of one"
        )
    chosen = long or stacks
    beside = "the CT" if len(chosen) == 1 else "a series"
    aside = [
        (
            image.name,
            f"another series: {len(stack)} images beside the {len(chosen[0])} of {beside}",
        )
        for stack in stacks
        if long and len(stack) <= LOCALISER_SLICES
        for image in stack
    ]
    found = [Stack(tuple(stack)) for stack in chosen]
    for image in (image for image in images if image.fault):
        of = [n for n, stack in enumerate(chosen) if not _is_other(image, stack[0])]
        if len(of) > 1:
            raise FormatError(image.fault)
        if of:
            found[of[0]] = found[of[0]].with_damaged(image.name, image.fault)
        else:
            aside.append((image.name, image.fault))
    return found, aside


def _same_view(one: Image, other: Image) -> bool:
    """Whether two images with a place lie in planes that are nearly parallel."""
    return bool(np.dot(one.normal, other.normal) > _OTHER_VIEW)


def _is_other(image: Image, of_stack: Image) -> bool:
    """Whether an image that can be no slice is something else than a damaged one of a stack."""
    axial = ("AXIAL" in one.tags["type"].upper() for one in (of_stack, image))
    return (
        image.kind != of_stack.kind
        or image.dtype == np.void
        or image.fault.startswith("localiser")
        or (np.isfinite(image.normal).all() and not _same_view(image, of_stack))
        or list(axial) == [True, False]
    )


def _dicom_files(folder: Path) -> tuple[list[str], list[Aside]]:
    """The names of the DICOM files, and those of all others with the reason."""
    names, others = [], {}
    for name in files_in(folder):
        if not _may_be_slice(name):
            others[name] = f"its name ends in {os.path.splitext(name)[1]}"
            continue
        try:
            head = _head(file_inside(folder, name))
        except FormatError as error:
            others[name] = str(error)
            continue
        if _begins_as_dicom(head):
            names.append(name)
        else:
            others[name] = "it does not begin as DICOM does"
    patterns = set(map(_pattern, names))
    for name, problem in others.items():
        if name.lower().endswith(SUFFIXES) or _pattern(name) in patterns:
            if not problem.startswith("it"):
                raise FormatError(problem)
            raise FormatError(
                f"damaged slice: {name} is no DICOM file ({problem}); copy it again or take it away"
            )
    return names, [(name, f"no DICOM: {problem}") for name, problem in others.items()]


def _may_be_slice(name: str) -> bool:
    """Whether a file's name is one that slices have: .dcm, no suffix, or a number as suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in (*SUFFIXES, "") or suffix[1:].isdecimal()


def _pattern(name: str) -> str:
    """What the names of a series' files have in common: all but the numbers."""
    return re.sub(r"\d+", "#", name)


def _head(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _begins_as_dicom(head: bytes) -> bool:
    """Whether a file is DICOM: with its preamble or, as in old archives, without."""
    if head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC:
        return True
    return head[:2] in (b"\x02\0", b"\x08\0") and _CLASS.search(head) is not None


def _find(pattern: re.Pattern[bytes], path: Path) -> str:
    """The class or series of a DICOM object; "": not found."""
    found = pattern.search(_head(path))
    return found[1].decode() if found else ""
