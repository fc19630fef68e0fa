"""The kinds of error that are told in one line."""

import errno
import os

# Of a network file system or a disk that does not answer now.
_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENOTCONN, errno.ECONNRESET),
)


class InputError(ValueError):
    """Bad input: names the file or field, what was found, what was expected and the fix.

    Commands print its message without a traceback and exit with status 2.
    """

    status = 2  # of main.py: launchers do not start it again


class TransientError(InputError):
    """What may be well the next time, as a network file system that does not answer now."""

    status = 1  # of main.py: launchers start it again, a few times


class InUseError(TransientError):
    """Another process is at work there: nothing to mend, and it may end."""

    status = 4


def of_status(status: int) -> type[InputError]:
    """The kind of error that ends a run with a status."""
    kinds: tuple[type[InputError], ...] = (InputError, TransientError, InUseError)
    return next(kind for kind in kinds if kind.status == status)


def kind_of(error: Exception) -> type[InputError]:
    """Which of both a failed reading or writing is; by its words, as TensorStore gives no number.

    A full disk or a missing permission is the user's to mend.
    """
    passing = any(os.strerror(number) in str(error) for number in _PASSING)
    return TransientError if passing else InputError
