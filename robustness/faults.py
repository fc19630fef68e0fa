"""What happens to a run when things break: each fault for real, on two processes.

    python -m robustness.faults              # all of them, on two cores
    python -m robustness.faults sigterm bit  # some

Prints one line a fault: what was done, what happened. A full disk needs the right to mount a tmpfs.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

from robustness import runs

RUN: dict[str, object] = {
    "batch_size": 4,
    "total_steps": 12,
    "checkpoint.every_steps": 4,
    "checkpoint.keep": 4,
}


class Layout(TypedDict):
    """Of a run's four devices."""

    processes: int
    devices: int


ALONE, TWO = Layout(processes=1, devices=4), Layout(processes=2, devices=2)


class Faults:
    """Runs in one folder; the whole run that others are compared with is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
        self.whole = folder / "whole"
        outputs = self.run(self.whole)
        assert len(runs.losses(self.whole)) == 12, outputs

    def run(
        self,
        workdir: Path,
        *,
        processes: int = 2,
        devices: int = 2,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[str]:
        """A run to its end; each process's output, its exit status appended."""
        started = self.start(
            workdir,
            processes=processes,
            devices=devices,
            settings=settings,
            environment=environment,
        )
        outputs = runs.finish(started)
        return [f"{o}\nexit {p.returncode}" for o, p in zip(outputs, started, strict=True)]

    def start(
        self,
        workdir: Path,
        *,
        processes: int = 2,
        devices: int = 2,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[subprocess.Popen[str]]:
        """The processes of a run, each with its devices; `settings` besides `RUN`."""
        return runs.start(
            workdir,
            processes=processes,
            devices=devices,
            settings={**RUN, **(settings or {})},
            environment=environment,
        )

    def copy(self, name: str) -> Path:
        """The finished run's workdir, to be damaged."""
        return Path(shutil.copytree(self.whole, self.folder / name))

    def same_losses(self, workdir: Path) -> str:
        """In words, whether every step's loss is that of the whole run."""
        found, expected = runs.losses(workdir), runs.losses(self.whole)
        if found == expected:
            return "all 12 losses bit for bit those of the run without a fault"
        differences = {k: abs(found[k] / expected[k] - 1) for k in expected if k in found}
        by_step = ", ".join(f"{k}: {value:.0e}" for k, value in differences.items() if value)
        return f"{len(found)} of 12 losses; relative differences by step, others 0: {by_step}"


def until(step: int, workdir: Path, started: list[subprocess.Popen[str]]) -> None:
    """Waits for a step's line in the metrics."""
    while max(runs.losses(workdir), default=0) < step:
        assert all(p.poll() is None for p in started), runs.finish(started)
        time.sleep(0.02)


def words(output: str, *keys: str) -> str:
    """The lines of an output that say something about the keys."""
    lines = [line for line in output.splitlines() if any(key in line for key in keys)]
    return " | ".join(dict.fromkeys(line[:300] for line in lines))


def sigterm(faults: Faults) -> str:
    """SIGTERM to one of two."""
    workdir = faults.folder / "sigterm"
    started = faults.start(workdir)
    until(5, workdir, started)
    started[1].send_signal(signal.SIGTERM)
    sent = max(runs.losses(workdir))
    outputs = runs.finish(started)
    saved = words(outputs[0], "preempted")
    status = [p.returncode for p in started]
    again = faults.run(workdir)
    return (
        f"sent after step {sent} was logged: {saved}; exit {status}. Same command: "
        f"{words(again[0], 'resuming')}; {faults.same_losses(workdir)}"
    )


def early(faults: Faults) -> str:
    """SIGTERM to one of two before the first step."""
    workdir = faults.folder / "early"
    started = faults.start(workdir)
    while not (workdir / "logs" / "process_1.log").exists():
        assert all(p.poll() is None for p in started), runs.finish(started)
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    outputs = runs.finish(started)
    seconds, status = time.monotonic() - begin, [p.returncode for p in started]
    message = words(outputs[1], "preempted") + " | " + words(outputs[0], "error:", "Terminating")
    again = faults.run(workdir)
    return (
        f"{message}; both ended after {seconds:.0f} s, exit {status}. Same command: "
        f"{words(again[0], 'starting', 'resuming')}; {faults.same_losses(workdir)}"
    )


def sigkill(faults: Faults) -> str:
    """SIGKILL of one of two, either one."""
    return _lose_one(faults, signal.SIGKILL, "killed")


def frozen(faults: Faults) -> str:
    """SIGSTOP of one of two, either one: alive, but not heard of."""
    return _lose_one(faults, signal.SIGSTOP, "stopped")


def _lose_one(faults: Faults, number: signal.Signals, what: str) -> str:
    lines = []
    for victim in (1, 0):
        workdir = faults.folder / f"{what}{victim}"
        started = faults.start(workdir)
        until(5, workdir, started)
        started[victim].send_signal(number)
        begin = time.monotonic()
        (output,) = runs.finish([started[1 - victim]])
        seconds, other = time.monotonic() - begin, started[1 - victim].returncode
        started[victim].kill()
        runs.finish([started[victim]])
        message = words(output, "error:", "Terminating process because")
        again = faults.run(workdir)
        lines.append(
            f"process {victim} {what}: the other ended after {seconds:.0f} s with exit {other} "
            f"({message}). Same command: {words(again[0], 'resuming')}; "
            f"{faults.same_losses(workdir)}"
        )
    return " // ".join(lines)


def freeze(faults: Faults) -> str:
    """SIGSTOP of a run of one process for 100 s: Ctrl-Z, a closed laptop, a paused container."""
    workdir = faults.folder / "freeze"
    started = faults.start(workdir, **ALONE)
    until(5, workdir, started)
    started[0].send_signal(signal.SIGSTOP)
    time.sleep(100)
    started[0].send_signal(signal.SIGCONT)
    (output,) = runs.finish(started)
    return (
        f"exit {started[0].returncode} ({words(output, 'starting', 'resuming', 'error:')}); "
        f"{faults.same_losses(workdir)}"
    )


def proxy(faults: Faults) -> str:
    """Proxies in the environment that nobody answers at, of one process and of two."""
    nobody = {
        f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "grpc", "all", "HTTP")
    }
    lines = []
    for layout in (ALONE, TWO):
        workdir = faults.folder / f"proxy{layout['processes']}"
        begin = time.monotonic()
        outputs = faults.run(workdir, **layout, environment=nobody)
        seconds = time.monotonic() - begin
        lines.append(
            f"{layout['processes']} processes: done after {seconds:.0f} s, "
            f"{words(outputs[-1], 'exit')}; {faults.same_losses(workdir)}"
        )
    return " // ".join(lines)


