"""Broken and hostile weight files through the reader, and what becomes of each.

    python -m robustness.fuzz_weights    # 1,000 files, seed 0, a minute

Small files of torch.save and safetensors, one mutation each; of the zip archive also within the
parts that it packs, so that its checksums are good. Each must be read as PyTorch or safetensors
read it, or end as one line of an InputError, within two seconds and 500 MB. Ends with status 1 if
anything is not so. Needs PyTorch (requirements-dev.txt).
"""

import argparse
import collections
import io
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from voco_jax.errors import InputError
from voco_jax.interop.files.weights import read

SECONDS, BYTES = 2.0, 500 * 2**20
_BLOCK = 100  # files that one process reads
Random = np.random.Generator
Mutate = Callable[[bytes, Random], bytes]
Outcome = tuple[str, str]  # what became of a file: "read", "refused" or "PROBLEM"; words


def _state() -> dict[str, torch.Tensor]:
    """A few tensors with a network's names, in several dtypes."""
    base = torch.arange(48, dtype=torch.float32).reshape(2, 24) / 7
    name = "swinViT.layers1.0.blocks.0."
    return {
        f"{name}attn.qkv.weight": base,
        f"{name}attn.qkv.bias": base[0, :12].half(),
        f"{name}norm1.weight": base[1].to(torch.bfloat16),
        "encoder1.layer.conv1.conv.weight": base[:, ::2].t(),
        "out.conv.conv.bias": base[0, :2].double(),
    }


def originals() -> dict[str, bytes]:
    """The files to start from, by suffix."""
    found = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": _state()}, found)
    plain = {name: tensor.contiguous() for name, tensor in _state().items()}
    return {".pt": found.getvalue(), ".safetensors": safetensors.torch.save(plain)}


