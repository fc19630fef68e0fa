"""The table of features that `embed` writes: Parquet, a row a volume, a crop or an organ.

Its manifest (versions, weights, the card's chain, settings, device, counts, failures) is in the
schema's metadata and, to be read by people, as JSON beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from voco_jax.errors import InputError
from voco_jax.files import parse_object, write_atomically
from voco_jax.types import Size

MANIFEST = b"voco_jax"
"""The key of the schema's metadata that holds the manifest."""
RANDOM_WEIGHTS = "random weights"
"""What the column `weights` begins with, if they are random."""


@dataclass(frozen=True)
class FeatureTable:
    """Features of volumes, crops or organs, a row each; all columns are of one length.

    Attributes:
        id: VOLUME, of a crop VOLUME#000, of an organ VOLUME#liver; no two are the same.
        volume: the id of the row's volume.
        path: its file.
        kind: "volume", "crop" or "organ".
        organ: name, or None.
        corner: voxels of the prepared volume, RAS, or None.
        size: likewise.
        spacing: of the file, mm, RAS.
        shape: of the file, RAS.
        digest: of the prepared voxels.
        weights: SHA-256 of the weight file; of random ones `RANDOM_WEIGHTS` and their seed.
        vectors: (rows, features) float32.
        manifest: plain values.
    """

    id: Sequence[str]
    volume: Sequence[str]
    path: Sequence[str]
    kind: Sequence[str]
    organ: Sequence[str | None]
    corner: Sequence[Size | None]
    size: Sequence[Size | None]
    spacing: Sequence[tuple[float, float, float]]
    shape: Sequence[Size]
    digest: Sequence[str]
    weights: Sequence[str]
    vectors: np.ndarray
    manifest: Mapping[str, Any]


def manifest_path(table: Path) -> Path:
    """The JSON beside a table: `features.parquet.json` for `features.parquet`."""
    return table.with_name(f"{table.name}.json")


def schema(features: int, manifest: Mapping[str, Any]) -> pa.Schema:
    """The columns of a table.

    Args:
        features: of a vector.
        manifest: plain values.
    """
    voxels, text = pa.list_(pa.int32(), 3), pa.string()
    columns = [
        *(pa.field(name, text, False) for name in ("id", "volume", "path", "kind")),
        *(pa.field("organ", text), pa.field("corner", voxels), pa.field("size", voxels)),
        *(pa.field("spacing", pa.list_(pa.float32(), 3), False), pa.field("shape", voxels, False)),
        *(pa.field("digest", text, False), pa.field("weights", text, False)),
        pa.field("vector", pa.list_(pa.float32(), features), False),
    ]
    return pa.schema(columns, {MANIFEST: json.dumps(manifest).encode()})


def write_table(path: Path, table: FeatureTable) -> None:
    """Writes a table and its manifest, each complete or not at all.

    Raises:
        OSError: it cannot be written.
    """
    columns = schema(table.vectors.shape[1], table.manifest)
    flat = pa.array(np.ascontiguousarray(table.vectors, np.float32).reshape(-1))
    arrays = [
        pa.array(list(getattr(table, field.name)), field.type) for field in list(columns)[:-1]
    ]
    arrays.append(pa.FixedSizeListArray.from_arrays(flat, table.vectors.shape[1]))
    part = path.with_name(f"{path.name}.part")
    pq.write_table(pa.Table.from_arrays(arrays, schema=columns), part)
    write_atomically(manifest_path(path), json.dumps(table.manifest, indent=1) + "\n")
    part.replace(path)


def read_table(path: str | Path) -> FeatureTable:
    """Reads what `write_table` has written.

    Raises:
        InputError: no such file, not Parquet, columns that lack or have another type, no rows, an
            id twice, or features that are not finite.
    """
    expected = "expected a table that voco_jax.evaluation.embed wrote"
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error}), {expected}") from error
    found = table.schema.field("vector").type if "vector" in table.column_names else None
    if not isinstance(found, pa.FixedSizeListType):
        raise InputError(f"{path}: found no vectors of one length, {expected}")
    for field in schema(found.list_size, {}):
        if (
            field.name not in table.column_names
            or table.schema.field(field.name).type != field.type
        ):
            raise InputError(f"{path}: column {field.name}: found none of {field.type}, {expected}")
    try:
        manifest = parse_object((table.schema.metadata or {}).get(MANIFEST, b""))
    except ValueError as error:
        raise InputError(f"{path}: found no manifest ({error}), {expected}") from error
    names = schema(found.list_size, {}).names[:-1]
    columns = {name: table[name].to_pylist() for name in names}
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, found.list_size)
    if not len(vectors) or len(set(columns["id"])) < len(vectors):
        raise InputError(f"{path}: found no rows, or an id twice; {expected}")
    if not np.isfinite(vectors).all():
        broken = columns["id"][int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
        raise InputError(f"{path}: {broken}: found features that are not finite; embed it again")
    for name in ("corner", "size", "spacing", "shape"):
        columns[name] = [None if one is None else tuple(one) for one in columns[name]]
    return FeatureTable(**columns, vectors=vectors, manifest=manifest)
