"""Flags of the network and of how it computes."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace

from cnns.data.format import MAX_CLASSES
from cnns.flags.parser import Flag
from cnns.flags.values import number, numbers, rgb_std

IN_TRAINING = "as in the snapshot to start from, else the network's own"
PREPROCESSING_FLAGS = {
    "image_size": Flag(
        "height and width of the network's input, pixels", number(int, 8), otherwise=IN_TRAINING
    ),
    "resize_shorter": Flag(
        "validation and inference: pixels of the shorter side before the centre crop",
        number(int, 8),
        otherwise="256 per 224 pixels of --image_size",
    ),
    "rgb_mean": Flag(
        "subtracted from each channel, 0 to 255",
        numbers(3),
        otherwise=IN_TRAINING,
        aliases=("--rgb-mean",),
    ),
    "rgb_std": Flag(
        "divides each channel after that", rgb_std, otherwise=IN_TRAINING, aliases=("--rgb-std",)
    ),
}


def preprocessing_flags(args: Namespace) -> dict:
    """The fields of cnns.data.images.Preprocessing that flags set; None where one was not given."""
    return {name: getattr(args, name) for name in PREPROCESSING_FLAGS}


def model_flags(models: Iterable[str]) -> dict[str, Flag]:
    return {
        "model": Flag(
            "network", choices=models, otherwise="that of the snapshot to start from, else resnet50"
        ),
        "num_classes": Flag(
            "number of classes",
            number(int, 1, MAX_CLASSES),
            otherwise="as in the snapshot to start from, else as in the manifest of the training "
            "data, else 1000",
        ),
        **PREPROCESSING_FLAGS,
    }


def snapshot_model_flags(models: Iterable[str]) -> dict[str, Flag]:
    """The same for the scripts that read a snapshot."""
    return {
        name: replace(flag, otherwise=flag.otherwise.partition(" to start from")[0])
        for name, flag in model_flags(models).items()
    }


PRECISION_FLAGS = {
    "use_fp16": Flag(
        "compute in half precision where that is safe (automatic mixed precision), with dynamic "
        "loss scaling; loss, weights and snapshots stay float32; a CPU computes in float32",
        default=False,
    ),
    # OneFlow's convolutions and batch norms for a CPU are wrong in that layout.
    "channel_last": Flag("compute with activations (N, H, W, C)", default=False, cuda=True),
    "pad_output": Flag("give images a fourth channel, of zeros", default=False),
    "fuse_bn_relu": Flag("batch norm and ReLU in one kernel", default=False, cuda=True),
    "fuse_bn_add_relu": Flag("batch norm, sum and ReLU in one kernel", default=False, cuda=True),
}
