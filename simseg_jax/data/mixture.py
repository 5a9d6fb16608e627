"""The order of the endless training stream: position -> (data set, index), as pure arithmetic.

The order follows from the sizes of the data sets and the seed alone, so a run resumes anywhere with
any number of processes and workers.

Grain's `mix` is no replacement: it interleaves data sets in a fixed pattern, and its epoch ends
where the first data set is exhausted.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np

# Larger permutations are not stored: Grain's cipher computes single elements in microseconds. It
# retries until a result is in range, which takes a millisecond for a small size.
SMALL = 2**17


class Mixture:
    """One endless stream over several data sets; `mixture[position]` is (data set, index in it).

    An epoch has `len(mixture)` positions and shows, in its own order, `weight * size` examples of
    every data set; no example is repeated before all of its data set were shown. `shuffle` shuffles
    the concatenation of the data sets. `debiased` fills every global batch from one data set, with
    shares in proportion to weight * size (rounded to whole batches): in a mixed batch a model can
    tell wrong pairs by their data set (Cui et al. 2022, ZeroVL).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        mode: str,
        batch_size: int,
        seed: int,
    ):
        self.sizes, self.seed = tuple(sizes), seed
        self.batch_size, self.debiased = batch_size, mode == "debiased"
        unit = batch_size if self.debiased else 1
        shares = [weight * size / unit for size, weight in zip(sizes, weights, strict=True)]
        # Units (examples or batches) of every data set in an epoch.
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
        """A permutation of range(size), another one for every `size` turns."""
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
    """For every batch of an epoch: its data set, and its number among that data set's batches."""
    owners = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng((seed, epoch)).shuffle(owners)
    turns = np.empty_like(owners)
    for owner, count in enumerate(counts):
        turns[owners == owner] = np.arange(count)
    return owners, turns
