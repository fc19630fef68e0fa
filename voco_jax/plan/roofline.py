"""How long a step takes at least: compute, memory and communication against a chip's peaks."""

import dataclasses
from collections.abc import Iterable, Sequence

from voco_jax.plan.chips import Chip
from voco_jax.plan.collectives import Collective

_CUBE = 4  # v4 and v5p: a slice of full cubes of 4x4x4 is a torus, a smaller one an open mesh


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that the parts of a step take at the chip's peaks, and what follows from them.

    Attributes:
        compute: of matrix products and convolutions.
        memory: of traffic to and from main memory.
        communication: of collectives.
        step: the longest of the three: what is left if they overlap fully.
        bottleneck: its name.
        weak_scaling_efficiency: 0..1, from one device, which does the same work without
            collectives, if nothing hides them.
    """

    compute: float
    memory: float
    communication: float
    step: float
    bottleneck: str
    weak_scaling_efficiency: float


def roofline(
    flops: float,
    traffic: float,
    collectives: Iterable[Collective],
    coords: Sequence[tuple[int, ...]] | None,
    chip: Chip,
) -> Roofline:
    """The times of one device.

    Args:
        flops: of one device.
        traffic: bytes to and from the memory of one device.
        collectives: of the step.
        coords: of the mesh's devices in the torus, in the mesh's order; None: there is none.
        chip: of every device.
    """
    parts = {
        "compute": flops / chip.flops,
        "memory": traffic / chip.memory_bandwidth,
        "communication": sum(one.sent / bandwidth(one, coords, chip) for one in collectives),
    }
    alone = max(parts["compute"], parts["memory"])
    return Roofline(
        **parts,
        step=max(parts.values()),
        bottleneck=max(parts, key=parts.__getitem__),
        weak_scaling_efficiency=alone / (alone + parts["communication"]),
    )


def bandwidth(one: Collective, coords: Sequence[tuple[int, ...]] | None, chip: Chip) -> float:
    """Bytes/s that a device can send to the others of a collective's group.

    A torus gives two links along each axis on which the group's devices differ, one where the axis
    is not closed to a ring or the group has not all of it: half of the ring's devices would be sent
    to through the other half. A permutation between neighbours uses one link.
    """
    if coords is None or chip.is_gpu or one.kind == "collective-permute":
        return chip.link_bandwidth
    lengths = [1 + max(along) for along in zip(*coords, strict=True)]
    torus = chip.wraparound != _CUBE or all(length % _CUBE == 0 for length in lengths)
    links = 0
    for axis, length in enumerate(lengths):
        used = len({coords[device][axis] for device in one.group})
        closed = used == length and length % chip.wraparound == 0 and torus
        links += (2 if closed else 1) if used > 1 else 0
    return max(links, 1) * chip.link_bandwidth
