"""AlexNet of one column (https://arxiv.org/abs/1404.5997), parameters named as in torchvision."""

from oneflow import nn

from cnns.models.layers import Dropout, adaptive_mean, init_uniform
from cnns.models.products import Convolution

POOLED = 6  # pixels a side of what the classifier sees; at 224 px the last pooling gives just that


class AlexNet(nn.Module):
    """AlexNet for RGB images of any size from 63 px: 61,100,840 parameters at 1000 classes.

    It has no batch norm.

    Args:
        hidden: width of the two hidden layers of the classifier.
    """

    def __init__(self, num_classes: int = 1000, hidden: int = 4096):
        super().__init__()
        self.features = nn.Sequential(
            Convolution(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            Convolution(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            Convolution(192, 384, 3, padding=1),
            nn.ReLU(),
            Convolution(384, 256, 3, padding=1),
            nn.ReLU(),
            Convolution(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.classifier = nn.Sequential(
            Dropout(0.5, 256 * POOLED**2),
            nn.Linear(256 * POOLED**2, hidden),
            nn.ReLU(),
            Dropout(0.5, hidden),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
        for module in self.modules():  # PyTorch's defaults, which torchvision leaves
            if isinstance(module, nn.Conv2d | nn.Linear):
                init_uniform(module)

    def forward(self, image):  # (N, 3, H, W) float32 -> (N, num_classes) float32 logits
        x = self.features(image)  # (N, 256, H', W'); 6 x 6 at 224 px
        return self.classifier(adaptive_mean(x, POOLED).flatten(1))
