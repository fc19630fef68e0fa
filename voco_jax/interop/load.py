"""A weight file into a model's parameters: all of it, or an error that says what did not fit."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

import numpy as np

from voco_jax.errors import InputError
from voco_jax.interop.architecture import Size, causes, recognise, window_of
from voco_jax.interop.card import check_card
from voco_jax.interop.files.weights import read_weights
from voco_jax.interop.match import MatchReport, grouped, printable
from voco_jax.interop.names import Params, from_torch, torch_shapes

TABLE = ".relative_position_bias_table"
INDEX = ".relative_position_index"
"""MONAI's buffer beside each table: which row belongs to which pair of tokens."""


def load_into(
    params_template: Params,
    path_or_tensors: str | PathLike[str] | Mapping[str, np.ndarray],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    network: str = "teacher",
    *,
    window_size: Size | None = None,
    patch_merging: str | None = None,
) -> tuple[dict[str, Any], MatchReport]:
    """Copies weights into a parameter tree.

    Args:
        params_template: the model's parameters, nested dicts of arrays; not changed.
        path_or_tensors: a weight file, or what `weights.read` returned for one.
        allow_missing: patterns as in shells, of PyTorch names that the file may lack; these
            parameters keep the template's values.
        allow_unexpected: patterns of names in the file that are left aside; a name of another
            shape is, if both kinds of patterns allow it.
        network: `teacher` or `student`, where the file holds both.
        window_size: the model's; without it a cube is assumed in checking the file's
            `relative_position_index`.
        patch_merging: the model's; compared with the card beside the file, where there is one.

    Returns:
        A tree like the template, NumPy arrays where the file had values; and what matched.

    Raises:
        InputError: anything missing, unexpected or of another shape that no pattern allows,
            nothing matched at all, values that are not finite, another window or patch merging; the
            message holds the likely cause and the whole report.
    """
    notes: list[str] = []
    if isinstance(path_or_tensors, Mapping):
        source, tensors = "the weights", dict(path_or_tensors)
    else:
        source = str(path_or_tensors)
        notes += check_card(path_or_tensors, patch_merging)
        weights = read_weights(path_or_tensors, network)
        tensors, selection = dict(weights.tensors), weights.selection
        if selection.network is not None:
            notes.append(f"of {' and '.join(selection.networks)}, the {selection.network} was read")
        if selection.set_aside:
            listed = ", ".join(selection.set_aside[:20])
            notes.append(f"not weights, left aside: {listed}")
    shapes = {name: array.shape for name, array in tensors.items()}
    expected = torch_shapes(params_template)
    wrong_windows = _take_indices(tensors, expected, window_size)
    params, report = from_torch(tensors, params_template, source)
    report = dataclasses.replace(report, notes=tuple(notes))
    missing = _not_allowed(report.missing, allow_missing)
    unexpected = _not_allowed(report.unexpected, allow_unexpected)
    wrong_shape = [
        wrong
        for wrong in report.wrong_shape
        if _not_allowed([wrong.name], allow_missing) or _not_allowed([wrong.name], allow_unexpected)
    ]
    problems = [
        f"{len(names)} {what}"
        for names, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (wrong_shape, "of another shape"),
            (wrong_windows, "relative_position_index of another window"),
        )
        if names
    ]
    if not report.matched:
        problems.append("nothing matched")
    if problems:
        raise InputError(
            f"{printable(source)} does not fit the model: {', '.join(problems)} (allowed by "
            f"pattern: {[*allow_missing, *allow_unexpected] or 'nothing'})\n"
            + "".join(
                f"likely cause: {cause}\n"
                for cause in causes(recognise(shapes), recognise(expected))
            )
            + "".join(f"another window: {line}\n" for line in grouped(wrong_windows))
            + report.text()
        )
    broken = [name for name in report.matched if not np.isfinite(tensors[name]).all()]
    if broken:
        raise InputError(
            f"{printable(source)}: found NaN or infinite values in {'; '.join(grouped(broken))}, "
            "expected finite weights; take an earlier checkpoint of that training"
        )
    return params, report


def _take_indices(
    tensors: dict[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    window_size: Size | None,
) -> list[str]:
    """Takes MONAI's index buffers out of the tensors; returns the names of those that are wrong."""
    from voco_jax.models.windows import relative_position_index

    wrong: list[str] = []
    for name in [name for name in tensors if name.endswith(INDEX)]:
        table = expected.get(name.removesuffix(INDEX) + TABLE)
        if table is None:
            continue  # of a block that the model has not: unexpected
        window = window_size or window_of(table[0], None)
        if window is None or (window_size is None and len(set(window)) > 1):
            del tensors[name]  # the order of the axes is not known
            continue
        array = tensors.pop(name)
        tokens = math.prod(window)
        if array.shape != (tokens, tokens) or (array != relative_position_index(window)).any():
            wrong.append(name)
    return wrong


def _not_allowed(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
