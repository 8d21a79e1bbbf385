"""Training crops against their formula: area, aspect ratio, position and flip over many draws.

A picture whose red grows with x and whose green grows with y tells where a crop was cut from it.
The same holds for OneFlow's decoder and for our own crops of arrays, so both take one formula:

    Up to ten times, draw a share of the area, uniform, and an aspect ratio, uniform in its
    logarithm, and round width and height to pixels. Take the first that fits into the picture and
    whose ratio is still within the bounds, at a place uniform among those it fits in. If there is
    none, take the largest crop within the bounds of ratio and area instead.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

import ofrecord_util
from cnns.data.crops import Augmentation, random_resized_crop
from cnns.data.datasets import open_train_dataset
from cnns.data.images import Preprocessing
from small import jpeg, record

PICTURES = {"usual": (240, 180), "long": (240, 60)}  # width and height, at most 256 levels
SIZE = 48  # of the crops, pixels
DRAWS = 4096
BATCH_SIZE = 256
SEED = 1
PREPROCESSING = Preprocessing(SIZE, SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Seeds are fixed, so a run is the same each time. Should other draws come of other seeds one day,
# a right distribution is refused once in 10,000 comparisons.
SURPRISE = 1e-4
DEVIATIONS = 4.0  # of a normal distribution; beyond are 6 of 100,000


@dataclass
class Windows:
    """Where crops were cut out, in pixels, (n,) each."""

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def quantities(self, picture: tuple[int, int]) -> dict[str, np.ndarray]:
        """What is compared. Places are shares of what is possible.

        Fitted windows are right to half a pixel, so whether one counts as 30 or as 31 wide is
        chance. Noise of a pixel on both sides makes that immaterial.
        """
        rng = np.random.default_rng(0)
        x, y, w, h = (
            value + rng.standard_normal(len(value))
            for value in (self.x, self.y, self.width, self.height)
        )
        width, height = picture
        return {
            "width": w,
            "height": h,
            "area": w * h / (width * height),
            "ratio": w / h,
            "x": (x + rng.uniform(size=len(x))) / (width - self.width + 1),
            "y": (y + rng.uniform(size=len(y))) / (height - self.height + 1),
        }


def formula(
    picture: tuple[int, int],
    count: int,
    *,
    area=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    attempts: int = 10,
    log_uniform: bool = True,
    largest: bool = True,
) -> Windows:
    """`count` draws of the formula; the last two settings break it."""
    rng = np.random.default_rng(9)
    width, height = picture
    w, h = np.zeros(count), np.zeros(count)
    for _ in range(attempts):
        target = width * height * rng.uniform(*area, count)
        bounds = np.log(ratio) if log_uniform else ratio
        drawn = rng.uniform(*bounds, count)
        drawn = np.exp(drawn) if log_uniform else drawn
        new_w, new_h = np.rint(np.sqrt(target * drawn)), np.rint(np.sqrt(target / drawn))
        fits = (new_w <= width) & (new_h <= height) & (w == 0)
        fits &= (new_w >= ratio[0] * new_h) & (new_w <= ratio[1] * new_h)
        w, h = np.where(fits, new_w, w), np.where(fits, new_h, h)
    fallback_w, fallback_h = width, height
    if largest:
        fallback_w = min(width, int(height * ratio[1]))
        fallback_h = min(height, int(width / ratio[0]))
    w, h = np.where(w == 0, fallback_w, w), np.where(h == 0, fallback_h, h)
    return Windows(
        np.floor(rng.uniform(size=count) * (width - w + 1)),
        np.floor(rng.uniform(size=count) * (height - h + 1)),
        w,
        h,
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of two empirical distributions."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    below = [np.searchsorted(x, at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def critical(n: int, m: int) -> float:
    """The distance that samples of one distribution exceed with probability SURPRISE."""
    return np.sqrt(-np.log(SURPRISE / 2) / 2 * (n + m) / (n * m))


def ramps(picture: tuple[int, int]) -> np.ndarray:
    width, height = picture
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


def find_windows(crops: np.ndarray) -> tuple[Windows, np.ndarray]:
    """Windows and flips of crops (n, SIZE, SIZE, 3) of 0 to 255, by fitting both ramps.

    Column i of a crop shows x = start + (i + 0.5) * extent / SIZE - 0.5. The borders are left out,
    where a resize has nothing to interpolate with.
    """
    inner = np.arange(SIZE // 8, SIZE - SIZE // 8)
    design = np.stack([np.ones(len(inner)), (inner + 0.5) / SIZE], axis=1)

    def fit(channel: int, axis: int):
        profile = crops[..., channel].mean(axis=axis)[:, inner]  # (n, len(inner))
        (start, extent), *_ = np.linalg.lstsq(design, profile.T, rcond=None)
        error = np.abs(design @ np.stack([start, extent]) - profile.T).max()
        assert error < 1.5, "this is no part of the picture"
        return start + 0.5, extent

    (x, width), (y, height) = fit(0, axis=1), fit(1, axis=2)
    flipped = width < 0
    x = np.where(flipped, x + width, x)
    return Windows(x, y, np.abs(width), height), flipped


def native_crops(picture: tuple[int, int], directory) -> np.ndarray:
    encoded = jpeg(ramps(picture), quality=100)
    (directory / "part-00000").write_bytes(record(encoded, 0) * BATCH_SIZE)
    loader = ofrecord_util.train_loader(
        open_train_dataset(str(directory)),
        batch_size=BATCH_SIZE,
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(),
        seed=SEED,
        device="cpu",
    )
    return take(loader, DRAWS // BATCH_SIZE).transpose(0, 2, 3, 1)


def take(loader, num_batches: int) -> np.ndarray:
    """Images of a loader's first batches, (n, 3, SIZE, SIZE)."""
    batches = loader.batches(0)
    return np.concatenate([loader(*next(batches))[0].numpy() for _ in range(num_batches)])


