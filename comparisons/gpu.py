"""Everything that is to be known on a machine with a GPU, in one call.

    python -m comparisons.gpu --json gpu.json                # an hour or more
    python -m comparisons.gpu --json gpu.json --only step    # a part; the file keeps the others
    python -m comparisons.gpu --tiny                         # tries the script itself, on a CPU

correctness  one float32 step on the GPU against the same on the CPU, small
step         voco_10k at batch 2, 4, 8, ours and PyTorch's variants (step_against_torch.py)
precision    losses of 200 small steps on phantoms, bfloat16 against float32
end_to_end   voco_10k on a cache (--cache; else phantoms) against the step alone, with the variant
             and batch size of ours that were the fastest

--config.section.field=value changes voco_10k, --small "field=value ..." the small configuration
(configs/demo.py with crops of 64x64x64). PyTorch has to be the one for the GPU; MONAI is needed.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparisons import our_step
from comparisons import step_against_torch as against
from voco_jax.benchmark.command import BASE, parse_variants, sizes
from voco_jax.benchmark.end_to_end import end_to_end_table, measure_end_to_end
from voco_jax.benchmark.measure import (
    ChildError,
    in_own_process,
    machine,
    table,
    write_json,
)
from voco_jax.benchmark.volumes import opened
from voco_jax.config.load import load_pretraining, parse_arguments, positive
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.pipeline import Part, batches
from voco_jax.data.progress import log
from voco_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("correctness", "step", "precision", "end_to_end")
VARIANTS = ("one pass: model.crops_per_pass=0",)  # of ours, beside voco_10k as it is
PRECISION = 0.05  # relative, of the mean loss of the second half of the steps
_FEW = 20  # steps that say nothing yet about the precision
# Crops whose last stage has 2x2x2 voxels, as voco_10k's: the normalisation of one or two voxels
# would make much of any rounding.
SMALL = {
    "data.sources.ct.chain.volume_size": (192, 192, 64),
    "crops.crop_size": (64, 64, 64),
    "crops.encoder_size": (64, 64, 64),
    "batch_size": 2,
}


@contextlib.contextmanager
def only_cpu() -> Iterator[None]:
    """Processes started here find no other device than the CPU."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        del os.environ["JAX_PLATFORMS"]
        if before is not None:
            os.environ["JAX_PLATFORMS"] = before


def correctness(config: Pretraining) -> dict[str, Any]:
    """The first step's losses and norms on the default device and on the CPU; same weights."""
    from voco_jax.benchmark.step import random_batch

    plain = dataclasses.replace(config.model, dtype="float32")
    config = dataclasses.replace(config, model=plain)
    row = our_step.Row(
        "voco_jax", "float32", our_step.without_augmentation(config, config.batch_size), exact=True
    )
    with tempfile.TemporaryDirectory(prefix="voco_benchmark_") as name:
        folder = Path(name)
        our_step.save_arrays(folder / f"batch_{config.batch_size}.npz", random_batch(config))
        with only_cpu():
            on_cpu = in_own_process(our_step.run_ours, row, folder, 1, 0, None)
        here = in_own_process(our_step.run_ours, row, folder, 1, 0, None)
    differences = against.compare(here["first"], on_cpu["first"])
    return {
        "device": here["devices"],
        "here": here["first"],
        "cpu": on_cpu["first"],
        "differences": differences,
        "agree": against.within(differences),
    }


def train_losses(config: Pretraining, parts: Sequence[Part], steps: int) -> list[float]:
    """The loss of each of the first steps of a run; for a process of its own."""
    import jax

    from voco_jax.benchmark.step import build
    from voco_jax.training.mesh import prefetch_to_device

    built, found = build(config), []
    stream = batches(parts, config.crops, seed=0, batch_size=config.batch_size)
    for batch in itertools.islice(prefetch_to_device(stream, built.program.batch), steps):
        built.state, metrics = built.compiled(built.state, batch)
        found.append(metrics["loss"])
    return [float(loss) for loss in jax.device_get(found)]


