"""Preparing one CT of 512x512x300: ours against MONAI's chain and cache, one core each.

    python -m comparisons.prepare_speed --ct ../shared/ct/images/chest_lidc_0001.nii.gz
    python -m comparisons.prepare_speed --json prepare.json      # enlarges a phantom

Enlarges the CT, gives it back the noise that enlarging smooths away and saves it as .nii.gz and
.nii. Either side then reads it, runs the chain of voco_10k and writes its cache (ours: the uint8
chunk; MONAI: PersistentDataset's float32 file), several times in a process of its own on one core;
the results are compared, the median time is printed. Needs the packages of requirements-dev.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

ROOT = Path(__file__).resolve().parents[1]

SHAPE = (512, 512, 300)
TOLERANCE = 0.5 / 255 + 1e-5  # half a step of uint8


def enlarge(source: Path, folder: Path) -> list[Path]:
    """Writes a volume of `SHAPE` made of a smaller one, packed and not."""
    from scipy.ndimage import zoom

    image = nibabel.Nifti1Image.from_filename(source)
    voxels = np.asarray(image.dataobj).astype(np.float32)
    factors = np.divide(SHAPE, voxels.shape)
    large = zoom(voxels, factors, order=1)
    large += np.random.default_rng(0).normal(0, 8, large.shape).astype(np.float32)
    affine = image.affine @ np.diag([*(1 / factors), 1.0])
    paths = [folder / "large.nii.gz", folder / "large.nii"]
    for path in paths:
        nibabel.save(nibabel.Nifti1Image(np.rint(large).astype(np.int16), affine), path)
    return paths


def ours(path: Path, folder: Path, repeats: int) -> tuple[list[float], np.ndarray]:
    """Reads, prepares and writes the volume again and again, as a worker does with many."""
    from voco_jax.config.config_files import DEFAULT
    from voco_jax.config.load import load
    from voco_jax.data.cache import Cache
    from voco_jax.data.datalists import Volume
    from voco_jax.data.prepare import prepare
    from voco_jax.data.volumes import dequantise

    chain = load(DEFAULT).data.sources["ct"].chain
    seconds = []
    for repeat in range(repeats):
        volume = Volume(f"{repeat}", path, "training")
        begin = time.perf_counter()
        prepare([volume], folder / f"{repeat}", chain, 0, progress=False)
        seconds.append(time.perf_counter() - begin)
    cache = Cache.open(folder / "0", chain)
    return seconds, dequantise(cache.read(cache.entries[0]))


def monai(path: Path, folder: Path, repeats: int) -> tuple[list[float], np.ndarray]:
    """The same with MONAI's transforms and PersistentDataset."""
    import monai.transforms as mt
    import torch
    from monai.data import PersistentDataset

    torch.set_num_threads(1)
    chain = [
        mt.LoadImaged("image"),
        mt.EnsureChannelFirstd("image"),
        mt.Orientationd("image", axcodes="RAS"),
        mt.ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
        mt.CropForegroundd("image", "image", lambda x: x > 0.3),
        mt.Resized("image", (384, 384, 96), mode="trilinear", align_corners=True),
    ]
    seconds = []
    for repeat in range(repeats):
        begin = time.perf_counter()
        item = {"image": str(path)}
        found = PersistentDataset([item], mt.Compose(chain), folder / f"{repeat}")[0]["image"]
        seconds.append(time.perf_counter() - begin)
    return seconds, found.numpy()[0]


def one_side(side: str, path: Path, folder: Path, repeats: int) -> None:
    """Runs in the child process: prints its figures, leaves its voxels."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds, voxels = {"ours": ours, "monai": monai}[side](path, folder / "cache", repeats)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's too
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))
    np.save(folder / "voxels.npy", voxels)


def measure(side: str, path: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """One side in a fresh process."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "comparisons.prepare_speed", f"--repeats={repeats}"]
    command += ["--side", side, str(path), str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    cached = [file.stat().st_size for file in (folder / "cache" / "0").rglob("*") if file.is_file()]
    return {
        "side": side,
        "file": path.suffix,
        "seconds": float(np.median(found["seconds"])),
        "slowest": max(found["seconds"]),
        "peak_gb": found["peak"] / 1e9,
        "cache_mb": sum(cached) / 1e6,
        "voxels": np.load(folder / "voxels.npy"),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ct", type=Path, help="NIfTI file to enlarge; default: a phantom")
    parser.add_argument("--repeats", type=int, default=5, help="of each side; default 5")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, path, folder = options.side
        return one_side(side, Path(path), Path(folder), options.repeats)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.ct is None:
            from voco_jax.data.phantom import make_phantoms

            make_phantoms(folder / "ct", 1, seed=0)
            options.ct = next((folder / "ct").glob("*.nii.gz"))
        for path in enlarge(options.ct, folder):
            pair = [
                measure(side, path, folder / f"{path.name}_{side}", options.repeats)
                for side in ("ours", "monai")
            ]
            difference = np.abs(pair[0].pop("voxels") - pair[1].pop("voxels")).max()
            if difference > TOLERANCE:
                sys.exit(f"error: the two sides differ by {difference:.5f} of the window")
            rows += pair
            for row in pair:
                print(json.dumps(row), flush=True)
            print(f"{path.suffix}: {pair[1]['seconds'] / pair[0]['seconds']:.1f} times as fast")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
