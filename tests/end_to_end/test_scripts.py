"""The scripts from end to end, with a tiny network."""

import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
import model_registry
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
import optimizer_util
from cnns.checkpoint.snapshot import read_description
from cnns.data import checks
from cnns.data.crops import Augmentation
from cnns.errors import UsageError
from cnns.losses import CrossEntropy
from small import (
    LINE,
    RECORD,
    TINY,
    call,
    losses,
    solid,
    validation_figures,
    write_manifest,
    write_parts,
)

NUM_CLASSES = 4


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch, tmp_path):
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


def train(*argv):
    return call(of_cnn_train_val.main, "--model=tiny", "--device=cpu", *argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training and validation parts whose labels can be seen in the images."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, counts in (("train", (30, 21, 13)), ("validation", (9, 5, 7))):
        labels = [rng.integers(0, NUM_CLASSES, count).tolist() for count in counts]
        write_parts(root / name, labels, num_classes=NUM_CLASSES)
        write_manifest(root / name, NUM_CLASSES)
    return root


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    root = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(1)
    for name, count in (("train", 64), ("validation", 21)):
        labels = rng.integers(0, NUM_CLASSES, count)
        images = np.stack([solid(label, NUM_CLASSES, rng) for label in labels])
        np.savez(root / f"{name}.npz", images=images, labels=labels)
    return root


RECIPE = (
    "--batch_size_per_device=8",
    "--val_batch_size_per_device=5",
    "--num_epochs=6",
    "--learning_rate=0.05",
    "--random_area=0.5,1",
    "--top_k=2",
)


def test_synthetic_training_prints_the_original_lines(tmp_path):
    result = train("--save_init", "--num_examples=45", "--loss_print_every_n_iter=4")
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    (run,) = (tmp_path / "output" / "snapshots").iterdir()
    where = f"./output/snapshots/{run.name}/snapshot_"
    assert re.fullmatch(r"model_save-\d{14}", run.name)
    assert lines[:4] == [
        "Loading synthetic data.",
        "Loading synthetic data.",
        f"Saving model to {where}initial_model.",
        "Init model on demand.",
    ]
    kinds = [LINE.fullmatch(line) for line in lines[4:]]
    # 45 images in batches of 8 are 6 iterations: lines at 4 and at the end.
    expected = []
    for epoch in ("0", "1"):
        expected += [("train", epoch, "4"), ("train", epoch, "6"), ("validation", epoch, "2"), None]
    assert [m and m.groups()[:3] for m in kinds] == expected
    assert lines[7] == f"Saving model to {where}epoch_0."
    assert lines[11] == f"Saving model to {where}epoch_1."
    found = losses(result.stdout)
    assert found[-1] < found[0]
    names = sorted(path.name for path in run.iterdir())
    expected = ("best", "epoch_0", "epoch_1", "initial_model", "last")
    assert names == [*RECORD, *(f"snapshot_{name}" for name in expected)]
    assert read_description(str(run / "snapshot_epoch_1")).step == 12
    assert "Learning rate: 0.008" in result.stderr


def test_a_run_repeats_exactly_and_another_seed_does_not():
    argv = ("--num_examples=32", "--num_epochs=1", "--loss_print_every_n_iter=1")
    runs = [
        losses(train(*argv, f"--seed={seed}", f"--model_save_dir=run{i}").stdout)
        for i, seed in enumerate((5, 5, 6))
    ]
    assert len(runs[0]) == 4
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("kind", ["ofrecord", "npz"])
def test_train_evaluate_classify(kind, data, arrays, tmp_path):
    if kind == "ofrecord":
        train_dir, val_dir = data / "train", data / "validation"
    else:
        train_dir, val_dir = arrays / "train.npz", arrays / "validation.npz"
    result = train(
        f"--train_data_dir={train_dir}", f"--val_data_dir={val_dir}", *RECIPE, "--save_last"
    )
    assert result.status == 0, result.stderr
    assert f"Loading data from {train_dir}\nLoading data from {val_dir}\n" in result.stdout
    figures = validation_figures(result.stdout)
    # Far above chance; how far depends on the processor's kernels.
    assert len(figures) == 6 and max(float(top_1) for top_1, *_ in figures) > 0.75
    (run,) = (tmp_path / "output" / "snapshots").iterdir()
    last = read_description(str(run / "snapshot_last"))
    assert last.num_classes == NUM_CLASSES
    assert f"{last.metrics['val_top_1']:.6f}" == figures[-1][0]

    best = read_description(str(run / "snapshot_best"))
    for batch_size, own in ((1, []), (4, [f"--model_load_dir={run}"]), (50, ["--val_data_dir"])):
        result = call(
            of_cnn_evaluate.main,
            *(f"--val_data_dir={val_dir}" if flag == "--val_data_dir" else flag for flag in own),
            f"--val_batch_size_per_device={batch_size}",
            "--num_epochs=3",
            "--top_k=2",
            "--device=cpu",
        )
        assert result.status == 0, result.stderr
        restoring, loading = result.stdout.splitlines()[:2]
        assert restoring.endswith(f"output/snapshots/{run.name}/snapshot_best.")
        assert loading == f"Loading data from {val_dir}"
        assert validation_figures(result.stdout) == [figures[best.epoch]] * 3
        said = f"Validation data: {val_dir}, of the run that made " in result.stderr
        assert said != ("--val_data_dir" in own)

    rng = np.random.default_rng(2)
    for label in range(NUM_CLASSES):
        Image.fromarray(solid(label, NUM_CLASSES, rng)).save(tmp_path / f"{label}.png")
    paths = [f"{label}.png" for label in range(NUM_CLASSES)]
    result = call(of_cnn_inference.main, "--device=cpu", "--image_path", *paths)
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[::2] == paths
    prefix = "class-" if kind == "ofrecord" else "class "
    answers = [line.split(" ", 1) for line in lines[1::2]]
    assert all(0.25 < float(probability) <= 1 for probability, _ in answers)
    right = [name == f"{prefix}{label}" for label, (_, name) in enumerate(answers)]
    assert sum(right) >= NUM_CLASSES - 1


def test_evaluation_of_a_run_that_had_no_validation_data_asks_for_some():
    with pytest.raises(UsageError, match="--val_data_dir is needed: .*; run does not name one"):
        of_cnn_evaluate.own_val_data({"val_data_dir": None}, path="run")
    os.makedirs("data/imagenet/ofrecord/validation")
    assert of_cnn_evaluate.own_val_data({}, path="run") == "data/imagenet/ofrecord/validation"
    assert of_cnn_evaluate.own_val_data({"val_data_dir": "x.npz"}, path="run") == "x.npz"
    # An exported file may name any directory; only snapshots under output/snapshots are read.
    os.makedirs("output/snapshots")
    os.makedirs("elsewhere/snapshot_best")
    for run, name in ((None, "snapshot_best"), ("gone", "x"), ("../../elsewhere", "snapshot_best")):
        exported = Namespace(run=run, snapshot=name)
        assert of_cnn_evaluate.flags_of_run(exported) == {}


def test_evaluation_of_the_first_images_only(data):
    argv = ("--num_epochs=1", "--batch_size_per_device=8", f"--train_data_dir={data / 'train'}")
    assert train(*argv, "--model_save_dir=run").status == 0
    found = []
    for batch_size in (1, 6, 21):
        result = call(
            of_cnn_evaluate.main,
            f"--val_data_dir={data / 'validation'}",
            "--num_val_examples=10",
            f"--val_batch_size_per_device={batch_size}",
            "--model_load_dir=run/snapshot_epoch_0",
            "--num_epochs=2",
            "--device=cpu",
        )
        assert result.status == 0, result.stderr
        found += validation_figures(result.stdout)
    assert len(found) == 6 and len(set(found)) == 1


def test_training_starts_from_a_snapshot(data, tmp_path):
    common = (f"--train_data_dir={data / 'train'}", "--batch_size_per_device=8", "--num_epochs=1")
    assert train(*common, "--model_save_dir=first").status == 0
    result = train(
        *common,
        "--model_save_dir=second",
        "--model_load_dir=first/snapshot_epoch_0",
        "--save_init",
        "--learning_rate=0",
    )
    assert result.status == 0, result.stderr
    assert "Restoring model from first/snapshot_epoch_0." in result.stdout
    assert "Init model on demand." not in result.stdout
    trained = tmp_path / "first" / "snapshot_epoch_0" / "model.safetensors"
    started = tmp_path / "second" / "snapshot_initial_model" / "model.safetensors"
    assert trained.read_bytes() == started.read_bytes()


def test_training_takes_over_what_a_snapshot_says(data, tmp_path):
    common = ("--batch_size_per_device=8", "--num_epochs=1")
    first = train(f"--train_data_dir={data / 'train'}", *common, "--image_size=48", "--save_last")
    assert first.status == 0, first.stderr
    snapshot = next(tmp_path.rglob("snapshot_last"))
    # No manifest, no --model, --num_classes or --image_size: all are the snapshot's.
    plain = write_parts(tmp_path / "plain", [[0, 1, 2, 3] * 3])
    argv = (f"--train_data_dir={plain}", f"--model_load_dir={snapshot}", *common, "--device=cpu")
    result = call(of_cnn_train_val.main, *argv, "--model_save_dir=second")
    assert result.status == 0, result.stderr
    second = read_description("second/snapshot_epoch_0")
    assert (second.model, second.num_classes) == ("tiny", NUM_CLASSES)
    assert second.preprocessing.image_size == 48
    assert second.classes == tuple(f"class-{i}" for i in range(NUM_CLASSES))
    result = call(of_cnn_train_val.main, *argv, "--num_classes=5")
    assert result.status == 2
    assert "--num_classes=5, but" in result.stderr


def test_flags_reach_what_they_are_for(data, monkeypatch):
    """Each setting of the recipe, recorded where it is used."""
    seen = {}

    def spy(module, name):
        original = getattr(module, name)

        def record(*args, **settings):
            seen.setdefault(name, (args, settings))
            return original(*args, **settings)

        monkeypatch.setattr(module, name, record)

    spy(of_cnn_train_val.optimizer_util, "build_optimizer")
    spy(config, "Schedule")
    spy(of_cnn_train_val, "TrainGraph")
    spy(of_cnn_train_val.ofrecord_util, "train_loader")
    result = train(
        f"--train_data_dir={data / 'train'}",
        "--batch_size_per_device=8",  # 8 steps per epoch
        "--num_epochs=10",
        "--save_epoch_interval=10",
        "--learning_rate=0.02",
        "--wd=0.003",
        "--norm_wd=0.002",
        "--bias_wd=0.001",
        "--momentum=0.8",
        "--nesterov",
        "--gradient_clipping=7",
        "--label_smoothing=0.2",
        "--warmup_epochs=2",
        "--lr_decay=step",
        "--lr_step_epochs=3,6",
        "--random_area=0.4,0.9",
        "--random_aspect_ratio=0.8,1.2",
        "--random_flip=0.25",
        "--shuffle_buffer_size=16",
        "--seed=9",
        "--top_k=3",
    )
    assert result.status == 0, result.stderr
    (_, optimizer), settings = seen["build_optimizer"]
    assert optimizer == "sgd"
    assert settings == {
        "learning_rate": 0.02,
        "weight_decay": 0.003,
        "norm_weight_decay": 0.002,
        "bias_weight_decay": 0.001,
        "layer_decay": 1.0,
        "gradient_clipping": 7,
        "momentum": 0.8,
        "nesterov": True,
        "trust_coefficient": None,
        "decay_rate": None,
        "epsilon": None,
    }
    (schedule,), settings = seen["Schedule"]
    assert (schedule, settings["learning_rate"]) == ("step", 0.02)
    assert (settings["total_steps"], settings["warmup_steps"]) == (80, 16)
    assert settings["step_milestones"] == (24, 48)
    settings = dict(seen["TrainGraph"][1])
    loss = settings.pop("loss")
    assert isinstance(loss, CrossEntropy) and loss.smoothing == loss.label_smoothing == 0.2
    alone = {"average": None, "accumulate_steps": 1, "num_nodes": 1}
    assert settings == {"top_k": 3, "use_fp16": False, **alone}
    settings = seen["train_loader"][1]
    without = {"num_ops": 0, "magnitude": 0}  # of RandAugment
    assert settings["augmentation"] == Augmentation((0.4, 0.9), (0.8, 1.2), 0.25, 16, **without)
    assert (settings["batch_size"], settings["seed"]) == (8, 9)


def test_a_second_run_deletes_nothing(tmp_path):
    argv = ("--num_examples=8", "--num_epochs=1")
    assert train(*argv, "--model_save_dir=run").status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    result = train(*argv, "--model_save_dir=run")
    assert result.status == 2
    assert "already holds snapshot_best" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    "optimizer, lr_decay",
    [(name, "cosine") for name in sorted(optimizer_util.NAMES)]
    + [("sgd", name) for name in optimizer_util.SCHEDULES if name != "cosine"],
)
def test_every_optimizer_and_schedule_trains(optimizer, lr_decay):
    result = train(
        f"--optimizer={optimizer}",
        *(("--learning_rate=1",) if optimizer == "lars" else ()),
        f"--lr_decay={lr_decay}",
        "--num_examples=64",
        "--num_epochs=1",
        "--gradient_clipping=5",
        "--loss_print_every_n_iter=1",
    )
    assert result.status == 0, result.stderr
    found = losses(result.stdout)
    assert len(set(found)) == 8 and np.isfinite(found).all()


