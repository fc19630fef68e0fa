"""Says what a weight file is: which network, its size and options, and what it would match.

Reads names and shapes only; needs neither JAX nor torch.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from voco_jax.config.load import command_parser
from voco_jax.errors import InputError
from voco_jax.interop.card import card_path, file_sha256, read_card
from voco_jax.interop.files.tensors import TensorSpec
from voco_jax.interop.files.weights import describe
from voco_jax.interop.layout import NETWORKS
from voco_jax.interop.match import MAX_LISTED, grouped, printable
from voco_jax.models.encoder import CLASSIFIER, PROJECTOR, Recognised, Shapes, classifier_sizes
from voco_jax.models.encoders import ENCODERS


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
    return _look(path, network)[0]


def _look(path: str | PathLike[str], network: str) -> tuple[dict[str, Any], Recognised | None]:
    """What `inspect` returns, and what of it is of the file's encoder."""
    file = Path(path)
    selection = describe(file, network)
    shapes = {name: spec.shape for name, spec in selection.tensors.items()}
    card = _card(file)
    recognised = ((name, one.recognise(shapes, card or {})) for name, one in ENCODERS.items())
    encoder, seen = next((found for found in recognised if found[1]), (None, None))
    parts: Counter[str] = Counter()
    for name, shape in shapes.items():
        parts[_part(name, seen)] += math.prod(shape)
    found = {
        "file": str(path),
        "format": "safetensors" if file.suffix.lower() == ".safetensors" else "PyTorch",
        "bytes": file.stat().st_size,
        "wrappers": list(selection.wrappers),
        "prefixes": list(selection.prefixes),
        "networks": list(selection.networks),
        "network": selection.network,
        "set_aside": list(selection.set_aside),
        "dtypes": sorted({spec.dtype for spec in selection.tensors.values()}),
        "whole_numbers": _whole_numbers(selection.tensors, seen),
        "tensors": len(shapes),
        "parameters": dict(parts),
        "encoder": encoder,
        **({} if seen is None else seen.settings),
        "projector_size": next(iter(shapes.get(f"{PROJECTOR}.layer1.0.weight", ())), None),
        "classifier": list(classifier_sizes(shapes)) or None,
        "match": None if seen is None else _match(shapes, seen.shapes, seen),
        "match_whole": _match(shapes, seen.whole[1], seen) if seen and seen.whole else None,
        "card": card,
    }
    return found, seen


def _whole_numbers(specs: Mapping[str, TensorSpec], seen: Recognised | None) -> list[str]:
    """The dtypes of encoder weights that no network takes: quantized ones, say."""
    names = (seen and seen.shapes) or ()
    found = {spec.dtype for name, spec in specs.items() if name in names}
    return sorted(dtype for dtype in found if "float" not in dtype)


def _part(name: str, seen: Recognised | None) -> str:
    for root, part in ((PROJECTOR, "projector"), (CLASSIFIER, "classifier")):
        if name.startswith(f"{root}."):
            return part
    return "other" if seen is None else seen.part(name)


def _match(shapes: Shapes, expected: Shapes | None, seen: Recognised) -> dict[str, Any] | None:
    """What would match PyTorch's names and shapes of the settings seen; None: it has none."""
    if expected is None:
        return None
    both = [name for name in expected if name in shapes]
    others = [name for name in shapes if name not in expected]
    return {
        "matched": sum(shapes[name] == expected[name] for name in both),
        "missing": [name for name in expected if name not in shapes],
        "other_shape": [name for name in both if shapes[name] != expected[name]],
        "unexpected": [name for name in others if seen.part(name) != "buffers"],
    }


def _card(path: Path) -> dict[str, Any] | None:
    """The card beside the file, without the experiment's config."""
    try:
        card = read_card(path)
    except InputError as error:
        return {"problem": str(error)}
    if card is None:
        return None
    found = {**card, "path": str(card_path(path))}
    found.pop("config", None)
    if card.get("sha256") != file_sha256(path):
        found["problem"] = "its sha256 is not this file's: damaged, or another file's card"
    return found


def render(found: dict[str, Any], seen: Recognised | None) -> str:
    """What `_look` found, as text to read."""
    lines = [
        f"{found['file']}: {found['format']}, {found['bytes'] / 1e6:.1f} MB, "
        f"{found['tensors']} tensors ({', '.join(found['dtypes'])})"
    ]

    def line(title: str, value: Any) -> None:
        lines.append(printable(f"  {title:<15}{value}"))

    line("wrappers", ", ".join(found["wrappers"]) or "none")
    line("prefixes", ", ".join(found["prefixes"][:20]) or "none")
    if found["networks"]:
        line("networks", f"{', '.join(found['networks'])}; shown: {found['network']}")
    if found["set_aside"]:
        more = len(found["set_aside"]) - 20
        rest = f" and {more} more" if more > 0 else ""
        line("set aside", ", ".join(found["set_aside"][:20]) + rest)
    for title, value in seen.lines if seen else (("encoder", f"none of {', '.join(ENCODERS)}"),):
        line(title, value)
    width = found["projector_size"]
    line("projector", f"{width} wide" if width else "none")
    if found["classifier"]:
        line("classifier", " -> ".join(map(str, found["classifier"])))
    line("parameters", ", ".join(f"{part} {n:,}" for part, n in found["parameters"].items()))
    if found["whole_numbers"]:
        line("weights", f"WARNING: whole numbers ({', '.join(found['whole_numbers'])}), refused")
    card = found["card"] or {}
    if "path" in card:
        origin = "recipe" if "recipe" in card else "task"
        line(
            "card",
            f"{card['path']}: {origin} {card.get(origin)}, {card.get('network')}, "
            f"step {card.get('step')}, data {card.get('data_fingerprint')}",
        )
        if isinstance(card.get("classes"), list):
            line("classes", ", ".join(map(str, card["classes"][:MAX_LISTED])))
    if "problem" in card:
        line("card", f"WARNING: {card['problem']}")
    if seen is None or found["match"] is None:
        line("would match", "nothing: names and shapes are not those of a complete encoder")
    else:
        lines += _match_lines(f"the encoder of {seen.network}", found["match"], seen)
        if seen.whole:
            lines += _match_lines(f"{seen.whole[0]}, all of it", found["match_whole"], seen)
    return "\n".join(lines)


def _match_lines(what: str, match: dict[str, Any], seen: Recognised) -> list[str]:
    lines = [
        f"  would match    {what}:",
        f"                 {match['matched']} matched, {len(match['missing'])} missing, "
        f"{len(match['unexpected'])} unexpected, {len(match['other_shape'])} of another shape",
    ]
    parts = Counter(_part(name, seen) for name in match["unexpected"])
    if parts:
        listed = ", ".join(f"{part} {n}" for part, n in parts.items())
        lines.append(f"    unexpected by part: {listed}")
    strange = [name for name in match["unexpected"] if _part(name, seen) in ("encoder", "other")]
    for title, names in (
        ("missing", match["missing"]),
        ("unexpected", strange),
        ("of another shape", match["other_shape"]),
    ):
        if names:
            lines += [f"    {title}:", *(f"      {line}" for line in grouped(names))]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser(
        "-m voco_jax.interop.inspect",
        "Say what a weight file is. Reads names and shapes only.",
        "VoCo_10k.pt",
    )
    parser.add_argument("file", help="a .pt, .pth, .ckpt, .bin or .safetensors file")
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="teacher",
        help="which to show where the file holds both; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        options = parser.parse_args(arguments)
        found, seen = _look(options.file, options.network)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else render(found, seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
