"""Classifies images with fine-tuned weights; the command is in predict.py."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from voco_jax.config.finetuning import ClassificationFinetuning
from voco_jax.data.formats import readers
from voco_jax.data.formats.stored import StoredVolume
from voco_jax.data.resample import center_crop
from voco_jax.data.volumes import prepare_stored, quantise
from voco_jax.evaluation.ensemble import Done, compile_mean, first_chain, for_each
from voco_jax.evaluation.journal import Journal
from voco_jax.files import write_atomically
from voco_jax.models.attention import attend
from voco_jax.models.encoders import build_classification_network

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True)
class Classifier:
    """Fine-tuned networks, ready to classify volumes.

    Attributes:
        experiment: that made them: chain, classes, size.
        predict: (b, *size, 1) volumes in the cache's dtype -> probabilities (b, classes) float32.
        take_doubtful: see `volumes.prepare_files`.
    """

    experiment: ClassificationFinetuning
    predict: Callable[[np.ndarray], jax.Array]
    take_doubtful: bool = False

    def __call__(self, stored: StoredVolume) -> np.ndarray:
        """The probabilities of a volume's classes, (classes,) float32.

        Args:
            stored: as its file has it.

        Raises:
            VolumeError: it is no usable volume.
        """
        chain = first_chain(self.experiment)
        (prepared,) = prepare_stored([stored], chain, self.take_doubtful)
        voxels = quantise(prepared.voxels, chain.dtype)
        middle = center_crop(voxels, self.experiment.crops.size)  # as validation does
        return np.asarray(self.predict(middle[None, ..., None]))[0]


def load_classifier(
    weights: Sequence[str | Path],
    experiment: ClassificationFinetuning,
    *,
    mirror: str = "",
    take_doubtful: bool = False,
) -> Classifier:
    """Loads fine-tuned weights; several are an ensemble, whose probabilities are averaged.

    Args:
        weights: files, all of one experiment but for seed and fold.
        experiment: that made them.
        mirror: axes, as "xy": also predicts the volumes flipped along every set of these.
        take_doubtful: see `volumes.prepare_files`.

    Raises:
        InputError: files that cannot be read or do not fit.
    """
    network = build_classification_network(
        experiment.model,
        jax.devices()[0].platform,
        len(experiment.data.classes),
        experiment.head.hidden,
        attend,
    )
    predict = compile_mean(
        experiment, weights, network, mirror, lambda logits, _: jax.nn.softmax(logits)
    )
    return Classifier(experiment, predict, take_doubtful)


def classify_all(
    classifier: Classifier, images: Mapping[str, Path], output: Path, journal: Journal
) -> list[Done]:
    """Classifies images; writes predictions.csv: image, class, a probability for each class.

    Args:
        classifier: of `load_classifier`.
        images: by name.
        output: folder of the table.
        journal: of what was done before.

    Raises:
        OSError: it cannot be written.
    """
    names = classifier.experiment.data.classes
    file = output / PREDICTIONS

    def best(probabilities: Sequence[float]) -> str:
        return names[int(np.argmax(probabilities))]

    def classify(name: str, files: Sequence[Path]) -> tuple[list[float], str]:
        probabilities = classifier(readers.load(files[0])).tolist()
        shown = ", ".join(f"{n} {p:.3f}" for n, p in zip(names, probabilities, strict=True))
        return probabilities, f"{name}: {best(probabilities)} ({shown})"

    files = {name: (path,) for name, path in images.items()}
    done = for_each(files, classify, lambda _: file, journal)
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["image", "predicted", *(f"probability_{name}" for name in names)])
    for name, one in done.items():
        if not one.problem:
            table.writerow([name, best(one.found), *(f"{p:.6f}" for p in one.found)])
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lines.getvalue())
    return list(done.values())
