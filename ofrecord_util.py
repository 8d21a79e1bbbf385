"""Data: checks of OFRecord directories in Python, then the loaders that feed the graphs.

A loader is an `nn.Module` that a graph owns, in two halves. `batches(...)` runs outside the graph
and yields, without end, the tensors that one call of the graph takes; `forward(*batch)` runs inside
it and gives

    image  (N, 3, H, W) float32, RGB, normalised, on the device
    label  (N,) int32, on the device

with N the global batch size. A training loader's `batches(epoch, iteration)` begins after the first
`iteration` batches of an epoch, and what it yields depends on the seed, the epoch and the iteration
alone, so that a run can stop and go on anywhere. A validation loader's `batches()` are one round,
of `num_batches`, and have one tensor more in front,

    counted  (N,) int32, 1 in rows that hold an example for the first time, 0 in others

With several processes each makes the rows that its device gets.
"""

import io
import itertools
import json
import os
import re
import resource
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import oneflow as flow
from google.protobuf.message import DecodeError
from oneflow import nn
from oneflow.core.record.record_pb2 import OFRecord
from PIL import Image

from config import DATA_DEFAULTS, MAX_CLASSES, SHUFFLE_BUFFER_SIZE, RunError, UsageError
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

    def part_path(self, number: int) -> str:
        suffix = str(number).zfill(max(self.suffix_length, 1))
        return os.path.join(self.directory, PART_PREFIX + suffix)

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

    def fingerprint(self) -> dict:
        """What two nodes compare to see whether they have the same data."""
        if isinstance(self.source, Shards):
            content = repr(self.source.part_counts).encode()
        else:
            content = b"".join(array.tobytes() for array in self.source)
        return {
            "examples": self.num_examples,
            "classes": self.num_classes,
            "checksum": zlib.crc32(content),
        }


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


def check_shares(dataset: Dataset, *, num_processes: int, path: str) -> list[str]:
    """Raise UsageError where training data cannot be shared out among so many processes.

    Returns a notice where the shares are so unequal that an epoch, which is as long for each of
    them, leaves out more than 1 % of the images.
    """
    if not isinstance(dataset.source, Shards):
        return []
    counts = dataset.source.part_counts
    num_parts = len(counts)
    if num_parts < num_processes:
        raise UsageError(
            f"--train_data_dir: {path} has {num_parts} parts to read, and each of {num_processes} "
            "processes needs one of its own; make the data set anew with more (--num_parts)"
        )
    cuts = split_evenly(counts, num_processes)
    shares = [sum(counts[a:b]) for a, b in itertools.pairwise(cuts)]
    mean = sum(counts) / num_processes
    missed = sum(max(0, share - mean) for share in shares) / sum(counts)
    if missed <= 0.01:
        return []
    return [
        f"{path}: {num_parts} parts cannot be shared out evenly among {num_processes} processes; "
        f"each epoch leaves out about {missed:.0%} of the images, others each time, and repeats as "
        "many. A multiple of the processes, or many more parts (--num_parts), would mend that."
    ]


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
    shuffle_buffer_size: int | None = None  # records; None: `default_buffer_size`


class OFRecordLoader(nn.Module):
    """What training and validation share: OneFlow's native reader, and the label.

    Reader and decoders run on the CPU and outside the graph, where they can be made anew: a reader
    begins at its first record, and a decoder's random numbers at its seed. Each process reads parts
    of its own.
    """

    def __init__(self, shards: Shards, *, batch_size: int, device: str):
        super().__init__()
        self.shards = shards
        self.rank, self.num_ranks = flow.env.get_rank(), flow.env.get_world_size()
        self.batch_size = batch_size // self.num_ranks  # of this process
        self.placement = flow.env.all_device_placement(device)
        self.label = nn.OFRecordRawDecoder("class/label", shape=(), dtype=flow.int32)
        allow_open_files(len(shards.part_counts))

    def share(self, order: Sequence[int]) -> list[int]:
        """The parts that this process reads when all are taken in the given order."""
        counts = [self.shards.part_counts[number] for number in order]
        cuts = split_evenly(counts, self.num_ranks)
        return list(order[cuts[self.rank] : cuts[self.rank + 1]])

    def read(self, parts: Sequence[int], *, skip: int = 0, **reader) -> Iterator[flow.Tensor]:
        """Batches of records, round and round the parts in the given order, behind `skip` batches.

        The native reader takes parts by their numbers, and of these those that are a process's by
        its rank, so it is shown links under the right numbers. It opens all of its own before the
        first batch.
        """
        with link_parts(self.shards, parts, self.rank * len(parts)) as links:
            read = nn.OFRecordReader(
                links,
                batch_size=self.batch_size,
                data_part_num=len(parts) * self.num_ranks,
                part_name_prefix=PART_PREFIX,
                part_name_suffix_length=5,
                **reader,
            )
            record = read()
            self.label(record).numpy()  # waits until it was read
        for i in range(skip):
            record = read()
            if i % 64 == 0:
                self.label(record).numpy()  # the host must not ask for all of them at once
        while True:
            yield record
            record = read()

    def forward(self, image, label):
        return image, label


