"""How fast each part of a run is on this machine: `python -m voco_jax.benchmark --help`."""
