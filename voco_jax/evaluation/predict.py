"""Segments or classifies images with fine-tuned weights.

    python -m voco_jax.evaluation.predict --weights W.safetensors --input ct.nii.gz --output masks

Takes files, folders of files and DICOM series (all in a folder, or those that --series chooses), in
any format that is read. The card beside the weights says what they are for, how images are prepared
and what the classes are; for weights without one name a config file. It writes report.json
(versions, device, weights, seconds, files),

- of a segmentation a mask of each image on its own grid, as NIfTI (with the header of a NIfTI
  image, else with the image's affine) or, of a DICOM series, as DICOM-SEG, and statistics.json (ml,
  mean and standard deviation of the image's values per class);
- of a classification predictions.csv: image, predicted class, a probability for each class.

Images are done one after the other, and journal.jsonl keeps what was found: the same command goes
on where it was, and does what is new; other weights or settings start over.

The memory of a segmentation is one window's thickness of scores for all classes, whatever the
length of the scan. Exit status: 0; 1 if an image failed; 2 for bad input.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from voco_jax.config.finetuning import ClassificationFinetuning, SegmentationFinetuning
from voco_jax.config.load import command_parser, parse_arguments, positive
from voco_jax.data.formats import readers
from voco_jax.data.formats.stored import StoredVolume
from voco_jax.data.volumes import file_positions, orient_ras, prepare_stored, quantise
from voco_jax.errors import InputError
from voco_jax.evaluation.classify import classify_all, load_classifier
from voco_jax.evaluation.dicom_seg import check_highdicom, write_dicom_seg
from voco_jax.evaluation.ensemble import (
    Done,
    compile_mean,
    describe,
    first_chain,
    for_each,
    open_journal,
    read_experiments,
    same_experiment,
    write_json,
)
from voco_jax.evaluation.journal import Journal
from voco_jax.evaluation.masks import find, to_file_axes, write_mask
from voco_jax.evaluation.sliding_window import Grid, Windows, segment
from voco_jax.evaluation.statistics import statistics
from voco_jax.models.attention import attend
from voco_jax.models.encoders import build_segmentation_network
from voco_jax.training.jax_settings import check_jax_settings, prepare_process

JOURNAL = "journal.jsonl"
PredictAll = Callable[[Mapping[str, Path], Journal], list[Done]]
"""(images by name, what was done before) -> what became of each."""


@dataclass(frozen=True)
class Segmenter:
    """Fine-tuned networks, ready to segment volumes.

    Attributes:
        experiment: that made them: chain, classes, crop size.
        weights: their files.
        predict: see `sliding_window.Predict`.
        windows: how a volume is covered.
        take_doubtful: see `volumes.prepare_files`.
    """

    experiment: SegmentationFinetuning
    weights: tuple[Path, ...]
    predict: Callable[[np.ndarray], jax.Array]
    windows: Windows
    take_doubtful: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, the background first."""
        return self.experiment.data.classes

    def __call__(
        self,
        channels: Sequence[StoredVolume],
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> np.ndarray:
        """Segments a volume.

        Args:
            channels: of the image, each as its file has it; of a CT there is one.
            progress: told how many windows of all are done.

        Returns:
            The class of each voxel of the file, uint8, in RAS order.

        Raises:
            VolumeError: it is no usable volume.
        """
        chain = first_chain(self.experiment)
        prepared = prepare_stored(channels, chain, self.take_doubtful)
        voxels = np.stack([quantise(one.voxels, chain.dtype) for one in prepared], axis=-1)
        first, (x, y, z, _) = prepared[0], voxels.shape
        positions = file_positions(first.shape, first.spacing, chain, first.box, (x, y, z))
        del prepared, first
        _, labels = segment(voxels, self.predict, self.windows, Grid(positions), progress)
        assert labels is not None
        return labels


def load_segmenter(
    weights: Sequence[str | Path],
    experiment: SegmentationFinetuning | None = None,
    *,
    overlap: float = 0.5,
    window: str = "gaussian",
    mirror: str = "",
    batch: int = 1,
    take_doubtful: bool = False,
) -> Segmenter:
    """Loads fine-tuned weights; several are an ensemble, whose logits are averaged.

    Args:
        weights: files, all of one experiment but for seed and fold.
        experiment: that made them; None: as their cards say.
        overlap: of neighbouring windows, as a share of one.
        window: `gaussian` or `constant`.
        mirror: axes, as "xy": also predicts the windows flipped along every set of these.
        batch: windows at a time.
        take_doubtful: see `volumes.prepare_files`.

    Raises:
        InputError: files that cannot be read, do not fit, or do not belong together.
    """
    found = same_experiment(weights, experiment)
    if not isinstance(found, SegmentationFinetuning):
        raise InputError(f"{weights[0]}: task: found {found.task!r}, expected 'segmentation'")
    network = build_segmentation_network(
        found.model,
        jax.devices()[0].platform,
        found.data.channels,
        len(found.data.classes),
        attend,
    )
    predict = compile_mean(
        found, weights, network, mirror, lambda logits, axes: jnp.flip(logits, axes)
    )
    windows = Windows(found.crops.size, overlap, window, batch)  # type: ignore[arg-type]
    return Segmenter(found, tuple(map(Path, weights)), predict, windows, take_doubtful)


def find_channels(images: Mapping[str, Path], names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """The files of images with several channels: NAME_CHANNEL.nii.gz, or any other format.

    Args:
        images: files by name.
        names: of the channels.

    Returns:
        For each NAME its files, in the order of `names`; what ends in no channel's name is left
        aside.

    Raises:
        InputError: there is none, or one lacks a channel.
    """
    found: dict[str, dict[str, Path]] = {}
    for name, path in images.items():
        for channel in names:
            if name.endswith(f"_{channel}"):
                found.setdefault(name.removesuffix(f"_{channel}"), {})[channel] = path
    if not found:
        raise InputError(
            f"--input: found no file named by a channel ({', '.join(images)}), expected "
            f"{', '.join(f'NAME_{channel}.nii.gz' for channel in names)} for each image"
        )
    for name, own in found.items():
        if missing := [channel for channel in names if channel not in own]:
            raise InputError(
                f"--input: {name}: found the channels {', '.join(own)}, expected also "
                f"{', '.join(f'{name}_{channel}.nii.gz' for channel in missing)}"
            )
    return {name: tuple(own[channel] for channel in names) for name, own in found.items()}


def segment_all(
    segmenter: Segmenter,
    images: Mapping[str, Path],
    output: Path,
    journal: Journal,
    *,
    preview: bool = False,
    dicom_seg: bool = False,
) -> tuple[list[Done], dict[str, Any]]:
    """Segments images one after the other; one that fails does not stop the others.

    Args:
        segmenter: of `load_segmenter`.
        images: by name; of weights for several channels see `find_channels`.
        output: folder for NAME.nii.gz or NAME.dcm, and NAME.png.
        journal: of what was done before; what is gone since is done again.
        preview: whether to draw a picture of each.
        dicom_seg: write NAME.dcm instead of NAME.nii.gz.

    Returns:
        What was done, and the statistics by name, of an image's first channel.

    Raises:
        InputError: an image lacks a channel.
    """
    wanted = first_chain(segmenter.experiment).channels
    channels = (
        find_channels(images, wanted) if wanted else {name: (p,) for name, p in images.items()}
    )
    names = {name: number for number, name in enumerate(segmenter.classes) if number}

    def mask_of(name: str) -> Path:
        return output / f"{name}{'.dcm' if dicom_seg else '.nii.gz'}"

    def work(name: str, files: Sequence[Path]) -> tuple[dict[str, Any], str]:
        stored, *further = (readers.load(one) for one in files)
        with tqdm(desc=name, unit="window", leave=False, mininterval=1.0) as shown:

            def progress(count: int, total: int) -> None:
                shown.total = total
                shown.update(count - shown.n)

            labels = segmenter([stored, *further], progress)
        del further
        mask = mask_of(name)
        if dicom_seg:
            write_dicom_seg(to_file_axes(labels, stored), stored, segmenter.classes, mask)
        else:
            write_mask(labels, stored, mask)
        source = orient_ras(stored)
        values = source.hounsfield(source.voxels)
        found = statistics(labels, source.spacing, names, values)
        if preview:
            _draw(labels, values, segmenter, source.spacing, output / f"{name}.png", name)
        listed = ", ".join(f"{one} {v['volume_ml']:.4g} ml" for one, v in found.items())
        return found, f"{mask}: {listed}"

    for name in channels:
        if not mask_of(name).exists():
            journal.forget(name)
    done = for_each(channels, work, mask_of, journal)
    return list(done.values()), {name: one.found for name, one in done.items() if not one.problem}


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
--weights fold_0.safetensors fold_1.safetensors --input scans --output masks --preview
--weights runs/btcv/segmentation.safetensors --input dicom_series --output seg --format dicom-seg
--weights runs/btcv/segmentation.safetensors --input pacs --output masks --series "abdomen.*b30"
--weights monai.pt --config configs/finetune_btcv.py --input scans --output masks --mirror x
--weights runs/ccii/classification.safetensors --input scans --output classes
""",
    )
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="FILE", help="several: an ensemble")
    add("--input", required=True, metavar="PATH", help="image, folder of images, DICOM series")
    add("--output", required=True, metavar="DIR", help="folder for what is written")
    add(
        "--series",
        metavar="REGEX",
        help="of DICOM only series whose 'SeriesNumber SeriesDescription' it is found in, whatever "
        "the case; default: all",
    )
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
    add(
        "--format",
        choices=("nifti", "dicom-seg"),
        default="nifti",
        help="of the masks; dicom-seg: of DICOM series, needs highdicom; default %(default)s",
    )
    add("--preview", action="store_true", help="also a picture of each mask")
    add("--take-doubtful", action="store_true", help="also what seems to be no CT in HU")
    try:
        options, overrides = parse_arguments(parser, arguments)
        if not 0 <= options.overlap <= 0.9:
            raise InputError(f"--overlap: found {options.overlap}, expected 0 to 0.9")
        if set(options.mirror) - set("xyz") or len(set(options.mirror)) < len(options.mirror):
            raise InputError(f"--mirror: found {options.mirror!r}, expected some of x, y, z")
        if note := check_jax_settings():
            print(note, flush=True)
        experiment = read_experiments(options.weights, options.config, overrides)
        images = find(options.input, series=options.series)
        if options.format == "dicom-seg":
            check_highdicom()
        start = time.monotonic()
        if isinstance(experiment, ClassificationFinetuning):
            predict_all = _classifying(options, experiment, parser)
        else:
            predict_all = _segmenting(options, experiment)
        names = ["overlap", "window", "mirror", "batch", "format", "preview", "take_doubtful"]
        settings = {name: getattr(options, name) for name in names}
        made_by = describe(experiment, options.weights, settings)
        output = Path(options.output)
        try:
            done = predict_all(images, open_journal(output / JOURNAL, experiment, made_by))
            files = [{k: v for k, v in vars(one).items() if k != "found"} for one in done]
            seconds = round(time.monotonic() - start, 3)
            write_json(output / "report.json", {**made_by, "seconds": seconds, "files": files})
        except OSError as error:
            raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = sum(not one.output for one in done)
    print(f"{len(done) - failed} of {len(done)} images done; {output / 'report.json'}")
    return int(failed > 0)


def _segmenting(options: argparse.Namespace, experiment: SegmentationFinetuning) -> PredictAll:
    segmenter = load_segmenter(
        options.weights,
        experiment,
        overlap=options.overlap,
        window=options.window,
        mirror=options.mirror,
        batch=options.batch,
        take_doubtful=options.take_doubtful,
    )
    output, dicom_seg = Path(options.output), options.format == "dicom-seg"

    def predict_all(images: Mapping[str, Path], journal: Journal) -> list[Done]:
        done, found = segment_all(
            segmenter, images, output, journal, preview=options.preview, dicom_seg=dicom_seg
        )
        write_json(output / "statistics.json", found)
        return done

    return predict_all


def _classifying(
    options: argparse.Namespace,
    experiment: ClassificationFinetuning,
    parser: argparse.ArgumentParser,
) -> PredictAll:
    for name in ("overlap", "window", "batch", "format", "preview"):
        if getattr(options, name) != parser.get_default(name):
            raise InputError(
                f"--{name}: found it with weights for classification, expected none: a volume is "
                "predicted whole"
            )
    classifier = load_classifier(
        options.weights, experiment, mirror=options.mirror, take_doubtful=options.take_doubtful
    )
    return lambda images, journal: classify_all(classifier, images, Path(options.output), journal)


def command() -> int:
    """The command as a process of its own."""
    prepare_process()
    return main()


if __name__ == "__main__":
    sys.exit(command())
