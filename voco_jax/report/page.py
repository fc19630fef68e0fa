"""One HTML file about a run, or about several side by side; it loads nothing and sends nothing.

    python -m voco_jax.report WORKDIR [WORKDIR ...]

State and health, settings and how they differ, the volumes, curves, pictures over training, the map
of embeddings, tables of a fine-tuning, the environment and the cards of exported weights: what
there is of it. A run may be at work meanwhile. Every run writes WORKDIR/report.html at its end.
"""

import base64
import functools
import hashlib
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

import voco_jax
from voco_jax.config.load import EXPERIMENTS, command_parser, leaves, may_change
from voco_jax.errors import InputError
from voco_jax.files import expand, write_atomically
from voco_jax.report.charts import VALIDATION, label, make_charts
from voco_jax.report.images import BUDGET, LARGEST
from voco_jax.report.run import Run, read_run, utc
from voco_jax.report.svg import MOST_RUNS
from voco_jax.report.view import RunView, short
from voco_jax.report.volumes import plain

REPORT = "report.html"
# May change when a run resumes, but make another run of it: its length and its data.
_TOLD = ("total_steps", "data.phantoms", "data.sources.*.lists", "data.sources.*.roots")


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
    pages = [RunView(run, number, len(runs), seen) for number, run in enumerate(runs)]
    limit = min(LARGEST, BUDGET // max(sum(page.pictures for page in pages), 1))
    for page in pages:
        page.draw(limit)
    style, script = (_file(name) for name in ("style.css", "script.js"))
    html = (
        _environment()
        .get_template("page.html")
        .render(
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
    )
    # Python carries bytes of names that are no UTF-8 as what cannot be written.
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


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
            aside = may_change(name, patterns) and not may_change(name, _TOLD)
            found[aside].append((name, texts))
    return found


def _data(value: float | None, form: str = "") -> Markup:
    """A number to read, and in full for programs."""
    if value is None:
        return Markup("–")
    shown = format(value, form) if form else short(value)
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": short, "label": label, "data": _data}
    return environment


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
