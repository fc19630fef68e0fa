"""Which curves the report shows, and how they are to be read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from voco_jax.report.run import Run
from voco_jax.report.svg import Curve, Mark, Unit, plot, swatch

LINES = 6  # in a plot of a single run
OTHERS = 12  # plots of metrics that are not known here
VALIDATION = "validation/"
_WORDS = {"dice": "Dice", "nsd": "NSD", "hd95": "HD95", "auc": "AUC"}
_TERMS = "Terms of the loss"
MARKED = ("resumed", "stopped", "failed")  # events


@dataclass(frozen=True)
class Plan:
    """A plot that is drawn where there is something to show."""

    title: str
    names: tuple[str, ...]  # of metrics
    about: str
    unit: Unit = ""
    logarithmic: bool = False
    chance: str = ""  # metric of the level to mark


@dataclass(frozen=True)
class Chart:
    """A plot with its words."""

    title: str
    about: str
    svg: Markup
    legend: list[tuple[Markup, str]]  # swatch, label


_KNOWN = (
    Plan(
        "Position accuracy",
        ("validation/position_accuracy",),
        "Held-out sub-volumes whose most similar base crop is the one that they overlap most.",
        unit="percent",
        chance="validation/chance",
    ),
    Plan(
        "Dice",
        ("validation/dice", "validation/dice_resampled"),
        "Held-out volumes, mean of the classes: on the files' own grids, and on the resampled grid "
        "as most published figures are.",
        unit="share",
    ),
    Plan(
        "AUC",
        ("validation/auc",),
        "Held-out volumes, one class against the rest; the band is the 95 % interval.",
        unit="share",
    ),
    Plan(
        "Accuracy",
        ("validation/accuracy",),
        "Held-out volumes that are put into their class; the band is the 95 % interval.",
        unit="percent",
    ),
    Plan("Loss", ("loss",), "What is minimised, of single batches, so it jumps about."),
    Plan(
        "Cross-entropy, held out",
        ("validation/cross_entropy",),
        "Rising while the loss falls: the network learns the training volumes by heart.",
    ),
    Plan(
        "Error of the overlaps",
        ("validation/overlap_error",),
        "Mean distance of predicted similarities from true overlaps, on held-out volumes.",
    ),
    Plan(
        "Spread",
        ("validation/embedding_spread", "validation/similarity_spread"),
        "How much embeddings differ between crops, and similarities between base crops. Near 0: "
        "collapsed.",
    ),
    Plan("Learning rate", ("learning_rate",), "Warm-up, then cosine decay to 0."),
    Plan(
        "Gradient norm",
        ("gradient_norm",),
        "Rising steadily, or in peaks: the learning rate may be too high.",
        logarithmic=True,
    ),
    Plan("Speed", ("volumes_per_second",), "Volumes a second, over all devices."),
    Plan(
        "Seconds a step",
        ("step_seconds_median", "step_seconds_longest"),
        "Median and longest since the line before. Far apart: something stalls now and then.",
    ),
    Plan(
        "Waiting for input",
        ("input_wait_fraction",),
        "Share of the time in which the devices had no batch: at most. Above 10 %: more workers, "
        "or a faster disk.",
        unit="percent",
    ),
)


def make_charts(runs: Sequence[Run]) -> list[Chart]:
    """All plots of one run, or of several in one plot each."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    classes = list(dict.fromkeys(name for run in runs for name in run.classes))
    charts = []
    for plan in _plans(names, classes):
        parts = [plan]
        if len(runs) > 1:
            parts = [replace(plan, title=_title(plan, name), names=(name,)) for name in plan.names]
        charts += [chart for part in parts if (chart := _chart(part, runs))]
    return charts


def label(name: str) -> str:
    """A metric's name as people read it."""
    words = name.removeprefix(VALIDATION).split("_")
    return " ".join(_WORDS.get(word, word) for word in words)


def _title(plan: Plan, name: str) -> str:
    """Of a plot of one of a plan's metrics."""
    if len(plan.names) == 1:
        return plan.title
    text = label(name)
    return f"{plan.title}: {text}" if plan.title == _TERMS else text[:1].upper() + text[1:]


def _plans(names: Sequence[str], classes: Sequence[str]) -> list[Plan]:
    """The known plots, the terms of the loss, those of each class, then whatever is left."""
    plans = list(_KNOWN)
    used = {name for plan in plans for name in (*plan.names, plan.chance)}
    used |= {f"{VALIDATION}{kind}_{end}" for kind in ("auc", "accuracy") for end in ("low", "high")}
    by_class = tuple(
        name
        for kind in ("dice", "auc")
        for one in classes
        if (name := f"{VALIDATION}{kind}_{one}") in names
    )
    terms = tuple(n for n in names if n not in used and not n.startswith(VALIDATION))
    if len(terms) > 1:
        place = 1 + next(i for i, plan in enumerate(plans) if plan.title == "Loss")
        plans.insert(place, Plan(_TERMS, terms, "What the loss is the sum of."))
    if by_class:
        place = next(i for i, plan in enumerate(plans) if plan.title == "Loss")
        about = (
            "Dice of held-out volumes on the files' own grids, or AUC against all other classes."
        )
        plans.insert(place, Plan("Each class", by_class, about, unit="share"))
    used |= {name for plan in plans for name in plan.names}
    left = [name for name in names if name not in used][:OTHERS]
    return plans + [Plan(_title(Plan("", (), ""), name), (name,), "") for name in left]


def _chart(plan: Plan, runs: Sequence[Run]) -> Chart | None:
    """None: nothing to show."""
    single = len(runs) == 1
    curves, marks, about = [], [], plan.about
    for number, run in enumerate(runs):
        names = [name for name in plan.names if _any_finite(run, name)]
        if len(names) > LINES:
            names = sorted(names, key=lambda name: run.last(name) or 0.0)[:LINES]
            about += f" The lowest {LINES} of {len(plan.names)}; the table has all."
        curves += [
            Curve(
                label(name) if single else run.name,
                run.metrics[name],
                place if single else number,
                _band(run, name),
            )
            for place, name in enumerate(names)
        ]
        marks += [
            Mark(event["step"], event["event"], None if single else number)
            for event in run.events
            if names and event["event"] in MARKED
        ]
    if not curves:
        return None
    chances = [value for run in runs if (value := run.last(plan.chance)) is not None]
    svg = plot(
        curves,
        plan.title,
        steps=max(max(run.total, run.step) for run in runs),
        logarithmic=plan.logarithmic and _spans_decades(curves),
        unit=plan.unit,
        chance=float(np.mean(chances)) if chances and np.ptp(chances) < 0.02 else None,
        marks=marks[-200:],
    )
    legend = [(swatch(curve.number), curve.label) for curve in curves]
    return Chart(plan.title, about, svg, legend if len(curves) > 1 or not single else [])


def _any_finite(run: Run, name: str) -> bool:
    return name in run.metrics and bool(np.isfinite(run.metrics[name][1]).any())


def _spans_decades(curves: Sequence[Curve]) -> bool:
    """Whether a logarithmic axis would show more."""
    values = np.concatenate([curve.series[1] for curve in curves])
    values = values[np.isfinite(values) & (values > 0)]
    return len(values) > 0 and values.max() > 20 * values.min()


def _band(run: Run, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The interval around a metric, where it is known at all of its steps."""
    ends = [run.metrics.get(f"{name}_{end}") for end in ("low", "high")]
    steps = run.metrics[name][0]
    known = [one[1] for one in ends if one is not None and np.array_equal(one[0], steps)]
    return (known[0], known[1]) if len(known) == 2 else None
