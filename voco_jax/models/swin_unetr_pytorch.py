"""SwinUNETR in PyTorch: names, shapes and buffers in a file, and MONAI's use of it.

Needs no JAX; `ENCODER` imports the Flax module only when it is asked for.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from voco_jax.errors import InputError
from voco_jax.models.encoder import (
    CLASSIFIER,
    PROJECTOR,
    Encoder,
    Recognised,
    Settings,
    Shapes,
    Usage,
    classifier_sizes,
)
from voco_jax.types import Size

MODEL_SIZES = {48: "B", 96: "L", 192: "H"}
"""VoCo's names for feature sizes."""
MAX_WINDOW = 32
TABLE = ".relative_position_bias_table"
INDEX = ".relative_position_index"
"""MONAI's buffer beside each table: which row belongs to which pair of tokens."""
MONAI_VERSIONS = {"legacy": "<1.5", "merging": ">=1.5", "mergingv2": "all"}
"""The MONAI releases whose SwinUNETR computes what a model of this patch merging computed."""
UNKNOWN_MERGING = (
    "MONAI up to 1.4 (legacy), since 1.5 (merging) and mergingv2 have the same names and shapes "
    "and give different features. VoCo's published weights: legacy."
)
LEGACY_MERGING = (
    "from monai.networks.nets.swin_unetr import PatchMergingV2",
    "",
    "class LegacyPatchMerging(PatchMergingV2):  # of MONAI up to 1.4",
    "    order = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1),",
    "             (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))",
    "",
    "    def forward(self, x):",
    "        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.order], -1)",
    "        return self.reduction(self.norm(x))",
)
"""Lines of the usage snippet with which a later MONAI computes what the old ones did."""
STEM = (
    "swinViT.patch_embed.proj.weight",
    "encoder1.layer.conv1.conv.weight",
    "encoder1.layer.conv3.conv.weight",
)
"""See `Encoder.stem`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What names and shapes say of a network, see `swin_unetr`; None or empty: nothing."""

    feature_size: int | None
    in_channels: int | None
    use_v2: bool
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: Size | None  # of a window that is no cube the order of axes is a guess
    conv_encoders: bool
    decoder: bool  # whether there are decoder weights
    out_channels: int | None  # of the segmentation output


