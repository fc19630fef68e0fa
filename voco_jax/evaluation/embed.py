"""Features of volumes, crops or organs, as a table.

    python -m voco_jax.evaluation.embed --weights W.safetensors --input ct --output table.parquet

Takes a file, a folder of files in any format that is read, a DICOM series, or a prepared cache.
The card beside the weights says how volumes are prepared and cut; for weights without one name a
config file. Every volume is cut into crops, which are encoded one by one; the table has a row for

- each volume: the mean of its crops' vectors;
- with --crops each crop, with its place in the prepared volume;
- with --masks each organ: the feature maps averaged over its mask.

TABLE.parquet.json beside it says what made it. The same command goes on where it was, and does what
is new; other weights or settings start over. docs/features.md has the columns.

Memory: two prepared volumes and the file that is read, a batch of crops in the encoder, 4096 rows.
Of many files prepare a cache first, on all cores: here a single thread reads ahead. Exit status: 0;
1 if a volume failed or a file system does not answer; 2 for bad input; 4: another embed writes this
table.
"""

import argparse
import contextlib
import dataclasses
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

import voco_jax
from voco_jax.config.load import command_parser, parse_arguments, positive, to_dict
from voco_jax.data.cache import read_chain
from voco_jax.data.progress import bar, log
from voco_jax.errors import InputError
from voco_jax.evaluation.embed_store import Store
from voco_jax.evaluation.embed_volumes import (
    Organs,
    Prepared,
    Volume,
    is_cache,
    parse_organs,
    volumes_of_cache,
    volumes_of_files,
)
from voco_jax.evaluation.encoder import Encoder, mean_vector
from voco_jax.evaluation.features import manifest_path
from voco_jax.evaluation.journal import Signatures, signatures
from voco_jax.evaluation.load_encoder import read_encoder
from voco_jax.evaluation.masks import find
from voco_jax.training.jax_settings import check_jax_settings, prepare_process

SUFFIX = ".parquet"
Row = dict[str, Any]
Loaded = tuple[Prepared, np.ndarray | None]
"""A volume, and with --masks what `Organs.read` gives of its mask."""


def rows_of(
    volume: Volume, loaded: Loaded, encoder: Encoder, kind: str, organs: Organs | None
) -> list[Row]:
    """The rows of a table for a volume.

    Args:
        volume: that was read.
        loaded: what it holds.
        encoder: of `read_encoder`.
        kind: "volume", "crop" or "organ".
        organs: of kind "organ"; an organ that the mask lacks has no row.
    """
    prepared, labels = loaded
    common: Row = {
        "id": volume.id,
        "volume": volume.id,
        "path": volume.path,
        "kind": kind,
        "organ": None,
        "corner": None,
        "size": None,
        "spacing": prepared.spacing,
        "shape": prepared.shape,
        "digest": prepared.digest,
        "weights": encoder.digest,
    }
    if organs is not None and labels is not None:
        vectors = encoder.pool(prepared.voxels, labels, organs.members)
        return [
            common | {"id": f"{volume.id}#{name}", "organ": name, "vector": vector}
            for name, vector in zip(organs.classes, vectors, strict=True)
            if np.isfinite(vector).all()
        ]
    crops = encoder.encode(prepared.voxels)
    if kind == "volume":
        return [common | {"vector": mean_vector(crops.vectors)}]
    return [
        common
        | {"id": f"{volume.id}#{number:03d}", "corner": corner, "size": encoder.crop_size}
        | {"vector": vector}
        for number, (corner, vector) in enumerate(
            zip(crops.corners.tolist(), crops.vectors, strict=True)
        )
    ]


