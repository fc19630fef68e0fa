"""Validation of classification: the held-out volumes, each predicted whole."""

from collections.abc import Sequence

import numpy as np

from voco_jax.config.finetuning import ClassificationFinetuning
from voco_jax.data.folds import patient_of
from voco_jax.data.pipeline import Part
from voco_jax.data.whole_volumes import class_of, collate_volumes, middle_of
from voco_jax.errors import InputError
from voco_jax.evaluation.class_metrics import (
    accuracy,
    interval,
    mean_known,
    one_against_rest,
    resample,
)
from voco_jax.evaluation.metrics import confusion
from voco_jax.finetune.step import State
from voco_jax.finetune.validation import Predictor, choose_volumes, describe_rate
from voco_jax.training.distributed import is_process_0
from voco_jax.training.health import Finding
from voco_jax.training.task import Program, Validation


class ClassValidator:
    """Accuracy and AUC of the same held-out volumes at every call.

    Raises:
        InputError: all of them are of one class, so that there is no AUC.
    """

    def __init__(
        self,
        experiment: ClassificationFinetuning,
        held_out: Sequence[Part],
        program: Program[State],
    ) -> None:
        self._experiment, self._names = experiment, experiment.data.classes
        self._predictor = Predictor(program, experiment.batch_size)
        self._volumes = choose_volumes(held_out, experiment)
        self._reference = np.array([class_of(cache, entry) for entry, cache in self._volumes])
        patients = [patient_of(entry.id, experiment.data.patient) for entry, _ in self._volumes]
        self._patients = len(set(patients))
        self._resamples = resample(patients, experiment.seed)
        present = set(self._reference.tolist())
        if len(present) < 2:
            raise InputError(
                f"data: all {len(self._volumes)} held-out volumes are of the class "
                f"{self._names[present.pop()]!r}, expected two classes at least, which AUC "
                "compares; hold out more (data.held_out, data.folds), or set "
                "validation.every_steps=0"
            )

    def __call__(self, state: State, step: int) -> Validation:
        """Predicts the class of all held-out volumes and compares it with their labels."""
        logits = self._logits(state)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        probabilities = np.exp(log_probabilities)
        reference, predicted = self._reference, logits.argmax(axis=1)
        areas = one_against_rest(reference, probabilities)
        found = {
            "auc": float(mean_known(areas)),
            "accuracy": float(accuracy(reference, predicted)),
        }
        weights = self._resamples
        ends = {
            "auc": interval(mean_known(one_against_rest(reference, probabilities, weights))),
            "accuracy": interval(accuracy(reference, predicted, weights)),
        }
        metrics = dict(found)
        for name, (low, high) in ends.items():
            metrics |= {f"{name}_low": low, f"{name}_high": high}
        metrics["cross_entropy"] = float(
            -np.take_along_axis(log_probabilities, reference[:, None], axis=1).mean()
        )
        if len(self._names) > 2:
            areas_by_name = zip(self._names, areas.tolist(), strict=True)
            metrics |= {f"auc_{name}": area for name, area in areas_by_name}
        said = ", ".join(
            f"{title} {found[name]:.4f} ({ends[name][0]:.3f} to {ends[name][1]:.3f})"
            for name, title in (("auc", "AUC"), ("accuracy", "accuracy"))
        )
        text = f"{said}; {len(reference)} volumes of {self._patients} patients"
        pictures = {}
        if is_process_0():
            title = f"step {step}\nAUC {found['auc']:.3f}, accuracy {found['accuracy']:.3f}"
            pictures["confusion"] = self._picture(predicted, title)
        return Validation(
            metrics={name: value for name, value in metrics.items() if np.isfinite(value)},
            score=found["auc"],
            text=text,
            findings=self._nothing_learned(predicted, found["accuracy"], step),
            pictures=pictures,
            cases=[
                {
                    "id": entry.id,
                    "reference": self._names[right],
                    "probabilities": dict(zip(self._names, found, strict=True)),
                }
                for (entry, _), right, found in zip(
                    self._volumes, reference, probabilities.tolist(), strict=True
                )
            ],
        )

    def _logits(self, state: State) -> np.ndarray:
        """(volumes, classes), by batches of the training's size."""
        size, crops = self._experiment.batch_size, self._experiment.crops
        found = []
        for first in range(0, len(self._volumes), size):
            some = self._volumes[first : first + size]
            filled = some + some[:1] * (size - len(some))  # one compiled shape
            drawn = [
                middle_of(filled[row][1], filled[row][0], crops) for row in self._predictor.rows
            ]
            images = collate_volumes(drawn, crops=crops)["images"]
            found.append(np.asarray(self._predictor(state, images))[: len(some)])
        return np.concatenate(found).astype(np.float64)

    def _picture(self, predicted: np.ndarray, title: str) -> np.ndarray:
        from voco_jax.report.confusion import draw_confusion  # Matplotlib is slow

        table = confusion(self._reference, predicted, len(self._names))
        return draw_confusion(table, self._names, title)

    def _nothing_learned(
        self, predicted: np.ndarray, right: float, step: int
    ) -> tuple[Finding, ...]:
        """Whether one class is predicted always, or might as well be."""
        counts = np.bincount(self._reference, minlength=len(self._names))
        most, always = int(counts.argmax()), np.unique(predicted)
        if len(always) == 1:
            what = f"all {len(predicted)} held-out volumes are predicted {self._names[always[0]]!r}"
        elif right <= counts[most] / len(predicted):
            what = (
                f"accuracy {right:.4f} is at chance: always saying {self._names[most]!r} gives "
                f"{counts[most] / len(predicted):.4f}"
            )
        else:
            return ()
        causes = describe_rate(self._experiment, step)
        text = "; ".join([what, *(why for why, _ in causes)])
        advice = "; ".join(advice for _, advice in causes) or "more steps, or more volumes"
        return (Finding("chance", text, advice),)
