"""Layers that the networks share, and the switches of how a GPU computes them.

Whatever the switches, a network takes images (N, 3, H, W), has the same parameter names, the same
initial weights for one seed, and the same snapshots (`to_standard`, `from_standard`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn

NHWC_VARIABLE = "ONEFLOW_ENABLE_NHWC"  # OneFlow's layers read it when they are made


@dataclass(frozen=True)
class Switches:
    """How the same function is computed."""

    channel_last: bool = False  # activations are (N, H, W, C), convolution weights (O, H, W, I)
    pad_output: bool = False  # images get a fourth channel, of zeros
    fuse_bn_relu: bool = False  # batch norm and ReLU in one kernel; CUDA only
    fuse_bn_add_relu: bool = False  # batch norm, addition and ReLU in one kernel; CUDA only

    @property
    def spatial_dims(self) -> tuple[int, int]:
        return (1, 2) if self.channel_last else (2, 3)

    def enter(self, image):
        """(N, 3, H, W) to what the first convolution takes."""
        if self.pad_output:
            image = nn.functional.pad(image, (0, 0, 0, 0, 0, 1))  # (N, 4, H, W)
        if self.channel_last:
            image = image.permute(0, 2, 3, 1)  # (N, H, W, C)
        return image


@contextmanager
def making_layers(switches: Switches) -> Iterator[None]:
    """A context in which OneFlow's layers are made for the layout of `switches`."""
    before = os.environ.pop(NHWC_VARIABLE, None)
    if switches.channel_last:
        os.environ[NHWC_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(NHWC_VARIABLE, None)
        if before is not None:
            os.environ[NHWC_VARIABLE] = before


class BatchNormReLU(nn.BatchNorm2d):
    """Batch norm, an addition if there is something to add, and ReLU.

    `row_scale` (N, 1), where it is given, multiplies each image before the addition.
    """

    def forward(self, x, addend=None, row_scale=None):
        y = nn.BatchNorm2d.forward(self, x)  # nn.Graph calls this on a proxy without super()
        if row_scale is not None:
            y = y * row_scale.reshape(-1, 1, 1, 1)
        return flow.relu(y if addend is None else y + addend)


def init_convolution(module: nn.Conv2d, switches: Switches) -> None:
    """Draw the weight of a convolution: normal with variance 2 / fan_in, the same in any layout."""
    weight = module.weight
    if switches.channel_last:
        weight = flow.empty(*weight.permute(0, 3, 1, 2).shape)
    nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")
    if switches.channel_last:
        module.weight.data.copy_(weight.permute(0, 2, 3, 1))


def pad_input(module: nn.Conv2d, switches: Switches) -> None:
    """Give the first convolution a fourth input channel with weights of 0, if images have one."""
    if switches.pad_output:
        last = (0, 1) if switches.channel_last else (0, 0, 0, 0, 0, 1)
        module.weight = nn.Parameter(nn.functional.pad(module.weight.data, last))
        module.in_channels = 4


class Masked(nn.Module):
    """A layer with a mask that the training graph passes at each step (`cnns.graphs.DropoutMasks`).

    OneFlow's dropout, inside a graph, ignores seeds and draws the same mask in all layers of one
    shape.
    """

    def __init__(self, rate: float, features: int):
        super().__init__()
        self.rate = rate  # share of the features that are 0
        self.features = features
        self.mask = None  # (N, features) float32, 0 or 1 / (1 - rate)


class Dropout(Masked):
    def forward(self, x):  # (N, features) to the same
        return x * self.mask if self.training else x


class StochasticDepth(Masked):
    """Leaves out the residual branch of a block for some images (arXiv:1603.09382), those that are
    kept divided by the share of them: torchvision's `stochastic_depth` with mode "row"."""

    def __init__(self, rate: float):
        super().__init__(rate, 1)

    def forward(self):
        """What the branch is multiplied by, (N, 1); None where nothing is left out."""
        return self.mask if self.training else None


def drop_blocks(model: nn.Module, rate: float) -> None:
    """Give a network's blocks stochastic depth: none to the first, `rate` to the last, and in
    between in proportion to their place, as timm's ResNets. Evaluation keeps all blocks."""
    blocks = [module for module in model.modules() if hasattr(module, "drop")]
    for place, block in enumerate(blocks):
        share = rate * place / (len(blocks) - 1)
        if share:
            block.drop = StochasticDepth(share)


def adaptive_mean(x: flow.Tensor, size: int) -> flow.Tensor:
    """(N, C, H, W) to (N, C, size, size): means over `size` parts of each side, as even as can be.

    Part i goes from floor(i H / size) to ceil((i + 1) H / size), as in PyTorch, so that neighbours
    overlap where H is not a multiple. OneFlow's own has no form that exports to ONNX for any size.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        if length != size:
            parts = [
                x.narrow(dim, i * length // size, -(-(i + 1) * length // size) - i * length // size)
                for i in range(size)
            ]
            x = flow.cat([part.mean(dim=dim, keepdim=True) for part in parts], dim=dim)
    return x


def init_uniform(module: nn.Module) -> None:
    """Weight and bias of a convolution or linear layer uniform within 1 / sqrt(fan_in)."""
    bound = module.weight[0].numel() ** -0.5
    nn.init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        nn.init.uniform_(module.bias, -bound, bound)


def init_fan_out(module: nn.Module) -> None:
    """A convolution's weight normal with variance 2 / fan_out, a linear layer's with a standard
    deviation of 0.01, their biases 0; a batch norm's gamma 1 and beta 0."""
    if isinstance(module, nn.Conv2d):
        # As in torchvision, groups do not count: out_channels times the kernel's pixels.
        nn.init.normal_(module.weight, 0.0, (2 / module.weight[:, 0].numel()) ** 0.5)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
    elif isinstance(module, BATCH_NORMS):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


BATCH_NORMS = (nn.BatchNorm2d, nn.FusedBatchNorm2d)


def batch_norm_relu(channels: int, *, fused: bool, **settings: Any) -> nn.Module:
    """As BatchNormReLU; `fused` takes OneFlow's kernel for it, which only CUDA has."""
    return (nn.FusedBatchNorm2d if fused else BatchNormReLU)(channels, **settings)


def to_standard(model: nn.Module, name: str, array: np.ndarray) -> np.ndarray:
    """A parameter of `model` as snapshots hold it: convolutions (O, I, H, W), the first with I = 3.

    Args:
        model: one without `switches` is standard as it is.
        name: of the parameter.
        array: the parameter, or something of its shape that belongs to it.
    """
    switches = getattr(model, "switches", Switches())
    if array.ndim == 4 and switches.channel_last:
        array = array.transpose(0, 3, 1, 2)
    if switches.pad_output and name == model.first_conv:
        array = array[:, :3]
    return np.ascontiguousarray(array)


def from_standard(model: nn.Module, name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_standard`. The fourth input's weights are 0."""
    switches = getattr(model, "switches", Switches())
    if switches.pad_output and name == model.first_conv:
        array = np.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0)))
    if array.ndim == 4 and switches.channel_last:
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array)
