"""tools/benchmark.py runs and reports what it says; the figures themselves are not checked."""

import json

import pytest

import model_registry
from small import MODELS, call, write_parts
from tools import benchmark

pytestmark = pytest.mark.long

SMALL = ("--device=cpu", "--image_size=32", "--batch_size_per_device=4", "--steps=3", "--rounds=2")


@pytest.fixture(autouse=True)
def _toy(monkeypatch, tmp_path):
    for name in ("toy", "tiny"):
        monkeypatch.setitem(model_registry.MODELS, name, MODELS[name])
    monkeypatch.chdir(tmp_path)


def report(*argv) -> dict:
    result = call(benchmark.main, *SMALL, *argv)
    assert result.status == 0, result.stderr
    return json.loads(result.stdout)


def test_the_training_loop(tmp_path):
    found = report("--model=toy", "--print_steps=1", "--tensorboard")["training_loop"]
    assert found["own_loop_samples_per_second"] > 0 and found["own_to_bare"] > 0
    assert found["record"]["milliseconds_per_line"] > 0 and found["record"]["with_to_without"] > 0
    share = found["record"]["milliseconds_per_line"] / found["record"]["milliseconds_of_a_step"]
    assert found["record"]["line_to_step"] == pytest.approx(share, rel=0.1)
    assert list(tmp_path.iterdir()) == []


def test_the_loader(tmp_path):
    write_parts(tmp_path / "train", [[0, 1, 2, 3] * 3])
    found = report("--train_data_dir=train")["loader"]
    assert found["num_examples"] == 12 and found["global_to_native"] > 0
    assert min(found["images_per_second"][order] for order in ("native", "global")) > 0


def test_inference_by_both_backends():
    found = report("--model=tiny", "--inference")["inference"]
    rates = found["oneflow_milliseconds_per_image"], found["onnxruntime_milliseconds_per_image"]
    assert min(*rates, found["onnxruntime_times_as_fast"]) > 0
