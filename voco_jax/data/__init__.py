"""CT files on disk -> batches on the host; NumPy only."""
