"""Large arrays in large pages of memory, where Linux leaves that to the program (madvise).

Each step's arrays are new memory, and their first touch costs a page fault for every 4 KiB: a
fifth of the demo's step on a CPU (docs/benchmarks.md). glibc asks for pages of 2 MiB if its
environment says so when a process starts.
"""

import os
import sys

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def restart_with_large_pages() -> None:
    """Starts this very command anew in its own process, with the variable set, if it is not.

    Call it first: what was imported is imported again. Elsewhere than on Linux it does nothing.
    """
    if sys.platform == "linux" and sys.executable and VARIABLE not in os.environ:
        os.environ[VARIABLE] = VALUE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
