"""Every network of the table: PyTorch's names and logits, and the whole way through the scripts."""

import hashlib
import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn
from safetensors.numpy import load_file

import model_registry
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
import resnet_to_onnx
import small
from cnns import graphs
from cnns.checkpoint.external import ExternalWeights, count_classes, guess_model, is_last
from cnns.checkpoint.find import find_snapshot
from cnns.checkpoint.snapshot import state_arrays
from cnns.distributed import place, to_device
from cnns.errors import UsageError
from cnns.export import ExportedModel
from cnns.graphs import DropoutMasks, Predictor, TrainGraph
from cnns.losses import CrossEntropy
from cnns.models.alexnet import AlexNet
from cnns.models.layers import Dropout, adaptive_mean
from cnns.models.model import Model
from cnns.models.vgg import VGG
from golden import seeded
from small import ROOT, call, losses, validation_figures
from test_golden import Given, close, part, read

# What is not in test_golden.py.
OTHERS = ("resnext50", "vgg", "alexnet", "mobilenetv2", "inceptionv3", "efficientnet_lite0")


@pytest.fixture(scope="module")
def golden():
    return read("networks.npz")


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_names_shapes_and_logits_are_those_of_pytorch(golden, name):
    """At sizes that are odd on the way, so that paddings and poolings at the edges are seen."""
    theirs, seed = part(golden, f"{name}_"), golden["seed"]
    network = model_registry.MODELS[name].build(1000)
    shapes = {k: array.shape for k, array in state_arrays(network).items()}
    assert seeded.listing(shapes).tolist() == theirs["listing"].tolist()
    assert sum(p.numel() for p in network.parameters()) == theirs["parameters"]
    arrays, state = seeded.any_state(shapes, seed), network.state_dict()
    drawn = seeded.checksum({k: v for k, v in arrays.items() if v.size < 1 << 20})
    assert drawn == theirs["checksum"], "this numpy draws other numbers than the golden file's"
    for key, array in arrays.items():
        state[key].copy_(flow.tensor(array))
    network.eval()
    image, _ = seeded.batch(seed, size=2, pixels=theirs["pixels"], num_classes=1000)
    logits = network(flow.tensor(image)).numpy()
    # As near to PyTorch's float64 as PyTorch's float32 is, times 3.
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=3 * theirs["float32_error"])
    if name == "inceptionv3":
        middle = seeded.features(seed, (2, 768, 17, 17))
        close(network.AuxLogits(flow.tensor(middle)).numpy(), theirs["auxiliary_logits"])


@pytest.mark.parametrize("name", OTHERS)
def test_the_network_and_its_classes_are_told_by_the_names(golden, name):
    """As where a file of PyTorch is loaded. Fine-tuning leaves out what depends on the classes."""
    listing = [line.split() for line in part(golden, f"{name}_")["listing"].tolist()]
    arrays = {key: np.broadcast_to(0.0, list(map(int, shape))) for key, *shape in listing}
    weights = ExternalWeights("a file", arrays)
    assert guess_model(weights, model_registry.MODELS, path="") == name
    assert count_classes(weights, model_registry.MODELS[name].last_layer, path="") == 1000
    of_classes = {key for key, array in arrays.items() if 1000 in array.shape}
    assert {
        key for key in arrays if is_last(key, model_registry.MODELS[name].last_layer)
    } == of_classes


def test_pooling_to_a_fixed_size():
    """Parts overlap where the size is not a multiple, and repeat where it is smaller."""
    x = flow.arange(0, 5, dtype=flow.float32).reshape(1, 1, 1, 5) * flow.ones(1, 1, 4, 5)
    assert adaptive_mean(x, 2).numpy().tolist() == [[[[1.0, 3.0]] * 2]]
    rng = np.random.default_rng(0)
    for height, width, size in ((13, 8, 7), (4, 3, 6), (6, 6, 6), (1, 2, 7)):
        x = flow.tensor(rng.standard_normal((2, 3, height, width)).astype(np.float32))
        theirs = nn.AdaptiveAvgPool2d((size, size))(x).numpy()
        np.testing.assert_allclose(adaptive_mean(x, size).numpy(), theirs, rtol=1e-5, atol=1e-6)


