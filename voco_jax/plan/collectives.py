"""The collectives of a compiled program: kind, count, devices and bytes of each."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from voco_jax.plan.hlo import Computation, Instruction, Module, numbers

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclass(frozen=True)
class Collective:
    """One kind of collective at one place of the program.

    Attributes:
        kind: as XLA calls it.
        count: how often a step runs it.
        size: bytes of the unsharded array (or arrays) that each group works on, each time.
        group: the devices of the first group, as positions in the mesh.
    """

    kind: str
    count: int
    size: int
    group: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, by the algorithms that send least."""
        others = (len(self.group) - 1) / len(self.group)
        share = {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.count * self.size * share.get(self.kind, others)


def find_collectives(module: Module) -> list[Collective]:
    """All of a step; those that take no part in moving data (groups of one) are left out.

    A TPU spreads one collective over several fusions, to hide it behind their work: they name
    the same channel.
    """
    found, channels = [], set()
    for computation, one, count in module.executed:
        fused = one.opcode == "fusion"
        for place, each in _inside(module, one) if fused else [(computation, one)]:
            kind = each.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            if fused and channel:
                if (id(computation), channel[1]) in channels:
                    continue
                channels.add((id(computation), channel[1]))
            group = first_group(each.attributes, module.devices)
            size = sum(operand.size for operand in place.operands(each))
            if kind == "all-gather":
                size *= len(group)
            elif kind == "all-reduce" and fused and "slice" in place.root.opcode:
                kind = "reduce-scatter"  # what TPUs run for an all-reduce of which a part stays
            if len(group) > 1:
                found.append(Collective(kind, count, size, group))
    return found


def _inside(module: Module, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    for name in fusion.called.get("calls", ()):
        computation = module.computations[name]
        for one in computation.instructions.values():
            yield computation, one
            if one.opcode == "fusion":
                yield from _inside(module, one)


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first of the groups of devices that work together, as any of XLA's notations has it.

    No groups in a collective's attributes: all the program's devices are one.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(numbers(listed[1]))
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes):
        return tuple(_iota(iota[2], iota[3]).reshape(numbers(iota[1]))[0].tolist())
    # GPUs: of several meshes one is made, its devices maybe in another order.
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))?\s*"
        r"\{([^}]*)\}",
        attributes,
    )
    if mesh:
        axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        sizes = [int(size) for _, size in axes]
        order = np.arange(math.prod(sizes))
        if mesh[2]:
            order = _iota(mesh[2], mesh[3])
        elif mesh[4]:
            order = np.array(numbers(mesh[4]))
        used = re.findall(r"'([^']+)'", mesh[5])
        group = order.reshape(sizes)[tuple(slice(None) if a in used else 0 for a, _ in axes)]
        return tuple(group.ravel().tolist())
    return tuple(range(devices))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 on in that shape, its axes in that order."""
    shape = numbers(sizes)
    axes = numbers(order) if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes).ravel()
