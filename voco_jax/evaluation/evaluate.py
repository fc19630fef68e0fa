"""Compares masks with reference masks: Dice, surfaces, volumes, with intervals over the cases.

    python -m voco_jax.evaluation.evaluate --reference DIR --prediction DIR

Files of any format that is read (NIfTI, NRRD, MetaImage, DICOM) are paired by their path below the
folder, without suffix, turned to RAS and compared voxel for voxel: both must have the same grid.

- Dice: 0 where only one of the two has the class; left out where neither has it.
- NSD: normalised surface Dice at a tolerance of 1 mm (--tolerance), weighted by area as google's
  surface-distance package does it; 0 or left out as Dice.
- HD95: 95th percentile of the distances of both surfaces, by area; the larger one, mm. Infinite and
  in no mean where only one of the two has the class; how many cases a mean is over is always said.
- Volume error: prediction minus reference.

Background is in no mean. OUTPUT gets cases.csv (a row for each case and class), summary.json
(means, medians, 95 % bootstrap intervals over the cases) and worst.png (the lowest Dice first).
Exit status: 0; 1 if a case was left out or failed; 2 for bad input.
"""

import argparse
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from voco_jax.config.load import command_parser, positive
from voco_jax.data.progress import bar, log
from voco_jax.data.workers import available_cores
from voco_jax.errors import InputError
from voco_jax.evaluation.cases import Job, Result, evaluate_case, values_in
from voco_jax.evaluation.masks import (
    Classes,
    check_grid,
    classes_of,
    find,
    load_image,
    load_mask,
    parse_classes,
)
from voco_jax.evaluation.summary import Evaluation, as_text, summarise, write

if TYPE_CHECKING:
    from voco_jax.report.segmentations import Segmentation

TOLERANCE = 1.0  # mm, of the surface Dice
WORST = 8  # cases in worst.png

Item = TypeVar("Item")
Found = TypeVar("Found")


