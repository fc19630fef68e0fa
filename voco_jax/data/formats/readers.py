"""One CT, in any of the formats that are read, as a `StoredVolume`: the table of all formats."""

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import igzip_lib

from voco_jax.data.formats import dicom_files, image_slices
from voco_jax.data.formats.dicom import load_series, series_files
from voco_jax.data.formats.dicom_series import is_series
from voco_jax.data.formats.meta_image import load_meta, meta_files
from voco_jax.data.formats.nifti import PAIR_SUFFIXES, load_nifti, load_pair, pair_files, pairs_in
from voco_jax.data.formats.nrrd import load_nrrd, nrrd_files
from voco_jax.data.formats.stored import FormatError, StoredVolume, VolumeError, check_name


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the volumes of one format are found and read.

    Args:
        suffixes: of its files, in small letters.
        load: reads a volume; whatever it raises, `load` below turns into a VolumeError.
        files: all files of a volume on this machine; FormatError where a header is wrong.
        detached: those suffixes whose volumes have other files of the same name beside them.
        volumes: of the names of the files in a folder, those that are volumes; ".": the folder
            itself. It is told the folder too, or None: nothing can be looked into. None: every
            file with one of the suffixes is a volume.
        is_folder: whether a volume is a folder.
    """

    suffixes: tuple[str, ...]
    load: Callable[[Path], StoredVolume]
    files: Callable[[Path], list[Path]] = lambda path: [path]
    detached: tuple[str, ...] = ()
    volumes: Callable[[Sequence[str], str | None], list[str]] | None = None
    is_folder: bool = False


FORMATS = (
    Format(suffixes=(".nii", ".nii.gz"), load=load_nifti),  # and files of any other name
    Format(
        suffixes=PAIR_SUFFIXES,
        load=load_pair,
        files=pair_files,
        detached=PAIR_SUFFIXES,
        volumes=pairs_in,
    ),
    Format(suffixes=(".nrrd", ".nhdr"), load=load_nrrd, files=nrrd_files, detached=(".nhdr",)),
    Format(suffixes=(".mha", ".mhd"), load=load_meta, files=meta_files, detached=(".mhd",)),
    Format(
        suffixes=dicom_files.SUFFIXES,
        load=load_series,
        files=series_files,
        volumes=dicom_files.series_in,
        is_folder=True,
    ),
    Format(
        suffixes=image_slices.SUFFIXES,
        load=image_slices.load_slices,
        files=image_slices.slice_files,
        volumes=image_slices.slices_in,
        is_folder=True,
    ),
)
SUFFIXES = tuple(suffix for one in FORMATS for suffix in one.suffixes)
DETACHED = tuple(suffix for one in FORMATS for suffix in one.detached)


def load(path: str | Path) -> StoredVolume:
    """Reads one volume, with all checks that need no look at the numbers.

    Args:
        path: a file or folder of one of FORMATS; of a pair, either file; of several series in a
            folder FOLDER/NAME, see `dicom_series`. A file of any other name
            is taken for NIfTI, a folder that shows no other format for a DICOM series.

    Raises:
        VolumeError: missing, unreadable, truncated, another format, not 3-D, absurd spacing or
            size.
    """
    path = Path(path)
    try:
        check_name(path)
        return _format_of(path).load(path)
    except FormatError as error:
        raise VolumeError(path, str(error)) from error
    except FileNotFoundError as error:
        raise VolumeError(path, "missing file: there is no such file") from error
    except EOFError as error:
        raise VolumeError(path, "truncated gzip: the file ends early; copy it again") from error
    except (gzip.BadGzipFile, igzip_lib.IsalError, zlib.error) as error:  # type: ignore[misc]
        raise VolumeError(path, f"damaged gzip: {error}; copy it again") from error
    except OSError as error:
        raise VolumeError(path, f"unreadable: {error.strerror or error}") from error
    except MemoryError as error:
        raise VolumeError(path, "out of memory: use fewer workers") from error
    except Exception as error:  # whatever a library makes of a strange header
        raise VolumeError(path, f"unreadable: {type(error).__name__}: {error}") from error


def file_signature(path: str | Path) -> tuple[int, int]:
    """Tells whether a volume's files have changed since; opens none, but a header's data file name.

    Args:
        path: as of `load`.

    Returns:
        Sum of the sizes in bytes and newest time of change in ns, over all files of the volume.

    Raises:
        OSError: there is no such file.
    """
    if not is_series(Path(path)):
        os.stat(path)
    found = [os.stat(file) for file in files_of(path)]
    return sum(file.st_size for file in found), max(file.st_mtime_ns for file in found)


def files_of(path: str | Path) -> list[Path]:
    """All files of a volume on this machine; where a header is wrong, that alone."""
    path = Path(path)
    try:
        return _format_of(path).files(path)
    except (FormatError, OSError):  # `load` says what is wrong with it
        return [path]


def volumes_in(names: Sequence[str], folder: str | None = None) -> list[str]:
    """Which of the files in a folder are volumes.

    Args:
        names: of the files.
        folder: their folder; None: it is not on this machine, nothing can be looked into.

    Returns:
        Their names; ".": the folder itself is one volume.
    """
    found = []
    for one in FORMATS:
        if one.volumes:
            found += one.volumes(names, folder)
        else:
            found += [name for name in names if name.lower().endswith(one.suffixes)]
    return found


def is_dicom_folder(path: Path) -> bool:
    """Whether a path is a folder that is read as DICOM."""
    return path.is_dir() and _format_of_folder(path).load is load_series


def _format_of(path: Path) -> Format:
    if is_series(path):
        return next(one for one in FORMATS if one.load is load_series)
    if path.is_dir():
        return _format_of_folder(path)
    name = path.name.lower()
    files = [one for one in FORMATS if not one.is_folder]
    return next((one for one in files if name.endswith(one.suffixes)), FORMATS[0])


def _format_of_folder(path: Path) -> Format:
    """The first that finds a volume in it, else the first whose suffixes a file in it has."""
    folders = [one for one in FORMATS if one.is_folder]
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    for one in folders:
        if one.volumes and one.volumes(names, str(path)):
            return one
    for one in folders:
        if any(name.lower().endswith(one.suffixes) for name in names):
            return one
    return folders[0]
