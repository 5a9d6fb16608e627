import numpy as np
import pytest
from support import tiny_eval, tiny_model

from simseg_jax.evaluators.localisation import masks_of_given, pointing_game
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.masks.postprocess import resize_nearest

MAPS = np.array(
    [
        [[9, 9], [9, 9]],
        [[0.1, 0.9], [0.2, 0.6]],  # In [0, 1]: 0, 1, 0.125, 0.625
        [[-0.4, -0.5], [-0.8, -0.9]],  # 1, 0.8, 0.2, 0
        [[0.3, 0.3], [0.3, 0.3]],  # Constant: nowhere.
    ],
    np.float32,
)
SCORES = np.array([5, 0.2, 0.1, 0.9], np.float32)


@pytest.mark.parametrize(
    ("shown", "scores", "background", "expected"),
    [
        ([1, 2], SCORES, True, [[2, 1], [0, 1]]),
        ([1, 2], -SCORES, True, [[2, 2], [0, 1]]),
        ([1, 2], 0 * SCORES, True, [[2, 1], [0, 1]]),  # Equal scores: the first class.
        ([1, 3], SCORES, True, [[0, 1], [0, 1]]),
        ([], SCORES, True, [[0, 0], [0, 0]]),
        ([2, 3], SCORES, False, [[3, 3], [3, 3]]),
        ([1, 3], SCORES, False, [[3, 1], [3, 1]]),
        ([], SCORES, False, [[0, 0], [0, 0]]),
    ],
)
def test_masks_of_given_classes(shown, scores, background, expected):
    labels = masks_of_given(MAPS, scores, np.array(shown, int), background)
    np.testing.assert_array_equal(labels, expected)


def test_pointing_game_by_hand():
    truth = np.zeros((4, 6), np.uint8)
    truth[:2, 3:] = 1  # Centres of patches are at rows 1, 3 and columns 1, 4.
    truth[1, 1] = 2
    found = pointing_game(MAPS, truth, np.array([1, 2]))
    np.testing.assert_array_equal(found, [[1, 1, 0], [2, 1, 1]])
    # The best patch of class 2, also the first in the middle, is ignored; the next shows class 1.
    truth[1, 1] = 255
    truth[3, 1] = 2
    found = pointing_game(MAPS, truth, np.array([1, 2]))
    np.testing.assert_array_equal(found, [[1, 1, 1], [2, 0, 0]])
    truth[:] = 255
    truth[0, 0] = 1  # Between the centres.
    assert pointing_game(MAPS, truth, np.array([1])).shape == (0, 3)


def test_middle_of_the_image():
    truth = np.kron([[1, 1, 1], [1, 2, 1], [1, 3, 1]], np.ones((8, 4))).astype(np.uint8)
    maps = np.zeros((4, 3, 3), np.float32)
    hits = pointing_game(maps, truth, np.array([1, 2, 3]))[:, 2]
    np.testing.assert_array_equal(hits, [0, 1, 0])
    truth[truth == 2] = 255  # A neighbour takes its place: the first one, above.
    hits = pointing_game(maps, truth, np.array([1, 3]))[:, 2]
    np.testing.assert_array_equal(hits, [1, 0])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("protocol", ["paper", "standard"])
def test_records_hold_both_measures(model, protocol):
    settings = tiny_eval(protocol=protocol, window=32, limit=6)
    other = tiny_eval(protocol=protocol, window=32, limit=6, m_text=2)
    evaluator = SegmentationEvaluator(model[0], settings, other)
    protocol = evaluator.engine.protocol
    found = {}
    for examples, _, responses in evaluator._run(model[1], range(6)):
        assert responses[1].maps is None
        for i, example in enumerate(examples):
            truth = example["mask"]
            maps = protocol.restore_maps(responses[0].maps[i], truth.shape)
            shown = np.unique(truth[truth > 0])
            labels = masks_of_given(maps, responses[0].scores[i], shown, background=True)
            labels = resize_nearest(labels, *truth.shape)
            found[example["name"]] = labels, truth, pointing_game(maps, truth, shown)
    records = list(evaluator.records(model[1]))
    assert len(records) == 6
    for record in records:
        labels, truth, points = found[record.name]
        for true, predicted, pixels in record.given:
            assert pixels == ((truth == true) & (labels == predicted)).sum() > 0
        assert record.given[:, 2].sum() == truth.size
        assert set(record.given[:, 1]) <= {0, *record.given[:, 0]}
        np.testing.assert_array_equal(record.points, points)
    assert sum(len(record.points) for record in records) > 6