# Dropout.


def masks(step: int, *, rate: float, features: int, batch_size: int = 256, seed: int = 0):
    model = nn.Sequential(Dropout(rate, features), Dropout(rate, features))
    drawn = DropoutMasks(model, seed=seed, batch_size=batch_size, device="cpu")
    return [mask.numpy() for mask in drawn.at(step)["masks"]]


def test_dropout_keeps_the_share_and_the_mean():
    for rate in (0.2, 0.5):
        for mask in masks(3, rate=rate, features=1000):
            assert mask.shape == (256, 1000)
            assert set(np.unique(mask)) == {0, np.float32(1 / (1 - rate))}
            deviation = (rate * (1 - rate) / 256e3) ** 0.5
            assert (mask == 0).mean() == pytest.approx(rate, abs=5 * deviation)
            # no column and no row is special
            assert abs((mask == 0).mean(axis=0) - rate).max() < 0.17
            assert abs((mask == 0).mean(axis=1) - rate).max() < 0.09


def test_masks_are_of_seed_step_layer_and_row(monkeypatch):
    settings = {"rate": 0.5, "features": 40, "batch_size": 8}
    first, second = masks(3, **settings)
    assert [m.tolist() for m in masks(3, **settings)] == [first.tolist(), second.tolist()]
    others = [second, *masks(4, **settings), *masks(3, **settings, seed=1)]
    for other in others:
        assert 0.3 < (first != other).mean() < 0.7
    assert len(np.unique(first, axis=0)) == 8  # the rows
    # A second process of two draws the lower half.
    monkeypatch.setattr(graphs, "own_rows", lambda batch_size: slice(4, 8))
    assert masks(3, **settings)[0].tolist() == first[4:].tolist()


def test_the_graph_drops_what_the_masks_say():
    """In training; a step with the mask of a feature at 0 leaves that feature's weights alone."""
    flow.manual_seed(0)
    model = place(small.Dropping(5), "cpu")
    model.train()
    placement = flow.env.all_device_placement("cpu")
    before = model.fc.weight.numpy().copy()
    graph = TrainGraph(
        model,
        Given(),
        flow.optim.SGD(model.parameters(), lr=1.0),
        loss=CrossEntropy(label_smoothing=0.0),
        top_k=1,
    )
    rng = np.random.default_rng(0)
    image = to_device(rng.standard_normal((2, 3, 32, 32)).astype(np.float32), placement)
    label = to_device(np.array([0, 1], np.int32), placement)
    first = np.array([[0, 1, 1, 1], [0, 1, 1, 1]], np.float32)
    second = np.array([[1, 0, 1, 2], [1, 0, 1, 2]], np.float32)
    given = tuple(to_device(m, placement) for m in (first, second))
    graph(image, label, masks=given)[0].numpy()
    moved = (model.fc.weight.numpy() != before).any(axis=0)
    assert moved.tolist() == [False, False, True, True]
    model.eval()
    probabilities = Predictor(model, device="cpu")(image.numpy())
    assert np.isfinite(probabilities).all()


@pytest.mark.long
def test_a_run_with_dropout_resumes_to_the_bit(data, tmp_path, monkeypatch):
    monkeypatch.setitem(model_registry.MODELS, "dropping", small.MODELS["dropping"])
    monkeypatch.chdir(tmp_path)

    def train(*argv: str) -> list[float]:
        result = call(of_cnn_train_val.main, *argv, "--loss_print_every_n_iter=1")
        assert result.status == 0, result.stderr
        return losses(result.stdout)

    flags = (
        "--model=dropping",
        f"--train_data_dir={data / 'train.npz'}",
        "--batch_size_per_device=4",
        "--num_epochs=2",
        "--device=cpu",
    )
    whole = train(*flags, "--model_save_dir=whole")
    behind = train("--resume=whole/snapshot_epoch_0", "--model_save_dir=behind")
    assert behind == whole[2:]
    one, two = (
        Path(d, "snapshot_last/model.safetensors").read_bytes() for d in ("whole", "behind")
    )
    assert one == two
    assert train(*flags, "--model_save_dir=other", "--seed=1") != whole


