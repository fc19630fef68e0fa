"""On a machine with plugins of JAX but none of their devices."""

import os
import sys
from types import SimpleNamespace

import pytest

from voco_jax import accelerators


@pytest.mark.parametrize(
    ("plugins", "libtpu", "devices", "said"),
    [
        ((), False, (), ""),
        (("xla_cuda12",), False, (), "found no NVIDIA driver (libcuda.so.1) here: JAX "),
        ((), True, (), "found no TPU here: JAX computes on the CPU\n"),
        (("xla_cuda13",), True, (), "found no NVIDIA driver (libcuda.so.1) and no TPU here: JAX "),
        (("xla_cuda13",), True, ("nvidia",), ""),
        (("xla_cuda13",), True, ("tpu",), ""),
        ((), True, ("TPU_WORKER_ID",), ""),
        (("rocm",), True, (), ""),
    ],
)
def test_only_where_no_plugin_has_a_device(plugins, libtpu, devices, said, monkeypatch, capsys):
    points = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(accelerators.importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(
        accelerators.importlib.util, "find_spec", lambda name: object() if libtpu else None
    )
    monkeypatch.setattr(accelerators, "_has_nvidia_driver", lambda: "nvidia" in devices)
    monkeypatch.setattr(
        accelerators.glob, "glob", lambda p: [p] * ("tpu" in devices and "accel" in p)
    )
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    environment = {"TPU_WORKER_ID": "0"} if "TPU_WORKER_ID" in devices else {}
    monkeypatch.setattr(os, "environ", environment)
    only_cpu = accelerators.cpu_where_nothing_else_is()
    assert only_cpu == bool(said or not (plugins or libtpu))
    assert capsys.readouterr().err.startswith(said)
    assert environment.get("JAX_PLATFORMS") == ("cpu" if said else None)


def test_a_choice_of_the_user_stays(monkeypatch, capsys):
    points = [SimpleNamespace(name="xla_cuda13")]
    monkeypatch.setattr(accelerators.importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not accelerators.cpu_where_nothing_else_is()
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    assert capsys.readouterr().err == ""
