"""Steps on the devices, one after the other; at most one is queued, so that times are right."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Generic

import jax
import numpy as np

from voco_jax.training.metrics import StepTimes
from voco_jax.training.task import S
from voco_jax.types import Batch


class NotFiniteError(RuntimeError):
    """A metric is no longer a number; the message names the step and the metrics."""


class Steps(Generic[S]):
    """Runs a task's steps and keeps the state.

    Metrics stay on the devices until `fetch`, which checks those of every step.

    Attributes:
        state: after the steps so far.
        times: of the steps so far.
        number: completed updates, the newest one's perhaps not yet.
    """

    def __init__(
        self,
        step: Callable[[S, Batch], tuple[S, dict[str, jax.Array]]],
        batches: Iterator[Batch],
        state: S,
        number: int = 0,
    ) -> None:
        """Starts nothing yet.

        Args:
            step: compiled; donates the state.
            batches: on the devices.
            state: to start from.
            number: completed updates of it.
        """
        self.state, self.times = state, StepTimes()
        self._step, self._batches, self.number = step, batches, number
        self._running: Any = None  # the newest step's loss; may still be pending
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._last: dict[str, float] = {}
        self._fetched: list[dict[str, float]] = []

    def advance(self) -> None:
        """Takes a batch, queues its step, and waits for the step before."""
        asked = time.monotonic()
        batch = next(self._batches)
        before = self._running
        if before is None or before.is_ready():
            self.times.wait(time.monotonic() - asked)
        with jax.transfer_guard("disallow"):  # nothing moves unseen: only input and fetch
            self.state, metrics = self._step(self.state, batch)
        self.number += 1
        self._pending.append((self.number, metrics))
        self._running = metrics["loss"]
        if before is not None:
            before.block_until_ready()
            self.times.step()

    def wait(self) -> None:
        """Returns when the newest step has ended."""
        if self._running is not None:
            self._running.block_until_ready()

    def fetch(self) -> dict[str, float]:
        """The newest step's metrics, once it has ended.

        Raises:
            NotFiniteError: NaN or infinity in any step since the last call.
        """
        pending: list[tuple[int, dict[str, Any]]] = jax.device_get(self._pending)
        if self._running is not None:
            self.times.step()
        self._running = None
        self._pending.clear()
        for step, metrics in pending:
            self._last = {name: float(value) for name, value in metrics.items()}
            self._fetched.append(self._last)
            broken = [name for name, value in self._last.items() if not np.isfinite(value)]
            if broken:
                raise NotFiniteError(f"step {step}: {', '.join(broken)} is not finite")
        return dict(self._last)

    def lap(self) -> list[dict[str, float]]:
        """The metrics of each step fetched since the last lap."""
        fetched, self._fetched = self._fetched, []
        return fetched
