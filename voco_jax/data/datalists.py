"""Which CT volumes there are, by Decathlon-style and CSV lists; `collect` has folder scans too.

Lists are untrusted: every path must stay under its root folder, symbolic links followed. Whether
the files exist is not asked here; a missing file is one failed volume of `prepare`, not a bad list.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from voco_jax.config.common import Chain, Classes, ClassifiedChain, LabelledChain, class_table
from voco_jax.data.csv_lists import read_csv
from voco_jax.data.storage import Folder, is_remote
from voco_jax.errors import InputError
from voco_jax.files import expand, is_utf8

Section = Literal["training", "validation"]
SECTIONS: tuple[Section, ...] = ("training", "validation")


@dataclass(frozen=True)
class Volume:
    """One CT file (or DICOM folder) that a list or a folder names."""

    id: str  # "<name of the root folder>/<path in the list>": the same on every machine
    path: Path | str  # absolute, or a gs:// or s3:// URL; need not exist
    section: Section
    label: Path | str | None = None  # segmentation of it, where one is wanted
    class_label: str | None = None  # as the list has it, where one is wanted
    channels: tuple[Path | str, ...] = ()  # files of an image's further channels; `path`: the first
    fold: int | None = None  # that it belongs to, where the list says so
    files: int = field(default=1, compare=False)  # that it may be made of, as far as a scan saw


def read_list(
    list_path: str | Path,
    root: str | Path,
    labelled: bool = False,
    classes: Classes | None = None,
    channels: Sequence[str] = (),
) -> list[Volume]:
    """Reads a Decathlon-style JSON list, as VoCo's are published, or a CSV file (see `read_csv`).

    Entries of "training" and "validation" are objects with an "image" path, maybe a "label" and a
    "fold" (other keys are left aside), or plain path strings; a path may name a folder, as a DICOM
    series. Other sections, as "test", are left aside.

    Args:
        list_path: the JSON file, or a .csv.
        root: the folder that the list's paths are relative to; need not exist.
        labelled: whether every entry has to have a "label" path too, which else is left aside.
        classes: of which every entry's "label" has to be one, its name or one of its values; None:
            no classes are wanted.
        channels: names of an image's channels: its "image" has to be a list of as many paths, in
            this order. Empty: it is one path.

    Returns:
        The volumes in the list's order, training first; a path listed twice appears twice.

    Raises:
        InputError: unreadable, not JSON, not such a list, empty, a label that is of no class, or a
            path that leaves `root`.
    """
    table = class_table(classes) if classes is not None else None
    if str(list_path).lower().endswith(".csv"):
        content: Any = read_csv(read_text(list_path), str(list_path), table or ())
    else:
        content = _read_json(list_path)
    if not isinstance(content, dict) or "training" not in content:
        found = f"a JSON {type(content).__name__}"
        if isinstance(content, dict):
            found = f"an object with the keys {', '.join(map(repr, content)) or 'none'}"
        raise InputError(
            f'{list_path}: found {found}, expected a Decathlon list: {{"training": '
            '[{"image": "path.nii.gz"}, ...], "validation": [...]}'
        )
    root_path = Folder.at(root).path if is_remote(root) else os.path.realpath(expand(root))
    folders: dict[str, str] = {}
    volumes = []
    for section in SECTIONS:
        entries = content.get(section, [])
        if not isinstance(entries, list):
            raise InputError(
                f"{list_path}: {section}: found a JSON {type(entries).__name__}, expected a list "
                'of {"image": path} objects or of paths'
            )
        for index, entry in enumerate(entries):
            where = f"{list_path}: {section}[{index}]"
            volume = _volume(entry, root_path, section, where, folders, labelled, channels)
            if table is not None:
                volume = replace(volume, class_label=_class_label(entry, where, table))
            volumes.append(volume)
    if not volumes:
        raise InputError(
            f"{list_path}: found no volumes in training or validation, expected at least one; "
            "add entries or leave this list out"
        )
    return volumes


def combine(volumes: Iterable[Volume]) -> list[Volume]:
    """Merges the volumes of lists and scans in their order; what is listed twice is kept once.

    Raises:
        InputError: two files with one id; a file of two classes; or a file both for training and
            for validation, which would make held-out figures meaningless.
    """
    by_id: dict[str, Volume] = {}
    by_path: dict[Path | str, Volume] = {}
    for volume in volumes:
        twin = by_id.get(volume.id)
        if twin is not None and twin.path != volume.path:
            raise InputError(
                f"{volume.id}: two files have this id, {twin.path} and {volume.path}; ids are made "
                "of the root folder's name and the path in the list: rename one root folder"
            )
        twin = twin or by_path.get(volume.path)
        if twin is None:
            by_id[volume.id] = by_path[volume.path] = volume
        elif twin.section != volume.section:
            raise InputError(
                f"{volume.path}: listed for {twin.section} as {twin.id} and for {volume.section} "
                f"as {volume.id}; a held-out volume must not be trained on: remove it from one"
            )
        elif twin.class_label != volume.class_label:
            raise InputError(
                f"{volume.path}: listed twice, with the labels {twin.class_label!r} and "
                f"{volume.class_label!r}; remove one of them"
            )
    return list(by_id.values())


def labels_wanted(chain: Chain) -> dict[str, Any]:
    """The arguments of `read_list` and `collect` that a chain's labels ask for."""
    if isinstance(chain, LabelledChain):
        return {"labelled": True, "channels": chain.channels}
    return {"classes": chain.classes if isinstance(chain, ClassifiedChain) else None}


