"""The networks that are trained: any encoder and what follows it."""

import flax.linen as nn
import flax.struct
import jax
from jax.typing import DTypeLike

from voco_jax.models.conv_blocks import at_least_float32, linear
from voco_jax.models.projector import Projector


@flax.struct.dataclass
class EncoderOutput:
    """What an encoder returns.

    Attributes:
        hidden_states: outputs of its stages, `b x y z c`, from the largest to the smallest.
        features: what a decoder would take of each size, `b x y z c`; may be empty.
        pooled: `b pooled_size` float32: averages over space of `features`, or without them of the
            last of `hidden_states`.
    """

    hidden_states: tuple[jax.Array, ...]
    features: tuple[jax.Array, ...]
    pooled: jax.Array


class Network(nn.Module):
    """An encoder and a projector: crops `b x y z c` -> embeddings `b projector_size`.

    The parameters are the encoder's, at the top level, and `proj_head`: those of the encoder alone
    are this tree without `proj_head`.

    Attributes:
        encoder: see `encoder.Encoder.build`.
        projector_size: of the projector's hidden layers and of the embeddings.
        dtype: of the projector's products.
    """

    encoder: nn.Module
    projector_size: int
    dtype: DTypeLike

    def setup(self) -> None:
        nn.share_scope(self, self.encoder)
        self.proj_head = Projector(self.encoder.pooled_size, self.projector_size, self.dtype)

    def __call__(self, crops: jax.Array, train: bool) -> jax.Array:
        return self.project(self.encode(crops, train).pooled)

    def encode(self, crops: jax.Array, train: bool) -> EncoderOutput:
        """Runs the encoder; `train` (drop path and the like) is passed by position."""
        return self.encoder(crops, train)

    def project(self, pooled: jax.Array) -> jax.Array:
        """Pooled features `b pooled_size` of all crops of a batch -> embeddings."""
        return self.proj_head(pooled)


class SegmentationNetwork(nn.Module):
    """An encoder and its decoder: images `b x y z in_channels` -> logits `b x y z classes`.

    The parameters of both are at the top level, as PyTorch's are. Logits are float32 or wider.

    Attributes:
        encoder: see `encoder.Encoder.build`.
        decoder: see `encoder.Encoder.build_decoder`.
    """

    encoder: nn.Module
    decoder: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.encoder)
        nn.share_scope(self, self.decoder)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return self.decoder(self.encoder(images, train))


class Classifier(nn.Module):
    """A linear layer, or two with a GELU between: `b c` -> logits `b classes`, float32 or wider.

    Its layers are named as in PyTorch's `Sequential(Linear, GELU, Linear)`.

    Attributes:
        classes: how many.
        hidden: channels between the layers; 0: there is one layer.
    """

    classes: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = at_least_float32(x)
        widths = [self.hidden, self.classes] if self.hidden else [self.classes]
        for number, width in enumerate(widths):
            if number:
                x = nn.gelu(x, approximate=False)
            x = linear(x.shape[-1], width, x.dtype, name=str(2 * number))(x)
        return x


class ClassificationNetwork(nn.Module):
    """An encoder and a classifier: images `b x y z in_channels` -> logits `b classes`.

    The encoder's parameters are at the top level, beside `classifier`, which takes the pooled
    features. Logits are float32 or wider.

    Attributes:
        encoder: see `encoder.Encoder.build`.
        classes: how many.
        hidden: see `Classifier`.
    """

    encoder: nn.Module
    classes: int
    hidden: int

    def setup(self) -> None:
        nn.share_scope(self, self.encoder)
        self.classifier = Classifier(self.classes, self.hidden)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        return self.classifier(self.encoder(images, train).pooled)
