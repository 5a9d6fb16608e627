from collections import Counter

import numpy as np
import pytest
from scipy import stats

from simseg_jax.data.mixture import Mixture

SIZES = (100, 37, 1000)


def epoch(mixture, number):
    return [mixture[number * len(mixture) + i] for i in range(len(mixture))]


def test_shuffled_epochs_are_permutations_of_all_data_sets():
    mixture = Mixture(SIZES, (1, 1, 1), "shuffle", 16, seed=3)
    everything = sorted((s, i) for s, size in enumerate(SIZES) for i in range(size))
    first, second = epoch(mixture, 0), epoch(mixture, 1)
    assert len(mixture) == sum(SIZES)
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert first != epoch(Mixture(SIZES, (1, 1, 1), "shuffle", 16, seed=4), 0)


def test_weights_scale_what_an_epoch_shows():
    mixture = Mixture(SIZES, (2, 1, 0.5), "shuffle", 16, seed=0)
    first = Counter(epoch(mixture, 0))
    shown = Counter(chosen for chosen, _ in first.elements())
    assert shown == {0: 200, 1: 37, 2: 500}
    assert set(first.values()) == {1, 2}
    # The half that was left out comes in the next epoch.
    both = first + Counter(epoch(mixture, 1))
    assert all(both[2, index] == 1 for index in range(1000))
    assert all(both[0, index] == 4 for index in range(100))


def test_debiased_batches_come_from_one_data_set_in_proportion():
    mixture = Mixture(SIZES, (1, 1, 1), "debiased", 10, seed=0)
    assert len(mixture) == 10 * (10 + 4 + 100)
    stream = epoch(mixture, 0) + epoch(mixture, 1)
    batches = [stream[i : i + 10] for i in range(0, len(stream), 10)]
    owners = [{chosen for chosen, _ in batch} for batch in batches]
    assert all(len(owner) == 1 for owner in owners)
    counts = Counter(next(iter(owner)) for owner in owners[:114])
    assert counts == {0: 10, 1: 4, 2: 100}
    assert owners[:114] != owners[114:]
    # Nothing is repeated before its data set is through, over the ends of epochs too.
    for chosen, size in enumerate(SIZES):
        indices = [index for owner, index in stream if owner == chosen]
        rounds = [indices[i : i + size] for i in range(0, len(indices) - size + 1, size)]
        assert rounds
        assert all(sorted(r) == list(range(size)) for r in rounds)


def test_order_has_no_structure():
    """Spread evenly over the places of an epoch (chi-square), stored orders and the cipher."""
    mixture = Mixture((30_000, 170_000), (1, 1), "shuffle", 64, seed=0)
    stream = np.array(epoch(mixture, 0))
    table = np.array([np.bincount(part[:, 0]) for part in np.split(stream, 20)])
    assert stats.chi2_contingency(table).pvalue > 1e-4
    second = stream[stream[:, 0] == 1][:, 1]
    table, _, _ = np.histogram2d(np.arange(len(second)), second, (20, 20))
    assert stats.chi2_contingency(table).pvalue > 1e-4
    # Neighbours in the stream are no neighbours in the data set.
    assert abs(stats.pearsonr(second[:-1], second[1:]).statistic) < 0.02


@pytest.mark.parametrize("mode", ["shuffle", "debiased"])
def test_tiny_data_sets(mode):
    mixture = Mixture((1, 3), (1, 0.1), mode, 4, seed=0)
    stream = [mixture[i] for i in range(100)]
    assert {chosen for chosen, _ in stream} == {0, 1}
    assert all(0 <= index < (1, 3)[chosen] for chosen, index in stream)
