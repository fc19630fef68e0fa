"""Fine-tuned weights, one file or several, and what is done with them, image by image."""

import functools
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import voco_jax
from voco_jax.config.finetuning import ClassificationFinetuning, Finetuning, SegmentationFinetuning
from voco_jax.config.load import AnyExperiment, load, parse, to_dict
from voco_jax.data.formats.stored import VolumeError
from voco_jax.errors import InputError
from voco_jax.evaluation.journal import Journal, signatures
from voco_jax.files import write_atomically
from voco_jax.interop.card import file_sha256, read_card
from voco_jax.interop.load import load_into
from voco_jax.models.initial_values import describe_parameters
from voco_jax.training.compile import compiler_options
from voco_jax.training.images import to_unit
from voco_jax.training.mesh import make_mesh

FineTuned = SegmentationFinetuning | ClassificationFinetuning
_TASKS = "'segmentation' or 'classification'"


def read_experiments(
    weights: Sequence[str | Path], config: str | None = None, overrides: Mapping[str, str] = {}
) -> FineTuned:
    """The experiment that made some weight files.

    Args:
        weights: the files, all of one experiment but for seed and fold.
        config: file that made them; None: as their cards say.
        overrides: of the config's settings.

    Raises:
        InputError: there is no card, it is of something else, or the files do not belong together.
    """
    if config is None:
        if overrides:
            raise InputError(f"--config.{next(iter(overrides))}: found it without --config FILE")
        return same_experiment(weights)
    experiment = load(config, overrides)
    if not isinstance(experiment, FineTuned):
        raise InputError(f"{config}: task: found {experiment.task!r}, expected {_TASKS}")
    return same_experiment(weights, experiment)


def same_experiment(
    weights: Sequence[str | Path], experiment: FineTuned | None = None
) -> FineTuned:
    """The experiment of weight files that belong together; see `read_experiments`."""
    found = [experiment or _of_card(Path(path)) for path in weights]
    for path, other in zip(weights, found, strict=True):
        for what in ("task", "model", "crops", "chain", "classes"):
            if _part(other, what) != _part(found[0], what):
                raise InputError(
                    f"{path}: it has another {what} than {weights[0]}, expected weights of one "
                    "experiment; predict with each alone"
                )
    return found[0]


def experiment_of_card(weights: Path) -> AnyExperiment:
    """The experiment that made a weight file, as the card beside it says.

    Raises:
        InputError: no such file, no card, or one of another version.
    """
    if not weights.is_file():
        raise InputError(f"{weights}: no such file, expected a weight file")
    card = read_card(weights)
    if card is None or not isinstance(card.get("config"), dict):
        raise InputError(
            f"{weights}: found no card beside it ({weights.name}.json), which says how images are "
            "prepared; name the config file that made it with --config"
        )
    try:
        return parse(card["config"])
    except InputError as error:
        raise InputError(f"{weights}: its card is of another version: {error}") from error


def _of_card(weights: Path) -> FineTuned:
    experiment = experiment_of_card(weights)
    if not isinstance(experiment, FineTuned):
        raise InputError(
            f"{weights}: found weights of task {experiment.task!r}, expected {_TASKS}: fine-tune "
            "them first, as with configs/finetune_btcv.py"
        )
    return experiment


def _part(experiment: FineTuned, what: str) -> Any:
    if what in ("task", "model", "crops"):
        return getattr(experiment, what)
    chain = first_chain(experiment)
    return chain.classes if what == "classes" else chain


def first_chain(experiment: Finetuning) -> Any:
    """The chain with which images are prepared."""
    return next(iter(experiment.data.sources.values())).chain


