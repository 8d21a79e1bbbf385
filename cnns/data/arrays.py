"""Loaders for arrays in memory."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn
from PIL import Image

from cnns.data.crops import Augmentation, random_resized_crop
from cnns.data.images import Preprocessing, center_crop
from cnns.data.kinds import Arrays
from cnns.distributed import own_rows, to_global


class ArrayLoader(nn.Module):
    """Images from memory. Only uint8 crosses to the device; it is normalised inside the graph."""

    def __init__(self, data: Arrays, *, batch_size: int, preprocessing: Preprocessing, device: str):
        super().__init__()
        self.images, self.labels = data.images, data.labels
        self.num_examples = data.num_examples
        self.batch_size = batch_size
        self.size = preprocessing.image_size
        self.placement = flow.env.all_device_placement(device)
        for name in ("rgb_mean", "rgb_std"):
            value = np.asarray(getattr(preprocessing, name), np.float32).reshape(1, 3, 1, 1)
            tensor = flow.tensor(value).to_global(self.placement, flow.sbp.broadcast)
            self.register_buffer(name, tensor, persistent=False)

    def ahead(self, make_batch: Callable[[int], tuple], iteration: int = 0) -> Iterator[tuple]:
        """Tensors of what `make_batch` gives for this process from `iteration` on.

        The next batch is made while one is used.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(make_batch, iteration)
            while True:
                batch = ahead.result()
                iteration += 1
                ahead = pool.submit(make_batch, iteration)
                yield tuple(to_global(flow.tensor(array), self.placement) for array in batch)

    def positions(self, iteration: int) -> np.ndarray:
        """Where the rows of a batch that are this process's lie in an epoch."""
        return iteration * self.batch_size + np.arange(self.batch_size)[own_rows(self.batch_size)]

    def forward(self, image: flow.Tensor, label: flow.Tensor) -> tuple[flow.Tensor, flow.Tensor]:
        image = image.permute(0, 3, 1, 2).to(dtype=flow.float32)  # (N, 3, H, W), 0 to 255
        return (image - self.rgb_mean) / self.rgb_std, label


class ArrayTrainLoader(ArrayLoader):
    """Every image once per epoch, in an order of its own; random crop, resize, flip.

    Where the last batch is not full, the first images of the epoch fill it up.
    """

    def __init__(self, data: Arrays, *, augmentation: Augmentation, seed: int, **array_loader: Any):
        super().__init__(data, **array_loader)
        self.augmentation = augmentation
        self.seed = seed

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.images))
        return self.ahead(lambda step: self.make_batch(order, epoch, step), iteration)

    def make_batch(
        self, order: np.ndarray, epoch: int, iteration: int
    ) -> tuple[np.ndarray, np.ndarray]:
        positions = self.positions(iteration)
        indices = order[positions % len(order)]
        crops = [
            random_resized_crop(
                self.images[i],
                size=self.size,
                augmentation=self.augmentation,
                rng=np.random.default_rng((self.seed, 1, epoch, position)),
            )
            for i, position in zip(indices, positions, strict=True)
        ]
        return np.stack(crops), self.labels[indices].astype(np.int32)


class ArrayValLoader(ArrayLoader):
    """Images in order; shorter side resized, centre crop."""

    def __init__(self, data: Arrays, *, preprocessing: Preprocessing, **array_loader: Any):
        super().__init__(data, preprocessing=preprocessing, **array_loader)
        self.preprocessing = preprocessing
        self.num_batches = -(-self.num_examples // self.batch_size)

    def batches(self) -> Iterator[tuple]:
        return itertools.islice(self.ahead(self.make_batch), self.num_batches)

    def make_batch(self, iteration: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = self.positions(iteration)
        indices = positions % len(self.images)
        crops = [
            center_crop(
                Image.fromarray(self.images[i]),
                resize_shorter=self.preprocessing.resize_shorter,
                size=self.size,
                interpolation=self.preprocessing.interpolation,
            )
            for i in indices
        ]
        row_mask = (positions < self.num_examples).astype(np.int32)
        return row_mask, np.stack(crops), self.labels[indices].astype(np.int32)
