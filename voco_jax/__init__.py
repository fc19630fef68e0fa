"""voco_jax: VoCo pre-training of 3D medical image encoders in JAX/Flax."""

__version__ = "0.2.0"
