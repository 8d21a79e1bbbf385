"""Sizes of training images that grow over a run, in stages: progressive learning.

After "EfficientNetV2: Smaller Models and Faster Training" (arXiv:2104.00298): most epochs train on
smaller images, which takes less time. There each stage also regularises more strongly than the one
before it; here only the size changes. Nothing here needs OneFlow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MULTIPLE = 8  # pixels; of the sizes between the first and the last


@dataclass(frozen=True)
class TrainSizes:
    """Height and width of training images, pixels, in each stage, and how long the run is."""

    sizes: tuple[int, ...]
    num_epochs: int

    def at(self, epoch: int) -> int:
        """Those of an epoch; after the end, the last. Stages are equally long, or differ by an
        epoch. A run that is resumed with more epochs has longer stages, so that its next epoch may
        have a smaller size than the one before."""
        stage = epoch * len(self.sizes) // self.num_epochs
        return self.sizes[min(stage, len(self.sizes) - 1)]

    @property
    def grow(self) -> bool:
        return len(self.sizes) > 1


def stage_sizes(first: int, last: int, stages: int) -> tuple[int, ...]:
    """Equally spaced sizes; those between the first and the last are multiples of MULTIPLE."""
    between = (first + (last - first) * i / (stages - 1) for i in range(1, stages - 1))
    rounded = [MULTIPLE * round(size / MULTIPLE) for size in between]
    return (first, *(min(max(size, first), last) for size in rounded), last)


def make_train_sizes(flags: Mapping[str, Any], *, image_size: int) -> TrainSizes:
    """Those of a run with these flags; `image_size` is that of validation."""
    last, num_epochs = flags["train_image_size"] or image_size, flags["num_epochs"]
    first, stages = flags["first_train_image_size"], min(flags["train_size_stages"], num_epochs)
    if first is None or stages == 1:
        return TrainSizes((last,), num_epochs)
    return TrainSizes(stage_sizes(first, last, stages), num_epochs)
