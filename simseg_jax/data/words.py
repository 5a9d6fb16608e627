"""The words that a user gives: from the command line, checked, told apart by the vocabulary."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from simseg_jax.data.text import TextEncoder
from simseg_jax.runtime.errors import UserError, one_line, some

# Separators and quotes of other programs, which the command line refuses.
ODD = set(';\n\t"“”，、；')  # noqa: RUF001


def split_words(text: str) -> list[str]:
    """The words of a comma-separated text, stripped of spaces; an empty text has none.

    A `UserError` refuses bytes that are not UTF-8, and characters of `ODD`, which could belong to a
    word or separate two.
    """
    with contextlib.suppress(UnicodeError):  # Without a UTF-8 locale the bytes are not decoded yet.
        text = os.fsencode(text).decode()
    try:
        text.encode()
    except UnicodeError as error:
        raise UserError("The words are no text in UTF-8: set LC_ALL=C.UTF-8.") from error
    odd = next((character for character in text if character in ODD), None)
    if odd is not None:
        raise UserError(
            f"{odd!r} in {one_line(text, 60)!r} may belong to a word or stand between two: write "
            "commas between the words, without quotes."
        )
    return [word.strip() for word in text.split(",")] if text.strip() else []


def check_words(words: Sequence[str], what: str = "words") -> tuple[str, ...]:
    """The words with single spaces; a string is one word.

    A `UserError` refuses values that are not words, repeated words and "background".
    """
    if isinstance(words, str):
        if "," in words:
            raise UserError(
                f"{what}={words!r} is one string with a comma: give a list, either "
                f"{split_words(words)!r} or, for one phrase, [{words!r}]."
            )
        words = [words]
    words = tuple(words) if isinstance(words, Iterable) else (words,)
    for word in words:
        if not isinstance(word, str) or not word.strip() or _has_surrogates(word):
            raise UserError(f"{what} are texts that are not empty, not {word!r}: leave it out.")
    words = tuple(" ".join(word.split()) for word in words)
    if not words and what == "words":
        raise UserError('Give at least one word to look for, for example --words="dog, grass".')
    repeated = [word for word, count in Counter(words).items() if count > 1]
    if repeated:
        raise UserError(f"The same word is given twice: {some(repeated)}.")
    if "background" in words:
        raise UserError('Leave out "background": it is every pixel that no word claims.')
    return words


def _has_surrogates(word: str) -> bool:
    """Whether a text has lone surrogates, which cannot be encoded as UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in word)


def token_ids(encoder: TextEncoder, word: str) -> bytes:
    """What the model sees of a word; equal for words that it cannot tell apart."""
    return encoder(word)[0].tobytes()


def distinct(encoder: TextEncoder, words: Sequence[str]) -> dict[bytes, str]:
    """Token ids -> word; a `UserError` refuses words that the model cannot tell apart."""
    seen: dict[bytes, str] = {}
    for word in words:
        ids = token_ids(encoder, word)
        if ids in seen:
            raise UserError(
                f"{word!r} is in words and in contrast: leave it out of one of them."
                if seen[ids] == word
                else f"{seen[ids]!r} and {word!r} are the same to this model's vocabulary: leave "
                "one of them out of words and contrast."
            )
        seen[ids] = word
    return seen