def stuck(faults: Faults) -> str:
    """Reads of the cache that never return, and then SIGTERM; of one process and of two."""
    lines = []
    for layout, data_workers in ((ALONE, 1), (TWO, 0)):
        workdir = faults.folder / f"stuck{layout['processes']}"
        settings: dict[str, object] = {"data.workers": data_workers}
        started = faults.start(workdir, **layout, settings=settings)
        until(2, workdir, started)
        volumes = sorted((workdir / "cache" / "volumes").glob("c.*"))
        for volume in volumes:  # opening a pipe waits for its other end
            volume.rename(volume.with_name(f"aside_{volume.name}"))
            os.mkfifo(volume)
        log = workdir / "logs" / "process_0.log"
        while "still waiting for input" not in log.read_text():
            assert all(p.poll() is None for p in started), runs.finish(started)
            time.sleep(0.1)
        done = max(runs.losses(workdir))
        started[-1].send_signal(signal.SIGTERM)
        begin = time.monotonic()
        outputs = runs.finish(started)
        seconds, status = time.monotonic() - begin, [p.returncode for p in started]
        for volume in volumes:
            volume.with_name(f"aside_{volume.name}").replace(volume)
        again = faults.run(workdir, **layout, settings=settings)
        lines.append(
            f"{len(started)} processes: {words(outputs[0], 'still waiting')}; SIGTERM after step "
            f"{done}: {words(outputs[0], 'preempted')} after {seconds:.0f} s, exit {status}. Same "
            f"command: {words(again[0], 'resuming')}; {faults.same_losses(workdir)}"
        )
    return " // ".join(lines)