def embed_all(
    volumes: Sequence[Volume], encoder: Encoder, store: Store, kind: str, organs: Organs | None
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Embeds volumes one after the other; one that fails does not stop the others.

    Args:
        volumes: all that the table shall have.
        encoder: of `read_encoder`.
        store: takes the rows; what it has is not done again.
        kind: see `rows_of`.
        organs: see `rows_of`.

    Returns:
        What was found of each volume, by id: the organs it has; and the failures.
    """
    signature = {one.id: [*one.files, *_mask_files(one, organs)] for one in volumes}
    known = {one.id: store.find(one.id, signature[one.id]) for one in volumes}
    done = {id: one["found"] for id, one in known.items() if one is not None}
    if done:
        log(f"{len(done)} of {len(volumes)} volumes were done before; kept")
    failures = []

    def read(volume: Volume) -> Loaded:
        prepared = volume.read()
        if organs is None:
            return prepared, None
        return prepared, organs.read(organs.find(volume), prepared, encoder.chain)

    waiting = [one for one in volumes if one.id not in done]
    with bar("embed", len(waiting), show=True) as shown:
        for volume, load in _ahead(waiting, read):
            try:
                rows = rows_of(volume, load(), encoder, kind, organs)
                found = [row["organ"] for row in rows] if organs else None
                store.add(volume.id, signature[volume.id], rows, found)
                done[volume.id] = found
            except InputError as error:
                reason = getattr(error, "reason", str(error))
                failures.append({"id": volume.id, "path": volume.path, "reason": reason})
                shown.write(f"failed: {error}", sys.stderr)
            shown.update()
    return done, failures


def _mask_files(volume: Volume, organs: Organs | None) -> Signatures:
    if organs is None:
        return []
    try:
        return signatures([organs.find(volume)])
    except InputError:  # said when the volume is read
        return []


def _ahead(
    volumes: Sequence[Volume], read: Callable[[Volume], Loaded]
) -> Iterator[tuple[Volume, Callable[[], Loaded]]]:
    """Each volume with what waits for its reading, while a thread reads the next."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read, volumes[0]) if volumes else None
        for number, volume in enumerate(volumes, 1):
            assert coming is not None
            ready = coming
            coming = thread.submit(read, volumes[number]) if number < len(volumes) else None
            yield volume, ready.result
            del ready


def embed(options: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """What the command does; returns how many volumes failed.

    Args:
        options: of `main`.
        overrides: of the config's settings.

    Raises:
        InputError: weights, input or masks that cannot be used, or a table that cannot be written.
        InUseError: another embed writes this table.
    """
    output, start = Path(options.output), time.monotonic()
    from_cache = is_cache(options.input)
    encoder = read_encoder(
        options.weights,
        options.config,
        settings=overrides,
        source=options.source,
        like=read_chain(options.input) if from_cache else None,
        random=options.random_weights,
        batch=options.batch,
    )
    for note in encoder.notes:
        print(f"note: {options.weights}: {note}", flush=True)
    if from_cache:
        volumes = volumes_of_cache(options.input, encoder)
    else:
        volumes = volumes_of_files(options.input, encoder, options.take_doubtful)
    organs, kind = None, "crop" if options.crops else "volume"
    if options.masks:
        kind, classes = "organ", parse_organs(options.organs, encoder)
        organs = Organs(find(options.masks), classes)
    made_by = {
        "voco_jax": voco_jax.__version__,
        "weights": encoder.digest,
        "task": encoder.experiment.task,
        "model": to_dict(encoder.experiment)["model"],
        "chain": dataclasses.asdict(encoder.chain),
        "crop_size": encoder.crop_size,
        "encoder_size": encoder.encoder_size,
        "settings": {
            "kind": kind,
            "organs": organs and dict(organs.classes),
            "take_doubtful": options.take_doubtful,
        },
    }
    try:
        with contextlib.ExitStack() as stack:
            store = Store(output, made_by, encoder.size, stack)
            done, failures = embed_all(volumes, encoder, store, kind, organs)
            manifest = {
                **made_by,
                "jax": jax.__version__,
                "python": platform.python_version(),
                "device": jax.devices()[0].device_kind,
                "weights_file": str(options.weights),
                "input": str(options.input),
                "masks": options.masks,
                "seconds": round(time.monotonic() - start, 3),
                "volumes": len(volumes),
                "failures": failures,
            }
            if organs is not None:
                found = Counter(name for names in done.values() for name in names)
                manifest["organs"] = {name: found[name] for name in organs.classes}
            rows = store.finish(done, manifest)
    except OSError as error:
        raise InputError(f"{output}: cannot write here: {error.strerror or error}") from error
    for name, count in manifest.get("organs", {}).items():
        if not count:
            print(f"organ {name}: found in no mask; are its labels right? (--organs)")
    print(
        f"{len(done)} of {len(volumes)} volumes done; {output}: {rows} rows of {encoder.size} "
        f"features; {manifest_path(output)}"
    )
    return len(failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see --help. Returns the exit status."""
    parser = command_parser(
        "-m voco_jax.evaluation.embed",
        __doc__,
        """
--weights runs/mine/voco_encoder.safetensors --input scans --output features.parquet
--weights voco.safetensors --input data/cache --output crops.parquet --crops
--weights voco.safetensors --input scans --output organs.parquet --masks masks --organs liver=1
--weights VoCo_10k.pt --config configs/voco_10k.py --config.model.patch_merging=legacy \
--input scans --output features.parquet
""",
    )
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="pre-trained or fine-tuned")
    add(
        "--input",
        required=True,
        metavar="PATH",
        help="image, folder of images, DICOM series, or a prepared cache",
    )
    add("--output", required=True, metavar="FILE.parquet", help="the table")
    add("--config", metavar="PY", help="config file of weights without a card")
    add("--source", metavar="NAME", help="of several in the config, the one that images are like")
    add("--crops", action="store_true", help="a row a crop, instead of a row a volume")
    add("--masks", metavar="DIR", help="a row an organ: masks named as their images")
    add(
        "--organs",
        nargs="+",
        default=[],
        metavar="ORGAN",
        help="classes of fine-tuned weights, labels, NAME=LABEL, or a JSON file {name: label}; "
        "default: all classes of fine-tuned weights",
    )
    add(
        "--random-weights",
        type=int,
        metavar="SEED",
        help="of the same network, instead of the file's: what a probe is compared with",
    )
    add("--batch", type=positive, help="crops at a time; default: 1 on a CPU, else up to 8")
    add("--take-doubtful", action="store_true", help="also what seems to be no CT in HU")
    try:
        options, overrides = parse_arguments(parser, arguments)
        _check_options(options)
        if note := check_jax_settings():
            print(note, flush=True)
        failed = embed(options, overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return int(failed > 0)


def _check_options(options: argparse.Namespace) -> None:
    if Path(options.output).suffix != SUFFIX or Path(options.output).is_dir():
        raise InputError(f"--output: found {options.output!r}, expected a file FILE{SUFFIX}")
    if options.crops and options.masks:
        raise InputError("--crops: found it with --masks, expected one of them: a table a kind")
    if options.organs and not options.masks:
        raise InputError("--organs: found it without --masks, expected a folder of masks")


def command() -> int:
    """The command as a process of its own."""
    prepare_process()
    return main()


if __name__ == "__main__":
    sys.exit(command())
