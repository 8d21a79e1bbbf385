"""Random crops and flips: how a training image is cut out, by the formula of OneFlow's decoder.

What may come after them is in augment.py.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cnns.data.images import INTERPOLATIONS, to_rgb

SHUFFLE_BUFFER_SIZE = 1024  # records; less for small data, see ofrecord_util.choose_buffer_size
RANDOM = "random"  # any of INTERPOLATIONS


@dataclass(frozen=True)
class Augmentation:
    """The random part of training preprocessing."""

    area: tuple[float, float] = (0.08, 1.0)  # share of the picture
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    flip: float = 0.5  # probability
    shuffle_buffer_size: int | None = None  # records; None: `choose_buffer_size`
    # What only loaders of single pictures can do, see cnns/flags/augment.py.
    interpolation: str | None = None  # a key of INTERPOLATIONS, or RANDOM; None: the loader's own
    auto_augment: str | None = None  # a key of augment.AUTO_AUGMENTS, or a name of randaugment.py
    num_ops: int = 2  # of RandAugment, for a picture
    magnitude: int = 9  # of RandAugment, 0 to 30
    color_jitter: tuple[float, ...] | None = None  # of brightness, contrast, saturation, hue
    random_erasing: float = 0.0  # probability
    repeats: int = 1  # of each record in an epoch, each augmented by itself
    balanced: bool = False  # as many records of each class


def derive_seeds(count: int, *key: int) -> list[int]:
    """Seeds for OneFlow, of 31 bits, that depend on all numbers of `key`."""
    return [int(word) >> 1 for word in np.random.SeedSequence(key).generate_state(count)]


def draw_resampling(augmentation: Augmentation, rng: np.random.Generator) -> Image.Resampling:
    """How a crop, or one operation on it, is resampled: bilinear unless told otherwise."""
    if augmentation.interpolation == RANDOM:
        return [*INTERPOLATIONS.values()][int(rng.integers(len(INTERPOLATIONS)))]
    return INTERPOLATIONS[augmentation.interpolation or "bilinear"]


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


def random_resized_crop(
    picture: Image.Image, rng: np.random.Generator, *, size: int, augmentation: Augmentation
) -> np.ndarray:
    """A random part of a picture, as (size, size, 3) uint8 RGB, mirrored at random.

    Share of the area, uniform, and aspect ratio, uniform in its logarithm, are drawn up to ten
    times until the crop fits (Szegedy et al., https://arxiv.org/abs/1409.4842); else it is the
    largest within their bounds. OneFlow's decoder draws by the same formula. Bilinear unless told
    otherwise.

    A JPEG that is not decoded yet is decoded at a half, a quarter or an eighth of its size where
    the crop has pixels enough even then.
    """
    width, height = picture.size
    w, h = random_extent(width, height, augmentation=augmentation, rng=rng)
    x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    picture.draft("RGB", (-(-width * size // w), -(-height * size // h)))
    if picture.mode != "RGB":
        picture = to_rgb(picture)
    across, down = picture.width / width, picture.height / height
    right, bottom = min((x + w) * across, picture.width), min((y + h) * down, picture.height)
    box = (x * across, y * down, right, bottom)
    crop = picture.resize((size, size), draw_resampling(augmentation, rng), box=box)
    if rng.random() < augmentation.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)
