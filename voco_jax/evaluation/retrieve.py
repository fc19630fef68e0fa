"""The nearest volumes, crops or organs of a table of features, with a picture of them.

    python -m voco_jax.evaluation.retrieve --table T.parquet --query ID --top 5 --output DIR

By cosine, exactly. What is of the query's own volume (or patient, or has its voxels) is left out.
With --labels and --label, also how many of the neighbours have the query's label, beside guessing,
and beside random weights with --random; only rows with a label take part then. Writes
neighbours.csv, results.json and neighbours.png; the picture reads the files that were embedded.
Whole scans of one scanner are near to each other, whatever they show: see docs/features.md.
Exit status: 0, or 2 for bad input.
"""

import argparse
import csv
import dataclasses
import difflib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from tqdm import tqdm

from voco_jax.config.common import Chain
from voco_jax.config.load import command_parser, positive
from voco_jax.data.volumes import prepare_volume
from voco_jax.errors import InputError
from voco_jax.evaluation.features import FeatureTable, read_table
from voco_jax.evaluation.label_columns import column, patients, read_rows
from voco_jax.evaluation.nearest import Neighbours, find_neighbours, precision
from voco_jax.evaluation.table_rows import KINDS, of_kind, same_rows, take
from voco_jax.files import write_atomically
from voco_jax.report.neighbours import Tile, draw_neighbours, middle_planes
from voco_jax.report.png import write_png

ALL = "all"
DRAWN = 6
"""Queries in the picture, at most."""


def choose_queries(table: FeatureTable, query: str) -> list[int]:
    """The rows that are asked for: one by its id, all rows of a volume, or `ALL`.

    Raises:
        InputError: there is none.
    """
    if query == ALL:
        return list(range(len(table.id)))
    rows = [row for row, id in enumerate(table.id) if id == query]
    rows = rows or [row for row, volume in enumerate(table.volume) if volume == query]
    if not rows:
        close = difflib.get_close_matches(query, [*table.id, *table.volume], n=1, cutoff=0.3)
        hint = (close or table.id)[0]
        raise InputError(f"--query: found {query!r}, expected all, or an id as {hint}")
    return rows


def draw(
    table: FeatureTable,
    queries: Sequence[int],
    neighbours: Neighbours,
    labels: np.ndarray,
    progress: bool = True,
) -> np.ndarray:
    """Draws at most `DRAWN` queries, at random but always the same, each with its neighbours.

    Args:
        table: whose files are read, and whose manifest says how they are prepared.
        queries: indices of rows.
        neighbours: of `find_neighbours`.
        labels: (rows,) str; "": none.
        progress: whether to show a bar.

    Returns:
        (rows, columns, 3) uint8.
    """
    some = np.random.default_rng(0).permutation(len(queries))[:DRAWN]
    chosen = np.sort(some).tolist()
    wanted = {int(row) for one in chosen for row in (queries[one], *neighbours.rows[one])} - {-1}
    tiles = _tiles(table, sorted(wanted), progress)
    drawn = []
    for one in chosen:
        query = queries[one]
        line = [_titled(tiles[query], (f"query {table.id[query]}", labels[query]), None)]
        for row, similarity in zip(neighbours.rows[one], neighbours.similarities[one], strict=True):
            if row < 0:
                line.append(Tile(("no more rows",), None, (1, 1, 1)))
                continue
            right = bool(labels[row] == labels[query]) if labels[query] else None
            line.append(
                _titled(tiles[row], (table.id[row], f"{similarity:.3f} {labels[row]}"), right)
            )
        drawn.append(line)
    return draw_neighbours(drawn, f"nearest by cosine, {len(drawn)} of {len(queries)} queries")


def _titled(tile: Tile, title: tuple[str, ...], right: bool | None) -> Tile:
    return dataclasses.replace(tile, title=title, right=right)


def _tiles(table: FeatureTable, rows: Sequence[int], progress: bool) -> dict[int, Tile]:
    """Slices of rows; each file is read once."""
    chain = _chain(table)
    files: dict[str, list[int]] = {}
    for row in rows:
        files.setdefault(table.path[row], []).append(row)
    found: dict[int, Tile] = {}
    for path, own in tqdm(files.items(), desc="picture", unit=" files", disable=not progress):
        try:
            prepared = prepare_volume(path, chain, take_doubtful=True)
        except InputError as error:
            found |= {row: Tile((), None, (1, 1, 1), str(error)) for row in own}
            continue
        spacing = np.array(chain.spacing or prepared.spacing)
        if chain.fit == "resize":
            spacing = spacing * np.subtract(*prepared.box[::-1]) / prepared.voxels.shape
        for row in own:
            corner, size = table.corner[row], table.size[row]
            part = prepared.voxels
            if corner is not None and size is not None:
                part = part[tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))]
            x, y, z = spacing.tolist()
            found[row] = Tile((), middle_planes(part), (x, y, z))
    return found


