"""One HTML file about a run, or about several side by side; it loads nothing and sends nothing.

    python -m voco_jax.report WORKDIR [WORKDIR ...]

State and health, settings and how they differ, the volumes, curves, pictures over training, the map
of embeddings, tables of a fine-tuning, the environment and the cards of exported weights: what
there is of it. A run may be at work meanwhile. Every run writes WORKDIR/report.html at its end.
"""

import base64
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import voco_jax
from voco_jax.config.load import EXPERIMENTS, command_parser, leaves, may_change
from voco_jax.errors import InputError
from voco_jax.files import expand, printable, write_atomically
from voco_jax.report.charts import MARKED, VALIDATION, label, make_charts
from voco_jax.report.embedding_map import FILE as EMBEDDINGS
from voco_jax.report.embedding_map import EmbeddingMap, read_map
from voco_jax.report.images import BUDGET, LARGEST, Inline, inline, spread
from voco_jax.report.results import confusion, segmentations, view
from voco_jax.report.run import Run, age, finite, read_run, utc
from voco_jax.report.svg import MOST_RUNS, swatch
from voco_jax.report.volumes import SourceSummary, plain, summarise_source

REPORT = "report.html"
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


class Page:
    """What the template is given of one run.

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
            except (KeyError, TypeError, AttributeError) as error:
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
            self.sources.append(summarise_source(name, settings, parts, count))
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
            for event in self.run.events
            if event["event"] not in ("finding", "resolved")
        ][-50:]

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


def render(workdirs: Sequence[Path], now: float | None = None) -> str:
    """The page about some runs.

    Args:
        workdirs: of each; of several the first is the one that others are compared with.
        now: seconds since 1970; None: by the clock.

    Returns:
        HTML.

    Raises:
        InputError: a folder that is no workdir, or damaged; too many of them.
    """
    if len(workdirs) > MOST_RUNS:
        raise InputError(
            f"found {len(workdirs)} workdirs, expected at most {MOST_RUNS}: curves of more cannot "
            "be told apart"
        )
    now = time.time() if now is None else now
    runs = [read_run(workdir, now) for workdir in workdirs]
    _name_apart(runs)
    seen: set[str] = set()
    pages = [Page(run, number, len(runs), seen) for number, run in enumerate(runs)]
    limit = min(LARGEST, BUDGET // max(sum(page.pictures for page in pages), 1))
    for page in pages:
        page.draw(limit)
    style, script = (_file(name) for name in ("style.css", "script.js"))
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": _short, "label": label, "data": _data}
    return environment.get_template("page.html").render(
        pages=pages,
        single=len(pages) == 1,
        charts=make_charts(runs),
        numbers=_numbers(runs),
        differences=_differences(runs),
        written=utc(now),
        version=voco_jax.__version__,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def write_report(workdirs: Sequence[Path], output: Path) -> None:
    """Writes the page about some runs.

    Raises:
        InputError: as `render`; or it cannot be written.
    """
    page = render(workdirs)
    try:
        write_atomically(output, page)
    except OSError as error:
        raise InputError(
            f"{output}: cannot write here: {error.strerror or error}; choose another --output"
        ) from error


def _name_apart(runs: Sequence[Run]) -> None:
    """Where folders are of one name, with those above them."""
    for depth in range(2, 6):
        names = [run.name for run in runs]
        twice = [run for run in runs if names.count(run.name) > 1]
        for run in twice:
            run.name = "/".join(run.path.resolve().parts[-depth:])


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
        found.append(("loss", _short(loss), ""))
    if finite(speed):
        found.append(("volumes/s", _short(speed), ""))
    return found


def _numbers(runs: Sequence[Run]) -> list[tuple[str, list[tuple[float, int] | None]]]:
    """Each metric's newest value and its step, for each run."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    ordered = sorted(names, key=lambda name: not name.startswith(VALIDATION))
    return [
        (
            name,
            [
                (float(run.metrics[name][1][-1]), int(run.metrics[name][0][-1]))
                if name in run.metrics
                else None
                for run in runs
            ],
        )
        for name in ordered
    ]


def _differences(runs: Sequence[Run]) -> dict[bool, list[tuple[str, list[str]]]]:
    """Settings that differ: False: those that the numbers hang on; True: the others."""
    settings = [leaves(run.config) for run in runs]
    found: dict[bool, list[tuple[str, list[str]]]] = {False: [], True: []}
    patterns: Sequence[str] = ()
    if (task := runs[0].config.get("task")) in EXPERIMENTS:
        patterns = EXPERIMENTS[str(task)].runtime_fields
    for name in dict.fromkeys(name for one in settings for name in one):
        texts = [plain(one[name]) if name in one else "–" for one in settings]
        if len(set(texts)) > 1:
            aside = may_change(name, patterns) and name != "total_steps"
            found[aside].append((name, texts))
    return found


def _short(value: Any) -> str:
    """A number with four digits."""
    return f"{value:.4g}" if finite(value) else "–" if value is None else str(value)


def _data(value: float | None, form: str = "") -> Markup:
    """A number to read, and in full for programs."""
    if value is None:
        return Markup("–")
    shown = format(value, form) if form else _short(value)
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


def _file(name: str) -> str:
    """Of the templates."""
    return resources.files("voco_jax.report").joinpath("templates", name).read_text("utf-8")


def _hash(text: str) -> str:
    """Of an inline style or script, as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status: 0, or 2 for bad input."""
    parser = command_parser(
        "-m voco_jax.report",
        __doc__,
        """
runs/demo
runs/voco_a runs/voco_b --output comparison.html
""",
    )
    add = parser.add_argument
    add("workdirs", nargs="+", metavar="WORKDIR", help="of a run; several are compared")
    add("--output", metavar="HTML", help=f"default: {REPORT} in the first WORKDIR")
    try:
        options = parser.parse_args(arguments)
        workdirs = [expand(workdir) for workdir in options.workdirs]
        output = expand(options.output) if options.output else workdirs[0] / REPORT
        write_report(workdirs, output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0
