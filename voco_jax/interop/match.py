"""What of a weight file went into a model, as a report to read."""

from collections.abc import Iterable
from dataclasses import dataclass

MAX_LISTED = 400
"""Names that one list of a report shows; a file may hold millions."""


@dataclass(frozen=True, kw_only=True)
class WrongShape:
    """A tensor that the file and the model both have, in different shapes (PyTorch's axes)."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MatchReport:
    """What of a weight file went into a model; names are PyTorch's.

    Attributes:
        source: the file.
        matched: copied.
        missing: in the model only; these parameters kept their values.
        unexpected: in the file only; left aside.
        wrong_shape: in both, not copied.
        notes: what else the reader should know, one sentence each.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[WrongShape, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The report: one line of counts, then every name that did not match, then the notes."""
        lines = [
            f"{printable(self.source)}: {len(self.matched)} matched, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.wrong_shape)} of another shape"
        ]
        for title, names in (
            ("missing (in the model, not in the file)", self.missing),
            ("unexpected (in the file, not in the model)", self.unexpected),
        ):
            if names:
                lines += [f"  {title}:", *(f"    {line}" for line in grouped(names))]
        if self.wrong_shape:
            lines.append("  of another shape:")
            shown = self.wrong_shape[:MAX_LISTED]
            lines += [
                f"    {printable(item.name)}: file {item.found}, model {item.expected}"
                for item in shown
            ]
            if len(shown) < len(self.wrong_shape):
                lines.append(f"    ... and {len(self.wrong_shape) - len(shown)} more")
        lines += [f"  note: {printable(note)}" for note in self.notes]
        return "\n".join(lines)


def grouped(names: Iterable[str]) -> list[str]:
    """Names as lines, one for each module: `encoder1.layer.conv1.conv: weight, bias`."""
    groups: dict[str, list[str]] = {}
    left = 0
    for place, name in enumerate(names):
        if place >= MAX_LISTED:
            left += 1
            continue
        module, _, leaf = name.rpartition(".")
        groups.setdefault(module, []).append(leaf)
    lines = [
        printable(f"{module}: {', '.join(leaves)}" if module else ", ".join(leaves))
        for module, leaves in groups.items()
    ]
    return [*lines, f"... and {left} more"] if left else lines


def printable(text: str) -> str:
    """The text with control characters escaped: names in a file are anyone's."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
