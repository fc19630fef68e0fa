"""Live MONAI modules to compare with."""

from typing import Any

import numpy as np
import torch
from by_rule import weight_by_rule
from monai.networks.nets import PatchMergingV2, SwinUNETR

ENCODER = ("swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10")

LEGACY_ORDER = (
    (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1),
)  # fmt: skip


class LegacyPatchMerging(PatchMergingV2):
    """The patch merging of MONAI up to 1.4: two neighbours twice, two never."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, i::2, j::2, k::2, :] for i, j, k in LEGACY_ORDER], -1)
        return self.reduction(self.norm(x))


def swin_unetr(*, feature_size: int, patch_merging: str, **options: Any) -> SwinUNETR:
    """MONAI's SwinUNETR with random weights, norms and biases far from their initial 1 and 0."""
    downsample = LegacyPatchMerging if patch_merging == "legacy" else patch_merging
    options = {"in_channels": 1, "out_channels": 1, **options}
    model = SwinUNETR(feature_size=feature_size, downsample=downsample, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight_by_rule(name, tuple(parameter.shape))))
    return model.eval()


def encode(model: SwinUNETR, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The hidden states and the encoders' outputs of `SwinUNETR.forward`, `b c x y z`."""
    hidden = model.swinViT(x, True)
    features = [
        model.encoder1(x),
        model.encoder2(hidden[0]),
        model.encoder3(hidden[1]),
        model.encoder4(hidden[2]),
        model.encoder10(hidden[4]),
    ]
    return hidden, features


def to_torch(x: Any) -> torch.Tensor:
    """`b x y z c` -> `b c x y z`."""
    return torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    """`b c x y z` -> `b x y z c`."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def parameters(model: torch.nn.Module, children: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The parameters of a module, or of some of its children, as arrays."""
    return {
        name: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if not children or name.split(".")[0] in children
    }


def gradients(model: torch.nn.Module, children: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The gradients of the same parameters; zero where none came."""
    found = {}
    for name, parameter in model.named_parameters():
        if not children or name.split(".")[0] in children:
            gradient = parameter.grad
            found[name] = (torch.zeros_like(parameter) if gradient is None else gradient).numpy()
    return found
