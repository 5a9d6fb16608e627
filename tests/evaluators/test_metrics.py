import numpy as np
import pytest
from support import assert_close

from simseg_jax.evaluators.metrics import class_iou, confusion_matrix, mean_iou


def test_reference_case(golden):
    pairs = zip(golden["miou/pred"], golden["miou/gt"], strict=True)
    confusion = sum(confusion_matrix(p, t, 6) for p, t in pairs)
    assert_close(class_iou(confusion), golden["miou/iou"], 1e-12)


def test_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 255]])
    prediction = np.array([[0, 1, 1], [0, 1, 2]])
    confusion = confusion_matrix(prediction, truth, 4)
    np.testing.assert_array_equal(confusion[:2, :2], [[1, 1], [1, 1]])
    np.testing.assert_allclose(class_iou(confusion), [1 / 3, 1 / 3, np.nan, np.nan])
    assert mean_iou(class_iou(confusion)) == pytest.approx(1 / 3)


def test_labels_beyond_the_classes_are_an_error():
    with pytest.raises(ValueError, match="label 7"):
        confusion_matrix(np.zeros((1, 1), int), np.array([[7]]), 3)
