"""Flags of the training and validation data."""

from collections.abc import Iterable

from cnns.convert.cache import VAL_SPLIT
from cnns.data.crops import SHUFFLE_BUFFER_SIZE, Augmentation
from cnns.flags.parser import Flag
from cnns.flags.values import COUNT, interval, number, path
from cnns.places import CACHE_ROOT

AUGMENTATION_FLAGS = {
    "random_area": Flag(
        "random crop: share of the image's area",
        interval(0, 1),
        Augmentation.area,
        metavar="MIN,MAX",
    ),
    "random_aspect_ratio": Flag(
        "random crop: width over height", interval(0), Augmentation.aspect_ratio, metavar="MIN,MAX"
    ),
    "random_flip": Flag("probability of a mirror image", number(float, 0, 1), Augmentation.flip),
}


def train_data_flags(data_orders: Iterable[str]) -> dict[str, Flag]:
    return {
        "train_data_dir": Flag(
            "directory of OFRecord parts, an .npz file with images (N, H, W, 3) uint8 and labels "
            "(N,), or a folder with one folder of images per class, or with train/ and validation/ "
            "of such; without it the data are synthetic",
            path,
        ),
        "train_data_part_num": Flag("read the first so many parts", COUNT, otherwise="all"),
        "num_examples": Flag(
            "training images per epoch, drawn from all there are", COUNT, otherwise="all"
        ),
        **AUGMENTATION_FLAGS,
        "data_order": Flag(
            "OFRecord parts: native is OneFlow's reader with its buffer, where each device has "
            "parts of its own; global is an order over all records that depends on --seed and the "
            "epoch alone, by an index that is kept beside each part",
            default="native",
            choices=data_orders,
            fixed=True,
        ),
        "shuffle_buffer_size": Flag(
            "size in records of the buffer from which OneFlow's OFRecord reader draws; 1: no "
            "shuffling within a part, and each image of a device's share once per epoch",
            COUNT,
            otherwise=f"{SHUFFLE_BUFFER_SIZE}, at most a 50th of that share",
        ),
    }


VAL_DATA_FLAGS = {
    "val_data_dir": Flag(
        "directory of OFRecord parts, an .npz file with images and labels, or a folder with one "
        "folder of images per class",
        path,
    ),
    "val_data_part_num": Flag("read the first so many parts", COUNT, otherwise="all"),
    "num_val_examples": Flag("score the first so many images", COUNT, otherwise="all"),
    "val_batch_size_per_device": Flag(
        "validation images per device and step; the figures do not depend on it", COUNT, 50
    ),
    "top_k": Flag(
        "k of the second accuracy that is printed, at most the number of classes less one", COUNT, 5
    ),
}
# Of folders with one folder of images per class.
FOLDER_FLAGS = {
    "val_split": Flag(
        "share of each class of a folder of images that is for validation, drawn by content; equal "
        "files stay on one side; 0: none, and in evaluation 1: all",
        number(float, 0, 1),
        otherwise=f"{VAL_SPLIT:g} where training has no folder for validation, and in evaluation "
        "what the run kept",
    ),
    "cache_dir": Flag(
        "where a folder of images is converted to OFRecord parts, once for each state of it",
        path,
        CACHE_ROOT,
    ),
    "skip_bad": Flag(
        "leave bad images of a folder out, and list them in the manifest", default=False
    ),
    "follow_links": Flag(
        "read what links lead to outside of a folder of images",
        default=False,
        otherwise="they are refused",
    ),
}
