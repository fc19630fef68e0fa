"""Validation of segmentation: whole held-out volumes, by sliding window, on two grids."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from voco_jax.config.finetuning import Finetuning, SegmentationFinetuning
from voco_jax.data.cache import Cache, Entry
from voco_jax.data.pipeline import Part, shuffle_key
from voco_jax.data.volumes import dequantise, file_positions
from voco_jax.evaluation.metrics import count_overlap, dice
from voco_jax.evaluation.sliding_window import Grid, Windows, segment
from voco_jax.finetune.step import State
from voco_jax.training.distributed import compile_on_all, is_process_0
from voco_jax.training.health import Finding
from voco_jax.training.mesh import batch_sharding, local_rows, to_devices
from voco_jax.training.optimizer import schedule
from voco_jax.training.task import Program, Validation

_PICTURES = 3  # of the worst cases
_FLAT = 3  # validations without change before a warning
_MOVED = 0.01  # Dice that counts as a change


@dataclasses.dataclass(frozen=True)
class Case:
    """What was found in one volume; Dice is (classes,), NaN where there is nothing to find."""

    id: str
    file: np.ndarray  # Dice on the grid of the file
    resampled: np.ndarray  # Dice on the grid of the cache, as published figures are
    predicted: float  # share of the voxels that are predicted to be of a class
    reference: float  # share that are
    intensity: float  # mean of the image, 0..1


class Predictor:
    """`program.predict` for the batches of a validation, compiled at the first call.

    Attributes:
        rows: of a batch, those that this process has to have.
    """

    def __init__(self, program: Program[State], batch_size: int) -> None:
        self._program, self._batch_size = program, batch_size
        self.rows = list(local_rows(batch_size, program.mesh))
        self._predict: Callable[..., jax.Array] | None = None

    def __call__(self, state: State, images: np.ndarray) -> jax.Array:
        """Logits of a whole batch, of the images of this process's rows."""
        sharding = batch_sharding(self._program.mesh)
        placed = to_devices({"images": images}, sharding, self._batch_size)
        if self._predict is None:
            self._predict = compile_on_all(self._program.predict, state, placed)
        return self._predict(state, placed)


def choose_volumes(held_out: Sequence[Part], experiment: Finetuning) -> list[tuple[Entry, Cache]]:
    """At most `validation.volumes` of the held-out volumes, the same at every call."""
    # The first by id would mostly be of one data set.
    volumes = [(entry, part.cache) for part in held_out for entry in part.entries]
    volumes.sort(key=lambda volume: shuffle_key(experiment.seed, volume[0]))
    return volumes[: experiment.validation.volumes]


def describe_rate(experiment: Finetuning, step: int) -> list[tuple[str, str]]:
    """What about the learning rate may be why nothing is learned, and what to do."""
    rate = float(schedule(experiment.optimizer, experiment.total_steps)(step - 1))
    if rate > 5e-4:
        advice = "a tenth of optimizer.learning_rate, or a longer optimizer.warmup_steps"
        return [(f"the learning rate is {rate:.1e}", advice)]
    if step <= experiment.optimizer.warmup_steps:
        return [("the warm-up is not over", "to wait for it, or a shorter optimizer.warmup_steps")]
    if rate < 1e-6:
        return [(f"the learning rate is only {rate:.1e}", "a larger optimizer.learning_rate")]
    return []


