"""Pre-training with VoCo: one experiment."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from voco_jax.config.common import (
    RUNTIME_FIELDS,
    STRICT,
    Checkpoint,
    Data,
    Fraction,
    InitFrom,
    Mesh,
    NotNegative,
    Optimizer,
    Positive,
    PositiveSize,
    Profile,
    Run,
    Weight,
    check_export,
    check_warmup,
)
from voco_jax.config.encoders import Model


@dataclass(frozen=True, config=STRICT)
class Crops:
    """The base grid and the sub-volumes."""

    grid: PositiveSize  # base crops along (x, y, z)
    crop_size: PositiveSize  # voxels of one crop of the cached volume
    encoder_size: PositiveSize  # voxels that each crop is resized to on the device
    sub_volumes: Positive  # random crops per volume and step


@dataclass(frozen=True, config=STRICT)
class Augment:
    """Random changes of each crop, on the device."""

    flip_probability: Fraction  # per axis
    rotate_probability: Fraction  # by 90, 180 or 270 degrees in the x-y plane
    shift_probability: Fraction
    shift: Annotated[float, Field(ge=0)]  # largest intensity offset; the window is 0..1


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """The exponential moving average of the student."""

    scope: Literal["none", "network", "projector"]  # what of the student it is an average of
    momentum: Fraction  # new = momentum * old + (1 - momentum) * student


@dataclass(frozen=True, config=STRICT)
class Loss:
    """Weights of the loss terms; 1.0 each is published. Metrics show the terms unweighted."""

    pos: Weight  # predictions where the overlap is not 0
    neg: Weight  # predictions where it is
    reg: Weight  # base crops of one volume apart
    inter: Weight  # voco_v2: predictions between the volumes of a batch; else of no effect


@dataclass(frozen=True, config=STRICT)
class Dropout:
    """Of the student's pooled features, before its projector."""

    rate: Annotated[float, Field(ge=0, lt=1)]
    kind: Literal["embedding", "feature"]  # zero all features of a crop (published), or each alone


@dataclass(frozen=True, config=STRICT)
class Validation:
    """Position accuracy on held-out volumes, and the picture."""

    every_steps: NotNegative  # 0: never
    volumes: Positive  # at most so many held-out volumes
    sub_volumes: Positive  # random crops per held-out volume
    probe_labels: str = ""  # CSV of held-out volumes: id, label and, if they have several, patient;
    # a linear probe at each validation. "": none. Cards of earlier versions do not have it


@dataclass(frozen=True, config=STRICT)
class Pretraining:
    """One experiment."""

    task: Literal["voco"]
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
    projector_size: Positive  # of the hidden layers and of the embeddings
    teacher: Teacher
    loss: Loss
    dropout: Dropout
    optimizer: Optimizer
    validation: Validation
    checkpoint: Checkpoint
    mesh: Mesh
    profile: Profile
    init: InitFrom

    runtime_fields: ClassVar[tuple[str, ...]] = (
        *RUNTIME_FIELDS,
        "validation.volumes",
        "validation.sub_volumes",
        "validation.probe_labels",
    )

    def __post_init__(self) -> None:
        self._check_crops()
        check_export(self.export_to)
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
        check_warmup(self.optimizer, self.total_steps)

    def _check_crops(self) -> None:
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

    @property
    def run(self) -> Run:
        """For the training loop."""
        return Run(
            total_steps=self.total_steps,
            batch_size=self.batch_size,
            log_every_steps=self.log_every_steps,
            validate_every_steps=self.validation.every_steps,
            checkpoint=self.checkpoint,
            profile=self.profile,
        )

    @property
    def networks(self) -> tuple[str, ...]:
        """The parts of the state that hold an encoder, first the one to export."""
        return ("teacher", "student") if self.teacher.scope == "network" else ("student",)
