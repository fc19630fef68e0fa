"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd), the files of ITK and 3D Slicer.

SimpleITK reads the headers of NRRD (and all of DICOM, see dicom.py). ITK's MetaImage reader is not
made for untrusted files: `NDims = 1e308` ends the process, and one byte changed in a compressed CT
changed two fifths of its voxels without an error. So MetaImage headers, some lines of text, are
read here, and so are the voxels of both: straight into one array, in the stored type, with the
checksums of compressed data looked at.
"""

import io
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip

from voco_jax.data.stored import (
    StoredVolume,
    VolumeError,
    axes_of,
    check_affine,
    check_size,
    checked_shape,
    file_inside,
    fill,
    opened,
)

NRRD_SUFFIXES = (".nrrd", ".nhdr")
META_SUFFIXES = (".mha", ".mhd")
MAX_HEADER = 2**20  # bytes; real ones have some thousands
META_TYPES = {
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
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's x is to the left, its y to the back
_BLOCK = 2**18


@dataclass(frozen=True)
class _Data:
    """Where the voxels are and how they are stored."""

    file: Path
    offset: int  # of the first byte; -1: they are the last bytes of the file
    packing: str  # "", "gzip" or "zlib"
    big_endian: bool


def load_nrrd(path: Path) -> StoredVolume:
    """Reads an NRRD file, raw or gzip, its data inside it or in one file beside it.

    Raises:
        VolumeError: see `readers.load`.
        Exception: see `readers.load`.
    """
    data, _ = _nrrd_data(path)
    reader = itk_reader(path, "NrrdImageIO")
    size = tuple(reader.GetSize())
    dtype = pixel_dtype(path, reader)
    directions = np.reshape(reader.GetDirection(), (len(size), len(size)))[:3, :3]
    steps = directions * reader.GetSpacing()[:3]
    return _read(path, data, checked_shape(path, size), dtype, reader.GetOrigin()[:3], steps)


def load_meta(path: Path) -> StoredVolume:
    """Reads a MetaImage, raw or compressed, its data inside it or in one file beside it.

    Raises:
        VolumeError: see `readers.load`.
        Exception: see `readers.load`.
    """
    data, fields = _meta_data(path)
    count = _integer(path, fields, "NDims")
    if not 1 <= count <= 10:  # as many as MetaImage may have
        raise VolumeError(path, f"not 3-D: NDims is {count} in its header, expected 3")
    shape = tuple(int(size) for size in _numbers(path, fields, ("DimSize",), [count]))
    shape = checked_shape(path, shape)
    spacing = _numbers(path, fields, ("ElementSpacing", "ElementSize"), [count])[:3]
    if not (spacing > 0).all():
        raise VolumeError(path, f"absurd spacing: {spacing} mm in its header, expected above 0")
    # Row i of the matrix is the direction of axis i.
    rows = _numbers(path, fields, ("TransformMatrix", "Rotation", "Orientation"), [count, count])
    origin = _numbers(path, fields, ("Offset", "Position", "Origin"), [count])[:3]
    kind, channels = fields.get("ElementType", ""), fields.get("ElementNumberOfChannels", "1")
    if kind not in META_TYPES or channels != "1":
        raise VolumeError(
            path,
            f"not a grey image: voxels are {kind[:50]!r}, {channels[:20]} numbers each, expected "
            "HU, one number each",
        )
    steps = rows[:3, :3].T * spacing
    return _read(path, data, shape, np.dtype(META_TYPES[kind]), tuple(origin), steps)


def data_file(path: Path) -> Path | None:
    """The data file beside a header, whether it is there or not; None: there is none.

    Args:
        path: ending in one of NRRD_SUFFIXES or META_SUFFIXES.

    Raises:
        VolumeError: as `load_nrrd` and `load_meta`, for what concerns the data file.
        OSError: the header cannot be read.
    """
    data, _ = (_nrrd_data if path.name.lower().endswith(NRRD_SUFFIXES) else _meta_data)(path)
    return None if data.file == path else data.file


def affine_of(origin: tuple[float, ...], steps: np.ndarray) -> np.ndarray:
    """Voxel index to mm, in the axes of NIfTI, from ITK's and DICOM's.

    Args:
        origin: of the first voxel, mm, x to the left, y to the back, z up.
        steps: 3 3, mm; column i is the way from a voxel to the next along axis i.

    Returns:
        4 4; x to the right, y to the front, z up.
    """
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine


def itk_reader(path: Path, image_io: str) -> Any:
    """SimpleITK's reader after it has read a file's header.

    Args:
        path: the file.
        image_io: ITK's class for the format; no other one looks at the file.

    Raises:
        VolumeError: ITK cannot read the header.
    """
    import SimpleITK  # a quarter of a second: not for those who have NIfTI only

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = f"unreadable: {itk_message(error)}; copy it again or convert it"
        raise VolumeError(path, reason) from error
    return reader


def itk_message(error: RuntimeError) -> str:
    """What ITK says, in one line: the innermost message, without places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not re.search(r"xx:\d+|^Reason: ", line)]
    message = re.sub(r"(itk::|ITK |sitk::)ERROR: (\w+\(0x\w+\): )?", "", (lines or ["?"])[-1])
    return f"ITK found: {message[:300]}"


