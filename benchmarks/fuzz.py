"""Broken and hostile files of every format through the real `prepare`, and what becomes of each.

    python benchmarks/fuzz.py                        # 2,000 files, seed 0, a table
    python benchmarks/fuzz.py --files 200 --seed 7 --ct ../shared/ct/images

Each file must end as a whole volume of the cache (read again: checksum, finite, 0..1) or as one
line of failures.jsonl with a reason; no worker may pass its memory limit or be killed; files
outside the data root (canaries) must not be read. Ends with status 1 if anything is not so.
"""

import argparse
import collections
import dataclasses
import gzip
import importlib.metadata
import json
import os
import re
import resource
import shutil
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import psutil
import SimpleITK

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from voco_jax.data.cache import Cache, checksum  # noqa: E402
from voco_jax.data.datalists import Volume, read_list, scan  # noqa: E402
from voco_jax.data.prepare import CHAIN_10K, prepare  # noqa: E402
from voco_jax.data.volumes import dequantise  # noqa: E402

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(64, 32, 64))
BOMB_BLOCKS = 233  # of 16 MiB: 3.9 GB
CANARY = 1717  # HU of the canaries, which no source has
Random = np.random.Generator


@dataclass
class Sample:
    """A volume as files: names relative to its folder, contents; the volume's own name."""

    format: str
    name: str  # "": the folder, a DICOM series
    files: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)
    specials: dict[str, str] = field(default_factory=dict)  # name -> "pipe" or "folder"

    @property
    def header(self) -> str:
        """The file with the header; of a series, the first."""
        return self.name.replace(".img", ".hdr") or min(self.files)

    @property
    def data(self) -> str:
        """The file with the voxels; of a series, the last."""
        if not self.name:
            return max(self.files)
        others = [name for name in self.files if name != self.header]
        return others[0] if others else self.name

    def write(self, folder: Path) -> Path:
        """Writes the files; returns the volume's path."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            if name not in self.links and name not in self.specials:
                (folder / name).write_bytes(content)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)
        for name, kind in self.specials.items():
            if kind == "pipe":
                os.mkfifo(folder / name)
            else:
                (folder / name).mkdir()
        return folder / self.name if self.name else folder


# ---- sources


def sources(folder: Path | None, longest: int = 64) -> list[SimpleITK.Image]:
    """Real CTs, or phantoms where there are none, every nth voxel so that they are small."""
    images = []
    if folder is not None and folder.is_dir():
        for path in sorted(folder.glob("*.nii.gz"))[::3]:
            images.append(SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16))
    else:
        from voco_jax.data.phantom import phantom

        with tempfile.TemporaryDirectory() as scratch:
            for index in range(3):
                path = Path(scratch, f"{index}.nii")
                nibabel.save(phantom(1, index, (64, 64, 40)), path)
                images.append(SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16))
    small = []
    for image in images:
        x, y, z = (max(1, -(-size // longest)) for size in image.GetSize())
        small.append(image[::x, ::y, :: max(z, image.GetSize()[2] // 24)])
    return small


FORMATS = ("nii", "nii.gz", "hdr", "img", "nrrd", "nrrd packed", "nhdr", "nhdr packed", "mha")
FORMATS += ("mha packed", "mhd", "mhd packed", *["series"] * 4)


def sample(image: SimpleITK.Image, format: str, scratch: Path) -> Sample:
    """An image written in a format."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    suffix, _, packed = format.partition(" ")
    name = "" if suffix == "series" else f"a.{suffix}"
    if suffix == "series":
        sys.path.insert(0, str(ROOT / "tests"))
        from scans import save_series

        save_series(scratch, image + 1024, rescale=(1, -1024))
    else:
        written = "a.img" if suffix == "hdr" else name
        SimpleITK.WriteImage(image, str(scratch / written), bool(packed))
    return Sample(format, name, {file.name: file.read_bytes() for file in scratch.iterdir()})


# ---- mutations: each changes a sample, or returns False where it does not apply

MUTATIONS: dict[str, Callable[[Sample, Random, Path], bool | None]] = {}
EXTREMES = ("0", "-1", "1", "2", "nan", "inf", "1e308", "-1e-300", "65536", "2147483648", "x", "")


