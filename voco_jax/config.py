"""ConfigDict -> frozen, validated dataclasses.

A config file's `get_config()` returns an `ml_collections.ConfigDict`; `parse` turns it into
`Config`. No field has a default here: `configs/voco_10k.py` spells out every setting, other
config files start from it.
The comments here are the reference of the settings.
"""

import dataclasses
import difflib
import fnmatch
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import ml_collections
import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from voco_jax.errors import InputError

Size = tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class Chain:
    """How one CT becomes one cached volume; the steps run in this order."""

    axes: Literal["RAS"]
    spacing: tuple[Annotated[float, Field(gt=0)], ...]  # mm to resample to, x y z; (): as stored
    window: tuple[float, float]  # values that become 0 and 1; values outside are clipped
    window_unit: Literal["HU", "percentile"]  # percentile: of the volume's own voxels, as for MRI
    crop_foreground: bool  # keep the box of voxels above the threshold, drop what is around it
    foreground_threshold: Fraction  # of the window
    fit: Literal["resize", "center_crop", "random_crop"]  # to volume_size; the crops pad first.
    # random_crop caches the whole volume; every reading of it takes another part
    volume_size: Size  # voxels (x, y, z) that the base grid covers
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


@dataclass(frozen=True, config=_STRICT)
class Source:
    """One set of CT files with its own chain and cache; each path may be a gs:// or s3:// URL."""

    cache: str  # folder of the prepared cache; "{workdir}" stands for --workdir
    roots: tuple[str, ...]  # folders with CT files
    lists: tuple[str, ...]  # Decathlon-style JSON list of each root; "": all that is in the root
    weight: Annotated[float, Field(gt=0)]  # share of the training volumes, over the sources' sum
    chain: Chain

    def __post_init__(self) -> None:
        if self.lists and len(self.lists) != len(self.roots):
            raise ValueError(
                f"roots: found {len(self.roots)} roots for {len(self.lists)} lists, "
                "expected one root for each list, in the same order; or no lists at all: then "
                "everything in the roots is taken"
            )


@dataclass(frozen=True, config=_STRICT)
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


@dataclass(frozen=True, config=_STRICT)
class Crops:
    """The base grid and the sub-volumes."""

    grid: Size  # base crops along (x, y, z)
    crop_size: Size  # voxels of one crop of the cached volume
    encoder_size: Size  # voxels that each crop is resized to on the device
    sub_volumes: Positive  # random crops per volume and step


@dataclass(frozen=True, config=_STRICT)
class Augment:
    """Random changes of each crop, on the device."""

    flip_probability: Fraction  # per axis
    rotate_probability: Fraction  # by 90, 180 or 270 degrees in the x-y plane
    shift_probability: Fraction
    shift: Annotated[float, Field(ge=0)]  # largest intensity offset; the window is 0..1


@dataclass(frozen=True, config=_STRICT)
class Model:
    """Swin encoder and projector; names as in MONAI's SwinUNETR."""

    feature_size: Positive
    depths: tuple[Positive, Positive, Positive, Positive]
    num_heads: tuple[Positive, Positive, Positive, Positive]
    window_size: Size
    patch_merging: Literal["legacy", "merging", "mergingv2"]
    use_v2: bool
    conv_encoders: bool  # pool and concatenate encoder1 .. 10; else pool the last stage alone
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]
    projector_size: Positive
    remat: bool  # recompute activations in the backward pass: less memory, more time
    crops_per_pass: NotNegative  # encoded at a time on each device: less memory; 0: all of them
    dtype: Literal["bfloat16", "float32"]  # of the computation; parameters are float32
    convolution: Literal["auto", "lax", "planes"]  # form of 3x3x3; auto: planes on a CPU, else lax
    attention: Literal["auto", "xla", "fused"]  # fused: kernels; auto: where there are


@dataclass(frozen=True, config=_STRICT)
class Teacher:
    """The exponential moving average of the student."""

    scope: Literal["none", "network", "projector"]  # what of the student it is an average of
    momentum: Fraction  # new = momentum * old + (1 - momentum) * student

    @property
    def exported(self) -> str:
        """Whose encoder is exported: the teacher's, if it has one."""
        return "teacher" if self.scope == "network" else "student"


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """Weights of the loss terms; 1.0 each is published. Metrics show the terms unweighted."""

    pos: Weight  # predictions where the overlap is not 0
    neg: Weight  # predictions where it is
    reg: Weight  # base crops of one volume apart
    inter: Weight  # voco_v2: predictions between the volumes of a batch; else of no effect


