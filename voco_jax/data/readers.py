"""One CT, in any of the formats that are read, as a `StoredVolume`."""

import contextlib
import gzip
import os
import stat
import zlib
from pathlib import Path

from isal import igzip_lib

from voco_jax.data.dicom import load_series
from voco_jax.data.itk_files import META_SUFFIXES, NRRD_SUFFIXES, data_file, load_meta, load_nrrd
from voco_jax.data.nifti import PAIR_SUFFIXES, load_nifti, load_pair, pair
from voco_jax.data.stored import StoredVolume, VolumeError

# isal's stubs call its exception an instance.
_DAMAGED: tuple[type[Exception], ...] = (
    gzip.BadGzipFile,
    igzip_lib.IsalError,  # type: ignore[assignment]
    zlib.error,
)


def load(path: str | Path) -> StoredVolume:
    """Reads one volume, with all checks that need no look at the numbers.

    Args:
        path: a folder with one DICOM series; either file of a NIfTI pair (.hdr and .img, also
            .gz); .nrrd, .nhdr, .mha or .mhd; any other name: a NIfTI file (.nii, .nii.gz).

    Returns:
        The volume as stored. Trailing axes of size 1 are dropped.

    Raises:
        VolumeError: missing, unreadable, truncated, another format, not 3-D, absurd spacing or
            size.
    """
    path = Path(path)
    name = path.name.lower()
    try:
        if path.is_dir():
            return load_series(path)
        if name.endswith(NRRD_SUFFIXES):
            return load_nrrd(path)
        if name.endswith(META_SUFFIXES):
            return load_meta(path)
        if name.endswith(PAIR_SUFFIXES):
            return load_pair(path)
        return load_nifti(path)
    except VolumeError:
        raise
    except FileNotFoundError as error:
        raise VolumeError(path, "missing file: there is no such file") from error
    except EOFError as error:
        raise VolumeError(path, "truncated gzip: the file ends early; copy it again") from error
    except _DAMAGED as error:
        raise VolumeError(path, f"damaged gzip: {error}; copy it again") from error
    except OSError as error:
        raise VolumeError(path, f"unreadable: {error.strerror or error}") from error
    except MemoryError as error:
        raise VolumeError(path, "out of memory: use fewer workers") from error
    except Exception as error:  # whatever a library makes of a strange header
        raise VolumeError(path, f"unreadable: {type(error).__name__}: {error}") from error


def stamp(path: str | Path) -> tuple[int, int]:
    """Tells whether a volume's files have changed since; opens none, but a header's data file name.

    Args:
        path: as of `load`.

    Returns:
        Sum of the sizes in bytes and newest time of change in ns, over all files of the volume.

    Raises:
        OSError: there is no such file.
    """
    path = Path(path)
    found = [os.stat(path)]
    if stat.S_ISDIR(found[0].st_mode):
        with os.scandir(path) as entries:
            files = [e.stat() for e in entries if not e.name.startswith(".") and not e.is_dir()]
        found = files or found
    else:
        with contextlib.suppress(VolumeError):  # `load` says what is wrong with it
            found += [os.stat(other) for other in _others(path)]
    return sum(file.st_size for file in found), max(file.st_mtime_ns for file in found)


def _others(path: Path) -> list[Path]:
    """The other files of a volume."""
    name = path.name.lower()
    if name.endswith((*NRRD_SUFFIXES, *META_SUFFIXES)):
        data = data_file(path)
        return [data] if data else []
    if name.endswith(PAIR_SUFFIXES):
        return [other for other in pair(path) if other != path]
    return []
