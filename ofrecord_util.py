"""Data: checks of OFRecord directories in Python, then the loaders that feed the graphs.

A loader is an `nn.Module` that a graph owns, in two halves. `batches(step)` runs outside the graph
and yields, from the given step on without end, the tensors that one call of the graph takes;
`forward(*batch)` runs inside it and gives

    image  (N, 3, H, W) float32, RGB, normalised, on the device
    label  (N,) int32, on the device

with N the global batch size. OFRecord loaders read inside the graph by OneFlow's native reader, so
their `batches` yields nothing to pass in.
"""

import io
import itertools
import json
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import oneflow as flow
from google.protobuf.message import DecodeError
from oneflow import nn
from oneflow.core.record.record_pb2 import OFRecord
from PIL import Image

from config import DATA_DEFAULTS, MAX_CLASSES, RunError, UsageError
from image_util import Preprocessing, center_crop

MANIFEST = "manifest.json"
PART_PREFIX = "part-"
MAX_RECORD_BYTES = 1 << 30  # a longer length is garbage, not an image
# Walking length fields costs microseconds a record from a warm cache, a seek from a cold disk. Up
# to this many records it is done although a manifest vouches for the parts.
ALWAYS_WALK = 200_000
# Looking into records reads them whole. Up to this size every record is looked into.
ALWAYS_LOOK_BYTES = 256 << 20
WALKING_THREADS = 16  # parts are walked side by side, for storage with a long latency


# Checks. The native reader aborts the process on any fault of its files, so all are found here.


@dataclass(frozen=True)
class Shards:
    """An OFRecord directory that has been checked: the parts to read and what they hold."""

    directory: str
    suffix_length: int  # digits of `part-00000`; -1: not padded
    part_counts: tuple[int, ...]  # records of each part
    num_classes: int | None  # as in the manifest; None without one
    classes: tuple[str, ...] | None
    max_label: int | None  # the largest that was seen; None where not every record was looked at

    @property
    def num_examples(self) -> int:
        return sum(self.part_counts)

    def holding(self, num_examples: int) -> "Shards":
        """As many parts, from the first, as hold the first `num_examples` records."""
        ends = itertools.accumulate(self.part_counts)
        count = next(i for i, end in enumerate(ends, 1) if end >= num_examples)
        return replace(self, part_counts=self.part_counts[:count])


def check_shards(directory: str, *, flag: str, part_num: int | None = None) -> Shards:
    """Check the OFRecord parts of `directory` and count their records.

    With a manifest, parts are compared with it, and the record framing is walked as well unless
    there are more than ALWAYS_WALK records. Without one the framing is always walked, and the
    records are looked into: all of them up to ALWAYS_LOOK_BYTES, else the first of each part.

    Args:
        flag: the flag that named the directory, for messages.
        part_num: number of parts to use, from the first; all if None.

    Raises:
        UsageError: the directory or a part is missing, or `part_num` is more than there is.
        RunError: a part or the manifest is damaged, or a part is of another kind.
    """
    names, suffix_length = list_parts(directory, flag=flag)
    manifest = read_manifest(directory)
    if manifest is not None:
        compare_names(names, manifest, directory=directory, flag=flag)
    if part_num is not None:
        if part_num > len(names):
            raise UsageError(
                f"{part_num_flag(flag)}={part_num}, but {directory} holds {len(names)}; give at "
                "most that, or leave the flag out"
            )
        names = names[:part_num]
    paths = [os.path.join(directory, name) for name in names]
    max_label = None
    if manifest is None:
        counts = count_all_records(paths)
        max_label = look_into_records(paths)
    else:
        counts = compare_parts(paths, manifest["parts"])
    for path, count in zip(paths, counts, strict=True):
        if count == 0:
            raise RunError(f"{path} holds no records, and OneFlow's reader cannot open such a part")
    return Shards(
        directory=directory,
        suffix_length=suffix_length,
        part_counts=tuple(counts),
        num_classes=None if manifest is None else manifest.get("num_classes"),
        classes=None if manifest is None else tuple(manifest.get("classes") or ()) or None,
        max_label=max_label,
    )


