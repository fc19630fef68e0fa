"""Segments images with fine-tuned weights: masks on the images' own grids, in millilitres too.

    python -m voco_jax.evaluation.predict --weights W.safetensors --input ct.nii.gz --output masks

Takes files, folders of files and DICOM series, in any format that is read. The card beside the
weights says how images are prepared and what the classes are; for weights without one name a config
file. Of each image it writes a mask as NIfTI (with the header of a NIfTI image, else with the
image's affine), statistics.json (ml, mean and standard deviation of the image's values per class)
and report.json (versions, device, weights, seconds, files).

Memory is one window's thickness of scores for all classes, whatever the length of the scan. Exit
status: 0; 1 if an image failed; 2 for bad input.
"""

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
import nibabel
import numpy as np
from flax import linen as nn
from tqdm import tqdm

import voco_jax
from voco_jax.config.finetuning import Finetuning
from voco_jax.config.load import command_parser, load, parse, parse_arguments, positive
from voco_jax.data.formats import readers
from voco_jax.data.formats.stored import StoredVolume, VolumeError
from voco_jax.data.volumes import file_positions, orient_ras, prepare_stored, quantise
from voco_jax.errors import InputError
from voco_jax.evaluation.masks import find
from voco_jax.evaluation.sliding_window import Grid, Windows, segment
from voco_jax.evaluation.statistics import statistics
from voco_jax.files import write_atomically
from voco_jax.interop.card import file_sha256, read_card
from voco_jax.interop.load import load_into
from voco_jax.models.attention import attend
from voco_jax.models.encoders import build_segmentation_network
from voco_jax.models.initial_values import describe_parameters
from voco_jax.training.compile import compiler_options
from voco_jax.training.images import to_unit
from voco_jax.training.mesh import make_mesh


