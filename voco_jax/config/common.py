"""The sections that experiments of every task have."""

from typing import Annotated, Literal, Protocol

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from voco_jax.files import local_path

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
PositiveSize = tuple[Positive, Positive, Positive]
Weight = Annotated[float, Field(ge=0)]

WORKDIR = "{workdir}"  # in a text setting: stands for --workdir
STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class Chain:
    """How one CT becomes one cached volume; the steps run in this order."""

    axes: Literal["RAS"]
    spacing: tuple[Annotated[float, Field(gt=0)], ...]  # mm to resample to, x y z; (): as stored
    window: tuple[float, float]  # values that become 0 and 1; values outside are clipped
    window_unit: Literal["HU", "value", "percentile", "deviation"]  # value: of the files as they
    # are, which may be no CT in HU; percentile: of the volume's own voxels, as for MRI; deviation:
    # standard deviations from the mean of its voxels that are not 0, as for a brain whose skull was
    # taken away
    crop_foreground: bool  # keep the box of voxels above the threshold, drop what is around it
    foreground_threshold: Fraction  # of the window
    fit: Literal["resize", "center_crop", "random_crop"]  # to volume_size; the crops pad first.
    # random_crop caches the volume uncropped; every reading of it takes another part
    volume_size: PositiveSize  # voxels (x, y, z) that the base grid covers
    dtype: Literal["uint8", "float16"]  # of the cache

    def __post_init__(self) -> None:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window: found {self.window}, expected (low, high) with low < high")
        if self.window_unit == "percentile" and not 0 <= self.window[0] < self.window[1] <= 100:
            raise ValueError(
                f"window: found {self.window} with window_unit percentile, expected two numbers "
                "from 0 to 100, as (0.5, 99.5)"
            )
        if len(self.spacing) not in (0, 3):
            raise ValueError(
                f"spacing: found {self.spacing}, expected three numbers in mm, or () to keep "
                "every volume's own"
            )


Classes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name, and the values that are this class, of each."""
BACKGROUND = "background"
MAX_CLASSES = 256  # as many as a uint8 cache can tell apart


@dataclass(frozen=True, config=STRICT)
class LabelledChain(Chain):
    """A chain for images with segmentations; these go through its geometry alone."""

    classes: Classes  # name, and the values of the label files that are this class; class i of the
    # network is the i-th. The first is the background
    channels: tuple[str, ...] = ()  # names of an image's channels, each a file; (): it is one file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit != "random_crop":
            raise ValueError(
                f"fit: found {self.fit!r} with classes, expected 'random_crop': labels are not "
                "resized, and a volume is cached whole"
            )
        names = [name for name, _ in self.classes]
        if len(names) < 2 or names[0] != BACKGROUND or len(names) > MAX_CLASSES:
            raise ValueError(
                f"classes: found {', '.join(names) or 'none'}, expected {BACKGROUND!r} and then 1 "
                f"to {MAX_CLASSES - 1} others"
            )
        _check_classes(self.classes)
        if len(set(self.channels)) < len(self.channels) or not all(self.channels):
            raise ValueError(
                f"channels: found {self.channels}, expected names that differ, as ('t1', 't2')"
            )


@dataclass(frozen=True, config=STRICT)
class ClassifiedChain(Chain):
    """A chain for images that their lists put into classes.

    The cache keeps each image's label as its list has it, so that it serves other classes, too.
    """

    classes: Classes  # name, and the labels in the lists that are this class, besides its name;
    # class i of the network is the i-th

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= len(self.classes) <= MAX_CLASSES:
            names = ", ".join(name for name, _ in self.classes)
            raise ValueError(f"classes: found {names or 'none'}, expected 2 to {MAX_CLASSES}")
        _check_classes(self.classes)
        texts = [text for name, own in self.classes for text in {name, *map(str, own)}]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise ValueError(
                f"classes: found {', '.join(twice)} as the name of a class and as a value of "
                "another, expected labels of one class; name the class otherwise"
            )


def class_table(classes: Classes) -> dict[str, int]:
    """Label in a list, as text: a class's name or one of its values -> number of the class."""
    return {
        text: number
        for number, (name, values) in enumerate(classes)
        for text in (name, *map(str, values))
    }


def _check_classes(classes: Classes) -> None:
    names = [name for name, _ in classes]
    values = [value for _, own in classes for value in own]
    once = len(set(names)) == len(names) and len(set(values)) == len(values)
    if not once or not all(own for _, own in classes):
        raise ValueError(
            f"classes: found the names {', '.join(names)} with the values {values}, expected "
            "each name and each value once, and at least one value for each name"
        )


@dataclass(frozen=True, config=STRICT)
class Source:
    """One set of CT files with its own chain and cache; each path may be a gs:// or s3:// URL."""

    cache: str  # folder of the prepared cache; "{workdir}" stands for --workdir
    roots: tuple[str, ...]  # folders with CT files
    lists: tuple[str, ...]  # list of each root, JSON or CSV; "": all that is in the root
    weight: Annotated[float, Field(gt=0)]  # share of the training volumes, over the sources' sum
    chain: Chain

    def __post_init__(self) -> None:
        if self.lists and len(self.lists) != len(self.roots):
            raise ValueError(
                f"roots: found {len(self.roots)} roots for {len(self.lists)} lists, "
                "expected one root for each list, in the same order; or no lists at all: then "
                "everything in the roots is taken"
            )


