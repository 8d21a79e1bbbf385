"""Loaders for synthetic data."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.data.images import Preprocessing
from cnns.data.kinds import Synthetic
from cnns.distributed import to_device


class SyntheticPool(nn.Module):
    """Random images with random labels that stay on the device.

    The pool is small, so that a network that learns shows it. Training and validation share it.
    """

    POOL_BATCHES = 2

    def __init__(
        self,
        data: Synthetic,
        *,
        batch_size: int,
        preprocessing: Preprocessing,
        device: str,
        **ignored: Any,  # seed and augmentation
    ):
        super().__init__()
        placement, size = flow.env.all_device_placement(device), preprocessing.image_size
        rng = np.random.default_rng(data.seed)
        self.batch_size = batch_size
        self.pool = []
        for _ in range(self.POOL_BATCHES):
            image = rng.standard_normal((batch_size, 3, size, size), np.float32)
            label = rng.integers(0, data.num_classes, batch_size, np.int32)
            self.pool.append((to_device(image, placement), to_device(label, placement)))

    def forward(self, image: flow.Tensor, label: flow.Tensor) -> tuple[flow.Tensor, flow.Tensor]:
        return image, label


class SyntheticTrainLoader(SyntheticPool):
    """The pool, from its first batch, in every epoch."""

    def batches(self, epoch: int = 0, iteration: int = 0) -> Iterator[tuple]:
        return itertools.islice(itertools.cycle(self.pool), iteration % len(self.pool), None)


class SyntheticValLoader(SyntheticPool):
    """The pool once, of which the first `num_examples` count."""

    def __init__(self, data: Synthetic, *, batch_size: int, device: str, **pool: Any):
        super().__init__(data, batch_size=batch_size, device=device, **pool)
        self.num_examples = data.num_examples
        self.num_batches = -(-data.num_examples // batch_size)
        placement = flow.env.all_device_placement(device)
        rows = np.arange(self.num_batches * batch_size).reshape(self.num_batches, batch_size)
        row_mask = (rows < data.num_examples).astype(np.int32)
        self.row_mask = [to_device(each, placement) for each in row_mask]

    def batches(self) -> Iterator[tuple]:
        for row_mask, batch in zip(self.row_mask, self.pool, strict=False):
            yield row_mask, *batch
