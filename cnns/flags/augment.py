"""Flags of what is made of training images beyond crop and flip."""

from argparse import Namespace

from cnns.errors import UsageError
from cnns.flags.parser import Flag
from cnns.flags.values import number

MIXING_FLAGS = {
    "mixup_alpha": Flag(
        "mix the images of each batch in pairs, and their targets: lambda is of Beta(alpha, "
        "alpha), one for a batch (arXiv:1710.09412); with --cutmix_alpha either of the two, with "
        "probability 0.5; 0: none",
        number(float, 0),
        0.0,
    ),
    "cutmix_alpha": Flag(
        "put a box of its partner's pixels into each image, and mix their targets by its area "
        "(arXiv:1905.04899); lambda is of Beta(alpha, alpha); 0: none",
        number(float, 0),
        0.0,
    ),
}


def check_mixing(args: Namespace) -> None:
    """Raise UsageError where a batch that is to be mixed cannot be divided into pairs."""
    size = args.batch_size_per_device
    for name in MIXING_FLAGS:
        if getattr(args, name) and size is not None and size % 2:
            raise UsageError(
                f"--{name} mixes images in pairs, and --batch_size_per_device={size} is odd; give "
                "an even one"
            )
