"""Shared set-up: one CPU backend, absl flags for grain's workers, the shared data folder."""

import importlib.util
import locale
import os
import re
import signal
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jaxlib

# The machine is shared by the workers: PyTorch would start a thread a core in each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the workers, which start after this: large arrays in large pages, for fewer page faults.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Tests compile more than they compute: see voco_jax.training.compile.compiler_options.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
if jaxlib.__version__.startswith("0.10."):  # a newer XLA refuses to start with it
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()
# Under nohup, or in the background of a script, these are ignored, and so by what tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of `jax.jit` for what computes for longer than it compiles.
MUCH_TO_COMPUTE = {"xla_backend_optimization_level": 1}

SHARED = Path(__file__).resolve().parents[2] / "shared"


# Without PyTorch (tests on the newest Python) what compares with it live is left out.
HAS_TORCH = importlib.util.find_spec("torch") is not None
NEED_TORCH = sorted(
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if re.search(r"^(import|from) (torch|monai)", path.read_text("utf-8"), re.MULTILINE)
)
collect_ignore = [] if HAS_TORCH else NEED_TORCH


def shared_file(*parts: str) -> Path:
    """A file of the data folder beside the checkout; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"need shared/{parts[0]} beside the checkout")
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Undoes a test's change of the locale, by which text files are read: ITK's DICOM writer sets
    it to "C".
    """
    before = locale.setlocale(locale.LC_ALL)
    result = yield
    locale.setlocale(locale.LC_ALL, before)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Without PyTorch, skips what imports it in a test."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if not HAS_TORCH and error.name.partition(".")[0] in ("torch", "monai"):
            pytest.skip("need PyTorch")
        raise


LONGEST = ["segmentation", "launch", "step", "end_to_end", "decoder", "swin_unetr", "loop", "plan"]
LONGEST += ["benchmark", "pipeline", "channels", "export", "comparisons", "finetune_comparison"]


def pytest_collection_modifyitems(items):
    """The longest files first: the last ones then keep both workers busy to the end."""
    order = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """How many tests were skipped and why: a run that left much out must not look like a full one.

    Every reason completes "N of them ...", as "need shared/ct beside the checkout".
    """
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    count = len(skipped)
    terminalreporter.write_line(f"{count} test{'s' * (count != 1)} skipped{': ' * bool(why)}{why}")
    if collect_ignore:
        files = ", ".join(collect_ignore)
        terminalreporter.write_line(f"{len(collect_ignore)} files need PyTorch, left out: {files}")


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """One compilation cache for the whole session, child processes included."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    folder = str(base / "xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
