"""Mistakes that the user can mend: their exception, its wording, how commands report it."""

import contextlib
import errno
import functools
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

NAMED = 5  # The most things that a message names; it counts the others.


class UserError(Exception):
    """Bad input or configuration: the message is one clear sentence that says what to do."""


def some(names: Iterable) -> str:
    """The first few names with commas between, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """An error or text in one line of at most `limit` characters; an empty one gives its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Turns every error of a library that reads an untrusted file into one `UserError`.

    what: names the file, "the vocabulary vocab.txt". advice: what to do, a sentence. A file-system
    error that names its file passes: commands report it as it is.
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


@contextlib.contextmanager
def writing(
    what: str,
    advice: Callable[[], str],
    errors: type[Exception] | tuple[type[Exception], ...] = OSError,
) -> Iterator[None]:
    """Turns errors of writing files into a `UserError`: "Cannot write WHAT: REASON. ADVICE".

    advice: called when there is one. errors: their types; libraries wrap what the operating system
    says in their own.
    """
    try:
        yield
    except UserError:
        raise
    except errors as error:
        reason = getattr(error, "strerror", "") or one_line(error, 100)
        raise UserError(f"Cannot write {what}: {reason}. {advice()}") from error


def report_user_errors(main):
    """Wraps a command's main function: what the user can mend ends it in one line, no traceback.

    These are a `UserError`, an error of the file system and too little memory, with the exit status
    2 of a wrong option: launchers need not try again. Ctrl-C ends with 130, output that nobody
    reads any longer with 141 and no message. Anything else is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            with _interruptible():
                try:
                    return main(*args, **kwargs)
                finally:
                    sys.stdout.flush()  # Python's own, at the very end, would complain.
        except KeyboardInterrupt:
            print("Stopped by Ctrl-C.", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _unread_output():
                sys.exit(141)
            message = _mendable(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)

    return wrapped


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    # Ctrl-C just ends a process that loads its libraries or winds up, see simseg_jax/__init__.py.
    bare = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if bare:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if bare:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _mendable(error: BaseException) -> str | None:
    """The message for the user; None if the error is a bug of this program."""
    if isinstance(error, UserError):
        return str(error)
    # Libraries wrap what the system said, and closing files after it may fail once more.
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = os.strerror(number)
        if any(getattr(e, "errno", None) == number or reason in str(e) for e in chain):
            names = [name for e in chain if (name := getattr(e, "filename", None))]
            name = f": {names[0]}" if names else ""
            return (
                f"{reason}{name}. What was finished before is kept: make room and run the same "
                "command again."
            )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO):
        return f"{error.strerror}."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"Out of memory ({one_line(error, 100)}). In training lower batch_size, set "
            "micro_batch, or remat=full; elsewhere lower the batch size or the resolution."
        )
    return None


def _unread_output() -> bool:
    """Whether nobody reads the output any longer, as after `| head`; if so it is discarded."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    gone = [number for number, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def require_file(path: Path, what: str, advice: str = "") -> Path:
    """`path` if it is a file, else a `UserError` that says what was looked for and where.

    advice: how to get the file, the end of the message.
    """
    if not path.is_file():
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{what[0].upper()}{what[1:]} is missing: no file {path}{advice}.")
    return path
