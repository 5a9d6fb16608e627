"""Errors that the user can correct: the exception, helpers for messages, how commands report it."""

import contextlib
import errno
import functools
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

NAMED = 5  # A message names at most this many things and counts the others.


class UserError(Exception):
    """Invalid input or configuration: the message says in one sentence what to do."""


def some(names: Iterable) -> str:
    """The first few names, separated by commas, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """An error or text in one line of at most `limit` characters; its type's name if empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Turns any error of a library that reads an untrusted file into a `UserError`.

    what: names the file, such as "the vocabulary vocab.txt". advice: a sentence that says what to
    do. File-system errors that name their file pass through: commands report them as they are.
    """
    try:
        yield
    except UserError:
        raise
    # For damaged and hostile files parsers raise errors of any kind, even RecursionError and
    # MemoryError.
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

    advice: called only after an error. errors: the types to catch; libraries wrap the operating
    system's errors in their own.
    """
    try:
        yield
    except UserError:
        raise
    except errors as error:
        reason = getattr(error, "strerror", "") or one_line(error, 100)
        raise UserError(f"Cannot write {what}: {reason}. {advice()}") from error


def report_user_errors(main):
    """Wraps a command's main function: errors that the user can correct are one line on stderr.

    These are `UserError`, file-system errors, too little memory and devices that do not start. The
    exit status is 2, as for an invalid option: launchers need not try again. Ctrl-C and, where it
    interrupts, SIGTERM exit with 130; a closed output pipe exits with 141 and no message. Anything
    else is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            with _interruptible():
                try:
                    return main(*args, **kwargs)
                finally:
                    sys.stdout.flush()  # Python's own flush at exit would print an error.
        except KeyboardInterrupt as interrupt:
            # Without a text it is Python's own; see `processes.keeping`.
            print(f"Stopped by {str(interrupt) or 'Ctrl-C'}.", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _unread_output():
                sys.exit(141)
            message = _correctable(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)

    return wrapped


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    # While imports run and at exit, Ctrl-C just ends the process, see simseg_jax/__init__.py.
    bare = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if bare:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if bare:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _correctable(error: BaseException) -> str | None:
    """The message for the user; None if the error is a bug of this program."""
    if isinstance(error, UserError):
        return str(error)
    # Libraries wrap the system's error, and closing the file afterwards may raise another one.
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
    if isinstance(error, RuntimeError) and str(error).startswith("Unable to initialize backend"):
        return one_line(error, 400)  # JAX_PLATFORMS is wrong, or the device is in use.
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"Out of memory ({one_line(error, 100)}). In training lower batch_size, set "
            "micro_batch, or remat=full; elsewhere lower the batch size or the resolution."
        )
    return None


def _unread_output() -> bool:
    """Whether the reader of the output is gone, as after `| head`; then output is discarded."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    gone = [number for number, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def require_file(path: Path, what: str, advice: str = "") -> Path:
    """`path` if it is a file, else a `UserError` that says what is missing and where.

    advice: how to get the file; it ends the message.
    """
    if not path.is_file():
        advice = f"; {advice}" if advice else ""
        raise UserError(f"{what[0].upper()}{what[1:]} is missing: no file {path}{advice}.")
    return path
