"""Validation during training: position accuracy, the collapse warning and the picture."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from voco_jax.config import Config
from voco_jax.data.pipeline import Part, Sample, held_out_sample, shuffle_key
from voco_jax.data.volumes import dequantise
from voco_jax.evaluation.position import PositionMetrics, measure
from voco_jax.report.positions import draw_positions
from voco_jax.training.distributed import compile_together
from voco_jax.training.mesh import local_rows, to_devices
from voco_jax.training.metrics import written
from voco_jax.voco.step import Predictions, State


@dataclasses.dataclass(frozen=True)
class Validation:
    """What a validation found, and its picture."""

    metrics: PositionMetrics
    image: np.ndarray  # (rows, columns, 3) uint8


class Validator:
    """Position accuracy on the same crops of the same held-out volumes at every call."""

    def __init__(
        self,
        config: Config,
        held_out: Sequence[Part],
        predict: Any,
        mesh: Mesh,
    ) -> None:
        self._config, self._mesh = config, mesh
        self._jitted = predict
        self._predict: Callable[[State, Mapping[str, jax.Array]], Predictions] | None = None
        # The first by id would mostly be of one data set.
        volumes = [(entry, part.cache) for part in held_out for entry in part.entries]
        volumes.sort(key=lambda volume: shuffle_key(config.seed, volume[0]))
        self._volumes = volumes[: config.validation.volumes]

    def __call__(self, state: State, step: int) -> Validation:
        """Predicts all held-out volumes in batches of the training's size.

        The last batch is filled up with volumes from the start, which are not counted again:
        the batch norm needs batches of one size.
        """
        size = self._config.batch_size
        similarities: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        spreads: list[float] = []
        for start in range(0, len(self._volumes), size):
            batch = self._samples(
                (start + row) % len(self._volumes) for row in local_rows(size, self._mesh)
            )
            placed = to_devices(batch, size, self._mesh)
            if self._predict is None:
                self._predict = compile_together(self._jitted, state, placed)
            found = jax.device_get(self._predict(state, placed))
            count = min(size, len(self._volumes) - start)
            similarities.extend(found.similarities[:count])
            labels.extend(found.labels[:count])
            spreads.append(float(found.spread))
        metrics = measure(
            np.concatenate(similarities), np.concatenate(labels), float(np.mean(spreads))
        )
        entry, cache = self._volumes[0]
        shown = self._sample(0)
        image = draw_positions(
            dequantise(cache.read(entry, shown["corner"])),
            shown["origins"],
            labels[0],
            similarities[0],
            grid=self._config.crops.grid,
            crop_size=self._config.crops.crop_size,
            title=(
                f"{entry.id}, step {step}: position accuracy of all held-out volumes "
                f"{metrics.accuracy:.0%} (chance {metrics.chance:.0%})"
            ),
        )
        return Validation(metrics, image)

    def _sample(self, row: int) -> Sample:
        entry, cache = self._volumes[row]
        return held_out_sample(
            cache,
            entry,
            self._config.crops,
            sub_volumes=self._config.validation.sub_volumes,
            seed=self._config.seed,
        )

    def _samples(self, rows: Iterable[int]) -> dict[str, np.ndarray]:
        samples = [self._sample(row) for row in rows]
        return {
            "subs": np.stack([sample["subs"] for sample in samples]),
            "bases": np.stack([sample["bases"] for sample in samples]),
            "labels": np.stack([sample["labels"] for sample in samples]),
        }


def save_picture(image: np.ndarray, path: Path) -> None:
    """Writes a PNG.

    Raises:
        InputError: it cannot be written.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