def mutation(function: Callable[[Sample, Random, Path], bool | None]) -> Callable[..., bool | None]:
    """Adds a mutation under its name in words."""
    MUTATIONS[function.__name__.strip("_").replace("_", " ")] = function
    return function


def _head_size(one: Sample) -> int:
    content = one.files[one.header]
    if one.format in ("nii", "hdr", "img"):
        return min(352, len(content))
    if one.format == "nii.gz":
        return 12
    if not one.name:
        return len(content) - 2 * 16 * 16
    end = content.find(b"LOCAL\n" if one.format.startswith("m") else b"\n\n")
    return end if end > 0 else len(content)


def _change(one: Sample, name: str, at: int, new: bytes) -> None:
    content = one.files[name]
    one.files[name] = content[:at] + new + content[at + len(new) :]


def _repacked(one: Sample, change: Callable[[bytes], bytes]) -> None:
    """Changes the unpacked content of a .nii.gz, which stays a good gzip file."""
    one.files[one.name] = gzip.compress(change(gzip.decompress(one.files[one.name])), 1)


@mutation
def nothing(one: Sample, random: Random, outside: Path) -> None:
    """Must become a volume."""


@mutation
def header_bits_flipped(one: Sample, random: Random, outside: Path) -> None:
    """One to eight bits."""

    def flip(content: bytes, size: int) -> bytes:
        result = bytearray(content)
        for at in random.integers(0, min(size, len(content)), random.integers(1, 9)):
            result[at] ^= 1 << random.integers(8)
        return bytes(result)

    if one.format == "nii.gz":
        _repacked(one, lambda content: flip(content, 352))
    else:
        one.files[one.header] = flip(one.files[one.header], _head_size(one))


@mutation
def data_bits_flipped(one: Sample, random: Random, outside: Path) -> None:
    """One to twenty bits, anywhere in the data file."""
    result = bytearray(one.files[one.data])
    start = _head_size(one) if one.data == one.header else 0
    for at in random.integers(min(start, len(result) - 1), len(result), random.integers(1, 21)):
        result[at] ^= 1 << random.integers(8)
    one.files[one.data] = bytes(result)


@mutation
def header_block_random(one: Sample, random: Random, outside: Path) -> None:
    """Up to 64 random bytes in the header."""

    def spoil(content: bytes, size: int) -> bytes:
        at = int(random.integers(0, size))
        new = random.bytes(int(random.integers(1, 65)))
        return content[:at] + new + content[at + len(new) :]

    if one.format == "nii.gz":
        _repacked(one, lambda content: spoil(content, 348))
    else:
        one.files[one.header] = spoil(one.files[one.header], _head_size(one))


@mutation
def header_field_extreme(one: Sample, random: Random, outside: Path) -> None:
    """A number of the header becomes 0, -1, NaN, huge, text."""

    def nifti(content: bytes) -> bytes:
        fields = [(40 + 2 * i, "<h") for i in range(8)] + [(70, "<h"), (72, "<h"), (252, "<h")]
        fields += [(76 + 4 * i, "<f") for i in range(4)] + [(108, "<f"), (112, "<f"), (254, "<h")]
        fields += [(256 + 4 * i, "<f") for i in range(18)]
        at, kind = fields[random.integers(len(fields))]
        whole = (0, -1, 1, 32767, -32768, 128, 512, 2304)
        real = (0.0, -1.0, np.nan, np.inf, 1e38, 1e-38, -1e9, 352.5)
        value = whole[random.integers(8)] if kind == "<h" else real[random.integers(8)]
        return content[:at] + struct.pack(kind, value) + content[at + struct.calcsize(kind) :]

    if one.format == "nii.gz":
        _repacked(one, nifti)
    elif one.format in ("nii", "hdr", "img"):
        one.files[one.header] = nifti(one.files[one.header])
    else:
        # Text formats, and the numbers of DICOM that are text, of the same length.
        content = one.files[one.header]
        found = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?(?![\w.])", content[: _head_size(one)]))
        if not found:
            return
        spot = found[random.integers(len(found))]
        new = EXTREMES[random.integers(len(EXTREMES))].encode()
        if not one.name:
            new = new[: len(spot[0])].ljust(len(spot[0]))
        one.files[one.header] = content[: spot.start()] + new + content[spot.end() :]


