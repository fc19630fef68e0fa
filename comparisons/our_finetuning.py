"""Our side of finetune_against_monai.py, each part for a process of its own; needs no PyTorch.

    python -m comparisons.our_finetuning FILE    # JSON of what to run; the result takes its place

is how finetune_against_monai.py starts it under another Python, whose JAX may be a newer one.
Settings travel as plain values, folders as text.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from comparisons.our_step import save_arrays
from voco_jax import large_pages
from voco_jax.benchmark.measure import (
    ChildError,
    in_own_process,
    peak_resident,
    time_calls,
    write_json,
)
from voco_jax.config.finetuning import SegmentationFinetuning
from voco_jax.config.load import parse
from voco_jax.data.progress import log
from voco_jax.errors import InputError

BATCHES, WEIGHTS, IMAGE = "batches.npz", "weights.safetensors", "image.nii.gz"
MASK, MONAI_MASK = "mask.nii.gz", "monai.npy"


def read_settings(config: Mapping[str, Any], folder: str) -> SegmentationFinetuning:
    """The experiment of plain values, with its data in a folder.

    Raises:
        InputError: impossible settings, or another task's.
    """
    experiment = parse(config, folder)
    if not isinstance(experiment, SegmentationFinetuning):
        raise InputError(f"task: found {experiment.task!r}, expected 'segmentation'")
    return experiment


def save_batches(config: Mapping[str, Any], folder: str, count: int) -> None:
    """Leaves random weights and the first batches of a run for both sides.

    Args:
        config: settings; its data are prepared here.
        folder: gets WEIGHTS with its card, and BATCHES: images and labels (count, b, x, y, z).
        count: of batches.

    Raises:
        InputError: settings or data that cannot be used.
    """
    from voco_jax.finetune.segmentation import make_program, make_task
    from voco_jax.training.mesh import make_mesh

    experiment = read_settings(config, folder)
    program = make_program(experiment, make_mesh(experiment.mesh.fsdp))
    with contextlib.redirect_stdout(sys.stderr):
        task = make_task(experiment, program, workdir=Path(folder), resumes=False, log=log)
    batches = list(itertools.islice(task.batches(0), count))
    names = ("images", "labels")
    stacked = {name: np.stack([one[name] for one in batches]) for name in names}
    save_arrays(Path(folder, BATCHES), stacked)
    save_weights(config, folder)


def save_weights(config: Mapping[str, Any], folder: str) -> None:
    """Leaves the random weights with which a run would begin, and their card.

    Raises:
        InputError: settings that the network cannot take.
    """
    from voco_jax.finetune.segmentation import make_program
    from voco_jax.interop.export import Card, export
    from voco_jax.training.mesh import fetch, make_mesh

    program = make_program(read_settings(config, folder), make_mesh(1))
    card = Card(config=config, step=0, network="params", data_fingerprint="")
    export(fetch(program.init().params, program.mesh), Path(folder, WEIGHTS), card)


def run_steps(
    config: Mapping[str, Any], folder: str, steps: int, warmup: int, wide: bool
) -> dict[str, Any]:
    """Times our step on the batches in a folder, one after the other, from the weights there.

    Args:
        config: settings.
        folder: of `save_batches`; at least warmup + steps batches.
        steps: timed.
        warmup: updates before those.
        wide: compute in float64, with JAX_ENABLE_X64=true and images in float16, which nothing
            rounds.

    Raises:
        InputError: settings that the network cannot take.
    """
    import jax

    from voco_jax.finetune.segmentation import make_program
    from voco_jax.interop.load import load_into
    from voco_jax.training import mesh as meshes

    experiment = read_settings(config, folder)
    if wide:
        experiment = _widened(experiment)
    program = make_program(experiment, meshes.make_mesh(experiment.mesh.fsdp))
    state = program.init()
    params, _ = load_into(state.params, Path(folder, WEIGHTS), model=experiment.model)
    state = dataclasses.replace(state, params=jax.device_put(params))
    if wide:
        wider = {"float32": "float64", "int32": "int64"}  # a rate is as exact as the count
        both = (state.params, state.optimizer)
        both = jax.tree.map(lambda x: x.astype(wider[str(x.dtype)]), both)
        state = dataclasses.replace(state, params=both[0], optimizer=both[1])
    data = np.load(Path(folder, BATCHES))
    images, labels = data["images"], data["labels"]
    sharding, size = meshes.batch_sharding(program.mesh), experiment.batch_size
    begin = time.perf_counter()
    with _exact_bias_correction() if wide else contextlib.nullcontext():
        compiled = program.step.lower(state, program.batch).compile()
    compile_seconds = time.perf_counter() - begin
    losses: list[Any] = []

    def call() -> Any:
        nonlocal state
        number = len(losses)
        batch = {"images": images[number], "labels": labels[number]}
        state, metrics = compiled(state, meshes.to_devices(batch, sharding, size))
        losses.append(metrics["loss"])
        return metrics["loss"]

    samples = time_calls(call, jax.block_until_ready, warmup, steps)
    return {
        "losses": [float(loss) for loss in losses],
        "samples": samples,
        "compile_seconds": compile_seconds,
        "peak": peak_resident(),
        "version": f"jax {jax.__version__}",
    }


def _widened(experiment: SegmentationFinetuning) -> SegmentationFinetuning:
    """With a network in float64, which no config can ask for, because nothing is trained so."""
    model = copy.copy(experiment.model)
    object.__setattr__(model, "dtype", "float64")
    return dataclasses.replace(experiment, model=model)


def _exact_bias_correction() -> Any:
    """Our optimizer's is in float32 otherwise, whatever the parameters are."""
    return mock.patch(
        "voco_jax.training.optimizer._bias_correction", lambda beta, step: 1.0 - beta**step
    )


