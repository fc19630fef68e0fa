"""The published voco_10k step in PyTorch on MONAI's SwinUNETR; used by step_against_torch.py.

Student forward; teacher = momentum * teacher + (1 - momentum) * student; teacher forward; the
three loss terms; backward; AdamW with AMSGrad.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import SwinUNETR
from torch.nn import functional

from voco_jax.benchmark.measure import peak_resident, spread, time_calls
from voco_jax.config.encoders import SwinUNETR as SwinUNETRSettings
from voco_jax.config.pretraining import Pretraining


class Network(torch.nn.Module):
    """SwinUNETR's encoder, pooled, and VoCo's projector; parameters named as in weight files."""

    def __init__(self, config: Pretraining, *, checkpoint: bool, flash: bool) -> None:
        super().__init__()
        model = config.model
        assert isinstance(model, SwinUNETRSettings)
        options: dict[str, Any] = {"use_flash_attention": True} if flash else {}
        self.net = SwinUNETR(
            in_channels=1,
            out_channels=1,
            feature_size=model.feature_size,
            depths=model.depths,
            num_heads=model.num_heads,
            window_size=model.window_size,
            downsample=model.patch_merging,
            use_v2=model.use_v2,
            use_checkpoint=checkpoint,
            **options,
        )
        for name in [n for n, _ in self.net.named_children() if n.startswith(("decoder", "out"))]:
            delattr(self.net, name)
        width = config.projector_size

        def layer(inputs: int) -> torch.nn.Sequential:
            norm = torch.nn.BatchNorm1d(width, affine=False, track_running_stats=False)
            return torch.nn.Sequential(torch.nn.Linear(inputs, width), norm, torch.nn.ReLU())

        head = torch.nn.Module()
        head.layer1, head.layer2 = layer(24 * model.feature_size), layer(width)
        head.layer3 = torch.nn.Sequential(torch.nn.Linear(width, width))
        self.net.proj_head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`n 1 x y z` -> `n width`."""
        net, states = self.net, self.net.swinViT(x, True)
        features = [net.encoder1(x), net.encoder2(states[0]), net.encoder3(states[1])]
        features += [net.encoder4(states[2]), net.encoder10(states[4])]
        rows = torch.cat([feature.mean((2, 3, 4)) for feature in features], 1)
        head = net.proj_head
        return head.layer3(head.layer2(head.layer1(rows)))

    def load(self, path: Path) -> None:
        """Takes the weights that our side left; every one has to be there."""
        state = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
        found = self.net.load_state_dict(state, strict=False)
        # MONAI counts the tables of relative positions, which are no parameters, as state.
        missing = [n for n in found.missing_keys if "relative_position_index" not in n]
        assert [*found.unexpected_keys, *missing] == [], found


