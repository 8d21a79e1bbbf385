"""What is made of a training picture after crop and flip: jitter, RandAugment, TrivialAugment.

timm's own RandAugment is in randaugment.py.

Pictures are Pillow's, RGB; each operation gives what torchvision 0.29.1 makes of such a picture, to
the bit. Random numbers come from the generator that is handed over and from nowhere else, in the
order of torchvision's own draws. Nothing here needs OneFlow.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cnns.data.crops import Augmentation, draw_resampling, random_resized_crop
from cnns.data.randaugment import Colour, timm_randaugment

LEVELS = 31  # of a magnitude, from 0 to the largest
# Of random erasing (arXiv:1708.04896), torchvision's: shares of the area, height over width.
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)

Operation = Callable[[Image.Image, float, Image.Resampling], Image.Image]


def affine(picture: Image.Image, matrix: tuple, resample: Image.Resampling) -> Image.Image:
    """A pixel (x, y) is taken from (a x + b y + c, d x + e y + f); outside is black."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample)


def shear(picture: Image.Image, x: float, y: float, resample: Image.Resampling) -> Image.Image:
    """Sheared by so many pixels per pixel, about the upper left corner."""
    # By way of angles in degrees, as torchvision does it, for the same rounding: at the edge of the
    # picture a pixel depends on it.
    x, y = (math.radians(math.degrees(math.atan(each))) for each in (x, y))
    return affine(picture, (1, math.tan(x), 0, math.sin(y) / math.cos(y), 1, 0), resample)