def _bits(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for at in random.integers(0, len(changed), int(random.integers(1, 9))):
        changed[at] ^= 1 << int(random.integers(8))
    return bytes(changed)


def _block(content: bytes, random: Random) -> bytes:
    at = int(random.integers(len(content)))
    new = random.bytes(int(random.integers(1, 65)))
    return content[:at] + new + content[at + len(new) :]


def _cut(content: bytes, random: Random) -> bytes:
    return content[: int(random.integers(len(content)))]


def _more(content: bytes, random: Random) -> bytes:
    return content + random.bytes(int(random.integers(1, 5000)))


def _lost(content: bytes, random: Random) -> bytes:
    at = int(random.integers(len(content)))
    return content[:at] + content[at + int(random.integers(1, 200)) :]


def _twice(content: bytes, random: Random) -> bytes:
    at = int(random.integers(len(content)))
    part = content[at : at + int(random.integers(1, 400))]
    return content[:at] + part * int(random.choice([2, 50, 5000])) + content[at + len(part) :]


def _number(content: bytes, random: Random) -> bytes:
    """A number of a text header, or one of a pickle's, becomes another."""
    spots = list(re.finditer(rb"\d+", content[:4000]))
    if not spots:
        return _bits(content, random)
    spot = spots[int(random.integers(len(spots)))]
    new = str(random.choice(["0", "-1", "1e300", "9" * 4000, "18446744073709551616", "NaN", "[]"]))
    return content[: spot.start()] + new.encode() + content[spot.end() :]


def _name(content: bytes, random: Random) -> bytes:
    old = (b"swinViT", b"weight", b"F32", b"FloatStorage", b"_rebuild_tensor_v2", b"torch")
    new = (b"swinViT.swinViT", b"eval", b"I64", b"LongStorage", b"_rebuild_qtensor", b"os", b"")
    one, other = old[int(random.integers(len(old)))], new[int(random.integers(len(new)))]
    return content.replace(one, other, int(random.integers(1, 3)))


def nothing(content: bytes, random: Random) -> bytes:
    """Must be read."""
    return content


_CHANGES: tuple[Mutate, ...] = (_bits, _block, _cut, _more, _lost, _twice, _number, _name)


def _inside(change: Mutate) -> Mutate:
    """The change of one member of a zip archive, packed anew."""

    def inside(content: bytes, random: Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = {info.filename: archive.read(info) for info in archive.infolist()}
        names = [name for name in parts if name.endswith("data.pkl")] * 3 + sorted(parts)
        name = names[int(random.integers(len(names)))]
        parts[name] = change(parts[name] or b"0", random)
        found = io.BytesIO()
        with zipfile.ZipFile(found, "w") as archive:
            for one, value in parts.items():
                archive.writestr(one, value)
        return found.getvalue()

    return inside


def mutations(suffix: str) -> dict[str, Mutate]:
    """The mutations of a kind of file, by name."""
    found = {change.__name__.strip("_"): change for change in (nothing, *_CHANGES)}
    if suffix == ".pt":
        inner = {f"{change.__name__.strip('_')} inside": _inside(change) for change in _CHANGES}
        found |= inner
    return found


def judge(path: Path) -> Outcome:
    """Reads a file twice, with our reader and another."""
    start = time.monotonic()
    try:
        ours = read(path)
    except InputError as error:
        line = str(error)
        late = time.monotonic() - start > SECONDS
        good = "\n" not in line.strip() and not late
        return (
            ("refused", line) if good else ("PROBLEM", f"{time.monotonic() - start:.1f} s: {line}")
        )
    except Exception as error:
        return "PROBLEM", f"{type(error).__name__}: {error}"
    if time.monotonic() - start > SECONDS:
        return "PROBLEM", f"{time.monotonic() - start:.1f} s to read it"
    if path.suffix == ".pt":
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        theirs = theirs.get("state_dict", theirs)
    else:
        theirs = safetensors.torch.load_file(path)
    for name, value in ours.items():
        bare = name.removeprefix("swinViT.")  # which may have been put there
        other = [tensor for key, tensor in theirs.items() if str(key).endswith(bare)]
        if not any(_same(value, tensor) for tensor in other):
            return "PROBLEM", f"{name} is not as another reader has it"
    return "read", ""


def _same(value: np.ndarray, tensor: torch.Tensor) -> bool:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    other = (tensor.float() if half else tensor).numpy()
    return value.shape == other.shape and np.array_equal(value, other, equal_nan=True)


def _judge_all(paths: list[Path], pipe: Any) -> None:
    """In a process of its own: a file may end it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path in paths:
        before = _resident()
        outcome = judge(path)
        grown = _resident() - before
        if grown > BYTES:
            outcome = "PROBLEM", f"{grown / 2**20:.0f} MB of memory"
        pipe.send(outcome)


def _resident() -> int:
    """The most that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(paths: list[Path]) -> list[Outcome]:
    """What became of files, whatever they do to the processes that read them."""
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(paths):
        here, there = context.Pipe(duplex=False)
        todo = paths[len(outcomes) :][:_BLOCK]
        process = context.Process(target=_judge_all, args=(todo, there))
        process.start()
        there.close()
        for number in range(len(todo)):
            try:
                if not here.poll(60.0 if number == 0 else 20.0):
                    raise EOFError
                outcomes.append(here.recv())
            except EOFError:
                process.kill()
                process.join()
                outcomes.append(("PROBLEM", f"hung, or ended the process ({process.exitcode})"))
                break
        process.join()
    return outcomes


def main() -> int:
    """The command; exit status 1 if any file became what it should not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1000, help="default 1000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    starts, kinds, paths = originals(), [], []
    pairs = [(suffix, name) for suffix in starts for name in mutations(suffix)]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.files):
            suffix, kind = pairs[index % len(pairs)]
            random = np.random.default_rng([options.seed, index])
            path = Path(folder, f"{index:05d}{suffix}")
            path.write_bytes(mutations(suffix)[kind](starts[suffix], random))
            kinds.append(f"{kind}, {suffix}")
            paths.append(path)
        outcomes = run(paths)
    problems = [
        f"{path.name} ({kind}): {words}"
        for path, kind, (what, words) in zip(paths, kinds, outcomes, strict=True)
        if what == "PROBLEM" or (kind.startswith("nothing") and what != "read")
    ]
    print("| mutation | read | refused |\n| --- | --- | --- |")
    for kind in dict.fromkeys(kinds):
        own = (what for one, (what, _) in zip(kinds, outcomes, strict=True) if one == kind)
        found = collections.Counter(own)
        print(f"| {kind} | {found['read']} | {found['refused']} |")
    print(*problems, sep="\n")
    print(f"{options.files} weight files, seed {options.seed}: {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
