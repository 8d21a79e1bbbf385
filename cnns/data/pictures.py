"""What loaders of single pictures share: order, crops, and threads that make batches ahead.

Arrays and OFRecord parts in global order differ only in the `Source`, where pictures come from.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import numpy as np
import oneflow as flow
from oneflow import nn
from PIL import Image

from cnns.data.augment import augment, erased_box
from cnns.data.boxes import in_boxes
from cnns.data.crops import Augmentation
from cnns.data.images import Preprocessing
from cnns.data.order import RecordOrder
from cnns.distributed import on_all_devices, own_rows, to_global
from cnns.launch.worker import is_worker

AHEAD = 2  # batches that are being made while one is used


class Source(Protocol):
    """Pictures and labels by number, from several threads at once."""

    def __len__(self) -> int: ...

    def open(self, number: int) -> AbstractContextManager[tuple[Image.Image, int]]:
        """A picture, decoded or not yet, and its label."""

    def expect(self, numbers: Sequence[int]) -> None:
        """These will be opened soon."""

    @property
    def labels(self) -> np.ndarray:
        """Those of all pictures (N,), by their numbers; may take a while."""


def count_threads() -> int:
    """Threads of this process: all of the cores that it is bound to, or its share of a machine."""
    cores = len(os.sched_getaffinity(0))
    if cores < (os.cpu_count() or cores) and not is_worker():  # by who started it
        return cores
    return max(1, cores // (flow.env.get_world_size() // flow.env.get_node_size()))


class PictureLoader(nn.Module):
    """Crops made by Pillow, which lets other threads run while it decodes and resizes.

    Only uint8 crosses to the device; it is normalised inside the graph.
    """

    def __init__(self, *, batch_size: int, preprocessing: Preprocessing, device: str):
        super().__init__()
        self.batch_size = batch_size
        self.size = preprocessing.image_size
        self.mean_colour = tuple(min(255, max(0, round(level))) for level in preprocessing.rgb_mean)
        self.placement = flow.env.all_device_placement(device)
        for name in ("rgb_mean", "rgb_std"):
            value = np.asarray(getattr(preprocessing, name), np.float32).reshape(1, 3, 1, 1)
            self.register_buffer(name, on_all_devices(value, self.placement), persistent=False)

    def ahead(
        self,
        make_row: Callable[[int], tuple],
        iteration: int = 0,
        *,
        expect: Callable[[np.ndarray], None] = lambda positions: None,
    ) -> Iterator[tuple]:
        """Batches of what `make_row` gives for this process's positions, from `iteration` on."""
        pool = ThreadPoolExecutor(count_threads())
        batches: deque[list[Future]] = deque()

        def start(iteration: int) -> None:
            positions = self.positions(iteration)
            pool.submit(expect, positions)
            batches.append([pool.submit(make_row, int(position)) for position in positions])

        try:
            for i in range(AHEAD):
                start(iteration + i)
            while True:
                start(iteration + AHEAD)
                rows = [row.result() for row in batches.popleft()]
                iteration += 1
                columns = map(np.stack, zip(*rows, strict=True))
                yield tuple(to_global(flow.tensor(array), self.placement) for array in columns)
        finally:
            pool.shutdown(cancel_futures=True)

    def positions(self, iteration: int) -> np.ndarray:
        """Where the rows of a batch that are this process's lie in an epoch."""
        return iteration * self.batch_size + np.arange(self.batch_size)[own_rows(self.batch_size)]

    def forward(self, image: flow.Tensor, label: flow.Tensor) -> tuple[flow.Tensor, flow.Tensor]:
        image = image.permute(0, 3, 1, 2).to(dtype=flow.float32)  # (N, 3, H, W), 0 to 255
        return (image - self.rgb_mean) / self.rgb_std, label


class PictureTrainLoader(PictureLoader):
    """Pictures in an order of the epoch's own, as `RecordOrder` says; what `crop` makes of them.

    Order, crops and all else that is random depend on seed, epoch and position alone, so that a
    global batch is the same for any number of processes. Where images are erased, a batch has a
    third tensor, the boxes of its images (N, 4) float32; the graph puts the mean there.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        **picture_loader: Any,
    ):
        super().__init__(batch_size=batch_size, **picture_loader)
        self.source, self.seed = source, seed
        self.random_erasing = augmentation.random_erasing
        self.record_order = RecordOrder(
            len(source),
            batch_size,
            seed,
            repeats=augmentation.repeats,
            labels=source.labels if augmentation.balanced else None,
        )
        # Takes a picture and random numbers, gives (size, size, 3) uint8.
        self.crop: Callable[[Image.Image, np.random.Generator], np.ndarray] = partial(
            augment, size=self.size, augmentation=augmentation, fill=self.mean_colour
        )

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        return self.ahead(
            partial(self.make_row, epoch),
            iteration,
            expect=lambda positions: self.source.expect(
                self.record_order.at(epoch, positions).tolist()
            ),
        )

    def make_row(self, epoch: int, position: int) -> tuple:
        (number,) = self.record_order.at(epoch, np.array([position])).tolist()
        rng = np.random.default_rng((self.seed, 1, epoch, position))
        with self.source.open(number) as (picture, label):
            row = self.crop(picture, rng), np.int32(label)
        if not self.random_erasing:
            return row
        return *row, erased_box(rng, size=self.size, probability=self.random_erasing)

    def forward(
        self, image: flow.Tensor, label: flow.Tensor, *boxes: flow.Tensor
    ) -> tuple[flow.Tensor, flow.Tensor]:
        image, label = PictureLoader.forward(self, image, label)
        for box in boxes:
            image = image * (1 - in_boxes(image, box))
        return image, label