# The scripts.


# The hidden layers of these two hold up to 120 million weights.
NETWORKS = {"vgg": partial(VGG, hidden=32), "alexnet": partial(AlexNet, hidden=32)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.write_sets(
        tmp_path_factory.mktemp("data"), {"train": (8,), "validation": (3, 4)}, num_classes=3
    )


# In each run of the tests: the network of the recipe, and a small one. The others take up to a
# minute each; what they compute is compared with PyTorch above.
ALWAYS = ("resnet50", "mobilenetv2")


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name in model_registry.MODELS
        if name != "resnet18"
    ],
)
def test_the_whole_way(name, data, tmp_path, monkeypatch):
    entry = model_registry.MODELS[name]
    if name in NETWORKS:
        entry = replace(entry, network=NETWORKS[name])
        monkeypatch.setitem(model_registry.MODELS, name, entry)
    monkeypatch.chdir(tmp_path)
    trained = call(
        of_cnn_train_val.main,
        f"--model={name}",
        f"--image_size={max(32, entry.min_image_size)}",
        f"--train_data_dir={data / 'train'}",
        f"--val_data_dir={data / 'validation'}",
        "--batch_size_per_device=4",
        "--val_batch_size_per_device=4",
        "--num_epochs=2",
        "--warmup_epochs=0",
        "--loss_print_every_n_iter=1",
        "--model_save_dir=output/snapshots/run",
        "--device=cpu",
    )
    assert trained.status == 0, trained.stderr
    found = losses(trained.stdout)
    assert len(found) == 4 and len(set(found)) == 4
    evaluated = call(
        of_cnn_evaluate.main,
        f"--val_data_dir={data / 'validation'}",
        "--val_batch_size_per_device=4",
        "--device=cpu",
    )
    assert evaluated.status == 0, evaluated.stderr
    # The best epoch, and the earlier of two that are as good.
    best = max(validation_figures(trained.stdout), key=lambda figures: float(figures[0]))
    assert validation_figures(evaluated.stdout) == [best]
    photograph = str(ROOT / "data" / "cat.jpg")
    classified = call(of_cnn_inference.main, f"--image_path={photograph}", "--device=cpu")
    assert classified.status == 0, classified.stderr
    path, line = classified.stdout.splitlines()
    assert path == photograph and line.split()[1] in ("class-0", "class-1", "class-2")
    exported = call(resnet_to_onnx.main, f"--image_path={photograph}")
    assert exported.status == 0, exported.stderr
    assert exported.stdout.splitlines()[1:3] == [photograph, "Are the results equal? Yes"]
    again = call(
        of_cnn_evaluate.main,
        f"--val_data_dir={data / 'validation'}",
        "--val_batch_size_per_device=4",
        "--backend=onnxruntime",
    )
    assert validation_figures(again.stdout) == validation_figures(evaluated.stdout)


# A new one: its file, a line of the table, and a line in each README (tests/test_docs.py).

