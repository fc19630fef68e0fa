"""The JSON card beside an exported weight file: what the shapes of its tensors cannot say."""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

from voco_jax.errors import InputError
from voco_jax.interop.match import printable

MONAI_VERSIONS = {"legacy": "<1.5", "merging": ">=1.5", "mergingv2": "all"}
"""The MONAI releases whose SwinUNETR computes what a model of this patch merging computed."""
LEGACY_MERGING = (
    "from monai.networks.nets.swin_unetr import PatchMergingV2",
    "",
    "class LegacyPatchMerging(PatchMergingV2):  # of MONAI up to 1.4",
    "    order = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1),",
    "             (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))",
    "",
    "    def forward(self, x):",
    "        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.order], -1)",
    "        return self.reduction(self.norm(x))",
)
"""Lines of the usage snippet with which a later MONAI computes what the old ones did."""
MAX_BYTES = 16 * 2**20


def card_path(weights: str | PathLike[str]) -> Path:
    """Where the card of a weight file is: `voco.pt.json` for `voco.pt`."""
    path = Path(weights)
    return path.with_name(path.name + ".json")


def read_card(weights: str | PathLike[str]) -> dict[str, Any] | None:
    """The card of a weight file; None: it has none.

    Raises:
        InputError: the card is no JSON dict.
    """
    path = card_path(weights)
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        card = json.loads(path.read_text("utf-8"))
        if not isinstance(card, dict):
            raise ValueError(f"a {type(card).__name__}")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: found {printable(str(error))[:200]}, expected the JSON card of "
            f"{Path(weights).name}; delete it if it is not that file's"
        ) from error
    return card


def file_sha256(path: str | PathLike[str]) -> str:
    """The file's SHA-256 in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_card(weights: str | PathLike[str], patch_merging: str | None) -> list[str]:
    """Compares a weight file with the card beside it, and the card with the model.

    Args:
        weights: the weight file.
        patch_merging: the model's; None: not compared.

    Returns:
        Notes for the reader.

    Raises:
        InputError: the file is not the card's, or it was trained with another patch merging.
    """
    card = read_card(weights) if Path(weights).is_file() else None
    merging = None if card is None else card.get("patch_merging")
    if card is not None and card.get("sha256") not in (None, file_sha256(weights)):
        raise InputError(
            f"{weights}: its SHA-256 is not the one in {card_path(weights)}: damaged or exchanged; "
            "export or fetch it again, or delete the card if it is another file's"
        )
    if patch_merging is None:
        return []
    if merging is None:
        return [
            f"the file does not say which patch merging it was trained with; the model has "
            f"{patch_merging!r}, VoCo's published weights 'legacy'; the wrong one gives other "
            "features without any error"
        ]
    if merging != patch_merging:
        raise InputError(
            f"{weights}: its card says patch merging {printable(str(merging))!r}, the model has "
            f"{patch_merging!r}; set model.patch_merging={printable(str(merging))}"
        )
    return []


def monai_usage(file_name: str, model: dict[str, Any], *, with_projector: bool) -> dict[str, str]:
    """Which MONAI takes the weights, and how.

    Args:
        file_name: of the weight file.
        model: feature_size, in_channels, use_v2, conv_encoders, window_size, depths, num_heads,
            patch_merging.
        with_projector: whether the file holds the projector, which SwinUNETR has not.

    Returns:
        `monai_versions`, `monai_note` and `usage`, a Python snippet.
    """
    merging, window = model["patch_merging"], tuple(model["window_size"])
    legacy = merging == "legacy"
    note = (
        "use_v2, window_size, feature_size, in_channels, depths and num_heads must be passed to "
        "SwinUNETR as in the snippet, which is for MONAI 1.5 and later. MONAI changed its patch "
        "merging in 1.5: another version than monai_versions gives other features from the same "
        "file, with no error"
    )
    note += ", unless it is given the merging of the snippet." if legacy else "."
    versions = MONAI_VERSIONS[merging]
    if window != (7, 7, 7):
        note += " SwinUNETR has window_size since MONAI 1.5; before it is always 7."
        versions = "none by itself" if legacy else ">=1.5"
    elif versions != ">=1.5":
        note += " Up to MONAI 1.4 pass img_size=(64, 64, 64) and no window_size."
    if not model["conv_encoders"]:
        note += " SwinUNETR's convolution encoders were not trained and start at random."
    options = {
        "in_channels": model["in_channels"],
        "out_channels": 2,
        "feature_size": model["feature_size"],
        "use_v2": model["use_v2"],
        "window_size": window,
        "depths": tuple(model["depths"]),
        "num_heads": tuple(model["num_heads"]),
    }
    settings = [f"    {name}={value!r}," for name, value in options.items()]
    if merging != "merging":
        settings.append(f"    downsample={'LegacyPatchMerging' if legacy else repr(merging)},")
    absent = '("decoder", "out.")' if model["conv_encoders"] else '("encoder", "decoder", "out.")'
    lines = ["import torch"]
    read = f"torch.load({file_name!r}, weights_only=True)"
    if file_name.endswith(".safetensors"):
        lines.append("from safetensors.torch import load_file")
        read = f"load_file({file_name!r})"
    lines += [
        "from monai.networks.nets import SwinUNETR",
        *(LEGACY_MERGING if legacy else ()),
        "",
        "model = SwinUNETR(",
        *settings,
        ")",
        f"weights = {read}",
    ]
    if with_projector:
        lines.append(
            'weights = {k: v for k, v in weights.items() if not k.startswith("proj_head.")}'
        )
    lines += [
        "missing, unexpected = model.load_state_dict(weights, strict=False)",
        f"assert not unexpected and all(k.startswith({absent}) for k in missing)",
    ]
    return {"monai_versions": versions, "monai_note": note, "usage": "\n".join(lines)}
