"""Writes a network as the published weights are: for MONAI's SwinUNETR, with a card beside it."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

import voco_jax
from voco_jax.errors import InputError
from voco_jax.interop.architecture import recognise
from voco_jax.interop.card import card_path, file_sha256, monai_usage
from voco_jax.interop.files.weights import SAFETENSORS_SUFFIX, write
from voco_jax.interop.layout import NETWORKS
from voco_jax.interop.load import INDEX, TABLE
from voco_jax.interop.match import grouped
from voco_jax.interop.names import Params, to_torch

PROJECTOR = "proj_head"
EXAMPLE = """example:
  python -m voco_jax.interop.export --checkpoint runs/demo --output voco.pt
  python -m voco_jax.interop.export --checkpoint runs/demo --output voco.safetensors --step 40
"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Where weights come from.

    Attributes:
        config: the experiment, as `voco_jax.config.to_dict` returns it.
        step: completed updates.
        network: `teacher` or `student`.
        data_fingerprint: of the volumes it was trained on.
    """

    config: Mapping[str, Any]
    step: int
    network: str
    data_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` wrote.

    Attributes:
        weights: the weight file.
        card: the JSON file beside it.
        tensors: number of tensors, MONAI's buffers included.
        parameters: number of parameters, without the buffers.
        usage: the snippet that loads the weights into MONAI's SwinUNETR.
        monai_versions: those that agree with the weights.
    """

    weights: Path
    card: Path
    tensors: int
    parameters: int
    usage: str
    monai_versions: str

    def text(self) -> str:
        """What was written and how to use it."""
        return (
            f"wrote {self.weights}: {self.tensors} tensors, {self.parameters:,} parameters\n"
            f"wrote {self.card}\n"
            f"to load it into MONAI ({self.monai_versions}):\n\n"
            + "".join(f"    {line}\n" if line else "\n" for line in self.usage.splitlines())
        )


def check_output(output: str | PathLike[str]) -> Path:
    """The path to export to; call it before a long training, not only after.

    Raises:
        InputError: another suffix than .pt and .safetensors, or .pt without torch.
    """
    path = Path(output)
    if path.suffix not in (".pt", SAFETENSORS_SUFFIX):
        raise InputError(
            f"{path}: found suffix {path.suffix!r}, expected .pt or {SAFETENSORS_SUFFIX}"
        )
    if path.suffix == ".pt" and importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path}: writing .pt needs torch, which is not installed: pip install torch, or "
            f"write {SAFETENSORS_SUFFIX}"
        )
    if path.is_dir():
        raise InputError(f"{path}: found a folder, expected a file to write")
    return path


def export(
    params: Params, output: str | PathLike[str], card: Card, *, with_projector: bool = False
) -> Exported:
    """Writes parameters as a flat dict of float32 tensors with MONAI's names, and the card.

    Both files appear whole or not at all. MONAI's `relative_position_index` buffers are included.

    Args:
        params: one network's parameters, nested dicts of arrays (NumPy or fetchable).
        output: a .pt or .safetensors file; an old one is replaced.
        card: where the weights come from.
        with_projector: also the projector, which MONAI's SwinUNETR does not have.

    Returns:
        What was written.

    Raises:
        InputError: the suffix, an unwritable folder, .pt without torch, values that are not finite,
            or parameters that are not of the config's model.
    """
    path = check_output(output)
    kept = {key: tree for key, tree in params.items() if with_projector or key != PROJECTOR}
    tensors = {name: array.astype(np.float32, copy=False) for name, array in to_torch(kept).items()}
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(
            f"{path}: not written, found NaN or infinite values in {'; '.join(grouped(broken))}; "
            "export an earlier step (--step)"
        )
    model = _model(tensors, card, path)
    parameters = sum(array.size for array in tensors.values())
    _add_indices(tensors, tuple(model["window_size"]))
    usage = monai_usage(path.name, model, with_projector=with_projector)
    content = {
        "file": path.name,
        "tensors": len(tensors),
        "parameters": parameters,
        "voco_jax": voco_jax.__version__,
        "recipe": card.config["recipe"],
        "network": card.network,
        "step": card.step,
        "total_steps": card.config["total_steps"],
        **model,
        "projector": with_projector,
        "data_fingerprint": card.data_fingerprint,
        **usage,
        "config": dict(card.config),
    }
    beside = card_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_both(path, beside, lambda temporary: write(tensors, temporary, path.suffix), content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another --output") from error
    return Exported(
        weights=path,
        card=beside,
        tensors=len(tensors),
        parameters=parameters,
        usage=usage["usage"],
        monai_versions=usage["monai_versions"],
    )


def _model(tensors: Mapping[str, np.ndarray], card: Card, path: Path) -> dict[str, Any]:
    """The model's options: from the shapes, the rest from the config, which must agree."""
    settings = card.config["model"]
    seen = recognise({name: array.shape for name, array in tensors.items()})
    window = tuple(settings["window_size"])
    found = {
        "feature_size": seen.feature_size,
        "use_v2": seen.use_v2,
        "conv_encoders": seen.conv_encoders,
        "depths": seen.depths,
        "num_heads": seen.num_heads,
    }
    rows = np.prod([2 * size - 1 for size in window])
    tables = [array.shape[0] for name, array in tensors.items() if name.endswith(TABLE)]
    different = [
        name
        for name, value in found.items()
        if value != (tuple(settings[name]) if isinstance(value, tuple) else settings[name])
    ]
    if any(table != rows for table in tables):
        different.append("window_size")
    if different or seen.in_channels is None:
        raise InputError(
            f"{path}: not written, the parameters are not of the config's model: "
            f"{', '.join(different) or 'swinViT.patch_embed'} differ"
        )
    return {
        **found,
        "window_size": window,
        "in_channels": seen.in_channels,
        "patch_merging": settings["patch_merging"],
    }


def _add_indices(tensors: dict[str, np.ndarray], window_size: tuple[int, int, int]) -> None:
    from voco_jax.models.windows import relative_position_index

    index = relative_position_index(window_size)
    for name in [name for name in tensors if name.endswith(TABLE)]:
        tensors[name.removesuffix(TABLE) + INDEX] = index.copy()


def _write_both(
    path: Path, beside: Path, save: Callable[[Path], None], content: dict[str, Any]
) -> None:
    """Writes both files aside, then moves them in place; a card never stands by other weights."""
    weights, card = temporaries = [
        target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in (path, beside)
    ]
    try:
        save(weights)
        content = {**content, "sha256": file_sha256(weights)}
        card.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        for temporary in temporaries:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        beside.unlink(missing_ok=True)
        weights.replace(path)
        card.replace(beside)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m voco_jax.interop.export",
        description="Export a training run's weights for PyTorch (MONAI's SwinUNETR).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="the training run's --workdir")
    parser.add_argument("--output", required=True, help="a .pt or .safetensors file")
    parser.add_argument(
        "--network", choices=NETWORKS, help="default: the teacher, if it has an encoder"
    )
    parser.add_argument("--step", type=int, help="completed updates; default: the latest saved")
    parser.add_argument(
        "--with-projector", action="store_true", help="also the projector's weights (proj_head.*)"
    )
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        from voco_jax.training.checkpoint import read_network

        params, info = read_network(args.checkpoint, args.network, args.step)
        card = Card(
            config=info["config"],
            step=info["step"],
            network=info["network"],
            data_fingerprint=info["data_fingerprint"],
        )
        exported = export(params, args.output, card, with_projector=args.with_projector)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(exported.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
