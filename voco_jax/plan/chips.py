"""What the accelerators can do, as their makers publish it. Peaks: no program reaches them.

TPU: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e: peak bf16, HBM capacity and
bandwidth, and "bidirectional inter-chip interconnect bandwidth per chip": both directions of 4
(v5e, v6e) or 6 (v5p) links, hence one direction of one link below. Of v4 those pages give no link;
table 4 of Google's "TPU v4: An Optically Reconfigurable Supercomputer for Machine Learning with
Hardware Support for Embeddings" (ISCA 2023) has 6 links of 50 GB/s.
GPU: NVIDIA's data sheets of A100 80GB, H100 and H200 (SXM): dense bf16 (half of what is given
"with sparsity"), memory, and NVLink, of which the sheets give both directions together. NVIDIA's
white papers of Ada (RTX 4090) and GA102 (RTX 3070), the tables of their appendices: dense bf16 with
sums in float32. Between these cards is PCIe 4.0 x16.
"""

import dataclasses

_GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: on a TPU a chip, both cores of it where it has two.

    Attributes:
        name: for people.
        flops: peak of bf16 matrix products, FLOP/s.
        memory: bytes.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s in one direction; of a GPU all its NVLinks together, or PCIe.
        wraparound: a TPU's torus closes along an axis whose length is a multiple of this: of v5e
            and v6e the pod's full 16; of v4 and v5p 4, if all three are (slices of full cubes).
            0: every device reaches every other through a switch.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    wraparound: int

    @property
    def is_gpu(self) -> bool:
        """Else a TPU."""
        return self.wraparound == 0


# By the start of JAX's `device_kind`.
_CHIPS = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * _GiB, 1200e9, 50e9, 4),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * _GiB, 819e9, 50e9, 16),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * _GiB, 2765e9, 100e9, 4),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * _GiB, 1638e9, 100e9, 16),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 312e12, 80 * 10**9, 2039e9, 300e9, 0),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 989e12, 80 * 10**9, 3350e9, 450e9, 0),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 165e12, 24 * 10**9, 1008e9, 32e9, 0),
    "NVIDIA GeForce RTX 3070": Chip("RTX 3070", 40.6e12, 8 * 10**9, 448e9, 32e9, 0),
    "NVIDIA H200": Chip("H200 SXM", 989e12, 141 * 10**9, 4800e9, 450e9, 0),
}


def chip(device_kind: str) -> Chip | None:
    """The figures of a `jax.Device.device_kind`; None where nothing is known, as of a CPU."""
    fitting = [name for name in _CHIPS if device_kind.startswith(name)]
    return _CHIPS[max(fitting, key=len)] if fitting else None
