"""The network that is trained: any encoder and a projector."""

import flax.linen as nn
import flax.struct
import jax
from jax.typing import DTypeLike

from voco_jax.models.projector import Projector


@flax.struct.dataclass
class EncoderOutput:
    """What an encoder returns.

    Attributes:
        hidden_states: outputs of its stages, `b x y z c`, from the largest to the smallest.
        features: what a decoder would take of each size, `b x y z c`; may be empty.
        pooled: `b pooled_size` float32: averages over space.
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
