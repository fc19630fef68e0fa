"""Fine-tuning with labels: an experiment of each task, and what they have in common."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from voco_jax.config.common import (
    RUNTIME_FIELDS,
    STRICT,
    Checkpoint,
    ClassifiedChain,
    Data,
    Fraction,
    InitFrom,
    LabelledChain,
    Mesh,
    NotNegative,
    Optimizer,
    Positive,
    PositiveSize,
    Profile,
    Run,
    Source,
    Weight,
    check_export,
    check_warmup,
)
from voco_jax.config.encoders import Model

# ---- every task


@dataclass(frozen=True, config=STRICT)
class LabelledSource(Source):
    """One set of images with labels; its lists name both."""

    chain: LabelledChain | ClassifiedChain


@dataclass(frozen=True, config=STRICT)
class LabelledData(Data):
    """From files to batches."""

    sources: dict[str, LabelledSource]  # type: ignore[assignment]
    folds: NotNegative  # parts of the patients, of which one is held out; 0: see `held_out`
    fold: NotNegative  # which, from 0
    patient: str  # pattern whose first group, in a volume's id, is the patient; "": the whole id
    labelled_fraction: Annotated[float, Field(gt=0, le=1)]  # of the training volumes to train on

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds == 1 or (self.folds and self.fold >= self.folds):
            raise ValueError(
                f"fold: found {self.fold} of {self.folds}, expected 2 or more folds (0: none) and "
                "a fold below that"
            )
        for name in ("classes", "channels"):
            found = {getattr(source.chain, name, ()) for source in self.sources.values()}
            if len(found) > 1:
                raise ValueError(f"sources: found different chain.{name}, expected the same in all")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names; of a segmentation the background first."""
        return tuple(name for name, _ in next(iter(self.sources.values())).chain.classes)

    @property
    def channels(self) -> int:
        """Of an image."""
        return 1


@dataclass(frozen=True, config=STRICT)
class Init(InitFrom):
    """Start from a weight file instead of at random; `twin` is for comparisons with it."""

    twin: Literal["none", "scratch", "shuffled"]  # scratch: leave the file aside; shuffled: take
    # its weights, each array's values in a random order


@dataclass(frozen=True, config=STRICT)
class TrainingCrops:
    """The part of a volume that the network takes."""

    size: PositiveSize  # voxels


@dataclass(frozen=True, config=STRICT)
class FinetuningAugment:
    """Random changes of each crop, on the device; flips and turns change a segmentation too."""

    flip_probability: tuple[Fraction, Fraction, Fraction]  # along x, y, z
    rotate_probability: Fraction  # by 90, 180 or 270 degrees in the x-y plane
    scale_probability: Fraction
    scale: Annotated[float, Field(ge=0, lt=1)]  # intensity times 1 - scale to 1 + scale
    shift_probability: Fraction
    shift: Annotated[float, Field(ge=0)]  # largest intensity offset; the window is 0..1
    noise_probability: Fraction
    noise: Annotated[float, Field(ge=0)]  # largest standard deviation
    gamma_probability: Fraction
    gamma: Annotated[float, Field(ge=0)]  # exponents from 1 / (1 + gamma) to 1 + gamma


@dataclass(frozen=True, config=STRICT)
class FinetuningOptimizer(Optimizer):
    """AdamW; linear warm-up, then cosine decay to 0 at total_steps, counted in updates."""

    amsgrad: bool
    layer_decay: Annotated[float, Field(gt=0, le=1)]  # rate of each level of the encoder, as a
    # share of that of the level after it; 1: the same rate for all
    freeze_encoder: bool


@dataclass(frozen=True, config=STRICT)
class FinetuningValidation:
    """Validation of whole volumes."""

    every_steps: NotNegative  # 0: never
    volumes: Positive  # at most so many held-out volumes