@dataclass(frozen=True)
class Segmenter:
    """Fine-tuned networks, ready to segment volumes.

    Attributes:
        experiment: that made them: chain, classes, crop size.
        weights: their files.
        predict: see `sliding_window.Predict`.
        windows: how a volume is covered.
    """

    experiment: Finetuning
    weights: tuple[Path, ...]
    predict: Callable[[np.ndarray], jax.Array]
    windows: Windows

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, the background first."""
        return self.experiment.data.classes

    def __call__(
        self, stored: StoredVolume, progress: Callable[[int, int], None] = lambda *_: None
    ) -> np.ndarray:
        """Segments a volume.

        Args:
            stored: as its file has it.
            progress: told how many windows of all are done.

        Returns:
            The class of each voxel of the file, uint8, in RAS order.

        Raises:
            VolumeError: it is no usable volume.
        """
        chain = next(iter(self.experiment.data.sources.values())).chain
        prepared = prepare_stored(stored, chain)
        voxels = quantise(prepared.voxels, chain.dtype)
        positions = file_positions(
            prepared.shape, prepared.spacing, chain, prepared.box, voxels.shape
        )
        _, labels = segment(voxels, self.predict, self.windows, Grid(positions), progress)
        assert labels is not None
        return labels


def load_segmenter(
    weights: Sequence[str | Path],
    experiment: Finetuning | None = None,
    *,
    overlap: float = 0.5,
    window: str = "gaussian",
    mirror: str = "",
    batch: int = 1,
) -> Segmenter:
    """Loads fine-tuned weights; several are an ensemble, whose logits are averaged.

    Args:
        weights: files, all of one experiment but for seed and fold.
        experiment: that made them; None: as their cards say.
        overlap: of neighbouring windows, as a share of one.
        window: `gaussian` or `constant`.
        mirror: axes, as "xy": also predicts the windows flipped along every set of these.
        batch: windows at a time.

    Raises:
        InputError: files that cannot be read, do not fit, or do not belong together.
    """
    paths = tuple(Path(path) for path in weights)
    found = [experiment or read_experiment(path) for path in paths]
    first = found[0]
    for path, other in zip(paths, found, strict=True):
        for what in ("model", "crops", "chain", "classes"):
            if _part(other, what) != _part(first, what):
                raise InputError(
                    f"{path}: it has another {what} than {paths[0]}, expected weights of one "
                    "experiment; predict with each alone"
                )
    size, device = first.crops.size, jax.devices()[0]
    network = build_segmentation_network(
        first.model, device.platform, len(first.data.classes), attend
    )
    template = nn.unbox(describe_parameters(network, size))
    params = [
        jax.device_put(load_into(template, path, model=first.model)[0], device) for path in paths
    ]
    flips = [
        tuple("xyz".index(axis) + 1 for axis in axes)
        for count in range(len(mirror) + 1)
        for axes in itertools.combinations(mirror, count)
    ]
    options = compiler_options(make_mesh(1, [device]))

    @functools.partial(jax.jit, compiler_options=options)
    def predict(params: Any, images: jax.Array) -> jax.Array:
        unit = to_unit(images)[..., None]
        total = jnp.zeros(())
        for one in params:
            for axes in flips:
                logits = network.apply({"params": one}, jnp.flip(unit, axes), False)
                total = total + jnp.flip(jnp.asarray(logits), axes)
        return total / (len(params) * len(flips))

    windows = Windows(size, overlap, window, batch)  # type: ignore[arg-type]
    return Segmenter(first, paths, functools.partial(predict, params), windows)


def read_experiment(weights: Path) -> Finetuning:
    """The experiment that made a weight file, as its card says.

    Raises:
        InputError: there is no card, or it is of something else.
    """
    if not weights.is_file():
        raise InputError(f"{weights}: no such file, expected fine-tuned weights")
    card = read_card(weights)
    if card is None or "config" not in card:
        raise InputError(
            f"{weights}: found no card beside it ({weights.name}.json), which says how images are "
            "prepared; name the config file that made it with --config"
        )
    try:
        experiment = parse(card["config"])
    except InputError as error:
        raise InputError(f"{weights}: its card is of another version: {error}") from error
    if not isinstance(experiment, Finetuning):
        raise InputError(
            f"{weights}: found weights of task {experiment.task!r}, expected 'segmentation': "
            "fine-tune them first, as with configs/finetune_btcv.py"
        )
    return experiment


def _part(experiment: Finetuning, what: str) -> Any:
    if what in ("model", "crops"):
        return getattr(experiment, what)
    chain = next(iter(experiment.data.sources.values())).chain
    return chain.classes if what == "classes" else chain


def write_mask(labels: np.ndarray, stored: StoredVolume, path: Path) -> None:
    """Writes a mask as NIfTI, voxel for voxel on its image.

    Args:
        labels: RAS.
        stored: the image as its file has it; the header of a NIfTI file is kept.
        path: a .nii.gz file.
    """
    to_file = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.io_orientation(stored.affine)
    )
    voxels = np.ascontiguousarray(nibabel.apply_orientation(labels, to_file))
    image = nibabel.Nifti1Image(voxels, stored.affine)
    original = _nifti_header(stored)
    if original is not None:
        image = nibabel.Nifti1Image(voxels, None, original)
    image.header.set_data_dtype(voxels.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"], image.header["cal_max"] = 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part_{path.name}")
    nibabel.save(image, part)
    part.replace(path)


def _nifti_header(stored: StoredVolume) -> nibabel.Nifti1Header | None:
    """The header of an image that is a NIfTI-1 file of its axes; else None."""
    name = stored.path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return None
    header = nibabel.load(stored.path).header
    if type(header) is not nibabel.Nifti1Header or header.get_data_shape() != stored.voxels.shape:
        return None
    return header.copy()


@dataclass(frozen=True)
class Done:
    """An image and what became of it."""

    input: str
    output: str  # "": it failed
    seconds: float
    problem: str  # "": none


def predict_all(
    segmenter: Segmenter, images: Mapping[str, Path], output: Path, *, preview: bool = False
) -> tuple[list[Done], dict[str, Any]]:
    """Segments images one after the other; one that fails does not stop the others.

    Args:
        segmenter: of `load_segmenter`.
        images: by name.
        output: folder for NAME.nii.gz, and NAME.png.
        preview: whether to draw a picture of each.

    Returns:
        What was done, and the statistics by name.
    """
    names = {name: number for number, name in enumerate(segmenter.classes) if number}
    done, found = [], {}
    for name, path in images.items():
        start = time.monotonic()
        try:
            stored = readers.load(path)
            with tqdm(desc=name, unit="window", leave=False, mininterval=1.0) as shown:

                def progress(count: int, total: int, shown: tqdm = shown) -> None:
                    shown.total = total
                    shown.update(count - shown.n)

                labels = segmenter(stored, progress)
            mask = output / f"{name}.nii.gz"
            write_mask(labels, stored, mask)
            source = orient_ras(stored)
            values = source.hounsfield(source.voxels)
            found[name] = statistics(labels, source.spacing, names, values)
            if preview:
                _draw(labels, values, segmenter, source.spacing, output / f"{name}.png", name)
            done.append(Done(str(path), str(mask), time.monotonic() - start, ""))
            listed = ", ".join(f"{one} {v['volume_ml']:.4g} ml" for one, v in found[name].items())
            print(f"{mask}: {listed} ({done[-1].seconds:.1f} s)", flush=True)
        except VolumeError as error:
            done.append(Done(str(path), "", time.monotonic() - start, error.reason))
            print(f"failed: {error}", file=sys.stderr, flush=True)
    return done, found


def _draw(
    labels: np.ndarray,
    values: np.ndarray,
    segmenter: Segmenter,
    spacing: tuple[float, float, float],
    path: Path,
    title: str,
) -> None:
    from voco_jax.report.preview import draw_preview
    from voco_jax.training.metrics import save_picture

    save_picture(draw_preview(values, labels, segmenter.classes, spacing, title), path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m voco_jax.evaluation.predict",
        __doc__,
        """
