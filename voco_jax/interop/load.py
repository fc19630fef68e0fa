"""A weight file into a model's parameters: all of it, or an error that says what did not fit."""

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

import numpy as np

from voco_jax.errors import InputError
from voco_jax.interop.card import check_card
from voco_jax.interop.files.weights import read_weights
from voco_jax.interop.layout import Selection, extraction
from voco_jax.interop.match import MatchReport, grouped, printable
from voco_jax.interop.names import from_torch, torch_shapes
from voco_jax.models.encoder import CLASSIFIER, PROJECTOR, Settings, Shapes, classifier_sizes
from voco_jax.models.encoders import find_encoder
from voco_jax.types import Params


def load_into(
    params_template: Params,
    path_or_tensors: str | PathLike[str] | Mapping[str, np.ndarray],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    network: str = "teacher",
    *,
    model: Settings,
) -> tuple[dict[str, Any], MatchReport]:
    """Copies weights into a parameter tree.

    Filters of the image of a file of one channel are spread over a model's several: repeated, and
    divided by their number, so that equal channels give what the one gave. A note says so.

    Args:
        params_template: the model's parameters, nested dicts of arrays; not changed. Of any
            network in `models.network`, or of an encoder alone.
        path_or_tensors: a weight file, or what `weights.read` returned for one.
        allow_missing: patterns as in shells, of PyTorch names that the file may lack; these
            parameters keep the template's values.
        allow_unexpected: patterns of names in the file that are left aside; a name of another
            shape is, if both kinds of patterns allow it.
        network: `teacher` or `student`, where the file holds both.
        model: the model's settings, as the config's `model` section: compared with what the file
            and the card beside it, where there is one, say of them.

    Returns:
        A tree like the template, NumPy arrays where the file had values; and what matched.

    Raises:
        InputError: anything missing, unexpected or of another shape that no pattern allows,
            nothing matched at all, whole numbers in place of weights, values that are not finite
            in float32, buffers or a card of another model; the message holds the likely cause and
            the complete report.
    """
    notes: list[str] = []
    selection = None
    if isinstance(path_or_tensors, Mapping):
        source, tensors = "the weights", dict(path_or_tensors)
    else:
        source = str(path_or_tensors)
        notes += check_card(path_or_tensors, model)
        tensors, selection = read_weights(path_or_tensors, network)
        notes += _selection_notes(selection)
    expected = torch_shapes(params_template)
    encoder = find_encoder(model.encoder)
    whole = {name: array.dtype for name, array in tensors.items() if array.dtype.kind in "biu"}
    notes += _spread_stem(tensors, expected, encoder.stem)
    shapes = {name: array.shape for name, array in tensors.items()}
    other_buffers = [
        name
        for name, buffer in encoder.buffers(model, expected).items()
        if name in tensors and not np.array_equal(tensors.pop(name), buffer)
    ]
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
            (other_buffers, "buffers with other values"),
        )
        if names
    ]
    if not report.matched:
        problems.append("nothing matched")
    if problems:
        causes = _prefix_causes(shapes, expected, source, selection)
        if not causes:
            causes = encoder.causes(shapes, expected, other_buffers)
            causes += _projector_causes(shapes, expected) + _classifier_causes(shapes, expected)
        allowed = (("missing", allow_missing), ("unexpected", allow_unexpected))
        patterns = [f"init.allow_{what}={tuple(names)}" for what, names in allowed]
        raise InputError(
            f"{printable(source)} does not fit the model: {', '.join(problems)} "
            f"(with {' and '.join(patterns)})\n"
            + "".join(f"likely cause: {cause}\n" for cause in causes)
            + "".join(f"other values: {line}\n" for line in grouped(other_buffers))
            + report.text()
        )
    _check_values(source, tensors, report.matched, whole)
    return params, report


def _selection_notes(selection: Selection) -> list[str]:
    notes = []
    if selection.network is not None:
        notes.append(f"of {' and '.join(selection.networks)}, the {selection.network} was read")
    renamed = [name for name, key in selection.sources.items() if not key.endswith(name)]
    if renamed:
        notes.append(
            f"{len(renamed)} names are written otherwise in the file, as "
            f"{selection.sources[renamed[0]]} for {renamed[0]}"
        )
    if selection.set_aside:
        notes.append(f"not weights, left aside: {', '.join(selection.set_aside[:20])}")
    return notes


