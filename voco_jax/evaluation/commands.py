"""The console commands voco-embed and voco-predict: large pages first, then heavy imports.

A restart with large pages imports everything again.
"""

from voco_jax.large_pages import restart_with_large_pages


def embed() -> int:
    """`voco_jax.evaluation.embed` as a process of its own; returns the exit status."""
    restart_with_large_pages()
    from voco_jax.evaluation.embed import command

    return command()


def predict() -> int:
    """`voco_jax.evaluation.predict` as a process of its own; returns the exit status."""
    restart_with_large_pages()
    from voco_jax.evaluation.predict import command

    return command()
