"""OFRecord parts read by record number, at the offsets that an index beside each part holds.

The index of `part-00000` is `.part-00000.index`:

    8 bytes             CNNSIDX1
    3 x int64           bytes of the part, its time of change in ns, records
    int64 for each      where the record's length field stands
    uint32              CRC-32 of all before

all little-endian. One that is not of the part beside it, or is damaged, is made anew.
"""

import os
import platform
import resource
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image

from cnns.data.format import LENGTH, OFRecord, only_value, walk_records
from cnns.data.images import BadImage, open_image
from cnns.data.kinds import Shards
from cnns.errors import RunError
from cnns.inputs import open_input
from cnns.log import notice

HEADER = struct.Struct("<8s3q")
MAGIC = b"CNNSIDX1"
CHECKSUM = struct.Struct("<I")
WALKING_THREADS = 16  # for storage with a long latency
END_OF_IMAGE = b"\xff\xd9"


def index_path(part: str) -> str:
    """Hidden, so that a pattern such as part-* finds parts only."""
    directory, name = os.path.split(part)
    return os.path.join(directory, f".{name}.index")


def read_index(part: str, header: bytes, count: int) -> np.ndarray | None:
    """The offsets in the index of a part; None where it has none of so many records."""
    length = HEADER.size + 8 * count + CHECKSUM.size
    try:
        with open_input(index_path(part), buffering=0) as file:
            data = file.read(length + 1)
    except OSError:
        return None
    checked, checksum = data[: -CHECKSUM.size], data[-CHECKSUM.size :]
    if len(data) != length or not checked.startswith(header):
        return None
    if CHECKSUM.unpack(checksum)[0] != zlib.crc32(checked):
        return None
    offsets = np.frombuffer(checked, "<i8", count, HEADER.size)
    _, size, *_ = HEADER.unpack(header)
    # Whoever wrote it: what is read with it lies within the part.
    ends = np.append(offsets[1:], size)
    return offsets if offsets[0] == 0 and (ends - offsets > LENGTH.size).all() else None


def write_index(part: str, data: bytes) -> None:
    """Raises OSError. Others may do the same at the same time."""
    path = index_path(part)
    temporary = f"{path}.tmp-{platform.node()}-{os.getpid()}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.remove(temporary)


def index_part(part: str, count: int) -> tuple[np.ndarray, int, OSError | None]:
    """Offsets of the `count` records of a part, its size, and why they could not be kept.

    Raises RunError where the part is damaged or cannot be read.
    """
    try:
        with open_input(part, buffering=0) as file:
            state = os.fstat(file.fileno())
            header = HEADER.pack(MAGIC, state.st_size, state.st_mtime_ns, count)
            if count <= state.st_size // LENGTH.size:  # else the manifest is wrong
                offsets = read_index(part, header, count)
                if offsets is not None:
                    return offsets, state.st_size, None
            offsets = np.array(walk_records(file.fileno(), part), "<i8")
    except OSError as error:
        raise RunError(f"cannot read {part}: {error.strerror}") from None
    if len(offsets) != count:
        raise RunError(
            f"{part} holds {len(offsets)} records and its manifest says {count}; make the data set "
            "anew"
        )
    data = header + offsets.tobytes()
    try:
        write_index(part, data + CHECKSUM.pack(zlib.crc32(data)))
    except OSError as error:
        return offsets, state.st_size, error
    return offsets, state.st_size, None


class OpenPart:
    """A part that is open as long as somebody has it."""

    def __init__(self, path: str):
        with open_input(path, buffering=0) as file:
            self.fd = os.dup(file.fileno())

    def __del__(self, close=os.close):  # bound here: at exit the module is empty
        if hasattr(self, "fd"):
            close(self.fd)


@lru_cache
def say_unkept(path: str, reason: str) -> None:
    """Once: a run opens its records again for each size of images."""
    notice(
        f"{path}: indexes of its records cannot be kept there ({reason}); they are made anew each "
        "time."
    )


class RecordSource:
    """Pictures of OFRecord parts, by the number of their record over all parts.

    Reads records by themselves, wherever they are, and keeps a part open while there is room.
    """

    def __init__(self, data: Shards, *, say: bool = True):
        """Finds the records; a notice of indexes that cannot be kept is printed if `say`."""
        self.paths = [data.part_path(number) for number in range(len(data.part_counts))]
        with ThreadPoolExecutor(WALKING_THREADS) as pool:
            indexed = list(pool.map(index_part, self.paths, data.part_counts))
        unkept = [error for *_, error in indexed if error is not None]
        if unkept and say:
            say_unkept(data.path, unkept[0].strerror)
        # Of bytes behind a message, which OneFlow's reader would not take.
        warnings.filterwarnings("ignore", "Unexpected end-group tag", RuntimeWarning)
        counts = np.array(data.part_counts)
        self.starts = np.cumsum(counts) - counts  # number of the first record of each part
        self.offsets = np.concatenate([offsets for offsets, *_ in indexed])
        self.ends = np.empty_like(self.offsets)
        self.ends[:-1] = self.offsets[1:]
        self.ends[np.cumsum(counts) - 1] = [size for _, size, _ in indexed]
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.open_part = lru_cache(max(1, min(len(counts), limit // 2)))(OpenPart)

    def __len__(self) -> int:
        return len(self.offsets)

    def part_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, "right")) - 1

    def expect(self, numbers: Sequence[int]) -> None:
        """Let the system read ahead, as many records at once as it can."""
        for number in numbers:
            with suppress(OSError):
                part = self.open_part(self.paths[self.part_of(number)])
                start, end = int(self.offsets[number]), int(self.ends[number])
                os.posix_fadvise(part.fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, number: int) -> tuple[bytes, int, str]:
        """The JPEG and the label of a record, and its place for messages. Raises RunError."""
        k = self.part_of(number)
        path, start, end = self.paths[k], int(self.offsets[number]), int(self.ends[number])
        try:
            part = self.open_part(path)  # stays open while it is named here
            data = os.pread(part.fd, end - start, start)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None
        where = f"{path}: record {number - self.starts[k]}, at byte {start},"
        whole = len(data) == end - start
        if not whole or LENGTH.unpack_from(data)[0] != end - start - LENGTH.size:
            raise RunError(
                f"{where} is not what its index says: the part was changed; remove "
                f"{index_path(path)}"
            )
        try:
            message = OFRecord.FromString(data[LENGTH.size :])
            label = only_value(message, "class/label", "int32")
            return only_value(message, "encoded", "bytes"), label, where
        except (DecodeError, ValueError):
            raise RunError(
                f"{where} is not an OFRecord with one `encoded` image and one int32 "
                "`class/label`; make the data set with tools/make_ofrecord.py"
            ) from None

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of every record (N,) int32, for which all of them are read. Raises RunError."""
        with ThreadPoolExecutor(WALKING_THREADS) as pool:
            labels = pool.map(lambda number: self.read(number)[1], range(len(self)))
            return np.fromiter(labels, np.int32, len(self))

    @contextmanager
    def open(self, number: int) -> Iterator[tuple[Image.Image, int]]:
        """A picture, not decoded yet, and its label. Raises RunError, in the block as well.

        Of a JPEG that is cut off there is what OneFlow's decoder would make of it, since both
        decode with libjpeg, which is told that the image ends there.
        """
        encoded, label, where = self.read(number)
        try:
            with open_image(encoded + END_OF_IMAGE) as image:
                yield image, label
        except BadImage as error:
            raise RunError(
                f"{where} holds an image that cannot be read: {error}; make the data set anew "
                "without it"
            ) from None
