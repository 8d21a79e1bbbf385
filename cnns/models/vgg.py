"""VGG with batch norm (https://arxiv.org/abs/1409.1556), parameters named as in torchvision."""

from collections.abc import Sequence

from oneflow import nn

from cnns.models.layers import Dropout, adaptive_mean, init_fan_out
from cnns.models.products import Convolution

# Convolutions in each stage, and their channels: configuration D of the paper.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
POOLED = 7  # pixels a side of what the classifier sees; at 224 px the last pooling gives just that


class VGG(nn.Module):
    """VGG-16 with batch norm for RGB images of any size from 32 px.

    138,365,992 parameters at 1000 classes.

    Args:
        stages: (number of convolutions, channels) between the poolings.
        hidden: width of the two hidden layers of the classifier.
    """

    def __init__(
        self, num_classes: int = 1000, stages: Sequence[Sequence[int]] = STAGES, hidden: int = 4096
    ):
        super().__init__()
        layers, channels = [], 3
        for depth, width in stages:
            for _ in range(depth):
                layers += [Convolution(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * POOLED**2, hidden),
            nn.ReLU(),
            Dropout(0.5, hidden),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            Dropout(0.5, hidden),
            nn.Linear(hidden, num_classes),
        )
        for module in self.modules():  # torchvision's rules
            init_fan_out(module)

    def forward(self, image):  # (N, 3, H, W) float32 -> (N, num_classes) float32 logits
        x = self.features(image)  # (N, 512, H / 32, W / 32)
        return self.classifier(adaptive_mean(x, POOLED).flatten(1))
