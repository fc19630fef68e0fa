"""What a command has done with each of many images, kept as it goes, so that it can go on."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voco_jax.data.formats.readers import file_signature
from voco_jax.files import parse_object, write_atomically

Signatures = list[list[Any]]
"""Of each file its path, size and time of change."""
_ENTRY = ("name", "files", "done")  # of a line


class Journal:
    """Lines of JSON: first what made the rest (weights, settings), then an image each.

    What something else made is left aside, and replaced once there is something to keep.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Reads it; writes nothing.

        Args:
            path: of the file.
            made_by: plain values; of others nothing is kept.

        Raises:
            OSError: it cannot be read.
        """
        self._path = path
        self._head = json.dumps(made_by, sort_keys=True)
        self._known: dict[str, dict[str, Any]] = {}
        lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else [""]
        ours = lines[0] == self._head
        # The last line is empty, but where the process was killed while it wrote.
        self._appendable = ours and not lines[-1]
        for line in lines[1:-1] if ours else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not ours: done again
                entry = parse_object(line)
                self._known[entry["name"]] = {what: entry[what] for what in _ENTRY}

    def find(self, name: str, files: Signatures) -> Any:
        """What was done with an image, if its files are still those; else None."""
        entry = self._known.get(name)
        return entry["done"] if entry and files and entry["files"] == files else None

    def forget(self, name: str) -> None:
        """An image is to be done again."""
        self._known.pop(name, None)

    def add(self, name: str, files: Signatures, done: Any) -> None:
        """Keeps what was done with an image, as plain values.

        Raises:
            OSError: it cannot be written.
        """
        self._known[name] = dict(zip(_ENTRY, (name, files, done), strict=True))
        if self._appendable:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._known[name]) + "\n")
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [self._head, *map(json.dumps, self._known.values()), ""]
        write_atomically(self._path, "\n".join(lines))
        self._appendable = True


def signatures(files: Sequence[Path]) -> Signatures:
    """What changes when an image's files do; []: one is not there."""
    try:
        return [[str(file.resolve()), *file_signature(file)] for file in files]
    except OSError:
        return []
