"""MobileNetV2 (https://arxiv.org/abs/1801.04381), parameters named as in torchvision."""

from typing import Any

from oneflow import nn

from cnns.models.layers import Dropout, init_fan_out
from cnns.models.products import Convolution

# Expansion, channels, blocks and stride of the first of them: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


def conv_norm(inputs: int, outputs: int, kernel: int, **settings: Any) -> list[nn.Module]:
    convolution = Convolution(inputs, outputs, kernel, padding=kernel // 2, bias=False, **settings)
    return [convolution, nn.BatchNorm2d(outputs)]


def conv_norm_relu6(inputs: int, outputs: int, kernel: int, **settings: Any) -> nn.Module:
    return nn.Sequential(*conv_norm(inputs, outputs, kernel, **settings), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, 3x3 depthwise, 1x1 back with no ReLU after it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.conv = nn.Sequential(
            *([conv_norm_relu6(inputs, inner, 1)] if expansion != 1 else []),
            conv_norm_relu6(inner, inner, 3, stride=stride, groups=inner),
            *conv_norm(inner, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):  # (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)
        y = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1 for RGB images of any size: 3,504,872 parameters at 1000 classes."""

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        layers, channels = [conv_norm_relu6(3, STEM_CHANNELS, 3, stride=2)], STEM_CHANNELS
        for expansion, width, depth, stride in STAGES:
            for i in range(depth):
                layers.append(InvertedResidual(channels, width, stride if i == 0 else 1, expansion))
                channels = width
        layers.append(conv_norm_relu6(channels, LAST_CHANNELS, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            Dropout(0.2, LAST_CHANNELS), nn.Linear(LAST_CHANNELS, num_classes)
        )
        for module in self.modules():  # torchvision's rules
            init_fan_out(module)

    def forward(self, image):  # (N, 3, H, W) float32 -> (N, num_classes) float32 logits
        x = self.features(image)  # (N, 1280, H / 32, W / 32)
        return self.classifier(x.mean(dim=(2, 3)))