def _chain(table: FeatureTable) -> Chain:
    """How the files were prepared, of the manifest; of chains with labels what all chains have."""
    try:
        names = [field.name for field in dataclasses.fields(Chain)]
        values = {name: table.manifest["chain"][name] for name in names}
        return pydantic.TypeAdapter(Chain).validate_python(values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"manifest: chain: found none that can be read ({error}), expected that of the "
            "weights' card, as embed writes it; embed again"
        ) from error


def as_csv(
    table: FeatureTable, queries: Sequence[int], neighbours: Neighbours, labels: np.ndarray
) -> str:
    """A line for each neighbour of each query."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["query", "rank", "id", "similarity", "path", "query_label", "label"])
    for query, rows, similarities in zip(
        queries, neighbours.rows, neighbours.similarities, strict=True
    ):
        for rank, (row, similarity) in enumerate(zip(rows, similarities, strict=True), 1):
            if row >= 0:
                cells = [table.id[query], rank, table.id[row], f"{similarity:.6f}"]
                lines.writerow([*cells, table.path[row], labels[query], labels[row]])
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m voco_jax.evaluation.retrieve",
        __doc__,
        """
--table t.parquet --query case_12 --output near
--table t.parquet --query "case_12#004" --top 8 --output near
--table t.parquet --query all --labels labels.csv --label diagnosis --random r.parquet --output near
""",
    )
    add = parser.add_argument
    add("--table", required=True, metavar="FILE", help="features that embed wrote")
    add("--query", required=True, metavar="ID", help=f"id or volume, or {ALL}")
    add("--top", type=positive, default=5, metavar="N", help="neighbours; default %(default)s")
    add("--kind", choices=KINDS, help="of the rows, where the table has several")
    add("--labels", metavar="CSV", help="with a row for each volume, crop or organ, and a header")
    add("--label", metavar="COLUMN", help="of the CSV file or the table; see probe")
    add("--id", metavar="COLUMN", help="ids, volumes or names of files; default: id or volume")
    add(
        "--patient",
        metavar="COLUMN",
        help="default: each volume is a patient; of DICOM series the folder",
    )
    add("--random", metavar="FILE", help="features of random weights, to compare with")
    add("--output", required=True, metavar="DIR", help="folder for what is written")
    try:
        _run(parser.parse_args(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.random and not options.label:
        raise InputError("--random: found it without --label, by which the two are compared")
    table = of_kind(read_table(options.table), options.kind, options.table)
    rows = read_rows(table, options.labels, options.id)
    groups, notes = patients(table, rows, options.patient)
    random = (
        same_rows(table, read_table(options.random), options.random) if options.random else None
    )
    labels = np.full(len(rows), "")
    if options.label:
        labels = column(table, rows, options.label)
        kept = np.flatnonzero(labels != "")
        if not len(kept):
            raise InputError(
                f"--label {options.label}: found no row of {options.table} that has one, expected "
                "some: take another column, or embed again with --crops or --masks"
            )
        if len(kept) < len(labels):
            notes.append(f"left out, without {options.label}: {len(labels) - len(kept)} rows")
        table, groups, labels = take(table, kept.tolist()), groups[kept], labels[kept]
        random = take(random, kept.tolist()) if random else None
    queries = choose_queries(table, options.query)
    neighbours = find_neighbours(table.vectors, queries, groups, options.top)
    found: dict[str, Any] = {}
    if options.label:
        found["these weights"] = precision(neighbours, queries, labels, groups)
    if random:
        other = find_neighbours(random.vectors, queries, groups, options.top)
        found["random weights"] = precision(other, queries, labels, groups)
    results = {"settings": vars(options), "notes": notes, f"precision_at_{options.top}": found}
    picture = draw(table, queries, neighbours, labels)
    output = Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lines = as_csv(table, queries, neighbours, labels)
        write_atomically(output / "neighbours.csv", lines)
        write_atomically(output / "results.json", json.dumps(results, indent=1) + "\n")
        write_png(output / "neighbours.png", picture)
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    for line in notes:
        print(line)
    if len(queries) == 1:
        print(lines, end="")
    for name, one in found.items():
        ends = "{:.3f} to {:.3f}".format(*one["interval"]) if one["interval"] else "one patient"
        print(
            f"{name}: {one['mean']:.3f} ({ends}) of the {options.top} nearest have the query's "
            f"{options.label}; {one['chance']:.3f} by guessing"
        )
    print(f"{output}: neighbours.csv, results.json, neighbours.png")


if __name__ == "__main__":
    sys.exit(main())
