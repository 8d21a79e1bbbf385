"""Class weights, against PyTorch (golden/make_class_weights.py), and the balanced sampler."""

import json
from pathlib import Path

import numpy as np
import oneflow as flow
import pytest

import model_registry
import of_cnn_train_val
import test_recipes as recipes
from cnns.data.datasets import open_train_dataset
from cnns.data.uneven import balanced_weights, labels_of, read_class_weights
from cnns.distributed import on_all_devices
from cnns.errors import UsageError
from cnns.losses import build_loss
from small import MODELS, call, losses, write_manifest, write_parts

pytestmark = pytest.mark.long

with np.load(Path(__file__).resolve().parent / "golden" / "class_weights.npz") as file:
    GOLDEN = {key: array[()] for key, array in file.items()}
CPU = flow.env.all_device_placement("cpu")
LABELS = [[0, 0, 0, 1, 0, 0, 0], [0, 2, 0, 0, 1, 0, 0, 0, 0]]  # 13, 2 and 1 of 16


@pytest.mark.parametrize("case", ["labels", "mixed", "bce"])
def test_twenty_steps(case):
    name = "bce" if case == "bce" else "cross_entropy"
    model = recipes.network()
    weights = on_all_devices(GOLDEN["weights"], CPU)
    smoothing = recipes.GOLDEN["smoothing"].item()
    loss = build_loss(name, label_smoothing=smoothing, class_weights=weights)
    graph = recipes.build(model, loss=loss)
    recipes.check(case, recipes.losses_of(graph, mixed=case == "mixed"), model, values=GOLDEN)


@pytest.mark.parametrize("case", ["cross_entropy", "bce"])
def test_equal_weights_are_none(case):
    found = []
    for weights in (None, on_all_devices(np.full(5, 2.5, np.float32), CPU)):
        loss = build_loss(case, label_smoothing=0.1, class_weights=weights)
        found.append(recipes.losses_of(recipes.build(recipes.network(), loss=loss)))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-6)


def test_balanced_weights():
    labels = np.array([0] * 12 + [2] * 3 + [3] + [7, -1])
    weights = balanced_weights(labels, 5)
    np.testing.assert_allclose(weights, [16 / 36, 1, 16 / 9, 16 / 3, 1])
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[labels[:16]].mean(), 1)


@pytest.fixture
def data(tmp_path):
    write_parts(tmp_path / "data", LABELS, num_classes=3)
    write_manifest(tmp_path / "data", 3)
    images = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=sum(LABELS, []))
    return tmp_path / "data"


def test_labels(data):
    for suffix in ("", ".npz"):
        labels = labels_of(open_train_dataset(f"{data}{suffix}"))
        np.testing.assert_array_equal(labels, sum(LABELS, []))


FILES = {
    "[0.5, 2, 3]": [0.5, 2, 3],
    "class-1: 4\n2: 0.5\n": [1, 4, 0.5],
    '{"class-0": 0.25}': [0.25, 1, 1],
}
WRONG = {
    "[1, 2]": "2 weights for 3 classes",
    "class-3: 1": "not a class",
    "class-1: 0": "above 0",
    "class-1: much": "above 0",
    "[1, 2, true]": "above 0",
    "3": "neither a list",
    "[1, [": "cannot be read",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_of_weights(text, tmp_path):
    (tmp_path / "weights.yaml").write_text(text)
    classes = ["class-0", "class-1", "class-2"]
    weights = read_class_weights(str(tmp_path / "weights.yaml"), 3, classes, flag="--class_weights")
    np.testing.assert_array_equal(weights, np.float32(FILES[text]))


@pytest.mark.parametrize("text", WRONG)
def test_a_file_of_other_things(text, tmp_path):
    (tmp_path / "weights.yaml").write_text(text)
    with pytest.raises(UsageError, match=WRONG[text]) as error:
        read_class_weights(
            str(tmp_path / "weights.yaml"), 3, ["class-0", "class-1"], flag="--class_weights"
        )
    assert "\n" not in str(error.value)


def train(*flags):
    return call(of_cnn_train_val.main, "--device=cpu", "--model=plain", *flags)


@pytest.fixture
def _plain(monkeypatch, tmp_path):
    monkeypatch.setitem(model_registry.MODELS, "plain", MODELS["plain"])
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_plain")
def test_runs(data, tmp_path):
    """auto is what its file would be; the sampler and the weights differ from neither."""
    flags = ["--num_epochs=1", "--batch_size_per_device=8", "--learning_rate=0.1", "--seed=1"]
    flags += ["--loss_print_every_n_iter=1"]
    weights = balanced_weights(np.array(sum(LABELS, [])), 3).tolist()
    (tmp_path / "weights.json").write_text(json.dumps(weights))
    found = {}
    for name, more in {
        "plain": [],
        "auto": ["--class_weights=auto"],
        "file": ["--class_weights=weights.json"],
        "sampler": ["--balanced_sampler"],
    }.items():
        for suffix in ("", ".npz"):
            done = train(*flags, *more, f"--train_data_dir={data}{suffix}")
            assert done.status in (0, None), done.stderr
            found[name, suffix] = losses(done.stdout)
    for suffix in ("", ".npz"):
        assert found["auto", suffix] == found["file", suffix]
        assert len({tuple(found[name, suffix]) for name in ("plain", "auto", "sampler")}) == 3


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--class_weights=auto", "--balanced_sampler"], "give one of them"),
        (["--class_weights=absent.yaml"], "cannot be read"),
    ],
)
def test_flags_that_are_refused(data, flags, words):
    done = train(f"--train_data_dir={data}", "--batch_size_per_device=4", *flags)
    assert done.status == 2 and words in done.stderr.splitlines()[-1]


@pytest.mark.usefixtures("_plain")
@pytest.mark.parametrize("flag", ["--class_weights=auto", "--balanced_sampler"])
def test_synthetic_data_have_no_uneven_classes(flag):
    done = train(flag)
    assert done.status == 2 and "synthetic" in done.stderr
