"""Loaders for synthetic data."""

import itertools
from collections.abc import Iterator

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.distributed import to_device


class SyntheticLoader(nn.Module):
    """A pool of random images with random labels that stays on the device.

    The pool is small, so that a network that learns shows it. Training and validation of one seed
    share it.
    """

    POOL_BATCHES = 2

    def __init__(
        self, *, batch_size: int, num_classes: int, image_size: int, seed: int, device: str
    ):
        super().__init__()
        placement = flow.env.all_device_placement(device)
        rng = np.random.default_rng(seed)
        self.batch_size = batch_size
        self.pool = []
        for _ in range(self.POOL_BATCHES):
            image = rng.standard_normal((batch_size, 3, image_size, image_size), np.float32)
            label = rng.integers(0, num_classes, batch_size, np.int32)
            self.pool.append((to_device(image, placement), to_device(label, placement)))

    @property
    def num_examples(self) -> int:
        return self.batch_size * len(self.pool)

    def batches(self, epoch: int = 0, iteration: int = 0) -> Iterator[tuple]:
        """The pool, from its first batch, in every epoch."""
        return itertools.islice(itertools.cycle(self.pool), iteration % len(self.pool), None)

    def forward(self, image, label):
        return image, label


class SyntheticValLoader(SyntheticLoader):
    """The pool once, of which the first `num_examples` count."""

    def __init__(self, *, num_examples: int, device: str, **synthetic_loader):
        super().__init__(device=device, **synthetic_loader)
        self.num_batches = -(-num_examples // self.batch_size)
        placement = flow.env.all_device_placement(device)
        self.counted = [
            to_device((rows < num_examples).astype(np.int32), placement)
            for rows in np.arange(self.num_examples).reshape(len(self.pool), -1)
        ]

    def batches(self) -> Iterator[tuple]:
        for i in range(self.num_batches):
            yield self.counted[i], *self.pool[i]
