"""Does pre-training help? Fine-tunes from several starts with few and many labels, and compares.

    python -m comparisons.does_it_help --output runs/does_it_help \\
        --weights runs/hippocampus_voco/voco_encoder.safetensors

From scratch, from the weights, and from the same weights shuffled (each array's values in a random
order), with shares of the training volumes, several seeds, one budget: the fine-tuning config's.
Every run is one of main.py in a folder of its own below --output; the same command again goes on
where it was. When all are done it writes table.md, results.json and curves.png there.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from voco_jax.benchmark.measure import machine, table, write_json
from voco_jax.config.load import command_parser, load, parse_arguments, positive
from voco_jax.errors import InputError

ROOT = Path(__file__).parents[1]
STARTS = {"scratch": "scratch", "pre-trained": "none", "shuffled": "shuffled"}
"""Rows of the table, and `init.twin` of their runs."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    start: str  # of STARTS
    share: float  # of the training volumes
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.start}-{self.share:g}-{self.seed}"


def score(workdir: Path, metric: str) -> float | None:
    """The last validation's score; None: the run is not done."""
    log = workdir / "metrics.jsonl"
    settings = workdir / "config.json"
    if not (log.is_file() and settings.is_file()):
        return None
    last = int(json.loads(settings.read_text("utf-8"))["total_steps"])
    rows = (json.loads(line) for line in log.read_text("utf-8").splitlines() if line.endswith("}"))
    found = [row[metric] for row in rows if row.get("step") == last and metric in row]
    return float(found[-1]) if found else None


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its two-sided t interval over the seeds; NaN ends of a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    return mean, mean - float(half), mean + float(half)


def summarise(scores: dict[Run, float]) -> list[dict[str, Any]]:
    """A row for each start and share."""
    rows = []
    for start, share in itertools.product(STARTS, sorted({run.share for run in scores})):
        values = [
            value for run, value in scores.items() if (run.start, run.share) == (start, share)
        ]
        mean, low, high = interval(values)
        rows.append(
            {
                "start": start,
                "share": share,
                "mean": mean,
                "interval": [low, high],
                "scores": values,
            }
        )
    return rows


def draw(rows: Sequence[dict[str, Any]], metric: str) -> Any:
    """The curves of all starts over the share of labels, with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for number, (start, colour) in enumerate(
        zip(STARTS, ("#7a7a7a", "#0072b2", "#d55e00"), strict=True)
    ):
        own = [row for row in rows if row["start"] == start]
        shares = np.array([row["share"] for row in own]) * (1 + 0.03 * (number - 1))
        means = np.array([row["mean"] for row in own])
        ends = np.abs(np.array([row["interval"] for row in own]).T - means)
        axis.errorbar(shares, means, ends, color=colour, marker="o", capsize=4, label=start)
        for share, row in zip(shares, own, strict=True):
            axis.plot([share] * len(row["scores"]), row["scores"], ".", color=colour, alpha=0.4)
    axis.set_xscale("log")
    ticks = sorted({row["share"] for row in rows})
    axis.set_xticks(ticks, [f"{share:.0%}" for share in ticks])
    axis.minorticks_off()
    axis.set(xlabel="labelled training volumes", ylabel=metric.removeprefix("validation/"))
    axis.grid(alpha=0.3)
    axis.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m comparisons.does_it_help",
        __doc__,
        """
--output runs/does_it_help --weights voco.safetensors
--output runs/quick --weights voco.safetensors --shares 0.05,1 --seeds 2 --config.total_steps=100
""",
    )
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder of all runs and of the results")
    add("--weights", required=True, metavar="FILE", help="pre-trained")
    add("--config", default="configs/finetune_hippocampus.py", metavar="PY", help="%(default)s")
    add("--shares", default="0.05,0.2,1", help="of the training volumes; default %(default)s")
    add("--seeds", type=positive, default=5, help="runs of each; default %(default)s")
    add("--metric", default="validation/dice", help="of metrics.jsonl; default %(default)s")
    try:
        options, overrides = parse_arguments(parser, arguments)
        scores = run_all(options, overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    output, rows = Path(options.output), summarise(scores)
    text = table(
        ("start", "labels", "mean", "95 % interval over seeds", "seeds"),
        [
            (
                row["start"],
                f"{row['share']:.0%}",
                f"{row['mean']:.4f}",
                "{:.4f} to {:.4f}".format(*row["interval"]),
                ", ".join(f"{value:.4f}" for value in row["scores"]),
            )
            for row in rows
        ],
    )
    (output / "table.md").write_text(text + "\n", "utf-8")
    write_json(output / "results.json", {"machine": machine(), **vars(options), "rows": rows})
    from voco_jax.training.metrics import save_picture

    save_picture(draw(rows, options.metric), output / "curves.png")
    print(f"{text}\n{output / 'curves.png'}")
    return 0


def run_all(options: argparse.Namespace, overrides: dict[str, str]) -> dict[Run, float]:
    """Every run that is not done yet, one after the other.

    Raises:
        InputError: no such weights, shares that are none, or a run that failed.
    """
    weights = Path(options.weights).resolve()
    if not weights.is_file():
        raise InputError(f"--weights: {weights}: no such file, expected pre-trained weights")
    try:
        shares = [float(share) for share in options.shares.split(",")]
    except ValueError as error:
        raise InputError(f"--shares: found {options.shares!r}, expected as 0.05,0.2,1") from error
    sources = load(options.config, overrides).data.sources
    folder = Path(options.output).resolve()
    caches = {f"data.sources.{name}.cache": folder / f"cache_{name}" for name in sources}
    runs = [
        Run(start, share, seed)
        for seed, share, start in itertools.product(range(options.seeds), shares, STARTS)
    ]
    scores = {}
    for number, run in enumerate(runs, 1):
        workdir = folder / run.name
        found = score(workdir, options.metric)
        if found is None:
            print(f"[{number}/{len(runs)}] {run.name} ...", flush=True)
            settings = {
                **caches,
                **overrides,
                "seed": run.seed,
                "data.labelled_fraction": run.share,
                "init_from": weights,
                "init.twin": STARTS[run.start],
                "export_to": "",
            }
            command = [sys.executable, "main.py", "--config", options.config, "--workdir", workdir]
            flags = [f"--config.{name}={value}" for name, value in settings.items()]
            done = subprocess.run([*map(str, command), *flags], cwd=ROOT, check=False)
            found = score(workdir, options.metric)
            if done.returncode or found is None:
                raise InputError(
                    f"{workdir}: this run ended with status {done.returncode}; its log is above "
                    "and in its folder; the same command goes on"
                )
        print(f"[{number}/{len(runs)}] {run.name}: {found:.4f}", flush=True)
        scores[run] = found
    return scores


if __name__ == "__main__":
    sys.exit(main())
