"""Dotted access to a nested configuration: typed assignment, unknown names, all leaves."""

import ast
import difflib
import warnings
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.ranges import shown


def leaves(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key below `config`."""
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def first_difference(old: dict, new: dict) -> tuple[str, Any, Any] | None:
    """(dotted key, old value, new value) of the first leaf that differs; None for equal ones."""
    before, after = dict(leaves(old)), dict(leaves(new))
    for key in {**after, **before}:
        if before.get(key) != after.get(key):
            return key, before.get(key), after.get(key)
    return None


def get(config: ConfigDict, name: str) -> Any:
    """The value or group at a dotted name; a `UserError` with the nearest name if there is none."""
    node = config
    for key in name.split("."):
        if not isinstance(node, ConfigDict) or key not in node:
            raise UserError(unknown_key(name, [known for known, _ in leaves(config)]))
        node = node[key]
    return node


def assign(config: ConfigDict, name: str, value) -> None:
    """Sets a key to a value of its default's type; whole numbers pass for floats."""
    current = get(config, name)
    expected = type(current)
    if isinstance(current, ConfigDict):
        raise UserError(f"{name} is a group of keys; set one of them: {some(current)}.")
    if expected is tuple and isinstance(value, list | tuple):
        value = _tuples(value)
    elif expected is float and type(value) is int and abs(value) < 2**64:
        value = float(value)
    elif type(value) is not expected:
        raise UserError(f"{name}={shown(value)} must be of type {expected.__name__}.")
    parent, _, key = name.rpartition(".")
    (get(config, parent) if parent else config)[key] = value


def literal(name: str, text: str) -> Any:
    """The Python value that the command line gives for `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of backslashes in strings.
            return ast.literal_eval(text)
    # Python's parser has limits of depth and size; {[]: 1} is a TypeError.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{name}={shown(text)} is not a Python value.") from error


def unknown_key(name: str, known: list[str]) -> str:
    """The message about an unknown key, with the nearest of the known ones."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0)
    return f"Unknown configuration key {shown(name)}" + (
        f"; the nearest is {near[0]!r}." if near else "."
    )


def _tuples(value, depth: int = 3):
    # Deeper than any key: what is left there has the wrong type.
    if depth and isinstance(value, list | tuple):
        return tuple(_tuples(part, depth - 1) for part in value)
    return value
