"""Uneven classes: how often each occurs, and the weights that make up for it."""

from collections.abc import Sequence

import numpy as np

from cnns.data.kinds import Arrays, Dataset, Shards
from cnns.data.records import RecordSource
from cnns.errors import UsageError
from cnns.jsonfile import Damaged, brief
from cnns.yamlfile import read_yaml

AUTO = "auto"


def labels_of(data: Dataset) -> np.ndarray:
    """The labels of all training images (N,); those of parts are read for it."""
    if isinstance(data, Arrays):
        return data.labels
    assert isinstance(data, Shards)
    return RecordSource(data, say=False).labels


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """N / (K n) for a class with n of N images, of K classes that have some: (C,) float32.

    So each class counts equally, and the mean over the images is 1: scikit-learn's `balanced`. A
    class without images has 1.
    """
    counts = np.bincount(labels[(labels >= 0) & (labels < num_classes)], minlength=num_classes)
    present = counts > 0
    weights = np.ones(num_classes)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights.astype(np.float32)


def read_class_weights(
    path: str, num_classes: int, classes: Sequence[str] | None, *, flag: str
) -> np.ndarray:
    """The weight of each class (C,) float32, of a YAML or JSON file.

    It has a list of all weights by label, or `class: weight` lines with the names or the labels of
    some, where all others have 1. Raises UsageError.
    """
    where = f"{flag}={path}"
    try:
        content = read_yaml(path)
    except (OSError, Damaged) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{where} cannot be read ({reason})") from None
    if isinstance(content, list):
        if len(content) != num_classes:
            raise UsageError(f"{where} has {len(content)} weights for {num_classes} classes")
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        raise UsageError(f"{where} has neither a list of weights nor lines `class: weight`")
    numbers = {str(label): label for label in range(num_classes)}
    numbers |= {name: label for label, name in enumerate(classes or ())}
    weights = np.ones(num_classes, np.float32)
    for key, value in content.items():
        if str(key) not in numbers:
            raise UsageError(f"{where}: {brief(key)} is not a class of the training data")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UsageError(
                f"{where}: the weight of {brief(key)} is {brief(value)}; a number above 0 is needed"
            )
        weights[numbers[str(key)]] = value
    return weights


def find_class_weights(
    choice: str | None, data: Dataset, *, num_classes: int, flag: str
) -> np.ndarray | None:
    """The weight of each class (C,) float32, `auto` or of a file; None: none. Raises UsageError."""
    if choice is None:
        return None
    if choice == AUTO:
        return balanced_weights(labels_of(data), num_classes)
    return read_class_weights(choice, num_classes, data.classes, flag=flag)