def test_labels_outside_the_classes_end_the_run_before_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ALWAYS_LOOK_BYTES", 0)  # as for large data
    write_parts(tmp_path / "train", [[3] * 8])  # no manifest to tell
    result = train(
        "--train_data_dir=train",
        "--num_classes=3",
        "--batch_size_per_device=4",
        "--num_epochs=1",
        "--model_save_dir=run",
    )
    assert result.status == 1
    assert "labels outside the network's classes" in result.stderr
    assert sorted(os.listdir("run")) == RECORD


def test_a_loss_that_is_no_number_ends_the_run():
    result = train(
        "--num_examples=80",
        "--num_epochs=4",
        "--learning_rate=1e30",
        "--warmup_epochs=2",
        "--lr_decay=none",
        "--save_init",
        "--model_save_dir=run",
    )
    assert result.status == 1
    # The first update is made with a rate of 0, the second with 1/20 of the peak.
    where = r"epoch 0, iter 3 \(step 3, learning rate 1e\+29\)"
    way = "the last good snapshot is run/snapshot_initial_model; try a lower --learning_rate"
    assert re.search(f"error: the loss is (nan|inf) at {where}; {way}", result.stderr)
    assert sorted(os.listdir("run")) == [*RECORD, "snapshot_initial_model"]
    assert "error: the loss is" in Path("run", "log.txt").read_text()


def test_a_log_directory_keeps_the_lines(tmp_path):
    result = train("--num_examples=8", "--num_epochs=1", "--log_dir=logs")
    assert result.status == 0
    kept = (tmp_path / "logs" / "of_cnn_train_val.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in kept] == result.stdout.splitlines()


def test_a_bad_file_among_good_ones_does_not_stop_the_rest(tmp_path):
    assert train("--num_examples=8", "--num_epochs=1").status == 0
    Image.new("RGB", (50, 40), (9, 99, 200)).save("a.png")
    (tmp_path / "b.png").write_text("no image")
    Image.new("L", (50, 40), 99).save("c.png")
    result = call(of_cnn_inference.main, "--device=cpu", "--image_path", ".", "--top_k=3")
    assert result.status == 1
    assert "b.png is not an image" in result.stderr and "1 of 3 files" in result.stderr
    lines = result.stdout.splitlines()
    assert [lines[0], lines[4]] == ["./a.png", "./c.png"] and len(lines) == 8
    probabilities = [float(line.split()[0]) for line in lines[1:4]]
    assert probabilities == sorted(probabilities, reverse=True)
