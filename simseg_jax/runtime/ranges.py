"""Valid values of settings: a test, and the words that complete "KEY=VALUE must be"."""

from collections.abc import Callable
from typing import Any, NamedTuple

from simseg_jax.runtime.errors import one_line

LARGEST = 2**31 - 1  # The largest int32, the type in which JAX counts.


class Accepts(NamedTuple):
    """The values that a setting accepts. choices: all of them, where they can be listed."""

    text: str
    allows: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def shown(value: Any) -> str:
    """Any value as a message quotes it, in one short line."""
    try:
        return one_line(repr(value), 80)
    # Python refuses to format numbers of thousands of digits and deeply nested lists.
    except (ValueError, RecursionError):
        return "(too long to show)"


def one_of(*choices: str) -> Accepts:
    """One of these words."""
    return Accepts(f"one of: {', '.join(choices)}", lambda value: value in choices, choices)


def whole(low: int, high: int = LARGEST) -> Accepts:
    """A whole number from `low` to `high`, both included."""
    return Accepts(
        f"a whole number from {low} to {high:,}",
        lambda value: type(value) is int and low <= value <= high,
    )


def number(low: float, high: float, above: bool = False, below: bool = False) -> Accepts:
    """A finite number from `low` to `high`; `above` excludes `low`, `below` excludes `high`."""
    start = f"above {low:g}" if above else f"from {low:g}"
    end = f"below {high:g}" if below else f"up to {high:g}" if above else f"to {high:g}"

    # Comparisons are exact for whole numbers of any length, and false for NaN.
    def allows(value: Any) -> bool:
        if type(value) not in (int, float) or not low <= value <= high:
            return False
        return not ((above and value == low) or (below and value == high))

    return Accepts(f"a number {start}{',' if above or below else ''} {end}", allows)


def several(each: Accepts, counts: range, what: str, ordered: bool = False) -> Accepts:
    """A tuple of `each`; counts: its valid lengths; ordered: its elements must not decrease."""

    def allows(values: Any) -> bool:
        return (
            len(values) in counts
            and all(map(each.allows, values))
            and (not ordered or list(values) == sorted(values))
        )

    return Accepts(f"{what}, each {each.text}", allows)


def pair(each: Accepts) -> Accepts:
    """The two ends of a range, in order."""
    return several(each, range(2, 3), "two numbers, the smaller first", ordered=True)


# The upper bounds lie far above sensible values. They keep mistakes (a digit too many, a value for
# another key) from costing hours or all of the memory.
SEED = whole(0, 2**32 - 1)  # What both NumPy and JAX take.
BATCH = whole(1, 2**20)
SIDE = whole(1, 4096)  # In pixels.
RESPONSES = whole(1, 256)
THREADS = whole(0, 256)
SCENES = whole(1, 10**8)
DECAY = number(0, 10)
BELOW_ONE = number(0, 1, below=True)
LEARNING_RATE = number(0, 100, above=True)
SHARE = number(0, 1)
FLAG = Accepts("True or False", lambda value: isinstance(value, bool))
TEXT = Accepts("text", lambda value: "\0" not in value)
