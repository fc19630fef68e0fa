"""Cached volumes to batches: our pipeline against MONAI's chain, one core each.

    python -m comparisons.pipeline_against_monai --ct ../shared/ct/images --json input.json
    python -m comparisons.pipeline_against_monai                # phantoms

Either side prepares the CTs with the chain of voco_10k and caches them: ours as it does, MONAI's as
PersistentDataset's float32 files. Timed is what comes after, for batches of 2. Ours: read, decode,
cut, label, stack; the crops go to the device as uint8, where the step resizes and augments them.
MONAI: load, then the published chain for each of 16 base crops and 2 random sub-volumes: crop
96^3, resize to 64^3, three flips, turn, shift; label, stack.

So that the comparison is whole, the jitted resizing and augmentation of our step is timed on one
core of this CPU too, in a row of its own; a real run does it on the device. First of all the base
crops of both sides, resized, are compared. Each measurement has a process and a core of its own;
cold: before each batch the files are dropped from the page cache. Needs the packages of
requirements-dev.txt.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparisons.monai_samples import MonaiSamples, dataset
from voco_jax.benchmark.measure import (
    ChildError,
    Spread,
    bytes_from_disk,
    cpu_seconds,
    drop_from_page_cache,
    in_own_process,
    machine,
    one_core,
    resident,
    seconds_text,
    spread,
    table,
    write_json,
    write_out,
)
from voco_jax.config.load import load_pretraining, positive
from voco_jax.data.progress import log
from voco_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

BATCH = 2
_MANY = 1000  # volumes of a usual data set: of 15 grain's shuffle takes a millisecond a sample
_FEWEST = 8  # batches of a pass: several times what is read ahead
TOLERANCE = 0.5 / 255 + 1e-5  # half a step of uint8


@dataclasses.dataclass(frozen=True)
class Row:
    """One side with one page cache."""

    side: str
    page_cache: str
    seconds: Spread  # of one sample, over the passes
    samples_per_second: float
    cpu_seconds: float  # of one sample
    disk_bytes: float | None  # of one sample
    resident_start: int
    resident_end: int


def passes(
    side: str, take: Callable[[], Any], files: Sequence[Path], samples: int, count: int, cold: bool
) -> Row:
    """Times passes over all volumes, after one that is not timed.

    Args:
        side: for the table.
        take: the next batch.
        files: of the cache.
        samples: of one pass.
        count: of passes.
        cold: whether the files are dropped from the page cache before each batch.
    """
    batches = max(-(-samples // BATCH), _FEWEST)
    if cold:
        write_out(files)

    def one() -> float:
        # Dropping counts on both sides: threads that read ahead go on meanwhile.
        begin = time.perf_counter()
        for _ in range(batches):
            if cold:
                drop_from_page_cache(files)
            take()
        return (time.perf_counter() - begin) / (batches * BATCH)

    one()
    memory = resident()
    one()  # uses up what was read ahead while memory was counted
    disk, cpu = bytes_from_disk(), cpu_seconds()
    seconds = [one() for _ in range(count)]
    after = bytes_from_disk()
    done = batches * BATCH * count
    found = spread(seconds)
    return Row(
        side=side,
        page_cache="cold" if cold else "warm",
        seconds=found,
        samples_per_second=1 / found.median,
        cpu_seconds=(cpu_seconds() - cpu) / done,
        disk_bytes=None if disk is None or after is None else (after - disk) / done,
        resident_start=memory,
        resident_end=resident(),
    )


def _config() -> Any:
    return load_pretraining(str(ROOT / "configs" / "voco_10k.py"), {"batch_size": BATCH})


def _volumes(ct: Path) -> list[Any]:
    from voco_jax.data.collect import collect

    return collect((), (), (ct,))


def _parts(folder: Path) -> tuple[Any, ...]:
    from voco_jax.data.cache import Cache
    from voco_jax.data.pipeline import Part

    cache = Cache.open(folder / "ours", _config().data.sources["ct"].chain)
    return (Part("ct", cache, cache.entries, 1.0),)


def prepare_ours(ct: Path, folder: Path) -> list[tuple[str, str]]:
    """Fills our cache; (id, path) of what could be read."""
    from voco_jax.data.prepare import prepare

    prepare(_volumes(ct), folder / "ours", _config().data.sources["ct"].chain, 0)
    return [(entry.id, entry.path) for entry in _parts(folder)[0].entries]


def prepare_monai(paths: Sequence[str], folder: Path) -> None:
    """Fills MONAI's cache."""
    volumes = dataset(paths, folder)
    for number in range(len(volumes)):
        log(f"MONAI: {number + 1}/{len(volumes)}")
        _ = volumes[number]