def shift_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Hue turned by a share of the circle, -0.5 to 0.5."""
    hue, saturation, value = picture.convert("HSV").split()
    # In 255 steps to the circle of 256, as torchvision does it.
    turned = (np.asarray(hue, np.int64) + int(turn * 255)) % 256
    hue = Image.fromarray(turned.astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


# Magnitudes: of shears, pixels per pixel; of translations, pixels; of rotations, degrees, counter
# clockwise; of enhancements, what is added to a factor of 1; bits kept; the least inverted level.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda picture, m, resample: picture,
    "shear_x": lambda picture, m, resample: shear(picture, m, 0, resample),
    "shear_y": lambda picture, m, resample: shear(picture, 0, m, resample),
    "translate_x": lambda picture, m, resample: affine(picture, (1, 0, -int(m), 0, 1, 0), resample),
    "translate_y": lambda picture, m, resample: affine(picture, (1, 0, 0, 0, 1, -int(m)), resample),
    "rotate": lambda picture, m, resample: picture.rotate(m, resample),
    "brightness": lambda picture, m, resample: ImageEnhance.Brightness(picture).enhance(1 + m),
    "color": lambda picture, m, resample: ImageEnhance.Color(picture).enhance(1 + m),
    "contrast": lambda picture, m, resample: ImageEnhance.Contrast(picture).enhance(1 + m),
    "sharpness": lambda picture, m, resample: ImageEnhance.Sharpness(picture).enhance(1 + m),
    "posterize": lambda picture, m, resample: ImageOps.posterize(picture, int(m)),
    "solarize": lambda picture, m, resample: ImageOps.solarize(picture, math.ceil(m)),
    "autocontrast": lambda picture, m, resample: ImageOps.autocontrast(picture),
    "equalize": lambda picture, m, resample: ImageOps.equalize(picture),
}
SIGNED = frozenset(OPERATIONS) - {
    "identity", "posterize", "solarize", "autocontrast", "equalize"
}  # fmt: skip
NO_MAGNITUDE = frozenset({"identity", "autocontrast", "equalize"})
ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
# The largest magnitudes: of translations in RandAugment a share of the side, and bits dropped.
RANDAUGMENT = {  # arXiv:1909.13719
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 150 / 331,
    "translate_y": 150 / 331,
    "rotate": 30.0,
    **dict.fromkeys(ENHANCEMENTS, 0.9),
    "posterize": 4.0,
}
TRIVIALAUGMENT_WIDE = {  # arXiv:2103.10158
    "shear_x": 0.99,
    "shear_y": 0.99,
    "translate_x": 32.0,
    "translate_y": 32.0,
    "rotate": 135.0,
    **dict.fromkeys(ENHANCEMENTS, 0.99),
    "posterize": 6.0,
}


def magnitude_of(name: str, level: int, most: Mapping[str, float]) -> float:
    """The magnitude of an operation at a level of 0 to 30; `most` has the largest ones."""
    if name in NO_MAGNITUDE:
        return 0.0
    if name == "posterize":
        return 8.0 - round(most[name] * level / (LEVELS - 1))
    if name == "solarize":
        return spaced(255, 0, level)
    return spaced(0, most[name], level)


def spaced(first: float, last: float, level: int) -> float:
    """A level of LEVELS from `first` to `last`, rounded to float32 as PyTorch's linspace is with
    fused multiplication: whole pixels of a translation depend on it."""
    step = float(np.float32(last - first) / np.float32(LEVELS - 1))
    if level < LEVELS // 2:
        return float(np.float32(first + step * level))
    return float(np.float32(last - step * (LEVELS - 1 - level)))


def draw_operation(rng: np.random.Generator) -> str:
    return [*OPERATIONS][int(rng.integers(len(OPERATIONS)))]


def draw_sign(name: str, rng: np.random.Generator) -> int:
    return -1 if name in SIGNED and rng.integers(2) else 1


def randaugment(
    picture: Image.Image, rng: np.random.Generator, *, augmentation: Augmentation
) -> Image.Image:
    """`num_ops` operations, each drawn from all, at one magnitude (Cubuk et al.)."""
    for _ in range(augmentation.num_ops):
        name = draw_operation(rng)
        magnitude = magnitude_of(name, augmentation.magnitude, RANDAUGMENT)
        if name in ("translate_x", "translate_y"):
            magnitude *= picture.size[name == "translate_y"]
        magnitude *= draw_sign(name, rng)
        picture = OPERATIONS[name](picture, magnitude, draw_resampling(augmentation, rng))
    return picture


def trivialaugment_wide(
    picture: Image.Image, rng: np.random.Generator, *, augmentation: Augmentation
) -> Image.Image:
    """One operation at a magnitude drawn from all levels (Müller and Hutter)."""
    name = draw_operation(rng)
    level = 0 if name in NO_MAGNITUDE else int(rng.integers(LEVELS))
    magnitude = magnitude_of(name, level, TRIVIALAUGMENT_WIDE) * draw_sign(name, rng)
    return OPERATIONS[name](picture, magnitude, draw_resampling(augmentation, rng))


AUTO_AUGMENTS: dict[str, Callable[..., Image.Image]] = {
    "randaugment": randaugment,
    "trivialaugment_wide": trivialaugment_wide,
}


def auto_augment(
    picture: Image.Image, rng: np.random.Generator, *, augmentation: Augmentation, fill: Colour
) -> Image.Image:
    """What the operations of `augmentation.auto_augment` make of a picture; without it, itself."""
    if augmentation.auto_augment is None:
        return picture
    own = AUTO_AUGMENTS.get(augmentation.auto_augment)
    if own is not None:
        return own(picture, rng, augmentation=augmentation)
    return timm_randaugment(picture, rng, augmentation=augmentation, fill=fill)


def jitter(
    picture: Image.Image,
    rng: np.random.Generator,
    *,
    strengths: tuple[float, ...],
) -> Image.Image:
    """Brightness, contrast, saturation and hue changed at random, in a random order.

    The first three are multiplied by a factor uniform in 1 - strength, at least 0, to 1 + strength;
    hue is turned by up to its strength, a share of the circle. A strength of 0 leaves as it is.
    """
    order = rng.permutation(4).tolist()
    factors = [
        rng.uniform(max(0.0, 1 - strength), 1 + strength) if strength else None
        for strength in strengths[:3]
    ]
    turn = rng.uniform(-strengths[3], strengths[3]) if strengths[3] else None
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in order:
        if number == 3:
            picture = picture if turn is None else shift_hue(picture, turn)
        elif (factor := factors[number]) is not None:
            picture = enhancers[number](picture).enhance(factor)
    return picture


def augment(
    picture: Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    augmentation: Augmentation,
    fill: Colour = (0, 0, 0),
) -> np.ndarray:
    """What training sees of a picture, (size, size, 3) uint8 RGB, but for random erasing.

    Crop, flip, jitter and then the operations of `auto_augment`; timm's put `fill` where they leave
    nothing, torchvision's black.
    """
    pixels = random_resized_crop(picture, rng, size=size, augmentation=augmentation)
    if augmentation.color_jitter is None and augmentation.auto_augment is None:
        return pixels
    picture = Image.fromarray(pixels)
    if augmentation.color_jitter is not None:
        picture = jitter(picture, rng, strengths=augmentation.color_jitter)
    return np.asarray(auto_augment(picture, rng, augmentation=augmentation, fill=fill))


def erased_box(rng: np.random.Generator, *, size: int, probability: float) -> np.ndarray:
    """(4,) float32: top, bottom, left and right of what is erased of an image of `size` x `size`.

    Its share of the area is uniform in ERASED_AREA, and its ratio uniform in its logarithm; up to
    ten are drawn until one is smaller than the image. All 0: nothing is erased.
    """
    box = np.zeros(4, np.float32)
    if rng.random() >= probability:
        return box
    for _ in range(10):
        area = size * size * rng.uniform(*ERASED_AREA)
        ratio = np.exp(rng.uniform(*np.log(ERASED_RATIO)))
        height, width = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if height < size and width < size:
            top = int(rng.integers(0, size - height + 1))
            left = int(rng.integers(0, size - width + 1))
            box[:] = top, top + height, left, left + width
            break
    return box
