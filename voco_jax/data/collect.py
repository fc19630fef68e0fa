"""Which CT volumes there are: in folders, which are searched, and in lists.

A scan accounts for every file: it is a volume, or a part of one, or is set aside with its reason.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from voco_jax.config.common import Classes
from voco_jax.data.datalists import Volume, combine, read_list
from voco_jax.data.formats.readers import DETACHED, SUFFIXES, files_of, volumes_in
from voco_jax.data.formats.stored import Aside
from voco_jax.data.storage import Folder, is_remote
from voco_jax.errors import InputError
from voco_jax.files import expand

# Segmentations, as TotalSegmentator (segmentations/liver.nii.gz), nnU-Net and Decathlon (labelsTr),
# AMOS (labelsVa), BTCV (label/label0001), LiTS and CT-ORG (segmentation-0, labels-0), KiTS, VerSe
# (_seg-vert_msk), ACDC (_gt), 3D-IRCADb (MASKS_DICOM) and AbdomenCT-1K (Mask) name them.
_MASK = r"segmentations?|seg|labels?|labels?(tr|ts|va|val)|masks?|msk|gt|ground[-_ ]?truths?"
_MASK_FOLDER = re.compile(rf"({_MASK}|(masks|labelled)_dicom|gt_segmentations)", re.IGNORECASE)
_MASK_FILE = re.compile(rf"(^|[^a-z])({_MASK})([^a-z]|$)", re.IGNORECASE)


def scan(
    folder: str | Path, segmentations: bool = False, aside: list[Aside] | None = None
) -> list[Volume]:
    """Finds all volumes below a folder, as training volumes.

    Files are found by suffix (of `readers.FORMATS`; of a NIfTI pair the .hdr counts, of .nhdr and
    .mhd the header); a folder with DICOM files is one volume. Names that begin with a dot are left
    aside. In object stores, DICOM files are found by suffix only.

    Args:
        folder: searched recursively; links to files are followed if they stay below the folder,
            links to folders are not.
        segmentations: whether to take what its name calls one, too.
        aside: gets every file that is no part of a volume, its path below the folder and why.

    Returns:
        The volumes sorted by path.

    Raises:
        InputError: not a folder, nothing found, a folder that cannot be read, or a link that leaves
            the folder.
    """
    remote = is_remote(folder)
    root = Folder.at(folder).path if remote else os.path.realpath(expand(folder))
    if not (remote or os.path.isdir(root)):
        raise InputError(f"{folder}: not a folder, expected one with CT volumes")
    found: list[tuple[str, Path | str, int]] = []
    left: list[Aside] = [] if aside is None else aside
    count, before = 0, len(left)
    for directory, files, links in (
        _list_objects(root, left) if remote else _walk(root, folder, left)
    ):
        count += len(files)
        place = None if remote else os.path.join(root, directory)
        folders = "" if directory == "." else f"{directory}/"
        others = set(files)
        for name, own in _volumes(files, place):
            others -= own
            inside = directory if name == "." else folders + name
            path = f"{root}/{inside}".removesuffix("/.") if remote else Path(root, inside)
            if name in links:  # the folder itself is no link, nor is any on the way to it
                path = Path(os.path.realpath(path))
                if not path.is_relative_to(root):
                    raise InputError(
                        f"{folder}: {inside}: this link leads out of the folder {root}; move the "
                        "file there or scan another folder"
                    )
            if _is_segmentation(inside) and not segmentations:
                left += [(folders + one, "a segmentation: by its name") for one in sorted(own)]
            else:
                found.append((inside, path, len(own)))
        left += [(folders + name, _no_volume(name)) for name in sorted(others)]
    if not found:
        looked_at = f"{count} objects" if remote else f"{count} files in it and below it"
        masks = sum(why.startswith("a segmentation") for _, why in left[before:])
        raise InputError(
            f"{folder}: found no CT volume among {looked_at}, expected names that end in "
            f"{', '.join(SUFFIXES)}"
            + (f" ({masks} are named as segmentations: a list can name them)" if masks else "")
            + "; name the folder that holds them"
        )
    name = os.path.basename(root)
    return [
        Volume(f"{name}/{inside}", path, "training", files=files)
        for inside, path, files in sorted(found)
    ]


def collect(
    lists: Sequence[str | Path],
    roots: Sequence[str | Path],
    scans: Sequence[str | Path] = (),
    labelled: bool = False,
    classes: Classes | None = None,
    channels: Sequence[str] = (),
    aside: list[Aside] | None = None,
) -> list[Volume]:
    """Reads lists and scans folders, and combines what they name.

    Args:
        lists: JSON or CSV; "": the root is scanned instead. None at all: every root is.
        roots: each list's root folder, in the same order, or one for all.
        scans: folders with volumes.
        labelled: see `read_list`.
        classes: see `read_list`.
        channels: see `read_list`.
        aside: see `scan`.

    Raises:
        InputError: see `read_list`, `scan`, `combine`; another number of roots than of lists; or
            labels wanted of a folder, which cannot say whose they are.
    """
    if (labelled or classes is not None) and (scans or not all(lists) or not lists):
        raise InputError(
            "lists: found a folder to be searched, expected a Decathlon list for each root, or a "
            "CSV file: only a list says which label belongs to which image"
        )
    if not lists:
        lists = [""] * len(roots)
    if len(roots) == 1:
        roots = [roots[0]] * len(lists)
    if len(roots) != len(lists):
        raise InputError(
            f"root: found {len(roots)} root folders for {len(lists)} lists, expected one for all "
            "or one for each list, in the same order"
        )
    volumes: list[Volume] = []
    for list_path, root in zip(lists, roots, strict=True):
        if list_path:
            volumes += read_list(list_path, root, labelled, classes, channels)
        else:
            volumes += scan(root, aside=aside)
    for folder in scans:
        volumes += scan(folder, aside=aside)
    return combine(volumes)


def _volumes(files: Sequence[str], folder: str | None) -> Iterator[tuple[str, set[str]]]:
    """The volumes among the files of a folder, each with the names of its files there."""
    names = volumes_in(files, folder)
    single = {name for name in names if name != "."}
    for name in single:
        own = {name}
        if folder and name.lower().endswith(DETACHED):
            own |= {file.name for file in files_of(os.path.join(folder, name))}
        yield name, own & (set(files) - single | {name})
    if "." in names:
        yield ".", set(files) - single


def _no_volume(name: str) -> str:
    """Why a file is no part of a volume: its name is of no format."""
    suffix = os.path.splitext(name)[1]
    return f"no volume: a name {f'that ends in {suffix}' if suffix else 'without a suffix'}"


def _is_segmentation(inside: str) -> bool:
    """Whether a path below the scanned folder is one that segmentations have."""
    *folders, name = inside.split("/")
    suffix = next((end for end in SUFFIXES if name.lower().endswith(end)), "")
    return any(map(_MASK_FOLDER.fullmatch, (*folders, name))) or bool(
        _MASK_FILE.search(name[: len(name) - len(suffix)])
    )


def _walk(
    root: str, given: str | Path, aside: list[Aside]
) -> Iterator[tuple[str, list[str], set[str]]]:
    """Each folder below a real path, relative to it, its files, and which are links; opens none."""
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        files, links = [], set()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        inside = os.path.relpath(entry.path, root)
                        aside.append((inside, "hidden: its name begins with a dot"))
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_symlink() and entry.is_dir():
                        inside = os.path.relpath(entry.path, root)
                        aside.append((inside, "a link to a folder: not followed"))
                    else:
                        files.append(entry.name)
                        if entry.is_symlink():
                            links.add(entry.name)
        except OSError as error:
            raise InputError(
                f"{given}: cannot look into {directory}: {error.strerror or error}; make it "
                "readable or scan the folders beside it"
            ) from error
        yield os.path.relpath(directory, root), files, links


def _list_objects(root: str, aside: list[Aside]) -> Iterator[tuple[str, list[str], set[str]]]:
    """As `_walk`, of an object store, which has no links."""
    files: dict[str, list[str]] = {}
    try:
        keys = Folder(root).all_names()
    except OSError as error:
        raise InputError(f"{root}: cannot list these objects: {error}") from error
    for key in keys:
        directory, _, name = key.rpartition("/")
        if any(part.startswith(".") for part in key.split("/")):
            aside.append((key, "hidden: its name begins with a dot"))
        else:
            files.setdefault(directory or ".", []).append(name)
    for directory, names in files.items():
        yield directory, names, set()
