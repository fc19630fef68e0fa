"""What `prepare`'s flags and configs ask for: which volumes, and where to."""

import argparse
import dataclasses
from dataclasses import dataclass

import pydantic

from voco_jax.config.common import WORKDIR, Source
from voco_jax.config.config_files import DEFAULT
from voco_jax.config.load import command_parser, load, positive
from voco_jax.data.collect import collect
from voco_jax.data.datalists import Volume, labels_wanted
from voco_jax.data.formats.stored import Aside
from voco_jax.data.series import RULES, Choice, Looked, choose, look
from voco_jax.errors import InputError


@dataclass(frozen=True)
class Wanted:
    """What is asked for of one source."""

    volumes: list[Volume]
    aside: list[Aside]  # files that are no part of a volume, or of one that is not chosen
    source: Source
    looked: list[Looked] | None  # what the volumes' headers say, where they had to be read


def make_parser(about: str) -> argparse.ArgumentParser:
    """The command's parser; `about` goes into its help."""
    parser = command_parser(
        "-m voco_jax.data.prepare",
        about,
        """
--datalist lists/btcv.json --root data/BTCV --cache cache/voco
--scan /data/my_ct --cache cache/mine --size 192 192 64
--config configs/voco_10k.py --scheduler tls://HOST:8786
--config configs/voco_10k.py --config.data.sources.ct.lists="()"
--verify --cache cache/voco
--scan /data/pacs --cache cache/pacs --series "chest.*(b30|br36)" --one-series thinnest
--scan /data/pacs --dry-run
--scan /data/my_ct --cache cache/mine --exclude looks/exclude.txt --prune
--scan /data/my_ct --write-list mine.json
--cache cache/mine --exclude looks/exclude.txt --write-list good.json
""",
    )
    add = parser.add_argument
    add("--datalist", action="append", default=[], metavar="JSON", help="list, JSON or CSV; repeat")
    add("--root", action="append", default=[], metavar="DIR", help="of all lists, or of each")
    add("--scan", action="append", default=[], metavar="DIR", help="folder of CT volumes; repeat")
    add(
        "--config",
        metavar="PY",
        help="config file; what the flags here do not set is as in its data.sources, and "
        "--config.field=value as ever; default: the chain of configs/voco_10k.py",
    )
    add("--source", action="append", metavar="NAME", help="only this source of --config; repeat")
    add("--cache", metavar="DIR", help="folder, gs:// or s3:// URL, instead of the config's")
    add("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help="HU")
    add("--threshold", type=float, help="foreground, 0..1 of the window")
    add("--size", nargs=3, type=int, metavar=("X", "Y", "Z"), help="of the volumes, voxels")
    add("--dtype", choices=("uint8", "float16"), help="of the cache")
    add("--workers", type=int, help="processes; default: the cores; 0: only this process")
    add(
        "--scheduler",
        metavar="ADDRESS",
        help="Dask cluster that does the work: tls://HOST:PORT, with certificates of Dask's own "
        "settings (distributed.comm.tls, docs/data.md), or tcp://HOST:PORT, which is open to all",
    )
    add("--verify", action="store_true", help="re-read the cache; take out what is damaged")
    add(
        "--take-doubtful",
        action="store_true",
        help="prepare what seems to be no CT in HU, too (a mask, MR, 0..1); the manifest says so",
    )
    add(
        "--series",
        metavar="REGEX",
        help="of DICOM only series whose 'SeriesNumber SeriesDescription' it is found in, whatever "
        "the case",
    )
    add(
        "--one-series",
        choices=RULES,
        help="of each DICOM study the series with the most slices, or with the thinnest",
    )
    add(
        "--exclude",
        metavar="FILE",
        help="ids or paths not to prepare, one a line, or CSV; a folder: all in it",
    )
    add(
        "--prune",
        nargs="?",
        type=positive,
        const=0,
        metavar="MOST",
        help="also take out of the cache what is excluded or not asked for any more, at most half "
        "of it, or MOST volumes; without lists and folders only what is excluded",
    )
    add("--dry-run", action="store_true", help="only show the volumes, with their DICOM series")
    add(
        "--write-list",
        metavar="JSON",
        help="only write a list, for --datalist, of what is found, or without lists and folders of "
        "what is in the cache",
    )
    add("--strict", action="store_true", help="exit with status 1 if any volume fails")
    return parser


def find_wanted(options: argparse.Namespace, overrides: dict[str, str]) -> list[Wanted]:
    """What is asked for of each source, by the flags and the config.

    Raises:
        InputError: flags that do not go together, or lists and folders that cannot be used.
    """
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers: found {options.workers}, expected 0 or more")
    if bool(options.datalist) != bool(options.root):
        raise InputError("--datalist and --root: give both; a list's paths are relative to a root")
    named = bool(options.datalist or options.scan)
    if not (named or options.config):
        raise InputError("give --datalist LIST.json --root DATA, --scan DIR or --config FILE")
    if options.source and not options.config:
        raise InputError("--source: names a source of a config file; give --config with it")
    writes = not (options.dry_run or options.write_list)
    if writes and not (options.cache or options.config):
        raise InputError("--cache: missing; name the folder to fill")
    choice = Choice.of(options.series, options.one_series)
    sources = find_sources(options, overrides)
    if named and len(sources) > 1:
        raise InputError(
            f"--datalist, --scan: found beside the sources {', '.join(sources)} of "
            f"{options.config}, expected one: choose it with --source"
        )
    if options.write_list and len(sources) > 1:
        raise InputError(
            f"--write-list: found the sources {', '.join(sources)}, expected one list of one: "
            "choose it with --source"
        )
    found = []
    for name, source in sources.items():
        aside: list[Aside] = []
        how = {**labels_wanted(source.chain), "aside": aside}
        if named:
            volumes = collect(options.datalist, options.root, options.scan, **how)
        elif source.roots:
            volumes = collect(source.lists, source.roots, **how)
        else:
            raise InputError(
                f"{options.config}: data.sources.{name}.roots is empty, expected folders with CT "
                "files"
            )
        looked = None
        if choice or not writes:
            looked = look(volumes, aside)
            looked = choose(looked, choice, aside) if choice else looked
            volumes = [one.volume for one in looked]
        found.append(Wanted(volumes, aside, source, looked))
    return found


def find_sources(options: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Source]:
    """The sources of the config that are asked for, with what the flags set of them.

    Raises:
        InputError: a config or flags that are wrong, or no cache.
    """
    path = options.config or DEFAULT
    sources = load(path, overrides).data.sources
    wanted = options.source or list(sources)
    unknown = [name for name in wanted if name not in sources]
    if unknown:
        raise InputError(
            f"--source: found {', '.join(unknown)}, expected some of {', '.join(sources)}, the "
            f"data.sources of {path}"
        )
    if options.cache and len(wanted) > 1:
        raise InputError(
            f"--cache: found one for the sources {', '.join(wanted)}; choose one with --source, "
            "or set each one's cache in the config"
        )
    flags = {"window": options.window, "foreground_threshold": options.threshold}
    flags |= {"volume_size": options.size, "dtype": options.dtype}
    given = {field: value for field, value in flags.items() if value is not None}
    found = {}
    for name in wanted:
        source = sources[name]
        cache = options.cache or source.cache
        if WORKDIR in cache and not (options.write_list or options.dry_run):
            raise InputError(
                f"{path}: data.sources.{name}.cache is {cache!r}: name it with --cache"
            )
        try:
            chain = dataclasses.replace(source.chain, **given)
        except pydantic.ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise InputError(f"--window, --threshold, --size: {'; '.join(problems)}") from error
        found[name] = dataclasses.replace(source, cache=cache, chain=chain)
    return found