def evaluate(
    reference: str | Path,
    prediction: str | Path,
    *,
    classes: Classes | None = None,
    tolerances: Sequence[float] = (TOLERANCE,),
    workers: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compares all pairs of masks.

    Args:
        reference: a folder, or one file.
        prediction: as the reference; two files belong together whatever their names.
        classes: names and labels; None: every value that a reference has.
        tolerances: of the surface Dice, mm.
        workers: processes; None: one for each core.
        progress: whether to show a bar or lines now and then.

    Raises:
        InputError: nothing there, nothing that belongs together, or no classes.
    """
    references = find(reference)
    predictions = find(prediction, references)
    names = [name for name in references if name in predictions]
    if not names:
        raise InputError(
            f"no pair: {reference} has {_first(references)}, {prediction} {_first(predictions)}; "
            "name the predictions as their references"
        )
    count = min(available_cores() if workers is None else workers, len(names))
    if classes is None:
        found = _map(values_in, [references[n] for n in names], count, "classes", progress)
        try:
            classes = classes_of(sorted({value for values in found for value in values}))
        except InputError as error:
            raise InputError(f"{reference}: {error}") from error
        if not classes:
            log(f"{reference}: found no value but 0 in all masks that can be read")
    tolerances = tuple(dict.fromkeys(map(float, tolerances)))
    jobs = [Job(n, references[n], predictions[n], classes, tolerances) for n in names]
    results = _map(evaluate_case, jobs, count, "evaluate", progress)
    return Evaluation(
        results=results,
        no_prediction=[name for name in references if name not in predictions],
        no_reference=[name for name in predictions if name not in references],
        classes=classes,
        tolerances=tolerances,
        settings={
            "reference": str(reference),
            "prediction": str(prediction),
            "classes": {name: list(labels) for name, labels in classes.items()},
            "tolerance_mm": list(tolerances),
        },
    )


def draw_worst(
    evaluation: Evaluation,
    references: dict[str, Path],
    predictions: dict[str, Path],
    images: dict[str, Path],
) -> np.ndarray | None:
    """The page of the cases with the lowest Dice; reads them once more, one at a time.

    Args:
        evaluation: what was found.
        references: all, by name.
        predictions: all, by name.
        images: those that there are; one that cannot be used is told and left out.

    Returns:
        (rows, columns, 3) uint8; None: no case has a Dice.
    """
    from voco_jax.report.segmentations import draw_cases

    worst = sorted(
        (result for result in evaluation.evaluated if not np.isnan(result.dice)),
        key=lambda result: result.dice,
    )[:WORST]
    if not worst:
        return None
    known = {label for labels in evaluation.classes.values() for label in labels}
    count = len(evaluation.evaluated)
    title = f"the {len(worst)} worst of {count} cases" if count > len(worst) else "worst first"
    if evaluation.left_out:
        title += f", {len(evaluation.left_out)} left out"
    rows = (_row(result, references, predictions, images, known) for result in worst)
    return draw_cases(rows, title)


def _row(
    result: Result,
    references: dict[str, Path],
    predictions: dict[str, Path],
    images: dict[str, Path],
    known: set[int],
) -> "Segmentation":
    from voco_jax.report.segmentations import Segmentation, to_grey

    mask, other = load_mask(references[result.name]), load_mask(predictions[result.name])
    image = None
    if result.name in images:
        try:
            volume = load_image(images[result.name])
            check_grid("reference", mask, volume, "image")
            image = to_grey(
                volume.hounsfield(volume.voxels), (mask.labels > 0) | (other.labels > 0)
            )
        except InputError as error:
            log(f"worst.png: {result.name} is drawn without its image: {error}")
    for labels, values in ((mask.labels, mask.values), (other.labels, other.values)):
        if strays := set(values) - known:
            labels[np.isin(labels, list(strays))] = 0
    title = f"{result.name}   Dice {result.dice:.3f}"
    named = [score for score in result.scores if not np.isnan(score.dice)]
    if len(named) > 1:
        low = min(named, key=lambda score: score.dice)
        title += f", lowest: {low.name} {low.dice:.3f}"
    return Segmentation(title, image, mask.labels, other.labels, mask.spacing)


def _map(
    function: Callable[[Item], Found], items: Sequence[Item], count: int, what: str, progress: bool
) -> list[Found]:
    """The function of each item, in order, by so many processes; by this one if it is one."""
    with bar(what, len(items), progress) as done:
        if count <= 1:
            here = []
            for item in items:
                here.append(function(item))
                done.update()
            return here
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, mp_context=context) as processes:
            futures = [processes.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                    done.update()
            except BrokenProcessPool as error:
                raise InputError(
                    "--workers: a process was killed, as a rule for want of memory; use fewer "
                    f"than {count}"
                ) from error
            except BaseException:
                processes.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _first(names: dict[str, Any]) -> str:
    return f"{len(names)} masks, as {min(names)!r}"


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, expected mm of 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m voco_jax.evaluation.evaluate",
        __doc__,
        """
--reference labels --prediction masks
--reference labels --prediction masks --classes liver=6 kidneys=2,3 --tolerance 1 2
--reference labels --prediction masks --classes classes.json --images ct --output evaluation
--reference case.nii.gz --prediction case_mask.nrrd
""",
    )
    add = parser.add_argument
    add("--reference", required=True, metavar="PATH", help="folder of masks, or one mask")
    add("--prediction", required=True, metavar="PATH", help="as --reference")
    add("--output", metavar="DIR", help="default: the folder evaluation in that of the predictions")
    add(
        "--classes",
        nargs="+",
        metavar="NAME=LABEL",
        help='NAME=1 NAME=2,3 ..., or a JSON file {"name": label or [labels]}; all other labels '
        "are background. Default: every value that a reference has",
    )
    add(
        "--tolerance",
        nargs="+",
        type=_tolerance,
        default=[TOLERANCE],
        metavar="MM",
        help=f"of the surface Dice; default: {TOLERANCE:g} mm",
    )
    add("--images", metavar="PATH", help="images for worst.png, of the masks' names and grids")
    add(
        "--workers",
        type=positive,
        metavar="N",
        help="processes; default: the cores. A pair of 512x512x300 takes about 1 GB",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="exit status 0 although masks are there without a reference or a prediction",
    )
    try:
        options = parser.parse_args(arguments)
        return _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    classes = parse_classes(options.classes) if options.classes else None
    references = find(options.reference)
    predictions = find(options.prediction, references)
    images = find(options.images, references) if options.images else {}
    if options.images and not set(images) & set(references):
        raise InputError(
            f"--images: {options.images} has {_first(images)}, the masks are named as "
            f"{min(references)!r}; name the images as the masks"
        )
    folder = Path(options.prediction)
    output = Path(options.output or (folder if folder.is_dir() else folder.parent) / "evaluation")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    evaluation = evaluate(
        options.reference,
        options.prediction,
        classes=classes,
        tolerances=options.tolerance,
        workers=options.workers,
    )
    if options.images:
        settings = {**evaluation.settings, "images": options.images}
        evaluation = dataclasses.replace(evaluation, settings=settings)
    summary = summarise(evaluation)
    try:
        write(evaluation, summary, output)
        picture = draw_worst(evaluation, references, predictions, images)
        if picture is not None:
            from voco_jax.report.png import write_png

            write_png(output / "worst.png", picture)
        else:
            (output / "worst.png").unlink(missing_ok=True)  # of an earlier run
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    print(as_text(evaluation, summary))
    print(f"{output}: summary.json, cases.csv{', worst.png' if picture is not None else ''}")
    missing = [*evaluation.no_prediction, *evaluation.no_reference]
    failed = len(evaluation.evaluated) < len(evaluation.results)
    return int(failed or (bool(missing) and not options.allow_missing))


if __name__ == "__main__":
    sys.exit(main())
