"""Reads what a run has left in its workdir, for the report; a run may be writing it meanwhile."""

import csv
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from voco_jax.errors import InputError
from voco_jax.files import parse_object, printable
from voco_jax.report.series import Series, read_metrics

SIGN_OF_LIFE = 90.0  # seconds; a run renews its lock far more often
RATES = 20  # newest lines that the time left is estimated from
LOG_LINES, LOG_BYTES = 30, 16_384  # of the end of the log

Found = TypeVar("Found")


@dataclass
class Run:
    """A workdir as it was when it was read."""

    path: Path
    name: str
    config: dict[str, Any]
    metrics: dict[str, Series]
    written: float | None  # when metrics.jsonl was last written to, seconds since 1970
    lock: float | None  # when the run that holds it last renewed it; None: nobody does
    now: float
    events: list[dict[str, Any]] = field(default_factory=list)
    volumes: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # source, part -> ids
    environment: dict[str, Any] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)  # of the newest validation
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)  # by file
    evaluations: dict[str, "Evaluation"] = field(default_factory=dict)  # by folder
    pictures: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)  # by name: step, file
    log: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def step(self) -> int:
        """The newest step that something is known of."""
        return max((int(steps[-1]) for steps, _ in self.metrics.values() if len(steps)), default=0)

    @property
    def total(self) -> int:
        """Steps that the run shall have in the end; 0: not known."""
        found = self._setting("total_steps")
        return found if isinstance(found, int) else 0

    @property
    def state(self) -> str:
        """In a word: running, finished, failed, stopped, or lost (killed)."""
        if self.lock is not None:
            return "running" if self.now - self.lock < SIGN_OF_LIFE else "lost"
        starts_and_ends = [event["event"] for event in self.starts_and_ends]
        if starts_and_ends and starts_and_ends[-1] == "failed":  # perhaps at the export
            return "failed"
        return "finished" if self.total and self.step >= self.total else "stopped"

    @property
    def seconds_left(self) -> float | None:
        """By the speed of the last lines; None: not known, or not running."""
        _, rates = self.metrics.get("volumes_per_second", (None, np.zeros(0)))
        rates = rates[-RATES:][rates[-RATES:] > 0]
        size = self._setting("batch_size")
        if (
            self.state != "running"
            or self.step >= self.total
            or not len(rates)
            or not isinstance(size, int)
        ):
            return None
        return (self.total - self.step) * size / float(np.median(rates))

    @property
    def starts_and_ends(self) -> list[dict[str, Any]]:
        """The events that are no findings."""
        return [event for event in self.events if event["event"] not in ("finding", "resolved")]

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Of each kind the newest, with the `first` step of it, and `resolved`, None: it holds.

        Those that hold come first, the newest of each first.
        """
        by_kind: dict[str, dict[str, Any]] = {}
        for event in self.events:
            kind = str(event.get("kind", ""))
            before = by_kind.get(kind)
            if event["event"] == "finding":
                holds = before is not None and before["resolved"] is None
                first = before["first"] if before and holds else event["step"]
                by_kind.pop(kind, None)
                words = {name: str(event.get(name, "")) for name in ("kind", "text", "advice")}
                by_kind[kind] = {"step": event["step"], "first": first, "resolved": None, **words}
            elif event["event"] == "resolved" and before:
                before["resolved"] = event["step"]
        newest = list(by_kind.values())[::-1]
        return sorted(newest, key=lambda finding: finding["resolved"] is not None)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of a fine-tuning, the background left out; []: there are none."""
        for source in self.sources.values():
            chain = source.get("chain")
            pairs = chain.get("classes") if isinstance(chain, dict) else None
            if not isinstance(pairs, list):
                continue
            names = [str(pair[0]) for pair in pairs if isinstance(pair, list) and pair]
            return names[1:] if self.config.get("task") == "segmentation" else names
        return []

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """The settings of each data source."""
        data = self.config.get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        if not isinstance(sources, dict):
            return {}
        return {name: source for name, source in sources.items() if isinstance(source, dict)}

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        _, values = self.metrics.get(name, (None, np.zeros(0)))
        return float(values[-1]) if len(values) else None

    def _setting(self, name: str) -> Any:
        run = self.config.get("run")
        return (run if isinstance(run, dict) else self.config).get(name)