def array_crops(picture: tuple[int, int], directory) -> np.ndarray:
    rng, ramp = np.random.default_rng(SEED), Image.fromarray(ramps(picture))
    settings = {"size": SIZE, "augmentation": Augmentation()}
    crops = [random_resized_crop(ramp, rng, **settings) for _ in range(DRAWS)]
    return np.stack(crops).astype(np.float64)


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("crops", [pytest.param(native_crops, marks=pytest.mark.long), array_crops])
def test_crops_follow_the_formula(tmp_path, crops, shape):
    picture = PICTURES[shape]
    windows, flipped = find_windows(crops(picture, tmp_path))
    mine = windows.quantities(picture)
    theirs = formula(picture, 100_000).quantities(picture)
    distances = {name: distance(mine[name], theirs[name]) for name in mine}
    assert max(distances.values()) < critical(DRAWS, 100_000), distances
    area = windows.width * windows.height / (picture[0] * picture[1])
    ratio = windows.width / windows.height
    for bound, found in ((0.08, area.min()), (3 / 4, ratio.min()), (4 / 3, ratio.max())):
        assert abs(found / bound - 1) < 0.05
    deviation = DEVIATIONS / np.sqrt(DRAWS)
    assert abs(flipped.mean() - 0.5) < deviation / 2
    independent = np.stack([flipped, mine["area"], mine["x"], mine["y"]])
    correlations = np.corrcoef(independent) - np.eye(4)
    assert np.abs(correlations).max() < deviation, correlations
    for lag in (1, BATCH_SIZE):  # the next crop, and that of the same place in the next batch
        for value in independent:
            assert abs(np.corrcoef(value[lag:], value[:-lag])[0, 1]) < deviation


@pytest.mark.parametrize(
    "shape, fault",
    [
        ("usual", {"log_uniform": False}),
        ("usual", {"attempts": 1}),
        ("usual", {"ratio": (0.7, 1.4)}),
        ("usual", {"area": (0.03, 1.0)}),
        ("long", {"largest": False}),
    ],
)
def test_another_formula_would_be_noticed(shape, fault):
    picture = PICTURES[shape]
    right = formula(picture, 100_000).quantities(picture)
    wrong = formula(picture, 100_000, **fault).quantities(picture)
    distances = {name: distance(right[name], wrong[name]) for name in right}
    assert max(distances.values()) > critical(DRAWS, 100_000)
