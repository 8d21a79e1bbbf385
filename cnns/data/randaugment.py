"""RandAugment as timm has it, by the names that timm gives it: `rand-m7-mstd0.5-inc1`.

It is what A1 to A3 of "ResNet strikes back" (arXiv:2110.00476) train with, and differs from the
paper's and torchvision's (augment.py): 15 operations, each left out with a probability, a magnitude
of its own for each, and the mean colour where an operation leaves nothing. Each operation gives
what timm 1.0.31 makes of a picture, to the bit, and random numbers are drawn in timm's order.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cnns.data.crops import Augmentation, draw_resampling

LEVELS = 10  # the largest magnitude
UNIFORM_ABOVE = 100  # a `mstd` above it: magnitudes are uniform from 0 to m
SECTION = re.compile(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)")
SECTIONS = (
    f"m0 to m{LEVELS} (magnitude, needed), n1 to n100 (operations, 2), p0 to p1 (probability of "
    "each, 0.5), mstd (standard deviation of the magnitude, 0; above 100: uniform), inc0 or inc1 "
    "(operations that get stronger with it, 0)"
)
Colour = tuple[int, ...]  # red, green, blue


@dataclass(frozen=True)
class RandAugment:
    """The settings that a name stands for."""

    magnitude: int  # 0 to LEVELS
    std: float = 0.0  # of a normal magnitude; inf: uniform from 0 to `magnitude`
    num_ops: int = 2  # for a picture
    probability: float = 0.5  # of each of them
    increasing: bool = False  # all operations get stronger with the magnitude


@lru_cache
def read_randaugment(text: str) -> RandAugment:
    """The settings of `rand-...`. Raises ValueError, which says what such a name may hold.

    timm's `t` and `mmax` are not supported, `m` may not be left out, and what timm would pass over
    or overwrite is refused: other words, and a section that comes twice.
    """
    kind, *sections = text.split("-")
    found: dict[str, str] = {}
    for section in sections:
        match = SECTION.fullmatch(section)
        if match is None or match[1] in found:
            what = "comes twice" if match else "is not supported"
            raise ValueError(f"{section!r} {what}; after rand come {SECTIONS}")
        found[match[1]] = match[2]
    values = {name: float(value) for name, value in found.items()}
    whole = all("." not in found.get(name, "") for name in ("m", "n", "inc"))
    within = (
        0 <= values.get("m", -1) <= LEVELS
        and 1 <= values.get("n", 2) <= 100
        and 0 <= values.get("p", 0.5) <= 1
        and values.get("inc", 0) in (0, 1)
    )
    if kind != "rand" or not (whole and within):
        raise ValueError(f"after rand come {SECTIONS}")
    std = values.get("mstd", 0.0)
    return RandAugment(
        magnitude=int(values["m"]),
        std=math.inf if std > UNIFORM_ABOVE else std,
        num_ops=int(values.get("n", 2)),
        probability=values.get("p", 0.5),
        increasing=values.get("inc") == 1,
    )


def add_below_half(picture: Image.Image, added: int) -> Image.Image:
    """Levels below 128 are raised, up to 255."""
    return picture.point([min(255, i + added) if i < 128 else i for i in range(256)] * 3)


def affine(picture: Image.Image, matrix: tuple, how: dict) -> Image.Image:
    """A pixel (x, y) is taken from (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, **how)


# What is made of a picture by a value; `how` has what transform and rotate of Pillow need as well.
# Values: degrees, bits kept, the least inverted level, what is added, factors (1: as it is), pixels
# per pixel, and shares of the side. In the order that timm draws from.
OPERATIONS: dict[str, Callable[[Image.Image, float, dict], Image.Image]] = {
    "autocontrast": lambda picture, v, how: ImageOps.autocontrast(picture),
    "equalize": lambda picture, v, how: ImageOps.equalize(picture),
    "invert": lambda picture, v, how: ImageOps.invert(picture),
    "rotate": lambda picture, v, how: picture.rotate(v, **how),
    "posterize": lambda picture, v, how: ImageOps.posterize(picture, int(v)),
    "solarize": lambda picture, v, how: ImageOps.solarize(picture, int(v)),
    "solarize_add": lambda picture, v, how: add_below_half(picture, int(v)),
    "color": lambda picture, v, how: ImageEnhance.Color(picture).enhance(v),
    "contrast": lambda picture, v, how: ImageEnhance.Contrast(picture).enhance(v),
    "brightness": lambda picture, v, how: ImageEnhance.Brightness(picture).enhance(v),
    "sharpness": lambda picture, v, how: ImageEnhance.Sharpness(picture).enhance(v),
    "shear_x": lambda picture, v, how: affine(picture, (1, v, 0, 0, 1, 0), how),
    "shear_y": lambda picture, v, how: affine(picture, (1, 0, 0, v, 1, 0), how),
    "translate_x": lambda picture, v, how: affine(picture, (1, 0, v * picture.width, 0, 1, 0), how),
    "translate_y": lambda picture, v, how: affine(
        picture, (1, 0, 0, 0, 1, v * picture.height), how
    ),
}
ENHANCEMENTS = frozenset({"color", "contrast", "brightness", "sharpness"})
# The largest values of those that go either way at even odds.
SIGNED = {"rotate": 30.0, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}


def draw_sign(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() > 0.5 else value


def draw_value(name: str, level: float, *, increasing: bool, rng: np.random.Generator) -> float:
    """The value of an operation at a magnitude of 0 to LEVELS; 0 where it takes none."""
    share = level / LEVELS
    if name in SIGNED:
        return draw_sign(share * SIGNED[name], rng)
    if name in ENHANCEMENTS:
        if increasing:
            return max(0.1, 1 + draw_sign(share * 0.9, rng))
        return share * 1.8 + 0.1
    if name == "posterize":
        return 4 - int(share * 4) if increasing else int(share * 4)
    if name == "solarize":
        return 256 - int(share * 256) if increasing else int(share * 256)
    if name == "solarize_add":
        return int(share * 110)
    return 0.0


def draw_level(settings: RandAugment, rng: np.random.Generator) -> float:
    """The magnitude of one operation, within 0 to LEVELS."""
    if settings.std == 0:
        return settings.magnitude
    if settings.std == math.inf:
        return rng.uniform(0, settings.magnitude)
    return max(0.0, min(rng.normal(settings.magnitude, settings.std), LEVELS))


def timm_randaugment(
    picture: Image.Image, rng: np.random.Generator, *, augmentation: Augmentation, fill: Colour
) -> Image.Image:
    """Operations drawn with replacement, each applied with a probability."""
    settings = read_randaugment(augmentation.auto_augment or "")
    names = [*OPERATIONS]
    drawn = [names[int(rng.integers(len(names)))] for _ in range(settings.num_ops)]
    for name in drawn:
        if settings.probability < 1 and rng.random() > settings.probability:
            continue
        level = draw_level(settings, rng)
        value = draw_value(name, level, increasing=settings.increasing, rng=rng)
        how = {}
        if name in SIGNED:
            how = {"resample": draw_resampling(augmentation, rng), "fillcolor": fill}
        picture = OPERATIONS[name](picture, value, how)
    return picture
