"""Runs the command; see `page`."""

import sys

from voco_jax.report.page import main

if __name__ == "__main__":
    sys.exit(main())
