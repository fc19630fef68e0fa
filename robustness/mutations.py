"""What fuzz.py does to files: each mutation changes a sample; False: it does not apply to it."""

import gzip
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from robustness.samples import FORMATS, Sample

Random = np.random.Generator


@dataclass(frozen=True)
class Around:
    """What some mutations need to know: where the canaries are, what a bomb unpacks to."""

    outside: Path
    bomb_bytes: int


Mutation = Callable[[Sample, Random, Around], bool | None]
MUTATIONS: dict[str, Mutation] = {}
EXTREMES = ("0", "-1", "1", "2", "nan", "inf", "1e308", "-1e-300", "65536", "2147483648", "x", "")


def mutation(function: Mutation) -> Mutation:
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
def nothing(one: Sample, random: Random, around: Around) -> None:
    """Must become a volume."""


@mutation
def header_bits_flipped(one: Sample, random: Random, around: Around) -> None:
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
def data_bits_flipped(one: Sample, random: Random, around: Around) -> None:
    """One to twenty bits, anywhere in the data file."""
    result = bytearray(one.files[one.data])
    start = _head_size(one) if one.data == one.header else 0
    for at in random.integers(min(start, len(result) - 1), len(result), random.integers(1, 21)):
        result[at] ^= 1 << random.integers(8)
    one.files[one.data] = bytes(result)


@mutation
def header_block_random(one: Sample, random: Random, around: Around) -> None:
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
def header_field_extreme(one: Sample, random: Random, around: Around) -> None:
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
def size_changed(one: Sample, random: Random, around: Around) -> None:
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
def type_changed(one: Sample, random: Random, around: Around) -> None:
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
def cut(one: Sample, random: Random, around: Around) -> None:
    """The data file ends somewhere."""
    content = one.files[one.data]
    one.files[one.data] = content[: int(random.integers(1, len(content)))]


@mutation
def header_cut(one: Sample, random: Random, around: Around) -> None:
    """The header ends somewhere."""
    content = one.files[one.header]
    one.files[one.header] = content[: int(random.integers(1, _head_size(one)))]


@mutation
def empty(one: Sample, random: Random, around: Around) -> None:
    """One file has no bytes."""
    one.files[sorted(one.files)[random.integers(len(one.files))]] = b""


@mutation
def noise(one: Sample, random: Random, around: Around) -> None:
    """One file is random bytes, its first ones true or not."""
    name = sorted(one.files)[random.integers(len(one.files))]
    kept = int(random.choice([0, 4, 132, 300]))
    one.files[name] = one.files[name][:kept] + random.bytes(4000)


@mutation
def block_lost(one: Sample, random: Random, around: Around) -> None:
    """512 bytes of the data file are zero, or gone."""
    content = one.files[one.data]
    at = int(random.integers(0, len(content)))
    zeros = bytes(min(512, len(content) - at)) if random.random() < 0.5 else b""
    one.files[one.data] = content[:at] + zeros + content[at + 512 :]


@mutation
def more_bytes(one: Sample, random: Random, around: Around) -> None:
    """Something follows the data."""
    one.files[one.data] += random.bytes(int(random.integers(1, 5000)))


@mutation
def bomb(one: Sample, random: Random, around: Around) -> bool | None:
    """Few bytes that unpack to many; the header says 3.9 GB, or more, or less."""
    if one.format not in ("nii.gz", "nrrd packed", "nhdr packed", "mha packed", "mhd packed"):
        return False
    sizes = [(1250, 1250, 1250), (2000, 2000, 2000), (20, 20, 20)][random.integers(3)]
    if one.format == "nii.gz":
        head = bytearray(gzip.decompress(one.files[one.name])[:352])
        struct.pack_into("<8h", head, 40, 3, *sizes, 1, 1, 1, 1)
        one.files[one.name] = _zeros(bytes(head), True, around.bomb_bytes)
        return None
    key = rb"(DimSize = |sizes: )(\d+) (\d+) (\d+)"
    text = one.files[one.header]
    text = re.sub(rb"CompressedDataSize = \d+\n", b"", text)
    text = re.sub(key, lambda found: found[1] + " ".join(map(str, sizes)).encode(), text, count=1)
    packed = _zeros(b"", one.format.startswith("n"), around.bomb_bytes)
    if one.data == one.header:
        one.files[one.header] = text
        one.files[one.header] = text[: _head_size(one)]
        one.files[one.header] += (b"LOCAL\n" if "mha" in one.format else b"\n\n") + packed
    else:
        one.files[one.header], one.files[one.data] = text, packed
    return None


def _zeros(head: bytes, gzipped: bool, count: int) -> bytes:
    """A head and so many zeros, packed."""
    return (gzip.compress(head) if head else b"") + _packed_zeros(gzipped, count)