def compile_mean(
    experiment: Finetuning,
    weights: Sequence[str | Path],
    network: nn.Module,
    mirror: str,
    finish: Callable[[jax.Array, tuple[int, ...]], jax.Array],
) -> Callable[[np.ndarray], jax.Array]:
    """Loads weights; the mean of what their networks say, also of flipped images.

    Args:
        experiment: that made the weights.
        weights: files; several are an ensemble.
        network: of images `b x y z channels` and `train`.
        mirror: axes, as "xy": the images are also flipped along every set of these.
        finish: (logits, flipped axes) -> what is averaged.

    Returns:
        Images (b, x, y, z, c) as cached -> the mean.

    Raises:
        InputError: files that cannot be read or do not fit.
    """
    device = jax.devices()[0]
    shapes = describe_parameters(network, experiment.crops.size, experiment.data.channels)
    template = nn.unbox(shapes)
    params = [
        jax.device_put(load_into(template, path, model=experiment.model)[0], device)
        for path in weights
    ]
    flips = [
        tuple("xyz".index(axis) + 1 for axis in axes)
        for count in range(len(mirror) + 1)
        for axes in itertools.combinations(mirror, count)
    ]
    options = compiler_options(make_mesh(1, [device]))

    @functools.partial(jax.jit, compiler_options=options)
    def predict(params: Any, images: jax.Array) -> jax.Array:
        unit = to_unit(images)
        total = jnp.zeros(())
        for one in params:
            for axes in flips:
                logits = network.apply({"params": one}, jnp.flip(unit, axes), False)
                total = total + finish(jnp.asarray(logits), axes)
        return total / (len(params) * len(flips))

    return functools.partial(predict, params)


@dataclass(frozen=True)
class Done:
    """An image and what became of it."""

    input: str
    output: str  # "": it failed
    seconds: float
    problem: str  # "": none
    found: Any = None  # plain values


def for_each(
    images: Mapping[str, Sequence[Path]],
    function: Callable[[str, Sequence[Path]], tuple[Any, str]],
    output: Callable[[str], Path],
    journal: Journal,
) -> dict[str, Done]:
    """Works on images one after the other; one that fails does not stop the others.

    Args:
        images: the files of each, by name.
        function: (name, files) -> what was found, as plain values, and a line for people.
        output: name -> the file that holds it.
        journal: keeps what was done; what it knows is not done again.
    """
    before = {name: signatures(files) for name, files in images.items()}
    known = {name: journal.find(name, before[name]) for name in images}
    done = {name: Done(**one | {"output": str(output(name))}) for name, one in known.items() if one}
    if done:
        print(f"{len(done)} of {len(images)} images were done before; kept", flush=True)
    for name, files in images.items():
        if name in done:
            continue
        start = time.monotonic()
        try:
            found, line = function(name, files)
            seconds = time.monotonic() - start
            done[name] = Done(str(files[0]), str(output(name)), seconds, "", found)
            journal.add(name, before[name], vars(done[name]))
            print(f"{line} ({seconds:.1f} s)", flush=True)
        except VolumeError as error:
            done[name] = Done(str(files[0]), "", time.monotonic() - start, error.reason)
            print(f"failed: {error}", file=sys.stderr, flush=True)
    return {name: done[name] for name in images}


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, complete or not at all.

    Raises:
        OSError: it cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def describe(
    experiment: Finetuning, weights: Sequence[str | Path], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a prediction was made with, for report.json."""
    return {
        "voco_jax": voco_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "task": experiment.task,
        "weights": [{"file": str(path), "sha256": file_sha256(path)} for path in weights],
        "classes": list(experiment.data.classes),
        "settings": dict(settings),
    }


def open_journal(path: Path, experiment: Finetuning, made_by: Mapping[str, Any]) -> Journal:
    """The journal of a prediction, which is the same only of the same weights and settings.

    Args:
        path: of its file.
        experiment: that made the weights.
        made_by: of `describe`.

    Raises:
        OSError: it cannot be written.
    """
    digests = [one["sha256"] for one in made_by["weights"]]
    same = {name: made_by[name] for name in ("voco_jax", "task", "settings")}
    return Journal(path, {**same, "weights": digests, "experiment": to_dict(experiment)})
