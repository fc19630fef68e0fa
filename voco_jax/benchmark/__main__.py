"""Runs the command; see `command`."""

import sys

from voco_jax.benchmark.command import main
from voco_jax.large_pages import restart_with_large_pages

if __name__ == "__main__":
    restart_with_large_pages()  # as main.py does
    sys.exit(main())
