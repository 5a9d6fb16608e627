"""Host threads: how many there are, and computing results ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

# At most this many pixels are decoded ahead, unless a single image has more.
PIXELS_AHEAD = 1 << 26


def thread_count(configured: int) -> int:
    """The number of host threads: as configured; 0: one per core, at most 32."""
    return configured or min(32, os.cpu_count() or 1)


def ahead(
    pool: Executor,
    function: Callable,
    items: Iterable,
    depth: int,
    pixels: Callable[[Any], int] = lambda _item: 0,
) -> Iterator:
    """Results of `function` in order, computed by the pool up to `depth` items in advance.

    pixels: the number of pixels of an item. The items in advance have at most PIXELS_AHEAD
    together, except that a single larger one is allowed.
    """
    futures: deque[tuple[Future, int]] = deque()
    total = 0
    for item in items:
        size = pixels(item)
        while futures and (len(futures) == depth or total + size > PIXELS_AHEAD):
            future, done = futures.popleft()
            yield future.result()
            total -= done
        futures.append((pool.submit(function, item), size))
        total += size
    while futures:
        yield futures.popleft()[0].result()
