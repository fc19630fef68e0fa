"""main.py with the toy task in its table, and the toy's config file.

python tests/toy_main.py --config tests/toy_main.py --workdir DIR
"""

import dataclasses
import time

from pydantic.dataclasses import dataclass

from voco_jax import train
from voco_jax.config import common, load


@dataclass(frozen=True, config=common.STRICT)
class Toy:
    task: str
    seed: int
    run: common.Run
    mesh: common.Mesh
    runtime_fields: tuple[str, ...] = ("run.log_every_steps",)


def get_config():
    keep = {"every_steps": 5, "keep": 2, "keep_every_steps": 0, "keep_best": 1}
    run = {"total_steps": 40, "batch_size": 2, "log_every_steps": 1, "validate_every_steps": 10}
    run |= {"checkpoint": keep, "profile": {"start": 0, "steps": 1}}
    return {"task": "toy", "seed": 0, "run": run, "mesh": {"fsdp": 1}}


def _make_slow_task(*args, **options):
    """Slow enough to be hit by a signal while it trains."""
    from toy_task import make_task

    task = make_task(*args, **options)

    def batches(step):
        for batch in task.batches(step):
            time.sleep(0.05)
            yield batch

    return dataclasses.replace(task, batches=batches)


if __name__ == "__main__":
    from toy_task import make_program

    from voco_jax.training.task import Method

    load.EXPERIMENTS["toy"] = Toy
    train.methods = lambda: {"toy": Method(make_program=make_program, make_task=_make_slow_task)}
    train.main()