def pixel_dtype(path: Path, reader: Any) -> np.dtype:
    """The numpy type of an image's voxels.

    Raises:
        VolumeError: colours, vectors, complex numbers, labels.
    """
    import SimpleITK

    kinds = {
        SimpleITK.sitkInt8: "i1",
        SimpleITK.sitkUInt8: "u1",
        SimpleITK.sitkInt16: "i2",
        SimpleITK.sitkUInt16: "u2",
        SimpleITK.sitkInt32: "i4",
        SimpleITK.sitkUInt32: "u4",
        SimpleITK.sitkInt64: "i8",
        SimpleITK.sitkUInt64: "u8",
        SimpleITK.sitkFloat32: "f4",
        SimpleITK.sitkFloat64: "f8",
    }
    pixel = reader.GetPixelID()
    if pixel not in kinds or reader.GetNumberOfComponents() != 1:
        name = SimpleITK.GetPixelIDValueAsString(pixel)
        raise VolumeError(
            path,
            f"not a grey image: voxels are {name}, {reader.GetNumberOfComponents()} numbers each, "
            "expected HU, one number each",
        )
    return np.dtype(kinds[pixel])


def _read(
    path: Path,
    data: _Data,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    origin: tuple[float, ...],
    steps: np.ndarray,
) -> StoredVolume:
    dtype = dtype.newbyteorder(">" if data.big_endian else "<")
    affine = affine_of(origin, steps)
    check_affine(path, affine)
    with opened(data.file) as file:
        found, offset = os.fstat(file.fileno()).st_size, data.offset
        count = int(np.prod(shape, dtype=object))
        if offset < 0:
            offset = max(0, found - count * dtype.itemsize)
        if data.packing:
            check_size(path, shape, dtype, 0, max(0, found - offset), True)
        else:
            check_size(path, shape, dtype, offset, found, False)
        file.seek(offset)
        voxels = np.empty(count, dtype)
        fill(_unpacked(file, data.packing), voxels)
    return StoredVolume(
        path=path,
        voxels=voxels.reshape(shape, order="F"),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        axes=axes_of(affine),
    )


def _unpacked(file: IO[bytes], packing: str) -> Any:
    if packing == "gzip":
        return igzip.IGzipFile(fileobj=file)
    return _Inflated(file) if packing == "zlib" else file


class _Inflated(io.RawIOBase):
    """What a zlib (or gzip) stream holds; its end is an error if its checksum was not seen."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a part of a buffer; 0 at the stream's end."""
        while not self._zlib.eof:
            packed = self._zlib.unconsumed_tail or self._file.read(_BLOCK)
            if not packed:
                raise EOFError
            part = self._zlib.decompress(packed, len(buffer))
            if part:
                buffer[: len(part)] = part
                return len(part)
        return 0


def _header(path: Path) -> bytes:
    with opened(path) as file:
        return file.read(MAX_HEADER)


def _integer(path: Path, fields: dict[str, str], name: str) -> int:
    text = fields.get(name, "0")
    if not re.fullmatch(r"[-+]?\d{1,15}", text):
        raise VolumeError(
            path, f"unreadable: {name} is {text[:50]!r} in its header, expected a whole number"
        )
    return int(text)


def _numbers(
    path: Path, fields: dict[str, str], names: tuple[str, ...], shape: list[int]
) -> np.ndarray:
    """The numbers of the first field that is there; none there: zeros, or the unit matrix."""
    text = next((fields[name] for name in names if name in fields), None)
    if text is None:
        return np.eye(shape[0]) if len(shape) == 2 else np.zeros(shape)
    try:
        values = np.array([float(part) for part in text.split()])
    except ValueError:
        values = np.empty(0)
    if values.size != np.prod(shape) or not np.isfinite(values).all() or abs(values).max() > 2**53:
        raise VolumeError(
            path,
            f"unreadable: {names[0]} is {text[:100]!r} in its header, expected "
            f"{np.prod(shape)} numbers",
        )
    return values.reshape(shape)


