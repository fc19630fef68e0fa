"""What the rest of the package must know of an encoder: a record that stands beside its code.

Needs no JAX: configs and weight files are read without it.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

PROJECTOR = "proj_head"
"""Name of the projector beside the encoder's parameters, in Flax and in PyTorch."""
CLASSIFIER = "classifier"
"""Name of the classifier beside the encoder's parameters, in Flax and in PyTorch."""
Settings = Any
"""Has the encoder's own settings as attributes."""
Shapes = Mapping[str, tuple[int, ...]]
"""PyTorch's name -> shape of each tensor."""


def classifier_sizes(shapes: Shapes) -> tuple[int, ...]:
    """Channels between a classifier's layers, the pooled features first, the classes last.

    Args:
        shapes: of a network or a file; empty if there is no classifier.
    """
    weights = [
        shape
        for name, shape in sorted(shapes.items())
        if name.startswith(f"{CLASSIFIER}.") and name.endswith(".weight") and len(shape) == 2
    ]
    return (weights[0][1], *(shape[0] for shape in weights)) if weights else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """How PyTorch loads an exported file."""

    library: str  # what takes it, with its versions, as `MONAI (>=1.5)`
    snippet: str  # the Python code that does
    card: Mapping[str, str]  # further entries of the file's card


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recognised:
    """What the names and shapes in a weight file say of an encoder.

    Attributes:
        settings: of the network, plain values for JSON.
        lines: the same to read: title and text.
        network: the PyTorch model that takes the weights, as `SwinUNETR(feature_size=48)`.
        shapes: of that model's encoder, without buffers; None: the file says too little.
        whole: the same two of the model with its decoder; None: the file has none.
        part: tensor's name -> `encoder`, `buffers`, `decoder` or `other`.
    """

    settings: Mapping[str, Any]
    lines: Sequence[tuple[str, str]]
    network: str
    shapes: Shapes | None
    whole: tuple[str, Shapes] | None
    part: Callable[[str], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder, by functions of its settings; what has a default does not concern every encoder.

    Attributes:
        build: (settings, *, in_channels, remat, dtype, convolution, attention) -> the `nn.Module`:
            crops `b x y z in_channels`, train -> `network.EncoderOutput`, with the property
            `pooled_size`.
        card: (settings, shapes of the parameters to export) -> the settings for the file's card,
            and what else the shapes say; a ValueError names those that the shapes contradict.
        usage: (file's name, that card's settings, shapes of the file's tensors) -> its use.
        build_decoder: (settings, *, classes, remat, dtype, convolution) -> the `nn.Module`:
            `network.EncoderOutput` -> logits `b x y z classes` of the crops' size; an InputError
            if it needs other settings. None: the encoder has no decoder.
        check_size: raises an InputError unless crops may have this size, x y z in voxels.
        attention_shape: tokens of a window and channels of a head of its attention, with which
            fused kernels are tried; None: it has no attention.
        buffers: (settings, parameters' names) -> what PyTorch's state dict has beside parameters.
        causes: (file's shapes, model's shapes, names of buffers with other values) -> the likely
            reasons why the file does not fit, each with its fix.
        unseen: settings that change values but no shape, so that a file's card has to agree with
            the model; with what to say where there is no card.
        stem: names of the tensors that take the image, input channels on their second axis: those
            of a file of one channel are spread over a model's several.
        level: PyTorch's name of a parameter -> how many stages of the encoder follow its own, for
            learning rates that fall from the decoder to the image.
        recognise: (shapes in a file, its card or an empty dict) -> what they say; None: the file
            is not of this encoder.
    """

    build: Callable[..., Any]
    card: Callable[[Settings, Shapes], dict[str, Any]]
    usage: Callable[[str, Mapping[str, Any], Shapes], Usage]
    build_decoder: Callable[..., Any] | None = None
    check_size: Callable[[Sequence[int]], None] = lambda size: None
    attention_shape: Callable[[Settings], tuple[int, int] | None] = lambda settings: None
    buffers: Callable[[Settings, Collection[str]], dict[str, np.ndarray]] = lambda *_: {}
    causes: Callable[[Shapes, Shapes, Collection[str]], list[str]] = lambda *_: []
    unseen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stem: Sequence[str] = ()
    level: Callable[[str], int] = lambda name: 0
    recognise: Callable[[Shapes, Mapping[str, Any]], Recognised | None] = lambda *_: None
