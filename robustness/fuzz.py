"""Broken and hostile files of every format through the real `prepare`, and what becomes of each.

    python -m robustness.fuzz --ct ../shared/ct/images    # 2,000 files, seed 0, a table
    python -m robustness.fuzz --files 200 --workers 0     # phantoms, in this process

Each file must end as a whole volume of the cache (read again: checksum, finite, 0..1) or as one
line of failures.jsonl with a reason, and as a volume be what nibabel or ITK read, where they do;
no worker may pass its memory limit or be killed; files outside the data root (canaries) must not be
opened. Ends with status 1 if anything is not so.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel
import numpy as np
import psutil
import SimpleITK

from robustness.canaries import Canaries
from robustness.mutations import MUTATIONS, Around, mutated
from robustness.samples import FORMATS, sample, sources
from voco_jax.config.config_files import DEFAULT
from voco_jax.config.load import load
from voco_jax.data.cache import Cache, checksum
from voco_jax.data.collect import scan
from voco_jax.data.datalists import Volume, read_list
from voco_jax.data.formats import readers
from voco_jax.data.formats.dicom_series import find_volumes, is_series, place_of
from voco_jax.data.prepare import prepare
from voco_jax.data.series import divide
from voco_jax.data.summary import Failure
from voco_jax.data.volumes import dequantise
from voco_jax.errors import InputError

CHAIN = dataclasses.replace(load(DEFAULT).data.sources["ct"].chain, volume_size=(64, 32, 64))
Kinds = dict[str, tuple[str, str]]  # of a volume's id: its mutation, its format


class Watch(threading.Thread):
    """The highest resident memory of each process below this one, as the kernel notes it.

    Also the longest time without an outcome, which no volume can have taken longer than with one
    worker; with several, one could hide behind the others.
    """

    def __init__(self, cache: Path) -> None:
        super().__init__(daemon=True)
        self.files = (cache / "manifest.jsonl", cache / "failures.jsonl")
        self.peaks: dict[int, int] = {}
        self.longest = 0.0
        self.done = threading.Event()

    def run(self) -> None:
        """Looks ten times a second."""
        size, since = 0, time.monotonic()
        while not self.done.wait(0.1):
            now = sum(file.stat().st_size for file in self.files if file.exists())
            if now != size:
                if size:  # the first outcome waits for the workers' start
                    self.longest = max(self.longest, time.monotonic() - since)
                size, since = now, time.monotonic()
            for process in psutil.Process().children(recursive=True):
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                found = re.search(r"VmHWM:\s+(\d+) kB", status)
                if found:
                    self.peaks[process.pid] = max(
                        self.peaks.get(process.pid, 0), int(found[1]) * 1024
                    )


def write_files(
    options: argparse.Namespace, images: Sequence[SimpleITK.Image], folder: Path, outside: Path
) -> tuple[list[Volume], Kinds]:
    """Makes the mutated files in a data root below a folder, and the list of them."""
    originals = {
        (number, format): sample(image, format, folder / "scratch")
        for number, image in enumerate(images)
        for format in FORMATS
    }
    around = Around(outside, options.bomb * 2**20)
    data, kinds, names = folder / "root" / "data", {}, []
    for index in range(options.files):
        kind, one = mutated(index, options.seed, originals, len(images), around)
        one.write(data / f"{index:05d}")
        name = f"{index:05d}/{one.name}".rstrip("/")
        names.append(name)
        kinds[f"data/{name}"] = kind, one.format
    (folder / "list.json").write_text(json.dumps({"training": names}))
    return read_list(folder / "list.json", data), kinds


def fuzz(options: argparse.Namespace, folder: Path) -> list[str]:
    """Makes the files, prepares them, prints what became of them; returns what is wrong."""
    images = sources(options.ct)
    canaries = Canaries(folder / "outside", images[0], folder / "scratch")
    volumes, kinds = write_files(options, images, folder, folder / "outside")
    limit = int(options.memory * 2**30)
    # Dask gives each worker its part of this; the kernel does not look at it.
    total = limit * (psutil.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_RSS, (total, total))
    watch = Watch(folder / "cache")
    watch.start()
    start = time.monotonic()
    summary = prepare(volumes, folder / "cache", CHAIN, options.workers, progress=True)
    seconds = time.monotonic() - start
    watch.done.set()
    try:
        found = f"{len(scan(folder / 'root' / 'data')):,} volumes"
    except InputError as error:
        found = f"InputError: {str(error).replace(str(folder), '')[:150]}"
    problems = find_problems(folder / "cache", volumes, kinds)
    problems += [f"opened: {name}" for name in sorted(canaries.opened())]
    problems += [
        f"memory: a process had {peak / 2**30:.2f} GiB resident"
        for peak in watch.peaks.values()
        if peak > limit
    ]
    print_table(summary.failures, kinds)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("SimpleITK", "nibabel")]
    formats = len({format for _, format in kinds.values()})
    print(f"\nscan of the same folder: {found}")
    print(
        f"{', '.join(versions)}, Python {sys.version.split()[0]}, {len(images)} sources, "
        f"{formats} formats"
    )
    print(
        f"{options.files:,} files, seed {options.seed}: {summary.done} volumes, {summary.failed} "
        f"failures, {seconds:.0f} s with {options.workers} workers of {options.memory:g} GiB"
    )
    peaks = sorted(watch.peaks.values(), reverse=True)[: options.workers]
    print("largest resident memory of processes: " + ", ".join(f"{p / 2**30:.2f}" for p in peaks))
    print(f"longest time without an outcome: {watch.longest:.1f} s")
    return problems


def find_problems(cache_path: Path, volumes: Sequence[Volume], kinds: Kinds) -> list[str]:
    """What is not as it must be, a line each."""
    cache = Cache.open(cache_path, CHAIN)
    whole = {entry.id: entry for entry in cache.entries}
    reasons = collections.defaultdict(list)
    for line in (cache_path / "failures.jsonl").read_text().splitlines():
        failure = json.loads(line)
        reasons[failure["id"]].append(failure["reason"])
    problems = []
    for whole_folder, volume in _divided(volumes):
        kind, format = kinds[whole_folder]
        entry, found = whole.get(volume.id), reasons[volume.id]
        if (entry is not None) + len(found) != 1:
            problem = f"{len(found)} failure lines"
        elif entry is None:
            problem = _wrong_reason(kind, found[0])
        elif "outside" in kind or kind == "not in hu":
            problem = "a volume, expected a failure"
        else:
            voxels = cache.read(entry)
            problem = "" if _is_whole(voxels, entry.checksum) else "its voxels are not whole"
            problem = problem or _differs(Path(volume.path))
        if problem:
            problems.append(f"{volume.id} ({kind}, {format}): {problem}")
    return problems


def _divided(volumes: Sequence[Volume]) -> Iterator[tuple[str, Volume]]:
    """Volumes, or those that a folder of several series is, each with the id of the whole."""
    for volume in volumes:
        parts = divide(volume)
        for one in parts.volumes if parts else (volume,):
            yield volume.id, one


def _wrong_reason(kind: str, reason: str) -> str:
    if not re.match(r"[\w /-]+: ", reason):
        return f"no reason: {reason}"
    good = kind in ("nothing", "no slice beside")
    return reason if good or reason.startswith(("worker killed", "unexpected")) else ""


def _differs(path: Path) -> str:
    """How the stored voxels are other than nibabel or ITK read them, or ""."""
    ours = readers.load(path)
    try:
        if path.is_dir() or is_series(path):
            folder, name = place_of(path)
            of = [one for one in find_volumes(folder)[0] if one.name == (name or ".")]
            aside = {name for name, _ in ours.aside}
            with tempfile.TemporaryDirectory() as kept:  # with copies ITK puts none in order
                for file in folder.iterdir():
                    if file.name not in aside:
                        Path(kept, file.name).symlink_to(file)
                files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(kept, of[0].series)
                theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(files)).T
        elif path.name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
            theirs = nibabel.load(path).get_fdata(dtype=np.float32)  # type: ignore[attr-defined]
        else:
            theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T
    except Exception:
        return ""  # theirs say nothing
    theirs = theirs.reshape([size for size in theirs.shape if size > 1])
    same = np.array_equal(ours.hounsfield(ours.voxels), theirs.astype(np.float32))
    return "" if same else f"its voxels are not those of another reader, {theirs.shape}"


def _is_whole(voxels: np.ndarray, expected: str) -> bool:
    values = dequantise(voxels)
    return (
        voxels.shape == CHAIN.volume_size
        and checksum(voxels) == expected
        and bool(np.isfinite(values).all())
        and 0 <= values.min() <= values.max() <= 1
    )


def print_table(failures: Sequence[Failure], kinds: Kinds) -> None:
    """What each mutation became."""
    reasons = {failure.id: failure.reason.split(":")[0] for failure in failures}
    print("| mutation | volumes | failures | reasons |\n| --- | --- | --- | --- |")
    for kind in sorted(MUTATIONS):
        ids = [id for id, (name, _) in kinds.items() if name == kind]
        found = collections.Counter(reasons[id] for id in ids if id in reasons)
        words = ", ".join(f"{reason} {count}" for reason, count in found.most_common())
        print(f"| {kind} | {len(ids) - found.total()} | {found.total()} | {words} |")


def main() -> int:
    """The command; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--files", type=int, default=2000, help="how many; default 2000")
    add("--seed", type=int, default=0)
    add("--ct", type=Path, help="folder of NIfTI files to start from; default: phantoms")
    add("--workers", type=int, default=2, help="default 2; 0: no Dask, and no memory limit")
    add("--memory", type=float, default=2.0, help="limit of each worker, GiB; default 2")
    add("--bomb", type=int, default=3728, help="MiB that a bomb unpacks to; default 3728")
    add("--keep", type=Path, help="an empty folder for files and cache; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="voco_fuzz_") as temporary:
        try:
            problems = fuzz(options, options.keep or Path(temporary))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{len(problems)} problems")
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main())