@dataclass(frozen=True, config=STRICT)
class Finetuning:
    """One experiment, as far as every task has it."""

    task: str
    seed: NotNegative
    total_steps: Positive  # optimizer updates
    batch_size: Positive  # crops per update, over all devices, each of another volume
    log_every_steps: Positive
    init_from: str  # a .pt or .safetensors file; "": random weights
    export_to: str  # weights written at the end (.safetensors or .pt); "": none
    data: LabelledData
    crops: TrainingCrops
    augment: FinetuningAugment
    model: Model
    optimizer: FinetuningOptimizer
    validation: FinetuningValidation
    checkpoint: Checkpoint
    mesh: Mesh
    profile: Profile
    init: Init

    runtime_fields: ClassVar[tuple[str, ...]] = (*RUNTIME_FIELDS, "validation.volumes")
    networks: ClassVar[tuple[str, ...]] = ("params",)

    def __post_init__(self) -> None:
        check_export(self.export_to)
        check_warmup(self.optimizer, self.total_steps)
        for name, source in self.data.sources.items():
            if source.chain.volume_size != self.crops.size:
                raise ValueError(
                    f"data.sources.{name}.chain.volume_size: found {source.chain.volume_size}, "
                    f"expected crops.size, {self.crops.size}: smaller volumes are padded to it"
                )
        if self.augment.rotate_probability > 0 and self.crops.size[0] != self.crops.size[1]:
            raise ValueError(
                f"augment.rotate_probability: found {self.augment.rotate_probability} with "
                f"crops.size {self.crops.size}; rotating by 90 degrees needs x and y of the same "
                "size: set it to 0 or make them equal"
            )
        if self.init.twin == "shuffled" and not self.init_from:
            raise ValueError("init.twin: found 'shuffled' without init_from, expected a file")

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


# ---- segmentation


@dataclass(frozen=True, config=STRICT)
class SegmentationSource(LabelledSource):
    """Images with a label file each."""

    chain: LabelledChain


@dataclass(frozen=True, config=STRICT)
class SegmentationData(LabelledData):
    """Images with a label file each."""

    sources: dict[str, SegmentationSource]  # type: ignore[assignment]

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(next(iter(self.sources.values())).chain.channels) or 1


@dataclass(frozen=True, config=STRICT)
class LabelledCrops(TrainingCrops):
    """The part of a volume that is trained on at a time, and predicted at a time."""

    foreground: Fraction  # of the crops have a voxel of a class in the middle, the others lie
    # anywhere
    balance: Literal["voxels", "classes"]  # that voxel: any with equal chance, or its class first


@dataclass(frozen=True, config=STRICT)
class SegmentationLoss:
    """Weights of the terms, and MONAI's DiceCELoss arguments."""

    dice: Weight
    cross_entropy: Weight
    include_background: bool  # in the Dice term
    smooth_nr: Annotated[float, Field(ge=0)]  # added to Dice's numerator
    smooth_dr: Annotated[float, Field(gt=0)]  # added to its denominator
    batch: bool  # Dice of all crops of a batch together, instead of each crop's own


@dataclass(frozen=True, config=STRICT)
class SlidingWindow(FinetuningValidation):
    """Validation of whole volumes, window by window."""

    overlap: Annotated[float, Field(ge=0, lt=1)]  # of neighbouring windows, as a share of one
    weights: Literal["constant", "gaussian"]  # of a window's voxels, where windows overlap


@dataclass(frozen=True, config=STRICT)
class SegmentationFinetuning(Finetuning):
    """A class for every voxel."""

    task: Literal["segmentation"]
    data: SegmentationData
    crops: LabelledCrops
    loss: SegmentationLoss
    validation: SlidingWindow

    runtime_fields: ClassVar[tuple[str, ...]] = (
        *Finetuning.runtime_fields,
        "validation.overlap",
        "validation.weights",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss.batch and self.model.crops_per_pass:
            raise ValueError(
                f"model.crops_per_pass: found {self.model.crops_per_pass} with loss.batch, "
                "expected 0: the loss needs all crops of a batch at once"
            )


# ---- classification


@dataclass(frozen=True, config=STRICT)
class ClassificationSource(LabelledSource):
    """Images that their lists put into classes."""

    chain: ClassifiedChain


@dataclass(frozen=True, config=STRICT)
class ClassificationData(LabelledData):
    """Images that their lists put into classes."""

    sources: dict[str, ClassificationSource]  # type: ignore[assignment]


@dataclass(frozen=True, config=STRICT)
class MiddleCrops(TrainingCrops):
    """What the network takes of a volume: with the fits `resize` and `center_crop` all of it."""

    shift: tuple[NotNegative, NotNegative, NotNegative]  # with `random_crop` the middle, in
    # training up to so many voxels beside it


@dataclass(frozen=True, config=STRICT)
class Head:
    """The layers that take the encoder's pooled features."""

    hidden: NotNegative  # channels between two layers; 0: there is one


@dataclass(frozen=True, config=STRICT)
class ClassificationFinetuning(Finetuning):
    """A class for every volume; the loss is the cross entropy."""

    task: Literal["classification"]
    data: ClassificationData
    crops: MiddleCrops
    head: Head

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, source in self.data.sources.items():
            if any(self.crops.shift) and source.chain.fit != "random_crop":
                raise ValueError(
                    f"crops.shift: found {self.crops.shift} with data.sources.{name}.chain.fit "
                    f"{source.chain.fit!r}, expected (0, 0, 0): only 'random_crop' caches more of "
                    "a volume than the network takes"
                )