def double(faults: Faults) -> str:
    """The same command while its first run is at work, twice; and after that was killed."""
    workdir = faults.folder / "double"
    settings: dict[str, object] = {"checkpoint.every_steps": 1}
    started = faults.start(workdir, **ALONE, settings=settings)
    until(3, workdir, started)
    started[0].send_signal(signal.SIGSTOP)  # so that it is still at work when the others come
    second = faults.run(workdir, settings=settings)
    third = faults.run(workdir, **ALONE, settings=settings)
    started[0].send_signal(signal.SIGCONT)
    first = runs.finish(started)
    status = [process.returncode for process in started]
    line = (
        f"second: {words(second[0], 'error:', 'exit')} (process 1: {words(second[1], 'exit')}); "
        f"third: {words(third[0], 'error:', 'exit')}; the first ended with {status}"
        f"{words(first[0], 'error:')}; {faults.same_losses(workdir)}"
    )
    killed = faults.start(faults.folder / "killed")
    until(5, faults.folder / "killed", killed)
    for process in killed:
        process.kill()
    runs.finish(killed)
    begin = time.monotonic()
    again = faults.run(faults.folder / "killed")
    return (
        f"{line} // killed: the same command went on after {time.monotonic() - begin:.0f} s "
        f"({words(again[0], 'resuming', 'watching')}); "
        f"{faults.same_losses(faults.folder / 'killed')}"
    )


def saving(faults: Faults) -> str:
    """SIGKILL of both during a save."""
    workdir = faults.folder / "saving"
    started = faults.start(workdir)
    folder = workdir / "checkpoints"
    while not list(folder.glob("8.orbax-checkpoint-tmp*")):
        assert all(p.poll() is None for p in started), runs.finish(started)
        time.sleep(0.001)
    for process in started:
        process.kill()
    runs.finish(started)
    left = sorted(f.name for f in folder.iterdir())
    again = faults.run(workdir)
    return (
        f"left in the folder: {left}. Same command: {words(again[0], 'resuming', 'DAMAGED')}; "
        f"{faults.same_losses(workdir)}"
    )


def one_saving(faults: Faults) -> str:
    """SIGKILL of one of two during a save, either one."""
    lines = []
    for victim in (1, 0):
        workdir = faults.folder / f"one_saving{victim}"
        started = faults.start(workdir)
        while not list((workdir / "checkpoints").glob("8.orbax-checkpoint-tmp*")):
            assert all(p.poll() is None for p in started), runs.finish(started)
            time.sleep(0.001)
        started[victim].kill()
        begin = time.monotonic()
        outputs = runs.finish(started)
        seconds, other = time.monotonic() - begin, started[1 - victim].returncode
        message = words(outputs[1 - victim], "error:", "Terminating process because")
        again = faults.run(workdir)
        lines.append(
            f"process {victim} killed: the other ended after {seconds:.0f} s with exit {other} "
            f"({message}). Same command: {words(again[0], 'resuming', 'DAMAGED')}; "
            f"{faults.same_losses(workdir)}"
        )
    return " // ".join(lines)


