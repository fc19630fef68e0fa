"""Weights of B, L and H with random bits: exported, read again, compared bit for bit.

    python -m comparisons.round_trip b l .pt .safetensors
    python -m comparisons.round_trip h .safetensors        # 3.4 GB on the disk, 11 GB of memory

Through the export and import that users have; needs torch for .pt. Ends with status 1 if a bit
differs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from voco_jax.config.load import load_pretraining, to_dict
from voco_jax.interop.export import Card, export
from voco_jax.interop.load import load_into
from voco_jax.training.mesh import make_mesh
from voco_jax.voco.step import describe_parameters
from voco_jax.voco.task import make_network


def round_trip(size: str, suffix: str, folder: Path) -> bool:
    """Whether every bit comes back; prints a line."""
    config = load_pretraining(f"voco_160k:{size}")
    encoder = make_network(config, make_mesh()).encoder
    shapes = nn.unbox(describe_parameters(encoder, (64, 64, 64)))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda s: generator.standard_normal(s.shape, np.float32), shapes)
    path = folder / f"voco_{size}{suffix}"
    card = Card(config=to_dict(config), step=0, network="student", data_fingerprint="")
    begin = time.perf_counter()
    written = export(params, path, card)
    middle = time.perf_counter()
    template = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    back, report = load_into(template, path, model=config.model)
    end = time.perf_counter()
    same = all(
        np.array_equal(np.ascontiguousarray(a).view(np.uint32), b.view(np.uint32))
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True)
    )
    print(
        f"{size.upper()} {suffix}: {written.parameters:,} numbers, {len(report.matched)} arrays, "
        f"{path.stat().st_size / 1e9:.2f} GB; export {middle - begin:.0f} s, import "
        f"{end - middle:.0f} s; {'every bit equal' if same else 'DIFFERENT'}",
        flush=True,
    )
    path.unlink()
    return same


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=("b", "l", "h", ".pt", ".safetensors"))
    what = parser.parse_args().what
    sizes = [word for word in what if not word.startswith(".")] or ["b"]
    suffixes = [word for word in what if word.startswith(".")] or [".safetensors"]
    with tempfile.TemporaryDirectory() as folder:
        found = [round_trip(size, suffix, Path(folder)) for size in sizes for suffix in suffixes]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