def compare_names(names: list[str], manifest: dict, *, directory: str, flag: str) -> None:
    """Raise unless the parts in a directory are those of its manifest, in order."""
    listed = [part["name"] for part in manifest["parts"]]
    for name in listed:
        if name not in names:
            raise UsageError(
                f"{flag}: {os.path.join(directory, name)} is missing; its manifest lists "
                f"{len(listed)} parts: copy it again, or make the data set anew"
            )
    if listed != names:
        raise RunError(
            f"{directory} holds parts {names[0]} to {names[-1]}, and its manifest lists "
            f"{', '.join(listed[:3])}{', ...' if len(listed) > 3 else ''}; make the data set anew"
        )


def compare_parts(paths: list[str], entries: list[dict]) -> list[int]:
    """Records of each part, as its manifest says. Raises RunError where a part differs from it."""
    counts = [entry["num_examples"] for entry in entries[: len(paths)]]
    for path, entry in zip(paths, entries, strict=False):
        size = os.path.getsize(path)
        if size != entry["num_bytes"]:
            raise RunError(
                f"{path} has {size} bytes and its manifest says {entry['num_bytes']}: it was cut "
                "off or changed; copy it again, or make the data set anew"
            )
    if sum(counts) <= ALWAYS_WALK:
        for path, walked, count in zip(paths, count_all_records(paths), counts, strict=True):
            if walked != count:
                raise RunError(
                    f"{path} holds {walked} records and its manifest says {count}; make the data "
                    "set anew"
                )
    return counts


def count_all_records(paths: list[str]) -> list[int]:
    with ThreadPoolExecutor(WALKING_THREADS) as pool:
        return list(pool.map(count_records, paths))


def part_num_flag(data_dir_flag: str) -> str:
    return data_dir_flag.replace("_dir", "_part_num")


def list_parts(directory: str, *, flag: str) -> tuple[list[str], int]:
    """Names of the parts in `directory`, in order, and the number of digits they are padded to.

    Raises UsageError where there is no such directory, no part, or a gap in their numbers.
    """
    if not os.path.isdir(directory):
        raise UsageError(
            f"{flag}: there is no directory {directory}; check the path, or make a data set with "
            "tools/make_ofrecord.py or tools/make_mini_imagenet.py"
        )
    pattern = re.compile(re.escape(PART_PREFIX) + r"(\d+)")
    try:
        held = os.listdir(directory)
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {directory}: {error.strerror}") from None
    suffixes = sorted((match[1] for match in map(pattern.fullmatch, held) if match), key=int)
    if not suffixes:
        raise UsageError(
            f"{flag}: {directory} holds no OFRecord parts ({PART_PREFIX}00000, ...); "
            "tools/make_ofrecord.py makes them"
        )
    padded = len(suffixes[0]) > 1
    width = len(suffixes[0]) if padded else -1
    for i, suffix in enumerate(suffixes):
        expected = str(i).zfill(max(width, 1))
        if suffix != expected:
            raise UsageError(
                f"{flag}: {os.path.join(directory, PART_PREFIX + expected)} is missing; parts must "
                "be numbered from 0 without a gap"
            )
    return [PART_PREFIX + suffix for suffix in suffixes], width


