"""Opens data sets: parts or arrays, counted and checked."""

import os
import zipfile
import zlib
from dataclasses import replace

import numpy as np

from cnns.data.checks import check_shards, part_num_flag
from cnns.data.format import MAX_CLASSES
from cnns.data.kinds import Arrays, Dataset
from cnns.errors import RunError, UsageError


def read_npz(path: str, *, flag: str) -> Arrays:
    """The `images` (N, H, W, 3) uint8 and `labels` (N,) of an .npz file.

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
    largest = int(labels.max())
    return Arrays(
        path=path,
        images=images,
        labels=labels.astype(np.int32),
        num_examples=len(images),
        num_classes=largest + 1,
        max_label=largest,
    )


def open_train_dataset(
    path: str, *, part_num: int | None = None, num_examples: int | None = None
) -> Dataset:
    """Check the training data at `path`. Epochs are `num_examples` long, over all the parts.

    Raises as `check_shards` and `read_npz`, and UsageError if `num_examples` is more than there is.
    """
    return _open_dataset("train", path, part_num, num_examples, count_flag="--num_examples")


def open_val_dataset(
    path: str, *, part_num: int | None = None, num_examples: int | None = None
) -> Dataset:
    """Check the validation data at `path`, of which the first `num_examples` are scored.

    Parts behind those are left out, so that they are not read for nothing. Raises as
    `open_train_dataset`.
    """
    data = _open_dataset("val", path, part_num, num_examples, count_flag="--num_val_examples")
    return data.only_needed()


def _open_dataset(
    use: str, path: str, part_num: int | None, num_examples: int | None, *, count_flag: str
) -> Dataset:
    flag = f"--{use}_data_dir"
    data: Dataset
    if path.endswith(".npz"):
        if part_num is not None:
            raise UsageError(f"{part_num_flag(flag)} has no effect on {path}; leave it out")
        data = read_npz(path, flag=flag)
    else:
        data = check_shards(path, flag=flag, part_num=part_num)
    if num_examples is None:
        return data
    if num_examples > data.num_examples:
        raise UsageError(
            f"{count_flag}={num_examples}, but {path} holds {data.num_examples}; give at most "
            "that, or leave the flag out"
        )
    return replace(data, num_examples=num_examples)
