"""Items of recipes in whole runs: stopped and resumed to the last bit, and on two processes."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import model_registry
import of_cnn_evaluate
import of_cnn_train_val
import small
from cnns.checkpoint.snapshot import read_description
from cnns.evaluation import Evaluator
from cnns.interrupts import Interrupts
from cnns.log import Counts
from cnns.record import read_metrics
from cnns.run import Run

NUM_CLASSES, IMAGES = 4, 41
ITEMS = {
    "ema": ("--ema_decay=0.98", "--ema_steps=2"),
    "accumulate": ("--accumulate_steps=2", "--ema_decay=0.98", "--ema_steps=1"),
    "optimizer": ("--nesterov", "--bias_wd=0.1", "--norm_wd=0.01", "--wd=0.05")
    + ("--lr_scaling=sqrt", "--lr_warmup_decay=0.01", "--lr_min=0.001"),
    "freeze": ("--freeze=conv", "--gradient_clipping=0.5"),
    "lars": ("--optimizer=lars", "--learning_rate=4", "--trust_coefficient=0.02")
    + ("--lr_decay=polynomial", "--lr_power=2", "--ema_decay=0.98", "--ema_steps=1"),
    "lamb": ("--optimizer=lamb", "--learning_rate=0.02", "--gradient_clipping=1", "--wd=0.01")
    + ("--accumulate_steps=2",),
    "lamb, half": ("--optimizer=lamb", "--learning_rate=0.02", "--use_fp16"),
    "layers": ("--layer_decay=0.5", "--gradient_clipping=0.5", "--nesterov", "--use_fp16"),
    "depth": ("--stochastic_depth=0.5", "--learning_rate=0.02"),
    "bce": ("--loss=bce", "--bce_target_threshold=0.2"),
    "sizes": ("--first_train_image_size=16", "--train_size_stages=3")
    + ("--ema_decay=0.98", "--ema_steps=1", "--mixup_alpha=0.2", "--random_erasing=0.5"),
    # Whole files of recipes, but for what `flags` gives all of them.
    "a1": (f"--config={small.ROOT / 'recipes' / 'resnet50_a1.yaml'}", "--learning_rate=0.02"),
    "a3": (f"--config={small.ROOT / 'recipes' / 'resnet50_a3.yaml'}", "--learning_rate=0.02"),
}
MODEL = {"depth": "skipping", "a1": "skipping"}  # with blocks; other items take any network


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    parts = {"train": (IMAGES,), "validation": (14,)}
    return small.write_sets(tmp_path_factory.mktemp("data"), parts, num_classes=NUM_CLASSES)


@pytest.fixture(autouse=True)
def _models(monkeypatch, tmp_path):
    for name, model in small.MODELS.items():
        monkeypatch.setitem(model_registry.MODELS, name, model)
    monkeypatch.chdir(tmp_path)


def flags(data: Path, item: str, *, model: str, processes: int = 1) -> list[str]:
    """6 iterations of 8 images in each of 3 epochs."""
    return [
        "--device=cpu",
        f"--model={model}",
        "--global_batch_size=8",
        "--num_epochs=3",
        "--warmup_epochs=1",
        "--learning_rate=0.2",
        "--loss_print_every_n_iter=1",
        f"--gpu_num_per_node={processes}",
        f"--train_data_dir={data / 'train'}.npz",
        f"--val_data_dir={data / 'validation'}.npz",
        "--val_batch_size_per_device=7",
        *ITEMS[item],
    ]


def arrays(snapshot: Path) -> dict[str, np.ndarray]:
    """Every tensor of a snapshot, by file and name."""
    return {
        f"{path.stem}/{name}": array
        for path in sorted(snapshot.glob("*.safetensors"))
        for name, array in load_file(path).items()
    }


def stop_at(monkeypatch, count: int | None) -> None:
    """A SIGTERM before the n-th time that a run looks for one: after each iteration, and 2 batches
    of validation."""
    calls = iter(range(1, 10_000))

    def check(self):
        if next(calls) == count:
            self.received = signal.SIGTERM
        return ORIGINAL(self)

    monkeypatch.setattr(Interrupts, "check", check)


ORIGINAL = Interrupts.check


@pytest.mark.parametrize("item", ITEMS)
def test_stopped_and_resumed_equals_never_stopped(data, monkeypatch, item):
    given = flags(data, item, model=MODEL.get(item, "toy"))
    whole = small.call(of_cnn_train_val.main, *given, "--model_save_dir=whole")
    assert whole.status == 0, whole.stderr
    lines = small.losses(whole.stdout)
    assert len(lines) == len(set(lines)) == 18
    seen = []
    for count in (3, 2, 6, None):  # within epochs 0 and 1
        stop_at(monkeypatch, count)
        run = small.call(of_cnn_train_val.main, *given, "--model_save_dir=run", "--resume=auto")
        assert run.status == (0 if count is None else 143), run.stderr
        seen += small.losses(run.stdout)
    assert seen == lines
    for name in ("epoch_0", "epoch_1", "epoch_2"):
        one, other = (arrays(Path(run, f"snapshot_{name}")) for run in ("whole", "run"))
        assert one.keys() == other.keys()
        for key, array in one.items():
            np.testing.assert_array_equal(array, other[key], err_msg=key)


@pytest.mark.parametrize("item", ITEMS)
def test_two_processes_train_what_one_does(data, tmp_path, item):
    """The network has no batch norm; sums are in another order, so that rounding differs."""
    found = {}
    for processes in (1, 2):
        given = flags(data, item, model=MODEL.get(item, "plain"), processes=processes)
        command = [sys.executable, str(small.ROOT / "tests" / "train_small.py"), *given]
        done = subprocess.run(
            [*command, f"--model_save_dir={processes}"], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
        found[processes] = small.losses(done.stdout), arrays(Path(f"{processes}/snapshot_epoch_2"))
    (losses, one), (others, two) = found[1], found[2]
    np.testing.assert_allclose(losses, others, rtol=1e-5, atol=2e-6)
    assert one.keys() == two.keys()
    for key, array in one.items():
        np.testing.assert_allclose(array, two[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("item", ["ema", "lars", "lamb", "depth"])
def test_sizes_grow_as_in_a_run_that_is_resumed_with_the_next(data, monkeypatch, item):
    """16, 24 and 32 px in one run, and in three of which each resumes the one before.

    With LARS it takes no memory first, as on a CPU, and with the others it does, as on CUDA.
    """
    given = flags(data, item, model=MODEL.get(item, "toy"))
    original = Run.run
    with monkeypatch.context() as patch:
        if item != "lars":
            patch.setattr(Run, "run", lambda self: (self.parts.allocate(0), original(self))[1])
        grown = small.call(
            of_cnn_train_val.main, *given, *ITEMS["sizes"][:2], "--model_save_dir=grown"
        )
    assert grown.status == 0, grown.stderr
    lines, resume = [], []
    for epoch, size in enumerate((16, 24, 32)):
        one = [f"--train_image_size={size}", f"--model_save_dir={size}", *resume]
        run = small.call(of_cnn_train_val.main, *given, *one)
        assert run.status == 0, run.stderr
        lines += small.losses(run.stdout)[:6]
        resume = [f"--resume={size}/snapshot_epoch_{epoch}"]
        name = f"snapshot_epoch_{epoch}"
        found, expected = arrays(Path("grown", name)), arrays(Path(f"{size}", name))
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(array, found[key], err_msg=key)
    assert small.losses(grown.stdout) == lines
    said = [text for text in grown.stderr.splitlines() if " px " in text]
    assert said == [
        f"Training on images of {size} px from epoch {epoch} on."
        for epoch, size in enumerate((16, 24, 32))
    ]
    entries = read_metrics("grown/metrics.jsonl")
    sizes = [entry["image_size"] for entry in entries if entry["kind"] == "train"]
    assert sizes == [16] * 6 + [24] * 6 + [32] * 6


@pytest.mark.parametrize("item", ["lars", "layers", "lamb", "sizes"])
def test_stopped_in_a_validation_and_resumed(data, monkeypatch, item):
    """What is then saved is of a graph that has not run yet."""
    given = flags(data, item, model="toy")
    whole = small.call(of_cnn_train_val.main, *given, "--model_save_dir=whole")
    assert whole.status == 0, whole.stderr
    stop_at(monkeypatch, 7)
    run = small.call(of_cnn_train_val.main, *given, "--model_save_dir=run")
    assert run.status == 143 and read_description("run/snapshot_last").iteration == 6
    stop_at(monkeypatch, None)
    run = small.call(of_cnn_train_val.main, *given, "--model_save_dir=run", "--resume=auto")
    assert run.status == 0, run.stderr
    for name in ("epoch_0", "epoch_1", "epoch_2"):
        one, other = (arrays(Path(run, f"snapshot_{name}")) for run in ("whole", "run"))
        assert one.keys() == other.keys()
        for key, array in one.items():
            np.testing.assert_array_equal(array, other[key], err_msg=key)


def test_the_average_is_evaluated_and_read_by_every_script(data):
    """`validation (ema)` says of the average what evaluation says of ema.safetensors."""
    run = small.call(
        of_cnn_train_val.main, *flags(data, "ema", model="toy"), "--model_save_dir=run"
    )
    (line,) = [
        text for text in run.stdout.splitlines() if text.startswith("validation (ema): epoch 2")
    ]
    snapshot = Path("run/snapshot_epoch_2")
    assert "ema_val_top_1" in (snapshot / "snapshot.json").read_text()
    weights, average = (load_file(snapshot / f"{name}.safetensors") for name in ("model", "ema"))
    assert weights.keys() == average.keys()
    assert any((weights[name] != average[name]).any() for name in weights)
    scored = small.call(
        of_cnn_evaluate.main,
        "--device=cpu",
        f"--model_load_dir={snapshot / 'ema.safetensors'}",
        f"--val_data_dir={data / 'validation'}.npz",
    )
    assert scored.status == 0, scored.stderr
    ((top_1, top_k),) = small.validation_figures(scored.stdout)
    assert f"top_1: {top_1}, top_k: {top_k}, " in line

    (snapshot / "ema.safetensors").unlink()
    again = small.call(of_cnn_train_val.main, "--device=cpu", f"--resume={snapshot}")
    assert again.status == 1 and "lacks ema.safetensors" in again.stderr.splitlines()[-1]


def test_networks_without_blocks_refuse_stochastic_depth(data):
    given = flags(data, "depth", model="toy")
    run = small.call(of_cnn_train_val.main, *given, "--model_save_dir=run")
    assert run.status == 2 and "--stochastic_depth: toy cannot do that" in run.stderr


def test_frozen_parts_stay_as_they_are_in_a_run(data):
    """Through validations, which set a network to evaluation and back."""
    given = [*flags(data, "freeze", model="toy"), "--freeze=backbone", "--save_init"]
    run = small.call(of_cnn_train_val.main, *given, "--model_save_dir=run")
    assert run.status == 0, run.stderr
    first, last = (arrays(Path(f"run/snapshot_{name}")) for name in ("initial_model", "last"))
    for name, array in first.items():
        assert (array == last[name]).all() == ("/fc." not in name), name
    assert [n for n in last if n.endswith("-momentum")] == [
        "training/model.fc.bias-momentum",
        "training/model.fc.weight-momentum",
    ]
    wrong = small.call(of_cnn_train_val.main, *given, "--freeze=conv,bn9", "--model_save_dir=other")
    assert wrong.status == 2 and "--freeze=bn9: the network has no such part" in wrong.stderr


def scored(monkeypatch, hits: list[int]) -> None:
    """Lets validations of 14 images give these hits; the loss falls from one to the next."""
    rounds = iter(enumerate(hits))

    def round(self, agreement):
        number, count = next(rounds)
        return Counts(count, 14, 14, loss=9.0 - number), 1.0

    monkeypatch.setattr(Evaluator, "round", round)


@pytest.mark.parametrize(
    ("metric", "epochs", "best"), [("top_1", 4, 1), ("loss", 6, 5), ("top_k", 3, 0)]
)
def test_best_by_a_metric_and_early_stop(data, monkeypatch, metric, epochs, best):
    """top_1 is best after epoch 1 of 6, top_k always the same, and the loss always falls."""
    scored(monkeypatch, [5, 7, 7, 6, 9, 9])
    given = [*flags(data, "bce", model="toy"), "--num_epochs=6", "--model_save_dir=run"]
    given += [f"--best_metric={metric}", "--early_stop_epochs=2"]
    run = small.call(of_cnn_train_val.main, *given)
    assert run.status == 0, run.stderr
    last = read_description("run/snapshot_last")
    assert (last.epoch, last.best["epoch"]) == (epochs - 1, best)
    assert read_description("run/snapshot_best").epoch == best
    assert ("Stopped after epoch" in run.stderr) == (epochs < 6)
    again = small.call(of_cnn_train_val.main, *given, "--resume=auto")
    assert again.status == 0 and small.losses(again.stdout) == []
