"""Which of JAX's plugins have a device here.

JAX starts every plugin that is installed. libtpu and the CUDA plugin, as `voco_jax.plan` needs
them, tell in twenty lines and a traceback of a machine without a TPU or GPU that it has none.
"""

import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import sys


def cpu_where_nothing_else_is() -> bool:
    """Sets JAX_PLATFORMS=cpu if the devices of all plugins are missing, and says so in one line.

    Sets nothing where the variable is set, or a plugin is installed that is neither libtpu nor
    CUDA's. Call it before JAX looks for devices.

    Returns:
        Whether JAX will compute on the CPU: so it was set, or no plugin is installed.
    """
    if "JAX_PLATFORMS" in os.environ:
        return os.environ["JAX_PLATFORMS"] == "cpu"
    plugins = {one.name for one in importlib.metadata.entry_points(group="jax_plugins")}
    cuda = {name for name in plugins if name.startswith("xla_cuda")}
    tpu = importlib.util.find_spec("libtpu") is not None
    if not (plugins or tpu):
        return True
    found = (cuda and _has_nvidia_driver()) or (tpu and _has_tpu())
    if found or plugins - cuda or sys.platform != "linux":
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # which has read the variable
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    missing = ["no NVIDIA driver (libcuda.so.1)"] * bool(cuda) + ["no TPU"] * tpu
    print(f"found {' and '.join(missing)} here: JAX computes on the CPU", file=sys.stderr)
    return True


def silence_compiler() -> None:
    """Leaves out XLA's log, but for what ends the process; before jax is imported.

    For programs that only compile, or compute on the CPU: errors of these are exceptions, too, and
    after two minutes XLA would ask in four lines for a bug report about slow compiling.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _has_tpu() -> bool:
    """By its device files, or by the variables that Cloud TPUs and GKE set."""
    files = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(files) or any(name.startswith("TPU_") for name in os.environ)
