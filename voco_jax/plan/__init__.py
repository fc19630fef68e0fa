"""Memory, time and scaling of a run on devices not at hand: `python -m voco_jax.plan --help`."""
