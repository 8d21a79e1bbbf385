"""Photographs to measure with: crops of those in data/, as JPEGs of a size of one's own."""

import io
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from cnns.convert.jpegs import passed_through
from cnns.data.format import LENGTH, encode_record, part_name
from cnns.data.images import read_picture
from tools.make_mini_imagenet import DATA, PHOTOGRAPHS, draw_box

# What a photograph of 500 x 375 pixels, as most of ImageNet's are, takes at this quality: 60 kB.
IMAGENET_SIZE, IMAGENET_QUALITY = (500, 375), 95


def draw_photographs(size: tuple[int, int], *, quality: int) -> Iterator[bytes]:
    """JPEGs of (width, height) pixels without end, the same ones each time."""
    photographs = [read_picture(str(DATA / name)) for name in PHOTOGRAPHS]
    rng = random.Random(0)
    for photograph in itertools.cycle(photographs):
        crop = photograph.crop(draw_box(rng, *photograph.size))
        encoded = io.BytesIO()
        crop.resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=quality)
        yield encoded.getvalue()


def draw_imagenet(count: int) -> list[bytes]:
    return list(itertools.islice(draw_photographs(IMAGENET_SIZE, quality=IMAGENET_QUALITY), count))


def shrink(photographs: Sequence[bytes], shorter: int) -> list[bytes]:
    """As tools/make_ofrecord.py imagenet --resize_shorter stores them."""
    return [passed_through(each, shorter=shorter, decode=False)[0] for each in photographs]


def write_photographs(photographs: Sequence[bytes], root: Path, *, num_parts: int) -> None:
    """The same bytes in a file each, in `files`, and as OFRecord parts, in `parts`; label 0."""
    for name in ("files", "parts"):
        (root / name).mkdir(parents=True)
    for i, encoded in enumerate(photographs):
        (root / "files" / f"{i:06d}.jpg").write_bytes(encoded)
    for number in range(num_parts):
        records = [encode_record(each, 0) for each in photographs[number::num_parts]]
        framed = b"".join(LENGTH.pack(len(record)) + record for record in records)
        (root / "parts" / part_name(number)).write_bytes(framed)