@mutation
def size_changed(one: Sample, random: Random, outside: Path) -> None:
    """One axis of the header longer or shorter; the data as they were."""
    factor = float(random.choice([0.3, 0.5, 0.9, 1.1, 2, 10, 1000]))

    def nifti(content: bytes) -> bytes:
        at = 42 + 2 * int(random.integers(3))
        size = struct.unpack_from("<h", content, at)[0]
        changed = int(np.clip(size * factor, -32768, 32767))
        return content[:at] + struct.pack("<h", changed) + content[at + 2 :]

    if one.format == "nii.gz":
        _repacked(one, nifti)
    elif one.format in ("nii", "hdr", "img"):
        one.files[one.header] = nifti(one.files[one.header])
    elif one.name:
        key = rb"(DimSize = |sizes: )(\d+) (\d+) (\d+)"

        def text(found: re.Match[bytes]) -> bytes:
            sizes = [int(found[i]) for i in (2, 3, 4)]
            axis = int(random.integers(3))
            sizes[axis] = int(sizes[axis] * factor)
            return found[1] + " ".join(map(str, sizes)).encode()

        one.files[one.header] = re.sub(key, text, one.files[one.header], count=1)
    else:
        name = sorted(one.files)[random.integers(len(one.files))]
        tag = (b"\x28\0\x10\0\x02\0\0\0", b"\x28\0\x11\0\x02\0\0\0")[random.integers(2)]
        at = one.files[name].find(tag) + 8
        size = struct.unpack_from("<H", one.files[name], at)[0]
        _change(one, name, at, struct.pack("<H", int(min(size * factor, 65535))))


@mutation
def type_changed(one: Sample, random: Random, outside: Path) -> None:
    """Another type of voxels, or number of bits, or of numbers for each voxel."""

    def nifti(content: bytes) -> bytes:
        code = int(random.choice([2, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 1792, 2304]))
        return content[:70] + struct.pack("<hh", code, 16) + content[74:]

    if one.format == "nii.gz":
        _repacked(one, nifti)
    elif one.format in ("nii", "hdr", "img"):
        one.files[one.header] = nifti(one.files[one.header])
    elif one.name:
        meta = ["MET_UCHAR", "MET_DOUBLE", "MET_FLOAT_ARRAY", "MET_NONE", "MET_LONG_LONG", "?"]
        nrrd = ["uchar", "double", "float", "block", "int64", "?"]
        index = random.integers(6)
        content = one.files[one.header].replace(b"MET_SHORT", meta[index].encode())
        one.files[one.header] = content.replace(b"type: short", b"type: " + nrrd[index].encode())
    else:
        name = sorted(one.files)[random.integers(len(one.files))]
        element = int(random.choice([0x02, 0x100, 0x101, 0x102, 0x103]))
        tag = b"\x28\0" + struct.pack("<H", element) + b"\x02\0\0\0"
        at = one.files[name].find(tag) + 8
        _change(one, name, at, struct.pack("<H", int(random.choice([0, 1, 3, 8, 12, 32, 64]))))


@mutation
def cut(one: Sample, random: Random, outside: Path) -> None:
    """The data file ends somewhere."""
    content = one.files[one.data]
    one.files[one.data] = content[: int(random.integers(1, len(content)))]


@mutation
def header_cut(one: Sample, random: Random, outside: Path) -> None:
    """The header ends somewhere."""
    content = one.files[one.header]
    one.files[one.header] = content[: int(random.integers(1, _head_size(one)))]


@mutation
def empty(one: Sample, random: Random, outside: Path) -> None:
    """One file has no bytes."""
    one.files[sorted(one.files)[random.integers(len(one.files))]] = b""


@mutation
def noise(one: Sample, random: Random, outside: Path) -> None:
    """One file is random bytes, its first ones true or not."""
    name = sorted(one.files)[random.integers(len(one.files))]
    kept = int(random.choice([0, 4, 132, 300]))
    one.files[name] = one.files[name][:kept] + random.bytes(4000)


