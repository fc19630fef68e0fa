"""What the loop must know of what it trains: records of functions, no base class to inherit.

`step` is the number of completed updates, everywhere: update k takes batch number k - 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from voco_jax.training.health import Finding
from voco_jax.types import Batch


class State(Protocol):
    """Everything that training changes: a `flax.struct.dataclass`.

    Besides `step`, fields are nested dicts or tuples of arrays. A checkpoint saves each of them,
    those that hold nothing ({}) left out.
    """

    @property
    def step(self) -> jax.Array:
        """Completed updates, int32."""


S = TypeVar("S", bound=State)
E = TypeVar("E", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Program(Generic[S]):
    """What runs on the devices; it can be lowered for devices that are not here.

    Attributes:
        mesh: of the devices.
        state: abstract state with its shardings.
        batch: abstract global batch with its shardings.
        init: () -> random state, sharded.
        step: (state, batch) -> (state, metrics), jitted; the state given is donated. Metrics are
            float32 scalars, one of them `loss`.
        predict: (state, batch) -> what validation looks at, jitted, replicated on every process.
    """

    mesh: Mesh
    state: S
    batch: Mapping[str, jax.ShapeDtypeStruct]
    init: Callable[[], S]
    step: Any
    predict: Any = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a validation found.

    Attributes:
        metrics: for metrics.jsonl and TensorBoard, by name.
        score: which checkpoint is the best; the larger the better.
        text: one line for people.
        findings: all that is amiss now, at most one of a kind.
        sound: what was looked at and is as it should be, in words; told where the loss is flat.
        pictures: by name, (rows, columns, 3) uint8; needed on process 0 only.
        arrays: by name of a file, the arrays of WORKDIR/NAME.npz, which the next validation
            replaces; needed on process 0 only.
        cases: what was found in each volume, as JSON can hold it; for the report.
    """

    metrics: Mapping[str, float]
    score: float
    text: str
    findings: tuple[Finding, ...] = ()
    sound: tuple[str, ...] = ()
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    arrays: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Task(Generic[S]):
    """Everything of a run but the loop; each function is called on every process.

    Attributes:
        program: for the devices.
        batches: completed updates -> endless batches from there on, this process's rows.
        data_fingerprint: of the training data; a run resumes with the same only.
        experiment: the settings as nested plain values; saved with each checkpoint.
        networks: the state's fields that hold a network to export, the preferred one first.
        warm_start: a new state -> the state to start with, as from a weight file; None: the same.
        validate: (state, step) -> what was found, the same on every process; None: no validation.
        finish: at the end of training; what it returns is for people. None: nothing to do.
        learning_rate: completed updates -> rate, to be logged; None: it is not.
        console: metrics for a log line, besides the loss; those that there are.
        findings: what is amiss before the first step.
        blind_loss: () -> the loss of a network that does not look at its input; None: not known.
            It may be asked for at every log line.
    """

    program: Program[S]
    batches: Callable[[int], Iterator[Batch]]
    data_fingerprint: str
    experiment: Mapping[str, Any]
    networks: tuple[str, ...]
    warm_start: Callable[[S], S] | None = None
    validate: Callable[[S, int], Validation] | None = None
    finish: Callable[[S], str] | None = None
    learning_rate: optax.Schedule | None = None
    console: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    blind_loss: Callable[[], float] | None = None


LogLine = Callable[[str], None]
"""Takes a line for people."""


class MakeTask(Protocol[E]):
    """How a method makes its task."""

    def __call__(
        self, experiment: E, program: Any, *, workdir: Path, resumes: bool, log: LogLine
    ) -> Task[Any]:
        """Prepares and opens the data, on all processes together.

        Args:
            experiment: the settings.
            program: of the method's `make_program`.
            workdir: of the run.
            resumes: whether there is a checkpoint to go on from.
            log: for what people should know.
        """


@dataclass(frozen=True, kw_only=True)
class Method(Generic[E]):
    """A line of train.py's table: an experiment becomes a program, then a task.

    Attributes:
        make_program: (experiment, mesh) -> program; raises `InputError` for settings that cannot
            be, before anything is written.
        make_task: see `MakeTask`.
        check: raises `InputError` for what else cannot be, before anything is written.
    """

    make_program: Callable[[E, Mesh], Program[Any]]
    make_task: MakeTask[E]
    check: Callable[[E], None] = lambda experiment: None
