"""What XLA has to know of a GPU that is not here to compile for it: its `GpuTargetConfigProto`.

The figures are those of XLA's own specs (a100_sxm_80, h100_sxm, h200) in
https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class _Target:
    """In which these GPUs differ; memory in bytes, the rest in XLA's units."""

    name: str  # becomes JAX's device_kind: chips.py knows it
    capability: str  # of CUDA
    platform_version: str
    cores: int
    float_units: int  # of a core
    clock: float  # GHz
    memory: int
    bandwidth: int
    second_cache: int
    shared: int  # of a core
    shared_of_block: int  # at most


_HOPPER = _Target(
    name="NVIDIA H100 80GB HBM3",
    capability="major: 9 feature_extension: ACCELERATED_FEATURES",
    platform_version="Compute Capability 9.0a",
    cores=132,
    float_units=128,
    clock=1.98,
    memory=84942979072,
    bandwidth=3352320000000,
    second_cache=52428800,
    shared=233472,
    shared_of_block=232448,
)
_TARGETS = {
    "a100": _Target(
        name="NVIDIA A100-SXM4-80GB",
        capability="major: 8",
        platform_version="Compute Capability 8.0",
        cores=108,
        float_units=64,
        clock=1.41,
        memory=85100068864,
        bandwidth=2039040000000,
        second_cache=41943040,
        shared=167936,
        shared_of_block=166912,
    ),
    "h100": _HOPPER,
    "h200": dataclasses.replace(
        _HOPPER, name="NVIDIA H200", memory=151397597184, bandwidth=4800000000000
    ),
}

NAMES = tuple(_TARGETS)


def target_config(name: str) -> str:
    """The text of the proto.

    Args:
        name: one of `NAMES`.
    """
    of = _TARGETS[name]
    return f"""\
gpu_device_info {{
  name: "{of.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {of.capability} }}
  platform_version: "{of.platform_version}"
  core_count: {of.cores}
  fpus_per_core: {of.float_units}
  clock_rate_ghz: {of.clock}
  device_memory_size: {of.memory}
  memory_bandwidth: {of.bandwidth}
  l2_cache_size: {of.second_cache}
  shared_memory_per_core: {of.shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {of.shared_of_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{of.name}"
"""