@mutation
def block_lost(one: Sample, random: Random, outside: Path) -> None:
    """512 bytes of the data file are zero, or gone."""
    content = one.files[one.data]
    at = int(random.integers(0, len(content)))
    zeros = bytes(min(512, len(content) - at)) if random.random() < 0.5 else b""
    one.files[one.data] = content[:at] + zeros + content[at + 512 :]


@mutation
def more_bytes(one: Sample, random: Random, outside: Path) -> None:
    """Something follows the data."""
    one.files[one.data] += random.bytes(int(random.integers(1, 5000)))


@mutation
def bomb(one: Sample, random: Random, outside: Path) -> bool | None:
    """Few bytes that unpack to 3.9 GB; the header says so, or more, or less."""
    if one.format not in ("nii.gz", "nrrd packed", "nhdr packed", "mha packed", "mhd packed"):
        return False
    sizes = [(1250, 1250, 1250), (2000, 2000, 2000), (20, 20, 20)][random.integers(3)]
    if one.format == "nii.gz":
        head = bytearray(gzip.decompress(one.files[one.name])[:352])
        struct.pack_into("<8h", head, 40, 3, *sizes, 1, 1, 1, 1)
        one.files[one.name] = _zeros(bytes(head), gzipped=True)
        return None
    key = rb"(DimSize = |sizes: )(\d+) (\d+) (\d+)"
    text = one.files[one.header]
    text = re.sub(rb"CompressedDataSize = \d+\n", b"", text)
    text = re.sub(key, lambda found: found[1] + " ".join(map(str, sizes)).encode(), text, count=1)
    packed = _zeros(b"", gzipped=one.format.startswith("n"))
    if one.data == one.header:
        one.files[one.header] = text
        one.files[one.header] = text[: _head_size(one)]
        one.files[one.header] += (b"LOCAL\n" if "mha" in one.format else b"\n\n") + packed
    else:
        one.files[one.header], one.files[one.data] = text, packed
    return None


_BOMBS: dict[bool, bytes] = {}


def _zeros(head: bytes, gzipped: bool) -> bytes:
    """A head and 3.9 GB of zeros, packed; the zeros only once."""
    if gzipped not in _BOMBS:
        packer = zlib.compressobj(9, wbits=31 if gzipped else 15)
        block = bytes(2**24)
        _BOMBS[gzipped] = (
            b"".join(packer.compress(block) for _ in range(BOMB_BLOCKS)) + packer.flush()
        )
    return (gzip.compress(head) if head else b"") + _BOMBS[gzipped]


@mutation
def file_missing(one: Sample, random: Random, outside: Path) -> bool | None:
    """The file beside the header; of a series, one slice."""
    if len(one.files) == 1:
        return False
    del one.files[sorted(one.files)[random.integers(len(one.files))] if not one.name else one.data]
    return None


@mutation
def path_outside(one: Sample, random: Random, outside: Path) -> bool | None:
    """The header names a canary outside the data root."""
    if one.format.split()[0] not in ("nhdr", "mhd"):
        return False
    canary = "canary.raw" if "packed" not in one.format else "canary.raw.gz"
    ways = [str(outside / canary), f"../../../outside/{canary}", f"./../../../outside/{canary}"]
    ways += [f"sub/../../../../outside/{canary}", f"..\\..\\..\\outside\\{canary}"]
    ways += [f"file://{outside / canary}", f"LIST\n{outside / canary}"]
    name = ways[random.integers(len(ways))].encode()
    one.files[one.header] = one.files[one.header].replace(one.data.encode(), name)
    del one.files[one.data]
    return None


@mutation
def link_outside(one: Sample, random: Random, outside: Path) -> bool | None:
    """The file beside the header, or a slice, is a link to a canary outside the data root."""
    if one.data == one.name:
        return False  # lists and scans refuse such a link before anything is read
    suffix = ".dcm" if not one.name else ".raw" if "packed" not in one.format else ".raw.gz"
    one.links[one.data] = str(outside / f"canary{suffix}")
    return None