class OFRecordTrainLoader(OFRecordLoader):
    """Shuffled records, random crop, resize, flip, normalise.

    Each epoch has its own order of parts, and gives each process others of them. Within it records
    are drawn from a buffer that OneFlow fills up from the parts, and at their end from their
    beginning: of the records of an epoch, about 0.37 times as many as the buffer holds come late
    for it, and as many others twice.
    """

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
        super().__init__(shards, batch_size=batch_size, device=device)
        self.seed = seed
        self.augmentation = augmentation
        self.shuffle_buffer_size = augmentation.shuffle_buffer_size or default_buffer_size(
            shards.num_examples // self.num_ranks
        )
        size = preprocessing.image_size
        self.resize = nn.image.Resize(target_size=[size, size])
        self.normalise = crop_normalisation(preprocessing)

    def order(self, epoch: int) -> list[int]:
        """The parts of all processes, as they follow one another in an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(len(self.shards.part_counts)).tolist()

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        """Batches of an epoch, behind the first `iteration` of them, which are read and dropped."""
        records = self.read(
            self.share(self.order(epoch)),
            skip=iteration,
            random_shuffle=True,
            shuffle_buffer_size=self.shuffle_buffer_size,
            random_seed=derive_seeds(1, self.seed, self.rank, epoch)[0],
        )
        for step, record in enumerate(records, iteration):
            crop_seed, flip_seed = derive_seeds(2, self.seed, self.rank, epoch, step)
            label = to_global(self.label(record), self.placement)
            flip = nn.CoinFlip(
                batch_size=self.batch_size,
                random_seed=flip_seed,
                probability=self.augmentation.flip,
            )()
            decode = nn.OFRecordImageDecoderRandomCrop(
                "encoded",
                color_space="RGB",
                random_seed=crop_seed,
                random_area=self.augmentation.area,
                random_aspect_ratio=self.augmentation.aspect_ratio,
            )
            image = self.normalise(self.resize(decode(record))[0], flip)
            yield to_global(image, self.placement), label


class GPUDecodingTrainLoader(nn.Module):
    """The same with nvJPEG as decoder, on the device: --gpu_image_decoder.

    That decoder exists in graphs only, and a graph that is handed records has copies of them which
    are no longer valid, so the reader is in the graph as well. There it cannot be positioned: each
    process keeps its parts for the whole run, and a run that goes on reads from the beginning of
    its parts, in an order drawn for the step at which it goes on.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        seed: int,
        device: str,
        first_step: int = 0,
    ):
        super().__init__()
        self.device = device
        placement = flow.env.all_device_placement("cpu")
        on_cpu = {"placement": placement, "sbp": [flow.sbp.split(0)]}
        num_ranks, num_parts = flow.env.get_world_size(), len(shards.part_counts)
        record_seed, crop_seed, flip_seed = derive_seeds(3, seed, first_step)
        allow_open_files(num_parts)
        order = np.random.default_rng((seed, first_step)).permutation(num_parts)
        self.links = link_parts(shards, order.tolist())  # opened when the graph is compiled
        self.read = nn.OFRecordReader(
            self.links.name,
            batch_size=batch_size,
            data_part_num=num_parts,
            part_name_prefix=PART_PREFIX,
            part_name_suffix_length=5,
            random_shuffle=True,
            shuffle_buffer_size=augmentation.shuffle_buffer_size
            or default_buffer_size(shards.num_examples // num_ranks),
            # Several processes would come to disagree about who reads which part.
            shuffle_after_epoch=num_ranks == 1,
            random_seed=record_seed,
            **on_cpu,
        )
        self.label = nn.OFRecordRawDecoder("class/label", shape=(), dtype=flow.int32)
        self.encoded = nn.OFRecordBytesDecoder("encoded")
        self.decode = nn.OFRecordImageGpuDecoderRandomCropResize(
            target_width=preprocessing.image_size,
            target_height=preprocessing.image_size,
            random_area=augmentation.area,
            random_aspect_ratio=augmentation.aspect_ratio,
            seed=crop_seed,
            # As in OneFlow's own ResNet-50.
            num_workers=3,
            warmup_size=2048,
        )
        self.flip = nn.CoinFlip(
            batch_size=batch_size, probability=augmentation.flip, random_seed=flip_seed, **on_cpu
        )
        self.normalise = crop_normalisation(preprocessing)

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        """Nothing to hand in, without end."""
        return itertools.repeat(())

    def forward(self):
        record = self.read()
        image = self.decode(self.encoded(record))  # (N, H, W, 3) uint8, on the device
        image = self.normalise(image, self.flip().to(self.device))
        return image, self.label(record).to(self.device)


def crop_normalisation(preprocessing: Preprocessing) -> nn.Module:
    """(N, H, W, 3) uint8 and (N,) flips to (N, 3, H, W) float32, mirrored and normalised."""
    return nn.CropMirrorNormalize(
        color_space="RGB",
        output_layout="NCHW",
        mean=preprocessing.rgb_mean,
        std=preprocessing.rgb_std,
        output_dtype=flow.float,
    )


def link_parts(shards: Shards, order: Sequence[int], first: int = 0) -> tempfile.TemporaryDirectory:
    """A directory of links to parts, numbered from `first` on in the given order."""
    links = tempfile.TemporaryDirectory(prefix="ofrecord-order-")
    for i, number in enumerate(order, first):
        path = os.path.abspath(shards.part_path(number))
        os.symlink(path, os.path.join(links.name, f"{PART_PREFIX}{i:05d}"))
    return links


class OFRecordValLoader(OFRecordLoader):
    """Records in order, shorter side resized, centre crop, normalise.

    Where there are fewer parts than processes, some read a part and count none of it.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        num_examples: int,
        batch_size: int,
        preprocessing: Preprocessing,
        device: str,
    ):
        super().__init__(shards, batch_size=batch_size, device=device)
        self.num_examples = num_examples
        cuts = split_evenly(shards.part_counts, self.num_ranks)
        ends = [0, *itertools.accumulate(shards.part_counts)]
        self.bounds = [ends[cut] for cut in cuts]  # of each process, in records
        largest = max(b - a for a, b in itertools.pairwise(self.bounds))
        self.num_batches = -(-largest // self.batch_size)
        self.decode = nn.OFRecordImageDecoder("encoded", color_space="RGB")
        # Its default, the mean over the area of a pixel, is the nearest to Pillow's bilinear, which
        # smooths as it shrinks; OneFlow's bilinear does not. To Pillow's bicubic all are as near.
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

    def batches(self) -> Iterator[tuple]:
        first, end = self.bounds[self.rank], self.bounds[self.rank + 1]
        end = min(end, self.num_examples)
        records = self.read(self.share(range(len(self.shards.part_counts))) or [0])
        for i, record in enumerate(itertools.islice(records, self.num_batches)):
            row = first + np.arange(i * self.batch_size, (i + 1) * self.batch_size)
            image = self.normalise(self.resize(self.decode(record))[0])
            yield (
                to_global(flow.tensor((row < end).astype(np.int32)), self.placement),
                to_global(image, self.placement),
                to_global(self.label(record), self.placement),
            )


def split_evenly(counts: Sequence[int], num_shares: int) -> list[int]:
    """Cut a row of parts into shares with about as many records each.

    Share i is parts `cuts[i]` to `cuts[i + 1]`. None is empty unless there are fewer parts than
    shares.

    >>> split_evenly([5, 3, 4, 2], 2)
    [0, 2, 4]
    """
    ends = np.cumsum(counts)
    middles = ends - np.asarray(counts) / 2
    cuts = [0]
    for i in range(1, num_shares):
        cut = int((middles < ends[-1] * i / num_shares).sum())
        if len(counts) >= num_shares:
            cut = min(max(cut, cuts[-1] + 1), len(counts) - (num_shares - i))
        cuts.append(cut)
    return [*cuts, len(counts)]


def derive_seeds(count: int, *key: int) -> list[int]:
    """Seeds for OneFlow, of 31 bits, that depend on all numbers of `key`."""
    return [int(word) >> 1 for word in np.random.SeedSequence(key).generate_state(count)]


def default_buffer_size(num_examples: int) -> int:
    """1024 records, or a 50th of the data, so that under 1 % of an epoch's records are repeats."""
    return max(1, min(SHUFFLE_BUFFER_SIZE, num_examples // 50))


def allow_open_files(num_parts: int) -> None:
    """Let this process open all parts at once, as OneFlow's reader does, and some files beside.

    Raises RunError where the system does not allow it: the reader would end the process.
    """
    needed = 2 * num_parts + 256  # the next epoch's reader is opened before the last one's is gone
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise RunError(
                f"OneFlow keeps all {num_parts} parts open and this process may open {hard} files; "
                f"raise the limit (ulimit -n {needed}), or make fewer parts"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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

    def ahead(self, make_batch: Callable[[int], tuple], iteration: int = 0) -> Iterator[tuple]:
        """Tensors of what `make_batch` gives for this process from `iteration` on.

        The next batch is made while one is used.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(make_batch, iteration)
            while True:
                batch = ahead.result()
                iteration += 1
                ahead = pool.submit(make_batch, iteration)
                yield tuple(to_global(flow.tensor(array), self.placement) for array in batch)

    def positions(self, iteration: int) -> np.ndarray:
        """Where the rows of a batch that are this process's lie in an epoch."""
        return iteration * self.batch_size + np.arange(self.batch_size)[own_rows(self.batch_size)]

    def forward(self, image, label):
        image = image.permute(0, 3, 1, 2).to(dtype=flow.float32)  # (N, 3, H, W), 0 to 255
        return (image - self.rgb_mean) / self.rgb_std, label


class ArrayTrainLoader(ArrayLoader):
    """Every image once per epoch, in an order of its own; random crop, resize, flip.

    Where the last batch is not full, the first images of the epoch fill it up.
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

    def batches(self, epoch: int, iteration: int = 0) -> Iterator[tuple]:
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.images))
        return self.ahead(lambda step: self.make_batch(order, epoch, step), iteration)

    def make_batch(
        self, order: np.ndarray, epoch: int, iteration: int
    ) -> tuple[np.ndarray, np.ndarray]:
        positions = self.positions(iteration)
        indices = order[positions % len(order)]
        crops = [
            random_crop(
                self.images[i],
                size=self.size,
                augmentation=self.augmentation,
                rng=np.random.default_rng((self.seed, 1, epoch, position)),
            )
            for i, position in zip(indices, positions, strict=True)
        ]
        return np.stack(crops), self.labels[indices].astype(np.int32)


class ArrayValLoader(ArrayLoader):
    """Images in order; shorter side resized, centre crop."""

    def __init__(
        self, images, labels, *, num_examples: int, preprocessing: Preprocessing, **array_loader
    ):
        super().__init__(images, labels, preprocessing=preprocessing, **array_loader)
        self.preprocessing = preprocessing
        self.num_examples = num_examples
        self.num_batches = -(-num_examples // self.batch_size)

    def batches(self) -> Iterator[tuple]:
        return itertools.islice(self.ahead(self.make_batch), self.num_batches)

    def make_batch(self, iteration: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = self.positions(iteration)
        indices = positions % len(self.images)
        crops = [
            center_crop(
                Image.fromarray(self.images[i]),
                resize_shorter=self.preprocessing.resize_shorter,
                size=self.size,
                interpolation=self.preprocessing.interpolation,
            )
            for i in indices
        ]
        counted = (positions < self.num_examples).astype(np.int32)
        return counted, np.stack(crops), self.labels[indices].astype(np.int32)


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
        self.batch_size = batch_size
        self.pool = []
        for _ in range(self.POOL_BATCHES):
            image = rng.standard_normal((batch_size, 3, image_size, image_size), np.float32)
            label = rng.integers(0, num_classes, batch_size, np.int32)
            self.pool.append((to_device(image, placement), to_device(label, placement)))

    @property
    def num_examples(self) -> int:
        return self.batch_size * len(self.pool)

    def batches(self, epoch: int = 0, iteration: int = 0) -> Iterator[tuple]:
        """The pool, from its first batch, in every epoch."""
        return itertools.islice(itertools.cycle(self.pool), iteration % len(self.pool), None)

    def forward(self, image, label):
        return image, label


class SyntheticValLoader(SyntheticLoader):
    """The pool once, of which the first `num_examples` count."""

    def __init__(self, *, num_examples: int, device: str, **synthetic_loader):
        super().__init__(device=device, **synthetic_loader)
        self.num_batches = -(-num_examples // self.batch_size)
        placement = flow.env.all_device_placement(device)
        self.counted = [
            to_device((rows < num_examples).astype(np.int32), placement)
            for rows in np.arange(self.num_examples).reshape(len(self.pool), -1)
        ]

    def batches(self) -> Iterator[tuple]:
        for i in range(self.num_batches):
            yield self.counted[i], *self.pool[i]


def own_rows(batch_size: int) -> slice:
    """The rows of a global batch that are this process's."""
    rows = batch_size // flow.env.get_world_size()
    return slice(rows * flow.env.get_rank(), rows * (flow.env.get_rank() + 1))


def to_device(batch: np.ndarray, placement) -> flow.Tensor:
    """An array that every process holds, as a global tensor split over the devices."""
    return to_global(flow.tensor(batch[own_rows(len(batch))]), placement)


def to_global(rows: flow.Tensor, placement) -> flow.Tensor:
    """The tensors of all processes, one below the other, as a global one on their devices.

    All are of one shape, which is not checked: that would take a round of messages each time.
    """
    return rows.to_global(placement, flow.sbp.split(0), check_meta=False)


def random_extent(
    width: int, height: int, *, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[int, int]:
    """Width and height of a random crop of a picture of `width` x `height` pixels."""
    least, most = augmentation.aspect_ratio
    for _ in range(10):
        area = height * width * rng.uniform(*augmentation.area)
        ratio = np.exp(rng.uniform(np.log(least), np.log(most)))
        w = max(1, round(float(np.sqrt(area * ratio))))
        h = max(1, round(float(np.sqrt(area / ratio))))
        if w <= width and h <= height and least <= w / h <= most:
            return w, h
    w, h = max(1, min(width, int(height * most))), max(1, min(height, int(width / least)))
    scale = np.sqrt(min(1.0, augmentation.area[1] * width * height / (w * h)))
    return max(1, int(w * scale)), max(1, int(h * scale))


def random_crop(
    image: np.ndarray, *, size: int, augmentation: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """A random part of an (H, W, 3) uint8 image, resized to (size, size, 3) and mirrored at random.

    Share of the area, uniform, and aspect ratio, uniform in its logarithm, are drawn up to ten
    times until the crop fits (Szegedy et al., https://arxiv.org/abs/1409.4842); else it is the
    largest within their bounds. Bilinear. OneFlow's decoder draws by the same formula.
    """
    height, width = image.shape[:2]
    w, h = random_extent(width, height, augmentation=augmentation, rng=rng)
    x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    box = (x, y, x + w, y + h)
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
    gpu_image_decoder: bool = False,
    first_step: int = 0,
) -> nn.Module:
    """The training loader of a checked data set. `batch_size` is the global one.

    `first_step` is the step at which the run goes on; only the GPU's decoder needs to know.
    """
    settings = {
        "batch_size": batch_size,
        "preprocessing": preprocessing,
        "augmentation": augmentation,
        "seed": seed,
        "device": device,
    }
    if gpu_image_decoder:
        return GPUDecodingTrainLoader(dataset.source, first_step=first_step, **settings)
    if isinstance(dataset.source, Shards):
        return OFRecordTrainLoader(dataset.source, **settings)
    return ArrayTrainLoader(*dataset.source, **settings)


def val_loader(
    dataset: Dataset, *, batch_size: int, preprocessing: Preprocessing, device: str
) -> nn.Module:
    """The validation loader of a checked data set. `batch_size` is the global one."""
    settings = {
        "num_examples": dataset.num_examples,
        "batch_size": batch_size,
        "preprocessing": preprocessing,
        "device": device,
    }
    if isinstance(dataset.source, Shards):
        return OFRecordValLoader(dataset.source, **settings)
    return ArrayValLoader(*dataset.source, **settings)
