"""Settings: frozen dataclasses whose fields declare default, meaning and range; reading them.

    @dataclasses.dataclass(frozen=True)
    class OptimConfig:
        lr: float = setting(3e-4, "peak learning rate", number(0, 100, above=True))

A file in configs/ changes an `ml_collections.ConfigDict` of these keys (`editable`), the command
line changes single keys (`overridden`), JSON stores plain values (`plain`). `typed` turns any of
these into the dataclass and checks it; the rest of the package sees only dataclasses. A class may
define `check(prefix)`, which raises a `UserError` when its fields contradict each other.
"""

import ast
import copy
import dataclasses
import difflib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from simseg_jax.runtime.errors import UserError, some
from simseg_jax.runtime.ranges import Accepts, shown

T = TypeVar("T")

# ---- declaring


def setting(default: Any, meaning: str, accepts: Accepts) -> Any:
    """A field with its default (which fixes the type), its meaning and the values it accepts."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "accepts": accepts})


def inherited(kind: type, name: str, default: Any) -> Any:
    """The field of a base class with another default."""
    return dataclasses.field(default=default, metadata=field_of(kind, name).metadata)


def group(kind: type) -> Any:
    """A field that holds settings of class `kind`."""
    return dataclasses.field(default_factory=kind, metadata={"group": kind})


def entries(kind: type) -> Any:
    """A field that holds any number of settings of class `kind`, each under its own name."""
    return dataclasses.field(default_factory=dict, metadata={"entries": kind})


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a nested mapping."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def declared(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted name, field) of every setting of a class; "<name>" stands for an entry's name."""
    for field in dataclasses.fields(kind):
        if "group" in field.metadata:
            yield from declared(field.metadata["group"], f"{prefix}{field.name}.")
        elif "entries" in field.metadata:
            yield from declared(field.metadata["entries"], f"{prefix}{field.name}.<name>.")
        else:
            yield prefix + field.name, field


def describe(kind: type) -> str:
    """All settings with default, range and meaning, as text for a command's help."""
    return "\n".join(
        f"  {name} = {field.default!r} ({field.metadata['accepts'].text})\n"
        f"      {field.metadata['meaning']}"
        for name, field in declared(kind)
    )


def field_of(kind: type, name: str) -> dataclasses.Field:
    """The declaration of one setting by its dotted name."""
    return dict(declared(kind))[name]


# ---- reading and writing


def editable(kind: type, **settings) -> ConfigDict:
    """The defaults with `settings` changed, for a file in configs/; it can add entries, not keys.

    Names and types are checked now, values when the file has been read.
    """
    config = ConfigDict(plain(_build(kind, settings, "", complete=False))).lock()
    _unlock_entries(kind, config)
    return config


def _unlock_entries(kind: type, config: Any) -> None:
    for field in dataclasses.fields(kind):
        if "group" in field.metadata:
            _unlock_entries(field.metadata["group"], config[field.name])
        elif "entries" in field.metadata:
            config[field.name].unlock()


def plain(settings: Any) -> dict[str, Any]:
    """Settings as nested dicts of numbers, strings and tuples."""
    return dataclasses.asdict(settings)


def to_json(settings: Any) -> str:
    """Settings as indented JSON."""
    return json.dumps(plain(settings), indent=2, sort_keys=True)


def typed(kind: type[T], values: Any, prefix: str = "") -> T:
    """Checked settings of class `kind` from a mapping; missing keys take their defaults.

    Raises a `UserError` for an unknown name (it suggests the nearest one) and for values of another
    type, out of range or contradicting each other. prefix: precedes the names in messages.
    """
    return checked(_build(kind, values, prefix, complete=False), prefix)


def checked(settings: T, prefix: str = "") -> T:
    """Returns `settings` after checking their values and whether they contradict each other."""
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        name, value = prefix + field.name, getattr(settings, field.name)
        if "group" in field.metadata:
            checked(value, f"{name}.")
        elif "entries" in field.metadata:
            for entry, content in value.items():
                checked(content, f"{name}.{entry}.")
        else:
            _check_type(value, field.default, name)
            if not field.metadata["accepts"].allows(value):
                raise UserError(f"{name}={shown(value)} must be {field.metadata['accepts'].text}.")
    if hasattr(settings, "check"):
        settings.check(prefix)  # type: ignore[attr-defined]
    return settings


def changed(settings: T, changes: Mapping[str, Any]) -> T:
    """A checked copy with other values at dotted names."""
    values = plain(settings)
    for name, value in changes.items():
        assign(values, name, value)
    return typed(type(settings), values)


def overridden(kind: type[T], values: dict[str, Any], arguments: Sequence[str]) -> T:
    """Settings from nested dicts with every key and from `--config.key=value` arguments."""
    return complete(kind, override(values, arguments))