def _need_numbers(path: Path, fields: dict[str, str], *names: str) -> None:
    """An image without voxel sizes, or with ones that are no numbers, for which ITK takes 1 mm."""
    given = [fields[name] for name in names if name in fields]
    if not given or any(re.search(r"nan|inf", text, re.IGNORECASE) for text in given):
        raise VolumeError(
            path,
            f"absurd spacing: {given[0][:100] if given else 'none'} in its header, expected "
            f"{' or '.join(names)} in mm; correct the header",
        )


def _nrrd_data(path: Path) -> tuple[_Data, dict[str, str]]:
    block = _header(path)
    if not block.startswith(b"NRRD000"):
        raise VolumeError(path, "not an NRRD: found another kind of file")
    blank = re.search(rb"\r?\n\r?\n", block)
    if blank is None and len(block) == MAX_HEADER:
        raise VolumeError(path, f"absurd header: no end in the first {MAX_HEADER} bytes")
    text = block[: blank.start()] if blank else block
    fields: dict[str, str] = {}
    for line in text.decode("latin-1").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):
            fields[re.sub(r"\s", "", name).lower()] = value.strip()
    _need_numbers(path, fields, "spacings", "spacedirections")
    encoding = fields.get("encoding", "").lower()
    skip = _integer(path, fields, "byteskip")
    packing = {"raw": "", "gzip": "gzip", "gz": "gzip"}.get(encoding)
    if packing is None or _integer(path, fields, "lineskip") or (packing and skip) or skip < -1:
        raise VolumeError(
            path,
            f"unsupported NRRD: encoding {encoding[:50]!r}, byte skip {skip}, line skip "
            f"{fields.get('lineskip', '0')}; expected raw or gzip data with no lines to skip",
        )
    data_name = fields.get("datafile")
    if data_name is None:
        if blank is None:
            raise VolumeError(path, "truncated: no data follow its header; copy it again")
        file, offset = path, blank.end() + skip if skip >= 0 else -1
    else:
        file, offset = _one_file(path, data_name), skip
    return _Data(file, offset, packing, fields.get("endian", "").lower() == "big"), fields


def _meta_data(path: Path) -> tuple[_Data, dict[str, str]]:
    block = _header(path)
    fields: dict[str, str] = {}
    end = 0
    for line in block.splitlines(keepends=True):
        end += len(line)
        name, separator, value = re.match(rb"([^=:]*)([=:]?)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        fields[name.decode("latin-1").strip()] = value.decode("latin-1").strip()
        if name.strip() == b"ElementDataFile" or (not separator and len(line) > 4096):
            break
    data_name = fields.get("ElementDataFile", "")
    if "NDims" not in fields or not data_name:
        raise VolumeError(path, "not a MetaImage: found no NDims and ElementDataFile in its header")
    _need_numbers(path, fields, "ElementSpacing", "ElementSize")
    if not _true(fields, "BinaryData", "True"):
        raise VolumeError(path, "unsupported MetaImage: its voxels are text, expected binary data")
    scale = [
        fields.get(f"ElementToIntensityFunction{name}", default)
        for name, default in (("Slope", "1"), ("Offset", "0"))
    ]
    if scale[0] not in ("1", "1.0") or scale[1] not in ("0", "0.0"):
        raise VolumeError(
            path,
            f"unsupported MetaImage: slope {scale[0][:20]} and offset {scale[1][:20]} of its "
            "intensities, which ITK and others leave aside; store HU",
        )
    big = _true(fields, "BinaryDataByteOrderMSB", "") or _true(fields, "ElementByteOrderMSB", "")
    packing = "zlib" if _true(fields, "CompressedData", "") else ""
    skip = _integer(path, fields, "HeaderSize")
    if data_name.upper() == "LOCAL":
        file, offset = path, end
    else:
        file, offset = _one_file(path, data_name), skip
    if skip < -1 or (skip and (packing or file == path)):
        raise VolumeError(path, f"unsupported MetaImage: HeaderSize {skip}, expected none")
    return _Data(file, offset, packing, big), fields


def _true(fields: dict[str, str], name: str, default: str) -> bool:
    return fields.get(name, default)[:1] in ("T", "t", "1")


def _one_file(path: Path, name: str) -> Path:
    if name.upper().split()[:1] == ["LIST"] or "%" in name:
        raise VolumeError(
            path, f"several data files: found {name[:100]!r}, expected the name of one file"
        )
    return file_inside(path.parent, name, path)