def architecture(shapes: Shapes) -> Architecture:
    """Reads an architecture off bare PyTorch names and shapes."""

    def extent(name: str, axis: int) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    def depth(stage: int) -> int:
        blocks = f"swinViT.layers{stage}.0.blocks"
        names = (f"{blocks}.{number}.attn.qkv.weight" for number in itertools.count())
        return sum(1 for _ in itertools.takewhile(shapes.__contains__, names))

    depths = tuple(itertools.takewhile(bool, map(depth, itertools.count(1))))
    first = [f"swinViT.layers{stage + 1}.0.blocks.0.attn" for stage in range(max(len(depths), 1))]
    rows, tokens = extent(first[0] + TABLE, 0), extent(first[0] + INDEX, 0)
    return Architecture(
        feature_size=extent("swinViT.patch_embed.proj.weight", 0),
        in_channels=extent("swinViT.patch_embed.proj.weight", 1),
        use_v2=any(name.startswith("swinViT.layers1c.") for name in shapes),
        depths=depths,
        num_heads=tuple(extent(block + TABLE, 1) or 0 for block in first[: len(depths)]),
        window_size=None if rows is None else window_of(rows, tokens),
        conv_encoders=any(name.startswith("encoder1.") for name in shapes),
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


def causes(file_shapes: Shapes, model_shapes: Shapes, other_buffers: Collection[str]) -> list[str]:
    """See `Encoder.causes`."""
    file, model = architecture(file_shapes), architecture(model_shapes)
    if file.feature_size is None:
        return ["the file holds no SwinUNETR encoder (swinViT.patch_embed is missing)"]
    found = []
    for name in ("feature_size", "window_size", "depths", "num_heads"):
        ours, theirs = (getattr(one, name) or "unknown" for one in (model, file))
        if ours != theirs:
            what = name.replace("num_", "number of ").replace("_", " ")
            found.append(
                f"the file's {what} is {theirs}, the model's {ours}: set model.{name} to {theirs} "
                "or take another file"
            )
    if file.in_channels not in (1, model.in_channels):
        found.append(
            f"the file's number of input channels is {file.in_channels}, the model's "
            f"{model.in_channels}: take another file (one of 1 channel fits every model), or name "
            "as many in a segmentation's data.sources.*.chain.channels"
        )
    if file.use_v2 != model.use_v2:
        has, lacks = ("file", "model") if file.use_v2 else ("model", "file")
        found.append(
            f"the {has} has the v2 convolution blocks (layers1c ...), the {lacks} has not: set "
            f"model.use_v2={file.use_v2} or take another file"
        )
    if file.conv_encoders != model.conv_encoders:
        found.append(
            "the file has convolution encoders, the model has not: set model.conv_encoders=True or "
            "allow unexpected 'encoder*'"
            if file.conv_encoders
            else "the file has no convolution encoders: to start them at random allow missing "
            "'encoder*'"
        )
    if file.decoder and not model.decoder:
        found.append(
            "the file holds a complete SwinUNETR: to leave its decoder aside allow unexpected "
            "'decoder*' and 'out.*'"
        )
    if model.decoder and not file.decoder:
        found.append(
            "the file has no decoder (a pre-trained encoder): to start it at random allow missing "
            "'decoder*' and 'out.*'"
        )
    if model.decoder and file.decoder and model.out_channels != file.out_channels:
        found.append(
            f"the file has {file.out_channels or 'no'} classes, the model {model.out_channels}: to "
            "start its last layer at random allow missing and unexpected 'out.*'"
        )
    if other_buffers:
        found.append(
            "the file's attention windows have other sizes, or the same in another order of axes: "
            "set model.window_size to them or take another file"
        )
    return found


def encoder_shapes(model: Architecture) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the encoder of MONAI's `SwinUNETR` with these options, without buffers.

    None: the architecture is incomplete.
    """
    fs, channels, window = model.feature_size, model.in_channels, model.window_size
    if fs is None or channels is None or window is None or len(model.depths) != 4:
        return None
    rows = math.prod(2 * size - 1 for size in window)
    shapes: dict[str, tuple[int, ...]] = {
        "swinViT.patch_embed.proj.weight": (fs, channels, 2, 2, 2),
        "swinViT.patch_embed.proj.bias": (fs,),
    }

    def add(module: str, weight: tuple[int, ...], *, bias: bool = True) -> None:
        shapes[f"{module}.weight"] = weight
        if bias:
            shapes[f"{module}.bias"] = weight[:1]

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
            shapes |= _residual(f"swinViT.layers{stage + 1}c.0.layer", dim, dim)
    for name, inside, outside in (
        ("encoder1", channels, fs),
        ("encoder2", fs, fs),
        ("encoder3", 2 * fs, 2 * fs),
        ("encoder4", 4 * fs, 4 * fs),
        ("encoder10", 16 * fs, 16 * fs),
    ):
        shapes |= _residual(f"{name}.layer", inside, outside)
    return shapes


def decoder_shapes(feature_size: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder of MONAI's `SwinUNETR`, its output included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, inside, outside in ((5, 16, 8), (4, 8, 4), (3, 4, 2), (2, 2, 1), (1, 1, 1)):
        channels = outside * feature_size
        up = (inside * feature_size, channels, 2, 2, 2)
        shapes[f"decoder{stage}.transp_conv.conv.weight"] = up
        shapes |= _residual(f"decoder{stage}.conv_block", 2 * channels, channels)
    shapes["out.conv.conv.weight"] = (classes, feature_size, 1, 1, 1)
    shapes["out.conv.conv.bias"] = (classes,)
    return shapes


def _residual(module: str, inside: int, outside: int) -> dict[str, tuple[int, ...]]:
    """Of a `UnetResBlock`."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{module}.conv1.conv.weight": (outside, inside, 3, 3, 3),
        f"{module}.conv2.conv.weight": (outside, outside, 3, 3, 3),
    }
    if inside != outside:
        shapes[f"{module}.conv3.conv.weight"] = (outside, inside, 1, 1, 1)
    return shapes


