"""Validation during training: position accuracy, what is amiss, the picture, the embeddings."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from voco_jax.config.pretraining import Pretraining
from voco_jax.data.crops import base_origins, join
from voco_jax.data.manifest import Entry
from voco_jax.data.pipeline import Part, Sample, held_out_sample, shuffle_key
from voco_jax.data.volumes import dequantise
from voco_jax.training.distributed import compile_on_all, is_process_0, run_on_all
from voco_jax.training.mesh import batch_sharding, local_rows, to_devices
from voco_jax.training.task import Program, Validation
from voco_jax.types import Batch
from voco_jax.voco.health import at_chance, collapsed, count_volumes, empty_crops, is_empty
from voco_jax.voco.position import describe_accuracy, measure
from voco_jax.voco.step import Predictions, State

EMBEDDINGS = 2048  # of base crops, kept for a picture of them


class Validator:
    """Position accuracy on the same crops of the same held-out volumes at every call."""

    def __init__(
        self,
        experiment: Pretraining,
        training: Sequence[Part],
        held_out: Sequence[Part],
        program: Program[State],
    ) -> None:
        """Chooses the volumes.

        Args:
            experiment: the settings.
            training: the volumes to train on; they are counted only.
            held_out: the volumes to choose from.
            program: predicts.
        """
        self._experiment, self._program = experiment, program
        self._rows = local_rows(experiment.batch_size, program.mesh)
        self._predict: Callable[[State, Batch], Predictions] | None = None
        # The first by id would mostly be of one data set.
        volumes = [(entry, part.cache) for part in held_out for entry in part.entries]
        volumes.sort(key=lambda volume: shuffle_key(experiment.seed, volume[0]))
        self._volumes = volumes[: experiment.validation.volumes]
        self._kept = max(EMBEDDINGS // math.prod(experiment.crops.grid), 1)  # volumes
        self._different = count_volumes(training)
        path, entries = experiment.validation.probe_labels, [entry for entry, _ in self._volumes]
        self._probe = run_on_all(lambda: _open_probe(path, entries)) if path else None

    def __call__(self, state: State, step: int) -> Validation:
        """Predicts all held-out volumes in batches of the training's size.

        The last batch is filled up with volumes from the start, which are not counted again:
        the batch norm needs batches of one size.
        """
        size, count = self._experiment.batch_size, len(self._volumes)
        similarities: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        spreads: list[float] = []
        embeddings: list[np.ndarray] = []
        empty: list[bool] = []
        pooled: list[np.ndarray] = []
        shown: Sample | None = None
        for start in range(0, count, size):
            samples = [self._sample((start + row) % count) for row in self._rows]
            shown = shown or samples[0]
            found = self._predicted(state, samples)
            similarities.extend(jax.device_get(found.similarities)[: count - start])
            labels.extend(jax.device_get(found.labels)[: count - start])
            spreads.append(float(found.spread))
            if is_process_0():
                empty += [is_empty(crop) for sample in samples for crop in sample["bases"]]
                if len(embeddings) < self._kept:
                    embeddings.extend(jax.device_get(found.bases)[: count - start])
            if self._probe:
                pooled.extend(jax.device_get(found.pooled)[: count - start])
        metrics = measure(
            np.concatenate(similarities), np.concatenate(labels), float(np.mean(spreads))
        )
        number = self._rows[0] % count
        title = (
            f"{self._volumes[number][0].id}, step {step}: position accuracy of all held-out "
            f"volumes {metrics.accuracy:.0%} (chance {metrics.chance:.0%})"
        )
        pictures, arrays = {}, {}
        if is_process_0() and shown is not None:
            pictures["positions"] = self._picture(shown, similarities[number], title)
            arrays["embeddings"] = self._arrays(embeddings[: self._kept], step)
        named, answers = dataclasses.asdict(metrics), sum(map(len, labels))
        meaning = describe_accuracy(metrics.accuracy, answers, self._experiment.crops.grid)
        probed = self._probe(np.array(pooled)) if self._probe else {}
        return Validation(
            metrics={"position_accuracy": named.pop("accuracy"), **named, **probed},
            score=metrics.accuracy,
            text=(
                f"position accuracy {metrics.accuracy:.1%} "
                f"({metrics.accuracy / metrics.chance:.1f} times chance: {meaning}), mean absolute "
                f"error of overlaps {metrics.overlap_error:.4f}"
                f"{_describe(probed)}"
            ),
            findings=(
                *collapsed(metrics),
                *at_chance(metrics, answers, step, self._experiment),
                *empty_crops(empty),
            ),
            sound=(
                f"{self._different} different volumes are trained on",
                f"embeddings differ (spread {metrics.embedding_spread:.2f})",
            ),
            pictures=pictures,
            arrays=arrays,
        )

    def _arrays(self, embeddings: Sequence[np.ndarray], step: int) -> dict[str, np.ndarray]:
        """Embeddings (n, d) of some volumes' base crops, with each one's cell and volume."""
        crops = self._experiment.crops
        cells = base_origins(crops.grid, crops.crop_size) // crops.crop_size
        ids = [entry.id for entry, _ in self._volumes[: len(embeddings)]]
        return {
            "embeddings": np.concatenate(embeddings).astype(np.float32),
            "cells": np.tile(cells, (len(ids), 1)).astype(np.int32),
            "volumes": np.repeat(ids, len(cells)),
            "step": np.array(step),
        }

    def _sample(self, number: int) -> Sample:
        entry, cache = self._volumes[number]
        experiment = self._experiment
        sub_volumes = experiment.validation.sub_volumes
        return held_out_sample(
            cache, entry, experiment.crops, sub_volumes=sub_volumes, seed=experiment.seed
        )

    def _predicted(self, state: State, samples: Sequence[Sample]) -> Predictions:
        """The predictions of a batch, on the devices."""
        batch = {
            "subs": np.stack([sample["subs"] for sample in samples]),
            "bases": np.stack([sample["bases"] for sample in samples]),
            "labels": np.stack([sample["labels"] for sample in samples]),
        }
        sharding = batch_sharding(self._program.mesh)
        placed = to_devices(batch, sharding, self._experiment.batch_size)
        if self._predict is None:
            self._predict = compile_on_all(self._program.predict, state, placed)
        return self._predict(state, placed)

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


def _open_probe(path: str, volumes: Sequence[Entry]) -> Callable[[np.ndarray], dict[str, float]]:
    from voco_jax.voco.probe import LabelProbe  # SciPy and pyarrow: for those who ask for it

    return LabelProbe(path, volumes)


def _describe(probed: Mapping[str, float]) -> str:
    if not probed:
        return ""
    return f", probe {probed['probe_accuracy']:.1%} (chance {probed['probe_chance']:.1%})"