def precision(config: Pretraining, steps: int, phantoms: int) -> dict[str, Any]:
    """The same run in bfloat16 and in float32."""
    rate = dataclasses.replace(config.optimizer, warmup_steps=min(10, steps - 1))
    config = dataclasses.replace(config, optimizer=rate, total_steps=steps)
    losses = {}
    with opened(config, phantoms) as parts:
        for dtype in ("bfloat16", "float32"):
            log(f"{steps} steps in {dtype} ...")
            model = dataclasses.replace(config.model, dtype=dtype)
            one = dataclasses.replace(config, model=model)
            losses[dtype] = in_own_process(train_losses, one, parts, steps)
    return {"losses": losses, **compare_losses(losses["bfloat16"], losses["float32"])}


def compare_losses(ours: Sequence[float], exact: Sequence[float]) -> dict[str, Any]:
    """How far two curves lie apart, relative to the exact one.

    Returns:
        first: of the first step; late: of the mean of the second half; windows: of the means of
        ten windows; agree: whether everything is finite and, of 20 steps or more, `late` is
        within `PRECISION`.

    >>> exact = np.linspace(2, 1, 40)
    >>> compare_losses(exact, exact)["agree"]
    True
    >>> far = compare_losses(1.06 * exact, exact)
    >>> round(far["late"], 9), far["agree"], len(far["windows"])
    (0.06, False, 10)
    >>> compare_losses([*exact[1:], float("nan")], exact)["agree"]
    False
    """
    found, wanted = np.asarray(ours), np.asarray(exact)
    half = len(wanted) // 2
    late = abs(found[half:].mean() / wanted[half:].mean() - 1)
    pieces = zip(
        np.array_split(found, min(10, len(found))),
        np.array_split(wanted, min(10, len(found))),
        strict=True,
    )
    finite = bool(np.isfinite(found).all() and np.isfinite(wanted).all())
    return {
        "first": float(abs(found[0] / wanted[0] - 1)),
        "late": float(late),
        "windows": [[float(a.mean()), float(b.mean())] for a, b in pieces],
        "agree": finite and bool(late <= PRECISION or len(found) < _FEW),
    }


def text(part: str, found: dict[str, Any]) -> str:
    """One part, for people."""
    if part == "correctness":
        rows = [
            (name, f"{found['here'][name]:.7g}", f"{found['cpu'][name]:.7g}", f"{value:.1e}")
            for name, value in found["differences"].items()
        ]
        verdict = "agree" if found["agree"] else "DISAGREE"
        head = ("first step, float32", found["device"], "CPU", "relative difference")
        return f"{table(head, rows)}\n\n{verdict}"
    if part == "precision":
        means = [(str(n + 1), f"{a:.4f}", f"{b:.4f}") for n, (a, b) in enumerate(found["windows"])]
        shown = table(("mean loss, tenth of the steps", "bfloat16", "float32"), means)
        verdict = "agree" if found["agree"] else "DISAGREE"
        if len(found["losses"]["float32"]) < _FEW:
            verdict = "too few steps to judge"
        return (
            f"{shown}\n\nrelative difference: first step {found['first']:.1e}, second half "
            f"{found['late']:.1e}, at most {PRECISION}: {verdict}"
        )
    if part == "end_to_end":
        ratio = found["ratio"].median
        within = "within" if ratio <= 1.05 else "NOT within"
        shown = end_to_end_table(found["row"])
        return f"{found['variant']}:\n\n{shown}\n\n{within} 5% of the step alone"
    return against.text(found)


def fastest(rows: Sequence[dict[str, Any]]) -> tuple[str, int] | None:
    """Our variant and batch size with the most volumes/s.

    >>> row = {"side": "voco_jax", "variant": "a", "problem": None}
    >>> rows = [{**row, "batch_size": n, "volumes_per_second": n + 0.5} for n in (2, 4)]
    >>> rows.append({**row, "side": "PyTorch", "batch_size": 8, "volumes_per_second": 9.0})
    >>> fastest(rows)
    ('a', 4)
    >>> fastest([{**rows[0], "problem": "out of memory"}]) is None
    True
    """
    ours = [row for row in rows if row["side"] == "voco_jax" and not row["problem"]]
    best = max(ours, key=lambda row: row["volumes_per_second"], default=None)
    return None if best is None else (best["variant"], int(best["batch_size"]))


