"""A linear probe of held-out volumes at every validation, where labels are at hand."""

from collections.abc import Sequence

import numpy as np

from voco_jax.data.manifest import Entry
from voco_jax.errors import InputError
from voco_jax.evaluation.class_metrics import balanced_accuracy
from voco_jax.evaluation.label_columns import find_row, read_labels
from voco_jax.evaluation.linear_probe import fit_linear_probe

LABEL, PATIENT = "label", "patient"
"""Columns of the CSV file, besides id."""


class LabelProbe:
    """What the features of held-out volumes say about a label."""

    def __init__(self, path: str, volumes: Sequence[Entry]) -> None:
        """Reads the labels.

        Args:
            path: of a CSV file with the columns id and label, and patient if somebody has several
                volumes; without it a volume, or all of a DICOM study, are of one.
            volumes: that are validated on.

        Raises:
            InputError: no such file or columns, or volumes of fewer than two classes with two
                patients each.
        """
        rows = read_labels(path)
        if not all(LABEL in row for row in rows.values()):
            raise InputError(f"validation.probe_labels: {path}: found no column {LABEL}")
        found = [find_row(rows, entry.id) for entry in volumes]
        self._known = [place for place, row in enumerate(found) if row.get(LABEL)]
        names = [found[place][LABEL] for place in self._known]
        patients = [
            found[place].get(PATIENT) or volumes[place].study or volumes[place].id
            for place in self._known
        ]
        self._classes, self._labels = np.unique(names, return_inverse=True)
        _, self._patients = np.unique(patients, return_inverse=True)
        counts = [
            len(np.unique(self._patients[self._labels == number]))
            for number in range(len(self._classes))
        ]
        if len(counts) < 2 or min(counts) < 2:
            listed = ", ".join(map("{} ({})".format, self._classes, counts)) or "none"
            raise InputError(
                f"validation.probe_labels: {path}: found the labels {listed} (patients) for the "
                f"{len(volumes)} held-out volumes, as {volumes[0].id}, expected two or more with "
                "two patients each: check its column id, or raise validation.volumes or "
                "data.held_out"
            )

    def __call__(self, features: np.ndarray) -> dict[str, float]:
        """Balanced accuracy, every patient predicted by a fit to the others.

        Args:
            features: (volumes, features), in the order of `volumes`.

        Returns:
            "probe_accuracy" and, by guessing, "probe_chance".
        """
        own, classes = features[self._known], len(self._classes)
        probe = fit_linear_probe(own, self._labels, self._patients, classes)
        told = balanced_accuracy(self._labels, probe.left_out.argmax(axis=1))
        return {"probe_accuracy": float(told), "probe_chance": 1 / classes}