@dataclass(frozen=True, config=_STRICT)
class Dropout:
    """Of the student's pooled features, before its projector."""

    rate: Annotated[float, Field(ge=0, lt=1)]
    kind: Literal["embedding", "feature"]  # zero all features of a crop (published), or each alone


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """AdamW with PyTorch's AMSGrad; linear warm-up, then cosine decay to 0 at total_steps."""

    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    eps: Annotated[float, Field(gt=0)]
    warmup_steps: NotNegative


@dataclass(frozen=True, config=_STRICT)
class Validation:
    """Position accuracy on held-out volumes, and the picture."""

    every_steps: NotNegative  # 0: never
    volumes: Positive  # at most so many held-out volumes
    sub_volumes: Positive  # random crops per held-out volume


@dataclass(frozen=True, config=_STRICT)
class Checkpoint:
    """What is saved when; the last step always is."""

    every_steps: Positive
    keep: Positive  # the latest so many
    keep_every_steps: NotNegative  # each multiple of it is saved, and kept for good; 0: none
    keep_best: NotNegative  # so many of the best by position accuracy; a new best is saved at once


@dataclass(frozen=True, config=_STRICT)
class Mesh:
    """How the devices of all processes share the work; the batch is split over all of them."""

    fsdp: Positive  # devices that share one copy of the state (for L and H); 1: each has its own


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """A window of steps whose trace goes to WORKDIR/profile, for TensorBoard or XProf."""

    start: NotNegative  # first step of it; 0: none
    steps: Positive


@dataclass(frozen=True, config=_STRICT)
class InitFrom:
    """Start from a weight file instead of at random (both networks)."""

    allow_missing: tuple[str, ...]  # patterns (as in shells) of names that the file may lack
    allow_unexpected: tuple[str, ...]  # patterns of names in the file that are left aside


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One experiment."""

    recipe: Literal["paper", "voco_10k", "voco_v2"]  # the loss equations
    seed: NotNegative
    total_steps: Positive  # optimizer updates
    batch_size: Positive  # volumes per update, over all devices
    log_every_steps: Positive
    init_from: str  # a .pt or .safetensors file; "": random weights
    export_to: str  # weights written at the end (.safetensors or .pt); "": none
    data: Data
    crops: Crops
    augment: Augment
    model: Model
    teacher: Teacher
    loss: Loss
    dropout: Dropout
    optimizer: Optimizer
    validation: Validation
    checkpoint: Checkpoint
    mesh: Mesh
    profile: Profile
    init: InitFrom

    def __post_init__(self) -> None:
        grid, crop = self.crops.grid, self.crops.crop_size
        covered = tuple(g * c for g, c in zip(grid, crop, strict=True))
        for name, source in self.data.sources.items():
            if covered != source.chain.volume_size:
                raise ValueError(
                    f"crops.grid: {grid} crops of crops.crop_size {crop} cover {covered} voxels, "
                    f"expected exactly data.sources.{name}.chain.volume_size "
                    f"{source.chain.volume_size}; change one of the three (crop_size * grid = "
                    "volume_size on every axis)"
                )
        if math.prod(grid) < 2:
            raise ValueError(f"crops.grid: found {grid}, expected at least two base crops")
        if (
            self.augment.rotate_probability > 0
            and self.crops.encoder_size[0] != self.crops.encoder_size[1]
        ):
            raise ValueError(
                f"augment.rotate_probability: found {self.augment.rotate_probability} with "
                f"crops.encoder_size {self.crops.encoder_size}; rotating by 90 degrees needs "
                "x and y of the same size: set it to 0 or make them equal"
            )
        if (self.recipe == "paper") != (self.teacher.scope == "none"):
            expected = "'none'" if self.recipe == "paper" else "'network' or 'projector'"
            raise ValueError(
                f"teacher.scope: found {self.teacher.scope!r} with recipe {self.recipe!r}, "
                f"expected {expected}: its loss has {'no' if self.recipe == 'paper' else 'a'} "
                "teacher"
            )
        if self.recipe == "voco_v2" and self.batch_size == 1 and self.loss.inter > 0:
            raise ValueError(
                "batch_size: found 1 with recipe 'voco_v2', expected 2 or more: its inter term "
                "compares each volume with the next one of the batch; or set loss.inter to 0"
            )
        if self.optimizer.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps: found {self.optimizer.warmup_steps}, expected less "
                f"than total_steps {self.total_steps}"
            )


# Fields that may differ when a workdir is resumed: they change where, how fast and in how much
# memory the same experiment runs, or what is reported of it; its numbers at most by rounding
# (and by the draws of drop path, if there is any).
RUNTIME_FIELDS = (  # "*": any source
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
    "validation.volumes",
    "validation.sub_volumes",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
    "mesh.fsdp",
    "profile.start",
    "profile.steps",
)


def parse(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Validates a config as a config file returns it.

    Args:
        config: a ConfigDict or nested mapping with exactly the fields of `Config`.

    Returns:
        The frozen dataclass.

    Raises:
        InputError: unknown, missing or impossible fields; one message names them all.
    """
    try:
        return pydantic.TypeAdapter(Config).validate_python(_plain(config))
    except pydantic.ValidationError as error:
        problems = [_problem(dict(item)) for item in error.errors()]
    raise InputError("config: " + "; ".join(problems))