def read_manifest(directory: str) -> dict | None:
    """The manifest of an OFRecord directory, or None where it has none.

    Raises RunError where the file is not a manifest of ours.
    """
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        well_formed = (
            bool(manifest["parts"])
            and all(
                isinstance(part["name"], str)
                and isinstance(part["num_examples"], int)
                and isinstance(part["num_bytes"], int)
                for part in manifest["parts"]
            )
            and isinstance(manifest.get("num_classes"), int | None)
            and all(isinstance(name, str) for name in manifest.get("classes") or ())
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise RunError(
            f"{path} is not a manifest that can be read; remove it to have the parts counted, or "
            "make the data set anew"
        )
    return manifest


def count_records(path: str) -> int:
    """Number of records of one part, found by walking its length fields.

    A part is a sequence of (int64 little-endian length, message of that length).

    Raises RunError, with record number and byte offset, where the file ends within a record or a
    length is impossible.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return walk_records(file.fileno(), path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def walk_records(fd: int, path: str) -> int:
    size = os.fstat(fd).st_size
    offset = count = 0
    while offset < size:
        where = f"{path}: record {count}, at byte {offset},"
        cut_off = RunError(
            f"{where} is cut off at byte {size}, the end of the file; copy the part again, or make "
            "it anew"
        )
        field = os.pread(fd, 8, offset)
        if len(field) < 8:
            raise cut_off
        (length,) = struct.unpack("<q", field)
        if not 0 < length < MAX_RECORD_BYTES:
            raise RunError(
                f"{where} claims a length of {length} bytes: the part is damaged or is no OFRecord "
                "file; copy it again, or make it anew"
            )
        offset += 8 + length
        if offset > size:
            raise cut_off
        count += 1
    return count


def look_into_records(paths: list[str]) -> int | None:
    """See that records are what the loaders read: one JPEG in RGB, and one label.

    What OneFlow's decoders meet instead ends the process, or, if it is a greyscale JPEG, is decoded
    to noise without a word. Data that tools/make_ofrecord.py made need no such look.

    Returns the largest label where every record was looked at, else None. Raises RunError, with
    part, record and byte.
    """
    every = sum(map(os.path.getsize, paths)) <= ALWAYS_LOOK_BYTES
    max_label = None
    for path in paths:
        with open(path, "rb") as file:
            number = 0
            while (every or number == 0) and (field := file.read(8)):
                where = f"{path}: record {number}, at byte {file.tell() - 8},"
                label = look_into_record(file.read(*struct.unpack("<q", field)), where)
                max_label = label if max_label is None else max(label, max_label)
                number += 1
    return max_label if every else None


def look_into_record(data: bytes, where: str) -> int:
    """The label of one serialised record. Raises RunError, with `where`, if it cannot be read."""
    message = OFRecord()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of bytes left over: see below
            message.ParseFromString(data)
        (encoded,) = message.feature["encoded"].bytes_list.value
        (label,) = message.feature["class/label"].int32_list.value
    except (DecodeError, ValueError):
        raise RunError(
            f"{where} is no OFRecord with one `encoded` image and one int32 `class/label`; make "
            "the data set with tools/make_ofrecord.py"
        ) from None
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            kind = f"{image.mode} {image.format}"
    except (OSError, SyntaxError, ValueError):
        kind = "no image"
    if kind not in ("RGB JPEG", "RGB MPO"):
        raise RunError(
            f"{where} holds {kind}, and OneFlow's decoder reads RGB JPEG only; make the data set "
            "with tools/make_ofrecord.py, which converts"
        )
    return label


def read_npz(path: str, *, flag: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) uint8 and labels (N,) int32 of an .npz file.

    Raises UsageError where there is no such file, RunError where it holds something else.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{flag}: there is no file {path}; check the path")
    if not zipfile.is_zipfile(path):
        raise RunError(f"{path} is not a readable .npz file: numpy.savez makes one")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise RunError(f"{path} must hold `images` and `labels`: {error.args[0]}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path} is not a readable .npz file: {error}") from None
    right_shape = images.ndim == 4 and images.shape[3] == 3 and min(images.shape[1:]) > 0
    if not right_shape or images.dtype != np.uint8:
        raise RunError(
            f"{path}: `images` is {images.shape} {images.dtype}; (N, H, W, 3) uint8 is needed"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise RunError(
            f"{path}: `labels` is {labels.shape} {labels.dtype}; ({len(images)},) integers are "
            "needed"
        )
    if len(images) == 0:
        raise RunError(f"{path} holds no images")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise RunError(
            f"{path}: labels run from {labels.min()} to {labels.max()}; 0, 1, ... needed"
        )
    return images, labels.astype(np.int32)


@dataclass(frozen=True)
class Dataset:
    """A data set that has been checked: what a flag named, before any loader opens it."""

    source: Shards | tuple[np.ndarray, np.ndarray]
    available: int  # examples in what is read
    num_examples: int  # examples to use, the first so many
    num_classes: int | None  # if known
    classes: tuple[str, ...] | None  # names, if known
    max_label: int | None  # the largest there is, if known


def open_train_dataset(
    path: str, *, part_num: int | None = None, num_examples: int | None = None
) -> Dataset:
    """Check the training data at `path`. Epochs are `num_examples` long, over all the parts.

    Raises as `check_shards` and `read_npz`, and UsageError if `num_examples` is more than there is.
    """
    return _open_dataset(
        path,
        flag="--train_data_dir",
        part_num=part_num,
        count_flag="--num_examples",
        num_examples=num_examples,
    )


def open_val_dataset(
    path: str, *, part_num: int | None = None, num_examples: int | None = None
) -> Dataset:
    """Check the validation data at `path`, of which the first `num_examples` are scored.

    Parts behind those are left out, so that they are not read for nothing. Raises as
    `open_train_dataset`.
    """
    data = _open_dataset(
        path,
        flag="--val_data_dir",
        part_num=part_num,
        count_flag="--num_val_examples",
        num_examples=num_examples,
    )
    if isinstance(data.source, Shards):
        source = data.source.holding(data.num_examples)
        return replace(data, source=source, available=source.num_examples)
    images, labels = (array[: data.num_examples] for array in data.source)
    return replace(data, source=(images, labels), available=data.num_examples)


def _open_dataset(
    path: str, *, flag: str, part_num: int | None, count_flag: str, num_examples: int | None
) -> Dataset:
    if path.endswith(".npz"):
        if part_num is not None:
            raise UsageError(f"{part_num_flag(flag)} has no effect on {path}; leave it out")
        source = images, labels = read_npz(path, flag=flag)
        available, max_label, classes = len(images), int(labels.max()), None
        num_classes = max_label + 1
    else:
        source = check_shards(path, flag=flag, part_num=part_num)
        available, max_label, classes = source.num_examples, source.max_label, source.classes
        num_classes = source.num_classes
    if num_examples is not None and num_examples > available:
        raise UsageError(
            f"{count_flag}={num_examples}, but {path} holds {available}; give at most that, or "
            "leave the flag out"
        )
    return Dataset(
        source=source,
        available=available,
        num_examples=num_examples or available,
        num_classes=num_classes,
        classes=classes,
        max_label=max_label,
    )


def check_labels(dataset: Dataset, *, num_classes: int, path: str) -> None:
    """Raise UsageError where the data set is known to have labels that the network has not."""
    needed = dataset.num_classes
    if needed is None and dataset.max_label is not None:
        needed = dataset.max_label + 1
    if needed is not None and needed > num_classes:
        raise UsageError(
            f"--num_classes={num_classes}, but {path} has labels up to {needed - 1}; give at least "
            f"--num_classes={needed}"
        )


# Loaders.


@dataclass(frozen=True)
class Augmentation:
    """The random part of training preprocessing."""

    area: tuple[float, float] = DATA_DEFAULTS["random_area"]  # share of the picture
    aspect_ratio: tuple[float, float] = DATA_DEFAULTS["random_aspect_ratio"]  # width over height
    flip: float = DATA_DEFAULTS["random_flip"]  # probability
    shuffle_buffer_size: int = DATA_DEFAULTS["shuffle_buffer_size"]  # records


class OFRecordLoader(nn.Module):
    """What training and validation share: the reader and the label."""

    def __init__(self, shards: Shards, *, batch_size: int, device: str, **reader):
        super().__init__()
        self.device = device
        self.reader = nn.OFRecordReader(
            shards.directory,
            batch_size=batch_size,
            data_part_num=len(shards.part_counts),
            part_name_prefix=PART_PREFIX,
            part_name_suffix_length=shards.suffix_length,
            placement=flow.env.all_device_placement("cpu"),
            sbp=flow.sbp.split(0),
            **reader,
        )
        self.label = nn.OFRecordRawDecoder("class/label", shape=(), dtype=flow.int32)

    def batches(self, step: int = 0) -> Iterator[tuple]:
        while True:
            yield ()

    def forward(self):
        record = self.reader()
        return self.image(record).to(self.device), self.label(record).to(self.device)


class OFRecordTrainLoader(OFRecordLoader):
    """Shuffled records, random crop, resize, flip, normalise; round the data without end."""

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        device: str,
    ):
        super().__init__(
            shards,
            batch_size=batch_size,
            device=device,
            random_shuffle=True,
            shuffle_after_epoch=True,
            shuffle_buffer_size=augmentation.shuffle_buffer_size,
            random_seed=seed,
        )
        self.decode = nn.OFRecordImageDecoderRandomCrop(
            "encoded",
            color_space="RGB",
            random_seed=seed,
            random_area=augmentation.area,
            random_aspect_ratio=augmentation.aspect_ratio,
        )
        size = preprocessing.image_size
        self.resize = nn.image.Resize(target_size=[size, size])
        self.flip = nn.CoinFlip(
            batch_size=batch_size,
            random_seed=seed,
            probability=augmentation.flip,
            placement=flow.env.all_device_placement("cpu"),
            sbp=flow.sbp.split(0),
        )
        self.normalise = nn.CropMirrorNormalize(
            color_space="RGB",
            output_layout="NCHW",
            mean=preprocessing.rgb_mean,
            std=preprocessing.rgb_std,
            output_dtype=flow.float,
        )

    def image(self, record):
        return self.normalise(self.resize(self.decode(record))[0], self.flip())


class OFRecordValLoader(OFRecordLoader):
    """Records in order, shorter side resized, centre crop, normalise."""

    def __init__(
        self, shards: Shards, *, batch_size: int, preprocessing: Preprocessing, device: str
    ):
        super().__init__(shards, batch_size=batch_size, device=device)
        self.decode = nn.OFRecordImageDecoder("encoded", color_space="RGB")
        self.resize = nn.image.Resize(
            resize_side="shorter",
            keep_aspect_ratio=True,
            target_size=preprocessing.resize_shorter,
        )
        self.normalise = nn.CropMirrorNormalize(
            color_space="RGB",
            output_layout="NCHW",
            crop_h=preprocessing.image_size,
            crop_w=preprocessing.image_size,
            crop_pos_y=0.5,
            crop_pos_x=0.5,
            mean=preprocessing.rgb_mean,
            std=preprocessing.rgb_std,
            output_dtype=flow.float,
        )

    def image(self, record):
        return self.normalise(self.resize(self.decode(record))[0])


class ArrayLoader(nn.Module):
    """Images from memory. Only uint8 crosses to the device; it is normalised inside the graph."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        preprocessing: Preprocessing,
        device: str,
    ):
        super().__init__()
        self.images, self.labels = images, labels  # (N, H, W, 3) uint8, (N,)
        self.batch_size = batch_size
        self.size = preprocessing.image_size
        self.placement = flow.env.all_device_placement(device)
        for name in ("rgb_mean", "rgb_std"):
            value = np.asarray(getattr(preprocessing, name), np.float32).reshape(1, 3, 1, 1)
            tensor = flow.tensor(value).to_global(self.placement, flow.sbp.broadcast)
            self.register_buffer(name, tensor, persistent=False)

    def batches(self, step: int = 0) -> Iterator[tuple]:
        """Tensors (N, H, W, 3) uint8 and (N,) int32. The next batch is made while one is used."""
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.make_batch, step)
            while True:
                image, label = ahead.result()
                step += 1
                ahead = pool.submit(self.make_batch, step)
                yield to_device(image, self.placement), to_device(label, self.placement)

    def forward(self, image, label):
        image = image.permute(0, 3, 1, 2).to(dtype=flow.float32)  # (N, 3, H, W), 0 to 255
        return (image - self.rgb_mean) / self.rgb_std, label


