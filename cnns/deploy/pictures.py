"""The pictures that an export is calibrated and scored on: of parts, arrays, or plain files."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from cnns.convert.cache import (
    Settings,
    convert_for_evaluation,
    convert_for_training,
    is_photo_folder,
)
from cnns.data.arrays import ArraySource
from cnns.data.datasets import open_train_dataset, open_val_dataset
from cnns.data.images import (
    BadImage,
    Preprocessing,
    as_input,
    find_images,
    read_picture,
    to_rgb,
    upright,
)
from cnns.data.kinds import Arrays, Dataset, Shards
from cnns.data.records import RecordSource
from cnns.errors import RunError, UsageError
from cnns.log import notice
from cnns.places import CACHE_ROOT, PROJECT

SEED = 0  # of the choice of pictures
DEMO = [os.path.join("data", name) for name in ("cat.jpg", "coffee.jpg")]  # of PROJECT
MAX_LOOKED_AT = 20  # in search of two classes


@dataclass(frozen=True)
class Pictures:
    """RGB pictures by number."""

    path: str  # where they are, for people
    names: Callable[[int], str]
    open: Callable[[int], tuple[Image.Image, int]]  # label -1: not known
    count: int
    labelled: bool
    classes: tuple[str, ...] | None = None  # names of the labels, if known

    def __len__(self) -> int:
        return self.count

    def array(self, number: int, preprocessing: Preprocessing) -> tuple[np.ndarray, int]:
        """A picture as the network's input (3, H, W) float32, and its label. Raises RunError."""
        picture, label = self.open(number)
        return as_input(picture, preprocessing), label

    def choose(self, count: int) -> list[int]:
        """So many numbers, drawn without repetition, always the same, in order."""
        rng = np.random.default_rng(SEED)
        return sorted(rng.permutation(self.count)[:count].tolist())

    def part(self, numbers: list[int]) -> "Pictures":
        return Pictures(
            self.path,
            lambda i: self.names(numbers[i]),
            lambda i: self.open(numbers[i]),
            len(numbers),
            self.labelled,
            self.classes,
        )

    def batches(
        self, preprocessing: Preprocessing, size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All of them in order: (N, 3, H, W) float32 and labels (N,) int32."""
        for start in range(0, self.count, size):
            numbers = range(start, min(start + size, self.count))
            images, labels = zip(*(self.array(i, preprocessing) for i in numbers), strict=True)
            yield np.stack(images), np.array(labels, np.int32)


def of_dataset(data: Dataset) -> Pictures:
    """Those of parts or arrays, with their labels."""
    source: RecordSource | ArraySource
    if isinstance(data, Shards):
        source = RecordSource(data, say=False)
    elif isinstance(data, Arrays):
        source = ArraySource(data)
    else:
        raise UsageError("synthetic data are not pictures; name some")

    def open_one(number: int) -> tuple[Image.Image, int]:
        opened: AbstractContextManager[tuple[Image.Image, int]] = source.open(number)
        with opened as (picture, label):
            try:
                return to_rgb(upright(picture)), int(label)
            except OSError as error:
                raise BadImage(str(error)) from None

    def name(number: int) -> str:
        return f"{data.path}, image {number}"

    return Pictures(data.path, name, open_one, data.num_examples, True, data.classes)


def of_files(paths: list[str], *, path: str) -> Pictures:
    """Those of image files, without labels."""
    return Pictures(
        path, lambda i: paths[i], lambda i: (read_picture(paths[i]), -1), len(paths), False
    )


def crops(pictures: list[tuple[str, Image.Image]], *, count: int, path: str) -> Pictures:
    """Random square parts of pictures, always the same: for want of more pictures."""
    rng = np.random.default_rng(SEED)
    boxes = []
    for i in range(count):
        name, picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * rng.uniform(0.6, 1))
        left = int(rng.integers(picture.width - side + 1))
        top = int(rng.integers(picture.height - side + 1))
        boxes.append((name, picture, (left, top, left + side, top + side)))
    return Pictures(
        path,
        lambda i: f"{boxes[i][0]}, {boxes[i][2]}",
        lambda i: (boxes[i][1].crop(boxes[i][2]), -1),
        count,
        False,
    )


# Which ones a command means.


def named_images(image_path: list[str]) -> list[str]:
    """The image files of --image_path. Raises UsageError or RunError."""
    paths = []
    for found in find_images(image_path):
        if isinstance(found, RunError):
            raise found
        paths.append(found)
    return paths


def find_photographs(paths: list[str], *, flags: dict) -> Pictures:
    """What an export is compared on: the files named, else images of the run's own validation data,
    else those of data/."""
    own = None if paths else photographs_of(flags, count=len(DEMO))
    return own or (of_files(paths, path="data") if paths else demo_photographs())


def demo_photographs() -> Pictures:
    """Those of data/, wherever the command is given."""
    files = of_files([str(PROJECT / name) for name in DEMO], path="data")
    return replace(files, names=lambda i: DEMO[i])


def photographs_of(flags: dict, *, count: int) -> Pictures | None:
    """Some of the validation images of the run that left `flags`, of different classes, if there
    are any that can be read."""
    try:
        path = own_data(flags)[1]
        if path is None:
            return None
        pictures = of_dataset(open_val_dataset(path))
        chosen: dict[int, int] = {}
        for number in pictures.choose(MAX_LOOKED_AT):
            chosen.setdefault(pictures.open(number)[1], number)
        return pictures.part(sorted(chosen.values())[:count])
    except (UsageError, RunError, BadImage) as error:
        notice(f"The validation data of the run cannot be read ({error}).")
        return None


def settings_of(flags: dict) -> Settings:
    """How the run that left `flags` took folders of images."""
    share, cache = flags.get("val_split"), flags.get("cache_dir")
    return Settings(
        val_split=share if isinstance(share, float) else None,
        cache_dir=cache if isinstance(cache, str) else CACHE_ROOT,
        skip_bad=flags.get("skip_bad") is True,
        follow_links=flags.get("follow_links") is True,
    )


def own_data(flags: dict) -> tuple[str | None, str | None]:
    """The training and validation data of the run that left `flags`, where they are still there.

    A folder of images is what the run has converted it into. Raises as the conversion.
    """
    train, val = (flags.get(f"{use}_data_dir") for use in ("train", "val"))
    if not isinstance(train, str) or not os.path.exists(train):
        return None, val if isinstance(val, str) and os.path.exists(val) else None
    if not isinstance(val, str) or not os.path.exists(val):
        val = None
        if not is_photo_folder(train):
            return train, None
    train, val, _ = convert_for_training(train, val, settings=settings_of(flags))
    return train, val


def validation_pictures(
    path: str | None, *, flags: dict, classes: tuple[str, ...] | None, num_classes: int
) -> Pictures | None:
    """The labelled pictures to score: those named by --val_data_dir, else the run's own, if any.

    Raises UsageError or RunError where they cannot be read, or are of other classes.
    """
    if path is None:
        path = own_data(flags)[1]
        if path is None:
            return None
        notice(f"Validation data: {path}, of the run (--val_data_dir).")
    elif is_photo_folder(path):
        known = list(classes) if classes else None
        settings = replace(settings_of(flags), val_split=None)
        path, notices = convert_for_evaluation(
            path, settings=settings, classes=known, trained_on=flags
        )
        for text in notices:
            notice(text)
    return of_dataset(open_val_dataset(path).for_network(num_classes))


def calibration_pictures(path: str | None, *, flags: dict) -> Pictures | None:
    """What ranges are taken from: --calibration_dir, else the run's own training data, if any."""
    if path is None:
        path = own_data(flags)[0]
        if path is None:
            return None
        notice(f"Calibration: images of {path}, of the run (--calibration_dir).")
    elif not os.path.exists(path):
        raise UsageError(f"--calibration_dir: there is no file or directory {path}")
    elif os.path.isdir(path) and not any(name.startswith("part-") for name in os.listdir(path)):
        found = find_images([path])
        files = [each for each in found if isinstance(each, str)]
        if not files:
            raise RunError(str(found[0]))
        return of_files(files, path=path)
    return of_dataset(open_train_dataset(path))
