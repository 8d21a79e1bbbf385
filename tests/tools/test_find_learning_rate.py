"""tools/find_learning_rate.py: its rates, what it reads off the curve, what it refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest

import model_registry
import small
from tools import find_learning_rate as tool

pytestmark = pytest.mark.long

STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.write_sets(tmp_path_factory.mktemp("data"), {"train": (24,)}, num_classes=4)


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    for name, model in small.MODELS.items():
        monkeypatch.setitem(model_registry.MODELS, name, model)
    monkeypatch.chdir(tmp_path)


def find(data: Path, *argv: str) -> small.Result:
    common = ("--device=cpu", "--model=toy", f"--train_data_dir={data / 'train'}.npz")
    return small.call(tool.main, *common, "--batch_size_per_device=8", f"--steps={STEPS}", *argv)


def figures() -> np.ndarray:
    with open("learning_rate.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["learning_rate", "loss", "smoothed_loss"]
    return np.array(rows, np.float64)


def test_the_rate_rises_by_a_factor_and_the_curve_is_drawn(data):
    """Past the end of the data: an epoch has 2 steps."""
    result = find(data, "--lr_from=1e-4", "--lr_to=1", "--optimizer=lamb", "--accumulate_steps=2")
    assert result.status == 0, result.stderr
    rates, losses, _ = figures().T
    np.testing.assert_allclose(rates, np.geomspace(1e-4, 1, STEPS), rtol=1e-6)
    assert len(set(losses)) == STEPS
    assert Path("learning_rate.png").read_bytes().startswith(b"\x89PNG")
    assert "try --learning_rate=" in result.stdout and not Path("output").exists()


def test_the_rates_are_those_of_the_updates(data):
    """The first losses are those of a run with one small rate, the later ones are not."""
    assert find(data, "--lr_from=1e-6", "--lr_to=1e-5").status == 0
    slow = figures()[:, 1]
    assert find(data, "--lr_from=1e-6", "--lr_to=3").status == 0
    fast = figures()[:, 1]
    np.testing.assert_allclose(fast[:10], slow[:10], rtol=1e-4)
    assert abs(fast[30:] - slow[30 : len(fast)]).max() > 0.01


def test_the_test_ends_where_the_loss_diverges(data):
    result = find(data, "--lr_to=1e9", "--momentum=0", "--lr_scaling=linear")
    assert result.status == 0, result.stderr
    assert len(figures()) < STEPS
    assert "diverged at learning rate" in result.stdout


def test_what_is_read_off_a_curve():
    """Flat to 0.01, falling most around 0.1, lowest at 1, then rising."""
    rates = np.geomspace(1e-4, 10, 101)
    losses = 2 - 1 / (1 + np.exp(-8 * (np.log10(rates) + 1))) + np.where(rates > 1, rates - 1, 0)
    curve = tool.Curve(rates.tolist(), losses.tolist())
    assert 0.08 < curve.steepest < 0.125
    assert 0.9 < curve.lowest < 2  # the smoothed curve lags by some steps
    assert curve.suggested == curve.lowest / 10


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rate=1"], "--learning_rate: the test starts anew"),
        (["--resume=auto"], "--resume: the test starts anew"),
        (["--gpu_num_per_node=2"], "the test runs on one device"),
        (["--lr_from=1", "--lr_to=1"], "--lr_to=1 must be above --lr_from=1"),
        (["--trust_coefficient=1"], "--trust_coefficient has no effect with --optimizer=sgd"),
    ],
)
def test_what_it_refuses(data, argv, words):
    result = find(data, *argv)
    assert result.status == 2
    assert words in result.stderr.splitlines()[-1]


def test_a_picture_that_cannot_be_written(data):
    result = find(data, "--output=no/curve.png")
    assert result.status == 1
    assert "--output: cannot write no/curve.png" in result.stderr.splitlines()[-1]
