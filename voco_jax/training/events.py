"""WORKDIR/events.jsonl: when a run started, stopped and ended, and what was found amiss in it.

Each line has "time" (ISO 8601, UTC), "step" (completed updates), "event" and, with

- started, resumed, finished: nothing more;
- stopped, failed: "reason";
- finding: "kind", "text" and "advice" of a `Finding`, and "source", who found it;
- resolved: "kind" and "source": what was found before is no longer so.

Lines are added and never taken away, also where a run resumes from before them.
"""

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from voco_jax.files import parse_object
from voco_jax.training.health import Finding
from voco_jax.training.metrics import written

EVENTS = "events.jsonl"
AGAIN = 3600.0  # seconds after which a finding is written and told again, if it still holds


class Events:
    """The events of one process's run; only that of process 0 has a file.

    Attributes:
        step: completed updates, for the next event.
    """

    def __init__(
        self, workdir: Path | None, step: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        """Reads which findings an earlier run left open.

        Args:
            workdir: of the run; None: write nothing.
            step: see above.
            clock: seconds since 1970.

        Raises:
            InputError: on this and on any other call, the file cannot be read or written.
        """
        self.step, self._clock = step, clock
        self._path = None if workdir is None else workdir / EVENTS
        self._open: dict[str, str] = {}  # kind -> source
        self._written: dict[str, float] = {}  # kind -> when it was written last
        self._told: dict[str, float] = {}  # kind -> when this console was told last
        self._silent: set[str] = set()  # open kinds that came back without a word on it
        if self._path is None or not self._path.exists():
            return
        with written(self._path):
            lines = self._path.read_text("utf-8", "replace").splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # a kill cut it off
                self._append("\n")
        for line in lines:
            self._remember(line)

    def _remember(self, line: str) -> None:
        try:
            row = parse_object(line)
            kind, source, event = row["kind"], row["source"], row["event"]
            when = datetime.datetime.fromisoformat(row["time"]).timestamp()
        except (ValueError, KeyError, TypeError):  # cut off, somebody else's, or no finding
            return
        if event == "finding":
            self._open[kind], self._written[kind] = source, when
        else:
            self._open.pop(kind, None)

    def write(self, event: str, **details: str) -> None:
        """Adds a line."""
        if self._path is None:
            return
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        row = {"time": now.isoformat(timespec="seconds"), "step": self.step, "event": event}
        with written(self._path):
            self._append(json.dumps(row | details) + "\n")

    @property
    def open(self) -> frozenset[str]:
        """The kinds of findings that still hold."""
        return frozenset(self._open)

    def _append(self, text: str) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def found(self, source: str, findings: Sequence[Finding]) -> list[str]:
        """Takes all that a source finds now; what it found before and does not now is resolved.

        A finding is written when it is new or comes back, and once in `AGAIN` while it holds; one
        that comes and goes is told only once in `AGAIN`.

        Args:
            source: "start", "training" or "validation"; a kind that another has open is left to it.
            findings: at most one of each kind.

        Returns:
            Lines for people: of findings that this process has not told for `AGAIN`, and of the
            resolved ones, unless their return was not told. None on processes without a file.
        """
        if self._path is None:
            return []
        lines = []
        now = self._clock()
        mine = [one for one in findings if self._open.get(one.kind, source) == source]
        for one in mine:
            new = one.kind not in self._open
            if new or now - self._written[one.kind] >= AGAIN:
                self.write("finding", **dataclasses.asdict(one), source=source)
                self._open[one.kind], self._written[one.kind] = source, now
            if now - self._told.get(one.kind, -math.inf) >= AGAIN:
                lines.append(str(one))
                self._told[one.kind] = now
                self._silent.discard(one.kind)
            elif new:
                self._silent.add(one.kind)
        gone = {kind for kind, by in self._open.items() if by == source} - {m.kind for m in mine}
        for kind in sorted(gone):
            self.write("resolved", kind=kind, source=source)
            del self._open[kind]
            if kind in self._silent:
                self._silent.remove(kind)
            else:
                lines.append(f"no longer {kind}")
        return lines
