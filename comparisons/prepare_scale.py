"""What a set of 160,000 volumes costs before the first one is prepared: lists, scan, resume check.

    python -m comparisons.prepare_scale

The volumes are empty files, the manifest is made up; nothing is prepared. Needs 320,000 files in
the folder for temporary files.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from voco_jax.config.config_files import DEFAULT
from voco_jax.config.load import load
from voco_jax.data.array import ARRAY, chunk_name
from voco_jax.data.cache import Cache, CacheWriter
from voco_jax.data.collect import collect, scan
from voco_jax.data.datalists import Volume
from voco_jax.data.jobs import missing_from, signature_of
from voco_jax.data.manifest import MANIFEST, Entry, line_of

CHAIN = load(DEFAULT).data.sources["ct"].chain


def main() -> None:
    """Makes the files and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=160_000)
    count = parser.parse_args().volumes
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder, "ct"), Path(folder, "cache")
        names = [f"set_{index % 40:02d}/case_{index:06d}.nii.gz" for index in range(count)]
        make_files(root, cache, names)
        Path(folder, "list.json").write_text(
            json.dumps({"training": [{"image": n} for n in names]})
        )
        print(f"{count} volumes; peak resident memory so far {peak():.2f} GB")

        volumes = timed("read a list of them", lambda: collect([f"{folder}/list.json"], [root]))
        assert len(volumes) == count
        assert len(timed("find them in a folder", lambda: scan(root))) == count
        opened = timed("open the cache for training", lambda: Cache.open(cache, CHAIN))
        assert len(opened.entries) == count
        del opened
        with timed("open the cache for writing", lambda: CacheWriter(cache, CHAIN)) as writer:
            missing = timed("find out what is missing", lambda: missing_from(writer, volumes))
        assert not missing


def make_files(root: Path, cache: Path, names: list[str]) -> None:
    """Empty volumes, and a cache that claims to have them all."""
    with CacheWriter(cache, CHAIN) as writer:
        writer.reserve(len(names))
    with open(cache / MANIFEST, "w", encoding="utf-8") as manifest:
        for slot, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            (cache / ARRAY / chunk_name(slot)).touch()
            entry = Entry(
                id=f"{root.name}/{name}",
                slot=slot,
                section="training",
                path=str(path),
                stamp=signature_of(Volume(name, path, "training")),
                axes="LPS",
                shape=(512, 512, 300 + slot % 100),
                spacing=(0.7421875, 0.7421875, 1.25),
                window=CHAIN.window,
                box=((31, 62, 0), (480, 430, 300)),
                foreground=0.6321432150012345,
                stored=CHAIN.volume_size,
                mean=0.3215432150012345,
                checksum=f"{slot:032x}",
            )
            manifest.write(line_of(entry))


def timed(what: str, function: Callable[[], Any]) -> Any:
    """Calls a function and prints its time and the process's peak memory."""
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    print(f"{what}: {seconds:.1f} s; peak resident memory {peak():.2f} GB", flush=True)
    return result


def peak() -> float:
    """Of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
