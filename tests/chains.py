"""The chain of configs/voco_10k.py."""

from voco_jax.config.config_files import DEFAULT
from voco_jax.config.load import load

CHAIN_10K = load(DEFAULT).data.sources["ct"].chain
