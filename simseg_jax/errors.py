"""The exception for mistakes a user can mend, how it is worded, how the command lines report it."""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

NAMED = 5  # So many things a message names; of more it gives the number.


class UserError(Exception):
    """Bad input or configuration: the message is one clear sentence that says what to do."""


def some(names: Iterable) -> str:
    """The first few names with commas between, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """What an error says in one line of at most `limit` characters; without words, its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever a library raises while it reads a file of others into one `UserError`.

    what: names the file, "the vocabulary vocab.txt". advice: what to do, a sentence. An error of
    the file system that names the file passes, as a command reports it by itself.
    """
    try:
        yield
    except UserError:
        raise
    # Parsers meet damaged and hostile files with errors of any kind, RecursionError and
    # MemoryError among them.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"Cannot read {what}: {one_line(error)}. {advice}".rstrip()) from error


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