def read_text(path: str | Path) -> str:
    """The text of a list, here or in an object store.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    try:
        if is_remote(path):
            folder, name = Folder.of(str(path))
            content = folder.read(name)
            if content is None:
                raise FileNotFoundError("there is no such object")
        else:
            content = expand(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read this list: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: no text ({error}), expected a list, JSON or CSV") from error


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}), expected a Decathlon list") from error


def _class_label(entry: Any, where: str, table: Mapping[str, int]) -> str:
    """The label of a list's entry as text, if it is one of the table."""
    found = entry.get("label") if isinstance(entry, dict) else None
    label = str(found) if type(found) in (int, str) else ""
    if label not in table:
        raise InputError(
            f"{where}: label: found {json.dumps(found)[:200]}, expected one of "
            f"{', '.join(table)}: the names and values of chain.classes"
        )
    return label


def _volume(
    entry: Any,
    root: str,
    section: Section,
    where: str,
    folders: dict[str, str],
    labelled: bool,
    channels: Sequence[str],
) -> Volume:
    """A list's entry; `folders` remembers the real paths of folders."""
    images: Any = entry.get("image") if isinstance(entry, dict) else entry
    images = images if isinstance(images, list) else [images]
    texts = images + ([entry.get("label") if isinstance(entry, dict) else None] if labelled else [])
    usable = map(_is_name, texts)
    if not all(usable) or len(images) != (len(channels) or 1):
        image = json.dumps([f"{name} path" for name in channels] if channels else "path")
        expected = f'{{"image": {image}}} or {image}'
        if labelled:
            expected = f'{{"image": {image}, "label": "path"}}'
        raise InputError(f"{where}: found {json.dumps(entry)[:200]}, expected {expected}")
    (name, path), *others = [_resolve(text, root, where, folders) for text in texts]
    label = others.pop()[1] if labelled else None
    fold = entry.get("fold") if isinstance(entry, dict) else None
    return Volume(
        id=f"{os.path.basename(root)}/{name}",
        path=path,
        section=section,
        label=label,
        channels=tuple(path for _, path in others),
        fold=fold if type(fold) is int else None,
    )


def _is_name(text: Any) -> bool:
    """Whether a list's text can be a path; JSON may hold what is no text, as "\\udcff"."""
    return isinstance(text, str) and bool(text.strip()) and "\0" not in text and is_utf8(text)


def _resolve(text: str, root: str, where: str, folders: dict[str, str]) -> tuple[str, Path | str]:
    """A path in a list, in its plainest form, and absolute."""
    relative = PurePosixPath(text)
    if is_remote(root):
        resolved, inside = f"{root}/{relative}", bool(relative.parts)
    else:
        parent = os.path.join(root, relative.parent)
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        # Joining is safe only for relative paths; realpath then follows every symbolic link.
        resolved = os.path.join(folders[parent], relative.name)
        if os.path.islink(resolved):
            resolved = os.path.realpath(resolved)
        inside = bool(relative.name) and os.path.commonpath([root, resolved]) == root != resolved
    if relative.is_absolute() or ".." in relative.parts or not inside:
        raise InputError(
            f"{where}: {text!r} leads out of the root folder {root}, expected a relative path of "
            "a file below it; move the file there or name another root"
        )
    return relative.as_posix(), resolved if is_remote(root) else Path(resolved)
