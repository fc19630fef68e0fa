"""CSV lists of images and their labels, as CC-CCII's folds are published."""

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from voco_jax.errors import InputError

_PATHS = ("image", "path", "file", "filename")
_LABELS = ("label", "class", "target")
_CCII = ("label", "patient_id", "scan_id")
_VALIDATION = re.compile(r"(^|[_.-])val(id(ation)?)?$", re.IGNORECASE)
EXPECTED = (
    f"a header with a path ({', '.join(_PATHS)}) and a label ({', '.join(_LABELS)}), or with "
    f"{', '.join(_CCII)} as CC-CCII's, or no header and a path and a label in each row"
)


def read_csv(text: str, name: str, labels: Collection[str]) -> Mapping[str, Any]:
    """What a CSV list says, as a Decathlon list would.

    The columns are named by a header, in any order; other columns are left aside. Without a header
    there are two, and the label's is the one that holds nothing but `labels`, else the second.
    CC-CCII's rows (patient_id, scan_id, label) are of the folder label/patient_id/scan_id.

    Args:
        text: of the file.
        name: of the file: all its rows are validation where it ends in "valid", as
            CC_CCII_fold0_valid.csv ("val" and "validation" too), else training.
        labels: that there may be; empty: not known.

    Returns:
        {"training": [{"image": path, "label": label}, ...], "validation": [...]}.

    Raises:
        InputError: no such columns, or a row that lacks one.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if any(row)]
    except csv.Error as error:
        raise InputError(f"{name}: not CSV ({error}), expected {EXPECTED}") from error
    columns, first = _columns(rows, name, labels)
    entries = []
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) <= max(columns):
            raise InputError(
                f"{name}: row {number}: found {row}, expected {max(columns) + 1} cells"
            )
        *place, label = (row[column].strip() for column in columns)
        entries.append({"image": "/".join([label, *place] if len(place) > 1 else place)})
        entries[-1]["label"] = label
    stem = name.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
    section = "validation" if _VALIDATION.search(stem) else "training"
    return {"training": [], section: entries}


def _columns(
    rows: Sequence[Sequence[str]], name: str, labels: Collection[str]
) -> tuple[tuple[int, ...], int]:
    """The columns of the path, or of patient and scan, then that of the label; the first row."""
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    paths, named = ([c for c in header if c in names] for names in (_PATHS, _LABELS))
    if all(cell in header for cell in _CCII):
        return tuple(header.index(cell) for cell in ("patient_id", "scan_id", "label")), 1
    if paths and named:
        best = min(named, key=_LABELS.index)
        return (header.index(paths[0]), header.index(best)), 1
    if len(header) != 2 or paths or named:
        found = f"the columns {', '.join(header)}" if header else "no rows"
        raise InputError(f"{name}: found {found}, expected {EXPECTED}")
    is_label = [all(row[i].strip() in labels for row in rows if len(row) > i) for i in (0, 1)]
    return ((1, 0) if is_label == [True, False] else (0, 1)), 0
