"""Mixup and CutMix: pairs of training images mixed inside the graph, and their targets with them.

Mixup (Zhang et al., arXiv:1710.09412) takes lambda of each pixel of an image and 1 - lambda of its
partner's; CutMix (Yun et al., arXiv:1905.04899) takes a box of the partner's pixels. Lambda is of
Beta(alpha, alpha). As in torchvision's references, each batch has one lambda and one box, and where
both are asked for, either is taken with probability 0.5.

Partners are the rows 2k and 2k + 1 of the global batch, each of which gets a share of the other.
That is timm's flip of the batch but for the order of rows, which is random anyway; neighbours are
on one device, so nothing travels between devices, and what is mixed is the same on any number of
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.data.boxes import in_boxes
from cnns.distributed import own_rows, to_global

STREAM = 2  # of random numbers, beside those of the order (0) and the crops (1)


@dataclass(frozen=True)
class Mix:
    """How the batch of one step is mixed. A pixel outside of the box has `level` of its own image,
    and 1 - `level` of its partner's; one inside is the partner's."""

    level: float = 1.0
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    share: float = 1.0  # of an image's own label in its target


def cutmix_box(lam: float, x: int, y: int, *, size: int) -> Mix:
    """The box of CutMix with its centre at (x, y), in an image of `size` x `size` pixels.

    Its sides are sqrt(1 - lam) of the image's; what lies outside of the image is cut off, and the
    share of the label is that of the pixels which are left.
    """
    half = int(0.5 * np.sqrt(1 - lam) * size)
    left, right = max(x - half, 0), min(x + half, size)
    top, bottom = max(y - half, 0), min(y + half, size)
    share = 1 - (right - left) * (bottom - top) / size**2
    return Mix(top=top, bottom=bottom, left=left, right=right, share=share)


@dataclass(frozen=True)
class Mixing:
    """The mixes of a run: a function of seed, epoch and iteration alone."""

    mixup_alpha: float  # of the beta distribution; 0: no mixup
    cutmix_alpha: float
    seed: int

    @property
    def is_on(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def at(self, epoch: int, iteration: int, *, size: int) -> Mix:
        """The mix of an iteration, counted from 0, of images of `size` x `size` pixels."""
        rng = np.random.default_rng((self.seed, STREAM, epoch, iteration))
        cut = rng.random() < 0.5 if self.mixup_alpha and self.cutmix_alpha else self.cutmix_alpha
        if not cut:
            lam = float(rng.beta(self.mixup_alpha, self.mixup_alpha))
            return Mix(level=lam, share=lam)
        lam = float(rng.beta(self.cutmix_alpha, self.cutmix_alpha))
        x, y = rng.integers(0, size, 2).tolist()
        return cutmix_box(lam, x, y, size=size)


class MixingLoader(nn.Module):
    """A training loader, see ofrecord_util.py, whose images are mixed.

    `forward` gives image and label, and then, as `cnns.losses` takes them, the partner's label (N,)
    int32 and the share of the own one (N,) float32.
    """

    def __init__(
        self, loader: nn.Module, mixing: Mixing, *, batch_size: int, size: int, device: str
    ):
        """`batch_size` is the global one, of which each device has an even number; `size` is that
        of the images, in pixels."""
        super().__init__()
        self.loader, self.mixing, self.size = loader, mixing, size
        self.record_order = getattr(loader, "record_order", None)
        self.placement = flow.env.all_device_placement(device)
        rows = own_rows(batch_size)
        self.num_rows = rows.stop - rows.start

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        """Batches of the loader, and behind each the mix of its step (N, 6) float32, the same in
        every row, so that processes need not exchange it."""
        for number, batch in enumerate(self.loader.batches(epoch, iteration), iteration):
            mix = self.mixing.at(epoch, number, size=self.size)
            rows = np.tile(np.array([*vars(mix).values()], np.float32), (self.num_rows, 1))
            yield *batch, to_global(flow.tensor(rows), self.placement)

    def forward(self, *batch: flow.Tensor) -> tuple[flow.Tensor, ...]:
        *loaded, mix = batch
        image, label = self.loader(*loaded)  # (N, 3, H, W) float32, (N,) int32
        return mix_pairs(image, label, flow._C.amp_black_identity(mix))


def swap_pairs(rows: flow.Tensor) -> flow.Tensor:
    """Rows 2k and 2k + 1 in each other's place."""
    pairs = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return flow.flip(pairs, [1]).reshape(*rows.shape)


def mix_pairs(
    image: flow.Tensor, label: flow.Tensor, mix: flow.Tensor
) -> tuple[flow.Tensor, flow.Tensor, flow.Tensor, flow.Tensor]:
    """Mixed images, the labels, the partners' labels, and the share of the first.

    Args:
        image: (N, 3, H, W) float32.
        label: (N,) int32.
        mix: (N, 6) float32, the fields of a `Mix` in each row.
    """
    own = mix[:, 0].reshape(-1, 1, 1, 1) * (1 - in_boxes(image, mix[:, 1:5]))  # (N, 1, H, W)
    mixed = image * own + swap_pairs(image) * (1 - own)
    return mixed, label, swap_pairs(label), mix[:, 5]