def measure_ours(paths: Sequence[str], folder: Path, count: int, cold: bool) -> Row:
    """Our pipeline as training has it, with threads instead of worker processes."""
    del paths
    with one_core():
        from voco_jax.benchmark.volumes import files_of
        from voco_jax.data.pipeline import batches

        parts, config = _parts(folder), _config()
        files = files_of(parts)
        many = [
            dataclasses.replace(part, entries=part.entries * -(-_MANY // len(part.entries)))
            for part in parts
        ]
        stream = batches(many, config.crops, seed=0, batch_size=BATCH, workers=0)
        return passes("voco_jax", lambda: next(stream), files, len(files), count, cold)


def measure_monai(paths: Sequence[str], folder: Path, count: int, cold: bool) -> Row:
    """MONAI's chain in torch's DataLoader, without worker processes."""
    with one_core():
        import torch

        torch.set_num_threads(1)
        samples: Any = MonaiSamples(paths, folder, _config(), augment=True)

        def order() -> Iterator[int]:  # whole batches, whatever the number of volumes
            generator = np.random.default_rng(0)
            while True:
                yield from generator.permutation(len(samples)).tolist()

        stream = iter(torch.utils.data.DataLoader(samples, BATCH, sampler=order()))
        files = sorted((folder / "monai").glob("*.pt"))
        return passes("MONAI", lambda: next(stream), files, len(files), count, cold)


def measure_device_part(paths: Sequence[str], folder: Path, count: int, cold: bool) -> Row:
    """What our step does of the same chain: resize and augment, compiled, on a core of this CPU."""
    del paths, cold
    with one_core():
        import jax

        jax.config.update("jax_platforms", "cpu")
        from voco_jax.data.pipeline import batches
        from voco_jax.voco import augment
        from voco_jax.voco.step import prepare

        config = _config()
        given = next(batches(_parts(folder), config.crops, seed=0, batch_size=BATCH))
        options = dataclasses.asdict(config.augment)

        @jax.jit
        def work(batch: Any, key: Any) -> Any:
            crops = prepare(batch, config.crops.encoder_size)
            return augment.apply(crops, augment.draw(key, crops.shape[0], **options))

        batch, key = jax.device_put(given), jax.random.key(0)
        return passes(
            "voco_jax, on the device",
            lambda: jax.block_until_ready(work(batch, key)),
            (),
            4 * BATCH,
            count,
            False,
        )


def monai_bases(paths: Sequence[str], folder: Path) -> list[np.ndarray]:
    """The first volume's and the last's base crops, resized, not augmented: (n, x, y, z)."""
    samples = MonaiSamples(paths, folder, _config(), augment=False)
    return [samples[index]["bases"].numpy()[:, 0] for index in (0, len(paths) - 1)]


def our_bases(folder: Path) -> list[np.ndarray]:
    """The same of ours."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from voco_jax.data.pipeline import sample
    from voco_jax.training.images import resize, to_unit

    (part,), config = _parts(folder), _config()
    generator, found = np.random.default_rng(0), []
    for entry in (part.entries[0], part.entries[-1]):
        crops = sample(part.cache, entry, config.crops, config.crops.sub_volumes, generator)
        unit = to_unit(jax.numpy.asarray(crops["bases"]))
        found.append(np.asarray(resize(unit, config.crops.encoder_size)))
    return found


def largest_difference(paths: Sequence[str], folder: Path) -> float:
    """Between the base crops of the two sides, 0..1."""
    ours, theirs = in_own_process(our_bases, folder), in_own_process(monai_bases, paths, folder)
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def text(found: dict[str, Any]) -> str:
    """For people."""
    head = ["side", "page cache", "samples/s", "a sample", "its CPU", "from disk"]
    head += ["memory at start", "at end"]
    lines = [
        (
            row.side,
            row.page_cache,
            f"{row.samples_per_second:.3g}",
            seconds_text(row.seconds.median),
            seconds_text(row.cpu_seconds),
            "-" if row.disk_bytes is None else f"{row.disk_bytes / 1e6:.1f} MB",
            f"{row.resident_start / 2**20:.0f} MiB",
            f"{row.resident_end / 2**20:.0f} MiB",
        )
        for row in found["rows"]
    ]
    words = [
        f"{name} page cache: ours {one['host']:.1f} times as fast on one core "
        f"({one['host_cpu']:.1f} by its CPU time); "
        f"{one['with_device_part']:.1f} times if the same core also did what the device does"
        for name, one in found["ratios"].items()
    ]
    cached = found["cache_bytes"]
    return "\n".join(
        [
            table(head, lines),
            "",
            f"{found['volumes']} volumes, one core each; median of passes over all of them",
            f"base crops differ by at most {found['largest_difference']:.6f} of the window, half "
            f"a step of uint8 is {0.5 / 255:.6f}",
            f"in the cache, a volume: ours {cached['ours'] / 1e6:.1f} MB, MONAI's "
            f"{cached['monai'] / 1e6:.1f} MB",
            *words,
        ]
    )


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of MONAI's time to ours, by page cache.

    >>> def row(side: str, cache: str, seconds: float, cpu: float) -> Row:
    ...     return Row(side, cache, spread([seconds]), 1 / seconds, cpu, None, 0, 0)
    >>> rows = [row("voco_jax", cache, 0.02, 0.01) for cache in ("warm", "cold")]
    >>> rows += [row("MONAI", cache, 0.3, 0.2) for cache in ("warm", "cold")]
    >>> rows.append(row("voco_jax, on the device", "warm", 0.08, 0.08))
    >>> {name: round(value, 9) for name, value in ratios(rows)["cold"].items()}
    {'host': 15.0, 'host_cpu': 20.0, 'with_device_part': 3.0}
    """
    found = {(row.side, row.page_cache): row for row in rows}
    device = found["voco_jax, on the device", "warm"].seconds.median
    ratios = {}
    for name in ("warm", "cold"):
        ours, theirs = found["voco_jax", name], found["MONAI", name]
        time, their_time = ours.seconds.median, theirs.seconds.median
        ratios[name] = {
            "host": their_time / time,
            "host_cpu": theirs.cpu_seconds / ours.cpu_seconds,  # others' programs disturb it less
            "with_device_part": their_time / (time + device),
        }
    return ratios


def measure(ct: Path, folder: Path, count: int) -> dict[str, Any]:
    """Prepares, compares, then measures everything.

    Raises:
        InputError: no volume that can be used.
    """
    log("preparing both caches ...")
    known = in_own_process(prepare_ours, ct, folder)
    paths = [path for _, path in known]
    in_own_process(prepare_monai, paths, folder)
    difference = largest_difference(paths, folder)
    if difference > TOLERANCE:
        raise InputError(
            f"{ct}: the base crops of the two sides differ by {difference:.5f}, expected at most "
            f"{TOLERANCE:.5f}"
        )
    rows = []
    for cold in (False, True):
        for function in (measure_ours, measure_monai, measure_device_part):
            if function is measure_device_part and cold:
                continue
            log(f"{function.__name__}, {'cold' if cold else 'warm'} page cache ...")
            rows.append(in_own_process(function, paths, folder, count, cold))
    from voco_jax.benchmark.volumes import files_of

    sizes = {"ours": files_of(_parts(folder)), "monai": list((folder / "monai").glob("*.pt"))}
    return {
        "volumes": len(paths),
        "largest_difference": difference,
        "cache_bytes": {
            name: float(np.mean([file.stat().st_size for file in files]))
            for name, files in sizes.items()
        },
        "rows": rows,
        "ratios": ratios(rows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 0 measured, 1 a side failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ct", type=Path, help="folder of CTs; default: phantoms")
    parser.add_argument("--phantoms", type=positive, default=6, help="how many; default 6")
    parser.add_argument("--passes", type=positive, default=5, help="over all CTs; default 5")
    parser.add_argument("--folder", type=Path, help="for both caches; default: a temporary one")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="voco_benchmark_", dir=options.folder) as name:
            folder = Path(name)
            if options.ct is None:
                from voco_jax.data.phantom import make_phantoms

                options.ct = folder / "ct"
                make_phantoms(options.ct, options.phantoms, seed=0)
            about = machine()
            found = measure(options.ct.resolve(), folder, options.passes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ChildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text(found))
    write_json(options.json, {"machine": about, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
