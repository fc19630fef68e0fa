"""Curves and maps as SVG, for the report: text, no library in the page.

Colours are classes (c0, c1, ...) of the page's style sheet, which knows light and dark.
"""

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

from voco_jax.report.series import Series

COLOURS, DASHES = 6, ("", "6 3", "2 3")
MOST_RUNS = COLOURS * len(DASHES)
BINS = 250  # of a curve; each keeps its smallest and its largest value
SMOOTH_FROM, SMOOTH_BINS = 80, 40  # points from which a running mean is drawn, and its points
WIDTH, HEIGHT = 420, 240
Unit = Literal["", "share", "percent"]
Place = Callable[[np.ndarray | float], np.ndarray]
"""Values -> where they are in the picture."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


@dataclass(frozen=True)
class Curve:
    """One line of a plot."""

    label: str
    series: Series
    number: int  # of its colour and dashes
    band: tuple[np.ndarray, np.ndarray] | None = None  # lower and upper ends of an interval


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    what: str
    number: int | None = None  # of the run's colour, if there are several


def thin(values: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Which points of a curve to draw, so that it looks the same.

    Args:
        values: (n,) finite.
        bins: parts of equal numbers of points.

    Returns:
        Rising indices: the first, the last, and those of the least and largest value of each part;
        all of them where there are few.
    """
    count = len(values)
    if count <= 2 * bins + 2:
        return np.arange(count)
    edges = np.linspace(0, count, bins + 1).astype(int)
    kept = {0, count - 1}
    for start, end in itertools.pairwise(edges.tolist()):
        part = values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return np.array(sorted(kept))


def plot(
    curves: Sequence[Curve],
    title: str,
    *,
    steps: int,
    logarithmic: bool = False,
    unit: Unit = "",
    chance: float | None = None,
    marks: Sequence[Mark] = (),
) -> Markup:
    """A plot over the steps.

    Args:
        curves: with at least one value.
        title: for those who cannot see it.
        steps: the right end.
        logarithmic: y axis; values of 0 and less are left out.
        unit: "share": from 0 to 1; "percent": likewise, in %; "": as the values are.
        chance: a level to mark.
        marks: vertical lines.

    Returns:
        An <svg> element. It keeps its axes' ends in data-*, from which the page's script reads
        values at the pointer.
    """
    kept = [_finite(curve, logarithmic) for curve in curves]
    kept = [curve for curve in kept if len(curve.series[0])]
    low, high = _range(kept, logarithmic, unit, chance)
    svg = element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="plot")
    end = max(steps, 1)
    ends = {"x0": 0, "x1": end, "y0": low, "y1": high, "log": int(logarithmic)}
    ends |= {"percent": int(unit == "percent"), "left": _LEFT, "right": WIDTH - _RIGHT}
    ends |= {"top": _TOP, "bottom": HEIGHT - _BOTTOM}
    for name, number in ends.items():
        svg.set(f"data-{name}", f"{number:.10g}")
    element("title", svg).text = title

    def at_x(x: np.ndarray | float) -> np.ndarray:
        return _LEFT + np.asarray(x) / end * (WIDTH - _LEFT - _RIGHT)

    def at_y(y: np.ndarray | float) -> np.ndarray:
        a, b, y = (np.log10(v) if logarithmic else np.asarray(v) for v in (low, high, y))
        return HEIGHT - _BOTTOM - (y - a) / (b - a) * (HEIGHT - _TOP - _BOTTOM)

    for tick in _ticks(low, high, logarithmic):
        y = f"{float(at_y(tick)):.1f}"
        element("line", svg, x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="level")
        text = element("text", svg, x=_LEFT - 6, y=y, dy="0.35em", class_="tick end")
        text.text = f"{tick:.0%}" if unit == "percent" else _value(tick, high)
    for tick in MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]).tick_values(0, end):
        if 0 <= tick <= end:
            place, kind = float(at_x(tick)), "tick"
            if place > WIDTH - _RIGHT - 10:  # centred there it would be cut off
                place, kind = WIDTH, "tick end"
            text = element("text", svg, x=f"{place:.1f}", y=HEIGHT - _BOTTOM + 16, class_=kind)
            text.text = _steps(tick)
    label = element("text", svg, x=WIDTH - _RIGHT, y=HEIGHT - 3, class_="tick end")
    label.text = "step"
    if chance is not None:
        y = f"{float(at_y(chance)):.1f}"
        element("line", svg, x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="chance")
        label = element("text", svg, x=WIDTH - _RIGHT - 2, y=y, dy="-0.4em", class_="tick end")
        label.text = "chance"
    for mark in marks:
        x = f"{float(at_x(min(mark.step, end))):.1f}"
        line = element("line", svg, x1=x, x2=x, y1=_TOP, y2=HEIGHT - _BOTTOM)
        line.set("class", "mark" if mark.number is None else f"mark c{mark.number % COLOURS}")
        element("title", line).text = f"{mark.what} at step {mark.step}"
    for curve in kept:
        _draw(svg, curve, at_x, at_y)
    return Markup(ET.tostring(svg, encoding="unicode"))


