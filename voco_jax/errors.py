"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Bad input: names the file or field, what was found, what was expected and the fix.

    Commands print its message without a traceback and exit with status 2.
    """