MADE_UP = """
from oneflow import nn

class MadeUp(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8)
        self.head = nn.Linear(4, num_classes)

    def forward(self, image):
        return self.head(self.conv(image).relu().mean(dim=(2, 3)))
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    entry = Model(
        importlib.import_module("made_up").MadeUp,
        signature=("conv.weight", (4, 3, 8, 8)),
        last_layer="head",
        image_size=32,
        learning_rates={"sgd": 0.0128},
    )
    monkeypatch.setitem(model_registry.MODELS, "made_up", entry)
    yield entry
    sys.modules.pop("made_up")


@pytest.mark.long
def test_a_network_is_added_by_its_file_and_a_line_of_the_table(made_up, data):
    common = (f"--train_data_dir={data / 'train'}", "--batch_size_per_device=4", "--num_epochs=1")
    photograph = str(ROOT / "data" / "cat.jpg")

    def run(main, *argv):
        result = call(main, *argv)
        assert result.status == 0, result.stderr
        return result

    train = partial(run, of_cnn_train_val.main, "--device=cpu", *common)
    first = train("--model=made_up", "--model_save_dir=output/snapshots/run")
    assert "Learning rate: 0.0002 (0.0128 per 256 images)." in first.stderr
    run(of_cnn_inference.main, f"--image_path={photograph}", "--device=cpu")
    exported = run(resnet_to_onnx.main, f"--image_path={photograph}")
    assert "Are the results equal? Yes" in exported.stdout
    path = "onnx/model/run_epoch_0.onnx"
    assert (path in exported.stdout, ExportedModel(path).model) == (True, "made_up")
    # Its weights alone are known as its own, and fine-tuning leaves its last layer out.
    Path("output/snapshots/run/snapshot_epoch_0/model.safetensors").rename("weights.safetensors")
    flags = ("--model_load_dir=weights.safetensors", "--finetune", "--num_classes=5")
    tuned = train(*flags, "--learning_rate=0", "--model_save_dir=tuned")
    assert "the last layer starts from random weights" in tuned.stderr
    before, after = map(load_file, ("weights.safetensors", "tuned/snapshot_last/model.safetensors"))
    np.testing.assert_array_equal(before["conv.weight"], after["conv.weight"])
    assert (before["head.weight"].shape, after["head.weight"].shape) == ((3, 4), (5, 4))


def test_where_a_network_is_refused_the_new_one_is_listed(made_up):
    refused = call(of_cnn_train_val.main, "--model=made_down")
    assert refused.status == 2 and "'made_up'" in refused.stderr


# Weights that are installed.


def test_the_installed_weights_are_the_published_ones_and_know_a_cat(tmp_path, monkeypatch):
    """The probabilities were computed elsewhere, by PyTorch and with another resize."""
    monkeypatch.chdir(tmp_path)
    with open(model_registry.MODELS["efficientnet_lite0"].installed_weights(), "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        )
    photographs = [str(ROOT / "data" / name) for name in ("cat.jpg", "coffee.jpg")]
    flags = "--model=efficientnet_lite0", "--top_k=3", "--device=cpu", "--image_path", *photographs
    result = call(of_cnn_inference.main, *flags)
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [lines[0], lines[4]] == photographs
    found = [line.split(" ", 1) for line in lines[1:4] + lines[5:6]]
    assert [name for _, name in found] == [
        "tiger cat",
        "Egyptian cat",
        "tabby, tabby cat",
        "espresso",
    ]
    probabilities = [float(probability) for probability, _ in found[:3]]
    assert probabilities == pytest.approx([0.386, 0.356, 0.169], abs=0.01)


@pytest.mark.long
def test_installed_weights_are_fine_tuned_and_come_after_own_snapshots(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(
        of_cnn_train_val.main,
        "--model=efficientnet_lite0",
        "--finetune",
        "--image_size=32",
        f"--train_data_dir={data / 'train'}",
        "--batch_size_per_device=4",
        "--num_epochs=1",
        "--device=cpu",
        "--model_save_dir=output/snapshots/run",
    )
    assert result.status == 0, result.stderr
    assert "the last layer starts from random weights" in result.stderr
    find = partial(find_snapshot, models=model_registry.MODELS)
    assert find(None, model="efficientnet_lite0") == "output/snapshots/run/snapshot_epoch_0"
    with pytest.raises(UsageError, match="no snapshot of vgg.*--model=efficientnet_lite0"):
        find(None, model="vgg")
    Path("output/snapshots").rename("elsewhere")
    installed = model_registry.MODELS["efficientnet_lite0"].installed_weights()
    assert find(None, model="efficientnet_lite0") == installed
