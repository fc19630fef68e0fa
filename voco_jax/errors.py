"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Bad input: names the file or field, what was found, what was expected and the fix.

    Commands print its message without a traceback and exit with status 2.
    """


class InUseError(InputError):
    """Another process is at work there: nothing to mend, and it may end.

    The run that meets it ends with status 4, so that launchers try again a few times.
    """
