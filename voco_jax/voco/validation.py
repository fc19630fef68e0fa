"""Validation during training: position accuracy, the collapse warning and the picture."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from voco_jax.config.pretraining import Pretraining
from voco_jax.data.crops import join
from voco_jax.data.pipeline import Part, Sample, held_out_sample, shuffle_key
from voco_jax.data.volumes import dequantise
from voco_jax.training.distributed import compile_on_all, is_process_0
from voco_jax.training.mesh import batch_sharding, local_rows, to_devices
from voco_jax.training.task import Program, Validation
from voco_jax.types import Batch
from voco_jax.voco.position import collapse_warning, measure
from voco_jax.voco.step import Predictions, State


class Validator:
    """Position accuracy on the same crops of the same held-out volumes at every call."""

    def __init__(
        self, experiment: Pretraining, held_out: Sequence[Part], program: Program[State]
    ) -> None:
        self._experiment, self._program = experiment, program
        self._rows = local_rows(experiment.batch_size, program.mesh)
        self._predict: Callable[[State, Batch], Predictions] | None = None
        # The first by id would mostly be of one data set.
        volumes = [(entry, part.cache) for part in held_out for entry in part.entries]
        volumes.sort(key=lambda volume: shuffle_key(experiment.seed, volume[0]))
        self._volumes = volumes[: experiment.validation.volumes]

    def __call__(self, state: State, step: int) -> Validation:
        """Predicts all held-out volumes in batches of the training's size.

        The last batch is filled up with volumes from the start, which are not counted again:
        the batch norm needs batches of one size.
        """
        size, count = self._experiment.batch_size, len(self._volumes)
        similarities: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        spreads: list[float] = []
        shown: Sample | None = None
        for start in range(0, count, size):
            samples = [self._sample((start + row) % count) for row in self._rows]
            shown = shown or samples[0]
            found = self._found(state, samples)
            similarities.extend(found.similarities[: count - start])
            labels.extend(found.labels[: count - start])
            spreads.append(float(found.spread))
        metrics = measure(
            np.concatenate(similarities), np.concatenate(labels), float(np.mean(spreads))
        )
        number = self._rows[0] % count
        title = (
            f"{self._volumes[number][0].id}, step {step}: position accuracy of all held-out "
            f"volumes {metrics.accuracy:.0%} (chance {metrics.chance:.0%})"
        )
        pictures = {}
        if is_process_0() and shown is not None:
            pictures["positions"] = self._picture(shown, similarities[number], title)
        named = dataclasses.asdict(metrics)
        return Validation(
            metrics={"position_accuracy": named.pop("accuracy"), **named},
            score=metrics.accuracy,
            text=(
                f"position accuracy {metrics.accuracy:.1%} "
                f"({metrics.accuracy / metrics.chance:.1f} times chance), mean absolute error of "
                f"overlaps {metrics.overlap_error:.4f}"
            ),
            warning=collapse_warning(metrics) or "",
            pictures=pictures,
        )

    def _sample(self, number: int) -> Sample:
        entry, cache = self._volumes[number]
        experiment = self._experiment
        sub_volumes = experiment.validation.sub_volumes
        return held_out_sample(
            cache, entry, experiment.crops, sub_volumes=sub_volumes, seed=experiment.seed
        )

    def _found(self, state: State, samples: Sequence[Sample]) -> Any:
        """The predictions of a batch, on the host."""
        batch = {
            "subs": np.stack([sample["subs"] for sample in samples]),
            "bases": np.stack([sample["bases"] for sample in samples]),
            "labels": np.stack([sample["labels"] for sample in samples]),
        }
        sharding = batch_sharding(self._program.mesh)
        placed = to_devices(batch, sharding, self._experiment.batch_size)
        if self._predict is None:
            self._predict = compile_on_all(self._program.predict, state, placed)
        return jax.device_get(self._predict(state, placed))

    def _picture(self, sample: Sample, similarities: np.ndarray, title: str) -> np.ndarray:
        from voco_jax.report.positions import draw_positions  # Matplotlib: a second of every start

        crops = self._experiment.crops
        return draw_positions(
            dequantise(join(sample["bases"], crops.grid)),
            sample["origins"],
            sample["labels"],
            similarities,
            grid=crops.grid,
            crop_size=crops.crop_size,
            title=title,
        )