def _check_values(
    source: str,
    tensors: Mapping[str, np.ndarray],
    matched: Sequence[str],
    whole: Mapping[str, np.dtype],
) -> None:
    """Checks that all that matched are numbers of a network in float32.

    Args:
        source: the file, for messages.
        tensors: by name.
        matched: names of those that are taken.
        whole: the dtype of those that hold whole numbers in the file.

    Raises:
        InputError: they are not; the message names them.
    """
    file = printable(source)
    quantized = [name for name in matched if name in whole]
    if quantized:
        raise InputError(
            f"{file}: found {', '.join(sorted({str(whole[name]) for name in quantized}))} in "
            f"{_some(quantized)}, expected weights in floating point; take the file of the "
            "network before it was quantized, in float32, float16 or bfloat16"
        )
    broken = [name for name in matched if not np.isfinite(tensors[name]).all()]
    if broken:
        raise InputError(
            f"{file}: found NaN or infinite values in {_some(broken)}, expected finite "
            "weights; take an earlier checkpoint of that training"
        )
    largest = np.finfo(np.float32).max
    for name in matched:
        values = tensors[name]
        if values.dtype.itemsize > 4 and np.abs(values).max(initial=0) > largest:
            value = values.flat[np.abs(values).argmax()]
            raise InputError(
                f"{file}: found {value} in {printable(name)} ({values.dtype}), expected values "
                f"that float32 can hold, to {largest}; take an earlier checkpoint of that training"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(grouped(names[:5])) + more


def _spread_stem(tensors: dict[str, np.ndarray], model: Shapes, stem: Sequence[str]) -> list[str]:
    """Spreads filters of one channel over the model's, in place; see `Encoder.stem`."""
    spread, channels = [], 1
    for name in stem:
        if name not in tensors or name not in model:
            continue
        out, channels, *space = model[name]
        if channels > 1 and tensors[name].shape == (out, 1, *space):
            tensors[name] = np.repeat(tensors[name], channels, axis=1) / channels
            spread.append(name)
    if not spread:
        return []
    return [
        f"the file is of 1 input channel, the model of {channels}: repeated for each and divided "
        f"by their number: {', '.join(spread)}"
    ]


def _prefix_causes(
    file: Shapes, model: Shapes, source: str, selection: Selection | None
) -> list[str]:
    """Whether most names fit but for a prefix that `layout` does not know."""
    found: dict[str, list[str]] = {}
    for name, shape in file.items():
        parts = name.split(".")
        rests = (".".join(parts[start:]) for start in range(1, len(parts)))
        rest = next((rest for rest in rests if model.get(rest) == shape), None)
        if name not in model and rest is not None:
            found.setdefault(name.removesuffix(rest), []).append(name)
    prefix, names = max(found.items(), key=lambda item: len(item[1]), default=("", []))
    if not names or 2 * len(names) < len(file):
        return []
    cause = f"{len(names)} names differ from the model's by the prefix {printable(prefix)!r} alone"
    if selection is None:
        return [f"{cause}: take it away"]
    wrappers = selection.wrappers[0].split(".") if selection.wrappers else []
    key = selection.sources[names[0]].removeprefix("".join(f"{one}." for one in wrappers))
    front = key.removesuffix(names[0].removeprefix(prefix))
    return [f"{cause}: take it away with: {extraction(source, wrappers, front)}"]


def _projector_causes(file: Shapes, model: Shapes) -> list[str]:
    theirs, ours = (one.get(f"{PROJECTOR}.layer1.0.weight", (None,))[0] for one in (file, model))
    if theirs == ours:
        return []
    if theirs is None:
        return [
            "the file has no projector (published weights have none): to start it at random allow "
            f"missing '{PROJECTOR}.*'"
        ]
    if ours is None:
        return [f"the file has a projector, the model has not: allow unexpected '{PROJECTOR}.*'"]
    return [
        f"the file's projector is {theirs} wide, the model's {ours}: set "
        f"projector_size={theirs} or take another file"
    ]


def _classifier_causes(file: Shapes, model: Shapes) -> list[str]:
    theirs, ours = classifier_sizes(file), classifier_sizes(model)
    if theirs == ours:
        return []
    if not theirs:
        return [
            "the file has no classifier (a pre-trained encoder): to start it at random allow "
            f"missing '{CLASSIFIER}.*'"
        ]
    if not ours:
        return [f"the file has a classifier, the model has not: allow unexpected '{CLASSIFIER}.*'"]
    return [
        f"the file's classifier has layers {theirs}, the model's {ours}: to start it at random "
        f"allow missing and unexpected '{CLASSIFIER}.*'"
    ]


def _not_allowed(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
