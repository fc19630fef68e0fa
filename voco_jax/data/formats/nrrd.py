"""NRRD (.nrrd, .nhdr), the files of 3D Slicer.

pynrrd reads the fields of the header, from text of a limited length. They mean here what they mean
to ITK, which SimpleITK.ReadImage shows; what it refuses is refused. The voxels are read as
text_headers.py says.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.data.formats.stored import FormatError, StoredVolume, affine_from_lps, checked_shape
from voco_jax.data.formats.text_headers import MAX_HEADER, DataFile, head_of, one_file, read_voxels

MAX_AXES = 16  # of the format
_MAX_VALUE = 2**14  # characters of a field that is used
_USED = (
    *("type", "dimension", "sizes", "endian", "encoding", "line skip", "byte skip", "data file"),
    *("space", "space dimension", "space directions", "space origin"),
    *("spacings", "axis mins", "centerings", "kinds"),
)
_UNUSED = (
    *("content", "number", "block size", "thicknesses", "axis maxs", "labels", "units", "min"),
    *("max", "old min", "old max", "sample units", "space units", "measurement frame"),
)
# Names may lack their blanks.
_FIELDS = {name.replace(" ", ""): name for name in (*_USED, *_UNUSED)} | {"centers": "centerings"}
_NAMES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        *("longlong", "long long", "long long int", "signed long long", "signed long long int"),
        *("int64", "int64_t"),
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPES = {name: dtype for dtype, names in _NAMES.items() for name in names}
# What turns a space into ITK's (x to the left, y to the back); without a name it is taken for it.
_TO_LPS = {
    **dict.fromkeys(("rightanteriorsuperior", "ras"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("leftanteriorsuperior", "las"), (1.0, -1.0, 1.0)),
    **dict.fromkeys(("leftposteriorsuperior", "lps", ""), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("scannerxyz", "3drighthanded", "3dlefthanded"), (1.0, 1.0, 1.0)),
}
_DOMAIN = ("domain", "space", "time", "none", "???")  # kinds of axes that are not colours


def load_nrrd(path: Path) -> StoredVolume:
    """Reads an NRRD file, raw or gzip, its data inside it or in one file beside it.

    Raises:
        Exception: see `readers.load`.
    """
    header, data = _header(path)
    count, sizes = header["dimension"], header["sizes"].tolist()
    if not count == len(sizes) <= MAX_AXES:
        raise FormatError(
            f"unreadable: dimension {str(count)[:20]} and {len(sizes)} sizes in its header, "
            f"expected one number, at most {MAX_AXES}"
        )
    expected = {key: [count] for key in ("kinds", "centerings", "spacings", "axis mins")}
    space = np.shape(header.get("space directions", np.eye(3)))[1]
    expected |= {"space directions": [count, space], "space origin": [space]}
    for field in expected.keys() & header.keys():
        found = list(np.shape(header[field]))
        if found != expected[field]:
            raise FormatError(
                f"unreadable: {field} has {found} values in its header, expected {expected[field]}"
            )
    dtype = _dtype(header)
    axes = _axes(header)
    shape = checked_shape(tuple(sizes[axis] for axis in axes))
    origin, steps = _geometry(header, axes[:3])
    if (np.abs([*origin, *steps.ravel()]) > 2**53).any():
        raise FormatError(
            f"absurd spacing: {steps.T.tolist()} mm from {origin.tolist()} in its header"
        )
    return read_voxels(path, data, shape, dtype, affine_from_lps(origin, steps))


def nrrd_files(path: Path) -> list[Path]:
    """An NRRD file, and the data file that it names.

    Raises:
        FormatError, OSError: as `load_nrrd`, for what concerns the data file.
    """
    return [*{path: None, _header(path)[1].file: None}]


def _header(path: Path) -> tuple[dict[str, Any], DataFile]:
    """The fields that are used, with their usual names, and where the voxels are."""
    import nrrd  # not for those who have NIfTI only

    block = head_of(path)
    if not block.startswith(b"NRRD000"):
        raise FormatError("not an NRRD: found another kind of file")
    blank = re.search(rb"\r?\n\r?\n", block)
    if blank is None and len(block) == MAX_HEADER:
        raise FormatError(f"absurd header: no end in the first {MAX_HEADER} bytes")
    text = os.fsdecode(block[: blank.start()] if blank else block)
    magic, *lines = text.rstrip().split("\n")
    try:
        with np.errstate(all="ignore"):
            header: dict[str, Any] = nrrd.read_header([magic, *_fields(lines)])
    except FormatError:
        raise
    except Exception as error:  # whatever its parsers make of strange text
        raise FormatError(f"unreadable: in its header pynrrd found {error!r:.300}") from error
    missing = {"type", "dimension", "sizes", "encoding"} - header.keys()
    if missing:
        raise FormatError(f"unreadable: no {', '.join(sorted(missing))} in its header")
    encoding, skip = header["encoding"].lower(), header.get("byte skip", 0)
    packing = {"raw": "", "gzip": "gzip", "gz": "gzip"}.get(encoding)
    lines_skipped = header.get("line skip", 0)
    if packing is None or lines_skipped or (packing and skip) or not -1 <= skip < 2**53:
        raise FormatError(
            f"unsupported NRRD: encoding {encoding[:50]!r}, byte skip {str(skip)[:20]}, line skip "
            f"{str(lines_skipped)[:20]}; expected raw or gzip data with no lines to skip"
        )
    if "data file" in header:
        return header, DataFile(one_file(path, header["data file"]), skip, packing)
    if blank is None:
        raise FormatError("truncated: no data follow its header; copy it again")
    return header, DataFile(path, blank.end() + skip if skip >= 0 else -1, packing)


def _fields(lines: list[str]) -> list[str]:
    """The lines that are used, spelled as pynrrd wants them, which is strict."""
    found = []
    for line in lines:
        name, colon, value = line.partition(":")
        field = _FIELDS.get("".join(name.split()).lower())
        if line.startswith("#") or (colon and (not field or value[:1] == "=") and ":=" in line):
            continue  # a comment, or another program's key := value
        if not (colon and field):
            raise FormatError(f"unreadable: {line[:50]!r} in its header, expected a field of NRRD")
        value = " ".join(value.split())
        if field in _USED and len(value) > _MAX_VALUE:
            raise FormatError(f"absurd header: its {field} is {len(value)} characters long")
        if field in ("space directions", "space origin"):
            for loose, tight in (("( ", "("), (" )", ")"), (" ,", ","), (", ", ","), (")(", ") (")):
                value = value.replace(loose, tight)
        if field in _USED:
            found.append(f"{field}: {value}")
        if field == "data file" and value.upper().startswith("LIST"):
            break  # the names of files follow
    return found


def _dtype(header: dict[str, Any]) -> np.dtype:
    name, endian = header["type"].lower(), header.get("endian", "").lower()
    if name not in _TYPES:
        raise FormatError(
            f"not a grey image: voxels are {name[:50]!r}, expected HU, one number each"
        )
    dtype = np.dtype(_TYPES[name])
    if dtype.itemsize > 1 and endian not in ("little", "big"):
        raise FormatError(
            f"unreadable: endian is {endian[:50]!r} in its header, expected little or big"
        )
    return dtype.newbyteorder(">" if endian == "big" else "<")


def _axes(header: dict[str, Any]) -> list[int]:
    """The axes in space; those of one voxel that have no place there are left out."""
    sizes = header["sizes"].tolist()
    kinds = [kind.lower() for kind in header.get("kinds", ["domain"] * len(sizes))]
    steps = header.get("space directions", header.get("spacings", np.zeros(len(sizes))))
    axes = []
    for axis, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        if kind not in _DOMAIN and size != 1:
            raise FormatError(
                f"not a grey image: axis {axis} is a {kind[:50]!r} of {size} numbers, expected HU, "
                "one number each"
            )
        if size != 1 or (kind in _DOMAIN and not np.isnan(steps[axis]).any()):
            axes.append(axis)
    return axes


def _geometry(header: dict[str, Any], axes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Origin and steps of three axes as of `affine_from_lps`, whatever numbers they are."""
    place = ("space", "space dimension", "space directions", "spacings")
    given = [field for field in place if field in header]
    if given == ["spacings"]:
        spacings = header["spacings"][axes]
        node = [name.lower() == "node" for name in header.get("centerings", ())] or [False]
        half = np.where(np.resize(node, header["dimension"])[axes], 0, spacings / 2)
        origin = header["axis mins"][axes] + half if "axis mins" in header else np.zeros(3)
        return origin, np.diag(spacings)
    if "space directions" not in given or "spacings" in given or len(given) < 2:
        raise FormatError(
            f"absurd spacing: {', '.join(given) or 'none'} in its header, expected spacings, or "
            "space and space directions, in mm; correct the header"
        )
    space = header.get("space", "")
    flips = _TO_LPS.get(re.sub("[- ]", "", space).lower())
    vectors = header["space directions"][axes]
    if flips is None or not 3 <= vectors.shape[1] == header.get("space dimension", 3):
        raise FormatError(
            f"unsupported NRRD: space {space[:50]!r} of {vectors.shape[1]} axes, expected RAS, LAS "
            "or LPS, of three"
        )
    with np.errstate(all="ignore"):
        lengths = np.sqrt((vectors**2).sum(axis=1, keepdims=True))
        vectors = vectors * (1 / lengths) * lengths  # ITK's roundings: the same last digits
        return header.get("space origin", np.zeros(3))[:3] * flips, (vectors[:, :3] * flips).T
