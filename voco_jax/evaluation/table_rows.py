"""Rows of feature tables: some of one, and those of two that belong together."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from voco_jax.errors import InputError
from voco_jax.evaluation.features import RANDOM_WEIGHTS, FeatureTable

KINDS = ("volume", "crop", "organ")


def take(table: FeatureTable, rows: Sequence[int]) -> FeatureTable:
    """Some rows of a table, in the order given."""
    columns = {
        name: [values[row] for row in rows]
        for name, values in vars(table).items()
        if name not in ("vectors", "manifest")
    }
    return FeatureTable(**columns, vectors=table.vectors[list(rows)], manifest=table.manifest)


def same_rows(table: FeatureTable, random: FeatureTable, path: str) -> FeatureTable:
    """The rows of the table of random weights in the order of the other table.

    Args:
        table: of features.
        random: of the same scans by the same network with random weights.
        path: of the latter, for the error.

    Raises:
        InputError: it is of no random weights or of the same ones, lacks a row, or has another scan
            or another number of features.
    """
    others = [one for one in random.weights if not one.startswith(RANDOM_WEIGHTS)]
    if others:
        raise InputError(
            f"{path}: weights: found {others[0]!r}, expected {RANDOM_WEIGHTS!r}: make the table "
            f"with: {random_command(table, path)}"
        )
    places = {id: place for place, id in enumerate(random.id)}
    missing = [id for id in table.id if id not in places]
    if missing:
        raise InputError(
            f"{path}: found no row {missing[0]!r} ({len(missing)} are missing), expected the rows "
            "of --table: embed the same input with the same settings"
        )
    order = [places[id] for id in table.id]
    for id, ours, place in zip(table.id, table.digest, order, strict=True):
        if ours != random.digest[place]:
            raise InputError(
                f"{path}: {id}: found other voxels than in --table, expected the same: embed both "
                "from the same files, with the window and spacing of the same card"
            )
    if random.vectors.shape[1] != table.vectors.shape[1]:
        raise InputError(
            f"{path}: found {random.vectors.shape[1]} features, expected {table.vectors.shape[1]} "
            "as in --table: random weights of the same network"
        )
    if np.array_equal(random.vectors[order], table.vectors):
        raise InputError(f"{path}: found the features of --table, expected those of random weights")
    return take(random, order)


def of_kind(table: FeatureTable, kind: str | None, path: str) -> FeatureTable:
    """The rows of one kind.

    Args:
        table: of features.
        kind: as in the column; None: that of all rows.
        path: of the table, for the error.

    Raises:
        InputError: rows of several kinds and none is chosen, or no row of it.
    """
    kinds = sorted(set(table.kind))
    if kind is None and len(kinds) > 1:
        raise InputError(f"{path}: found rows of {', '.join(kinds)}; choose one with --kind")
    if kind is not None and kind not in kinds:
        raise InputError(f"--kind: found {kind}, expected {', '.join(kinds)} as in {path}")
    order = [place for place, own in enumerate(table.kind) if kind in (None, own)]
    return take(table, order)


def random_command(table: FeatureTable, path: str) -> str:
    """The command that makes the table of random weights for a table.

    Args:
        table: of features.
        path: of its file.
    """
    manifest = table.manifest
    words = ["python", "-m", "voco_jax.evaluation.embed", "--random-weights", "0"]
    words += ["--weights", str(manifest.get("weights_file", "WEIGHTS"))]
    words += ["--input", str(manifest.get("input", "INPUT"))]
    words += {"crop": ["--crops"], "organ": ["--masks", "MASKS"]}.get(table.kind[0], [])
    file = Path(path)
    return shlex.join([*words, "--output", str(file.with_name(f"{file.stem}_random{file.suffix}"))])