def filled(faults: Faults) -> str:
    """A disk that others fill between two saves."""
    with _small_disk(faults, "200m") as place:
        workdir = place / "run"
        started = faults.start(workdir)
        until(5, workdir, started)
        with (place / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        outputs = runs.finish(started)
        message = words(outputs[0] + outputs[1], "error:", "Terminating process because")
        status = [process.returncode for process in started]
        (place / "filler").unlink()
        again = faults.run(workdir)
        return (
            f"{message}; exit {status}. Space freed, the same command: "
            f"{words(again[0], 'resuming', 'DAMAGED')}; {faults.same_losses(workdir)}"
        )


def damaged(name: str, damage: Callable[[Path], None]) -> Callable[[Faults], str]:
    """A fault that changes the newest of a finished run's checkpoints."""

    def fault(faults: Faults) -> str:
        workdir = faults.copy(name)
        damage(workdir / "checkpoints" / "12")
        again = faults.run(workdir)
        return (
            f"{words(again[0], 'DAMAGED', 'error:')} | {words(again[0], 'resuming')}; "
            f"{faults.same_losses(workdir)}"
        )

    return fault


def _largest(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)


def _flip(folder: Path) -> None:
    path = _largest(folder / "student")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = _largest(folder / "teacher")
    os.truncate(path, path.stat().st_size // 2)


def _cut_accuracy(folder: Path) -> None:
    path = folder.with_name("8") / "metrics" / "metrics"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"position_acc')


def lost(faults: Faults) -> str:
    """All checkpoints gone from a finished run's workdir."""
    workdir = faults.copy("lost")
    shutil.rmtree(workdir / "checkpoints")
    return words(faults.run(workdir)[0], "error:", "starting", "exit")


def full_disk(faults: Faults) -> str:
    """A file system that holds one checkpoint, but not two."""
    with _small_disk(faults, "50m") as place:
        workdir = place / "run"
        outputs = faults.run(workdir)
        message = words(outputs[0] + outputs[1], "error:")
        status = [output.rsplit("exit ", 1)[1] for output in outputs]
        saved = shutil.copytree(workdir, faults.folder / "full")
    again = faults.run(Path(saved))
    return (
        f"{message}; exit {status}. Moved to a larger disk, the same command: "
        f"{words(again[0], 'resuming', 'DAMAGED')}; {faults.same_losses(Path(saved))}"
    )


@contextlib.contextmanager
def _small_disk(faults: Faults, size: str) -> Iterator[Path]:
    place = faults.folder / f"disk{size}"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def unwritable(faults: Faults) -> str:
    """A workdir that is a file."""
    (faults.folder / "file").write_text("")
    return words(faults.run(faults.folder / "file")[0], "error:", "exit")


def layouts(faults: Faults) -> str:
    """2 processes -> 1 -> 4 devices, with fsdp too."""
    workdir = faults.folder / "layouts"
    lines = []
    for count, devices, fsdp, stop in ((2, 2, 1, 3), (1, 1, 1, 6), (1, 4, 4, 12)):
        settings = {"mesh.fsdp": fsdp}
        started = faults.start(workdir, processes=count, devices=devices, settings=settings)
        if stop < 12:
            until(stop, workdir, started)
            started[-1].send_signal(signal.SIGTERM)
        output = runs.finish(started)[0]
        lines.append(f"{words(output, 'devices:').split(';')[0]}: {words(output, 'resuming')}")
    return f"{'; '.join(lines)}; {faults.same_losses(workdir)}"


def equality(faults: Faults) -> str:
    """The same steps on 1 process x 4 devices, 2 x 2 and 4 x 1, with and without fsdp."""
    lines = []
    for count, devices, fsdp in ((1, 4, 1), (1, 4, 4), (2, 2, 2), (2, 2, 4), (4, 1, 1), (4, 1, 4)):
        workdir = faults.folder / f"equality_{count}_{devices}_{fsdp}"
        faults.run(workdir, processes=count, devices=devices, settings={"mesh.fsdp": fsdp})
        lines.append(f"{count} x {devices}, fsdp {fsdp}: {faults.same_losses(workdir)}")
    return "beside 2 x 2, fsdp 1: " + "; ".join(lines)


def changed(faults: Faults) -> str:
    """Another global batch, seed, model or data."""
    lines = []
    for name, value in (("batch_size", 8), ("seed", 1), ("projector_size", 64)):
        output = faults.run(faults.whole, settings={name: value})[0]
        lines.append(words(output, "error:", "exit"))
    workdir = faults.copy("data")
    shutil.rmtree(workdir / "cache")
    shutil.rmtree(workdir / "phantoms")
    output = faults.run(workdir, settings={"data.phantoms": 3})[0]
    lines.append(words(output, "error:", "exit"))
    return " // ".join(lines)


FAULTS: dict[str, Callable[[Faults], str]] = {
    "sigterm": sigterm,
    "early": early,
    "sigkill": sigkill,
    "frozen": frozen,
    "freeze": freeze,
    "proxy": proxy,
    "stuck": stuck,
    "double": double,
    "saving": saving,
    "one_saving": one_saving,
    "bit": damaged("bit", _flip),
    "truncated": damaged("truncated", _truncate),
    "metadata": damaged("metadata", lambda folder: (folder / "student" / "_METADATA").unlink()),
    "digests": damaged("digests", lambda folder: (folder / "digests.json").unlink()),
    "accuracy": damaged("accuracy", _cut_accuracy),
    "lost": lost,
    "full_disk": full_disk,
    "filled": filled,
    "unwritable": unwritable,
    "layouts": layouts,
    "equality": equality,
    "changed": changed,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    chosen = parser.parse_args().faults or list(FAULTS)
    unknown = set(chosen) - set(FAULTS)
    if unknown:
        parser.error(f"found {sorted(unknown)}, expected some of {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        for name in chosen:
            print(f"{name}: {FAULTS[name](faults)}\n", flush=True)


if __name__ == "__main__":
    main()
