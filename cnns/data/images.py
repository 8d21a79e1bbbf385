"""One image file to one input array, and the names of classes."""

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cnns.errors import RunError, UsageError
from cnns.hints import path_hint
from cnns.inputs import is_within, open_input
from cnns.jsonfile import integer, listed, one_of, real, record
from cnns.log import notice

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
# What those are, to Pillow, which goes by content: it knows others, and starts Ghostscript for EPS.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_SKIPPED = 5  # files that a notice names
MAX_PIXELS = 200_000_000  # of a picture; 800 MB in Pillow
MAX_RESIZED_PIXELS = 1 << 26  # 200 MB
MAX_SIZE = 1 << 14  # pixels a side
# Of mean and standard deviation, so that what is normalised stays finite; pixels are 0 to 255.
MAX_LEVEL, MIN_STD = 1e6, 1e-6
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CLASSES_FILE = Path(__file__).resolve().parents[2] / "data" / "imagenet_classes.txt"
WORDNET_LINE = re.compile(r"(n\d{8})\s+(\S.*)")


@dataclass(frozen=True)
class Preprocessing:
    """What turns a decoded picture into the network's input; part of a snapshot."""

    image_size: int  # pixels, height and width of the input
    resize_shorter: int  # pixels of the shorter side before the centre crop of validation
    rgb_mean: tuple[float, float, float]  # of 0 to 255
    rgb_std: tuple[float, float, float]
    interpolation: str = "bilinear"  # a key of INTERPOLATIONS; of inference and validation arrays


PREPROCESSING = record(
    {
        "image_size": integer(1, MAX_SIZE),
        "resize_shorter": integer(1, MAX_SIZE),
        "rgb_mean": listed(real(-MAX_LEVEL, MAX_LEVEL), low=3, high=3),
        "rgb_std": listed(real(MIN_STD, MAX_LEVEL), low=3, high=3),
    },
    {"interpolation": one_of(INTERPOLATIONS)},  # older snapshots have none
)


def read_preprocessing(settings: dict) -> Preprocessing:
    """Preprocessing as a snapshot or an exported file describes it; what else it says is ignored.

    Raises ValueError where the description is damaged.
    """
    names = [field.name for field in fields(Preprocessing)]
    own = {name: settings[name] for name in names if name in settings}
    PREPROCESSING(own, "")
    colours = {name: tuple(map(float, own[name])) for name in ("rgb_mean", "rgb_std")}
    return Preprocessing(**(own | colours))


def find_images(paths: list[str]) -> list[str | RunError]:
    """The image files that `paths` name: files as they are, directories by the images below them.

    In place of what must not be read there is an error: a link that leads out of its directory, a
    second name of a file or a directory, a link to nothing. Files that are not named like images
    are named in a notice.

    Raises UsageError where a path does not exist or a directory holds no images.
    """
    found: list[str | RunError] = []
    for path in paths:
        if os.path.isdir(path):
            found += find_in_directory(path)
        elif os.path.exists(path):
            found.append(path)
        elif os.path.islink(path):
            found.append(RunError(f"{path} is a link to {os.readlink(path)}, which is not there"))
        else:
            hint = path_hint(path)
            raise UsageError(f"--image_path: there is no file or directory {path}; {hint}")
    return found


def find_in_directory(directory: str) -> list[str | RunError]:
    """What `find_images` gives for a directory: its images by name, then those of its folders."""
    found: list[str | RunError] = []
    skipped: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    first_name(directory, seen)
    waiting = [directory]
    while waiting:
        folder, folders = waiting.pop(), []
        try:
            held = held_paths(folder)
        except OSError as error:
            if folder == directory:
                raise UsageError(f"--image_path: cannot read {folder}: {error.strerror}") from None
            found.append(RunError(f"cannot read {folder}: {error.strerror}"))
            continue
        for path, is_folder in held:
            if not is_folder and not path.lower().endswith(IMAGE_SUFFIXES):
                skipped.append(path)
            elif not is_within(path, directory):
                target = os.path.realpath(path)
                found.append(RunError(f"{path} is a link to {target}; give that to have it read"))
            elif (first := first_name(path, seen)) != path:
                kind = "directory" if is_folder else "file"
                found.append(RunError(f"{path} is the same {kind} as {first}"))
            elif is_folder:
                folders.append(path)
            else:
                found.append(path)
        waiting += reversed(folders)
    if skipped:
        names = ", ".join(skipped[:MAX_SKIPPED]) + ", ..." * (len(skipped) > MAX_SKIPPED)
        notice(f"Left out, not named like images ({len(skipped)}): {names}.")
    if not found:
        raise UsageError(
            f"--image_path: the directory {directory} holds no images ({', '.join(IMAGE_SUFFIXES)})"
        )
    return found


def held_paths(folder: str) -> list[tuple[str, bool]]:
    """Each path in a directory, sorted, and whether it is a directory; hidden ones left out.

    Raises OSError.
    """
    with os.scandir(folder) as entries:
        held = sorted((entry.name, entry.is_dir()) for entry in entries)
    return [
        (os.path.join(folder, name), is_folder)
        for name, is_folder in held
        if not (is_folder and name.startswith("."))
    ]


def first_name(path: str, seen: dict[tuple[int, int], str]) -> str:
    """The first path by which a file or a directory was found; of a link to nothing, its own."""
    if not os.path.exists(path):
        return path
    state = os.stat(path)
    return seen.setdefault((state.st_dev, state.st_ino), path)


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


class NotAnImage(BadImage):
    """One in none of IMAGE_FORMATS."""