@cache
def _packed_zeros(gzipped: bool, count: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31 if gzipped else 15)
    block = bytes(2**24)
    blocks = [packer.compress(block) for _ in range(count // len(block))]
    return b"".join(blocks) + packer.compress(bytes(count % len(block))) + packer.flush()


@mutation
def file_missing(one: Sample, random: Random, around: Around) -> bool | None:
    """The file beside the header; of a series, one slice."""
    if len(one.files) == 1:
        return False
    del one.files[sorted(one.files)[random.integers(len(one.files))] if not one.name else one.data]
    return None


@mutation
def path_outside(one: Sample, random: Random, around: Around) -> bool | None:
    """The header names a canary outside the data root."""
    if one.format.split()[0] not in ("nhdr", "mhd"):
        return False
    canary = "canary.raw" if "packed" not in one.format else "canary.raw.gz"
    ways = [
        str(around.outside / canary),
        f"../../../outside/{canary}",
        f"./../../../outside/{canary}",
    ]
    ways += [f"sub/../../../../outside/{canary}", f"..\\..\\..\\outside\\{canary}"]
    ways += [f"file://{around.outside / canary}", f"LIST\n{around.outside / canary}"]
    name = ways[random.integers(len(ways))].encode()
    one.files[one.header] = one.files[one.header].replace(one.data.encode(), name)
    del one.files[one.data]
    return None


@mutation
def link_outside(one: Sample, random: Random, around: Around) -> bool | None:
    """The file beside the header, or a slice, is a link to a canary outside the data root."""
    if one.data == one.name:
        return False  # lists and scans refuse such a link before anything is read
    suffix = ".dcm" if not one.name else ".raw" if "packed" not in one.format else ".raw.gz"
    one.links[one.data] = str(around.outside / f"canary{suffix}")
    return None


@mutation
def no_file(one: Sample, random: Random, around: Around) -> None:
    """A pipe, which would wait for ever, or a folder in place of a file."""
    name = one.data if random.random() < 0.7 else one.header
    one.specials[name] = "pipe" if random.random() < 0.7 else "folder"


@mutation
def slices_mixed(one: Sample, random: Random, around: Around) -> bool | None:
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
def element_lost(one: Sample, random: Random, around: Around) -> bool | None:
    """A DICOM element of one slice, or of all, goes or gets another length or type."""
    if one.name:
        return False
    names = sorted(one.files)
    numbers = ((8, 0x16), (8, 0x60), (32, 0x0E), (32, 0x32), (32, 0x37), (40, 0x30), (40, 0x1052))
    tags = [struct.pack("<2H", *pair) for pair in (*numbers, (40, 0x1053), (0x7FE0, 0x10))]
    tag, way = tags[random.integers(len(tags))], int(random.integers(3))
    chosen = names if random.random() < 0.5 else [names[random.integers(len(names))]]
    for name in chosen:
        content = one.files[name]
        at = content.find(tag, 132)
        if at < 0:
            continue
        if way == 0:
            new = tag[:2] + bytes(random.bytes(2)) + content[at + 4 : at + 8]
        elif way == 1:
            new = content[at : at + 4] + random.bytes(4)
        else:
            new = content[at : at + 4] + struct.pack("<I", int(random.integers(2**32)))
        _change(one, name, at, new)
    return None


@mutation
def preamble_lost(one: Sample, random: Random, around: Around) -> bool | None:
    """Slices without their first 132 bytes, which are read all the same; with half of them, not."""
    if one.name:
        return False
    kept = int(random.choice([0, 0, 64, 131]))
    for name in one.files:
        one.files[name] = one.files[name][:kept] + one.files[name][132:]
    return None


@mutation
def no_slice_beside(one: Sample, random: Random, around: Around) -> bool | None:
    """What is no slice, in the folder of a series: which has to be read as it is."""
    if one.name:
        return False
    content = bytearray(one.files[min(one.files)])
    at = content.index(b"1.2.840.10008.5.1.4.1.1.2\0")
    content[at : at + 26] = b"1.2.840.10008.5.1.4.1.1.88"
    pixels = content.index(b"\xe0\x7f\x10\0")
    found = {
        "VERSION": b"2.1",
        "LOCKFILE": b"",
        "README": b"viewer " * int(random.integers(1, 99)),
        "REPORT": bytes(content[:pixels]),
        "a.txt": random.bytes(200),
    }
    names = sorted(found)
    for name in random.choice(names, int(random.integers(1, len(names) + 1)), replace=False):
        one.files[str(name)] = found[str(name)]
    return None


@mutation
def not_in_hu(one: Sample, random: Random, around: Around) -> bool | None:
    """Voxels scaled to 0..1, to a mask, turned upside down, or without the intercept."""
    if one.format not in ("nii", "nii.gz"):
        return False
    way = int(random.integers(4))

    def change(content: bytes) -> bytes:
        if way == 0:
            return content[:112] + struct.pack("<2f", 2.4e-4, 0.25) + content[120:]
        if way == 1:
            return content[:112] + struct.pack("<2f", -1, 0) + content[120:]
        voxels = np.frombuffer(content[352:], "<i2")
        new = (voxels > 50) if way == 2 else np.maximum(voxels, -1024) + 1024
        return content[:352] + new.astype("<i2").tobytes()

    if one.format == "nii":
        one.files[one.name] = change(one.files[one.name])
    else:
        _repacked(one, change)
    return None


@mutation
def other_format(one: Sample, random: Random, around: Around) -> bool | None:
    """The name of one format, the content of another."""
    if not one.name or len(one.files) > 1:
        return False
    new = ["a.nii", "a.nrrd", "a.mha", "a.hdr", "a.dcm", "a.mhd", "a.nhdr"][random.integers(7)]
    one.files = {new: one.files[one.name]}
    one.name = new
    return None


def mutated(
    index: int, seed: int, originals: dict[tuple[int, str], Sample], count: int, around: Around
) -> tuple[str, Sample]:
    """File number `index`: its mutation and the sample; the same for the same arguments."""
    random = np.random.default_rng([seed, index])
    kind = sorted(MUTATIONS)[index % len(MUTATIONS)]
    while True:
        key = (int(random.integers(count)), FORMATS[random.integers(len(FORMATS))])
        original = originals[key]
        one = Sample(original.format, original.name, dict(original.files))
        if MUTATIONS[kind](one, random, around) is not False:
            return kind, one
