"""The exception for mistakes a user can mend, and how the command lines report it."""

import functools
import sys
from pathlib import Path


class UserError(Exception):
    """Bad input or configuration: the message is one clear sentence that says what to do."""


def report_user_errors(main):
    """Wraps a command's main function: a `UserError` ends it with its message, no traceback.

    So does an error of the file system that names a file, such as a folder without permission. The
    exit status is 2, as for a wrong option: starting again would not help, which launchers use.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.strerror}: {error.filename}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return wrapped


def require_file(path: Path, what: str, advice: str = "") -> Path:
    """`path` if it is a file, else a `UserError` that says what was looked for and where.

    advice: how to get the file, the end of the message.
    """
    if not path.is_file():
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{what[0].upper()}{what[1:]} is missing: no file {path}{advice}.")
    return path
