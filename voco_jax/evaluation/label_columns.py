"""Labels of a feature table's rows: from a CSV file beside it, or from its own columns."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from voco_jax.data.formats.dicom_series import is_series
from voco_jax.errors import InputError
from voco_jax.evaluation.features import FeatureTable
from voco_jax.evaluation.masks import without_suffix

IDS = ("id", "volume")
"""The columns of a CSV file that may name the rows or volumes of a table, if not said."""
OWN = ("organ", "spacing", "shape", "corner", "corner_x", "corner_y", "corner_z")
"""What a table says of its rows itself."""
Row = Mapping[str, str]


def read_labels(path: str | Path, id_column: str | None = None) -> dict[str, Row]:
    """The rows of a CSV file by their id; cells without the blanks around them.

    Args:
        path: of the file, UTF-8; separated by commas, semicolons or tabs.
        id_column: None: the first of `IDS` that there is.

    Raises:
        InputError: no such file or column, no CSV, a column or an id twice.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected a CSV file, UTF-8") from error
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        header, *lines = [
            [cell.strip() for cell in line]
            for line in csv.reader(io.StringIO(text), delimiter=separator, strict=True)
            if any(line)
        ] or [[]]
    except csv.Error as error:
        raise InputError(
            f"{path}: not CSV ({error}), expected a header and a row each; is a quote left open?"
        ) from error
    found = [id_column] if id_column else [name for name in IDS if name in header]
    if not found or found[0] not in header or len(set(header)) < len(header):
        raise InputError(
            f"{path}: found the columns {', '.join(header) or '(none)'}, expected each once and "
            f"among them {id_column or ' or '.join(IDS)}, with the ids or volumes of the table; "
            "--id names it"
        )
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise InputError(f"{path}: row {number}: found {len(line)} cells, not {len(header)}")
        row = dict(zip(header, line, strict=True))
        if rows.setdefault(row[found[0]], row) is not row:
            raise InputError(f"{path}: row {number}: found {row[found[0]]!r} twice; one row each")
    return rows


def find_row(labels: Mapping[str, Row], *names: str) -> Row:
    """The row of the first name that there is; an empty one: of none.

    Args:
        labels: of `read_labels`.
        names: each is looked for as it is, as a file's name, and as that without its suffix.
    """
    files = [PurePath(name).name for name in names]
    every = [*names, *files, *map(without_suffix, files)]
    return next((labels[name] for name in every if name in labels), {})


def match(table: FeatureTable, labels: Mapping[str, Row], path: str | Path) -> list[Row]:
    """The row of a CSV file for each row of the table: by id, volume or file, see `find_row`.

    Args:
        table: of features.
        labels: of `read_labels`.
        path: of the CSV file, for the error.

    Returns:
        An empty one where there is none.

    Raises:
        InputError: none fits any.
    """
    names = zip(table.id, table.volume, table.path, strict=True)
    found = [find_row(labels, *of_row) for of_row in names]
    if not any(found):
        raise InputError(
            f"{path}: found rows for {', '.join(list(labels)[:3]) or 'nothing'}, expected ids of "
            f"the table, as {table.id[0]}, volumes, as {table.volume[0]}, or names of files; --id "
            "names the column"
        )
    return found


def read_rows(table: FeatureTable, labels: str | None, id_column: str | None) -> list[Row]:
    """The row of a CSV file for each row of the table, empty ones without a file.

    Raises:
        InputError: see `read_labels` and `match`.
    """
    if labels is None:
        return [{}] * len(table.id)
    return match(table, read_labels(labels, id_column), labels)


def column(table: FeatureTable, rows: Sequence[Row], name: str) -> np.ndarray:
    """A column of labels, for each row of the table.

    Args:
        table: of features.
        rows: of `match`, or empty ones.
        name: of a column of the CSV file, or else one of `OWN`.

    Returns:
        (rows,) str; "": it has none.

    Raises:
        InputError: no such column.
    """
    known = {key for row in rows for key in row}
    if name in known:
        return np.array([row.get(name, "") for row in rows])
    if name not in OWN:
        raise InputError(
            f"column {name!r}: found {', '.join(sorted(known)) or 'none'} in the CSV file, and "
            f"{', '.join(OWN)} in the table"
        )
    if name.startswith("corner_"):
        axis = "xyz".index(name[-1])
        return np.array(["" if corner is None else str(corner[axis]) for corner in table.corner])
    values = getattr(table, name)
    return np.array([value if isinstance(value, str) else _joined(value) for value in values])


def _joined(value: Sequence[float] | None) -> str:
    return "" if value is None else "x".join(f"{number:.4g}" for number in value)


def patients(
    table: FeatureTable, rows: Sequence[Row], name: str | None
) -> tuple[np.ndarray, list[str]]:
    """Who a row belongs to, so that nobody is on both sides of a fold.

    Rows of one volume belong together, and so do volumes with the same voxels: they are one scan
    under two names. Volumes of a folder with several DICOM series (reconstructions of one scan,
    most often) are of one patient, unless the column says otherwise.

    Args:
        table: of features.
        rows: as in `column`.
        name: of the column; None, or where it is empty: each volume is a patient, or the folder
            of a DICOM series.

    Returns:
        (rows,) str, and notes for the reader.

    Raises:
        InputError: no such column, or a volume of two patients.
    """
    names = np.array([_scan(*one) for one in zip(table.volume, table.path, strict=True)])
    series = names != np.array(table.volume)
    if name is not None:
        given = column(table, rows, name)
        series &= given == ""
        names = np.where(given == "", names, given)
    folders, parts = len(set(names[series])), len(set(np.array(table.volume)[series]))
    owner: dict[str, str] = {}
    for volume, patient in zip(table.volume, names, strict=True):
        if owner.setdefault(volume, patient) != patient:
            raise InputError(
                f"column {name}: {volume}: found the patients {owner[volume]} and {patient}, "
                "expected one: the rows of a volume stay together"
            )
    unique, index = np.unique(names, return_inverse=True)
    scans, scan = np.unique(np.array(table.digest), return_inverse=True)
    pairs = (np.ones(len(index)), (index, scan + len(unique)))
    nodes = len(unique) + len(scans)
    _, component = connected_components(coo_array(pairs, shape=(nodes, nodes)), directed=False)
    first: dict[int, str] = {}
    for patient, part in zip(unique, component, strict=False):
        first.setdefault(int(part), str(patient))
    merged = len(unique) - len(first)
    notes = [f"{merged} patients have the voxels of another: kept together"] if merged else []
    if parts > folders:
        notes.append(
            f"{parts} volumes are DICOM series of {folders} folders: a folder is taken as a "
            "patient; --patient names a column that knows better"
        )
    return np.array([first[int(component[one])] for one in index]), notes


def _scan(volume: str, path: str) -> str:
    """Of a DICOM series beside others its folder, else the volume itself."""
    return str(Path(path).parent) if is_series(Path(path)) else volume
