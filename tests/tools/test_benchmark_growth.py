"""tools/benchmark.py --growth: what is measured, reported and drawn; not the figures themselves."""

import json
from argparse import Namespace

import pytest
from PIL import Image

from cnns.errors import RunError
from small import call
from tools import benchmark, benchmark_growth

pytestmark = pytest.mark.long

ARGS = Namespace(model="resnet18", steps=1, rounds=1, num_workers=1)


def test_steps_over_batch_and_image_size(monkeypatch, tmp_path):
    asked = []

    def step(args, *, image_size, batch_size):
        asked.append((image_size, batch_size))
        return batch_size * image_size / 1e3, 1000 + batch_size

    monkeypatch.setattr(benchmark_growth, "step", step)
    flags = ("--device=cpu", "--image_size=40", "--batch_size_per_device=3")
    output = tmp_path / "new"
    result = call(
        benchmark.main, *flags, "--growth", "batch_size", "image_size", f"--output={output}"
    )
    assert result.status == 0, result.stderr
    batch_size, image_size = json.loads(result.stdout)["growth"].values()
    assert batch_size["images in a step"] == list(benchmark_growth.BATCH_SIZES)
    assert batch_size["step, seconds"] == [0.04 * n for n in benchmark_growth.BATCH_SIZES]
    assert batch_size["memory, MB"] == [1000 + n for n in benchmark_growth.BATCH_SIZES]
    assert image_size["height and width, pixels"] == list(benchmark_growth.IMAGE_SIZES)
    assert asked[-1] == (benchmark_growth.IMAGE_SIZES[-1], 3)
    for each in (batch_size, image_size):
        with Image.open(each["plot"]) as plot:
            assert plot.format == "PNG" and plot.width == 640
    assert len(list(output.iterdir())) == 2


def test_a_step_in_a_process_of_its_own():
    seconds, megabytes = benchmark_growth.step(ARGS, image_size=32, batch_size=1)
    assert 0 < seconds < 60 and 200 < megabytes < 20_000


def test_a_step_that_fails_says_why():
    args = Namespace(**(vars(ARGS) | {"model": "none"}))
    with pytest.raises(RunError, match="argument --model: invalid choice: 'none'"):
        benchmark_growth.step(args, image_size=32, batch_size=1)


def test_the_conversion_over_images(monkeypatch):
    monkeypatch.setattr(benchmark_growth, "NUM_IMAGES", (1000,))
    growth = benchmark_growth.over_images(ARGS)
    assert growth.over == (1000,)
    (seconds,), (megabytes,) = growth.figures.values()
    assert seconds > 0 and megabytes > 20


def test_start_up_over_parts(monkeypatch):
    monkeypatch.setattr(benchmark_growth, "NUM_PARTS", (1, 4))
    monkeypatch.setattr(benchmark_growth, "NUM_RECORDS", 24)
    growth = benchmark_growth.over_parts(ARGS)
    assert list(growth.figures) == ["native order, seconds", "global order, seconds"]
    assert all(len(values) == 2 and min(values) > 0 for values in growth.figures.values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--output=x",), "--output has no effect without --growth"),
        (("--growth", "speed"), "invalid choice: 'speed'"),
        (("--growth", "parts", "--inference"), "not allowed with argument"),
    ],
)
def test_wrong_flags(flags, words):
    result = call(benchmark.main, "--device=cpu", *flags)
    assert result.status == 2 and words in result.stderr