@mutation
def no_file(one: Sample, random: Random, outside: Path) -> None:
    """A pipe, which would wait for ever, or a folder in place of a file."""
    name = one.data if random.random() < 0.7 else one.header
    one.specials[name] = "pipe" if random.random() < 0.7 else "folder"


@mutation
def slices_mixed(one: Sample, random: Random, outside: Path) -> bool | None:
    """A slice twice, of another series, or of another size; a position changed."""
    if one.name:
        return False
    names = sorted(one.files)
    name = names[random.integers(len(names))]
    content = one.files[name]
    way = random.integers(4)
    if way == 0:
        one.files["copy.dcm"] = content
    elif way == 1:
        for other in names[::2]:
            one.files[other] = one.files[other].replace(b"1.2.3\0", b"1.2.4\0")
    elif way == 2:
        one.files[name] = content.replace(b"\x28\0\x30\0", b"\x28\0\x31\0", 1)
    else:
        at = content.find(b"\x20\0\x32\0") + 8
        one.files[name] = content[:at] + b"99" + content[at + 2 :]
    return None


@mutation
def other_format(one: Sample, random: Random, outside: Path) -> bool | None:
    """The name of one format, the content of another."""
    if not one.name or len(one.files) > 1:
        return False
    new = ["a.nii", "a.nrrd", "a.mha", "a.hdr", "a.dcm", "a.mhd", "a.nhdr"][random.integers(7)]
    one.files = {new: one.files[one.name]}
    one.name = new
    return None


def mutated(
    index: int, seed: int, originals: dict[tuple[int, str], Sample], count: int, outside: Path
) -> tuple[str, Sample]:
    """File number `index`: its mutation and the sample; the same for the same arguments."""
    random = np.random.default_rng([seed, index])
    kind = sorted(MUTATIONS)[index % len(MUTATIONS)]
    while True:
        key = (int(random.integers(count)), FORMATS[random.integers(len(FORMATS))])
        original = originals[key]
        one = Sample(original.format, original.name, dict(original.files))
        if MUTATIONS[kind](one, random, outside) is not False:
            return kind, one


def canaries(outside: Path, image: SimpleITK.Image, scratch: Path) -> None:
    """Files that would be good voxels if they were read, last read long ago."""
    outside.mkdir()
    voxels = np.full(image.GetNumberOfPixels(), CANARY, "<i2")
    voxels[::2] = -1000
    (outside / "canary.raw").write_bytes(voxels.tobytes() * 2)
    (outside / "canary.raw.gz").write_bytes(gzip.compress(voxels.tobytes() * 2))
    slices = sample(image, "series", scratch).files
    (outside / "canary.dcm").write_bytes(slices[max(slices)])
    for file in outside.iterdir():
        os.utime(file, (10**9, 10**9 + 1))  # older than its content: the next reading is noted


# ---- the run


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