@dataclass(frozen=True)
class Evaluation:
    """What `voco_jax.evaluation.evaluate` has written into a folder."""

    summary: dict[str, Any]
    cases: list[dict[str, str]]  # rows of cases.csv
    picture: Path | None  # of the worst cases


def read_run(workdir: Path, now: float | None = None) -> Run:
    """Reads a workdir; what is missing is left out, what is damaged is noted.

    Args:
        workdir: of a run, which may be at work in it.
        now: seconds since 1970; None: by the clock.

    Raises:
        InputError: it is no run's workdir, or its config.json or metrics.jsonl are damaged.
    """
    if not workdir.is_dir():
        raise InputError(f"{workdir}: no such folder, expected the workdir of a run (--workdir)")
    config, metrics = workdir / "config.json", workdir / "metrics.jsonl"
    if not config.is_file():
        raise InputError(
            f"{workdir}: found no config.json, expected the workdir of a run, as main.py's "
            "--workdir names it"
        )
    try:
        settings = parse_object(config.read_bytes())
        numbers = read_metrics(metrics) if metrics.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{workdir}: cannot be read ({error}), expected config.json and metrics.jsonl as "
            "main.py writes them; is it another folder, or damaged?"
        ) from error
    run = Run(
        path=workdir,
        name=printable(workdir.resolve().name),
        config=settings,
        metrics=numbers,
        written=metrics.stat().st_mtime if numbers else None,
        lock=_held_since(workdir / "run.lock"),
        now=time.time() if now is None else now,
    )
    run.events = _try(run, workdir / "events.jsonl", _read_events) or []
    run.volumes = _try(run, workdir / "volumes.json", _read_volumes) or {}
    run.environment = _try(run, workdir / "environment.json", _read_object) or {}
    run.cases = _try(run, workdir / "cases.json", _read_cases) or []
    run.log = _try(run, workdir / "logs" / "process_0.log", _end_of_log) or []
    for suffix in (".safetensors", ".pt"):
        for file in sorted(workdir.glob(f"*{suffix}.json")):
            if card := _try(run, file, _read_object):
                run.cards[file.name.removesuffix(".json")] = card
    for file in sorted({*workdir.glob("*/summary.json"), *workdir.glob("*/*/summary.json")}):
        if found := _try(run, file, _read_evaluation):
            run.evaluations[str(file.parent.relative_to(workdir))] = found
    for file in sorted((workdir / "pictures").glob("*.png")):
        if parts := re.fullmatch(r"(.+)_(\d{7,})\.png", file.name):
            run.pictures.setdefault(parts[1], []).append((int(parts[2]), file))
    return run


def age(seconds: float) -> str:
    """A time span in words."""
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size or (name == "minute" and seconds >= 60):
            count = int(seconds // size)
            return f"{count} {name}{'s' * (count != 1)}"
    return f"{max(int(seconds), 0)} seconds"


def utc(seconds: float) -> str:
    """A time, as 2026-01-31 12:00 UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _try(run: Run, path: Path, read: Callable[[Path], Found]) -> Found | None:
    """What a file says; None: it is not there, or damaged, which is noted."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        name = path.relative_to(run.path)
        run.notes.append(f"{name}: cannot be read: {printable(str(error))[:200]}")
        return None


def _held_since(path: Path) -> float | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime if status.st_size else None


def _read_object(path: Path) -> dict[str, Any]:
    return parse_object(path.read_bytes())


def _read_events(path: Path) -> list[dict[str, Any]]:
    events = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            event = parse_object(line)
        except ValueError:  # being written, or cut off
            continue
        if isinstance(event.get("event"), str) and type(event.get("step")) is int:
            events.append(event)
    return events


def _read_volumes(path: Path) -> dict[str, dict[str, list[str]]]:
    return {
        source: {part: list(map(str, ids)) for part, ids in parts.items()}
        for source, parts in _read_object(path).items()
    }


def _read_cases(path: Path) -> list[dict[str, Any]]:
    return [{**case, "id": str(case["id"])} for case in _read_object(path)["cases"]]


def _read_evaluation(path: Path) -> Evaluation | None:
    summary = _read_object(path)
    if not isinstance(summary.get("classes"), Mapping) or "how" not in summary:
        return None  # of another program
    table, picture = path.with_name("cases.csv"), path.with_name("worst.png")
    rows: list[dict[str, str]] = []
    if table.exists():
        with table.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
    return Evaluation(summary, rows, picture if picture.exists() else None)


def _end_of_log(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
