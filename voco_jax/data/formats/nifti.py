"""NIfTI files: one (.nii) or header and voxels apart (.hdr, .img), each also compressed."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from isal import igzip
from nibabel.nifti1 import Nifti1PairHeader
from nibabel.nifti2 import Nifti2PairHeader

from voco_jax.data.formats.stored import (
    MAX_BYTES,
    FormatError,
    StoredVolume,
    check_size,
    checked_axes,
    checked_shape,
    file_inside,
    opened,
    read_array,
)

PAIR_SUFFIXES = (".hdr", ".img", ".hdr.gz", ".img.gz")


def load_nifti(path: Path) -> StoredVolume:
    """Reads a NIfTI-1 or NIfTI-2 single file; compression is recognised by content.

    Raises:
        Exception: see `readers.load`.
    """
    with opened(path) as file:
        stream, packed = _unpacked(file)
        kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
        expected = ".nii or .nii.gz in one file"
        header = _read_header(stream, kinds, expected)
        return _read(path, header, stream, os.fstat(file.fileno()).st_size, packed)


def load_pair(path: Path) -> StoredVolume:
    """Reads a NIfTI whose header and voxels are two files, of which `path` is either.

    Raises:
        Exception: see `readers.load`.
    """
    header_path, data_path = pair(path)
    with opened(header_path) as file:
        kinds = (Nifti1PairHeader, Nifti2PairHeader)
        expected = "a NIfTI header (.hdr; Analyze 7.5 does not say what is left: convert it)"
        stream, _ = _unpacked(file)
        header = _read_header(stream, kinds, expected)
    with opened(data_path) as file:
        stream, packed = _unpacked(file)
        return _read(path, header, stream, os.fstat(file.fileno()).st_size, packed)


def pair(path: Path) -> tuple[Path, Path]:
    """Header and data file of a NIfTI pair.

    Args:
        path: one of them, ending in one of PAIR_SUFFIXES in small or capital letters.

    Raises:
        FormatError: the other one is missing or leads out of the folder.
    """
    packed = ".gz" if path.name.lower().endswith(".gz") else ""
    stem = _stem(path.name)
    own = path.name[len(stem) :][:4].lower()
    other = ".img" if own == ".hdr" else ".hdr"
    names = [
        f"{stem}{suffix}{end}" for end in (packed, "", ".gz") for suffix in (other, other.upper())
    ]
    present = [name for name in names if os.path.lexists(path.parent / name)]
    partner = file_inside(path.parent, present[0] if present else names[0])
    return (path, partner) if own == ".hdr" else (partner, path)


def pair_files(path: Path) -> list[Path]:
    """Both files of a pair; see `pair`."""
    return list(pair(path))


def pairs_in(names: Sequence[str], folder: str | None) -> list[str]:
    """The headers in a folder, and data files without one; see `readers.Format.volumes`."""
    found = [name for name in names if name.lower().endswith(PAIR_SUFFIXES)]
    headers = {_stem(name) for name in found if ".hdr" in name[-7:].lower()}
    return [name for name in found if ".img" not in name[-7:].lower() or _stem(name) not in headers]


def _stem(name: str) -> str:
    name = name[:-3] if name.lower().endswith(".gz") else name
    return name[:-4]


def _unpacked(file: IO[bytes]) -> tuple[Any, bool]:
    """The stream of what a file holds, and whether it is compressed."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return (igzip.IGzipFile(fileobj=file) if packed else file), packed


def _read_header(stream: IO[bytes], kinds: tuple[Any, Any], expected: str) -> Any:
    block = stream.read(540)
    little, big = (int.from_bytes(block[:4], order) for order in ("little", "big"))
    kind = kinds[540 in (little, big)]
    size = kind.sizeof_hdr
    at = 4 if size == 540 else 344
    # As nibabel and ITK, a single file is told by its name: some have the magic of a pair.
    magics = [kind.pair_magic, *([kind.single_magic] if kind.is_single else [])]
    good = block[at : at + 4] in [magic + b"\0" for magic in magics]
    if size not in (little, big) or len(block) < size or not good:
        raise FormatError(f"not a NIfTI: found another kind of file, expected {expected}")
    header = kind(block[:size], check=False)
    header.quaternion_threshold = -1e-5  # of a w² rounded below 0, as ITK forgives it
    quiet = logging.Logger("quiet")  # repairs of small faults need no line each
    quiet.addHandler(logging.NullHandler())
    header.check_fix(logger=quiet)
    return header


def _read(path: Path, header: Any, stream: Any, file_size: int, packed: bool) -> StoredVolume:
    shape = checked_shape(tuple(int(size) for size in header.get_data_shape()))
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise FormatError(f"not a grey image: voxels are {dtype}, expected HU")
    offset, least = float(header["vox_offset"]), header.single_vox_offset if header.is_single else 0
    if not least <= offset <= MAX_BYTES:
        raise FormatError(
            f"absurd offset: the header says that voxels begin at byte {offset:g}, expected "
            f"{least} or more; correct it"
        )
    offset = int(offset)
    check_size(shape, dtype, offset, file_size, packed)
    affine = _affine(header)
    axes = checked_axes(affine)
    slope, intercept = header.get_slope_inter()
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    stream.seek(offset)
    return StoredVolume(path, read_array(stream, shape, dtype), slope, intercept, affine, axes)


def _affine(header: Any) -> np.ndarray:
    """Voxel index to mm, from the header's sform or its qform.

    As MONAI, an sform whose voxels have another size than the header says elsewhere is not believed
    where there is a qform. MONAI then takes a qform that is not there, too (qform_code 0), which
    turns most volumes by 180 degrees; nibabel, ITK and dcm2niix keep the sform, and so do we.
    """
    affine = header.get_best_affine()
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    both = int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0
    if both and not np.allclose(np.asarray(header.get_zooms()[:3]), spacing):
        affine = header.get_qform()
    return affine * np.array([[_to_mm(header)]] * 3 + [[1.0]])


def _to_mm(header: Any) -> float:
    """Millimetres in the header's unit of length; as ITK, and unlike nibabel and MONAI."""
    meter, micron = 1, 3  # NIFTI_UNITS_*, of its lowest three bits
    return {meter: 1000.0, micron: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
