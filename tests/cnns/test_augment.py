"""What is made of a picture beyond crop and flip, against torchvision (golden/make_augment.py)."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnns.data import augment
from cnns.data.crops import Augmentation, random_resized_crop
from cnns.data.images import INTERPOLATIONS

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "golden" / "augment.npz"
with np.load(GOLDEN_FILE) as file:
    GOLDEN = {key: array[()] for key, array in file.items()}
PICTURE = Image.fromarray(GOLDEN["picture"])
RUNS = range(GOLDEN["runs"].item())
OURS = {  # torchvision's names
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
}
CASES = [key for key in GOLDEN if key.startswith("operation/")]


class Replay:
    """A generator that gives what torchvision drew, if it is asked for the same."""

    def __init__(self, draws):
        self.draws = draws.tolist()

    def integers(self, low, high=None):
        value = int(self.draws.pop(0))
        low, high = (0, low) if high is None else (low, high)
        assert low <= value < high
        return value

    def random(self):
        return self.draws.pop(0)

    def uniform(self, low, high):
        value = self.draws.pop(0)
        assert low - 1e-6 <= value <= high + 1e-6
        return value

    def normal(self, mean, std):
        value = self.draws.pop(0)
        assert abs(value - mean) <= 6 * std
        return value

    def permutation(self, count):
        return np.array([int(self.draws.pop(0)) for _ in range(count)])


def ours(name: str) -> str:
    return OURS.get(name, name.lower())


@pytest.mark.parametrize("case", CASES)
def test_operations(case):
    """To the bit."""
    _, name, magnitude, mode = case.split("/")
    apply = augment.OPERATIONS[ours(name)]
    made = apply(PICTURE, float(magnitude), INTERPOLATIONS[mode])
    np.testing.assert_array_equal(np.asarray(made), GOLDEN[case])


def test_all_operations_were_compared():
    compared = {ours(case.split("/")[1]) for case in CASES}
    assert compared | {"identity"} == set(augment.OPERATIONS)


@pytest.mark.parametrize("kind", augment.AUTO_AUGMENTS)
def test_magnitudes(kind):
    """In float32, as torchvision's are; what is cut to whole numbers is the same."""
    most = {
        "randaugment": augment.RANDAUGMENT,
        "trivialaugment_wide": augment.TRIVIALAUGMENT_WIDE,
    }[kind]
    found = [key for key in GOLDEN if key.startswith(f"magnitudes/{kind}/")]
    assert {ours(key.rpartition("/")[2]) for key in found} == (
        set(augment.OPERATIONS) - augment.NO_MAGNITUDE
    )
    for key in found:
        name = ours(key.rpartition("/")[2])
        own = np.array([augment.magnitude_of(name, level, most) for level in range(31)])
        if kind == "randaugment" and name.startswith("translate"):
            own *= PICTURE.size[name == "translate_y"]
        np.testing.assert_allclose(own, GOLDEN[key], rtol=1e-6, atol=2e-5, err_msg=name)
        if name.startswith(("translate", "posterize")):
            np.testing.assert_array_equal(own.astype(int), GOLDEN[key].astype(int), err_msg=name)


@pytest.mark.parametrize("kind", augment.AUTO_AUGMENTS)
@pytest.mark.parametrize("run", RUNS)
def test_random_operations(kind, run):
    """With torchvision's own random numbers, to the bit."""
    rng = Replay(GOLDEN[f"{kind}/{run}/draws"])
    settings = Augmentation(auto_augment=kind, num_ops=3, magnitude=11)
    made = augment.AUTO_AUGMENTS[kind](PICTURE, rng, augmentation=settings)
    np.testing.assert_array_equal(np.asarray(made), GOLDEN[f"{kind}/{run}/made"])
    assert not rng.draws


@pytest.mark.parametrize("run", RUNS)
def test_colour_jitter(run):
    rng = Replay(GOLDEN[f"jitter/{run}/draws"])
    made = augment.jitter(PICTURE, rng, strengths=tuple(GOLDEN["jitter"].tolist()))
    np.testing.assert_array_equal(np.asarray(made), GOLDEN[f"jitter/{run}/made"])
    assert not rng.draws


@pytest.mark.parametrize("run", RUNS)
def test_random_erasing(run):
    """The box; that the graph fills it is tested with the loader (test_augmented_batches.py)."""
    rng = Replay(GOLDEN[f"erasing/{run}/draws"])
    if len(rng.draws) > 1:  # torchvision draws the logarithm of the ratio
        assert (len(rng.draws) - 1) % 2 == 0
    top, bottom, left, right = augment.erased_box(rng, size=24, probability=0.8).astype(int)
    kept = np.ones((24, 24), bool)
    kept[top:bottom, left:right] = False
    np.testing.assert_array_equal(kept, GOLDEN[f"erasing/{run}/made"])
    assert not rng.draws


def test_how_often_and_how_much_is_erased():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.erased_box(rng, size=224, probability=0.25) for _ in range(4000)])
    height, width = (boxes[:, 1] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 2])
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    area, ratio = (height * width)[erased] / 224**2, (height / np.maximum(width, 1))[erased]
    assert 0.019 < area.min() < 0.025 and 0.31 < area.max() < 0.331
    assert 0.29 < ratio.min() < 0.35 and 2.9 < ratio.max() < 3.35


def test_without_settings_it_is_the_crop():
    one, other = (np.random.default_rng(5) for _ in range(2))
    plain = random_resized_crop(PICTURE, one, size=32, augmentation=Augmentation())
    made = augment.augment(PICTURE, other, size=32, augmentation=Augmentation())
    np.testing.assert_array_equal(made, plain)
    assert one.random() == other.random()


def test_crops_are_resized_as_asked():
    settings = {"area": (1.0, 1.0), "aspect_ratio": (44 / 36, 44 / 36), "flip": 0.0}
    for name, resample in INTERPOLATIONS.items():
        augmentation = Augmentation(interpolation=name, **settings)
        crop = augment.augment(
            PICTURE, np.random.default_rng(0), size=24, augmentation=augmentation
        )
        expected = PICTURE.resize((24, 24), resample)
        np.testing.assert_array_equal(crop, np.asarray(expected))
