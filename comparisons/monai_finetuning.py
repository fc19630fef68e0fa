"""MONAI's side of finetune_against_monai.py, each part for a process of its own."""

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import SwinUNETR
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import (
    Compose,
    CropForegroundd,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from safetensors.torch import load_file

from comparisons.our_finetuning import BATCHES, IMAGE, MONAI_MASK, WEIGHTS, read_settings
from voco_jax.benchmark.measure import peak_resident
from voco_jax.config.encoders import SwinUNETR as SwinUNETRSettings
from voco_jax.config.finetuning import SegmentationFinetuning


def build_network(config: SegmentationFinetuning, folder: str) -> SwinUNETR:
    """SwinUNETR with the weights in a folder, which have to be all of its, and no others."""
    model = config.model
    assert isinstance(model, SwinUNETRSettings)
    network = SwinUNETR(
        in_channels=config.data.channels,
        out_channels=len(config.data.classes),
        feature_size=model.feature_size,
        depths=model.depths,
        num_heads=model.num_heads,
        window_size=model.window_size,
        downsample=model.patch_merging,
        use_v2=model.use_v2,
        use_checkpoint=model.remat,
    )
    network.load_state_dict(load_file(Path(folder, WEIGHTS)), strict=True)
    return network


def run_steps(
    config: Mapping[str, Any], folder: str, steps: int, warmup: int, wide: bool
) -> dict[str, Any]:
    """As `our_finetuning.run_steps`: MONAI's network, loss and schedule, and PyTorch's AdamW."""
    experiment = read_settings(config, folder)
    dtype = torch.float64 if wide else torch.float32
    network = build_network(experiment, folder).to(dtype)
    settings, rate = experiment.loss, experiment.optimizer
    loss = DiceCELoss(
        include_background=settings.include_background,
        to_onehot_y=True,
        softmax=True,
        smooth_nr=settings.smooth_nr,
        smooth_dr=settings.smooth_dr,
        batch=settings.batch,
        lambda_dice=settings.dice,
        lambda_ce=settings.cross_entropy,
    )
    optimizer = torch.optim.AdamW(
        network.parameters(),
        rate.learning_rate,
        betas=(rate.beta1, rate.beta2),
        eps=rate.eps,
        weight_decay=rate.weight_decay,
        amsgrad=rate.amsgrad,
    )
    schedule = WarmupCosineSchedule(optimizer, rate.warmup_steps, experiment.total_steps)
    data = np.load(Path(folder, BATCHES))
    losses, seconds = [], []
    for images, labels in zip(data["images"], data["labels"], strict=True):
        begin = time.perf_counter()
        crops = torch.from_numpy(images).movedim(-1, 1).float()
        crops = crops / 255 if images.dtype == np.uint8 else crops
        value = loss(network(crops.to(dtype)), torch.from_numpy(labels)[:, None])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        seconds.append(time.perf_counter() - begin)
        if len(losses) == warmup + steps:
            break
    return {
        "losses": losses,
        "samples": seconds[warmup:],
        "compile_seconds": None,
        "peak": peak_resident(),
        "version": f"torch {torch.__version__}",
    }


def predict(config: Mapping[str, Any], folder: str, overlap: float) -> dict[str, Any]:
    """As `our_finetuning.predict`: MONAI's transforms and windows; into MONAI_MASK."""
    experiment = read_settings(config, folder)
    network = build_network(experiment, folder).eval()
    chain = next(iter(experiment.data.sources.values())).chain
    load = LoadImaged("image", ensure_channel_first=True)
    prepare = Compose(
        [
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=chain.spacing, mode="bilinear"),
            ScaleIntensityRanged("image", *chain.window, 0, 1, clip=True),
            CropForegroundd("image", "image", lambda x: x > chain.foreground_threshold),
        ]
    )
    invert = Invertd("scores", prepare, "image", nearest_interp=False, to_tensor=True)
    times = [time.perf_counter()]
    data = load({"image": Path(folder, IMAGE)})
    times.append(time.perf_counter())
    data = prepare(data)
    times.append(time.perf_counter())
    size, count = experiment.crops.size, 0

    def count_windows(windows: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(windows)
        return network(windows)

    with torch.no_grad():
        data["scores"] = sliding_window_inference(
            data["image"][None], size, 1, count_windows, overlap=overlap, mode="gaussian"
        )[0]
        times.append(time.perf_counter())
        labels = invert(data)["scores"].argmax(0)
    times.append(time.perf_counter())
    names = ("reading", "preparing", "windows", "to the file's grid")
    spans = [end - start for start, end in itertools.pairwise(times)]
    peak = peak_resident()
    np.save(Path(folder, MONAI_MASK), labels.numpy().astype(np.uint8))
    return {
        "seconds": {**dict(zip(names, spans, strict=True)), "all": times[-1] - times[0]},
        "windows": count,
        "compile_seconds": None,
        "peak": peak,
        "version": f"torch {torch.__version__}",
    }
