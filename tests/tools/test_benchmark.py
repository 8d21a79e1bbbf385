"""tools/benchmark.py runs and reports what it says; the figures themselves are not checked."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

import model_registry
from cnns.data.datasets import open_train_dataset
from cnns.data.images import load_image
from cnns.data.records import RecordSource
from small import MODELS, call, write_parts
from tools import against, benchmark, benchmark_loader, onnxruntime_peer
from tools.photographs import draw_imagenet, shrink, write_photographs

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
    monkeypatch.setitem(against.PEERS, "torch", tmp_path / "peer.py")
    monkeypatch.setattr(benchmark, "TORCH_NETWORKS", ("tiny",))
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
        assert f"{kind:12} ours" in result.stderr
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
        (("--against=onnxruntime",), "needs --peer_python"),
        (("--against=dali", "--peer_python=nowhere"), "nowhere is not a program"),
        (
            ("--against=torch", f"--peer_python={sys.executable}", "--model=vgg"),
            "has resnet18, resnet50, and not vgg",
        ),
        (("--against=torch", "--inference"), "not allowed with argument"),
        (("--peer_python=x",), "--peer_python has no effect without --against"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags, words):
    result = call(benchmark.main, *SMALL, *flags)
    assert result.status == 2 and words in result.stderr


@pytest.mark.parametrize(("name", "module"), [("torch", "torch"), ("dali", "nvidia.dali")])
def test_without_the_peer_the_line_says_so(name, module):
    flags = f"--against={name}", f"--peer_python={sys.executable}", "--model=resnet18"
    result = call(benchmark.main, *SMALL, *flags)
    assert result.status == 1 and f"No module named '{module}'" in result.stderr


def test_evaluation_and_onnx_runtime_by_turns(tmp_path):
    """The peer is the real one: what it needs is in this environment too."""
    flags = "--against=onnxruntime", f"--peer_python={sys.executable}", "--model=tiny"
    result = call(benchmark.main, *SMALL, *flags)
    assert result.status == 0, result.stderr
    found = json.loads(result.stdout)["against"]
    assert found["onnxruntime"]["ours"] == found["onnxruntime"]["peer"]
    sides = ["input ready", "plain script"]
    for precision, own in (("float32", ["ours"]), ("int8", ["ours", "ours, float32"])):
        rates = found[precision]["images_per_second"]
        assert list(rates) == own + sides and min(rates.values()) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_plain_script_of_onnx_runtime_answers_as_ours(tmp_path):
    """It reads photographs as inference does, but for its rounding, and gives the same logits."""
    preprocessing = MODELS["tiny"].preprocessing(image_size=32)
    write_photographs(draw_imagenet(2), tmp_path, num_parts=1)
    paths = sorted((tmp_path / "files").iterdir())
    ours = np.stack([load_image(str(path), preprocessing) for path in paths])
    sizes = {"shorter": preprocessing.resize_shorter, "size": preprocessing.image_size}
    theirs = np.stack([onnxruntime_peer.read_image(path, **sizes) for path in paths])
    assert theirs.shape == ours.shape == (2, 3, 32, 32) and theirs.dtype == np.float32
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


# As FAKE_TORCH, for DALI: the folders, the processes, the turns and the report are real.
FAKE_DALI = """
import json, os, sys
batch_size, size, threads = map(int, sys.argv[1:])
assert (batch_size, size, threads) == (4, 32, len(os.sched_getaffinity(0)))
print(json.dumps({"version": "1.0"}), flush=True)
for line in sys.stdin:
    folder, batches = json.loads(line)
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
    print(json.dumps({"seconds": size / 1e6, "processor": 2.4}), flush=True)
"""


def test_the_loader_and_dali_by_turns(monkeypatch, tmp_path):
    (tmp_path / "peer.py").write_text(FAKE_DALI)
    monkeypatch.setitem(against.PEERS, "dali", tmp_path / "peer.py")
    monkeypatch.setattr(benchmark_loader, "NUM_PHOTOGRAPHS", 16)
    flags = "--against=dali", f"--peer_python={sys.executable}", "--model=tiny"
    result = call(benchmark.main, *SMALL, *flags)
    assert result.status == 0, result.stderr
    found = json.loads(result.stdout)["against"]
    assert found["dali"] == "1.0"
    large, small = found["bytes_per_image"].values()
    assert small < 0.7 * large
    whole = found["photographs"]["images_per_second"]["dali"]
    assert whole == pytest.approx(12e6 / (16 * large), rel=0.01)  # 12 images
    stored = found["stored smaller"]["images_per_second"]
    assert stored["dali, photographs"] == whole and stored["dali"] > 1.4 * whole
    for used in found["processor_milliseconds_per_image"].values():
        assert used["dali"] == 200 and min(used.values()) > 0


def test_photographs_are_stored_as_files_and_as_parts(tmp_path):
    photographs = draw_imagenet(5)
    assert photographs == draw_imagenet(5) and len(set(photographs)) == 5
    for each, size in ((photographs, (500, 375)), (shrink(photographs, 256), (341, 256))):
        assert {Image.open(io.BytesIO(encoded)).size for encoded in each} == {size}
    write_photographs(photographs, tmp_path, num_parts=2)
    files = [path.read_bytes() for path in sorted((tmp_path / "files").iterdir())]
    assert files == photographs
    source = RecordSource(open_train_dataset(str(tmp_path / "parts")), say=False)
    with source.open(1) as (picture, label):  # the second of the first part
        assert label == 0
        assert (np.asarray(picture) == np.asarray(Image.open(io.BytesIO(photographs[2])))).all()
