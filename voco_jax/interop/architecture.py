"""Which network a set of names and shapes is: MONAI's SwinUNETR encoder, its size and options."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Size = tuple[int, int, int]

MODEL_SIZES = {48: "B", 96: "L", 192: "H"}
"""VoCo's names for feature sizes."""
MAX_WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What names and shapes say of a network; None or empty: nothing.

    Attributes:
        feature_size: channels of the first stage.
        in_channels: of the image.
        use_v2: whether there are convolution blocks before the stages.
        depths: Swin blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: of the attention; of a window that is no cube the order of axes is a guess.
        conv_encoders: whether encoder1 ... encoder10 are there.
        projector_size: width of the projector.
        decoder: whether there are decoder weights.
        out_channels: of the segmentation output.
    """

    feature_size: int | None
    in_channels: int | None
    use_v2: bool
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: Size | None
    conv_encoders: bool
    projector_size: int | None
    decoder: bool
    out_channels: int | None


def recognise(shapes: Mapping[str, Shape]) -> Architecture:
    """Reads an architecture off bare PyTorch names and shapes."""

    def extent(name: str, axis: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    depths: list[int] = []
    heads: list[int] = []
    for stage in itertools.count(1):
        blocks = f"swinViT.layers{stage}.0.blocks"
        depth = 0
        while f"{blocks}.{depth}.attn.qkv.weight" in shapes:
            depth += 1
        if not depth:
            break
        depths.append(depth)
        heads.append(extent(f"{blocks}.0.attn.relative_position_bias_table", 1) or 0)
    first = "swinViT.layers1.0.blocks.0.attn.relative_position"
    rows, tokens = extent(f"{first}_bias_table", 0), extent(f"{first}_index", 0)
    return Architecture(
        feature_size=extent("swinViT.patch_embed.proj.weight", 0),
        in_channels=extent("swinViT.patch_embed.proj.weight", 1),
        use_v2=any(name.startswith("swinViT.layers1c.") for name in shapes),
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=None if rows is None else window_of(rows, tokens),
        conv_encoders=any(name.startswith("encoder1.") for name in shapes),
        projector_size=extent("proj_head.layer1.0.weight", 0),
        decoder=any(name.startswith("decoder") for name in shapes),
        out_channels=extent("out.conv.conv.weight", 0),
    )


def window_of(rows: int, tokens: int | None) -> Size | None:
    """The window whose bias table has so many rows: a cube if one fits, else the first that does.

    Args:
        rows: of the table: the product of 2 * size - 1.
        tokens: the product of the window's sizes, where known.
    """
    sizes = range(1, MAX_WINDOW + 1)
    fits = [
        (a, b, c)
        for a, b in itertools.combinations_with_replacement(sizes, 2)
        if rows % ((2 * a - 1) * (2 * b - 1)) == 0
        and (c := (rows // ((2 * a - 1) * (2 * b - 1)) + 1) // 2) >= b
        and (2 * a - 1) * (2 * b - 1) * (2 * c - 1) == rows
        and tokens in (None, a * b * c)
    ]
    return next((size for size in fits if len(set(size)) == 1), fits[0] if fits else None)


def causes(file: Architecture, model: Architecture) -> list[str]:
    """The likely reasons why a file's tensors do not fit a model, each with its fix."""
    if file.feature_size is None:
        return ["the file holds no SwinUNETR encoder (swinViT.patch_embed is missing)"]
    found: list[str] = []
    for what, setting, ours, theirs in (
        ("feature size", "model.feature_size", model.feature_size, file.feature_size),
        (
            "number of input channels",
            "the model's in_channels",
            model.in_channels,
            file.in_channels,
        ),
        ("window size", "model.window_size", model.window_size, file.window_size),
        ("depths", "model.depths", model.depths, file.depths),
        ("number of heads", "model.num_heads", model.num_heads, file.num_heads),
    ):
        if ours != theirs:
            found.append(
                f"the file's {what} is {_text(theirs)}, the model's {_text(ours)}: set {setting} "
                f"to {_text(theirs)} or take another file"
            )
    if file.use_v2 != model.use_v2:
        has, lacks = ("file", "model") if file.use_v2 else ("model", "file")
        found.append(
            f"the {has} has the v2 convolution blocks (layers1c ...), the {lacks} has not: set "
            f"model.use_v2={file.use_v2} or take another file"
        )
    if model.conv_encoders and not file.conv_encoders:
        found.append(
            "the file has no convolution encoders: to start them at random allow missing 'encoder*'"
        )
    if file.conv_encoders and not model.conv_encoders:
        found.append(
            "the file has convolution encoders, the model has not: set model.conv_encoders=True or "
            "allow unexpected 'encoder*'"
        )
    if model.projector_size != file.projector_size:
        if file.projector_size is None:
            found.append(
                "the file has no projector (published weights have none): to start it at random "
                "allow missing 'proj_head.*'"
            )
        elif model.projector_size is None:
            found.append(
                "the file has a projector, the model has not: allow unexpected 'proj_head.*'"
            )
        else:
            found.append(
                f"the file's projector is {file.projector_size} wide, the model's "
                f"{model.projector_size}: set model.projector_size={file.projector_size} or take "
                "another file"
            )
    if file.decoder and not model.decoder:
        found.append(
            "the file holds a whole SwinUNETR: to leave its decoder aside allow unexpected "
            "'decoder*' and 'out.*'"
        )
    return found