class Validator:
    """Dice of the same held-out volumes at every call."""

    def __init__(
        self,
        experiment: SegmentationFinetuning,
        held_out: Sequence[Part],
        program: Program[State],
    ) -> None:
        self._experiment = experiment
        self._predictor = Predictor(program, experiment.batch_size)
        settings = experiment.validation
        self._windows = Windows(
            experiment.crops.size, settings.overlap, settings.weights, experiment.batch_size
        )
        self._volumes = choose_volumes(held_out, experiment)
        self._scores: list[float] = []

    def __call__(self, state: State, step: int) -> Validation:
        """Segments all held-out volumes and compares them with their labels."""
        cases: list[Case] = []
        worst: list[tuple[float, int, Any]] = []  # a heap, the best of them first
        counter = itertools.count()
        for entry, cache in self._volumes:
            case, arrays = self._case(state, entry, cache)
            cases.append(case)
            if is_process_0():
                spacing = cache.chain.spacing or entry.spacing
                kept = (case, spacing, arrays)
                heapq.heappush(worst, (-_mean(case.file), next(counter), kept))
                if len(worst) > _PICTURES:
                    heapq.heappop(worst)
        return self._found(cases, [one for *_, one in sorted(worst)[::-1]], step)

    def _case(self, state: State, entry: Entry, cache: Cache) -> tuple[Case, tuple[Any, ...]]:
        image, label = cache.read_channels(entry), cache.read_label(entry)
        positions = file_positions(entry.shape, entry.spacing, cache.chain, entry.box, entry.stored)
        rows = self._predictor.rows
        found, in_file = segment(
            image,
            lambda parts: self._predictor(state, parts[rows]),
            self._windows,
            Grid(positions),
        )
        assert in_file is not None
        count = len(self._experiment.data.classes)
        label, file_label = (one.astype(np.uint8) for one in (label, cache.read_file_label(entry)))
        case = Case(
            id=entry.id,
            file=dice(count_overlap(file_label, in_file, count)),
            resampled=dice(count_overlap(label, found, count)),
            predicted=float(np.mean(found > 0)),
            reference=float(np.mean(label > 0)),
            intensity=float(dequantise(image).mean()),
        )
        return case, (image, label, found)

    def _found(self, cases: Sequence[Case], worst: Sequence[Any], step: int) -> Validation:
        names = self._experiment.data.classes[1:]
        by_class = _means(np.stack([case.file for case in cases]))[1:]
        score = _nan_mean(by_class)
        resampled = _nan_mean(_means(np.stack([case.resampled for case in cases]))[1:])
        self._scores.append(score)
        metrics = {"dice": score, "dice_resampled": resampled}
        metrics |= {f"dice_{name}": float(v) for name, v in zip(names, by_class, strict=True)}
        listed = ", ".join(
            f"{name} {'in none' if np.isnan(value) else f'{value:.3f}'}"
            for name, value in zip(names, by_class, strict=True)
        )
        pictures = {}
        if worst:
            pictures["segmentations"] = self._picture(worst, score, step)
        return Validation(
            metrics={name: value for name, value in metrics.items() if np.isfinite(value)},
            score=score,
            text=(
                f"Dice {score:.4f} on the files' grids ({listed}), {resampled:.4f} on the "
                f"resampled grid; {len(cases)} volumes"
            ),
            findings=tuple(find_flat(self._scores, cases, step, self._experiment)),
            pictures=pictures,
            cases=[
                {
                    "id": case.id,
                    "dice": _named(names, case.file),
                    "dice_resampled": _named(names, case.resampled),
                }
                for case in cases
            ],
        )

    def _picture(self, worst: Sequence[Any], score: float, step: int) -> np.ndarray:
        from voco_jax.report.segmentations import Segmentation, draw_cases  # Matplotlib is slow

        rows = [
            Segmentation(
                title=f"{case.id}: Dice {_mean(case.file):.3f}",
                image=dequantise(image[..., 0]),
                reference=label,
                prediction=found,
                spacing=spacing,
            )
            for case, spacing, (image, label, found) in worst
        ]
        return draw_cases(rows, f"step {step}: Dice {score:.3f}; the worst of them")


def find_flat(
    scores: Sequence[float], cases: Sequence[Case], step: int, experiment: SegmentationFinetuning
) -> list[Finding]:
    """Whether the last validations found the same low Dice, and the likely cause.

    Args:
        scores: Dice of each validation so far.
        cases: of the last one.
        step: of the last one.
        experiment: the settings.
    """
    last = scores[-_FLAT:]
    if len(last) < _FLAT or max(last) > 0.5 or max(last) - min(last) > _MOVED:
        return []
    predicted, reference, intensity = (
        float(np.mean([getattr(case, name) for case in cases]))
        for name in ("predicted", "reference", "intensity")
    )
    causes = []
    if predicted < 0.01 * reference:
        balance = "" if experiment.crops.balance == "classes" else ", crops.balance='classes'"
        now = f"(now {experiment.crops.foreground:g})"
        causes.append(
            (
                "the network predicts background alone",
                f"more steps, a higher crops.foreground {now}{balance}",
            )
        )
    elif predicted > 10 * reference:
        causes.append(
            ("the network predicts classes nearly everywhere", "a lower crops.foreground")
        )
    if intensity < 0.01 or intensity > 0.99:
        causes.append(
            (
                f"the images are nearly constant ({intensity:.3f} of the window on average)",
                "another data.sources.*.chain.window",
            )
        )
    causes += describe_rate(experiment, step)
    causes = causes or [
        ("neither rate nor window explain it", "a look at whether labels fit images")
    ]
    listed = ", ".join(f"{one:.4f}" for one in last)
    return [
        Finding(
            "flat",
            f"Dice does not move: {listed} in the last {_FLAT} validations; "
            + "; ".join(why for why, _ in causes),
            "; ".join(advice for _, advice in causes),
        ),
    ]


def _named(names: Sequence[str], by_class: np.ndarray) -> dict[str, float | None]:
    """Of a case, without the background; None: nothing to find and nothing found."""
    values = by_class[1:].tolist()
    return {n: None if np.isnan(v) else v for n, v in zip(names, values, strict=True)}


def _means(values: np.ndarray) -> np.ndarray:
    """(cases, classes) -> (classes,), NaN left out; NaN where all are."""
    counts = np.isfinite(values).sum(axis=0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def _nan_mean(values: np.ndarray) -> float:
    """The mean without NaN; 0 where there is nothing else."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else 0.0


def _mean(by_class: np.ndarray) -> float:
    """Of a case, without the background; 1 where there was nothing to find and nothing found."""
    kept = by_class[1:][np.isfinite(by_class[1:])]
    return float(kept.mean()) if kept.size else 1.0