class ArrayTrainLoader(ArrayLoader):
    """Every image once per pass, in an order of its own; random crop, resize, flip.

    What a step gets depends on the seed and the step alone.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        augmentation: Augmentation,
        seed: int,
        **array_loader,
    ):
        super().__init__(images, labels, **array_loader)
        self.augmentation = augmentation
        self.seed = seed

    def make_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        passes, positions = np.divmod(positions, len(self.images))
        orders = {
            number: np.random.default_rng((self.seed, 0, number)).permutation(len(self.images))
            for number in set(passes.tolist())
        }
        indices = [orders[number][i] for number, i in zip(passes.tolist(), positions, strict=True)]
        rng = np.random.default_rng((self.seed, 1, step))
        crops = [
            random_crop(self.images[i], size=self.size, augmentation=self.augmentation, rng=rng)
            for i in indices
        ]
        return np.stack(crops), self.labels[indices].astype(np.int32)


class ArrayValLoader(ArrayLoader):
    """Images in order, round and round; shorter side resized, centre crop."""

    def __init__(self, images, labels, *, preprocessing: Preprocessing, **array_loader):
        super().__init__(images, labels, preprocessing=preprocessing, **array_loader)
        self.preprocessing = preprocessing

    def make_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        start = step * self.batch_size
        indices = np.arange(start, start + self.batch_size) % len(self.images)
        crops = [
            center_crop(
                Image.fromarray(self.images[i]),
                resize_shorter=self.preprocessing.resize_shorter,
                size=self.size,
            )
            for i in indices
        ]
        return np.stack(crops), self.labels[indices].astype(np.int32)


class SyntheticLoader(nn.Module):
    """A pool of random images with random labels that stays on the device.

    The pool is small, so that a network that learns shows it. Training and validation of one seed
    share it.
    """

    POOL_BATCHES = 2

    def __init__(
        self, *, batch_size: int, num_classes: int, image_size: int, seed: int, device: str
    ):
        super().__init__()
        placement = flow.env.all_device_placement(device)
        rng = np.random.default_rng(seed)
        self.pool = []
        for _ in range(self.POOL_BATCHES):
            image = rng.standard_normal((batch_size, 3, image_size, image_size), np.float32)
            label = rng.integers(0, num_classes, batch_size, np.int32)
            self.pool.append((to_device(image, placement), to_device(label, placement)))

    @property
    def num_examples(self) -> int:
        return sum(label.shape[0] for _, label in self.pool)

    def batches(self, step: int = 0) -> Iterator[tuple]:
        while True:
            yield self.pool[step % len(self.pool)]
            step += 1

    def forward(self, image, label):
        return image, label


def to_device(array: np.ndarray, placement) -> flow.Tensor:
    """A global tensor split along the batch over the devices of `placement`."""
    return flow.tensor(array).to_global(placement, flow.sbp.split(0))


def random_crop(
    image: np.ndarray, *, size: int, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """A random part of an (H, W, 3) uint8 image, resized to (size, size, 3) and mirrored at random.

    Share of the area, uniform, and aspect ratio, uniform in its logarithm, are drawn up to ten
    times until the crop fits (Szegedy et al., https://arxiv.org/abs/1409.4842); else it is the
    whole image. Bilinear.
    """
    height, width = image.shape[:2]
    box = (0, 0, width, height)
    for _ in range(10):
        area = height * width * rng.uniform(*augmentation.area)
        ratio = np.exp(rng.uniform(*np.log(augmentation.aspect_ratio)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            box = (x, y, x + w, y + h)
            break
    crop = np.asarray(
        Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    )
    return crop[:, ::-1] if rng.random() < augmentation.flip else crop


def train_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    seed: int,
    device: str,
) -> nn.Module:
    """The training loader of a checked data set. `batch_size` is the global one."""
    settings = {
        "batch_size": batch_size,
        "preprocessing": preprocessing,
        "augmentation": augmentation,
        "seed": seed,
        "device": device,
    }
    if isinstance(dataset.source, Shards):
        return OFRecordTrainLoader(dataset.source, **settings)
    return ArrayTrainLoader(*dataset.source, **settings)


def val_loader(
    dataset: Dataset, *, batch_size: int, preprocessing: Preprocessing, device: str
) -> nn.Module:
    """The validation loader of a checked data set. `batch_size` is the global one."""
    settings = {"batch_size": batch_size, "preprocessing": preprocessing, "device": device}
    if isinstance(dataset.source, Shards):
        return OFRecordValLoader(dataset.source, **settings)
    return ArrayValLoader(*dataset.source, **settings)
