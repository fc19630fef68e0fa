"""Which tensors of a weight file are the network's, whatever they are wrapped in.

Files in the wild nest the weights in dicts (`state_dict`, `student`, ...), put prefixes before the
names (`module.`, `backbone.`, the name of a Lightning attribute, ...) and wrappers into them
(`_orig_mod.`, ...); training checkpoints hold a student and a teacher.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voco_jax.errors import InputError
from voco_jax.interop.match import printable

NETWORKS = ("teacher", "student")
WRAPPERS = {
    *("state_dict", "model_state_dict", "network_weights", "net", "model", "module", "backbone"),
    *NETWORKS,
}
"""Keys of nested dicts that hold the weights, and of prefixes before a tensor's name."""
WRAPPED = {
    *("module", "_orig_mod", "_checkpoint_wrapped_module"),
    *("_fsdp_wrapped_module", "_fpw_module"),
}
"""What DDP, torch.compile, activation checkpointing and FSDP put into names, where they wrap."""
FLATTENED = "flat_param"
"""End of FSDP's name for the parameters of a module in one row, if it does not save them whole."""
COUNTER = "n_averaged"
"""AveragedModel's number of steps, beside the weights."""
ROOT = re.compile(r"(swinViT|swin_vit|encoder\d+|decoder\d+|out|proj_head)\Z")
"""First parts of the names of MONAI's SwinUNETR, and the projector's."""
HEAD = re.compile(r"layer[123]\Z")
"""In voco_v2's checkpoints the projectors themselves are `student` and `teacher`."""
MARK = re.compile(
    r"(?:\A|\.)(?P<root>(?:swinViT|swin_vit)\.)?layers1\.0\.(?:0\.)?blocks\.0\.attn\.qkv\.weight\Z"
)
"""Each file of a SwinUNETR has this name: what stands before it, stands before all names.

MONAI's own self-supervised weights are of its SwinTransformer alone, without the root.
"""
ALONE = re.compile(r"(patch_embed|layers\dc?)\Z")
"""First parts of the names of that SwinTransformer."""
MAX_DEPTH = 8
MAX_NAMES = 20_000
MAX_NAME = 1000
"""Characters."""
MAX_PREFIX = 10
"""Parts of a prefix that is found by its mark."""


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
class _Entry:
    """A tensor in nested dicts, or (`value` is None) something else."""

    path: tuple[str, ...]
    key: str
    value: Any
    beside: bool  # beside an opened dict: counts only if its name is a network's

    @property
    def full(self) -> str:
        return ".".join([*self.path, self.key])


@dataclass(frozen=True, kw_only=True)
class _Record:
    name: str
    entry: _Entry
    front: str  # what was stripped before the name
    prefix: str  # all that was stripped
    network: str | None


def select(tree: Any, leaf: type, network: str, source: str) -> Selection:
    """Opens wrappers, strips prefixes and takes one network's tensors.

    Args:
        tree: what the file holds: nested mappings.
        leaf: the type that stands for a tensor.
        network: `teacher` or `student`: which of them to take where the file holds both. Where it
            holds one or names none, that is taken.
        source: the file, for messages.

    Raises:
        InputError: no tensors; two keys for one name; nested too deep; too many or too long
            names; an unknown network.
    """
    if network not in NETWORKS:
        raise InputError(f"network: found {network!r}, expected one of {list(NETWORKS)}")
    entries: list[_Entry] = []
    for entry in _walk(tree, (), leaf, source, {id(tree)}) if isinstance(tree, Mapping) else ():
        if len(entries) == MAX_NAMES or len(entry.key) > MAX_NAME:
            raise InputError(
                f"{source}: found more than {MAX_NAMES} names or one of more than {MAX_NAME} "
                "characters, expected a network's; save the network's state_dict() alone"
            )
        entries.append(entry)
    fronts = dict(filter(None, (_front(entry.key) for entry in entries if entry.value is not None)))
    records: list[_Record] = []
    aside: list[str] = []
    for entry in entries:
        record = None if entry.value is None else _record(entry, fronts, source)
        if record is None or (entry.beside and not ROOT.match(record.name.split(".")[0])):
            aside.append(entry.full)
        else:
            records.append(record)
    if not records:
        raise _no_weights(tree, leaf, aside, source)
    present = tuple(name for name in NETWORKS if any(r.network == name for r in records))
    taken = network if network in present else (present[0] if present else None)
    chosen = [record for record in records if record.network in (None, taken)]
    by_name: dict[str, _Record] = {}
    for record in chosen:
        other = by_name.setdefault(record.name, record)
        if other is not record:
            longer = max(other, record, key=lambda one: len(one.front))
            raise InputError(
                f"{source}: {printable(other.entry.full)} and {printable(record.entry.full)} are "
                f"both {printable(record.name)}, expected one; write the one you mean to a file "
                f"of its own, as with: {extraction(source, longer.entry.path, longer.front)}"
            )
    return Selection(
        tensors={name: record.entry.value for name, record in by_name.items()},
        sources={name: record.entry.full for name, record in by_name.items()},
        wrappers=_distinct(".".join(record.entry.path) for record in chosen),
        prefixes=_distinct(record.prefix for record in chosen),
        networks=present,
        network=taken,
        set_aside=tuple(aside),
    )


