"""Which labelled volumes are trained on and which are held out, patient by patient."""

import hashlib
import re
from collections.abc import Mapping, Sequence

from voco_jax.config.finetuning import LabelledData
from voco_jax.data.manifest import Entry
from voco_jax.errors import InputError


def split_patients(
    entries: Sequence[Entry], data: LabelledData, seed: int
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Training and held-out volumes; all of a patient are on one side.

    With folds all volumes are dealt out to them, those of the lists' "validation" too, and one fold
    is held out; where the lists give every volume a "fold", it belongs to that. Else "validation"
    is held out, and of the others the share `data.held_out`. Of the rest the share
    `data.labelled_fraction` is trained on; a smaller share is part of a larger one.

    Args:
        entries: of the cache.
        data: the config's section.
        seed: of the order in which patients are dealt out, and left out.

    Returns:
        (training, held-out), each in order of id.

    Raises:
        InputError: nothing is left to train on or to hold out, ids without a patient, or lists with
            other folds, or a patient in two of them.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(patient_of(entry.id, data.patient), []).append(entry)
    order = sorted(groups, key=lambda patient: _hash(f"{seed}/{patient}"))
    if data.folds and all(entry.fold is not None for entry in entries):
        held_out = _listed_fold(groups, data)
    elif data.folds:
        if data.folds > len(order):
            raise InputError(
                f"data.folds: found {data.folds} for {len(order)} patients, expected at most one "
                "fold for each"
            )
        held_out = set(order[data.fold :: data.folds])
    else:
        listed = {p for p in order if any(e.section == "validation" for e in groups[p])}
        others = [patient for patient in order if patient not in listed]
        count = max(1, round(data.held_out * len(others))) if data.held_out > 0 else 0
        held_out = {*listed, *others[:count]}
    training = [patient for patient in order if patient not in held_out]
    kept = set(training[: max(1, round(data.labelled_fraction * len(training)))])
    if not kept:
        raise InputError(
            f"data: all {len(order)} patients of the cache are held out, expected at least one to "
            "train on; prepare more volumes or lower data.held_out"
        )
    by_id = sorted((entry for entry in entries), key=lambda entry: entry.id)
    return (
        tuple(e for e in by_id if patient_of(e.id, data.patient) in kept),
        tuple(e for e in by_id if patient_of(e.id, data.patient) in held_out),
    )


def _listed_fold(groups: Mapping[str, Sequence[Entry]], data: LabelledData) -> set[str]:
    """The patients of the lists' fold number `data.fold`."""
    folds = {patient: {entry.fold for entry in own} for patient, own in groups.items()}
    found = sorted({fold for own in folds.values() for fold in own if fold is not None})
    if found != list(range(data.folds)):
        raise InputError(
            f"data.folds: found {data.folds}, but the lists have the folds "
            f"{', '.join(map(str, found))}, expected as many, from 0"
        )
    for patient, own in folds.items():
        if len(own) > 1:
            raise InputError(
                f"data.patient: the lists have {patient} in the folds {', '.join(map(str, own))}, "
                "expected all volumes of a patient in one"
            )
    return {patient for patient, own in folds.items() if own == {data.fold}}


def patient_of(volume_id: str, pattern: str) -> str:
    """The patient that a volume is of: the first group of a pattern in its id.

    Args:
        volume_id: of the manifest.
        pattern: a regular expression; "": every volume is a patient of its own.

    Raises:
        InputError: it is no such pattern, or is not in the id.
    """
    if not pattern:
        return volume_id
    try:
        found = re.search(pattern, volume_id)
        if found is not None:
            return found[1]
        problem = f"it is not in the id {volume_id!r}"
    except (re.error, IndexError) as error:
        problem = str(error)
    raise InputError(
        f"data.patient: found {pattern!r}, expected a pattern with a group that is the patient, as "
        rf"'(patient_\d+)', in the id of every volume: {problem}"
    )


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode()).digest()
