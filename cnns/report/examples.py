"""What the examples of a data set are called where they come from, and their pictures."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from PIL import Image, ImageOps

from cnns.data.format import LENGTH, decode_record, only_value
from cnns.data.images import BadImage, open_image, to_rgb
from cnns.data.kinds import Arrays, Dataset, Shards
from cnns.errors import RunError
from cnns.inputs import open_input

SIDE = 160  # pixels of the square that a picture is fitted into


@dataclass(frozen=True)
class Examples:
    """The first `num_examples` of a data set."""

    columns: tuple[str, ...]  # what tells them apart
    names: list[tuple[str | int, ...]]  # a value for each column
    pictures: dict[int, Image.Image | None]  # of those asked for; None: damaged


def look_up(data: Dataset, wanted: Collection[int]) -> Examples:
    """Names of all examples that are scored, pictures of the `wanted` ones.

    Raises RunError where a part cannot be read.
    """
    if isinstance(data, Shards):
        return look_up_records(data, wanted)
    names: list[tuple[str | int, ...]] = [(index,) for index in range(data.num_examples)]
    held = data.images if isinstance(data, Arrays) else None  # synthetic data have no pictures
    pictures: dict[int, Image.Image | None] = {}
    if held is not None:
        pictures = {i: fit(Image.fromarray(held[i])) for i in wanted}
    return Examples(("index",), names, pictures)


def look_up_records(data: Shards, wanted: Collection[int]) -> Examples:
    """Records are read whole only where that is needed: for a picture, or names of files."""
    names: list[tuple[str | int, ...]] = []
    pictures: dict[int, Image.Image | None] = {}
    named = file_name(next(read_records(data, {0}))[2]) != ""
    needed = range(data.num_examples) if named else wanted
    for index, (part, number, content) in enumerate(read_records(data, needed)):
        names.append((part, number, file_name(content)) if named else (part, number))
        if index in wanted:
            pictures[index] = decode_picture(content)
    return Examples(("part", "record", "filename")[: 2 + named], names, pictures)


def read_records(data: Shards, needed: Collection[int]) -> Iterator[tuple[str, int, bytes]]:
    """Part, number in it and content of each record, the last empty unless it is `needed`."""
    index = 0
    for part, count in enumerate(data.part_counts):
        path = data.part_path(part)
        try:
            with open_input(path) as file:
                for number in range(min(count, data.num_examples - index)):
                    field = file.read(LENGTH.size)
                    if len(field) < LENGTH.size:
                        raise RunError(f"{path} has changed while it was scored; evaluate it again")
                    (length,) = LENGTH.unpack(field)
                    content = file.read(length) if index in needed else b""
                    if not content:
                        file.seek(length, os.SEEK_CUR)
                    yield os.path.basename(path), number, content
                    index += 1
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from None


def file_name(content: bytes) -> str:
    """The name of the file that a record was made of; empty where it does not say."""
    try:
        return os.fsdecode(only_value(decode_record(content), "filename", "bytes"))
    except ValueError:
        return ""


def decode_picture(content: bytes) -> Image.Image | None:
    try:
        encoded = only_value(decode_record(content), "encoded", "bytes")
        with open_image(encoded) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            image.load()
            return fit(to_rgb(image))
    except (ValueError, BadImage):
        return None


def fit(image: Image.Image) -> Image.Image:
    """A picture as large as fits into the square; a small one shows its pixels."""
    small = max(image.size) < SIDE
    method = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
    return ImageOps.contain(image, (SIDE, SIDE), method)
