"""How far a long command is, for people."""

import sys

from tqdm import tqdm


def bar(what: str, total: int, show: bool) -> tqdm:
    """A bar of volumes on a terminal, else a line every 15 s; both with the time left."""
    terminal = sys.stderr.isatty()
    line = "{desc}: {n_fmt}/{total_fmt} volumes{postfix}, {rate_fmt}, {remaining} left\n"
    return tqdm(
        total=total,
        desc=what,
        unit=" volumes",
        disable=not show or not total,
        miniters=1,
        mininterval=0.1 if terminal else 15,
        maxinterval=30,
        delay=0 if terminal else 15,
        bar_format=None if terminal else line,
    )


def log(line: str) -> None:
    """Prints a line to stderr, besides the results."""
    print(line, file=sys.stderr, flush=True)