def _draw(svg: ET.Element, curve: Curve, at_x: Place, at_y: Place) -> None:
    steps, values = curve.series
    dash = DASHES[curve.number // COLOURS % len(DASHES)]
    group = element("g", svg, class_=f"c{curve.number % COLOURS}")
    group.set("data-label", curve.label)
    if curve.band is not None and len(steps) > 1:
        lower, upper = curve.band
        x = at_x(np.concatenate([steps, steps[::-1]]))
        element("polygon", group, points=_points(x, at_y(np.concatenate([lower, upper[::-1]]))))
    index = thin(values)
    smooth = len(values) >= SMOOTH_FROM
    line = element(
        "polyline",
        group,
        points=_points(at_x(steps[index]), at_y(values[index])),
        class_="raw pale" if smooth else "raw",
    )
    if dash:
        line.set("stroke-dasharray", dash)
    if smooth:
        edges = np.linspace(0, len(values), SMOOTH_BINS + 1).astype(int)[:-1]
        counts = np.diff(np.append(edges, len(values)))
        means = [np.add.reduceat(a.astype(float), edges) / counts for a in (steps, values)]
        mean = element("polyline", group, points=_points(at_x(means[0]), at_y(means[1])))
        if dash:
            mean.set("stroke-dasharray", dash)
    elif len(values) <= 30:
        for x, y in zip(at_x(steps), at_y(values), strict=True):
            element("circle", group, cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4)


def swatch(number: int) -> Markup:
    """A short piece of a curve's line, for a legend."""
    svg = element("svg", viewBox="0 0 26 10", class_=f"swatch c{number % COLOURS}")
    svg.set("aria-hidden", "true")
    line = element("polyline", svg, points="1,5 25,5")
    if dash := DASHES[number // COLOURS % len(DASHES)]:
        line.set("stroke-dasharray", dash)
    return Markup(ET.tostring(svg, encoding="unicode"))


def _finite(curve: Curve, positive: bool) -> Curve:
    steps, values = curve.series
    good = np.isfinite(values) & ((values > 0) | (not positive))
    band = None if curve.band is None else (curve.band[0][good], curve.band[1][good])
    return Curve(curve.label, (steps[good], values[good]), curve.number, band)


def _range(
    curves: Sequence[Curve], logarithmic: bool, unit: Unit, chance: float | None
) -> tuple[float, float]:
    """Ends of the y axis."""
    if unit:
        return 0.0, 1.0
    values = [curve.series[1] for curve in curves]
    values += [end for curve in curves if curve.band for end in curve.band]
    values += [] if chance is None else [np.array([chance])]
    every = np.concatenate(values) if values else np.array([0.0, 1.0])
    low, high = float(every.min()), float(every.max())
    if logarithmic:
        low, high = 10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high))
        return float(low), float(high if high > low else low * 10)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - margin), high + margin


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    locator = LogLocator(numticks=6) if logarithmic else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    near = 1e-9 * (high - low)
    return [float(t) for t in locator.tick_values(low, high) if low - near <= t <= high + near]


def _value(value: float, largest: float) -> str:
    """A value at an axis, in five letters or so: 0.00025 as 2.5e-4."""
    if value and (largest < 0.01 or largest >= 1e5):
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def _steps(step: float) -> str:
    """A step at an axis: 250000 as 250k."""
    if step >= 10_000 and step % 100 == 0:
        return f"{step / 1e6:g}M" if step >= 1e6 else f"{step / 1e3:g}k"
    return f"{step:g}"


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def element(tag: str, parent: ET.Element | None = None, **attributes: object) -> ET.Element:
    """An element of SVG; `class_` stands for class, and `a_b` for a-b."""
    named = {name.rstrip("_").replace("_", "-"): str(v) for name, v in attributes.items()}
    if parent is None:
        return ET.Element(tag, named)
    return ET.SubElement(parent, tag, named)
