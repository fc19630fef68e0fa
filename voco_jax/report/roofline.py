"""How long a step takes at least: compute, memory and links against a chip's peaks."""

import dataclasses
from collections.abc import Iterable, Sequence

from voco_jax.report.chips import Chip
from voco_jax.report.hlo import Collective

Place = tuple[int, ...]  # of a chip in its torus
_CUBE = 4  # v4 and v5p: a slice of whole cubes of 4x4x4 is a torus, a smaller one an open mesh


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a step takes at its peak; see `roofline`."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        """The longest part: what is left if all three overlap fully."""
        return max(self.compute, self.memory, self.links)

    @property
    def wall(self) -> str:
        """The longest part's name."""
        return max(("compute", "memory", "links"), key=lambda part: float(getattr(self, part)))

    @property
    def efficiency(self) -> float:
        """Of weak scaling from one device, 0..1, if collectives overlap with nothing at all.

        One device does the same work without collectives.
        """
        alone = max(self.compute, self.memory)
        return alone / (alone + self.links)


def roofline(
    flops: float,
    traffic: float,
    collectives: Iterable[Collective],
    places: Sequence[Place] | None,
    chip: Chip,
) -> Roofline:
    """The times of one device.

    Args:
        flops: of one device.
        traffic: bytes to and from the memory of one device.
        collectives: of the step.
        places: of the mesh's devices in the torus, in the mesh's order; None: there is none.
        chip: of every device.
    """
    return Roofline(
        compute=flops / chip.flops,
        memory=traffic / chip.bandwidth,
        links=sum(one.sent / link_bandwidth(one, places, chip) for one in collectives),
    )


def link_bandwidth(one: Collective, places: Sequence[Place] | None, chip: Chip) -> float:
    """Bytes/s that a device can send to the others of its group.

    A torus gives two links along each axis on which the group's devices differ, one where the axis
    is not closed to a ring or the group has not all of it: half of the ring's devices would be sent
    to through the other half. A permutation between neighbours uses one link.
    """
    if places is None or chip.is_gpu:
        return chip.link
    if one.kind == "collective-permute":
        return chip.link
    lengths = [1 + max(along) for along in zip(*places, strict=True)]
    cubes = all(length % _CUBE == 0 for length in lengths)
    links = 0
    for axis, length in enumerate(lengths):
        used = len({places[device][axis] for device in one.group})
        closed = used == length and length % chip.wraps == 0 and (cubes or chip.wraps != _CUBE)
        links += (2 if closed else 1) if used > 1 else 0
    return max(links, 1) * chip.link