def _no_weights(tree: Any, leaf: type, aside: Sequence[str], source: str) -> InputError:
    found = ", ".join(printable(name) for name in aside[:20]) or type(tree).__name__
    inner = [
        key
        for key, value in (tree.items() if isinstance(tree, Mapping) else ())
        if isinstance(key, str) and isinstance(value, Mapping)
        if any(isinstance(item, leaf) for item in value.values())
    ]
    fix = "save the network's state_dict() alone"
    if inner:
        fix = f"take one out, as with: {extraction(source, inner[:1], '')}"
    return InputError(
        f"{source}: found no weights but {found}; expected a dict of tensors, bare or in one of "
        f"{sorted(WRAPPERS)}; {fix}"
    )


def extraction(source: str, wrappers: Sequence[str], prefix: str) -> str:
    """The command that writes a file's tensors under a prefix to a file of their own, without it.

    Args:
        source: the file.
        wrappers: keys of the dicts around the tensors.
        prefix: of their names.
    """
    path = Path(source)
    old, new = (json.dumps(str(one)) for one in (path, path.with_stem(f"{path.stem}_taken")))
    start = json.dumps(prefix)
    taken = f"{{k[{len(prefix)}:]: v for k, v in t.items() if k.startswith({start})}}"
    if path.suffix.lower() == ".safetensors":
        code = (
            f"from safetensors.numpy import load_file, save_file; t = load_file({old}); "
            f"save_file({taken}, {new})"
        )
    else:
        inner = "".join(f"[{json.dumps(key)}]" for key in wrappers)
        code = (
            f'import torch; t = torch.load({old}, map_location="cpu", weights_only=True){inner}; '
            f"torch.save({taken}, {new})"
        )
    return f"python -c {shlex.quote(code)}"


def _walk(
    tree: Mapping[Any, Any], path: tuple[str, ...], leaf: type, source: str, seen: set[int]
) -> Iterator[_Entry]:
    """What nested dicts hold; a dict that is in them time and again (`seen`) is opened once."""
    if len(path) > MAX_DEPTH:
        raise InputError(f"{source}: dicts are nested deeper than {MAX_DEPTH}, expected 1 to 3")
    opened = any(key in WRAPPERS and isinstance(tree[key], Mapping) for key in tree)
    for key, value in tree.items():
        if isinstance(value, Mapping) and key in WRAPPERS and id(value) not in seen:
            seen.add(id(value))
            yield from _walk(value, (*path, key), leaf, source, seen)
        else:
            tensor = isinstance(value, leaf) and isinstance(key, str)
            counter = tensor and key.rpartition(".")[2] == COUNTER
            kept = value if tensor and not counter else None
            yield _Entry(path=path, key=str(key), value=kept, beside=opened)


def _unwrapped(key: str) -> list[tuple[int, str]]:
    """The parts of a name that no wrapper put there, with their places."""
    parts = key.split(".")
    kept = [(place, part) for place, part in enumerate(parts) if part not in WRAPPED]
    return kept or [(len(parts) - 1, parts[-1])]


def _front(key: str) -> tuple[tuple[str, ...], bool] | None:
    """What stands before the network in its `MARK`, and whether the root is lacking."""
    name = ".".join(part for _, part in _unwrapped(key))
    found = MARK.search(name)
    front = tuple(name[: found.start()].split(".")) if found and found.start() else ()
    return (front, found["root"] is None) if found and len(front) <= MAX_PREFIX else None


def _record(entry: _Entry, fronts: Mapping[tuple[str, ...], bool], source: str) -> _Record:
    if entry.key.endswith(FLATTENED):
        raise InputError(
            f"{source}: {printable(entry.full)} is what FSDP has on a device, flattened, "
            "expected each parameter by its name; save it under StateDictType.FULL_STATE_DICT"
        )
    places, parts = map(list, zip(*_unwrapped(entry.key), strict=True))
    known = range(min(MAX_PREFIX, len(parts) - 1), -1, -1)
    start = next((n for n in known if tuple(parts[:n]) in fronts), 0)
    alone = fronts.get(tuple(parts[:start]), False)
    while start < len(parts) - 1 and parts[start] in WRAPPERS:
        start += 1
    everything = entry.key.split(".")
    kept = set(places[start:])
    stripped = [part for place, part in enumerate(everything) if place not in kept]
    networks = {*entry.path, *stripped}.intersection(NETWORKS)
    if len(networks) > 1:
        raise InputError(
            f"{source}: {printable(entry.full)} names both networks, expected one; "
            "save the one you mean alone"
        )
    return _Record(
        name=".".join(_spelled(parts[start:], alone=alone, head=bool(networks))),
        entry=entry,
        front="".join(f"{part}." for part in everything[: places[start]]),
        prefix="".join(f"{part}." for part in stripped),
        network=next(iter(networks), None),
    )


def _spelled(parts: list[str], *, alone: bool, head: bool) -> list[str]:
    """A bare name as MONAI has it today.

    Args:
        parts: of the name.
        alone: whether it is one of a SwinTransformer without a root.
        head: whether it stood under a network's name.
    """
    if parts[0] == "swin_vit":
        parts[0] = "swinViT"
    elif alone and ALONE.match(parts[0]):
        parts.insert(0, "swinViT")
    elif head and HEAD.match(parts[0]):
        parts.insert(0, "proj_head")
    if parts[0] == "swinViT":
        if parts[2:5] == ["0", "0", "blocks"]:  # of MONAI's ssl_pretrained_weights.pth
            del parts[2]
        if parts[-3:-1] in (["mlp", "fc1"], ["mlp", "fc2"]):  # of its model_swinvit.pt
            parts[-2] = parts[-2].replace("fc", "linear")
    return parts


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))
