"""voco_jax: VoCo pre-training of 3D medical image encoders in JAX/Flax.

    import voco_jax

    encoder = voco_jax.load_encoder("voco.safetensors")
    features = encoder("ct.nii.gz")

What is in `__all__` is public, everything else is not. Importing it imports no JAX; see
docs/features.md.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from voco_jax.evaluation.encoder import Encoder, similarity_map
    from voco_jax.evaluation.load_encoder import load_encoder

__version__ = "0.2.0"
__all__ = ["Encoder", "__version__", "load_encoder", "similarity_map"]


def __getattr__(name: str) -> _typing.Any:
    if name in __all__:
        module = "load_encoder" if name == "load_encoder" else "encoder"
        return getattr(_importlib.import_module(f"voco_jax.evaluation.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
