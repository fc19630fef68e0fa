"""How much features say about a label, beside random weights of the same network and a guess.

    python -m voco_jax.evaluation.probe --table T.parquet --random R.parquet \\
        --labels labels.csv --label COLUMN --output DIR

Three probes: k nearest neighbours (cosine), logistic regression, and a linear probe in closed form.
Folds are by patient: nobody is on both sides, and the crops of a volume stay together. --fractions
are shares of the training patients whose labels are known; --seeds other folds and other draws.
Intervals are 95 %, from a bootstrap over patients. --leak COLUMN asks the same of what should not
matter, as the scanner: if that can be told as well, the features may tell it instead.

A column is one of the CSV file, or one that the table has itself: organ, spacing, shape, corner,
corner_x, corner_y, corner_z. Writes results.json, predictions.csv and probe.png. Exit status: 0,
or 2 for bad input.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from voco_jax.config.load import command_parser, positive
from voco_jax.errors import InputError
from voco_jax.evaluation.features import read_table
from voco_jax.evaluation.label_columns import read_rows
from voco_jax.evaluation.probe_folds import METRICS
from voco_jax.evaluation.probe_summary import as_results, as_text, curves, predictions_csv
from voco_jax.evaluation.probing import probe
from voco_jax.evaluation.table_rows import KINDS, of_kind, random_command, same_rows
from voco_jax.files import write_atomically
from voco_jax.report.png import write_png
from voco_jax.report.probes import draw_probe


def _fractions(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or not 0 < found[0] <= found[-1] <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected shares as 0.05,0.1,0.5,1")
    return found


def _folds(text: str) -> int:
    folds = positive(text)
    if folds < 2:
        raise argparse.ArgumentTypeError(f"found {folds}, expected 2 or more")
    return folds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m voco_jax.evaluation.probe",
        __doc__,
        """
--table t.parquet --random r.parquet --labels labels.csv --label diagnosis --output probe
--table t.parquet --random r.parquet --labels l.csv --label part --patient subject --output p
--table t.parquet --random r.parquet --labels l.csv --label part --leak scanner spacing --output p
--table t.parquet --random r.parquet --kind organ --label organ --output organs
""",
    )
    add = parser.add_argument
    add("--table", required=True, metavar="FILE", help="features that embed wrote")
    add("--random", metavar="FILE", help="the same of random weights; needed")
    add("--labels", metavar="CSV", help="with a row for each volume, crop or organ, and a header")
    add("--label", required=True, metavar="COLUMN", help="what is to be told")
    add("--id", metavar="COLUMN", help="ids, volumes or names of files; default: id or volume")
    add(
        "--patient",
        metavar="COLUMN",
        help="default: each volume is a patient; of DICOM series the folder",
    )
    add("--kind", choices=KINDS, help="of the rows, where the table has several")
    add("--folds", type=_folds, default=5, metavar="N", help="default %(default)s")
    add(
        "--fractions",
        type=_fractions,
        default=(0.05, 0.1, 0.5, 1.0),
        metavar="F,F,...",
        help="of the training patients whose labels are known; default 0.05,0.1,0.5,1",
    )
    add("--seeds", type=positive, default=3, metavar="N", help="default %(default)s")
    add(
        "--leak",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN",
        help="what should not matter",
    )
    add("--output", required=True, metavar="DIR", help="folder for what is written")
    try:
        _run(parser.parse_args(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    whole = read_table(options.table)
    if options.random is None:
        raise InputError(
            "--random: found none, expected the features of random weights, without which no "
            "number here says what training has done; make them with: "
            + random_command(whole, options.table)
        )
    table = of_kind(whole, options.kind, options.table)
    random = same_rows(table, read_table(options.random), options.random)
    probed = probe(
        table,
        random,
        read_rows(table, options.labels, options.id),
        options.label,
        patient=options.patient,
        folds=options.folds,
        fractions=options.fractions,
        seeds=options.seeds,
        leaks=options.leak,
        progress=True,
    )
    print(as_text(probed))
    settings = {**vars(options), "weights": sorted(set(table.weights))}
    results = json.dumps(as_results(probed, settings), indent=1, ensure_ascii=False)
    title = f"{probed.label}: {', '.join(probed.labelled.names[:8])}"
    chance = probed.chance[METRICS[0]]
    picture = draw_probe(curves(probed), chance, title, METRICS[0].replace("_", " "))
    output = Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "results.json", results + "\n")
        write_atomically(output / "predictions.csv", predictions_csv(probed, table))
        write_png(output / "probe.png", picture)
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    print(f"{output}: results.json, predictions.csv, probe.png")


if __name__ == "__main__":
    sys.exit(main())
