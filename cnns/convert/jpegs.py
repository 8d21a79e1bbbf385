"""One image as the RGB JPEG that OneFlow reads.

OneFlow 0.9's OFRecord decoders read three-component JPEGs, baseline or progressive, and nothing
else: a greyscale JPEG is decoded to noise without an error, and a CMYK JPEG, a PNG, GIF, BMP or
WebP file ends the process with a memory fault.
"""

import io

from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from cnns.data.images import MAX_PIXELS, BadImage, open_image, orientation, to_rgb, upright
from cnns.data.jpeg import CHANNELS, JpegInfo, walk_jpeg
from cnns.flags.parser import Parser
from cnns.flags.values import number


def add_max_pixels(parser: Parser) -> None:
    text = "largest picture that is read, width times height"
    parser.add_argument("--max_pixels", type=number(int, 1, 2**32), default=MAX_PIXELS, help=text)


def load_small(image: Image.Image) -> None:
    """Decode all of a JPEG's compressed data, to an eighth of the size, in half the time."""
    image.draft(None, (1, 1))
    image.load()


def decode_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Decode a JPEG. Raises BadImage where Pillow cannot."""
    with open_image(data, max_pixels=max_pixels) as image:
        load_small(image)


def encode_jpeg(image: Image.Image, **options: object) -> bytes:
    """An RGB JPEG of `image`, quality 95 and full colour resolution unless `options` say else."""
    buffer = io.BytesIO()
    if "qtables" not in options:
        options.setdefault("quality", 95)
    # Pillow's buffer has to hold all of an optimised JPEG, and of noise that is more than it takes.
    ImageFile.MAXBLOCK = max(1 << 16, 4 * image.width * image.height)
    image.convert("RGB").save(buffer, "JPEG", **{"subsampling": 0, "optimize": True, **options})
    return buffer.getvalue()


def kind_of(image: Image.Image) -> str:
    """`RGB JPEG`, `greyscale JPEG`, ..., or the name of another format."""
    if image.format not in ("JPEG", "MPO"):  # MPO: a JPEG followed by more pictures
        return image.format or ""
    return CHANNELS[1] if image.mode == "L" else f"{image.mode} JPEG"


def to_rgb_jpeg(image: Image.Image) -> bytes:
    """An RGB JPEG of any image; of a greyscale JPEG with the same quantisation.

    That loses almost nothing: measured on a photograph, a mean error of 0.005 grey levels at the
    size of the original, against 0.16 and twice the size at quality 95.
    """
    image.load()
    if isinstance(image, JpegImageFile) and image.mode == "L":
        table = image.quantization[0]
        if max(table) <= 255:  # only an 8-bit table can be written to an ordinary JPEG
            return encode_jpeg(image, qtables=[table, table])
    return encode_jpeg(to_rgb(image))


def upright_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str]:
    """An upright RGB JPEG as it is, or another image as one; and what it was, if it was changed.

    The decoders ignore the orientation tags of cameras, which inference applies, so a picture that
    lies on its side is turned. Raises BadImage where Pillow cannot decode the whole image.
    """
    with open_image(data, max_pixels=max_pixels) as image:
        kind = kind_of(image)
        if orientation(image) in range(2, 9):
            return encode_jpeg(to_rgb(upright(image))), f"turned {kind}"
        if kind != "RGB JPEG":
            return to_rgb_jpeg(image), kind
        load_small(image)
        return data, ""


def passed_through(
    data: bytes, *, shorter: int | None, decode: bool, max_pixels: int = MAX_PIXELS
) -> tuple[bytes, str, JpegInfo]:
    """An RGB JPEG as it is, or another image as one; and what it was, if it was changed.

    The camera's orientation is ignored, as in published results on ImageNet. `shorter` shrinks
    larger pictures to that many pixels on the shorter side, quality 95 with colour at half
    resolution; `decode` also decodes what `walk_jpeg` finds in order.
    Raises BadImage with the reason.
    """
    was = ""
    try:
        info = walk_jpeg(data, max_pixels=max_pixels)
        reason = info.oddity
        if decode and not reason:
            decode_jpeg(data, max_pixels=max_pixels)
    except BadImage as error:
        reason = str(error)
    if reason:
        try:
            with open_image(data, max_pixels=max_pixels) as image:
                was, data = kind_of(image), to_rgb_jpeg(image)
        except BadImage as error:
            raise BadImage(reason if reason.startswith("cut off") else str(error)) from None
        was = "JPEG with stray bytes" if was == "RGB JPEG" else was
        info = walk_jpeg(data, max_pixels=max_pixels)
    if shorter and min(info.width, info.height) > shorter:
        with open_image(data, max_pixels=max_pixels) as image:
            scale = shorter / min(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            data = encode_jpeg(resized, subsampling=2)
        info = walk_jpeg(data, max_pixels=max_pixels)
    return data, was, info
