"""ResNet v1.5 (https://arxiv.org/abs/1512.03385) and ResNeXt (https://arxiv.org/abs/1611.05431),
parameters named as in torchvision.

v1.5 differs from the paper in one place: where a bottleneck halves the resolution, the stride sits
on its 3x3 convolution, not on the first 1x1. That costs 5 % of the speed and gains 0.5 % top-1
(figures of NVIDIA's DeepLearningExamples).
"""

from functools import partial

import oneflow as flow
from oneflow import nn

from cnns.models.layers import (
    BATCH_NORMS,
    Switches,
    batch_norm_relu,
    init_convolution,
    making_layers,
    pad_input,
)
from cnns.models.products import Convolution

conv = partial(Convolution, bias=False)
BATCH_NORM = {"eps": 1e-5, "momentum": 0.1}  # running = 0.9 old + 0.1 new


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: the block of ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, switches: Switches):
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride=stride, padding=1)
        self.bn1 = batch_norm_relu(width, fused=switches.fuse_bn_relu, **BATCH_NORM)
        self.conv2 = conv(width, width, 3, padding=1)
        self.bn2 = batch_norm_relu(width, fused=switches.fuse_bn_add_relu, **BATCH_NORM)
        self.downsample = shortcut(in_channels, width, stride)
        self.last_bn = "bn2"
        self.drop = None  # see cnns.models.layers.drop_blocks

    def forward(self, x):  # (N, in_channels, H, W) -> (N, width, H / stride, W / stride)
        y = self.bn1(self.conv1(x))
        return end_block(self, self.bn2, self.conv2(y), x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions: the block of ResNet-50 and deeper."""

    expansion = 4
    groups = 1  # of the 3x3 convolution
    width_per_group = 64  # its channels in each group, where `width` is 64

    def __init__(self, in_channels: int, width: int, stride: int, switches: Switches):
        super().__init__()
        out_channels = width * self.expansion
        inner = width * self.width_per_group // 64 * self.groups
        self.conv1 = conv(in_channels, inner, 1)
        self.bn1 = batch_norm_relu(inner, fused=switches.fuse_bn_relu, **BATCH_NORM)
        # v1.5: the stride is here
        self.conv2 = conv(inner, inner, 3, stride=stride, padding=1, groups=self.groups)
        self.bn2 = batch_norm_relu(inner, fused=switches.fuse_bn_relu, **BATCH_NORM)
        self.conv3 = conv(inner, out_channels, 1)
        self.bn3 = batch_norm_relu(out_channels, fused=switches.fuse_bn_add_relu, **BATCH_NORM)
        self.downsample = shortcut(in_channels, out_channels, stride)
        self.last_bn = "bn3"
        self.drop = None  # see cnns.models.layers.drop_blocks

    def forward(self, x):  # (N, in_channels, H, W) -> (N, 4 * width, H / stride, W / stride)
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        return end_block(self, self.bn3, self.conv3(y), x)


class ResNeXtBottleneck(Bottleneck):
    """The same with a 3x3 convolution in 32 groups of 4 channels in the first stage."""

    groups = 32
    width_per_group = 4


def end_block(block: nn.Module, last_bn: nn.Module, y: flow.Tensor, x: flow.Tensor) -> flow.Tensor:
    """The last batch norm of a block's branch `y`, the sum with its shortcut from `x`, and ReLU."""
    x = x if block.downsample is None else block.downsample(x)
    scale = None if block.drop is None else block.drop()
    return last_bn(y, x) if scale is None else last_bn(y, x, scale)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The projection of a block that changes shape (the paper's option B), else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        conv(in_channels, out_channels, 1, stride=stride),
        nn.BatchNorm2d(out_channels, **BATCH_NORM),
    )


class ResNet(nn.Module):
    """ResNet v1.5 for RGB images of any size.

    Args:
        block: `BasicBlock`, `Bottleneck` or `ResNeXtBottleneck`.
        depths: number of blocks in each of the four stages.
        width: channels of the stem and of the first stage; doubled at each later stage.
        switches: see cnns.models.layers.Switches.
    """

    first_conv = "conv1.weight"

    def __init__(
        self,
        block: type[nn.Module],
        depths: tuple[int, int, int, int],
        num_classes: int,
        width: int = 64,
        switches: Switches = Switches(),
    ):
        super().__init__()
        self.switches = switches
        with making_layers(switches):
            self.conv1 = conv(3, width, 7, stride=2, padding=3)
            self.bn1 = batch_norm_relu(width, fused=switches.fuse_bn_relu, **BATCH_NORM)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            channels = width
            for stage, depth in enumerate(depths):
                blocks = []
                for i in range(depth):
                    stride = 2 if stage > 0 and i == 0 else 1
                    blocks.append(block(channels, width << stage, stride, switches))
                    channels = (width << stage) * block.expansion
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()
        pad_input(self.conv1, switches)

    def reset_parameters(self) -> None:
        """Draw initial weights from OneFlow's global generator (`flow.manual_seed`).

        Convolution and fc weights are normal with variance 2 / fan_in (He et al.,
        https://arxiv.org/abs/1502.01852), the fc bias is 0; batch norms have gamma 1 and beta 0,
        except gamma 0 for the last one of each block, so that every block starts as the identity
        (Goyal et al., https://arxiv.org/abs/1706.02677).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module, self.switches)
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, BATCH_NORMS):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.fc.bias)
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(getattr(module, module.last_bn).weight)

    def forward(self, image):  # (N, 3, H, W) float32 -> (N, num_classes) float32 logits
        x = self.switches.enter(image)
        x = self.maxpool(self.bn1(self.conv1(x)))  # (N, width, H / 4, W / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, channels, H / 32, W / 32)
        # A mean, not adaptive pooling and flatten: those freeze the batch size in an ONNX export.
        return self.fc(x.mean(dim=self.switches.spatial_dims))


def resnet18(num_classes: int = 1000, switches: Switches = Switches()) -> ResNet:
    """ResNet-18: 11,689,512 parameters at 1000 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, switches=switches)


def resnet50(num_classes: int = 1000, switches: Switches = Switches()) -> ResNet:
    """ResNet-50 v1.5: 25,557,032 parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, switches=switches)


def resnext50(num_classes: int = 1000, switches: Switches = Switches()) -> ResNet:
    """ResNeXt-50 32x4d: 25,028,904 parameters at 1000 classes."""
    return ResNet(ResNeXtBottleneck, (3, 4, 6, 3), num_classes, switches=switches)
