"""Inception v3 (https://arxiv.org/abs/1512.00567), parameters named as in torchvision."""

import oneflow as flow
from oneflow import nn

from cnns.models.layers import BATCH_NORMS, Dropout, adaptive_mean, init_uniform
from cnns.models.products import Convolution

BATCH_NORM = {"eps": 1e-3, "momentum": 0.1}  # running = 0.9 old + 0.1 new


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Padding keeps the size, unless `valid`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        valid: bool = False,
    ):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (0, 0) if valid else (height // 2, width // 2)
        self.conv = Convolution(
            inputs, outputs, (height, width), stride=stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, **BATCH_NORM)

    def forward(self, x):
        return flow.relu(self.bn(self.conv(x)))


def average(x):
    """Means over 3x3 pixels, (N, C, H, W) to the same; zeros beyond the edge count."""
    return nn.functional.avg_pool2d(x, 3, stride=1, padding=1)


def chain(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


class MixedA(nn.Module):
    """Branches of 1x1, 5x5 and two 3x3, and pooling: figure 5 of the paper."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x):  # (N, inputs, H, W) -> (N, 224 + pooled, H, W)
        branches = (
            self.branch1x1(x),
            chain(x, self.branch5x5_1, self.branch5x5_2),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(average(x)),
        )
        return flow.cat(branches, dim=1)


class ReductionA(nn.Module):
    """Halves the resolution with 3x3 and two 3x3 beside pooling."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2, valid=True)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, valid=True)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x):  # (N, inputs, H, W) -> (N, 480 + inputs, (H - 1) / 2, (W - 1) / 2)
        branches = (
            self.branch3x3(x),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.pool(x),
        )
        return flow.cat(branches, dim=1)


class MixedB(nn.Module):
    """Branches of 1x1, of one and of two pairs of 1x7 and 7x1, and pooling: figure 6."""

    def __init__(self, inputs: int, inner: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, inner, 1)
        self.branch7x7_2 = Conv(inner, inner, (1, 7))
        self.branch7x7_3 = Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(inputs, inner, 1)
        self.branch7x7dbl_2 = Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Conv(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Conv(inner, 192, (1, 7))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x):  # (N, inputs, H, W) -> (N, 768, H, W)
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        branches = (
            self.branch1x1(x),
            chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5),
            self.branch_pool(average(x)),
        )
        return flow.cat(branches, dim=1)


class ReductionB(nn.Module):
    """Halves the resolution with 3x3 and 1x7, 7x1, 3x3 beside pooling."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, valid=True)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, valid=True)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x):  # (N, inputs, H, W) -> (N, 512 + inputs, (H - 1) / 2, (W - 1) / 2)
        seven = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3)
        branches = (
            chain(x, self.branch3x3_1, self.branch3x3_2),
            self.branch7x7x3_4(seven),
            self.pool(x),
        )
        return flow.cat(branches, dim=1)


class MixedC(nn.Module):
    """Branches that fork into 1x3 and 3x1: figure 7."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x):  # (N, inputs, H, W) -> (N, 2048, H, W)
        single = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(average(x)),
        )
        return flow.cat(branches, dim=1)


class Auxiliary(nn.Module):
    """The auxiliary classifier on the 17x17 features, in training only."""

    def __init__(self, inputs: int, num_classes: int):
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3)
        self.conv0 = Conv(inputs, 128, 1)
        self.conv1 = Conv(128, 768, 5, valid=True)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x):  # (N, inputs, 17, 17) -> (N, num_classes)
        # Of pictures below 299 px too little is left for the 5x5 convolution.
        x = self.pool(x) if min(x.shape[2:]) >= 17 else adaptive_mean(x, 5)  # (N, inputs, 5, 5)
        return self.fc(self.conv1(self.conv0(x)).mean(dim=(2, 3)))


class InceptionV3(nn.Module):
    """Inception v3 for RGB images of any size from 75 px.

    27,161,264 parameters at 1000 classes, the auxiliary classifier's included.
    """

    auxiliary_weight = 0.4  # of the second loss, as in torchvision's training script

    def __init__(self, num_classes: int):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, valid=True)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.pool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, valid=True)
        self.pool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = MixedA(192, 32)
        self.Mixed_5c = MixedA(256, 64)
        self.Mixed_5d = MixedA(288, 64)
        self.Mixed_6a = ReductionA(288)
        self.Mixed_6b = MixedB(768, 128)
        self.Mixed_6c = MixedB(768, 160)
        self.Mixed_6d = MixedB(768, 160)
        self.Mixed_6e = MixedB(768, 192)
        self.AuxLogits = Auxiliary(768, num_classes)
        self.Mixed_7a = ReductionB(768)
        self.Mixed_7b = MixedC(1280)
        self.Mixed_7c = MixedC(2048)
        self.dropout = Dropout(0.5, 2048)
        self.fc = nn.Linear(2048, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights by torchvision's rules, from OneFlow's global generator.

        Weights are normal with a standard deviation of 0.1, but 0.01 in the last convolution of the
        auxiliary classifier and 0.001 in its linear layer (torchvision cuts at 2, which is 20
        standard deviations); biases uniform within 1 / sqrt(fan_in); gamma 1 and beta 0.
        """
        deviations = {self.AuxLogits.conv1.conv: 0.01, self.AuxLogits.fc: 0.001}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_uniform(module)  # the bias stays
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0.0, deviations.get(module, 0.1))
            elif isinstance(module, BATCH_NORMS):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, image):
        """(N, 3, H, W) to logits (N, num_classes); in training to those and the auxiliary ones."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(image)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.pool1(x)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.pool2(x))))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = middle = self.Mixed_6e(self.Mixed_6d(x))  # (N, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        logits = self.fc(self.dropout(x.mean(dim=(2, 3))))
        if self.training:
            return logits, self.AuxLogits(middle)
        return logits
