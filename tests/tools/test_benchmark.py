"""tools/benchmark.py runs and reports what it says; the figures themselves are not checked."""

import json
import sys

import pytest

import model_registry
from small import MODELS, call, write_parts
from tools import against, benchmark

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
    rates = found["images_per_second"]
    assert list(rates)[:2] == ["native", "global"] and "randaugment" in rates
    assert min(rates.values()) > 0


def test_inference_by_both_backends():
    found = report("--model=tiny", "--inference")["inference"]
    rates = found["oneflow_milliseconds_per_image"], found["onnxruntime_milliseconds_per_image"]
    assert min(*rates, found["onnxruntime_times_as_fast"]) > 0


# What PyTorch would have to be for the protocol: the processes, the turns and the report are real.
FAKE_TORCH = """
import json, sys
print(json.dumps({"version": "2.0", "parameters": int(open("parameters").read())}), flush=True)
for line in sys.stdin:
    kind, layout, steps = json.loads(line)
    if layout == "channels_last" and kind == "predict":
        sys.exit("out of memory")
    print(json.dumps({"seconds": 0.5 if layout == "nchw" else 0.25}), flush=True)
"""


@pytest.fixture
def peer(monkeypatch, tmp_path):
    """A peer whose times are known, of a network with as many parameters as "tiny" has."""
    (tmp_path / "peer.py").write_text(FAKE_TORCH)
    monkeypatch.setattr(against, "PEER", tmp_path / "peer.py")
    monkeypatch.setattr(against, "NETWORKS", ("tiny",))
    held = sum(parameter.numel() for parameter in MODELS["tiny"].build(1000).parameters())
    (tmp_path / "parameters").write_text(str(held))
    return "--against=torch", f"--peer_python={sys.executable}", "--model=tiny"


def test_ours_and_a_peer_by_turns(peer, tmp_path):
    (tmp_path / "peer.py").write_text(FAKE_TORCH.replace("channels_last", "none"))
    result = call(benchmark.main, *SMALL, *peer)
    assert result.status == 0, result.stderr
    found = json.loads(result.stdout)["against"]
    assert found["torch"] == "2.0"
    for kind in ("training", "predicting"):
        rates, ratios = found[kind]["images_per_second"], found[kind]["ours_to"]
        assert rates["torch nchw"] == 24 and rates["torch channels_last"] == 48  # 12 images
        assert ratios["torch nchw"] == pytest.approx(2 * ratios["torch channels_last"], rel=0.02)
        assert rates["ours"] > 0
        assert f"{kind:10} ours" in result.stderr
    assert set(found["predicting"]["ours_to"]) == {
        "onnxruntime",
        "torch nchw",
        "torch channels_last",
    }


def test_a_peer_that_ends_is_one_line(peer):
    result = call(benchmark.main, *SMALL, *peer)
    assert result.status == 1 and "the peer has ended: out of memory" in result.stderr


def test_a_peer_with_another_network_is_a_fault(peer, tmp_path):
    (tmp_path / "parameters").write_text("1")
    with pytest.raises(RuntimeError, match="against 1"):
        benchmark.main([*SMALL, *peer])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--against=torch", "--model=resnet18"), "needs --peer_python"),
        (("--against=torch", "--peer_python=nowhere", "--model=resnet18"), "nowhere: No such file"),
        (
            ("--against=torch", "--peer_python=x", "--model=vgg"),
            "has resnet18, resnet50, and not vgg",
        ),
        (("--against=torch", "--inference"), "not allowed with argument"),
        (("--peer_python=x",), "--peer_python has no effect without --against"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags, words):
    result = call(benchmark.main, *SMALL, *flags)
    assert result.status == 2 and words in result.stderr


def test_without_pytorch_the_line_says_so():
    flags = "--against=torch", f"--peer_python={sys.executable}", "--model=resnet18"
    result = call(benchmark.main, *SMALL, *flags)
    assert result.status == 1 and "No module named 'torch'" in result.stderr
