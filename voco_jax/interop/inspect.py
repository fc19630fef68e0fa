"""Says what a weight file is: which network, its size and options, and what it would match.

Reads names and shapes only; needs neither JAX nor torch.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from voco_jax.errors import InputError
from voco_jax.interop.architecture import (
    MODEL_SIZES,
    Architecture,
    encoder_shapes,
    recognise,
)
from voco_jax.interop.card import card_path, file_sha256, read_card
from voco_jax.interop.files.weights import describe
from voco_jax.interop.layout import NETWORKS
from voco_jax.interop.match import grouped, printable

EXAMPLE = """example:
  python -m voco_jax.interop.inspect VoCo_10k.pt
"""
UNKNOWN_MERGING = (
    "not in the file: MONAI up to 1.4 (legacy), since 1.5 (merging) and mergingv2 have the same "
    "names and shapes and give different features. VoCo's published weights: legacy."
)


def inspect(path: str | PathLike[str], network: str = "teacher") -> dict[str, Any]:
    """What a weight file is.

    Args:
        path: a .pt, .pth, .ckpt, .bin or .safetensors file.
        network: `teacher` or `student`: which of them, where the file holds both.

    Returns:
        Plain values, ready for JSON; `render` makes text of them.

    Raises:
        InputError: the file cannot be read; the message says how to mend it.
    """
    selection = describe(path, network)
    shapes = {name: spec.shape for name, spec in selection.tensors.items()}
    seen = recognise(shapes)
    parts: Counter[str] = Counter()
    for name, shape in shapes.items():
        parts[_part(name)] += math.prod(shape)
    file = Path(path)
    return {
        "file": str(path),
        "format": "safetensors" if file.suffix.lower() == ".safetensors" else "PyTorch",
        "bytes": file.stat().st_size,
        "wrappers": list(selection.wrappers),
        "prefixes": list(selection.prefixes),
        "networks": list(selection.networks),
        "network": selection.network,
        "set_aside": list(selection.set_aside),
        "dtypes": sorted({spec.dtype for spec in selection.tensors.values()}),
        "tensors": len(shapes),
        "parameters": dict(parts),
        "model_size": MODEL_SIZES.get(seen.feature_size or 0),
        "feature_size": seen.feature_size,
        "in_channels": seen.in_channels,
        "use_v2": seen.use_v2,
        "depths": list(seen.depths),
        "num_heads": list(seen.num_heads),
        "window_size": None if seen.window_size is None else list(seen.window_size),
        "conv_encoders": seen.conv_encoders,
        "projector_size": seen.projector_size,
        "decoder": seen.decoder,
        "out_channels": seen.out_channels,
        "match": _match(shapes, seen),
        "card": _card(file),
    }


def _part(name: str) -> str:
    if name.endswith(".relative_position_index"):
        return "buffers"
    root = name.split(".")[0]
    if root == "swinViT" or root.startswith("encoder"):
        return "encoder"
    if root.startswith("decoder") or root == "out":
        return "decoder"
    return "projector" if root == "proj_head" else "other"


def _match(shapes: dict[str, tuple[int, ...]], seen: Architecture) -> dict[str, Any] | None:
    """What would match SwinUNETR's encoder with the options seen; None: no such encoder."""
    try:
        expected = encoder_shapes(seen)
    except ValueError:
        return None
    parameters = [name for name in shapes if _part(name) != "buffers"]
    return {
        "matched": sum(shapes.get(name) == shape for name, shape in expected.items()),
        "missing": [name for name in expected if name not in shapes],
        "other_shape": [
            name for name in expected if shapes.get(name, expected[name]) != expected[name]
        ],
        "unexpected": [name for name in parameters if name not in expected],
    }


def _card(path: Path) -> dict[str, Any] | None:
    """What the card beside the file says, in short."""
    try:
        card = read_card(path)
    except InputError as error:
        return {"problem": str(error)}
    if card is None:
        return None
    fields = ("recipe", "network", "step", "patch_merging", "monai_versions", "data_fingerprint")
    found = {"path": str(card_path(path)), **{name: card.get(name) for name in fields}}
    if card.get("sha256") != file_sha256(path):
        found["problem"] = "its sha256 is not this file's: damaged, or another file's card"
    return found


