"""Pictures of crops, positions and caches, all drawn with Matplotlib's Agg."""

import contextlib
import os
import sys

# A notebook's children inherit its backend. Where that is not installed, or where it is misspelt,
# matplotlib refuses to be imported, though nothing here would use it.
if "matplotlib" not in sys.modules and "MPLBACKEND" in os.environ:
    backend = os.environ.pop("MPLBACKEND")
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend  # as it would be otherwise
