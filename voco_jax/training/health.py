"""Signs in a run's own numbers that something is wrong: in words, each with what to do.

Pure functions of the numbers between log lines. What a method knows besides is its own to tell:
see `Validation.findings` in `training/task.py`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from voco_jax.files import parse_object

# Waiting for a quarter of the time: the run could be a third faster. Less is not worth a warning.
WAITING = 0.25
# A cache that is still cold, or a neighbour at work, is over by then.
WAITING_WINDOWS, WAITING_SECONDS = 3, 120.0
# Means of fewer log lines than this tell no trend of a noisy loss.
FEWEST_WINDOWS = 10
# What a loss has to fall by, in a stretch of steps as long as all before it, to be said to move.
MOVED = 0.05
# Of a model of which the loss of one that has learned nothing is not known: a loss that has fallen
# by more since the start is that of a model that has learned something.
LEARNED = 0.1
# By so much the loss must be above the lowest that it was, or that is reached without learning.
GROWN = 0.25
# Of the first step's gradient; see `rate_too_high`. At a hundred times the rate of configs/demo.py
# that of a small network fell to a thirtieth, and its loss stayed at twice the blind loss.
SHRUNK = 0.1
# Standard errors: of the thousands of looks at a healthy run none is so far off by chance.
CERTAIN = 4.0
# Beside AdamW's eps of 1e-8 a smaller gradient moves nothing; a smaller rate moves no weight of
# float32 in a hundred thousand steps.
NO_GRADIENT, NO_RATE = 1e-8, 1e-9


@dataclass(frozen=True)
class Finding:
    """Something that a user has to know.

    Attributes:
        kind: one word for it; a run has at most one open finding of a kind.
        text: what was found, with its number.
        advice: what to do, with the settings' names.
    """

    kind: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"WARNING {self.kind}: {self.text}. Try: {self.advice}"


@dataclass(frozen=True)
class Window:
    """The steps between two log lines.

    Attributes:
        step: the last of them.
        loss: their mean.
        gradient_norm: their median; NaN where the task measures none.
        rate: learning rate of the last; NaN where the task has none.
        seconds: that they took; 0: not known.
        waiting: fraction of it that the devices waited for input.
    """

    step: int
    loss: float
    gradient_norm: float
    rate: float
    seconds: float
    waiting: float


def make_window(
    step: int, steps: Sequence[Mapping[str, float]], logged: Mapping[str, float], seconds: float
) -> Window:
    """A window of what is known of it.

    Args:
        step: its last.
        steps: the metrics of each step of it.
        logged: what the log line has of the last step and of the waiting.
        seconds: see `Window`.
    """
    return Window(
        step=step,
        loss=float(np.mean([one["loss"] for one in steps])),
        gradient_norm=float(np.median([one.get("gradient_norm", math.nan) for one in steps])),
        rate=logged.get("learning_rate", math.nan),
        seconds=seconds,
        waiting=logged.get("input_wait_fraction", 0.0),
    )


def read_windows(lines: Iterable[str]) -> list[Window]:
    """The windows of an earlier part of a run, each with the loss of its last step alone.

    Args:
        lines: of metrics.jsonl; those without a loss are left aside.
    """
    rows = map(parse_object, lines)
    return [make_window(row["step"], [row], row, 0.0) for row in rows if "loss" in row]


def diagnose(
    windows: Sequence[Window],
    open_kinds: Collection[str],
    sound: Sequence[str],
    blind_loss: Callable[[], float] | None,
) -> list[Finding]:
    """All that is amiss after the last window.

    Args:
        windows: of all steps so far.
        open_kinds: of findings so far; what explains a flat loss makes it no news.
        sound: see `flat`.
        blind_loss: see `flat`.
    """
    found = data_bound(windows)
    if high := rate_too_high(windows, blind_loss):
        return found + high
    return found if "collapsed" in open_kinds else found + flat(windows, sound, blind_loss)


def not_finite(what: str) -> Finding:
    """Of a run that stops, as its loss or gradient is no longer a number."""
    return Finding(
        "rate_too_high",
        what,
        "a tenth of optimizer.learning_rate, or model.dtype='float32', in a new workdir",
    )


def data_bound(windows: Sequence[Window]) -> list[Finding]:
    """Whether the devices have been waiting for their input, and not just for a moment."""
    last: list[Window] = []
    for window in reversed(windows):
        last.append(window)
        if len(last) >= WAITING_WINDOWS and sum(one.seconds for one in last) >= WAITING_SECONDS:
            break
    else:
        return []
    seconds = sum(one.seconds for one in last)
    share = sum(one.waiting * one.seconds for one in last) / seconds
    if min(one.waiting for one in last) < WAITING:
        return []
    return [
        Finding(
            "data_bound",
            f"the devices have waited for input for {share:.0%} of the last "
            f"{seconds / 60:.0f} minutes",
            "more data.workers (up to the machine's cores), the prepared cache on a local disk; "
            "`python -m voco_jax.benchmark pipeline` says how many volumes/s a core delivers",
        )
    ]


def rate_too_high(
    windows: Sequence[Window], blind_loss: Callable[[], float] | None
) -> list[Finding]:
    """Whether the loss has grown again, or weights have, and nothing is learned.

    The gradient is the smaller the larger the weights before a norm are: they have grown where it
    is a small part of the first step's, though the loss is high.

    Args:
        windows: of all steps.
        blind_loss: see `flat`; None: only growth of the loss is looked for.
    """
    size = max(FEWEST_WINDOWS, len(windows) // 10)
    if len(windows) < 2 * size:
        return []
    losses = np.array([window.loss for window in windows])
    last = losses[-size:]
    ends = range(len(losses) - size, size - 1, -size)
    lowest = min((losses[end - size : end] for end in ends), key=np.mean)
    found = ""
    if _above(last, lowest.mean(), _error(last, lowest)):
        found = f"the loss has grown to {last.mean():.4f} from {lowest.mean():.4f}"
    elif blind_loss is not None:
        gradient = float(np.median([window.gradient_norm for window in windows[-size:]]))
        shrunk = gradient < SHRUNK * windows[0].gradient_norm
        if shrunk and _above(last, blind := blind_loss(), _error(last)):
            found = (
                f"the loss is {last.mean():.4f}, though {blind:.4f} is reached without a look at "
                f"the input, and the gradient's norm has shrunk to {gradient:.2g} from "
                f"{windows[0].gradient_norm:.2g}: the weights have grown"
            )
    if not found:
        return []
    return [
        Finding(
            "rate_too_high",
            f"{found}; the learning rate is {windows[-1].rate:.1e}",
            "a tenth of optimizer.learning_rate, or a longer optimizer.warmup_steps, in a new "
            "workdir",
        )
    ]


def _above(losses: np.ndarray, level: float, error: float) -> bool:
    """Whether losses are by `GROWN` above a level, for certain."""
    return bool(losses.mean() - level > max(GROWN * abs(level), CERTAIN * error))


def flat(
    windows: Sequence[Window], sound: Sequence[str], blind_loss: Callable[[], float] | None
) -> list[Finding]:
    """Whether the loss has not moved for long, of a model that has not learned yet.

    The second half of all steps is compared with the quarter before it, once the rate was up by
    then. Nothing is said where noise could hide a fall of `MOVED`, unless the loss is for certain
    above one that needs no look at the input; nor where the loss is low.

    Args:
        windows: of all steps.
        sound: what else has been looked at and is as it should be.
        blind_loss: () -> what a network reaches that does not look at its input; None: a fall of
            `LEARNED` since the start is taken for learning.
    """
    end = windows[-1].step
    before = [one for one in windows if end / 4 < one.step <= end / 2]
    after = [one for one in windows if end / 2 < one.step]
    if len(before) < FEWEST_WINDOWS or before[0].rate < max(one.rate for one in after) / 2:
        return []
    old, new = (np.array([one.loss for one in part]) for part in (before, after))
    fall, error = old.mean() - new.mean(), CERTAIN * _error(old, new)
    still = fall + error <= MOVED * abs(old.mean())
    if fall > max(error, MOVED * abs(old.mean())):
        return []
    if blind_loss is None:
        low = (1 - LEARNED) * float(np.mean([one.loss for one in windows[:FEWEST_WINDOWS]]))
        high, reached = math.inf, ""
    else:
        blind = blind_loss()
        low, high = (1 - MOVED) * blind, blind + CERTAIN * _error(new)
        reached = f", and {blind:.4f} is reached without a look at the input"
    if new.mean() <= (low if still else high):
        return []
    rate, gradient = (
        float(np.median([getattr(one, name) for one in after]))
        for name in ("rate", "gradient_norm")
    )
    causes, sound = [], list(sound)
    if rate < NO_RATE:
        causes.append(f"the learning rate is {rate:.1e}")
    elif math.isfinite(rate):
        sound.append(f"the learning rate is {rate:.1e} and its warm-up over")
    if gradient < NO_GRADIENT:
        causes.append(f"the gradient's norm is {gradient:.1e}")
    elif math.isfinite(gradient):
        sound.append(f"the gradient's norm is {gradient:.2g}")
    text = (
        f"the loss does not move: {new.mean():.4f} since step {before[-1].step}, {old.mean():.4f} "
        f"before{reached}"
    )
    if causes:
        text += f". Why: {'; '.join(causes)}"
    if sound:
        text += f". Ruled out: {'; '.join(sound)}"
    return [
        Finding(
            "flat",
            text,
            "ten times as much or a tenth of optimizer.learning_rate, in a new workdir, and a look "
            "at the pictures: is there any anatomy in the window? docs/health.md has an order",
        )
    ]


def _error(*parts: np.ndarray) -> float:
    """The standard error of a mean, or of the difference of two."""
    return math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
