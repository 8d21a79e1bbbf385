"""timm's RandAugment, against timm (golden/make_randaugment.py)."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnns.data import randaugment
from cnns.data.augment import auto_augment
from cnns.data.crops import RANDOM, Augmentation, random_resized_crop
from cnns.data.images import INTERPOLATIONS
from cnns.data.randaugment import RandAugment, read_randaugment
from test_augment import Replay

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "golden" / "randaugment.npz"
with np.load(GOLDEN_FILE) as file:
    GOLDEN = {key: array[()] for key, array in file.items()}
PICTURE, FILL = Image.fromarray(GOLDEN["picture"]), tuple(GOLDEN["fill"].tolist())
OURS = {  # timm's names
    "SolarizeAdd": "solarize_add",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}
CASES = [key for key in GOLDEN if key.startswith("operation/")]
DRAWN = [key.partition("/")[2] for key in GOLDEN if key.startswith("draws/")]


def ours(name: str) -> str:
    return OURS.get(name, name.lower())


def test_operations_have_timms_order():
    assert [ours(name) for name in GOLDEN["operations"]] == [*randaugment.OPERATIONS]
    assert {ours(case.split("/")[1]) for case in CASES} == {*randaugment.OPERATIONS}


@pytest.mark.parametrize("case", CASES)
def test_operations(case):
    """To the bit."""
    _, name, value, mode = case.split("/")
    how = {"resample": INTERPOLATIONS[mode], "fillcolor": FILL}
    made = randaugment.OPERATIONS[ours(name)](PICTURE, float(value), how)
    np.testing.assert_array_equal(np.asarray(made), GOLDEN[case])


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("drawn", [0.25, 0.75])
def test_values(increasing, drawn):
    """The value of each operation at 41 magnitudes, with either sign, to the last bit."""
    for name in GOLDEN["operations"]:
        found = [
            randaugment.draw_value(
                ours(name), float(level), increasing=increasing, rng=Replay(np.array([drawn]))
            )
            for level in GOLDEN["levels"]
        ]
        expected = GOLDEN[f"value/inc{increasing:d}/{name}/{drawn}"]
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("case", DRAWN)
def test_many_draws(case):
    """With timm's own random numbers, to the bit."""
    name, interpolation = case.split("/")
    settings = Augmentation(auto_augment=name, interpolation=interpolation)
    draws, made = GOLDEN[f"draws/{case}"], GOLDEN[f"made/{case}"]
    assert len(draws) == 120 and len({digest.tobytes() for digest in made}) > 40
    for numbers, digest in zip(draws, made, strict=True):
        rng = Replay(numbers[np.isfinite(numbers)])
        picture = auto_augment(PICTURE, rng, augmentation=settings, fill=FILL)
        assert hashlib.sha256(picture.tobytes()).digest() == digest.tobytes()
        assert not rng.draws


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rand-m7-mstd0.5-inc1", RandAugment(7, std=0.5, increasing=True)),
        ("rand-m6-mstd0.5-inc1", RandAugment(6, std=0.5, increasing=True)),
        ("rand-inc0-p1-n3-m10", RandAugment(10, num_ops=3, probability=1.0)),
        ("rand-m9-mstd101", RandAugment(9, std=math.inf)),
        ("rand-m0", RandAugment(0)),
    ],
)
def test_names(name, settings):
    assert read_randaugment(name) == settings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rand", "after rand come m0 to m10"),
        ("rand-mstd0.5-inc1", "after rand come m0 to m10"),
        ("rand-m7-m6", "'m6' comes twice"),
        ("rand-m7-mmax30", "'mmax30' is not supported"),
        ("rand-m7-tweights", "'tweights' is not supported"),
        ("rand-m7-", "'' is not supported"),
        ("rand-m7-mstd", "'mstd' is not supported"),
        ("rand-m7-mstd1e9", "'mstd1e9' is not supported"),
        ("rand-m-7", "'m' is not supported"),
        ("rand-m7.5", "after rand come m0 to m10"),
        ("rand-m11", "after rand come m0 to m10"),
        ("rand-m7-n0", "after rand come m0 to m10"),
        ("rand-m7-p1.1", "after rand come m0 to m10"),
        ("rand-m7-inc2", "after rand come m0 to m10"),
        ("augmix-m7", "after rand come m0 to m10"),
    ],
)
def test_names_that_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        read_randaugment(name)


def test_magnitudes_are_drawn_as_the_name_says():
    rng = np.random.default_rng(0)
    normal = [randaugment.draw_level(RandAugment(7, std=0.5), rng) for _ in range(4000)]
    assert abs(np.mean(normal) - 7) < 4 * 0.5 / 4000**0.5 and 0.47 < np.std(normal) < 0.53
    clipped = [randaugment.draw_level(RandAugment(10, std=3.0), rng) for _ in range(200)]
    assert max(clipped) == 10 and min(clipped) >= 0
    even = [randaugment.draw_level(RandAugment(8, std=math.inf), rng) for _ in range(2000)]
    assert 0 <= min(even) < 0.1 and 7.9 < max(even) <= 8
    assert randaugment.draw_level(RandAugment(3), rng) == 3


def test_crops_are_resampled_at_random():
    """One of the two, drawn for each, and only what is drawn differs."""
    found = set()
    for seed in range(12):
        crops = {
            name: random_resized_crop(
                PICTURE,
                np.random.default_rng(seed),
                size=24,
                augmentation=Augmentation(interpolation=name, flip=0.0),
            ).tobytes()
            for name in (*INTERPOLATIONS, RANDOM)
        }
        found |= {name for name in INTERPOLATIONS if crops[name] == crops[RANDOM]}
        assert crops[RANDOM] in (crops["bilinear"], crops["bicubic"])
    assert found == {*INTERPOLATIONS}
