"""Opens data sets: parts or arrays, counted and checked."""

import math
import os
import zipfile
from dataclasses import replace

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from cnns.data.checks import check_shards, part_num_flag
from cnns.data.format import MAX_CLASSES
from cnns.data.kinds import Arrays, Dataset
from cnns.errors import RunError, UsageError
from cnns.hints import path_hint
from cnns.inputs import open_input, unpacked_limit


def check_sizes(path: str) -> None:
    """Raise ValueError where an array of an .npz file claims another size than it has.

    numpy makes room for what a header claims before it reads on.
    """
    limit = unpacked_limit(os.path.getsize(path))
    with zipfile.ZipFile(path) as archive:
        for name in ("images.npy", "labels.npy"):
            info = archive.getinfo(name)
            if info.file_size > limit:
                raise ValueError(f"{name} claims to be {info.file_size} bytes, unpacked")
            with archive.open(info) as file:
                read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
                version = read_magic(file)
                if version not in read:
                    raise ValueError(f"{name} is of the unknown version {version}")
                shape, _, dtype = read[version](file)
                needed = math.prod(shape) * dtype.itemsize
                if min(shape, default=0) < 0 or needed != info.file_size - file.tell():
                    raise ValueError(f"{name} claims to be {shape} {dtype}, and is not so large")


def read_npz(path: str, *, flag: str) -> Arrays:
    """The `images` (N, H, W, 3) uint8 and `labels` (N,) of an .npz file.

    Raises UsageError where there is no such file, RunError where it holds something else.
    """
    if not os.path.exists(path):
        raise UsageError(f"{flag}: there is no file {path}; {path_hint(path)}")
    try:
        open_input(path).close()
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror}") from None
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is not a readable .npz file: numpy.savez makes one")
    try:
        check_sizes(path)
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise RunError(f"{path} must hold `images` and `labels`: {error.args[0]}") from None
    except Exception as error:  # zipfile's and numpy's readers raise many kinds on a broken file
        reason = str(error) or type(error).__name__
        raise RunError(f"{path} is not a readable .npz file: {reason}") from None
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
