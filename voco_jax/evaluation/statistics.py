"""Volumes of masks, and what an image's values are inside: for any masks, predicted or drawn.

    python -m voco_jax.evaluation.statistics --masks DIR --images DIR

For each mask and class: voxels, volume in ml, and with --images the mean and standard deviation of
the image's values inside (HU for CT). Files of any format that is read (NIfTI, NRRD, MetaImage,
DICOM); images are found by the masks' names and must have their grids. Without --output the table
goes to the console. Exit status: 0; 1 if a mask failed; 2 for bad input.
"""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.config.load import command_parser
from voco_jax.data.progress import bar
from voco_jax.errors import InputError
from voco_jax.evaluation.masks import (
    Classes,
    check_grid,
    classes_of,
    find,
    load_image,
    load_mask,
    parse_classes,
)
from voco_jax.evaluation.metrics import volume_ml
from voco_jax.files import write_atomically

COLUMNS = ("voxels", "volume_ml", "mean", "standard_deviation")


def statistics(
    labels: np.ndarray,
    spacing: Sequence[float],
    names: Mapping[str, int | Sequence[int]],
    image: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures each class of a label map.

    Args:
        labels: (x, y, z) integers of 0 or more.
        spacing: mm.
        names: each class's label or labels; what is not named is left out.
        image: (x, y, z), HU or another unit.

    Returns:
        By name: "voxels", "volume_ml", and with an image "mean" and "standard_deviation" of its
        values inside (of all voxels, not of a sample); None of an empty class, or where the image
        has NaN or infinite values.

    Raises:
        ValueError: labels that are no integers or negative, or an image of another shape.
    """
    if image is not None and image.shape != labels.shape:
        raise ValueError(f"found an image of {image.shape}, expected {labels.shape}")
    if labels.dtype.kind not in "biu" or (labels.size and labels.min() < 0):
        raise ValueError(f"found labels of {labels.dtype}, expected integers of 0 or more")
    size = int(labels.max()) + 1 if labels.size else 1
    planes = [np.s_[..., index] for index in range(labels.shape[-1])]  # few float64 at a time
    counts, sums, squares = (np.zeros(size) for _ in range(3))
    for plane in planes:
        counts += np.bincount(labels[plane].ravel(), minlength=size)
    if image is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            for plane in planes:
                sums += np.bincount(labels[plane].ravel(), image[plane].ravel(), size)
            means = sums / np.maximum(counts, 1)
            for plane in planes:
                away = image[plane] - means[labels[plane]]
                squares += np.bincount(labels[plane].ravel(), np.square(away).ravel(), size)
    found: dict[str, dict[str, Any]] = {}
    for name, value in names.items():
        wanted = {value} if isinstance(value, int) else set(value)
        of_class = [label for label in sorted(wanted) if label < size]
        count = int(counts[of_class].sum())
        found[name] = {"voxels": count, "volume_ml": volume_ml(count, spacing)}
        if image is None:
            continue
        mean = deviation = None
        if count:
            middle = sums[of_class].sum() / count
            spread = counts[of_class] * np.square(means[of_class] - middle)
            variance = (squares[of_class] + spread).sum() / count
            if np.isfinite([middle, variance]).all():
                mean, deviation = float(middle), float(np.sqrt(variance))
        found[name] |= {"mean": mean, "standard_deviation": deviation}
    return found


def _measure(path: Path, image: Path | None, classes: Classes | None) -> dict[str, dict[str, Any]]:
    mask = load_mask(path)
    try:
        names = classes if classes is not None else classes_of(mask.values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if image is None:
        return statistics(mask.labels, mask.spacing, names)
    volume = load_image(image)
    check_grid("mask", mask, volume, "image")
    return statistics(mask.labels, mask.spacing, names, volume.hounsfield(volume.voxels))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m voco_jax.evaluation.statistics",
        __doc__,
        """
--masks masks
--masks masks --images ct --classes liver=6 kidneys=2,3 --output statistics.csv
--masks case_mask.nii.gz --images case.nii.gz --output statistics.json
""",
    )
    add = parser.add_argument
    add("--masks", required=True, metavar="PATH", help="folder of masks, or one mask")
    add("--images", metavar="PATH", help="folder of images of the masks' names, or one image")
    add(
        "--classes",
        nargs="+",
        metavar="NAME=LABEL",
        help='NAME=1 NAME=2,3 ..., or a JSON file {"name": label or [labels]}. Default: every '
        "value that a mask has",
    )
    add("--output", metavar="FILE", help=".json or .csv; default: the table on the console")
    try:
        options = parser.parse_args(arguments)
        output = Path(options.output) if options.output else None
        if output and output.suffix not in (".json", ".csv"):
            raise InputError(f"--output: found {output.name!r}, expected a name in .json or .csv")
        classes = parse_classes(options.classes) if options.classes else None
        masks = find(options.masks)
        images = find(options.images, masks) if options.images else {}
        cases, failures = {}, []
        with bar("statistics", len(masks), True) as done:
            for name, path in masks.items():
                try:
                    if options.images and name not in images:
                        raise InputError(f"{options.images}: found no image {name!r}")
                    cases[name] = _measure(path, images.get(name), classes)
                except InputError as error:
                    failures.append(f"{name}: {error}")
                done.update()
        _tell(cases, output, bool(options.images))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return int(bool(failures))


def _tell(
    cases: Mapping[str, Mapping[str, Mapping[str, Any]]], output: Path | None, images: bool
) -> None:
    columns = COLUMNS if images else COLUMNS[:2]
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["case", "class", *columns])
    for case, classes in cases.items():
        for name, numbers in classes.items():
            cells = [numbers[column] for column in columns]
            table.writerow(
                [case, name, *("" if c is None else f"{c:.6g}" if c % 1 else int(c) for c in cells)]
            )
    if output is None:
        print(lines.getvalue(), end="")
        return
    try:
        if output.suffix == ".csv":
            write_atomically(output, lines.getvalue())
        else:
            text = json.dumps({"cases": cases}, indent=1, ensure_ascii=False, allow_nan=False)
            write_atomically(output, text + "\n")
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    print(f"{output}: {len(cases)} masks")


if __name__ == "__main__":
    sys.exit(main())