--weights runs/btcv/segmentation.safetensors --input ct.nii.gz --output masks
--weights fold_0.safetensors fold_1.safetensors --input dicom_series --output masks --preview
--weights monai.pt --config configs/finetune_btcv.py --input scans --output masks --mirror x
""",
    )
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="FILE", help="several: an ensemble")
    add("--input", required=True, metavar="PATH", help="image, folder of images, DICOM series")
    add("--output", required=True, metavar="DIR", help="folder for what is written")
    add("--config", metavar="PY", help="config file of weights without a card")
    add("--overlap", type=float, default=0.5, help="of windows, 0 to 0.9; default %(default)s")
    add(
        "--window",
        choices=("gaussian", "constant"),
        default="gaussian",
        help="weights of a window's voxels where windows overlap; default %(default)s",
    )
    add("--mirror", default="", metavar="AXES", help="also predict flipped, as x or xyz")
    add("--batch", type=positive, default=1, help="windows at a time; default %(default)s")
    add("--preview", action="store_true", help="also a picture of each mask")
    try:
        options, overrides = parse_arguments(parser, arguments)
        if not 0 <= options.overlap <= 0.9:
            raise InputError(f"--overlap: found {options.overlap}, expected 0 to 0.9")
        if set(options.mirror) - set("xyz") or len(set(options.mirror)) < len(options.mirror):
            raise InputError(f"--mirror: found {options.mirror!r}, expected some of x, y, z")
        experiment = _experiment(options.config, overrides)
        images = find(options.input)
        start = time.monotonic()
        segmenter = load_segmenter(
            options.weights,
            experiment,
            overlap=options.overlap,
            window=options.window,
            mirror=options.mirror,
            batch=options.batch,
        )
        output = Path(options.output)
        try:
            done, found = predict_all(segmenter, images, output, preview=options.preview)
            _write_json(output / "statistics.json", found)
            settings = {name: value for name, value in vars(options).items() if name != "weights"}
            report = _report(segmenter, done, settings, time.monotonic() - start)
            _write_json(output / "report.json", report)
        except OSError as error:
            raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = sum(not one.output for one in done)
    print(f"{len(done) - failed} of {len(done)} images segmented; {output / 'report.json'}")
    return int(failed > 0)


def _experiment(config: str | None, overrides: Mapping[str, str]) -> Finetuning | None:
    if config is None:
        if overrides:
            raise InputError(f"--config.{next(iter(overrides))}: found it without --config FILE")
        return None
    experiment = load(config, overrides)
    if not isinstance(experiment, Finetuning):
        raise InputError(f"{config}: task: found {experiment.task!r}, expected 'segmentation'")
    return experiment


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _report(
    segmenter: Segmenter, done: Sequence[Done], settings: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "voco_jax": voco_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "weights": [{"file": str(p), "sha256": file_sha256(p)} for p in segmenter.weights],
        "classes": list(segmenter.classes),
        "settings": dict(settings),
        "seconds": round(seconds, 3),
        "files": [vars(one) for one in done],
    }


if __name__ == "__main__":
    sys.exit(main())
