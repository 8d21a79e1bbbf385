"""cnns/report/metrics.py: hand-made values, and slow definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnns.report.metrics import (
    NONE,
    Answers,
    calibrate,
    class_figures,
    confident_mistakes,
    confusion_cells,
    confusion_matrix,
    most_confused,
    reduce_logits,
)

NAN = math.nan
LABEL = np.array([0, 0, 0, 0, 1, 1, 3])
PREDICTED = np.array([0, 0, 1, NONE, 1, 0, 1])  # class 2 is nowhere, 3 is never predicted


def test_figures_of_classes_by_hand():
    figures = class_figures(LABEL, PREDICTED, 4)
    np.testing.assert_array_equal(figures.support, [4, 2, 0, 1])
    np.testing.assert_array_equal(figures.predicted, [3, 3, 0, 0])
    np.testing.assert_array_equal(figures.hits, [2, 1, 0, 0])
    np.testing.assert_array_equal(figures.recall, [0.5, 0.5, NAN, 0])
    np.testing.assert_allclose(figures.precision, [2 / 3, 1 / 3, NAN, NAN])
    np.testing.assert_allclose(figures.f1, [4 / 7, 2 / 5, NAN, 0])
    assert figures.balanced_accuracy == pytest.approx(1 / 3)
    assert figures.mean(figures.precision) == pytest.approx(1 / 3)
    assert figures.bounds == (1, 4) and figures.are_uneven


@pytest.mark.parametrize("supports, uneven", [((2, 3), False), ((0, 3), False), ((2, 4), True)])
def test_when_classes_are_uneven(supports, uneven):
    label = np.repeat([0, 1], supports)
    assert class_figures(label, label, 2).are_uneven == uneven


def test_confusion_by_hand():
    cells = confusion_cells(LABEL, PREDICTED)
    assert cells.tolist() == [
        [0, NONE, 1],
        [0, 0, 2],
        [0, 1, 1],
        [1, 0, 1],
        [1, 1, 1],
        [3, 1, 1],
    ]
    matrix = confusion_matrix(cells, 4)
    assert matrix.dtype == np.int32
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert most_confused(cells, 2).tolist() == [[0, 1, 1], [1, 0, 1]]


def test_calibration_by_hand():
    """Two bins: (0, 0.5] holds an edge, and 1.0 is in the last."""
    confidence = np.array([0.3, 0.5, 0.75, 1.0, NAN], np.float32)
    right = np.array([True, False, True, True, True])
    result = calibrate(confidence, right, 2)
    assert result.count.tolist() == [2, 2]
    np.testing.assert_allclose(result.confidence, [0.4, 0.875], rtol=1e-6)
    assert result.accuracy.tolist() == [0.5, 1.0]
    assert result.expected_error == pytest.approx((0.1 * 2 + 0.125 * 2) / 4)
    assert result.largest_error == pytest.approx(0.125)
    assert math.isnan(calibrate(confidence[4:], right[4:]).expected_error)


def test_answers_of_logits():
    logits = np.log([[0.1, 0.2, 0.7], [0.4, 0.4, 0.2], [0.25, 0.5, 0.25]])
    logits = np.concatenate([logits, [[0, NAN, 9], [0, math.inf, 1]]])
    answers = reduce_logits(np.arange(5), np.array([2, 1, 5, 0, 1]), logits)
    assert answers.best.tolist() == [[2, 1, 0], [0, 1, 2], [1, 0, 2], [NONE] * 3, [1, 2, 0]]
    np.testing.assert_allclose(answers.probabilities[:2], [[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], 1e-6)
    # A label outside of the classes, which the evaluation refuses, has no probability.
    np.testing.assert_allclose(answers.label_probability, [0.7, 0.4, NAN, NAN, NAN], 1e-6)
    assert np.isnan(answers.probabilities[3:]).all()
    assert answers.right.tolist() == [True, False, False, False, True]
    assert confident_mistakes(answers, 5) == [2, 1]
    assert confident_mistakes(answers, 1) == [2]


def test_answers_of_several_processes_come_back_in_order():
    rng = np.random.default_rng(0)
    whole = reduce_logits(np.arange(12), rng.integers(0, 7, 12), rng.normal(size=(12, 7)))
    packed = whole.pack()
    assert packed.dtype == np.int32 and packed.shape == (12, 13)
    back = Answers.unpack(np.concatenate([packed[8:], packed[:0], packed[:8]]))
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(back, name), value)
        assert getattr(back, name).dtype == value.dtype


PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(NONE, 5)), min_size=1, max_size=40)


@given(PAIRS)
def test_figures_as_their_definitions(pairs):
    label, predicted = np.array(pairs).T
    figures = class_figures(label, predicted, 6)
    cells = confusion_cells(label, predicted)
    matrix = confusion_matrix(cells, 6)
    recalls = []
    for c in range(6):
        true = sum(a == b == c for a, b in pairs)
        missed = sum(a == c != b for a, b in pairs)
        false = sum(a != c == b for a, b in pairs)
        recall = true / (true + missed) if true + missed else NAN
        precision = true / (true + false) if true + false else NAN
        f1 = 2 * true / (2 * true + missed + false) if true + missed + false else NAN
        np.testing.assert_allclose(figures.recall[c], recall)
        np.testing.assert_allclose(figures.precision[c], precision)
        np.testing.assert_allclose(figures.f1[c], f1)
        recalls += [recall] if true + missed else []
        for other in range(6):
            assert matrix[c, other] == pairs.count((c, other))
    assert figures.balanced_accuracy == pytest.approx(sum(recalls) / len(recalls))
    assert cells[:, 2].sum() == len(pairs)


@given(
    st.lists(
        st.tuples(
            # Edges of the bins too, where a confidence belongs to the lower one.
            st.floats(0, 1, width=32) | st.sampled_from([k / 15 for k in range(16)]),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_calibration_as_its_definition(answers):
    confidence, right = (np.array(column) for column in zip(*answers, strict=True))
    total = largest = 0.0
    for m in range(1, 16):
        bin_ = [(c, r) for c, r in answers if (m - 1) / 15 < c <= m / 15 or (m == 1 and c == 0)]
        if bin_:
            accuracy = sum(r for _, r in bin_) / len(bin_)
            gap = abs(accuracy - math.fsum(c for c, _ in bin_) / len(bin_))
            total += len(bin_) / len(answers) * gap
            largest = max(largest, gap)
    result = calibrate(confidence, right)
    assert result.expected_error == pytest.approx(total, abs=1e-9)
    assert result.largest_error == pytest.approx(largest, abs=1e-9)
