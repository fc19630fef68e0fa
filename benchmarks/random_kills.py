"""Kills a run at random moments, resumes it each time, and compares every loss, bit for bit.

    python benchmarks/random_kills.py --kills 100    # about half an hour on two cores

A chain of runs of one experiment, each killed with SIGKILL after a random time, start-up included;
at the end the same steps are run once without a kill and all logged losses and the last checkpoint
are compared. Each resume has to continue from a checkpoint that was saved, never from nothing.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import processes  # noqa: E402

RUN: dict[str, object] = {
    "total_steps": 100_000,
    "checkpoint.every_steps": 2,
    "data.workers": 1,
}


def kill_once(workdir: Path, seconds: float) -> tuple[int, int, str]:
    """(last step logged before, first step that the run said it resumes from, problem)."""
    before = max(processes.losses(workdir), default=0)
    saved = sorted(int(f.name) for f in (workdir / "checkpoints").glob("*") if f.name.isdigit())
    (process,) = processes.start(workdir, settings=RUN)
    try:
        process.wait(seconds)
    except Exception:  # it still runs, as it should
        process.kill()
    output = processes.finish([process])[0]
    if process.returncode != -9:
        return before, -1, f"ended by itself with {process.returncode}: {output[-2000:]}"
    if "DAMAGED" in output:
        return before, -1, f"a checkpoint was damaged: {output[-2000:]}"
    if "starting at step 0" in output and saved:
        return before, 0, f"started from nothing, though {saved} were saved"
    step = int(output.split("resuming at step ")[1].split()[0]) if "resuming at" in output else -1
    if step >= 0 and saved and step < saved[-1]:
        return before, step, f"resumed at {step}, though {saved} were saved"
    return before, step, ""


def main() -> int:
    """The command; exit status 1 if any kill lost or changed anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=24.0, help="seconds; default 24")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    problems, resumed, started = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "xla")
        workdir, whole = Path(folder) / "killed", Path(folder) / "whole"
        (warm,) = processes.start(workdir, settings=RUN)  # fills the compilation cache
        while max(processes.losses(workdir), default=0) < 4:
            time.sleep(0.1)
        warm.kill()
        processes.finish([warm])
        for number in range(1, options.kills + 1):
            seconds = draw.uniform(0.0, options.longest)
            before, step, problem = kill_once(workdir, seconds)
            resumed += step >= 0
            where = f"resumed at step {step}" if step >= 0 else "before it resumed"
            print(
                f"kill {number}/{options.kills} after {seconds:4.1f} s: {where}; logged before: "
                f"{before}, now {max(processes.losses(workdir))} {problem}",
                flush=True,
            )
            if problem:
                problems.append(problem)
        found = processes.losses(workdir)
        (process,) = processes.start(whole, settings=RUN)
        while max(processes.losses(whole), default=0) < max(found):
            assert process.poll() is None, processes.finish([process])
            time.sleep(0.5)
        process.kill()
        processes.finish([process])
        expected = processes.losses(whole)
        different = [step for step in found if found[step] != expected[step]]
        missing = sorted(set(range(1, max(found) + 1)) - found.keys())
    print(
        f"{options.kills} kills, {resumed} of them after the run had resumed; {len(found)} steps, "
        f"{len(different)} losses differ from those of the run without a kill, {len(missing)} "
        f"missing; {len(problems)} problems; {(time.monotonic() - started) / 60:.0f} minutes"
    )
    return int(bool(problems or different or missing))


if __name__ == "__main__":
    sys.exit(main())
