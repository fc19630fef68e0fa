"""Plans of voco_10k at three sizes for TPU slices, as a table for docs/scaling.md.

    python -m comparisons.scaling --output plans                 # all; hours of two cores
    python -m comparisons.scaling --output plans B v5e:4x4       # one size, one slice

Needs libtpu, no TPU. One JSON a plan; those that are there already are not made again: for other
settings or versions take another folder.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SIZES = {
    "B": {},
    "L": {"model.feature_size": 96, "mesh.fsdp": 4},
    "H": {"model.feature_size": 192, "mesh.fsdp": 16},
}
FEWER = {("H", "v5e"): 3}  # crops a microbatch, where a chip's memory has no room for nine
SLICES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v4:4x4x4")


def plan(size: str, topology: str, path: Path) -> None:
    """Makes one plan, unless it is there."""
    if path.exists():
        return
    command = [sys.executable, "-m", "voco_jax.plan", "--config", "configs/voco_10k.py"]
    command += ["--topology", topology, "--batch-per-device", "1", "--json", str(path)]
    changes = dict(SIZES[size])
    if crops := FEWER.get((size, topology.partition(":")[0])):
        changes["model.crops_per_pass"] = crops
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{size} on {topology}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    if done.returncode not in (0, 1):
        print(done.stdout + done.stderr, file=sys.stderr)


def row(size: str, topology: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    memory, work, times = found["memory"], found["work"], found["roofline"]
    peak = "?" if memory["peak"] is None else f"{memory['peak'] / 2**30:.1f}"
    cells = [size, topology, str(found["devices"]), str(found["fsdp"])]
    cells += [f"{memory['state'] / 2**30:.2f}", f"{peak} of {memory['capacity'] / 2**30:.0f}"]
    if work is None or times is None:
        return "| " + " | ".join([*cells, "does not fit"]) + " |"
    sent = sum(kind["sent"] for kind in work["collectives"].values())
    cells += [f"{work['flops'] / 1e12:.1f}", f"{work['traffic'] / 1e9:.0f}", f"{sent / 1e6:.0f}"]
    cells += [f"{times[name] * 1e3:.1f}" for name in ("compute", "memory", "communication")]
    compute_bound = times["compute"] / (times["compute"] + times["communication"])
    cells += [times["bottleneck"], f"{times['weak_scaling_efficiency']:.1%}"]
    rates = found["throughput"]
    cells += [f"{compute_bound:.1%}", f"{rates['volumes_per_second'] / found['hosts']:.0f}"]
    cells.append(f"{rates['days']:.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="sizes (B, L, H) and slices; default: all")
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON files")
    options = parser.parse_args()
    sizes = [one for one in options.only if one in SIZES] or list(SIZES)
    slices = [one for one in options.only if one not in SIZES] or list(SLICES)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for topology in slices:
        for size in sizes:
            path = options.output / f"{size}_{topology.replace(':', '_')}.json"
            plan(size, topology, path.resolve())
            if path.exists():
                rows.append(row(size, topology, json.loads(path.read_text())))
    print(
        "| | slice | chips | fsdp | state, GiB | peak, GiB | TFLOP | traffic, GB | sent, MB | "
        "compute, ms | memory, ms | communication, ms | bottleneck | efficiency | "
        "efficiency, compute-bound | volumes/s a host | days |"
    )
    print("|" + " --- |" * 17)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