def run(options: argparse.Namespace, overrides: dict[str, Any]) -> bool:
    """All parts asked for; whether everything that was compared agrees."""
    tiny, path = options.tiny, Path(options.json) if options.json else None
    about: dict[str, Any] = {}
    if path and path.exists():
        about = json.loads(path.read_text("utf-8"))
    about["machine"] = machine()
    changes = dict(word.split("=", 1) for word in options.small.split())
    small = load_pretraining(
        against.SIZES["tiny" if tiny else "demo"], changes if tiny else {**SMALL, **changes}
    )
    base: dict[str, Any] = {} if tiny else {"batch_size": 2}
    name = against.SIZES["tiny" if tiny else "full"]
    variants = parse_variants(options.variant or (() if tiny else VARIANTS))
    configs = {n: load_pretraining(name, {**base, **overrides, **v}) for n, v in variants.items()}
    agree = True
    for part in options.only or PARTS:
        log(f"---- {part}")
        if part == "correctness":
            found = correctness(small)
        elif part == "step":
            found = step(configs, options, lambda v: write_json(path, {**about, "step": v}))
        elif part == "precision":
            steps = options.precision_steps or (4 if tiny else 200)
            found = precision(small, steps, 4 if tiny else 40)
        else:
            found = end_to_end(configs, about.get("step", {}).get("rows", []), options)
        agree &= found.get("agree", True)
        about[part] = found
        write_json(path, about)
        print(f"\n{text(part, found)}\n", flush=True)
    return agree


def step(
    configs: Mapping[str, Pretraining],
    options: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Both sides' steps at each batch size; `save` gets what there is after each row."""
    found = against.measure_all(
        next(iter(configs.values())),
        configs,
        options.torch,
        options.batch_sizes or ([1] if options.tiny else [2, 4, 8]),
        steps=options.steps or (2 if options.tiny else 20),
        warmup=1 if options.tiny else 3,
        limit=options.limit,
        save=save,
    )
    against.add_utilisation(found)
    return {**found, "agree": found["check"]["agree"]}


def end_to_end(
    configs: Mapping[str, Pretraining], rows: Sequence[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """The real path on a cache or phantoms, with the fastest of the rows of `step`."""
    known = [row for row in rows if row["variant"] in configs]
    variant, size = fastest(known) or (BASE, configs[BASE].batch_size)
    config = dataclasses.replace(configs[variant], batch_size=options.end_batch or size)
    if options.cache:
        sources = {
            name: dataclasses.replace(source, cache=options.cache)
            for name, source in config.data.sources.items()
        }
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    phantoms = None if options.cache else (4 if options.tiny else 24)
    with opened(config, phantoms) as parts:
        row = in_own_process(
            measure_end_to_end,
            config,
            parts,
            steps=options.steps or (3 if options.tiny else 50),
            warmup=1 if options.tiny else 5,
            rounds=2 if options.tiny else 3,
        )
    return {"variant": variant, "row": row, "ratio": row.ratio}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 0 measured, 1 something disagrees or failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="everything as small as can be")
    add("--only", nargs="+", choices=PARTS, help="default: all")
    add("--small", default="", metavar='"field=value ..."', help="changes of the small one")
    add("--batch-sizes", type=sizes, help="default 2,4,8")
    add("--steps", type=positive, help="timed; default 20, end to end 50")
    add("--precision-steps", type=positive, help="default 200")
    about = f'ours: "NAME: field=value ..."; repeat; default "{VARIANTS[0]}"'
    add("--variant", action="append", default=[], help=about)
    add("--torch", action="append", metavar="WORDS", help="PyTorch's: bf16+compile; repeat")
    add("--cache", help="prepared with the chain of voco_10k; default: phantoms")
    add("--end-batch", type=positive, help="of end_to_end; default: the fastest")
    add("--limit", type=float, metavar="SECONDS", help="for one row of step; default: none")
    add("--json", metavar="FILE", help="written after each part and row")
    try:
        options, overrides = parse_arguments(parser, arguments)
        if options.json:
            options.json = str(Path(options.json).absolute())
        os.chdir(ROOT)
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # PyTorch's step knows one GPU only
        return 0 if run(options, overrides) else 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ChildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
