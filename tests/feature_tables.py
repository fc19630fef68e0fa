"""Feature tables made up for tests."""

import hashlib

import numpy as np

from voco_jax.evaluation.features import FeatureTable


def make_table(vectors, volumes, ids=None, weights="trained", **columns):
    """A row for each vector, of kind "volume", or "crop" where ids are given."""
    rows = len(vectors)
    given = {
        "kind": ["crop" if ids else "volume"] * rows,
        "organ": [None] * rows,
        "corner": [None] * rows,
        "size": [None] * rows,
        "spacing": [(1.0, 1.0, 2.5)] * rows,
        "shape": [(64, 64, 32)] * rows,
        "path": [f"scans/{volume}.nii.gz" for volume in volumes],
        "digest": [hashlib.sha256(volume.encode()).hexdigest() for volume in volumes],
        "manifest": {"weights_file": "voco.safetensors", "input": "scans"},
        **columns,
    }
    return FeatureTable(
        id=list(ids or volumes),
        volume=list(volumes),
        weights=[weights] * rows,
        vectors=np.asarray(vectors, np.float32),
        **given,
    )
