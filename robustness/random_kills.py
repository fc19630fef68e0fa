"""Kills a run at random moments, resumes it each time, and compares every loss, bit for bit.

    python -m robustness.random_kills --resumes 100    # about half an hour on two cores

A chain of runs of one experiment. One in four is killed with SIGKILL at a random moment of its
start-up, the others at a random moment after their first step (within four seconds, or the time of
eight steps if that is longer), while checkpoints are written all the time. It ends when enough of
them have resumed and trained on. Each has to resume from the newest checkpoint that was whole, and
each loss that any of them logs has to be the one logged for that step before, and that of a run
without a kill.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from robustness import runs

RUN: dict[str, object] = {
    "total_steps": 100_000,
    "checkpoint.every_steps": 2,
    "data.workers": 1,
    "model.conv_encoders": False,  # compiles in half the time
    "model.use_v2": False,  # less to compile
    "augment.flip_probability": 0.2,
    "augment.rotate_probability": 0.2,
}
_TIMEOUT = 120.0  # seconds until a first step


class Chain:
    """The runs so far: the losses that they logged, and what went wrong."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.losses: dict[int, float] = {}
        self.problems: list[str] = []

    def run(self, early: float | None, late: float) -> int:
        """One more run, killed `early` seconds after its start or `late` after its first step.

        Returns:
            The step that it resumed at, having trained on; -1: killed before that.
        """
        saved = [int(f.name) for f in self.workdir.glob("checkpoints/*") if f.name.isdigit()]
        log = self.workdir / "metrics.jsonl"
        before = log.stat().st_ino if log.exists() else None  # a resumed run replaces it
        (process,) = runs.start(self.workdir, settings=RUN)
        if early is None:
            _wait_for_step(process, self.workdir, before, saved)
        try:
            process.wait(late if early is None else early)
        except subprocess.TimeoutExpired:
            process.kill()
        output = runs.finish([process])[0]
        if process.returncode != -9:
            self.problems.append(f"ended by itself: {process.returncode}: {output[-2000:]}")
        if "DAMAGED" in output:
            self.problems.append(f"a checkpoint was damaged: {output[-2000:]}")
        resumed = "resuming at step " in output
        step = int(output.split("resuming at step ")[1].split()[0]) if resumed else 0
        if saved and step < max(saved) and (resumed or "starting at step 0" in output):
            self.problems.append(f"went on at step {step}, though {sorted(saved)} were saved")
        found = runs.losses(self.workdir)
        for number, loss in found.items():
            if self.losses.setdefault(number, loss) != loss:
                self.problems.append(f"step {number}: {loss}, not {self.losses[number]}")
        return step if resumed and max(found, default=0) > step else -1


def _wait_for_step(
    process: "subprocess.Popen[str]", workdir: Path, before: int | None, saved: list[int]
) -> None:
    """Until the process has logged a step of its own, has ended, or takes too long."""
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + _TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        new = log.exists() and log.stat().st_ino != before
        if new and max(runs.losses(workdir), default=0) > max(saved, default=0):
            return
        time.sleep(0.02)


def main() -> int:
    """The command; exit status 1 if any kill lost or changed anything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resumes", type=int, default=100, help="default 100")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "xla"))
        chain, whole = Chain(Path(folder) / "killed"), Path(folder) / "whole"
        chain.run(None, 5.0)  # fills the compilation cache
        late = max(4.0, 8 * 5.0 / max(chain.losses))
        started = time.monotonic()
        chain.run(None, 0.0)
        start_up = time.monotonic() - started
        kills, resumed = 2, 1
        while resumed < options.resumes:
            early = draw.uniform(0.0, start_up) if draw.random() < 0.25 else None
            step = chain.run(early, draw.uniform(0.0, late))
            kills, resumed = kills + 1, resumed + (step >= 0)
            what = f"resumed at {step}, reached {max(chain.losses)}" if step >= 0 else "starting"
            print(
                f"kill {kills}, resume {resumed}/{options.resumes}: {what}; "
                f"{len(chain.problems)} problems",
                flush=True,
            )
        last = max(chain.losses)
        (process,) = runs.start(whole, settings=RUN)
        while max(runs.losses(whole), default=0) < last:
            assert process.poll() is None, runs.finish([process])
            time.sleep(0.5)
        process.kill()
        runs.finish([process])
        expected = runs.losses(whole)
    different = sum(loss != expected[step] for step, loss in chain.losses.items())
    missing = last - len(chain.losses)
    print(*chain.problems, sep="\n")
    print(
        f"{kills} kills, {resumed} resumes that trained on; {last} steps, {different} losses "
        f"differ from those of a run without a kill, {missing} missing; {len(chain.problems)} "
        f"problems; {(time.monotonic() - begin) / 60:.0f} minutes"
    )
    return int(bool(chain.problems or different or missing))


if __name__ == "__main__":
    sys.exit(main())
