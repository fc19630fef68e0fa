"""Which tensors of a weight file are the network's, whatever they are wrapped in.

Files in the wild nest the weights in dicts (`state_dict`, `student`, ...) and put prefixes before
the names (`module.`, `backbone.`, ...); training checkpoints hold a student and a teacher.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from voco_jax.errors import InputError
from voco_jax.interop.match import printable

NETWORKS = ("teacher", "student")
WRAPPERS = {
    *("state_dict", "model_state_dict", "network_weights", "net", "model", "module", "backbone"),
    *NETWORKS,
}
"""Keys of nested dicts that hold the weights, and of prefixes before a tensor's name."""
PREFIXES = WRAPPERS | {"_orig_mod"}
ROOT = re.compile(r"(swinViT|swin_vit|encoder\d+|decoder\d+|out|proj_head)\Z")
"""First parts of the names of MONAI's SwinUNETR, and the projector's."""
HEAD = re.compile(r"layer[123]\Z")
"""In voco_v2's checkpoints the projectors themselves are `student` and `teacher`."""
MAX_DEPTH = 8


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen network's tensors.

    Attributes:
        tensors: bare name -> whatever stands for the tensor.
        sources: bare name -> its full key in the file, wrappers and prefixes included.
        wrappers: the nested dicts that were opened, dotted.
        prefixes: what was stripped from names, dotted.
        networks: of `NETWORKS`, those that the file holds.
        network: the one of them that was taken; None: the file names none.
        set_aside: entries of the file beside the weights: epoch, optimizer, ...
    """

    tensors: dict[str, Any]
    sources: dict[str, str]
    wrappers: tuple[str, ...]
    prefixes: tuple[str, ...]
    networks: tuple[str, ...]
    network: str | None
    set_aside: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Record:
    name: str
    source: str
    wrapper: str
    prefix: str
    network: str | None
    value: Any


def select(tree: Any, leaf: type, network: str, source: str) -> Selection:
    """Opens wrappers, strips prefixes and takes one network's tensors.

    Args:
        tree: what the file holds: nested mappings.
        leaf: the type that stands for a tensor.
        network: `teacher` or `student`: which of them to take where the file holds both. Where it
            holds one or names none, that is taken.
        source: the file, for messages.

    Raises:
        InputError: no tensors; two keys for one name; nested too deep; an unknown network.
    """
    if network not in NETWORKS:
        raise InputError(f"network: found {network!r}, expected one of {list(NETWORKS)}")
    entries = list(_walk(tree, (), leaf, source)) if isinstance(tree, Mapping) else []
    records = [entry for entry in entries if isinstance(entry, _Record)]
    aside = [entry for entry in entries if isinstance(entry, str)]
    if not records:
        found = ", ".join(printable(name) for name in aside[:20]) or type(tree).__name__
        raise InputError(
            f"{source}: found no weights but {found}; expected a dict of tensors, bare or in one "
            f"of {sorted(WRAPPERS)}; save the network's state_dict() alone"
        )
    present = tuple(name for name in NETWORKS if any(r.network == name for r in records))
    taken = network if network in present else (present[0] if present else None)
    chosen = [record for record in records if record.network in (None, taken)]
    by_name: dict[str, _Record] = {}
    for record in chosen:
        other = by_name.setdefault(record.name, record)
        if other is not record:
            raise InputError(
                f"{source}: {printable(other.source)} and {printable(record.source)} are both "
                f"{printable(record.name)}, expected one; save the one you mean alone"
            )
    return Selection(
        tensors={name: record.value for name, record in by_name.items()},
        sources={name: record.source for name, record in by_name.items()},
        wrappers=_distinct(record.wrapper for record in chosen),
        prefixes=_distinct(record.prefix for record in chosen),
        networks=present,
        network=taken,
        set_aside=tuple(aside),
    )


def _walk(
    tree: Mapping[Any, Any], path: tuple[str, ...], leaf: type, source: str
) -> Iterator[_Record | str]:
    """The tensors of nested dicts, and the names of all that is set aside."""
    if len(path) > MAX_DEPTH:
        raise InputError(f"{source}: dicts are nested deeper than {MAX_DEPTH}, expected 1 to 3")
    opened = any(key in WRAPPERS and isinstance(tree[key], Mapping) for key in tree)
    for key, value in tree.items():
        if isinstance(value, Mapping) and key in WRAPPERS:
            yield from _walk(value, (*path, key), leaf, source)
            continue
        if isinstance(value, leaf) and isinstance(key, str):
            record = _record(path, key, value, source)
            if not opened or ROOT.match(record.name.split(".")[0]):
                yield record
                continue
        yield ".".join([*path, str(key)])


def _record(path: tuple[str, ...], key: str, value: Any, source: str) -> _Record:
    parts = key.split(".")
    stripped: list[str] = []
    while len(parts) > 1 and parts[0] in PREFIXES:
        stripped.append(parts.pop(0))
    networks = {*path, *stripped}.intersection(NETWORKS)
    full = ".".join([*path, key])
    if len(networks) > 1:
        raise InputError(
            f"{source}: {printable(full)} names both networks, expected one; "
            "save the one you mean alone"
        )
    if parts[0] == "swin_vit":
        parts[0] = "swinViT"
    elif networks and HEAD.match(parts[0]):
        parts.insert(0, "proj_head")
    return _Record(
        name=".".join(parts),
        source=full,
        wrapper=".".join(path),
        prefix="".join(f"{part}." for part in stripped),
        network=next(iter(networks), None),
        value=value,
    )


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))