def save_volume(folder: str, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """Leaves an enlarged phantom CT as IMAGE, int16 in the axes LPS.

    Args:
        folder: gets it.
        shape: voxels x y z.
        spacing: mm, as the header says.
    """
    import nibabel

    from voco_jax.data.formats.readers import load
    from voco_jax.data.phantom import make_phantoms
    from voco_jax.data.resample import resize
    from voco_jax.data.volumes import AIR, orient_ras

    made = json.loads(make_phantoms(Path(folder, "phantoms"), 1, seed=0).read_text("utf-8"))
    phantom = orient_ras(load(Path(folder, "phantoms", made["training"][0]["image"])))
    x, y, z = shape
    voxels = np.maximum(resize(phantom.hounsfield(phantom.voxels), (x, y, z)), AIR)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    voxels += 15 * noise  # HU: enlarging has smoothed the phantom's own away
    image = nibabel.Nifti1Image(np.rint(voxels).astype(np.int16), np.diag([*spacing, 1.0]))
    turn = nibabel.orientations.axcodes2ornt("LPS")
    nibabel.save(image.as_reoriented(turn), Path(folder, IMAGE))


def predict(folder: str, overlap: float) -> dict[str, Any]:
    """Segments IMAGE with WEIGHTS as voco_jax.evaluation.predict does, into MASK; seconds of parts.

    Args:
        folder: of `save_weights` and `save_volume`; gets the mask.
        overlap: of neighbouring windows, as a share of one.
    """
    import jax

    from voco_jax.data.formats import readers
    from voco_jax.evaluation.masks import write_mask
    from voco_jax.evaluation.predict import load_segmenter

    begin = time.perf_counter()
    segmenter = load_segmenter([Path(folder, WEIGHTS)], overlap=overlap, window="gaussian")
    size, dtype = segmenter.experiment.crops.size, segmenter.experiment.data.dtype
    jax.block_until_ready(segmenter.predict(np.zeros((1, *size, 1), dtype)))
    compile_seconds = time.perf_counter() - begin
    starts: list[float] = []
    ends: list[float] = []

    def timed(parts: np.ndarray) -> jax.Array:
        starts.append(time.perf_counter())
        return jax.block_until_ready(segmenter.predict(parts))

    def progress(done: int, total: int) -> None:
        ends.append(time.perf_counter())

    begin = time.perf_counter()
    stored = readers.load(Path(folder, IMAGE))
    read = time.perf_counter()
    labels = dataclasses.replace(segmenter, predict=timed)([stored], progress)
    done = time.perf_counter()
    windows = sum(ends) - sum(starts)
    peak = peak_resident()
    write_mask(labels, stored, Path(folder, MASK))
    return {
        "seconds": {
            "reading": read - begin,
            "preparing": starts[0] - read,
            "windows": windows,
            "to the file's grid": done - starts[0] - windows,
            "all": done - begin,
        },
        "windows": len(starts),
        "compile_seconds": compile_seconds,
        "peak": peak,
        "version": f"jax {jax.__version__}",
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one for one in (run_steps, predict)
}


def run_part(python: str | None, name: str, folder: str, **how: Any) -> dict[str, Any]:
    """Runs one of PARTS in a process of its own.

    Args:
        python: to run it; None: this one.
        name: of the part.
        folder: its argument.
        how: its other arguments.

    Raises:
        InputError: the part raised it, in this Python.
        ChildError: it came to no result.
    """
    environment = {large_pages.VARIABLE: large_pages.VALUE}  # as main.py has it
    if python is None:
        with mock.patch.dict(os.environ, environment):
            return in_own_process(PARTS[name], folder=folder, **how)
    file = Path(folder, "part.json")
    write_json(file, {"name": name, "folder": folder, **how})
    try:
        command = [python, "-m", "comparisons.our_finetuning", str(file)]
        status = subprocess.run(command, env={**os.environ, **environment}).returncode
    except OSError as error:
        raise InputError(f"--python: {python}: {error.strerror}") from error
    if status:
        raise ChildError(f"{python} ended with exit status {status}")
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def main() -> None:
    """Reads what `run_part` wrote, runs it, and writes what was found."""
    file = Path(sys.argv[1])
    how = json.loads(file.read_text("utf-8"))
    write_json(file, PARTS[how.pop("name")](**how))


if __name__ == "__main__":
    main()
