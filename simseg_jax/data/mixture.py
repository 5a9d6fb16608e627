"""The order of the endless training stream: position -> (data set, index), as pure arithmetic.

The order depends on the sizes of the data sets and the seed alone, so a run can resume at any
position with any number of processes and workers.

Grain's `mix` does not do the same: it interleaves data sets in a fixed pattern, and its epoch ends
when the first data set is exhausted.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np

# Larger permutations are not stored: Grain's cipher computes single elements in microseconds. For
# smaller ones it takes up to a millisecond, as it retries until a result is in range.
SMALL = 2**17


class Mixture:
    """An endless stream over several data sets; `mixture[position]` is (data set, index in it).

    An epoch has `len(mixture)` positions and shows `weight * size` examples of every data set, in a
    new order each time. No example is repeated before all of its data set have been shown. The mode
    `shuffle` shuffles the concatenation of the data sets. The mode `debiased` fills every global
    batch from one data set, in proportion to weight * size (rounded to whole batches): in a mixed
    batch a model can tell wrong pairs by their data sets (Cui et al. 2022, ZeroVL).
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], mode: str, batch_size: int, seed: int
    ):
        self.sizes, self.seed = tuple(sizes), seed
        self.batch_size, self.debiased = batch_size, mode == "debiased"
        unit = batch_size if self.debiased else 1
        shares = [weight * size / unit for size, weight in zip(sizes, weights, strict=True)]
        # The number of units (examples or batches) of every data set in an epoch.
        self.counts = [max(1, round(share)) for share in shares]
        self.bounds = np.cumsum([0, *self.counts])
        self.length = int(self.bounds[-1]) * unit

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if self.debiased:
            batch, offset = divmod(place, self.batch_size)
            owners, turns = _schedule(tuple(self.counts), self.seed, epoch)
            chosen = int(owners[batch])
            turn = (epoch * self.counts[chosen] + int(turns[batch])) * self.batch_size + offset
        else:
            slot = self._shuffled(position, self.length, stream=len(self.sizes))
            chosen = int(np.searchsorted(self.bounds, slot, side="right")) - 1
            turn = epoch * self.counts[chosen] + slot - int(self.bounds[chosen])
        return chosen, self._shuffled(turn, self.sizes[chosen], stream=chosen)

    def _shuffled(self, turn: int, size: int, stream: int) -> int:
        """Element `turn` of a stream of permutations of range(size), one after the other."""
        round_, index = divmod(turn, size)
        seed = _stream_seed(self.seed, stream, round_)
        if size <= SMALL:
            return int(_permutation(size, seed)[index])
        return grain.experimental.index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)


@functools.lru_cache(maxsize=256)
def _stream_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


@functools.lru_cache(maxsize=4)
def _schedule(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(data set of every batch of an epoch, its number among the batches of that data set)."""
    owners = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng((seed, epoch)).shuffle(owners)
    turns = np.empty_like(owners)
    for owner, count in enumerate(counts):
        turns[owners == owner] = np.arange(count)
    return owners, turns