def encoder_shapes(model: Architecture) -> dict[str, Shape]:
    """Names and shapes of the encoder of MONAI's `SwinUNETR` with these options, without buffers.

    Raises:
        ValueError: the architecture is incomplete.
    """
    fs, channels, window = model.feature_size, model.in_channels, model.window_size
    if fs is None or channels is None or window is None or len(model.depths) != 4:
        raise ValueError(f"incomplete: {model}")
    rows = math.prod(2 * size - 1 for size in window)
    shapes: dict[str, Shape] = {
        "swinViT.patch_embed.proj.weight": (fs, channels, 2, 2, 2),
        "swinViT.patch_embed.proj.bias": (fs,),
    }

    def add(module: str, weight: Shape, *, bias: bool = True) -> None:
        shapes[f"{module}.weight"] = weight
        if bias:
            shapes[f"{module}.bias"] = weight[:1]

    def residual(module: str, inside: int, outside: int) -> None:
        add(f"{module}.conv1.conv", (outside, inside, 3, 3, 3), bias=False)
        add(f"{module}.conv2.conv", (outside, outside, 3, 3, 3), bias=False)
        if inside != outside:
            add(f"{module}.conv3.conv", (outside, inside, 1, 1, 1), bias=False)

    for stage, (depth, heads) in enumerate(zip(model.depths, model.num_heads, strict=True)):
        dim = fs * 2**stage
        for index in range(depth):
            block = f"swinViT.layers{stage + 1}.0.blocks.{index}"
            add(f"{block}.norm1", (dim,))
            shapes[f"{block}.attn.relative_position_bias_table"] = (rows, heads)
            add(f"{block}.attn.qkv", (3 * dim, dim))
            add(f"{block}.attn.proj", (dim, dim))
            add(f"{block}.norm2", (dim,))
            add(f"{block}.mlp.linear1", (4 * dim, dim))
            add(f"{block}.mlp.linear2", (dim, 4 * dim))
        add(f"swinViT.layers{stage + 1}.0.downsample.reduction", (2 * dim, 8 * dim), bias=False)
        add(f"swinViT.layers{stage + 1}.0.downsample.norm", (8 * dim,))
        if model.use_v2:
            residual(f"swinViT.layers{stage + 1}c.0.layer", dim, dim)
    for name, inside, outside in (
        ("encoder1", channels, fs),
        ("encoder2", fs, fs),
        ("encoder3", 2 * fs, 2 * fs),
        ("encoder4", 4 * fs, 4 * fs),
        ("encoder10", 16 * fs, 16 * fs),
    ):
        residual(f"{name}.layer", inside, outside)
    return shapes


def _text(value: object) -> str:
    return "unknown" if value is None else str(value)
