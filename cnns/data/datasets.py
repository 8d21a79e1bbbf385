"""Data sets as the scripts open them: parts or arrays, counted and checked."""

import itertools
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cnns.data.checks import Shards, check_shards, part_num_flag
from cnns.data.format import MAX_CLASSES
from cnns.errors import RunError, UsageError


def read_npz(path: str, *, flag: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) uint8 and labels (N,) int32 of an .npz file.

    Raises UsageError where there is no such file, RunError where it holds something else.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{flag}: there is no file {path}; check the path")
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is not a readable .npz file: numpy.savez makes one")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise RunError(f"{path} must hold `images` and `labels`: {error.args[0]}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is not a readable .npz file: {error}") from None
    right_shape = images.ndim == 4 and images.shape[3] == 3 and min(images.shape[1:]) > 0
    if not right_shape or images.dtype != np.uint8:
        raise RunError(
            f"{path}: `images` is {images.shape} {images.dtype}; (N, H, W, 3) uint8 is needed"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise RunError(
            f"{path}: `labels` is {labels.shape} {labels.dtype}; ({len(images)},) integers are "
            "needed"
        )
    if len(images) == 0:
        raise RunError(f"{path} holds no images")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise RunError(
            f"{path}: labels run from {labels.min()} to {labels.max()}; 0, 1, ... needed"
        )
    return images, labels.astype(np.int32)


@dataclass(frozen=True)
class Dataset:
    """A data set that has been checked: what a flag named, before any loader opens it."""

    source: Shards | tuple[np.ndarray, np.ndarray]
    available: int  # examples in what is read
    num_examples: int  # examples to use, the first so many
    num_classes: int | None  # if known
    classes: tuple[str, ...] | None  # names, if known
    max_label: int | None  # the largest there is, if known

    def fingerprint(self) -> dict:
        """What two nodes compare to see whether they have the same data."""
        if isinstance(self.source, Shards):
            content = repr(self.source.part_counts).encode()
        else:
            content = b"".join(array.tobytes() for array in self.source)
        return {
            "examples": self.num_examples,
            "classes": self.num_classes,
            "checksum": zlib.crc32(content),
        }


def open_train_dataset(
    path: str, *, part_num: int | None = None, num_examples: int | None = None
) -> Dataset:
    """Check the training data at `path`. Epochs are `num_examples` long, over all the parts.

    Raises as `check_shards` and `read_npz`, and UsageError if `num_examples` is more than there is.
    """
    return _open_dataset(
        path,
        flag="--train_data_dir",
        part_num=part_num,
        count_flag="--num_examples",
        num_examples=num_examples,
    )


def open_val_dataset(
    path: str, *, part_num: int | None = None, num_examples: int | None = None
) -> Dataset:
    """Check the validation data at `path`, of which the first `num_examples` are scored.

    Parts behind those are left out, so that they are not read for nothing. Raises as
    `open_train_dataset`.
    """
    data = _open_dataset(
        path,
        flag="--val_data_dir",
        part_num=part_num,
        count_flag="--num_val_examples",
        num_examples=num_examples,
    )
    if isinstance(data.source, Shards):
        source = data.source.holding(data.num_examples)
        return replace(data, source=source, available=source.num_examples)
    images, labels = (array[: data.num_examples] for array in data.source)
    return replace(data, source=(images, labels), available=data.num_examples)


def _open_dataset(
    path: str, *, flag: str, part_num: int | None, count_flag: str, num_examples: int | None
) -> Dataset:
    if path.endswith(".npz"):
        if part_num is not None:
            raise UsageError(f"{part_num_flag(flag)} has no effect on {path}; leave it out")
        source = images, labels = read_npz(path, flag=flag)
        available, max_label, classes = len(images), int(labels.max()), None
        num_classes = max_label + 1
    else:
        source = check_shards(path, flag=flag, part_num=part_num)
        available, max_label, classes = source.num_examples, source.max_label, source.classes
        num_classes = source.num_classes
    if num_examples is not None and num_examples > available:
        raise UsageError(
            f"{count_flag}={num_examples}, but {path} holds {available}; give at most that, or "
            "leave the flag out"
        )
    return Dataset(
        source=source,
        available=available,
        num_examples=num_examples or available,
        num_classes=num_classes,
        classes=classes,
        max_label=max_label,
    )


def check_shares(dataset: Dataset, *, num_processes: int, path: str) -> list[str]:
    """Raise UsageError where training data cannot be shared out among so many processes.

    Returns a notice where the shares are so unequal that an epoch, which is as long for each of
    them, leaves out more than 1 % of the images.
    """
    if not isinstance(dataset.source, Shards):
        return []
    counts = dataset.source.part_counts
    num_parts = len(counts)
    if num_parts < num_processes:
        raise UsageError(
            f"--train_data_dir: {path} has {num_parts} parts to read, and each of {num_processes} "
            "processes needs one of its own; make the data set anew with more (--num_parts)"
        )
    cuts = split_evenly(counts, num_processes)
    shares = [sum(counts[a:b]) for a, b in itertools.pairwise(cuts)]
    mean = sum(counts) / num_processes
    missed = sum(max(0, share - mean) for share in shares) / sum(counts)
    if missed <= 0.01:
        return []
    return [
        f"{path}: {num_parts} parts cannot be shared out evenly among {num_processes} processes; "
        f"each epoch leaves out about {missed:.0%} of the images, others each time, and repeats as "
        "many. A multiple of the processes, or many more parts (--num_parts), would mend that."
    ]


def check_labels(dataset: Dataset, *, num_classes: int, path: str) -> None:
    """Raise UsageError where the data set is known to have labels that the network has not."""
    needed = dataset.num_classes
    if needed is None and dataset.max_label is not None:
        needed = dataset.max_label + 1
    if needed is not None and needed > num_classes:
        raise UsageError(
            f"--num_classes={num_classes}, but {path} has labels up to {needed - 1}; give at least "
            f"--num_classes={needed}"
        )


def split_evenly(counts: Sequence[int], num_shares: int) -> list[int]:
    """Cut a row of parts into shares with about as many records each.

    Share i is parts `cuts[i]` to `cuts[i + 1]`. None is empty unless there are fewer parts than
    shares.

    >>> split_evenly([5, 3, 4, 2], 2)
    [0, 2, 4]
    """
    ends = np.cumsum(counts)
    middles = ends - np.asarray(counts) / 2
    cuts = [0]
    for i in range(1, num_shares):
        cut = int((middles < ends[-1] * i / num_shares).sum())
        if len(counts) >= num_shares:
            cut = min(max(cut, cuts[-1] + 1), len(counts) - (num_shares - i))
        cuts.append(cut)
    return [*cuts, len(counts)]