def complete(kind: type[T], values: dict[str, Any]) -> T:
    """`typed` for nested dicts that must have every key."""
    return checked(_build(kind, values, "", complete=True))


def override(values: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of nested dicts with `--config.key=value` arguments applied; values are unchecked."""
    values = copy.deepcopy(values)
    for argument in arguments:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(
                f"Cannot read {shown(argument)}: overrides look like --config.key=value."
            )
        assign(values, name, text if isinstance(get(values, name), str) else literal(name, text))
    return values


def get(values: Mapping[str, Any], name: str) -> Any:
    """The value or group at a dotted name; a `UserError` suggests the nearest if it is unknown."""
    node: Any = values
    for key in name.split("."):
        if not isinstance(node, Mapping) or key not in node:
            raise UserError(unknown_key(name, [known for known, _ in leaves(values)]))
        node = node[key]
    return node


def assign(values: dict[str, Any], name: str, value: Any) -> None:
    """Sets the leaf at a dotted name; the value must have the type of the old one."""
    current = get(values, name)
    if isinstance(current, Mapping):
        raise UserError(f"{name} is a group of keys; set one of them: {some(current)}.")
    value = _converted(value, current)
    _check_type(value, current, name)
    parent, _, key = name.rpartition(".")
    (get(values, parent) if parent else values)[key] = value


def literal(name: str, text: str) -> Any:
    """The Python value of `text`, which the command line gives for `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About backslashes in strings.
            return ast.literal_eval(text)
    # Python's parser limits depth and size; {[]: 1} is a TypeError.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{name}={shown(text)} is not a Python value.") from error


def first_difference(old: Mapping, new: Mapping) -> tuple[str, Any, Any] | None:
    """(dotted name, old value, new value) of the first leaf that differs, or None."""
    before, after = dict(leaves(old)), dict(leaves(new))
    for key in {**after, **before}:
        if before.get(key) != after.get(key):
            return key, before.get(key), after.get(key)
    return None


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The message about an unknown key; it suggests the nearest known one."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0)
    return f"Unknown configuration key {shown(name)}" + (
        f"; the nearest is {near[0]!r}." if near else "."
    )


def _build(kind: type[T], values: Any, prefix: str, complete: bool) -> T:
    if isinstance(values, kind):
        return values
    _require_group(values, prefix.removesuffix("."))
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    missing = [key for key in fields if key not in values]
    if complete and missing:
        raise UserError(f"{prefix}{missing[0]} is missing: change keys, do not remove them.")
    found = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise UserError(unknown_key(name, [prefix + known for known in fields]))
        metadata = fields[key].metadata
        if "group" in metadata:
            found[key] = _build(metadata["group"], value, f"{name}.", complete)
        elif "entries" in metadata:
            found[key] = _build_entries(metadata["entries"], value, name, complete)
        else:
            found[key] = _converted(value, fields[key].default)
            _check_type(found[key], fields[key].default, name)
    return kind(**found)


def _require_group(values: Any, name: str) -> None:
    if not isinstance(values, Mapping):
        name = name or "The configuration"
        raise UserError(f"{name} must be a group of keys, not {shown(values)}.")


def _build_entries(kind: type[T], values: Any, name: str, complete: bool) -> dict[str, T]:
    _require_group(values, name)
    for entry in values:
        # Files are named after entries, too.
        if not isinstance(entry, str) or not re.fullmatch(r"[\w-]{1,100}", entry):
            raise UserError(
                f"{name}: a name has 1 to 100 letters, digits, _ or -, not {shown(entry)}."
            )
    return {
        entry: _build(kind, content, f"{name}.{entry}.", complete)
        for entry, content in values.items()
    }


def _check_type(value: Any, like: Any, name: str) -> None:
    if type(value) is not type(like):
        raise UserError(f"{name}={shown(value)} must be of type {type(like).__name__}.")
    if _is_floats(like) and not all(type(part) is float for part in value):
        raise UserError(f"{name}={shown(value)} must hold numbers only.")


def _is_floats(like: Any) -> bool:
    return isinstance(like, tuple) and bool(like) and isinstance(like[0], float)


def _converted(value: Any, like: Any) -> Any:
    """JSON has lists instead of tuples; whole numbers are accepted as floats."""
    if isinstance(like, tuple) and isinstance(value, list | tuple):
        parts = _tuples(value)
        return tuple(_converted(part, like[0]) for part in parts) if _is_floats(like) else parts
    if isinstance(like, float) and type(value) is int and abs(value) < 2**64:
        return float(value)
    return value


def _tuples(value: Any, depth: int = 3) -> Any:
    # No setting is nested deeper: a list that remains is rejected as out of range.
    if depth and isinstance(value, list | tuple):
        return tuple(_tuples(part, depth - 1) for part in value)
    return value
