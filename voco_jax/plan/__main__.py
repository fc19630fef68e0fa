"""Runs the command; see `command`."""

import sys

from voco_jax.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
