"""How fast each part of a run is on this machine.

Let nothing else of weight run: a median hides little of it. Any setting of the config can be set
as --config.section.field=value, as for main.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voco_jax.benchmark.measure import (
    ChildError,
    in_own_process,
    machine,
    peak_resident,
    write_json,
)
from voco_jax.config.load import command_parser, load, load_pretraining, parse_arguments, positive
from voco_jax.data.progress import log
from voco_jax.errors import InputError

BASE = "as configured"


def parse_variants(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """`NAME: field=value field=value` -> overrides by name, first of all none as `BASE`.

    Raises:
        InputError: no name, a name twice, or no setting.
    """
    found: dict[str, dict[str, str]] = {BASE: {}}
    for text in texts:
        name, colon, rest = (part.strip() for part in text.partition(":"))
        settings = rest.split()
        wrong = [setting for setting in settings if "=" not in setting]
        if not (name and colon and settings) or wrong or name in found:
            raise InputError(
                f"--variant: found {text!r}, expected another NAME each time, a colon, and "
                'field=value without spaces in it, as in "lax: model.convolution=lax '
                'crops.grid=(3,3,1)"'
            )
        found[name] = {one.partition("=")[0]: one.partition("=")[2] for one in settings}
    return found


def sizes(text: str) -> list[int]:
    """For argparse: `2,4,8`."""
    return [positive(one) for one in text.split(",")]


def _not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help.

    Returns:
        Exit status: 0 measured, 1 nothing of it could be measured, 2 bad input.
    """
    try:
        options, overrides = parse_arguments(_parser(), arguments)
        if options.json and not Path(options.json).absolute().parent.is_dir():
            raise InputError(f"--json: {options.json}: no such folder; make it first")
        about = {"command": options.command, "config": options.config, "overrides": overrides}
        about["machine"] = machine()
        found, text = options.function(options, overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ChildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    write_json(options.json, {**about, **found})
    return 0 if found["measured"] else 1


def _step(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[dict[str, Any], str]:
    from voco_jax.benchmark.step import compare_steps, step_table

    variants = {
        name: load_pretraining(options.config, {**overrides, **changes})
        for name, changes in parse_variants(options.variant).items()
    }
    ceilings, rows = compare_steps(
        variants, options.batch_sizes, options.steps, options.warmup, options.limit
    )
    found = {"product_flops": ceilings, "rows": rows, "measured": any(r.measured for r in rows)}
    return found, step_table(ceilings, rows)


def _pipeline(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[dict[str, Any], str]:
    from voco_jax.benchmark import pipeline
    from voco_jax.benchmark.volumes import first_volumes, opened

    config = load_pretraining(options.config, overrides)
    workers = config.data.workers if options.workers is None else options.workers
    stages, streams = [], []
    with opened(config, options.phantoms) as parts:
        some = first_volumes(parts, options.volumes)
        for cold in (False, True):
            name = "cold" if cold else "warm"
            how: dict[str, Any] = {"samples": options.samples, "cold": cold}
            log(f"one thread, {name} page cache ...")
            stages.append(in_own_process(pipeline.measure_stages, some, config.crops, **how))
            how |= {"batch_size": config.batch_size, "prefetch": config.data.prefetch}
            for count in sorted({0, workers}):
                log(f"the pipeline, {count} workers, {name} page cache ...")
                how["workers"] = count
                streams.append(in_own_process(pipeline.measure_stream, some, config.crops, **how))
        volumes = sum(len(part.entries) for part in some)
    text = (
        f"{volumes} volumes, batches of {config.batch_size}; medians of {options.samples} samples\n"
        f"\n{pipeline.stages_table(stages)}\n\n{pipeline.stream_table(streams)}"
    )
    measured = {"volumes": volumes, "stages": stages, "streams": streams, "measured": True}
    return measured, text


def _prepare(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[dict[str, Any], str]:
    from voco_jax.benchmark.preparing import measure_files, prepare_table
    from voco_jax.data.collect import collect
    from voco_jax.data.datalists import Volume

    config = load(options.config, overrides)
    rows, failures = [], []
    for name, source in config.data.sources.items():
        if options.ct:
            folders = [path for path in options.ct if path.is_dir()]
            files = [path for path in options.ct if path not in folders]
            volumes = collect((), (), folders)
            volumes += [Volume(path.name, path, "training") for path in files]
        elif source.roots:
            volumes = collect(source.lists, source.roots)
        else:
            raise InputError(
                f"data.sources.{name}.roots: found none, expected folders with CT files; or name "
                "files or folders with --ct"
            )
        log(f"{name}: {len(volumes)} files, the first {options.files} of them")
        some, bad = measure_files(volumes[: options.files], source.chain, options.repeats)
        rows += some
        failures += bad
    text = "\n".join([prepare_table(rows), "", "one core; seconds are medians", *failures])
    return {"rows": rows, "failures": failures, "measured": bool(rows)}, text


def _end_to_end(
    options: argparse.Namespace, overrides: dict[str, str]
) -> tuple[dict[str, Any], str]:
    from voco_jax.benchmark.end_to_end import end_to_end_table, measure_end_to_end
    from voco_jax.benchmark.volumes import opened

    config = load_pretraining(options.config, overrides)
    with opened(config, options.phantoms) as parts:
        found = measure_end_to_end(
            config, parts, steps=options.steps, warmup=options.warmup, rounds=options.rounds
        )
    text = f"{end_to_end_table(found)}\n\npeak resident memory: {peak_resident() / 2**30:.2f} GiB"
    return {"row": found, "peak_resident": peak_resident(), "measured": True}, text


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "-m voco_jax.benchmark",
        f"{__doc__}\nEach part has a --help of its own.",
        """
step --config configs/voco_10k.py --batch-sizes 2,4,8
pipeline --config configs/voco_10k.py --phantoms 8
prepare --config configs/voco_10k.py --ct /data/my_ct
end_to_end --config configs/demo.py
""",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="PART")

    def command(name: str, function: Any, text: str, example: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=f"example:\n  python -m voco_jax.benchmark {name} {example}",
        )
        one.set_defaults(function=function)
        one.add_argument("--config", required=True, metavar="PY", help="config file")
        one.add_argument("--json", metavar="FILE", help="write it as JSON too")
        return one

    def counts(one: argparse.ArgumentParser, **defaults: tuple[int, str]) -> None:
        for name, (default, text) in defaults.items():
            text += f"; default {default}"
            one.add_argument(f"--{name}", type=positive, default=default, help=text)

    one = command(
        "step",
        _step,
        "the training step alone, on random crops that are on the device already",
        "--config configs/voco_10k.py --batch-sizes 2,4 \\\n"
        '      --variant "lax: model.convolution=lax" --variant "3 crops: model.crops_per_pass=3"',
    )
    one.add_argument("--batch-sizes", type=sizes, metavar="N,N", help="default: the config's")
    counts(one, steps=(10, "steps to time"), warmup=(2, "steps before those"))
    one.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME: field=value ..."',
        help="other settings to compare with the config's; repeat",
    )
    one.add_argument("--limit", type=float, metavar="SECONDS", help="for one row; default: none")

    one = command(
        "pipeline",
        _pipeline,
        "the input alone: cached volumes to batches of crops, all at once and by stage",
        "--config configs/voco_10k.py --config.data.sources.ct.cache=/data/cache",
    )
    one.add_argument("--phantoms", type=positive, metavar="N", help="make a cache of so many")
    one.add_argument(
        "--workers", type=_not_negative, metavar="N", help="processes; default: the config's"
    )
    counts(
        one,
        samples=(64, "volumes to crop, for each row"),
        volumes=(32, "volumes of each source that are read, in turn"),
    )

    one = command(
        "prepare",
        _prepare,
        "CT files to cached volumes, by stage, on one core",
        "--config configs/voco_10k.py --ct /data/ct/one.nii.gz --ct /data/ct/more",
    )
    text = "file or folder; repeat"
    one.add_argument("--ct", type=Path, action="append", default=[], metavar="PATH", help=text)
    files = (8, "files of each source, or of --ct, at most")
    counts(one, files=files, repeats=(3, "times for each file"))

    one = command(
        "end_to_end",
        _end_to_end,
        "the real path (cache, crops, transfer, step) against the step alone",
        "--config configs/demo.py",
    )
    one.add_argument("--phantoms", type=positive, metavar="N", help="make a cache of so many")
    counts(
        one,
        steps=(20, "steps of each round"),
        warmup=(3, "steps before each round"),
        rounds=(3, "rounds, each with and without input"),
    )
    return parser