def recognise(shapes: Shapes, card: Mapping[str, Any]) -> Recognised | None:
    """See `Encoder.recognise`; the card says which patch merging."""
    seen = architecture(shapes)
    if seen.feature_size is None:
        return None
    size = MODEL_SIZES.get(seen.feature_size)
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(seen).items()
    }
    merging = f"not in the file: {UNKNOWN_MERGING}"
    if card.get("patch_merging") is not None:
        merging = f"{card['patch_merging']} (its card; MONAI {card.get('monai_versions')})"
    decoder = f"yes, {seen.out_channels or 'unknown'} output channels" if seen.decoder else "none"
    defaults = {"window_size": (7, 7, 7), "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)}

    def network(*channels: str) -> str:
        options = [
            f"{name}={getattr(seen, name)}"
            for name in (*channels, "feature_size", "use_v2", *defaults)
            if getattr(seen, name) != defaults.get(name)
        ]
        return f"SwinUNETR({', '.join(options)})"

    encoder, whole = encoder_shapes(seen), None
    if encoder is not None and seen.decoder and seen.out_channels:
        shapes = encoder | decoder_shapes(seen.feature_size, seen.out_channels)
        whole = network("in_channels", "out_channels"), shapes
    return Recognised(
        settings={"model_size": size, **settings},
        lines=(
            (
                "encoder",
                f"Swin, feature size {seen.feature_size} "
                f"({f'VoCo {size}' if size else 'none of VoCo B, L, H'}), "
                f"{'' if seen.use_v2 else 'no '}v2 convolution blocks, "
                f"convolution encoders: {'yes' if seen.conv_encoders else 'no'}",
            ),
            ("in_channels", str(seen.in_channels)),
            ("depths", " ".join(map(str, seen.depths))),
            ("heads", " ".join(map(str, seen.num_heads))),
            ("window", " ".join(map(str, seen.window_size or ("unknown",)))),
            ("decoder", decoder),
            ("patch merging", merging),
        ),
        network=network("in_channels"),
        shapes=encoder,
        whole=whole,
        part=_part,
    )


def _part(name: str) -> str:
    root = name.split(".")[0]
    if name.endswith(INDEX):
        return "buffers"
    if root == "swinViT" or root.startswith("encoder"):
        return "encoder"
    return "decoder" if root.startswith("decoder") or root == "out" else "other"


def card(settings: Settings, shapes: Shapes) -> dict[str, Any]:
    """See `Encoder.card`."""
    seen, window = architecture(shapes), settings.window_size
    names = ("feature_size", "use_v2", "conv_encoders", "depths", "num_heads")
    found = {name: getattr(seen, name) for name in names}
    different = [name for name in names if found[name] != getattr(settings, name)]
    rows = math.prod(2 * size - 1 for size in window)
    if any(shape[0] != rows for name, shape in shapes.items() if name.endswith(TABLE)):
        different.append("window_size")
    if different:
        raise ValueError(", ".join(different))
    return {
        **found,
        "window_size": window,
        "in_channels": seen.in_channels,
        **({"out_channels": seen.out_channels} if seen.decoder else {}),
        "patch_merging": settings.patch_merging,
    }


def relative_position_index(window_size: Size) -> np.ndarray:
    """The row of the bias table for each pair of tokens of a window: MONAI's buffer.

    Args:
        window_size: x y z.

    Returns:
        `n n` int64, n the product of `window_size`, tokens in C order of x y z.
    """
    axes = np.meshgrid(*(np.arange(size) for size in window_size), indexing="ij")
    coordinates = np.stack(axes).reshape(3, -1)
    offsets = coordinates[:, :, None] - coordinates[:, None, :]
    offsets += np.array(window_size)[:, None, None] - 1
    spans = [2 * size - 1 for size in window_size]
    return (offsets[0] * spans[1] + offsets[1]) * spans[2] + offsets[2]


def buffers(settings: Settings, names: Collection[str]) -> dict[str, np.ndarray]:
    """See `Encoder.buffers`: a `relative_position_index` beside each table."""
    index = relative_position_index(settings.window_size)
    return {
        name.removesuffix(TABLE) + INDEX: index.copy() for name in names if name.endswith(TABLE)
    }


def usage(file_name: str, settings: Mapping[str, Any], shapes: Shapes) -> Usage:
    """See `Encoder.usage`: which MONAI takes the weights, and how."""
    merging, window = settings["patch_merging"], settings["window_size"]
    legacy, whole = merging == "legacy", "out_channels" in settings
    names = ("use_v2", "window_size", "feature_size", "depths", "num_heads")
    channels = ("in_channels", "out_channels") if whole else ("in_channels",)
    note = (
        f"{', '.join((*channels, *names[:-1]))} and {names[-1]} must be passed to SwinUNETR as in "
        "the snippet, which is for MONAI 1.5 and later. MONAI changed its patch merging in 1.5: "
        "another version than monai_versions gives other features from the same file, with no error"
    )
    note += ", unless it is given the merging of the snippet." if legacy else "."
    versions = MONAI_VERSIONS[merging]
    if window != (7, 7, 7):
        note += " SwinUNETR has window_size since MONAI 1.5; before it is always 7."
        versions = "none by itself" if legacy else ">=1.5"
    elif versions != ">=1.5":
        note += " Up to MONAI 1.4 pass img_size=(64, 64, 64) and no window_size."
    if not settings["conv_encoders"]:
        note += " SwinUNETR's convolution encoders were not trained and start at random."
    options = {"in_channels": settings["in_channels"], "out_channels": 2}
    options |= {name: settings[name] for name in (*channels, *names)}
    arguments = [f"    {name}={value!r}," for name, value in options.items()]
    if merging != "merging":
        arguments.append(f"    downsample={'LegacyPatchMerging' if legacy else repr(merging)},")
    absent = ("decoder", "out.") if settings["conv_encoders"] else ("encoder", "decoder", "out.")
    classifier = classifier_sizes(shapes)
    safetensors = file_name.endswith(".safetensors")
    lines = [
        "import torch",
        *(["from safetensors.torch import load_file"] if safetensors else ()),
        "from monai.networks.nets import SwinUNETR",
        *(LEGACY_MERGING if legacy else ()),
        "",
        "model = SwinUNETR(",
        *arguments,
        ")",
        f"weights = load_file({file_name!r})"
        if safetensors
        else f"weights = torch.load({file_name!r}, weights_only=True)",
    ]
    if classifier:
        lines += [
            f"head = {{k[{len(CLASSIFIER) + 1}:]: v for k, v in weights.items() "
            f'if k.startswith("{CLASSIFIER}.")}}'
        ]
    for part in (PROJECTOR, CLASSIFIER):
        if any(name.startswith(f"{part}.") for name in shapes):
            lines.append(
                f'weights = {{k: v for k, v in weights.items() if not k.startswith("{part}.")}}'
            )
    if whole:
        lines.append("model.load_state_dict(weights)")
    else:
        lines += [
            "missing, unexpected = model.load_state_dict(weights, strict=False)",
            f"assert not unexpected and all(k.startswith({absent}) for k in missing)",
        ]
    if classifier:
        lines += _classifier_lines(classifier, settings["conv_encoders"])
    return Usage(
        library=f"MONAI ({versions})",
        snippet="\n".join(lines),
        card={"monai_versions": versions, "monai_note": note},
    )


def _classifier_lines(sizes: Sequence[int], conv_encoders: bool) -> list[str]:
    """Of the usage snippet: the classifier, with its weights in `head`, on `model`'s encoder."""
    layers = [f"torch.nn.Linear{pair}" for pair in itertools.pairwise(sizes)]
    features = [
        "    features = [model.encoder1(images), model.encoder2(hidden[0])]",
        "    features += [model.encoder3(hidden[1]), model.encoder4(hidden[2])]",
        "    features += [model.encoder10(hidden[4])]",
    ]
    return [
        f"classifier = torch.nn.Sequential({', torch.nn.GELU(), '.join(layers)})",
        "classifier.load_state_dict(head)",
        "",
        "",
        "def classify(images):  # batch, channel, x, y, z -> logits",
        "    hidden = model.swinViT(images)",
        *(features if conv_encoders else ["    features = hidden[-1:]"]),
        "    return classifier(torch.cat([x.mean((2, 3, 4)) for x in features], 1))",
    ]


_LEVELS = {
    **{"encoder1": 4, "encoder2": 3, "encoder3": 2, "encoder4": 1, "encoder10": 0},
    **{"swinViT.patch_embed": 4, "swinViT.layers1": 3, "swinViT.layers2": 2},
    **{"swinViT.layers3": 1, "swinViT.layers4": 0},
}


def level(name: str) -> int:
    """See `Encoder.level`; a convolution encoder is beside the stage whose output it takes."""
    root, *rest = name.split(".")
    return _LEVELS[f"{root}.{rest[0].removesuffix('c')}" if root == "swinViT" else root]


def _build(settings: Settings, **common: Any) -> Any:
    from voco_jax.models.swin_unetr import SwinUNETREncoder

    names = [
        *("feature_size", "depths", "num_heads", "window_size", "patch_merging", "use_v2"),
        *("conv_encoders", "drop_path_rate"),
    ]
    return SwinUNETREncoder(**{name: getattr(settings, name) for name in names}, **common)


def _build_decoder(settings: Settings, **common: Any) -> Any:
    from voco_jax.models.swin_unetr_decoder import SwinUNETRDecoder

    if not settings.conv_encoders:
        raise InputError(
            "model.conv_encoders: found False, expected True: the decoder takes the outputs of the "
            "convolution encoders; weights trained without them need allow missing 'encoder*'"
        )
    return SwinUNETRDecoder(feature_size=settings.feature_size, **common)


def _check_size(size: Sequence[int]) -> None:
    from voco_jax.models.swin_unetr import check_crop_size

    check_crop_size(size)


ENCODER = Encoder(
    build=_build,
    build_decoder=_build_decoder,
    check_size=_check_size,
    attention_shape=lambda settings: (
        math.prod(settings.window_size),
        settings.feature_size // settings.num_heads[0],
    ),
    card=card,
    usage=usage,
    buffers=buffers,
    causes=causes,
    stem=STEM,
    level=level,
    unseen={"patch_merging": UNKNOWN_MERGING},
    recognise=recognise,
)
