"""The kinds of error that are told in one line."""


class InputError(ValueError):
    """Bad input: names the file or field, what was found, what was expected and the fix.

    Commands print its message without a traceback and exit with status 2.
    """

    status = 2  # of main.py: launchers do not start it again


class TransientError(InputError):
    """What may be well the next time, as a network file system that does not answer now."""

    status = 1  # of main.py: launchers start it again, a few times