def load(path: str) -> dict[str, Any]:
    """What a config file returns, as nested dicts for `parse`.

    Args:
        path: of the file; FILE.py:TEXT calls `get_config(TEXT)`, as `main.py --config` does.

    Raises:
        InputError: there is no such file, it fails, or it has no `get_config()`.
    """
    path, *argument = path.split(":", 1)
    spec = importlib.util.spec_from_file_location("voco_config", path)
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        raise InputError(f"{path}: no such config file, expected a .py with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.getcwd())  # config files import each other from the project's root
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: this config file fails: {error!r}") from error
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: found no get_config() in it; see configs/voco_10k.py")
    try:
        return _plain(module.get_config(*argument))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{':'.join([path, *argument])}: this config fails: {error!r}") from error


def _plain(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)


def _problem(item: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(field)
    if item["loc"] and isinstance(item["loc"][-1], int):
        field = ".".join(str(part) for part in item["loc"][:-1])
        position = f"value {item['loc'][-1] + 1}"
        if item["type"].startswith("missing"):
            return f"{field}: {position} is missing; give the whole tuple, as (7, 7, 7)"
        if item["type"] != "value_error":
            return f"{field}: {position}: found {item['input']!r}, expected: {item['msg']}"
    if item["type"].startswith("missing"):
        return f"{field}: missing; start from configs/voco_10k.py, which sets every field"
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"{field}.{message}" if field else message
    return f"{field}: found {item['input']!r}, expected: {item['msg']}"


def check_field(name: str) -> None:
    """Checks that a setting exists.

    Args:
        name: dotted, as on the command line; an index, as in model.depths[0], is left aside.

    Raises:
        InputError: there is none of this name.
    """
    field = name.split("[")[0]
    parts = field.split(".")
    for known in field_names(Config):
        names = known.split(".")[: len(parts)]
        if len(names) == len(parts) and all(
            b in (a, "*") for a, b in zip(parts, names, strict=True)
        ):
            return
    raise InputError(f"config: {_unknown(name)}")


def _unknown(field: str) -> str:
    known = field_names(Config)
    close = difflib.get_close_matches(field, known, n=1)
    hint = f", did you mean {close[0]}?" if close else f"; fields are {', '.join(known)}"
    return f"{field}: no such field{hint}"


def field_names(kind: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a config dataclass, leaves only; "*": any name."""
    names: list[str] = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(field.type):
            names.extend(field_names(field.type, name + "."))
        elif get_origin(field.type) is dict:
            names.extend(field_names(get_args(field.type)[1], f"{name}.*."))
        else:
            names.append(name)
    return names


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values, ready for JSON; `parse` takes it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def may_change(field: str) -> bool:
    """Whether a setting, by its dotted name, may differ when a workdir is resumed."""
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in RUNTIME_FIELDS)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dicts of settings, as lines `field: old -> new`."""
    lines: list[str] = []

    def compare(a: Any, b: Any, name: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in sorted({*a, *b}):
                compare(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")

    compare(old, new, "")
    return lines
