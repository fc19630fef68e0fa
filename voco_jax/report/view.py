"""What the template is given of one run: all that it shows, worked out and bounded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voco_jax.config.load import leaves
from voco_jax.files import printable
from voco_jax.report.charts import MARKED, VALIDATION
from voco_jax.report.embedding_map import FILE as EMBEDDINGS
from voco_jax.report.embedding_map import EmbeddingMap, read_map
from voco_jax.report.images import Inline, inline, spread
from voco_jax.report.results import confusion, segmentations, view
from voco_jax.report.run import Run, age, utc
from voco_jax.report.series import finite
from voco_jax.report.svg import swatch
from voco_jax.report.volumes import SourceSummary, plain, summarise_source

FRAMES, SERIES = 8, 4  # pictures of one kind over training; kinds of a run
THUMBNAILS = 12
_SCORES = {  # what a run is judged by -> its name, and how it is written
    "position_accuracy": ("position accuracy", "{:.1%}"),
    "dice": ("Dice", "{:.3f}"),
    "auc": ("AUC", "{:.3f}"),
}
_ADVICE = {
    "stopped": "The same command goes on from the newest checkpoint.",
    "lost": "No sign of life since then: killed, or its machine is away. The same command goes on "
    "from the newest checkpoint.",
    "failed": "See the end of the log, under Environment.",
}


@dataclass(frozen=True)
class Frame:
    """A picture of a step."""

    step: int
    picture: Inline


@dataclass(frozen=True)
class Frames:
    """Pictures of one kind, over training."""

    kind: str
    frames: list[Frame]
    total: int  # that there are


class RunView:
    """One run.

    Args:
        run: as it was read.
        number: its place among the runs.
        runs: how many there are.
        seen: caches that a run before has shown; gains this run's.
    """

    def __init__(self, run: Run, number: int, runs: int, seen: set[str]) -> None:
        self.run, self.number, self.swatch = run, number, swatch(number)
        self.written = "" if run.written is None else utc(run.written)
        left = run.seconds_left
        self.left = "" if left is None else age(left)
        self.quiet = "" if run.written is None else age(run.now - run.written)
        self.scores = _scores(run)
        self.segmentations, self.confusion = segmentations(run), confusion(run)
        self.evaluations = []
        for folder, found in run.evaluations.items():
            try:
                self.evaluations.append(view(folder, found))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                run.notes.append(f"{folder}/summary.json: cannot be read: {error!r}")
        self.map = self._map()
        most = max(2, FRAMES // runs)
        self.chosen = {
            name: spread(files, most) for name, files in list(run.pictures.items())[:SERIES]
        }
        self.frames: list[Frames] = []
        self.worst: dict[str, Inline] = {}  # of evaluations, by folder
        self.sources: list[SourceSummary] = []
        for name, settings in run.sources.items():
            shown = 0 if (cache := str(settings.get("cache"))) in seen else THUMBNAILS
            seen.add(cache)
            count = min(shown, max(3, THUMBNAILS // (runs * len(run.sources))))
            parts = run.volumes.get(name, {})
            source = summarise_source(name, settings, parts, count, run.path)
            self.sources.append(source)
        self.settings = {name: plain(value) for name, value in leaves(run.config).items()}
        self.cards = {name: json.dumps(card, indent=1) for name, card in run.cards.items()}

    @property
    def path(self) -> str:
        """Of the workdir."""
        return printable(self.run.path.resolve())

    @property
    def is_running(self) -> bool:
        """Whether the report will soon be old."""
        return self.run.state == "running"

    @property
    def state_words(self) -> str:
        """The state, with what is known of a failure."""
        return {"lost": "killed?", "stopped": "not running"}.get(self.run.state, self.run.state)

    @property
    def state_advice(self) -> str:
        """What to do about it."""
        if self.is_running and 0 < self.run.total <= self.run.step:
            return "Its last step is done: it validates, saves or exports."
        return _ADVICE.get(self.run.state, "")

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """Starts and stops, the newest last."""
        return [
            {
                "time": re.sub(r"T(\d\d:\d\d:\d\d).*", r" \1", str(event.get("time", ""))),
                **{name: event.get(name, "") for name in ("step", "event", "reason")},
            }
            for event in self.run.starts_and_ends[-50:]
        ]

    @property
    def watched(self) -> bool:
        """Whether the run looks for what is odd."""
        return bool(self.run.events) and self.run.step > 0

    @property
    def marked(self) -> bool:
        """Whether curves have marks."""
        return any(event["event"] in MARKED for event in self.run.events)

    @property
    def has_results(self) -> bool:
        """Whether there is anything of a fine-tuning."""
        return bool(self.segmentations or self.confusion or self.evaluations) or bool(
            self.of("segmentations", "confusion")
        )

    @property
    def has_positions(self) -> bool:
        """Whether there are pictures of positions."""
        return bool(self.of("positions"))

    @property
    def has_others(self) -> bool:
        """Whether there are pictures of another kind."""
        return bool(self.of())

    @property
    def pictures(self) -> int:
        """How many `draw` will take."""
        evaluated = sum(found.picture is not None for found in self.run.evaluations.values())
        return sum(map(len, self.chosen.values())) + evaluated

    def draw(self, limit: int) -> None:
        """Reads the pictures.

        Args:
            limit: bytes of each.
        """
        for name, files in self.chosen.items():
            frames = [
                Frame(step, picture) for step, file in files if (picture := self._read(file, limit))
            ]
            if frames:
                self.frames.append(Frames(name, frames, len(self.run.pictures[name])))
        for folder, found in self.run.evaluations.items():
            if found.picture and (picture := self._read(found.picture, limit)):
                self.worst[folder] = picture

    def of(self, *kinds: str) -> list[Frames]:
        """The pictures of these kinds; of none: all others."""
        special = ("positions", "segmentations", "confusion")
        return [f for f in self.frames if (f.kind in kinds if kinds else f.kind not in special)]

    def _map(self) -> EmbeddingMap | None:
        try:
            return read_map(self.run.path / EMBEDDINGS)
        except FileNotFoundError:
            return None
        except Exception as error:  # zipfile's and NumPy's are many
            self.run.notes.append(f"{EMBEDDINGS}: cannot be read: {error}")
            return None

    def _read(self, file: Path, limit: int) -> Inline | None:
        try:
            return inline(file, limit)
        except (OSError, ValueError) as error:  # being written, or damaged
            self.run.notes.append(f"{file.relative_to(self.run.path)}: cannot be read: {error}")
            return None


def _scores(run: Run) -> list[tuple[str, str, str]]:
    """Name, number and remark of what a run is judged by."""
    found = []
    for name, (title, form) in _SCORES.items():
        value = run.last(f"{VALIDATION}{name}")
        if not finite(value):
            continue
        remark = ""
        chance = run.last(f"{VALIDATION}chance")
        if name == "position_accuracy" and value is not None and chance:
            remark = f"{value / chance:.1f} times chance"
        found.append((title, form.format(value), remark))
    loss, speed = run.last("loss"), run.last("volumes_per_second")
    if finite(loss):
        found.append(("loss", short(loss), ""))
    if finite(speed):
        found.append(("volumes/s", short(speed), ""))
    return found


def short(value: Any) -> str:
    """A number with four digits."""
    return f"{value:.4g}" if finite(value) else "–" if value is None else str(value)
