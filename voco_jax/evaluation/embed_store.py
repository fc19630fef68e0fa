"""Rows of a table of features on their way to the disk, so that `embed` can go on where it was.

    TABLE.parquet            the table, written when all is done
    TABLE.parquet.json       its manifest
    TABLE.parquet.journal/   embed.lock: who writes the table;
                             journal.jsonl: the volumes that were done, and how their files were;
                             000001.parquet, ...: rows that are not in the table yet

No more than a part's rows are ever in memory.
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from voco_jax.data.progress import log
from voco_jax.errors import InUseError
from voco_jax.evaluation.features import MANIFEST, manifest_path, schema
from voco_jax.evaluation.journal import Journal, Signatures
from voco_jax.files import parse_object, write_aside, write_atomically
from voco_jax.locks import locked, this_process

LOCK = "embed.lock"
PART_ROWS, PART_SECONDS = 256, 30.0  # of a part: what a kill may cost
GROUP_ROWS = 4096  # of the table's row groups


class Store:
    """The rows of a table, by volume; what other weights or settings made is left aside.

    Args:
        table: its path.
        made_by: weights and settings, as plain values; a part of the table's manifest.
        features: of a vector.
        stack: lets other processes in.

    Raises:
        InUseError: another process writes this table.
        OSError: it cannot be read or written.
    """

    def __init__(
        self,
        table: Path,
        made_by: Mapping[str, Any],
        features: int,
        stack: contextlib.ExitStack,
    ) -> None:
        self._table, self._folder = table, table.with_name(f"{table.name}.journal")
        self._lost: list[str] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._folder / LOCK
        try:
            stack.enter_context(locked(lock, this_process(), log, lost=self._lost.append))
        except InUseError as error:
            raise InUseError(
                f"{table}: another embed is writing this table ({error}); wait for it or stop it, "
                "or choose another --output"
            ) from error
        self._made_by, self._features = json.loads(json.dumps(made_by)), features
        self._journal = Journal(self._folder / "journal.jsonl", made_by)
        self._place: dict[str, Path] = {}  # where a volume's rows are; the newest file counts
        parts = sorted(self._folder.glob("[0-9]*.parquet"))
        self._next = 1 + max((int(part.stem) for part in parts), default=0)
        for path in [table, *parts]:
            ours = self._is_ours(path)
            if ours:
                self._place |= dict.fromkeys(_column(path, "volume"), path)
            elif path != table:
                path.unlink()
        self._rows: list[dict[str, Any]] = []
        self._volumes: dict[str, tuple[Signatures, Any]] = {}
        self._empty: set[str] = set()  # volumes without rows, whatever a file has of them
        self._since = time.monotonic()

    def find(self, volume: str, files: Signatures) -> Any:
        """What `add` was told of a volume, if its rows are there and its files are still those."""
        done = self._journal.find(volume, files)
        if done is not None and not done["rows"]:
            self._empty.add(volume)
            return done
        return done if volume in self._place else None

    def add(
        self, volume: str, files: Signatures, rows: Sequence[Mapping[str, Any]], found: Any = None
    ) -> None:
        """Keeps a volume's rows, at the latest with those of the next half minute.

        Args:
            volume: its id.
            files: that it was made of.
            rows: by column.
            found: what else is to be known of it, as plain values.
        """
        self._rows += map(dict, rows)
        if not rows:
            self._empty.add(volume)
        self._volumes[volume] = files, {"rows": len(rows), "found": found}
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._since > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added.

        Raises:
            OSError: it cannot be written, or another process has taken the table over.
        """
        if self._lost:
            raise OSError(f"another embed has taken this table over ({self._lost[0]})")
        if self._rows:
            part = self._folder / f"{self._next:06d}.parquet"
            content = io.BytesIO()
            columns = schema(self._features, self._made_by)
            vectors = np.stack([row.pop("vector") for row in self._rows])
            arrays = [
                pa.array([row[name] for row in self._rows], columns.field(name).type)
                for name in columns.names[:-1]
            ]
            flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, self._features))
            pq.write_table(pa.Table.from_arrays(arrays, schema=columns), content)
            write_aside(part, content.getvalue()).replace(part)
            self._next += 1
            self._place |= dict.fromkeys((row["volume"] for row in self._rows), part)
        for volume, (files, done) in self._volumes.items():
            self._journal.add(volume, files, done)
        self._rows, self._volumes, self._since = [], {}, time.monotonic()

    def finish(self, volumes: Collection[str], manifest: Mapping[str, Any]) -> int:
        """Writes the table and its manifest, each complete or not at all.

        Args:
            volumes: whose rows it has; in the order in which they were made.
            manifest: with all of `made_by`.

        Returns:
            How many rows it has.
        """
        self.flush()
        part = self._table.with_name(f"{self._table.name}.part")
        count, waiting, rows = 0, [], 0
        with part.open("wb") as file:
            with pq.ParquetWriter(file, schema(self._features, manifest)) as writer:
                for batch in self._batches(set(volumes) - self._empty):
                    waiting.append(batch)
                    rows += batch.num_rows
                    if rows >= GROUP_ROWS:
                        writer.write_table(pa.Table.from_batches(waiting))
                        count, waiting, rows = count + rows, [], 0
                if waiting:
                    writer.write_table(pa.Table.from_batches(waiting))
            file.flush()
            os.fsync(file.fileno())  # before the parts go
        write_atomically(manifest_path(self._table), json.dumps(manifest, indent=1) + "\n")
        part.replace(self._table)
        for path in self._folder.glob("[0-9]*.parquet"):
            path.unlink()
        self._place = dict.fromkeys(self._place, self._table)
        return count + rows

    def _batches(self, volumes: Collection[str]) -> Iterator[pa.RecordBatch]:
        """The rows of the table and the parts that count, a few at a time."""
        for path in sorted({*self._place.values()}, key=lambda one: (one != self._table, one)):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(GROUP_ROWS):
                    kept = [
                        volume in volumes and self._place[volume] == path
                        for volume in batch["volume"].to_pylist()
                    ]
                    yield batch.filter(pa.array(kept, pa.bool_())).replace_schema_metadata(None)

    def _is_ours(self, path: Path) -> bool:
        """Whether these weights and settings made a file of rows."""
        try:
            metadata = pq.read_schema(path).metadata or {}
            manifest = parse_object(metadata.get(MANIFEST, b""))
        except (OSError, ValueError, pa.ArrowException):
            return False
        return {name: manifest.get(name) for name in self._made_by} == self._made_by


def _column(path: Path, name: str) -> list[str]:
    return pq.read_table(path, columns=[name])[name].to_pylist()