def main() -> int:
    """The command; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--files", type=int, default=2000, help="how many; default 2000")
    add("--seed", type=int, default=0)
    add(
        "--ct", type=Path, default=ROOT.parent / "shared" / "ct" / "images", help="real NIfTI files"
    )
    add("--workers", type=int, default=2)
    add("--memory", type=float, default=2.0, help="limit of each worker, GiB; default 2")
    add("--keep", type=Path, help="an empty folder for files and cache; default: a temporary one")
    options = parser.parse_args()
    limit = int(options.memory * 2**30)
    # Dask gives each worker its part of this; the kernel does not look at it.
    total = limit * (psutil.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_RSS, (total, total))
    with tempfile.TemporaryDirectory(prefix="voco_fuzz_") as temporary:
        folder = options.keep or Path(temporary)
        return _run(options, folder, limit)


def _run(options: argparse.Namespace, folder: Path, limit: int) -> int:
    images = sources(options.ct)
    scratch, outside, data = folder / "scratch", folder / "outside", folder / "root" / "data"
    originals = {
        (number, format): sample(image, format, scratch)
        for number, image in enumerate(images)
        for format in FORMATS
    }
    canaries(outside, images[0], scratch)
    kinds, names = {}, []
    for index in range(options.files):
        kind, one = mutated(index, options.seed, originals, len(images), outside)
        one.write(data / f"{index:05d}")
        name = f"{index:05d}/{one.name}".rstrip("/")
        names.append(name)
        kinds[f"data/{name}"] = kind, one.format
    (folder / "list.json").write_text(json.dumps({"training": names}))
    volumes = read_list(folder / "list.json", data)
    watch = Watch(folder / "cache")
    watch.start()
    start = time.monotonic()
    summary = prepare(volumes, folder / "cache", CHAIN, options.workers, progress=True)
    seconds = time.monotonic() - start
    watch.done.set()
    problems = _problems(folder / "cache", volumes, kinds)
    problems += [
        f"read: {file.name}" for file in outside.iterdir() if file.stat().st_atime != 10**9
    ]
    problems += [
        f"memory: a process had {peak / 2**30:.2f} GiB resident"
        for peak in watch.peaks.values()
        if peak > limit
    ]
    _print_table(summary.failures, kinds)
    try:
        found = f"{len(scan(data)):,} volumes"
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).replace(str(folder), '')[:150]}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("SimpleITK", "nibabel")]
    print(f"\nscan of the same folder: {found}")
    print(f"{', '.join(versions)}, Python {sys.version.split()[0]}, {len(images)} sources")
    print(
        f"{options.files:,} files, seed {options.seed}: {summary.done} volumes, {summary.failed} "
        f"failures, {seconds:.0f} s with {options.workers} workers of {options.memory:g} GiB"
    )
    peaks = sorted(watch.peaks.values())[-options.workers :]
    print("largest resident memory of processes: " + ", ".join(f"{p / 2**30:.2f}" for p in peaks))
    print(f"longest time without an outcome: {watch.longest:.1f} s")
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{len(problems)} problems")
    return min(1, len(problems))


def _problems(
    cache_path: Path, volumes: list[Volume], kinds: dict[str, tuple[str, str]]
) -> list[str]:
    """What is not as it must be."""
    cache = Cache.open(cache_path, CHAIN)
    whole = {entry.id: entry for entry in cache.entries}
    lines = (cache_path / "failures.jsonl").read_text().splitlines()
    failures = collections.Counter(json.loads(line)["id"] for line in lines)
    reasons = {json.loads(line)["id"]: json.loads(line)["reason"] for line in lines}
    problems = []
    for volume in volumes:
        kind = kinds[volume.id]
        where = f"{volume.id} ({', '.join(kind)})"
        if (volume.id in whole) + failures[volume.id] != 1:
            problems.append(f"{where}: {failures[volume.id]} failure lines")
        elif volume.id in whole:
            entry = whole[volume.id]
            voxels = cache.read(entry)
            values = dequantise(voxels)
            good = voxels.shape == CHAIN.volume_size and checksum(voxels) == entry.checksum
            if not (good and np.isfinite(values).all() and 0 <= values.min() <= values.max() <= 1):
                problems.append(f"{where}: its voxels are not whole")
            if kind[0] in ("path outside", "link outside"):
                problems.append(f"{where}: a volume, expected a failure")
        elif not re.match(r"[\w /-]+: ", reasons[volume.id]):
            problems.append(f"{where}: no reason: {reasons[volume.id]}")
        elif reasons[volume.id].startswith(("worker killed", "unexpected")) or kind[0] == "nothing":
            problems.append(f"{where}: {reasons[volume.id]}")
    return problems


def _print_table(failures: tuple, kinds: dict[str, tuple[str, str]]) -> None:
    reasons = {failure.id: failure.reason.split(":")[0] for failure in failures}
    print("| mutation | volumes | failures | reasons |\n| --- | --- | --- | --- |")
    for kind in sorted(MUTATIONS):
        ids = [id for id, (name, _) in kinds.items() if name == kind]
        found = collections.Counter(reasons[id] for id in ids if id in reasons)
        words = ", ".join(f"{reason} {count}" for reason, count in found.most_common())
        print(f"| {kind} | {len(ids) - found.total()} | {found.total()} | {words} |")


if __name__ == "__main__":
    sys.exit(main())
