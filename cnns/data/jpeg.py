"""Checks of a JPEG without decoding it."""

import re
import struct
from dataclasses import dataclass

from cnns.data.images import MAX_PIXELS, BadImage, TooLarge, check_size

# Within compressed data 0xFF is followed by 0 (a data byte), D0-D7 (restart) or more 0xFF (fill).
NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
FILL = re.compile(rb"\xff+")
MAX_SIDE = 65_500  # pixels: libjpeg reads no more
START, END, SCAN, QUANTISATION = 0xD8, 0xD9, 0xDA, 0xDB
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Baseline, extended and progressive, with Huffman codes: what every decoder reads.
COMMON_FRAMES = (0xC0, 0xC1, 0xC2)
CHANNELS = {1: "greyscale JPEG", 4: "CMYK JPEG"}


@dataclass(frozen=True)
class JpegInfo:
    width: int
    height: int
    channels: int
    common: bool  # 8 bits, baseline, extended or progressive, Huffman codes

    @property
    def oddity(self) -> str:
        """What makes it unfit for OneFlow's decoders; empty for an RGB JPEG."""
        if self.channels != 3:
            return CHANNELS.get(self.channels, f"JPEG of {self.channels} channels")
        return "" if self.common else "JPEG of a rare coding"


def walk_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> JpegInfo:
    """Walk the markers of a JPEG, to the end of the image. Raises BadImage.

    Finds a file that is cut off or not a JPEG, a broken header, a missing quantisation table,
    and impossible bytes in the compressed data, but no other changes there. Nor does a decoder,
    mostly: libjpeg turns them into other pixels. What follows the image is ignored.
    """
    if not data.startswith(b"\xff\xd8"):
        raise BadImage("not a JPEG" if data else "empty file")
    try:
        info = walk_markers(data)
    except (IndexError, struct.error):
        raise BadImage(f"cut off at byte {len(data)}, before the end of the image") from None
    if max(info.width, info.height) > MAX_SIDE:
        raise TooLarge(
            f"a picture of {info.width} x {info.height} pixels, and libjpeg reads up to {MAX_SIDE} "
            "a side"
        )
    check_size(info.width, info.height, max_pixels)
    return info


def walk_markers(data: bytes) -> JpegInfo:
    """The same. Raises IndexError or struct.error as well, at the end of a file that is cut off."""
    info, tables, scans, at = None, False, 0, 2
    while data[at : at + 2] != bytes((0xFF, END)):
        marker = data[at + 1]
        if data[at] != 0xFF:
            raise BadImage(f"byte {at} is {data[at]:#04x} where a marker should be")
        if marker == 0xFF and (fill := FILL.match(data, at)):
            at = fill.end() - 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            at += 2
            continue
        if marker == START or marker < 0xC0:
            raise BadImage(f"byte {at} is the marker {marker:#04x}, which is not allowed there")
        (length,) = struct.unpack_from(">H", data, at + 2)
        body, at = at + 4, at + 2 + length
        if length < 2:
            raise BadImage(f"byte {body - 2} gives a length of {length}")
        if marker == QUANTISATION:
            tables = True
        elif marker in FRAMES:
            if info is not None:
                raise BadImage(f"a second frame at byte {body - 4}")
            if length < 8 or length != 8 + 3 * data[body + 5]:
                raise BadImage("a frame header of the wrong length")
            bits, height, width, channels = struct.unpack_from(">BHHB", data, body)
            common = marker in COMMON_FRAMES and bits == 8
            info = JpegInfo(width, height, channels, common)
        elif marker == SCAN:
            if info is None:
                raise BadImage("compressed data before the frame header")
            scans += 1
            found = NEXT_MARKER.search(data, at)
            at = found.start() if found else len(data)
    if info is None or not scans:
        raise BadImage("holds no image")
    if not (info.width and info.height and info.channels):
        raise BadImage(f"a picture of {info.width} x {info.height} pixels")
    if not tables:
        raise BadImage("no quantisation table")
    return info
