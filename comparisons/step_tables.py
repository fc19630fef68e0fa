"""What step_against_torch.py found, for people."""

import itertools
from collections.abc import Sequence
from typing import Any

from voco_jax.benchmark.measure import bytes_text, spread_text, table, utilisation
from voco_jax.benchmark.step import percent


def add_utilisation(found: dict[str, Any]) -> None:
    """Of the rows that lack it, PyTorch's above all: it needs the same FLOPs as our step."""
    ceilings = found.get("product_flops", {})
    needed = {r["batch_size"]: r["flops_needed"] for r in found["rows"] if "flops_needed" in r}
    for row in found["rows"]:
        flops, ceiling = needed.get(row["batch_size"]), ceilings.get(row.get("dtype"))
        if flops and ceiling and row.get("utilisation") is None:
            row["utilisation"] = utilisation(flops, row["seconds"].median, ceiling)


def text(found: dict[str, Any]) -> str:
    """For people."""
    head = ["side", "variant", "batch", "a step", "volumes/s", "MFU", "peak memory", "loss"]
    lines = []
    for row in found["rows"]:
        about = [row["side"], row["variant"], str(row["batch_size"])]
        if row["problem"]:
            lines.append([*about, row["problem"], "-", "-", "-", "-"])
            continue
        lines.append(
            [
                *about,
                spread_text(row["seconds"]),
                f"{row['volumes_per_second']:.3g}",
                percent(row.get("utilisation")),
                bytes_text(row["peak"]),
                f"{row['first']['loss']:.5f}",
            ]
        )
    said = ", ".join(f"{name} {v:.1e}" for name, v in found["check"]["differences"].items())
    return "\n".join(
        [
            table(head, lines),
            "",
            f"first step in float32, relative differences: {said}",
            *(f"batch {size}: {line}" for size, line in ratios(found["rows"]).items()),
        ]
    )


def ratios(rows: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The best of either side at each batch size, in words.

    >>> measured = [("voco_jax", "a", 10.0, 3), ("voco_jax", "b", 8.0, 1)]
    >>> measured += [("PyTorch", "eager", 2.0, 6), ("PyTorch", "compile", 4.0, 6)]
    >>> keys = ("side", "variant", "volumes_per_second", "peak", "batch_size", "problem")
    >>> rows = [dict(zip(keys, (*row, 2, None), strict=True)) for row in measured]
    >>> ratios([*rows, {**rows[0], "batch_size": 4}, {"batch_size": 4, "problem": "out of memory",
    ...         "side": "PyTorch"}])
    {2: 'ours (a) does 2.50 times the volumes/s of PyTorch (compile), with 0.50 times its peak \
memory'}
    """
    found = {}
    for size, group in itertools.groupby(rows, key=lambda row: row["batch_size"]):
        best: dict[str, dict[str, Any]] = {}
        for row in group:
            old = best.get(row["side"])
            if not row["problem"] and (
                old is None or row["volumes_per_second"] > old["volumes_per_second"]
            ):
                best[row["side"]] = row
        if len(best) == 2:
            ours, theirs = best["voco_jax"], best["PyTorch"]
            speed = ours["volumes_per_second"] / theirs["volumes_per_second"]
            memory = ours["peak"] / theirs["peak"]
            found[size] = (
                f"ours ({ours['variant']}) does {speed:.2f} times the volumes/s of PyTorch "
                f"({theirs['variant']}), with {memory:.2f} times its peak memory"
            )
    return found
