"""The losses of training: logits (N, C) float32 and labels (N,) int32 to a scalar, a mean.

Where a loader mixes images, it gives a second label for each (N,) int32 and the share of the first
(N,) float32: the target of a row is `share` of its label and `1 - share` of the other. Everything
is computed in float32, and none of it waits for the host.

With weights of the classes (C,) the mean is one over the rows weighted by their labels: what a row
loses is divided by the sum of the weights of all labels of the batch, as PyTorch's CrossEntropyLoss
does. In cross entropy each class of a smoothed target has its own weight, as there; of `bce` the
row has that of its label. A mixed row's weight is mixed as its target is.
"""

from collections.abc import Callable

import oneflow as flow
from oneflow import nn


def one_hot(label: flow.Tensor, logits: flow.Tensor) -> flow.Tensor:
    """(N, C) float32: 1 in the column of the label; all 0 where that is not a class."""
    number = flow.arange(
        logits.shape[1], dtype=flow.int32, placement=logits.placement, sbp=flow.sbp.broadcast
    ).unsqueeze(0)  # (1, C)
    return (number == label.unsqueeze(1)).to(dtype=flow.float32)


def soft_target(
    logits: flow.Tensor, label: flow.Tensor, mixed: tuple[flow.Tensor, ...], *, smoothing: float
) -> flow.Tensor:
    """The target of each row, (N, C) float32: mixed, then smoothed, so that it adds up to 1."""
    target = one_hot(label, logits)
    if mixed:
        other, share = mixed
        share = share.unsqueeze(1)  # (N, 1)
        target = target * share + one_hot(other, logits) * (1 - share)
    return target * (1 - smoothing) + smoothing / logits.shape[1] if smoothing else target


def main_label(label: flow.Tensor, mixed: tuple[flow.Tensor, ...]) -> flow.Tensor:
    """The label with the larger share of each row, by which hits are counted; the first of two
    equal ones."""
    if not mixed:
        return label
    other, share = mixed
    first = (share >= 0.5).to(dtype=flow.int32)
    return label * first + other * (1 - first)


def label_weights(
    class_weights: flow.Tensor, logits: flow.Tensor, label: flow.Tensor, mixed: tuple
) -> flow.Tensor:
    """The weight of each row's label (N,)."""
    return (soft_target(logits, label, mixed, smoothing=0.0) * class_weights).sum(dim=1)


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy with softened targets, the mean over the rows."""

    def __init__(self, *, label_smoothing: float, class_weights: flow.Tensor | None = None):
        super().__init__(label_smoothing=label_smoothing)
        self.smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits, label, *mixed):
        weights = self.class_weights
        if not mixed and weights is None:
            return nn.CrossEntropyLoss.forward(self, logits, label)
        target = soft_target(logits, label, mixed, smoothing=self.smoothing)
        if weights is None:
            return -(target * flow.log_softmax(logits, dim=1)).sum(dim=1).mean()
        loss = -(target * weights * flow.log_softmax(logits, dim=1)).sum()
        return loss / label_weights(weights, logits, label, mixed).sum()


class BinaryCrossEntropy(nn.Module):
    """Each class by itself, yes or no, with a sigmoid, as in "ResNet strikes back"
    (arXiv:2110.00476).

    Args:
        target_threshold: targets above it count as 1 and all others as 0; None: as they are.
        sum_classes: add up the classes of a row, in place of their mean.
    """

    def __init__(
        self,
        *,
        label_smoothing: float,
        target_threshold: float | None = None,
        sum_classes: bool = False,
        class_weights: flow.Tensor | None = None,
    ):
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.smoothing = label_smoothing
        self.target_threshold, self.sum_classes = target_threshold, sum_classes

    def forward(self, logits, label, *mixed):
        target = soft_target(logits, label, mixed, smoothing=self.smoothing)
        if self.target_threshold is not None:
            target = (target > self.target_threshold).to(dtype=flow.float32)
        loss = flow._C.binary_cross_entropy_with_logits_loss(logits, target, None, None, "none")
        weights = self.class_weights
        if weights is None:
            return loss.sum(dim=1).mean() if self.sum_classes else loss.mean()
        rows = loss.sum(dim=1) if self.sum_classes else loss.mean(dim=1)  # (N,)
        row_weights = label_weights(weights, logits, label, mixed)
        return (rows * row_weights).sum() / row_weights.sum()


# Each takes the settings, and of them those that are its own.
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "cross_entropy": lambda own, of_all: CrossEntropy(**of_all),
    "bce": lambda own, of_all: BinaryCrossEntropy(**own, **of_all),
}


def build_loss(
    name: str,
    *,
    label_smoothing: float,
    target_threshold: float | None = None,
    sum_classes: bool = False,
    class_weights: flow.Tensor | None = None,
) -> nn.Module:
    """The loss `name`, a key of LOSSES. `target_threshold` and `sum_classes` are of `bce`;
    `class_weights` (C,) float32 lie where the logits do, on every device.
    """
    own = {"target_threshold": target_threshold, "sum_classes": sum_classes}
    of_all = {"label_smoothing": label_smoothing, "class_weights": class_weights}
    return LOSSES[name](own, of_all)