def render(found: dict[str, Any]) -> str:
    """What `inspect` found, as text to read."""
    lines = [
        f"{found['file']}: {found['format']}, {found['bytes'] / 1e6:.1f} MB, "
        f"{found['tensors']} tensors ({', '.join(found['dtypes'])})"
    ]

    def line(title: str, value: Any) -> None:
        lines.append(printable(f"  {title:<15}{value}"))

    line("wrappers", ", ".join(found["wrappers"]) or "none")
    line("prefixes", ", ".join(found["prefixes"]) or "none")
    if found["networks"]:
        line("networks", f"{', '.join(found['networks'])}; shown: {found['network']}")
    if found["set_aside"]:
        more = len(found["set_aside"]) - 20
        rest = f" and {more} more" if more > 0 else ""
        line("set aside", ", ".join(found["set_aside"][:20]) + rest)
    if found["feature_size"] is None:
        line("encoder", "none of SwinUNETR's (no swinViT.patch_embed.proj.weight)")
    else:
        size = found["model_size"]
        line(
            "encoder",
            f"Swin, feature size {found['feature_size']} "
            f"({f'VoCo {size}' if size else 'none of VoCo B, L, H'}), "
            f"{'v2 convolution blocks' if found['use_v2'] else 'no v2 convolution blocks'}, "
            f"convolution encoders: {'yes' if found['conv_encoders'] else 'no'}",
        )
        line("in_channels", found["in_channels"])
        line("depths", _numbers(found["depths"]))
        line("heads", _numbers(found["num_heads"]))
        line("window", _numbers(found["window_size"]) if found["window_size"] else "unknown")
    width = found["projector_size"]
    line("projector", f"{width} wide" if width else "none")
    channels = found["out_channels"]
    outputs = f"yes, {channels} output channels" if channels else "yes, no output layer"
    line("decoder", outputs if found["decoder"] else "none")
    line("parameters", ", ".join(f"{part} {n:,}" for part, n in found["parameters"].items()))
    if found["feature_size"] is not None:
        lines += _merging_lines(found["card"])
    elif found["card"]:
        line("card", found["card"])
    lines += _match_lines(found)
    return "\n".join(lines)


def _merging_lines(card: dict[str, Any] | None) -> list[str]:
    if card is None or card.get("patch_merging") is None:
        lines = [f"  patch merging  {UNKNOWN_MERGING}"]
    else:
        lines = [
            f"  patch merging  {card['patch_merging']} (its card; MONAI {card['monai_versions']})"
        ]
    if card is not None and "path" in card:
        lines.append(
            f"  card           {card['path']}: recipe {card['recipe']}, {card['network']}, "
            f"step {card['step']}, data {card['data_fingerprint']}"
        )
    if card is not None and "problem" in card:
        lines.append(f"  card           WARNING: {card['problem']}")
    return [printable(line) for line in lines]


def _match_lines(found: dict[str, Any]) -> list[str]:
    match = found["match"]
    if match is None:
        return ["  would match    nothing: names and shapes are not those of MONAI's SwinUNETR"]
    window = tuple(found["window_size"])
    options = (
        f"in_channels={found['in_channels']}, feature_size={found['feature_size']}, "
        f"use_v2={found['use_v2']}"
    )
    if window != (7, 7, 7):
        options += f", window_size={window}"
    if tuple(found["depths"]) != (2, 2, 2, 2):
        options += f", depths={tuple(found['depths'])}"
    if tuple(found["num_heads"]) != (3, 6, 12, 24):
        options += f", num_heads={tuple(found['num_heads'])}"
    lines = [
        f"  would match    the encoder of SwinUNETR({options}):",
        f"                 {match['matched']} matched, {len(match['missing'])} missing, "
        f"{len(match['unexpected'])} unexpected, {len(match['other_shape'])} of another shape",
    ]
    parts = Counter(_part(name) for name in match["unexpected"])
    if parts:
        lines.append(
            f"    unexpected by part: {', '.join(f'{part} {n}' for part, n in parts.items())}"
        )
    strange = [name for name in match["unexpected"] if _part(name) in ("encoder", "other")]
    for title, names in (
        ("missing", match["missing"]),
        ("unexpected", strange),
        ("of another shape", match["other_shape"]),
    ):
        if names:
            lines += [f"    {title}:", *(f"      {line}" for line in grouped(names))]
    return lines


def _numbers(values: Sequence[int]) -> str:
    return " ".join(str(value) for value in values)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m voco_jax.interop.inspect",
        description="Say what a weight file is. Reads names and shapes only.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a .pt, .pth, .ckpt, .bin or .safetensors file")
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="teacher",
        help="which to show where the file holds both; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        found = inspect(args.file, args.network)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
