"""What XLA has to know of a GPU that is not here to compile for it: its `GpuTargetConfigProto`.

The figures are those of XLA's own specs (a100_sxm_80, h100_sxm, h200) in
https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs
and of the GeForce cards NVIDIA's: its white papers of Ada and GA102, and the tables of compute
capabilities 8.6 and 8.9 in the CUDA C++ Programming Guide.
"""

# By the proto's names and in its units; `name` becomes JAX's device_kind: chips.py knows it.
_HOPPER = {
    "name": "NVIDIA H100 80GB HBM3",
    "cuda_compute_capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
    "platform_version": "Compute Capability 9.0a",
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84942979072,
    "memory_bandwidth": 3352320000000,
    "l2_cache_size": 52428800,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "threads_per_core_limit": 2048,
}
_GEFORCE = {
    "fpus_per_core": 128,
    "shared_memory_per_core": 102400,
    "shared_memory_per_block_optin": 101376,
    "threads_per_core_limit": 1536,
}
_TARGETS = {
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "cuda_compute_capability": "major: 8",
        "platform_version": "Compute Capability 8.0",
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "device_memory_size": 85100068864,
        "memory_bandwidth": 2039040000000,
        "l2_cache_size": 41943040,
        "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912,
        "threads_per_core_limit": 2048,
    },
    "h100": _HOPPER,
    "h200": {
        **_HOPPER,
        "name": "NVIDIA H200",
        "device_memory_size": 151397597184,
        "memory_bandwidth": 4800000000000,
    },
    "rtx4090": {
        **_GEFORCE,
        "name": "NVIDIA GeForce RTX 4090",
        "cuda_compute_capability": "major: 8 minor: 9",
        "platform_version": "Compute Capability 8.9",
        "core_count": 128,
        "clock_rate_ghz": 2.52,
        "device_memory_size": 24 * 2**30,
        "memory_bandwidth": 1008 * 10**9,
        "l2_cache_size": 72 * 2**20,
    },
    "rtx3070": {
        **_GEFORCE,
        "name": "NVIDIA GeForce RTX 3070",
        "cuda_compute_capability": "major: 8 minor: 6",
        "platform_version": "Compute Capability 8.6",
        "core_count": 46,
        "clock_rate_ghz": 1.725,
        "device_memory_size": 8 * 2**30,
        "memory_bandwidth": 448 * 10**9,
        "l2_cache_size": 4 * 2**20,
    },
}

NAMES = tuple(_TARGETS)


def target_config(name: str) -> str:
    """The text of the proto of one of `NAMES`."""
    return _PROTO.format_map(_TARGETS[name])


_PROTO = """\
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {cuda_compute_capability} }}
  platform_version: "{platform_version}"
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory_per_block_optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {threads_per_core_limit}
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
device_description_str: "{name}"
"""