class TooLarge(BadImage):
    """One of more pixels than are allowed."""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise TooLarge where a picture has more than `max_pixels`."""
    if width * height > max_pixels:
        raise TooLarge(
            f"a picture of {width} x {height} pixels, which is more than {max_pixels} in all"
        )


@contextmanager
def open_image(source: str | bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A picture in one of IMAGE_FORMATS, by its path or its bytes; its pixels are not read yet.

    Whatever its readers raise, here or in the block, becomes BadImage.
    """
    # What Pillow would print, two lines each, says nothing that an error does not; and its own
    # limit of pixels prints before it raises.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None
    try:
        with open_input(source) if isinstance(source, str) else io.BytesIO(source) as file:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                check_size(*image.size, max_pixels)
                yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise NotAnImage("not an image that Pillow can read" if source else "empty file") from None
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except Exception as error:  # Pillow's readers raise many kinds on a broken file
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def read_picture(path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file of any mode to RGB, upright.

    Grey, palette, CMYK and 16-bit pictures are converted, as `to_rgb` says.

    Raises RunError where the file is not an image, is damaged or has more than `max_pixels`.
    """
    try:
        with open_image(path, max_pixels=max_pixels) as image:
            image.load()
            return to_rgb(upright(image))
    except NotAnImage:
        raise RunError(f"{path} is not an image that can be read") from None
    except BadImage as error:
        raise RunError(f"{path} is not an image that can be read: {error}") from None


def orientation(image: Image.Image) -> int:
    """The camera's orientation tag: 1 is upright. Broken tags do not make an image bad."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever the reader of the tags raises
        return 1


def upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if orientation(image) in range(2, 9) else image


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB. Transparency is laid on white.

    Grey pictures of integers of more than 8 bits run from 0 to 65535; those of floats from 0 to 1,
    255 or 65535, the first of these that holds the largest value. Raises BadImage for a value
    outside of that, or one that is not a number.
    """
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these to 255 where it should scale them.
        pixels = np.asarray(image, np.float64)
        low, high = pixels.min(), pixels.max()
        if not 0 <= low <= high <= 65535:  # nor is a NaN
            raise BadImage(f"grey values from {low:g} to {high:g}, and 0 to 65535 can be read")
        if image.mode != "F" or high > 255:
            pixels = pixels / 65535 * 255
        elif high <= 1:
            pixels = pixels * 255
        image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(
    image: Image.Image, *, resize_shorter: int, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """The centre of an RGB image as (size, size, 3) uint8: the transform of validation.

    The shorter side is resized to `resize_shorter` pixels, then the centre is cut out; what the
    picture lacks where that is less than `size` is black.

    Raises RunError for a picture so elongated that resizing it would fill the memory.
    """
    width, height = image.size
    scale = resize_shorter / min(width, height)
    target = (round(width * scale), round(height * scale))
    if target[0] * target[1] > MAX_RESIZED_PIXELS:
        raise RunError(f"a picture of {width} x {height} pixels is too long for its width")
    resized = image.resize(target, INTERPOLATIONS[interpolation])
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def load_image(
    path: str, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """One image file as the network's input, (3, H, W) float32, RGB, normalised.

    It is the transform of validation. Raises RunError as `read_picture`.
    """
    image = read_picture(path, max_pixels=max_pixels)
    try:
        return as_input(image, preprocessing)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None


def as_input(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The same of an RGB picture. Raises RunError as `center_crop`."""
    pixels = center_crop(
        image,
        resize_shorter=preprocessing.resize_shorter,
        size=preprocessing.image_size,
        interpolation=preprocessing.interpolation,
    )
    mean = np.asarray(preprocessing.rgb_mean, np.float32)
    std = np.asarray(preprocessing.rgb_std, np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1), np.float32)


def class_names(num_classes: int, known: tuple[str, ...] | None) -> list[str]:
    """A name for every class: those of the snapshot, else ImageNet's for 1000, else numbers."""
    if known is None and num_classes == 1000:
        return imagenet_classes()
    names = list(known or ())[:num_classes]
    return names + [f"class {i}" for i in range(len(names), num_classes)]


def imagenet_classes() -> list[str]:
    """The 1000 class names of ImageNet-1k, in label order: `goldfish, Carassius auratus`."""
    return read_classes(CLASSES_FILE)[0]


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, stripped. Raises UsageError, which calls the content `what`."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        if isinstance(error, FileNotFoundError):
            reason += f"; {path_hint(path)}"
        raise UsageError(f"{path}: cannot read the {what}: {reason}") from None


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """Read a class list, one class a line: a name, or a WordNet id and a name.

    Returns the names and the WordNet ids (empty if the file has none), index = label.
    Raises UsageError for a file that is missing, empty, mixed or has one class twice.
    """
    lines = read_lines(path, "class list")
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UsageError(f"{path}: is empty; a class list needs one class a line")
    matches = [WORDNET_LINE.fullmatch(line) for line in lines]
    with_ids = any(matches)
    seen: dict[str, int] = {}
    for number, (line, match) in enumerate(zip(lines, matches, strict=True), start=1):
        if not line:
            raise UsageError(f"{path}: line {number} is empty; a class list has no gaps")
        if with_ids and not match:
            raise UsageError(
                f"{path}: line {number} ({line!r}) has no WordNet id, but other lines have"
            )
        key = match[1] if match else line
        if key in seen:
            raise UsageError(f"{path}: {key!r} stands in line {seen[key]} and line {number}")
        seen[key] = number
    if with_ids:
        return [match[2] for match in matches if match], [match[1] for match in matches if match]
    return lines, []
