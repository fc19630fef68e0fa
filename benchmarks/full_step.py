"""One full-size voco_10k step on this machine, ours beside PyTorch's: seconds and peak memory.

    python benchmarks/full_step.py            # both, one after the other, each in its own process
    python benchmarks/full_step.py jax        # only ours

Batch 1 (18 crops of 64x64x64), feature size 48, float32, recomputation on in both. The PyTorch side
is the published step on MONAI's blocks. Random crops: the time does not depend on their content.
"""

import argparse
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZE, BASES, SUB_VOLUMES = (64, 64, 64), 16, 2


def _batch() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "subs": generator.integers(0, 256, (1, SUB_VOLUMES, 96, 96, 96), np.uint8),
        "bases": generator.integers(0, 256, (1, BASES, 96, 96, 96), np.uint8),
        "labels": generator.dirichlet(np.ones(BASES), (1, SUB_VOLUMES)).astype(np.float32),
    }


def _report(name: str, seconds: float, version: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name} ({version}): one step {seconds:.0f} s, peak memory {peak:.1f} GiB")


def run_jax() -> None:
    """Ours, as configs/voco_10k.py makes it (but float32)."""
    import jax

    from configs.voco_10k import get_config
    from voco_jax.config import parse
    from voco_jax.training.mesh import make_mesh
    from voco_jax.training.program import make_program

    settings = get_config()
    settings.model.dtype = "float32"
    settings.batch_size = 1
    program = make_program(parse(settings), make_mesh())
    state, step = program.init(), program.step
    start = time.perf_counter()
    compiled = step.lower(state, _batch()).compile()
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    memory = compiled.memory_analysis()
    print(f"compiled temporary memory {memory.temp_size_in_bytes / 2**30:.1f} GiB", flush=True)
    start = time.perf_counter()
    state, metrics = compiled(state, _batch())
    print({name: float(value) for name, value in metrics.items()}, flush=True)
    _report("voco_jax", time.perf_counter() - start, f"jax {jax.__version__}")


def run_torch() -> None:
    """The published step: student, EMA teacher, AdamW; MONAI's SwinUNETR encoder, checkpointed."""
    import torch
    from monai.networks.nets import SwinUNETR
    from torch.nn import functional

    def linear(inputs: int) -> torch.nn.Sequential:
        norm = torch.nn.BatchNorm1d(2048, affine=False, track_running_stats=False)
        return torch.nn.Sequential(torch.nn.Linear(inputs, 2048), norm, torch.nn.ReLU())

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SwinUNETR(1, 1, feature_size=48, use_v2=True, use_checkpoint=True)
            for name in ("decoder1", "decoder2", "decoder3", "decoder4", "decoder5", "out"):
                delattr(self.net, name)
            self.head = torch.nn.Sequential(
                linear(24 * 48), linear(2048), torch.nn.Linear(2048, 2048)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            net, states = self.net, self.net.swinViT(x, True)
            features = [net.encoder1(x), net.encoder2(states[0]), net.encoder3(states[1])]
            features += [net.encoder4(states[2]), net.encoder10(states[4])]
            return self.head(torch.cat([f.mean((2, 3, 4)) for f in features], 1))

    student, teacher = Network(), Network()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.01, amsgrad=True)
    start = time.perf_counter()
    batch = _batch()
    crops = torch.from_numpy(np.concatenate([batch["subs"], batch["bases"]], 1)[0])
    crops = crops[:, None].float() / 255
    crops = functional.interpolate(crops, SIZE, mode="trilinear", align_corners=True)
    labels = torch.from_numpy(batch["labels"][0])
    rows = student(crops)
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.mul_(0.9).add_(s, alpha=0.1)
        rows_t = teacher(crops)
    unit, unit_t = functional.normalize(rows), functional.normalize(rows_t)
    x, bases = unit[:SUB_VOLUMES], unit[SUB_VOLUMES:]
    x_t, bases_t = unit_t[:SUB_VOLUMES], unit_t[SUB_VOLUMES:]
    p = ((x @ bases_t.T).relu() + (x_t @ bases.T).relu()) / 2
    pos = (-labels * torch.log(1 - (labels - p).abs() + 1e-6)).sum() / labels.sum()
    pairs = (bases @ bases.T.detach()).relu() ** 2
    loss = pos + torch.triu(pairs, 1).sum() / (BASES * (BASES - 1) / 2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.4f}", flush=True)
    _report("PyTorch", time.perf_counter() - start, f"torch {torch.__version__}")


def main() -> None:
    """Runs one side, or both in processes of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", nargs="?", choices=("both", "jax", "torch"), default="both")
    side = parser.parse_args().side
    if side == "both":
        print(f"{platform.machine()}, Python {platform.python_version()}", flush=True)
        for name in ("jax", "torch"):
            subprocess.run([sys.executable, __file__, name], check=True)
    elif side == "jax":
        run_jax()
    else:
        run_torch()


if __name__ == "__main__":
    main()
