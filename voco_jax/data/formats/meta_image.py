"""MetaImage (.mha, .mhd), the files of ITK; its headers, lines of text, are read here."""

import os
import re
from pathlib import Path

import numpy as np

from voco_jax.data.formats.stored import FormatError, StoredVolume, affine_from_lps, checked_shape
from voco_jax.data.formats.text_headers import DataFile, head_of, one_file, read_voxels

TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def load_meta(path: Path) -> StoredVolume:
    """Reads a MetaImage, raw or compressed, its data inside it or in one file beside it.

    Raises:
        Exception: see `readers.load`.
    """
    fields, data = _header(path)
    count = _integer(fields, "NDims")
    if not 1 <= count <= 10:  # as many as MetaImage may have
        raise FormatError(f"not 3-D: NDims is {count} in its header, expected 3")
    shape = checked_shape(tuple(map(int, _numbers(fields, ("DimSize",), [count]))))
    spacing = _numbers(fields, ("ElementSpacing", "ElementSize"), [count])[:3]
    if not (spacing > 0).all():
        raise FormatError(f"absurd spacing: {spacing} mm in its header, expected above 0")
    # Row i of the matrix is the direction of axis i.
    rows = _numbers(fields, ("TransformMatrix", "Rotation", "Orientation"), [count, count])
    origin = _numbers(fields, ("Offset", "Position", "Origin"), [count])[:3]
    kind, channels = fields.get("ElementType", ""), fields.get("ElementNumberOfChannels", "1")
    if kind not in TYPES or channels != "1":
        raise FormatError(
            f"not a grey image: voxels are {kind[:50]!r}, {channels[:20]} numbers each, expected "
            "HU, one number each"
        )
    big = _true(fields, "BinaryDataByteOrderMSB") or _true(fields, "ElementByteOrderMSB")
    dtype = np.dtype(TYPES[kind]).newbyteorder(">" if big else "<")
    affine = affine_from_lps(origin, rows[:3, :3].T * spacing)
    return read_voxels(path, data, shape, dtype, affine)


def meta_files(path: Path) -> list[Path]:
    """A MetaImage, and the data file that it names.

    Raises:
        FormatError, OSError: as `load_meta`, for what concerns the data file.
    """
    return [*{path: None, _header(path)[1].file: None}]


def _header(path: Path) -> tuple[dict[str, str], DataFile]:
    """All fields, and where the voxels are."""
    fields: dict[str, str] = {}
    end = 0
    for line in head_of(path).splitlines(keepends=True):
        end += len(line)
        name, separator, value = re.match(rb"([^=:]*)([=:]?)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        fields[os.fsdecode(name).strip()] = os.fsdecode(value).strip()
        if name.strip() == b"ElementDataFile" or (not separator and len(line) > 4096):
            break
    data_name = fields.get("ElementDataFile", "")
    if "NDims" not in fields or not data_name:
        raise FormatError("not a MetaImage: found no NDims and ElementDataFile in its header")
    given = [fields[name] for name in ("ElementSpacing", "ElementSize") if name in fields]
    if not given or any(re.search(r"nan|inf", text, re.IGNORECASE) for text in given):
        raise FormatError(
            f"absurd spacing: {given[0][:100] if given else 'none'} in its header, expected "
            "ElementSpacing or ElementSize in mm; correct the header"
        )
    if not _true(fields, "BinaryData", "True"):
        raise FormatError("unsupported MetaImage: its voxels are text, expected binary data")
    slope = fields.get("ElementToIntensityFunctionSlope", "1")
    intercept = fields.get("ElementToIntensityFunctionOffset", "0")
    if slope not in ("1", "1.0") or intercept not in ("0", "0.0"):
        raise FormatError(
            f"unsupported MetaImage: slope {slope[:20]} and offset {intercept[:20]} of its "
            "intensities, which ITK and others leave aside; store HU"
        )
    packing = "zlib" if _true(fields, "CompressedData") else ""
    skip = _integer(fields, "HeaderSize")
    if data_name.upper() == "LOCAL":
        file, offset = path, end
    else:
        file, offset = one_file(path, data_name), skip
    if skip < -1 or (skip and (packing or file == path)):
        raise FormatError(f"unsupported MetaImage: HeaderSize {skip}, expected none")
    return fields, DataFile(file, offset, packing)


def _true(fields: dict[str, str], name: str, default: str = "") -> bool:
    return fields.get(name, default)[:1] in ("T", "t", "1")


def _integer(fields: dict[str, str], name: str) -> int:
    text = fields.get(name, "0")
    if not re.fullmatch(r"[-+]?\d{1,15}", text):
        raise FormatError(
            f"unreadable: {name} is {text[:50]!r} in its header, expected a whole number"
        )
    return int(text)


def _numbers(fields: dict[str, str], names: tuple[str, ...], shape: list[int]) -> np.ndarray:
    """The numbers of the first field that is there; none there: zeros, or the unit matrix."""
    text = next((fields[name] for name in names if name in fields), None)
    if text is None:
        return np.eye(shape[0]) if len(shape) == 2 else np.zeros(shape)
    try:
        values = np.array([float(part) for part in text.split()])
    except ValueError:
        values = np.empty(0)
    if values.size != np.prod(shape) or not np.isfinite(values).all() or abs(values).max() > 2**53:
        raise FormatError(
            f"unreadable: {names[0]} is {text[:100]!r} in its header, expected "
            f"{np.prod(shape)} numbers"
        )
    return values.reshape(shape)
