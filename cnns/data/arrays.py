"""Loaders for arrays in memory."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image

from cnns.data.images import Preprocessing, center_crop
from cnns.data.kinds import Arrays
from cnns.data.pictures import PictureLoader, PictureTrainLoader


class ArraySource:
    """Pictures of arrays, by number."""

    def __init__(self, data: Arrays):
        self.images, self.labels = data.images, data.labels

    def __len__(self) -> int:
        return len(self.images)

    def open(self, number: int) -> nullcontext[tuple[Image.Image, int]]:
        return nullcontext((Image.fromarray(self.images[number]), self.labels[number]))

    def expect(self, numbers: Sequence[int]) -> None:
        """They are in memory."""


class ArrayTrainLoader(PictureTrainLoader):
    def __init__(self, data: Arrays, **train_loader: Any):
        super().__init__(ArraySource(data), **train_loader)


class ArrayValLoader(PictureLoader):
    """Images in order; shorter side resized, centre crop."""

    def __init__(self, data: Arrays, *, preprocessing: Preprocessing, **picture_loader: Any):
        super().__init__(preprocessing=preprocessing, **picture_loader)
        self.images, self.labels = data.images, data.labels
        self.num_examples = data.num_examples
        self.preprocessing = preprocessing
        self.num_batches = -(-self.num_examples // self.batch_size)

    def batches(self) -> Iterator[tuple]:
        return itertools.islice(self.ahead(self.make_row), self.num_batches)

    def make_row(self, position: int) -> tuple[np.int32, np.ndarray, np.int32]:
        number = position % len(self.images)
        crop = center_crop(
            Image.fromarray(self.images[number]),
            resize_shorter=self.preprocessing.resize_shorter,
            size=self.size,
            interpolation=self.preprocessing.interpolation,
        )
        return np.int32(position < self.num_examples), crop, np.int32(self.labels[number])
