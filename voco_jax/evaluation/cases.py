"""One case: all metrics of a prediction against its reference."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from voco_jax.errors import InputError
from voco_jax.evaluation.masks import Classes, check_grid, load_mask
from voco_jax.evaluation.metrics import (
    Overlap,
    confusion,
    dice,
    hausdorff95,
    normalised_surface_dice,
    surface_distances,
    volume_error,
    volume_ml,
)


@dataclass(frozen=True)
class Score:
    """One class of one case."""

    name: str  # of the class
    dice: float  # 0..1; NaN: in neither
    surface_dice: tuple[float, ...]  # for each tolerance, 0..1; NaN: in neither
    hausdorff95: float  # mm; inf: in only one; NaN: in neither
    reference_ml: float
    prediction_ml: float

    @property
    def error(self) -> tuple[float, float]:
        """Of the volume: ml, and % of the reference (NaN if that is empty)."""
        return volume_error(self.reference_ml, self.prediction_ml)

    @property
    def note(self) -> str:
        """Which of the two lacks the class, or ""."""
        if not self.reference_ml:
            return "no reference" if self.prediction_ml else "in neither"
        return "" if self.prediction_ml else "no prediction"


@dataclass(frozen=True)
class Job:
    """What a worker needs for one case."""

    name: str
    reference: Path
    prediction: Path
    classes: Classes
    tolerances: tuple[float, ...]  # mm


@dataclass(frozen=True)
class Result:
    """What comes of it."""

    name: str
    scores: tuple[Score, ...] = ()
    failure: str = ""  # why there are no scores
    # Of "reference" and "prediction" the labels of no class, which were taken for background.
    strays: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def dice(self) -> float:
        """The mean over the classes that are in reference or prediction; NaN: none is."""
        known = [score.dice for score in self.scores if not math.isnan(score.dice)]
        return float(np.mean(known)) if known else float("nan")


def compare(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    classes: Classes,
    tolerances: Sequence[float],
) -> list[Score]:
    """Scores two label maps of one grid.

    Args:
        reference: (x, y, z) integers of 0 to 65535.
        prediction: as the reference.
        spacing: mm.
        classes: names and labels; all other labels are background.
        tolerances: of the surface Dice, mm.

    Returns:
        A score for each class, in order.
    """
    if reference.flags.f_contiguous:  # the order of memory, for speed
        reference, prediction, spacing = reference.T, prediction.T, spacing[::-1]
    known = sorted({label for labels in classes.values() for label in labels})
    codes = np.zeros(65536, np.uint8 if len(known) < 256 else np.uint16)
    codes[known] = np.arange(1, len(known) + 1)
    coded = (codes[reference], codes[prediction])
    table = confusion(*coded, len(known) + 1)
    boxes = [ndimage.find_objects(labels, max_label=len(known)) for labels in coded]
    scores = []
    for name, labels in classes.items():
        of_class = codes[list(labels)].astype(int)
        rows, columns = table[of_class].sum(), table[:, of_class].sum()
        overlap = Overlap(table[np.ix_(of_class, of_class)].sum(), rows, columns)
        member = np.zeros(len(known) + 1, bool)
        member[of_class] = True
        found = [box[code - 1] for box in boxes for code in of_class if box[code - 1]]
        part = (
            tuple(
                slice(min(side.start for side in sides), max(side.stop for side in sides))
                for sides in zip(*found, strict=True)
            )
            or (slice(0, 0),) * 3
        )
        masks = [member[labels[part]] for labels in coded]
        distances = surface_distances(masks[0], masks[1], spacing)
        scores.append(
            Score(
                name,
                float(dice(overlap)),
                tuple(normalised_surface_dice(distances, mm) for mm in tolerances),
                hausdorff95(distances),
                volume_ml(int(rows), spacing),
                volume_ml(int(columns), spacing),
            )
        )
    return scores


def evaluate_case(job: Job) -> Result:
    """Reads two files and compares them; what is wrong with them is the result's `failure`."""
    try:
        reference, prediction = load_mask(job.reference), load_mask(job.prediction)
        check_grid("reference", reference, prediction, "prediction")
        known = {label for labels in job.classes.values() for label in labels}
        strays = {
            what: others
            for what, mask in (("reference", reference), ("prediction", prediction))
            if (others := [value for value in mask.values if value not in known])
        }
        scores = compare(
            reference.labels, prediction.labels, reference.spacing, job.classes, job.tolerances
        )
    except InputError as error:
        return Result(job.name, failure=str(error))
    except MemoryError:
        return Result(job.name, failure="out of memory: use fewer --workers")
    return Result(job.name, tuple(scores), strays=strays)


def values_in(path: Path) -> tuple[int, ...]:
    """The labels that a mask has, without 0; (): it cannot be read."""
    try:
        return load_mask(path).values
    except (InputError, MemoryError):  # said when the case is evaluated
        return ()
