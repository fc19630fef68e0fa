"""File formats of CTs, read as one: a new one is a file here and a line in `readers.FORMATS`."""
