"""Flags of what is made of training images beyond crop and flip."""

import argparse
from argparse import Namespace
from collections.abc import Mapping

from cnns.data.augment import AUTO_AUGMENTS, LEVELS
from cnns.data.crops import RANDOM
from cnns.data.images import INTERPOLATIONS
from cnns.data.randaugment import read_randaugment
from cnns.errors import UsageError
from cnns.flags.parser import Flag
from cnns.flags.values import number, numbers, path
from cnns.hints import nearest


def color_jitter(text: str) -> tuple[float, ...]:
    values = numbers(4, low=0)(text)
    if values[3] > 0.5:
        raise argparse.ArgumentTypeError(f"{text!r}: the last, of hue, must be at most 0.5")
    return values


def auto_augment(text: str) -> str:
    if text in AUTO_AUGMENTS:
        return text
    if text.split("-")[0] == "rand":
        try:
            read_randaugment(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
        return text
    near = nearest(text, AUTO_AUGMENTS)
    hint = f", did you mean {near!r}?" if near else ""
    choices = ", ".join(sorted(AUTO_AUGMENTS))
    raise argparse.ArgumentTypeError(
        f"invalid choice: {text!r}{hint} (choose from {choices}, or timm's, such as "
        "rand-m7-mstd0.5-inc1)"
    )


# Of loaders of single pictures: with OFRecord parts they bring --data_order=global.
PICTURE_FLAGS = {
    "interpolation": Flag(
        "how Pillow resizes: training crops, validation of arrays, inference; validation of "
        "OFRecord parts is OneFlow's",
        choices=INTERPOLATIONS,
        otherwise="bilinear for training crops, else the network's own",
        fixed=True,
    ),
    "train_interpolation": Flag(
        "how training crops and the operations of --auto_augment are resampled, if not as "
        "--interpolation says; random: one of the others, drawn for each, as timm does unless told "
        "otherwise",
        choices=(*INTERPOLATIONS, RANDOM),
        otherwise="--interpolation",
        fixed=True,
    ),
    "auto_augment": Flag(
        "operations of Pillow on each image: randaugment (arXiv:1909.13719), trivialaugment_wide "
        "(arXiv:2103.10158), both torchvision's, black where they leave nothing; or timm's "
        "RandAugment by its name there, such as rand-m7-mstd0.5-inc1, with the mean colour there",
        auto_augment,
        otherwise="none",
        metavar="randaugment|trivialaugment_wide|rand-...",
        fixed=True,
    ),
    "randaugment_num_ops": Flag(
        "operations on each image",
        number(int, 1, 100),
        2,
        needs=("auto_augment", ("randaugment",)),
    ),
    "randaugment_magnitude": Flag(
        f"magnitude of all operations, 0 to {LEVELS - 1}",
        number(int, 0, LEVELS - 1),
        9,
        needs=("auto_augment", ("randaugment",)),
    ),
    "color_jitter": Flag(
        "brightness, contrast and saturation times a factor of 1 - strength to 1 + strength, and "
        "hue turned by up to a share of the circle, in a random order",
        color_jitter,
        otherwise="none",
        metavar="BRIGHTNESS,CONTRAST,SATURATION,HUE",
        fixed=True,
    ),
    "random_erasing": Flag(
        "probability that a box of 2 to 33 % of an image becomes the mean colour "
        "(arXiv:1708.04896)",
        number(float, 0, 1),
        0.0,
        fixed=True,
    ),
    "repeated_augmentation": Flag(
        "times that each image comes in an epoch, augmented anew, in one batch (arXiv:1901.09335); "
        "an epoch is as long as before, and so has fewer images",
        number(int, 1, 100),
        1,
        fixed=True,
    ),
}
# Of classes that are not equally frequent.
CLASS_FLAGS = {
    "class_weights": Flag(
        "weights of the classes in the loss: auto, in inverse proportion to their images, with a "
        "mean of 1 over all images; or a YAML or JSON file with a list of all, or `class: weight` "
        "lines; auto reads every record once before training",
        path,
        otherwise="all equal",
        metavar="auto|FILE",
    ),
    "balanced_sampler": Flag(
        "images of each class equally often in an epoch, which is as long as before: those of "
        "small classes several times, augmented anew; reads every record once before training",
        default=False,
        fixed=True,
    ),
}
BY_PICTURE = PICTURE_FLAGS | {"balanced_sampler": CLASS_FLAGS["balanced_sampler"]}


def check_class_flags(args: Namespace) -> None:
    if args.class_weights is not None and args.balanced_sampler:
        raise UsageError(
            "--class_weights and --balanced_sampler both make up for uneven classes; give one of "
            "them"
        )


def picture_flags_given(args: Namespace, flags: Mapping[str, Flag]) -> list[str]:
    """Those of BY_PICTURE that are not left at their defaults."""
    return [name for name in BY_PICTURE if getattr(args, name) not in (None, flags[name].default)]


def choose_data_order(args: Namespace, flags: Mapping[str, Flag]) -> list[str]:
    """Take --data_order=global where only that loader can do what is asked for. Gives notices."""
    given = picture_flags_given(args, flags)
    of_parts = args.train_data_dir is not None and not args.train_data_dir.endswith(".npz")
    if not given or not of_parts or args.data_order == "global":
        return []
    args.data_order = "global"
    names = " ".join(f"--{name}" for name in given)
    return [f"{names}: images come from Pillow, not OneFlow's decoder (--data_order=global)."]


TRAIN_SIZE_FLAGS = {
    "train_image_size": Flag(
        "height and width of training crops, pixels; validation and inference keep --image_size, "
        "which is best about 1.3 times as large (arXiv:1906.06423)",
        number(int, 8),
        otherwise="--image_size",
    ),
    "first_train_image_size": Flag(
        "height and width of training crops in the first epochs, pixels; from there they grow to "
        "--train_image_size (progressive learning, arXiv:2104.00298)",
        number(int, 8),
        otherwise="--train_image_size, in all epochs",
    ),
    "train_size_stages": Flag(
        "sizes that training crops have one after the other, for as many epochs each; not more "
        "than there are epochs; a graph is compiled for each",
        number(int, 2, 100),
        4,
    ),
}


def check_train_sizes(args: Namespace, flags: Mapping[str, Flag]) -> None:
    """Raise UsageError where crops that grow contradict other flags."""
    if args.first_train_image_size is None:
        if args.train_size_stages != flags["train_size_stages"].default:
            raise UsageError("--train_size_stages needs --first_train_image_size; give both")
    elif args.gpu_image_decoder:
        raise UsageError(
            "--first_train_image_size contradicts --gpu_image_decoder, which would start reading "
            "from the beginning at each size; leave one of them out"
        )


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
