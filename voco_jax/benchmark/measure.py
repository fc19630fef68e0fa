"""What all benchmarks share: statistics, tables, memory, page cache, processes of their own.

Imports neither jax nor torch: a process that only waits for others must not hold a device.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from voco_jax.errors import InputError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of repeated measurements of one thing: the middle, and where four fifths of them lie."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th
    count: int


def spread(values: Iterable[float]) -> Spread:
    """Summarises measurements, at least one."""
    found = np.asarray(list(values), float)
    low, median, high = np.percentile(found, (10, 50, 90)).tolist()
    return Spread(median, low, high, len(found))


def time_calls(
    call: Callable[[], Result], wait: Callable[[Result], object], warmup: int, count: int
) -> list[float]:
    """Seconds of each of many calls, one more of which is always queued, as in the training loop.

    Args:
        call: starts the work and returns at once what can be waited for.
        wait: returns when the work is done.
        warmup: calls that are not timed; each is waited for.
        count: calls that are, at least one.
    """
    for _ in range(warmup):
        wait(call())
    seconds, last = [], time.perf_counter()
    running = call()
    for number in range(1, count + 1):
        following = call() if number < count else running
        wait(running)
        now = time.perf_counter()
        seconds.append(now - last)
        running, last = following, now
    return seconds


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, aligned: the first column to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def one(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([one(lines[0]), one(rule), *map(one, lines[1:])])


def seconds_text(seconds: float | None) -> str:
    """A time for people, three digits; "-" for none."""
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.3g} ms"


def spread_text(found: Spread | None) -> str:
    """A median and its range, for people."""
    if found is None:
        return "-"
    return f"{seconds_text(found.median)} [{seconds_text(found.low)}, {seconds_text(found.high)}]"


def bytes_text(size: float | None) -> str:
    """A size for people; "-" for none."""
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


def utilisation(flops: float, seconds: float, ceiling: float) -> float:
    """Model FLOP utilisation: the share of a measured ceiling that needed work takes.

    Args:
        flops: that one step needs, recomputation left out.
        seconds: of the step.
        ceiling: FLOP/s of plain matrix products on the same devices.
    """
    return flops / seconds / ceiling


def peak_resident() -> int:
    """Bytes of memory that this process held at most; of its own program, not its parent's."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:", 1)[1].split()[0]) * 1024


def resident(pids: Iterable[int] = ()) -> int:
    """Bytes of memory that this process and some others hold now, pages they share counted once.

    Of the others those that have ended are left out.
    """
    total = 0
    for pid in (os.getpid(), *pids):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:", 1)
            total += int(fields[1].split()[0]) * 1024
    return total


def cpu_seconds(pids: Iterable[int] = ()) -> float:
    """Processor time so far of this process, all its threads, and of some others."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    ticks = os.sysconf("SC_CLK_TCK")
    for pid in pids:
        with contextlib.suppress(OSError):
            # After the name, which may hold spaces: state is field 3, utime 14, stime 15.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def write_out(files: Iterable[Path]) -> None:
    """Waits until files are on the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Makes the next reading of files come from the disk, where the file system has one.

    What is not on the disk yet cannot be dropped: see `write_out`.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bytes_from_disk(pids: Iterable[int] = ()) -> int | None:
    """Bytes that this process and some others had fetched from disks; None: nothing tells."""
    total = 0
    try:
        for pid in (os.getpid(), *pids):
            text = Path(f"/proc/{pid}/io").read_text()
            total += int(text.split("\nread_bytes:", 1)[1].split()[0])
    except OSError:
        return None
    return total


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this thread, and those it starts, on a single core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class ChildError(RuntimeError):
    """A process of its own came to no result; the message says why."""


def in_own_process(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Calls a function in a fresh process: its peak memory, its device, its death.

    Args:
        function: importable by name.
        *args: can be pickled.
        **kwargs: likewise.

    Raises:
        InputError: the function raised it.
        ChildError: it raised anything else, or the process was killed.
    """
    return in_own_process_within(None, function, *args, **kwargs)


def in_own_process_within(
    limit: float | None,
    function: Callable[Parameters, Result],
    *args: Parameters.args,
    **kwargs: Parameters.kwargs,
) -> Result:
    """`in_own_process`; killed after `limit` seconds, if it is given."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(there, function, args, kwargs))
    child.start()
    there.close()
    found: Any = None
    try:
        if not here.poll(limit):
            raise ChildError(f"stopped after {limit:.0f} s")
        with contextlib.suppress(EOFError):  # it died
            found = here.recv()
            child.join()
    finally:
        if child.is_alive() and found is None:
            child.kill()
        child.join()
        here.close()
    if found is None:
        killed = "killed, as a rule out of memory" if child.exitcode == -9 else "ended"
        raise ChildError(f"{killed} (exit status {child.exitcode})")
    kind, value = found
    if kind == "result":
        return value
    raise (InputError if kind == "input" else ChildError)(value)


def _answer(
    there: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        there.send(("result", function(*args, **kwargs)))
    except InputError as error:
        there.send(("input", str(error)))
    except Exception as error:
        if not out_of_memory(error):
            traceback.print_exc()
        there.send(("error", reason(error)))


def out_of_memory(error: BaseException) -> bool:
    """Whether JAX, PyTorch or Python says that there is not enough memory."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(
        part in text for part in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory")
    )


def reason(error: BaseException) -> str:
    """One line about an error, for a table."""
    if out_of_memory(error):
        return "out of memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def machine() -> dict[str, Any]:
    """What the numbers were measured on, devices aside."""
    model = "unknown"
    with contextlib.suppress(OSError, IndexError):
        model = Path("/proc/cpuinfo").read_text().split("model name", 1)[1].split("\n", 1)[0]
    versions = {}
    for name in ("jax", "jaxlib", "flax", "grain", "tensorstore", "numpy", "torch", "monai"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": model.strip(" \t:"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # at the time of asking: anything else that runs disturbs
        "python": platform.python_version(),
        "versions": versions,
    }


def write_json(path: str | Path | None, values: Any) -> None:
    """Writes dataclasses and plain values as JSON; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps(values, indent=1, default=_plain) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
