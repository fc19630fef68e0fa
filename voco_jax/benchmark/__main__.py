"""Runs the command; see `command`."""

import sys

from voco_jax.accelerators import cpu_where_nothing_else_is, silence_compiler
from voco_jax.benchmark.command import main
from voco_jax.large_pages import restart_with_large_pages


def command() -> int:
    """The command as a process of its own, as `python -m` and voco-benchmark start it."""
    restart_with_large_pages()  # as voco_jax.train does
    if cpu_where_nothing_else_is():
        silence_compiler()
    return main()


if __name__ == "__main__":
    sys.exit(command())