@dataclass(frozen=True, config=STRICT)
class Data:
    """From CT files to batches."""

    sources: dict[str, Source]  # by name
    phantoms: NotNegative  # synthetic CTs to make under the workdir, instead of lists; 0: none
    prepare: bool  # fill the caches before training with what they lack
    held_out: Fraction  # of the training volumes, besides every list's own "validation" entries
    workers: NotNegative  # processes that read and crop; 0: threads of the main process
    prefetch: Positive  # batches that each worker keeps ready

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: found none, expected at least one")
        if self.phantoms and len(self.sources) > 1:
            raise ValueError(
                f"phantoms: found {self.phantoms} with the sources {', '.join(self.sources)}, "
                "expected 0, or a single source"
            )
        caches = [source.cache for source in self.sources.values()]
        if len(set(caches)) < len(caches):
            raise ValueError(f"sources: two have one cache ({', '.join(caches)}): one each")
        types = {source.chain.dtype for source in self.sources.values()}
        if len(types) > 1:
            raise ValueError(
                f"sources: their caches have the dtypes {', '.join(sorted(types))}, expected one"
            )

    @property
    def dtype(self) -> str:
        """Of all caches."""
        return next(iter(self.sources.values())).chain.dtype


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW with PyTorch's AMSGrad; linear warm-up, then cosine decay to 0 at total_steps."""

    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    eps: Annotated[float, Field(gt=0)]
    warmup_steps: NotNegative


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """What is saved when; the last step always is."""

    every_steps: Positive
    keep: Positive  # the latest so many
    keep_every_steps: NotNegative  # each multiple of it is saved, and kept for good; 0: none
    keep_best: NotNegative  # so many of the best by the validation's score; a new best is saved


@dataclass(frozen=True, config=STRICT)
class Mesh:
    """How the devices of all processes share the work; the batch is split over all of them."""

    fsdp: Positive  # devices that share one copy of the state (for L and H); 1: each has its own


@dataclass(frozen=True, config=STRICT)
class Profile:
    """A window of steps whose trace goes to WORKDIR/profile, for TensorBoard or XProf."""

    start: NotNegative  # first step of it; 0: none
    steps: Positive


@dataclass(frozen=True, config=STRICT)
class InitFrom:
    """Start from a weight file instead of at random."""

    allow_missing: tuple[str, ...]  # patterns (as in shells) of names that the file may lack
    allow_unexpected: tuple[str, ...]  # patterns of names in the file that are left aside


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Run:
    """All that the training loop knows of an experiment."""

    total_steps: Positive  # optimizer updates
    batch_size: Positive  # samples per update, over all devices
    log_every_steps: Positive
    validate_every_steps: NotNegative  # 0: never
    checkpoint: Checkpoint
    profile: Profile


WEIGHT_SUFFIXES = (".pt", ".safetensors")
"""Of the files that are exported."""


def check_export(path: str) -> None:
    """Checks an experiment's `export_to`; "" is none."""
    suffix = local_path("export_to", path).suffix
    if path and suffix not in WEIGHT_SUFFIXES:
        raise ValueError(
            f"export_to: {path}: found suffix {suffix!r}, expected {' or '.join(WEIGHT_SUFFIXES)}"
        )


def check_warmup(optimizer: Optimizer, total_steps: int) -> None:
    """Checks that the warm-up ends before the run does."""
    if optimizer.warmup_steps >= total_steps:
        raise ValueError(
            f"optimizer.warmup_steps: found {optimizer.warmup_steps}, expected less than "
            f"total_steps {total_steps}"
        )


class Experiment(Protocol):
    """What every task's experiment has; it is a dataclass, and `load.to_dict` makes JSON of it."""

    @property
    def task(self) -> str:
        """A name of train.py's table."""

    @property
    def mesh(self) -> Mesh:
        """How devices share the work."""

    @property
    def run(self) -> Run:
        """For the loop."""

    @property
    def runtime_fields(self) -> tuple[str, ...]:
        """Patterns (as in shells) of the settings that may differ when a workdir is resumed.

        They change where, how fast and in how much memory the same experiment runs, or what is
        reported of it; its numbers at most by rounding (and by the draws of drop path, if any).
        But for `total_steps`, which may grow: the learning rate is a function of the step and of
        the total, and goes on along the new total's.
        """


RUNTIME_FIELDS = (  # of the sections here and of `encoders`; "*": any source
    "total_steps",
    "data.sources.*.cache",
    "data.sources.*.lists",
    "data.sources.*.roots",
    "data.phantoms",
    "data.prepare",
    "data.workers",
    "data.prefetch",
    "model.remat",
    "model.crops_per_pass",
    "model.convolution",
    "model.attention",
    "log_every_steps",
    "export_to",
    "validation.every_steps",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
    "mesh.fsdp",
    "profile.start",
    "profile.steps",
)