def losses(rows: torch.Tensor, rows_t: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """pos, neg and reg of voco_10k.

    Args:
        rows: the student's embeddings, (b * (s + n), d), sub-volumes first per volume.
        rows_t: the teacher's.
        labels: (b, s, n).
    """
    batch, subs, bases = labels.shape

    def unit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = functional.normalize(values.float(), dim=1, eps=1e-8)
        values = values.reshape(batch, subs + bases, -1)
        return values[:, :subs], values[:, subs:]

    (x, b), (x_t, b_t) = unit(rows), unit(rows_t)
    p = ((x @ b_t.mT).relu() + (x_t @ b.mT).relu()) / 2
    pos = (-labels * torch.log(1 - (labels - p).abs() + 1e-6)).sum((1, 2))
    pos = pos / (labels.sum((1, 2)) + 1e-6)
    absent = labels == 0
    neg = (p**2 * absent).sum((1, 2)) / absent.sum((1, 2)).clamp(min=1)
    pairs = torch.triu((b @ b.detach().mT).relu() ** 2, 1)
    reg = pairs.sum((1, 2)) / (bases * (bases - 1) / 2)
    return [pos.mean(), neg.mean(), reg.mean()]


class Step:
    """One variant's networks, optimizer and batch, on the device."""

    def __init__(
        self, words: set[str], config: Pretraining, folder: Path, device: torch.device
    ) -> None:
        self.config, self.device = config, device
        self.bf16 = "bf16" in words
        self.format = (
            torch.channels_last_3d if "channels_last" in words else torch.contiguous_format
        )
        networks = {}
        for name in ("student", "teacher"):
            network = Network(config, checkpoint="checkpoint" in words, flash="flash" in words)
            network.load(folder / f"{name}.npz")
            networks[name] = network.to(device, memory_format=self.format)
        self.student, self.teacher = networks["student"], networks["teacher"]
        self.parameters = list(self.student.parameters())
        self.teacher_parameters = list(self.teacher.parameters())
        self.run_student, self.run_teacher = self.student, self.teacher
        if "compile" in words:
            self.run_student, self.run_teacher = map(torch.compile, (self.student, self.teacher))
        rate = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            rate.learning_rate,
            betas=(rate.beta1, rate.beta2),
            eps=rate.eps,
            weight_decay=rate.weight_decay,
            amsgrad=True,
            fused=device.type == "cuda" or None,
        )
        batch = np.load(folder / f"batch_{config.batch_size}.npz")
        crops = np.concatenate([batch["subs"], batch["bases"]], 1)
        self.crops = torch.from_numpy(crops.reshape(-1, 1, *crops.shape[2:])).to(device)
        self.labels = torch.from_numpy(batch["labels"]).to(device)

    def __call__(self) -> tuple[list[torch.Tensor], Any]:
        """Starts one update; loss terms, and an event on a GPU."""
        crops = self.crops.float()
        if self.crops.dtype == torch.uint8:
            crops = crops / 255
        size = self.config.crops.encoder_size
        if tuple(crops.shape[2:]) != tuple(size):
            crops = functional.interpolate(crops, size, mode="trilinear", align_corners=True)
        crops = crops.contiguous(memory_format=self.format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            rows = self.run_student(crops)
        with torch.no_grad():
            momentum = self.config.teacher.momentum
            torch._foreach_lerp_(self.teacher_parameters, self.parameters, 1 - momentum)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                rows_t = self.run_teacher(crops)
        terms = losses(rows, rows_t, self.labels)
        self.optimizer.zero_grad()
        sum(terms).backward()
        self.optimizer.step()
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return [term.detach() for term in terms], event


def run(
    variant: str, config: Pretraining, folder: Path, steps: int, warmup: int, exact: bool
) -> dict[str, Any]:
    """Times a variant; for a process of its own.

    Args:
        variant: some of step_against_torch.WORDS joined with +.
        config: of both sides.
        folder: weights (student.npz, teacher.npz) and batch_N.npz.
        steps: timed.
        warmup: steps before those.
        exact: full float32 in products, for the check.
    """
    words = set(variant.split("+"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As JAX does by itself: TF32 in float32 products and convolutions, where the GPU has it.
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = True
    step = Step(words, config, folder, device)
    before = [parameter.detach().clone() for parameter in step.parameters] if exact else []
    first: list[Any] = []
    begin = time.perf_counter()

    def call() -> Any:
        terms, event = step()
        if not first:
            first.extend(terms)
        return event

    def wait(event: Any) -> None:
        if event is not None:
            event.synchronize()

    if warmup:
        wait(call())
    start = time.perf_counter() - begin
    if device.type == "cuda":
        samples = time_calls(call, wait, max(warmup - 1, 0), steps)
    else:  # where a call returns when it is done, nothing can be queued
        times = [_seconds(call) for _ in range(max(warmup - 1, 0) + steps)]
        samples = times[-steps:]
    seconds = spread(samples)
    values: Mapping[str, float] = dict(
        zip(("pos", "neg", "reg"), (float(term) for term in first), strict=True)
    )
    found = {**values, "loss": sum(values.values())}
    if exact:
        found["gradient_norm"] = _norm([p.grad for p in step.parameters if p.grad is not None])
        pairs = zip(step.parameters, before, strict=True)
        found["update_norm"] = _norm([p.detach() - old for p, old in pairs])
    on_gpu = device.type == "cuda"
    return {
        "devices": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": "bfloat16" if "bf16" in words else "float32",
        "compile_seconds": start if warmup else None,  # the first step, compiling included
        "first": found,
        "samples": samples,
        "seconds": seconds,
        "volumes_per_second": config.batch_size / seconds.median,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else peak_resident(),
        "peak_of": "device" if on_gpu else "process",
        "version": f"torch {torch.__version__}",
    }


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.sqrt(sum((t.double() ** 2).sum() for t in tensors)))
