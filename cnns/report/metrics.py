"""What a network gets right and wrong, from its answers: numpy only, each figure with its source.

Where a figure is not defined, such as the recall of a class without examples, it is NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

NUM_BEST = 5  # classes that are kept of each answer
NUM_BINS = 15  # of confidence, as in Guo et al.
NONE = -1  # in place of a class, where the logits hold a NaN
UNEVEN = 1.5  # largest over smallest number of examples of a class, from which classes are uneven


@dataclass(frozen=True)
class Answers:
    """A network's answers to N examples, reduced to what a report needs of them."""

    index: np.ndarray  # (N,) int32, where they stand in the data set
    label: np.ndarray  # (N,) int32
    best: np.ndarray  # (N, K) int32, the K most probable classes, the first first; or NONE
    probabilities: np.ndarray  # (N, K) float32, theirs
    label_probability: np.ndarray  # (N,) float32

    @property
    def predicted(self) -> np.ndarray:
        return self.best[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        return self.probabilities[:, 0]

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.label

    def pack(self) -> np.ndarray:
        """All of it as (N, 3 + 2 K) int32."""
        columns = [getattr(self, field.name).view(np.int32) for field in fields(self)]
        return np.concatenate([c if c.ndim == 2 else c[:, None] for c in columns], axis=1)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Answers":
        """What `pack` made, in the order of the data set."""
        packed = packed[np.argsort(packed[:, 0], kind="stable")]
        k = (packed.shape[1] - 3) // 2
        whole, real = np.split(np.ascontiguousarray(packed), [2 + k], axis=1)
        real = np.ascontiguousarray(real).view(np.float32)
        return cls(whole[:, 0], whole[:, 1], whole[:, 2:], real[:, :k], real[:, k])


def reduce_logits(index: np.ndarray, label: np.ndarray, logits: np.ndarray) -> Answers:
    """The answers that are logits (N, C).

    Of equal logits the lower class ranks first, as where hits are counted. Where a logit is NaN no
    class is predicted; there, and where one is infinitely large, probabilities are NaN.
    """
    logits = np.asarray(logits, np.float32)
    rows, num_classes = np.arange(len(logits)), logits.shape[1]
    with np.errstate(invalid="ignore"):
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :NUM_BEST].astype(np.int32)
    of_best = probabilities[rows[:, None], best]
    best[np.isnan(logits).any(axis=1)] = NONE
    inside = (label >= 0) & (label < num_classes)
    of_label = np.where(inside, probabilities[rows, np.where(inside, label, 0)], np.nan)
    return Answers(
        index=np.asarray(index, np.int32),
        label=np.asarray(label, np.int32),
        best=best,
        probabilities=of_best.astype(np.float32),
        label_probability=of_label.astype(np.float32),
    )


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) != 0)


@dataclass(frozen=True)
class ClassFigures:
    """Of each class. A class's accuracy is its recall."""

    support: np.ndarray  # (C,) examples
    predicted: np.ndarray  # (C,) answers that name it
    hits: np.ndarray  # (C,) both
    precision: np.ndarray  # hits / predicted
    recall: np.ndarray  # hits / support
    f1: np.ndarray  # 2 hits / (support + predicted), the harmonic mean of the two

    def mean(self, figure: np.ndarray) -> float:
        """Over the classes that have examples; a precision that is not defined counts as 0."""
        return float(np.nan_to_num(figure[self.support > 0]).mean())

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the recalls of the classes that have examples.

        Brodersen et al. 2010, The balanced accuracy and its posterior distribution.
        """
        return self.mean(self.recall)

    @property
    def bounds(self) -> tuple[int, int]:
        """Examples of the smallest and the largest class, of those that have examples."""
        held = self.support[self.support > 0]
        return int(held.min()), int(held.max())

    @property
    def are_uneven(self) -> bool:
        low, high = self.bounds
        return high > UNEVEN * low


def class_figures(label: np.ndarray, predicted: np.ndarray, num_classes: int) -> ClassFigures:
    """Figures of each class, from labels and predicted classes (N,); NONE is none of them."""
    support = np.bincount(label, minlength=num_classes)
    named = np.bincount(predicted[predicted != NONE], minlength=num_classes)
    hits = np.bincount(label[label == predicted], minlength=num_classes)
    return ClassFigures(
        support=support,
        predicted=named,
        hits=hits,
        precision=divide(hits, named),
        recall=divide(hits, support),
        f1=divide(2 * hits, support + named),
    )


def confusion_cells(label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(M, 3) of label, predicted class and how many, where that is not 0, in that order."""
    pairs, counts = np.unique(np.stack([label, predicted], axis=1), axis=0, return_counts=True)
    return np.concatenate([pairs, counts[:, None]], axis=1)


def confusion_matrix(cells: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int32 of `confusion_cells`: labels are rows, predicted classes columns."""
    matrix = np.zeros((num_classes, num_classes), np.int32)
    label, predicted, count = cells[cells[:, 1] != NONE].T
    matrix[label, predicted] = count
    return matrix


def most_confused(cells: np.ndarray, limit: int) -> np.ndarray:
    """The cells (M, 3) off the diagonal with the most examples."""
    wrong = cells[(cells[:, 0] != cells[:, 1]) & (cells[:, 1] != NONE)]
    return wrong[np.argsort(-wrong[:, 2], kind="stable")[:limit]]


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from accuracy, in bins of confidence."""

    count: np.ndarray  # (B,) answers in each bin
    confidence: np.ndarray  # (B,) their mean
    accuracy: np.ndarray  # (B,) the share of them that is right

    @property
    def gaps(self) -> np.ndarray:
        return np.abs(self.accuracy - self.confidence)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean gap, weighted by the answers in each bin."""
        held = self.count > 0
        if not held.any():
            return float("nan")
        return float((self.gaps[held] * self.count[held]).sum() / self.count.sum())

    @property
    def largest_error(self) -> float:
        """Maximum calibration error: the largest gap of a bin."""
        held = self.count > 0
        return float(self.gaps[held].max()) if held.any() else float("nan")


def bin_edges(num_bins: int = NUM_BINS) -> np.ndarray:
    return np.arange(num_bins + 1) / num_bins


def calibrate(confidence: np.ndarray, right: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
    """Confidences (N,) and whether the answers are right (N,), in bins of equal width.

    Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599), section 2: bin m
    of M holds confidences in ((m - 1) / M, m / M]; one of 0 is put into the first. Answers whose
    confidence is NaN are in none.
    """
    known = ~np.isnan(confidence)
    confidence, right = confidence[known].astype(np.float64), right[known]
    number = np.searchsorted(bin_edges(num_bins), confidence, side="left") - 1
    number = number.clip(0, num_bins - 1)
    count = np.bincount(number, minlength=num_bins)
    return Calibration(
        count=count,
        confidence=divide(np.bincount(number, confidence, num_bins), count),
        accuracy=divide(np.bincount(number, right, num_bins), count),
    )


def confident_mistakes(answers: Answers, limit: int) -> Sequence[int]:
    """Rows of the wrong answers with the highest confidence, that first."""
    rows = np.flatnonzero(~answers.right & ~np.isnan(answers.confidence))
    return rows[np.argsort(-answers.confidence[rows], kind="stable")[:limit]].tolist()
