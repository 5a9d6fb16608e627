"""Which example stands at which place of the endless training stream, as pure arithmetic.

Nothing is read here and nothing is remembered: position -> (data set, index) follows from the sizes
and the seed alone, so that a run resumes anywhere with any number of processes and workers.
"""

import functools
from collections.abc import Sequence

import grain
import numpy as np

# Up to this size an order is stored; the cipher that makes larger ones on the fly, which costs
# microseconds and no memory, would take a millisecond for so few indices.
SMALL = 2**17


class Mixture:
    """One endless stream over several data sets; `mixture[position]` is (data set, index in it).

    An epoch has `len(mixture)` positions and shows, in its own order, `weight * size` examples of
    every data set; no example comes again before its data set is through. `shuffle` mixes freely
    (a concatenation, shuffled); `debiased` fills every global batch from one data set, with shares
    in proportion to weight * size (rounded to whole batches), against the model telling data sets
    apart instead of pairs (Cui et al. 2022, ZeroVL).
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
        """Every `size` turns are a permutation of range(size), each time another one."""
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
    """For every batch of an epoch: its data set, and how many of that set's batches came before."""
    owners = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng((seed, epoch)).shuffle(owners)
    turns = np.empty_like(owners)
    for owner, count in enumerate(counts):
        turns[owners == owner] = np.arange(count)
    return owners, turns
