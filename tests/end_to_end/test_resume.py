"""A run that is stopped, killed and resumed is the run that was never stopped."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import model_registry
import of_cnn_train_val
from cnns.checkpoint.find import find_resume
from cnns.checkpoint.snapshot import Snapshot, read_description, save_snapshot
from cnns.evaluation import Evaluator
from cnns.interrupts import Interrupts
from cnns.log import Counts
from cnns.record import read_metrics
from small import MODELS, RECORD, ROOT, TINY, call, tree, write_sets

NUM_CLASSES = 4
EPOCHS = 3
# What a recipe adds to the kinds of data.
AUGMENTED = {
    "mixed": ["--mixup_alpha=0.2", "--cutmix_alpha=1"],
    "augmented": [
        "--auto_augment=randaugment",
        "--color_jitter=0.4,0.4,0.4,0.1",
        "--random_erasing=0.5",
        "--repeated_augmentation=2",
        "--interpolation=bicubic",
        "--class_weights=auto",
        "--train_image_size=24",
    ],
    "balanced": [
        "--balanced_sampler",
        "--repeated_augmentation=2",
        "--auto_augment=rand-m7-mstd0.5-inc1",
        "--train_interpolation=random",
    ],
}


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch, tmp_path):
    for name in ("tiny", "toy"):
        monkeypatch.setitem(model_registry.MODELS, name, MODELS[name])
    monkeypatch.chdir(tmp_path)


def train(*argv):
    return call(of_cnn_train_val.main, "--model=tiny", "--device=cpu", *argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    parts = {"train": (13, 9, 11, 8), "validation": (9, 5)}
    return write_sets(tmp_path_factory.mktemp("data"), parts, num_classes=NUM_CLASSES)


def recipe(data: Path, kind: str) -> list[str]:
    """41 images in batches of 8: 6 iterations in each of 3 epochs, and 3 of validation."""
    flags = [
        "--batch_size_per_device=8",
        f"--num_epochs={EPOCHS}",
        "--learning_rate=0.05",
        "--loss_print_every_n_iter=3",
    ]
    if kind == "synthetic":
        return [*flags, "--num_examples=41"]
    if kind in AUGMENTED:
        flags += AUGMENTED[kind]
    suffix = ".npz" if kind in ("arrays", "mixed") else ""
    of_parts = {"parts": ["--shuffle_buffer_size=4"], "global": ["--data_order=global"]}
    return [
        *flags,
        *of_parts.get(kind, []),
        f"--train_data_dir={data / 'train'}{suffix}",
        f"--val_data_dir={data / 'validation'}{suffix}",
        "--val_batch_size_per_device=5",
    ]


@pytest.fixture
def stop_at(monkeypatch):
    """Lets a SIGTERM come before the n-th time that a run looks for one."""

    def stop(count: int | None):
        calls = iter(range(1, 10_000))

        def check(self):
            if next(calls) == count:
                self.received = signal.SIGTERM
            return original(self)

        monkeypatch.setattr(Interrupts, "check", check)

    original = Interrupts.check
    return stop


def arrays(path: str) -> dict[str, bytes]:
    """Every tensor of a snapshot, to the last bit."""
    return {name: data for name, data in tree(Path(path)).items() if name.endswith("safetensors")}


def description(path: str) -> dict:
    found = json.loads(Path(path, "snapshot.json").read_text())
    for flag in ("model_save_dir", "resume"):
        del found["flags"][flag]
    return found


def figures(stdout: str) -> list[str]:
    """The lines, without what a clock says and where snapshots go."""
    lines = (line.split(", samples/s")[0] for line in stdout.splitlines())
    return [line for line in lines if line.startswith(("train:", "validation:"))]


@pytest.mark.parametrize(
    "kind, optimizer",
    [
        ("parts", "sgd"),
        ("global", "sgd"),
        ("arrays", "sgd"),
        ("synthetic", "sgd"),
        ("arrays", "adam"),
        ("arrays", "rmsprop"),
        ("mixed", "sgd"),
        ("augmented", "sgd"),
        ("balanced", "sgd"),
    ],
)
def test_stopped_and_resumed_equals_never_stopped(data, stop_at, kind, optimizer):
    flags = [*recipe(data, kind), f"--optimizer={optimizer}", "--gradient_clipping=3"]
    whole = train(*flags, "--model_save_dir=whole")
    assert whole.status == 0, whole.stderr
    checks = 6 + (2 if kind == "synthetic" else 3) + 1  # of an epoch: steps, validation, end
    lines = []
    # After epoch 0; after iteration 3 of epoch 1, where a line is; after iteration 4 without one;
    # in the middle of the validation behind iterations 5 and 6.
    for count in (checks, 3, 1, 4):
        stop_at(count)
        stopped = train(*flags, "--model_save_dir=run", "--resume=auto")
        assert stopped.status == 143, stopped.stderr
        assert "interrupted by SIGTERM; resume with --resume=run/snapshot_" in stopped.stderr
        lines += figures(stopped.stdout)
    stop_at(None)
    resumed = train(*flags, "--model_save_dir=run", "--resume=auto")
    assert resumed.status == 0, resumed.stderr
    lines += figures(resumed.stdout)
    for name in ("epoch_0", "epoch_1", "epoch_2", "last", "best"):
        one, other = f"whole/snapshot_{name}", f"run/snapshot_{name}"
        assert set(arrays(one)) == {"model.safetensors", "training.safetensors"}
        assert arrays(one) == arrays(other), name
        assert description(one) == description(other)
    # The stop between two lines, and that alone, prints one more. The next one is what it would
    # have been, and what is written down is that of a run that was never stopped.
    more = [line for line in lines if ", iter 4, " in line]
    assert len(more) == 1 and [line for line in lines if line not in more] == figures(whole.stdout)
    assert record(Path("run")) == record(Path("whole"))
    assert epochs(Path("run")) == epochs(Path("whole"))


def test_stopped_twenty_times_and_resumed(data, stop_at):
    """SIGTERM at random moments, also twice between two lines, and before one step is done."""
    rng = random.Random(0)
    flags = [*recipe(data, "arrays"), "--loss_print_every_n_iter=4", "--model=toy"]
    whole = train(*flags, "--model_save_dir=whole")
    assert whole.status == 0, whole.stderr
    stops = 0
    while stops < 20:
        stop_at(rng.choice((1, 1, 2, 3, 5)))
        run = train(*flags, "--model_save_dir=run", "--resume=auto")
        assert run.status in (0, 143), run.stderr
        stops += run.status == 143
        if run.status == 0 or stops == 20:
            stop_at(None)
            assert train(*flags, "--model_save_dir=run", "--resume=auto").status == 0
            assert record(Path("run")) == record(Path("whole"))
            assert epochs(Path("run")) == epochs(Path("whole"))
            assert arrays("run/snapshot_last") == arrays("whole/snapshot_last")
            shutil.rmtree("run")


def process(*argv, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "train_small.py"), "--device=cpu", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


TOY_RUN = (
    "--model=toy",
    "--image_size=32",
    "--num_classes=10",
    "--batch_size_per_device=4",
    "--num_examples=24",
    "--num_epochs=12",
    "--save_every_n_iter=1",
    "--keep_snapshots=2",
    "--loss_print_every_n_iter=1",
)


def record(directory: Path) -> list[dict]:
    """The figures of a run, without what a clock says and what memory it took."""
    entries = read_metrics(str(directory / "metrics.jsonl"))
    of_this_run = ("time", "samples_per_second", "memory_bytes")
    return [{k: v for k, v in each.items() if k not in of_this_run} for each in entries]


def epochs(directory: Path) -> list[str]:
    """The lines of metrics.csv without the last column, the speed."""
    lines = (directory / "metrics.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


@pytest.mark.parametrize("times", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_many_times_and_resumed(tmp_path, times):
    """kill -9 at random moments, half of them while a snapshot is being written."""
    rng = random.Random(times)
    flags = (*TOY_RUN, "--model_save_dir=run", "--resume=auto")
    kills = finished = 0
    while kills < times:
        with process(*flags) as run:
            moment = rng.choice(("start", "line", "save", "save"))
            awaited = {"line": "train:", "save": "Saving model"}.get(moment)
            count = rng.randrange(1, 4)
            while awaited is not None and count > 0:
                line = run.stdout.readline()
                if not line:
                    break
                count -= line.startswith(awaited)
            time.sleep(rng.uniform(0, {"start": 1.2, "line": 0.1, "save": 0.02}[moment]))
            run.kill()
            _, errors = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), errors
        kills += run.returncode != 0
        if run.returncode == 0:  # it got to the end: the next round starts another run
            finished += 1
            os.rename("run", f"run-{finished}")
    with process(*flags) as run:
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    os.rename("run", "run-last")
    with process(*TOY_RUN, "--model_save_dir=whole") as run:
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    expected = ["best", "epoch_10", "epoch_11", "last"]
    whole = Path("whole")
    assert len(record(whole)) == 12 * (6 + 1) and len(epochs(whole)) == 1 + 12
    for path in tmp_path.glob("run-*"):
        assert sorted(os.listdir(path)) == [*RECORD, *(f"snapshot_{name}" for name in expected)]
        assert record(path) == record(whole)
        assert epochs(path) == epochs(whole)
        for name in expected:
            assert arrays(path / f"snapshot_{name}") == arrays(f"whole/snapshot_{name}")


def test_one_command_line_serves_every_start(data, tmp_path):
    flags = (*recipe(data, "arrays"), "--model_save_dir=run", "--resume=auto", "--save_init")
    first = train(*flags)
    assert first.status == 0, first.stderr
    assert "Init model on demand." in first.stdout
    again = train(*flags)
    assert again.status == 0 and "has finished all 3 epochs" in again.stderr
    assert figures(again.stdout) == []
    before = tree(tmp_path / "run")
    more = train(*flags, "--num_epochs=5", "--keep_snapshots=2", "--loss_print_every_n_iter=6")
    assert more.status == 0, more.stderr
    assert "--num_epochs=5 from here on; it was 3." in more.stderr
    assert "Restoring model from run/snapshot_epoch_2." in more.stdout
    assert [line[:24] for line in figures(more.stdout)] == [
        "train: epoch 3, iter 6, ",
        "validation: epoch 3, ite",
        "train: epoch 4, iter 6, ",
        "validation: epoch 4, ite",
    ]
    kept = ["best", "epoch_3", "epoch_4", "initial_model", "last"]
    assert sorted(os.listdir("run")) == [*RECORD, *(f"snapshot_{name}" for name in kept)]
    initial = "snapshot_initial_model/model.safetensors"
    assert tree(tmp_path / "run")[initial] == before[initial]


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The directory of a run that was stopped after epoch 1 of 3."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_registry.MODELS, "tiny", TINY)
        result = train(*recipe(data, "arrays"), f"--model_save_dir={root}", "--num_epochs=2")
    assert result.status == 0, result.stderr
    return root


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--model=resnet50", "--model=resnet50, but run/snapshot_epoch_1 holds a tiny"),
        ("--num_classes=9", "--num_classes=9, but run/snapshot_epoch_1 has 4 classes"),
        ("--batch_size_per_device=7", "makes batches of 7 images, but"),
        ("--num_examples=9", "--num_examples: an epoch has 2 iterations, but"),
        ("--seed=1", "--seed=1, but run/snapshot_epoch_1 is of a run with 0"),
        ("--optimizer=adam", "--optimizer=adam, but"),
        ("--image_size=48", "--image_size=48, but"),
        ("--rgb_mean=1,2,3", "--rgb_mean=(1.0, 2.0, 3.0), but"),
        ("--model_load_dir=run/snapshot_epoch_0", "give one of them"),
        ("--train_data_dir=other.npz", "is not what run/snapshot_epoch_1 was trained on"),
        ("--train_data_dir=parts", "of a run on arrays, and this would be OFRecord parts"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(run, data, flag, words):
    with np.load(next(Path(data).glob("train.npz"))) as arrays_:
        np.savez("other.npz", images=arrays_["images"] // 2, labels=arrays_["labels"])
    argv = ["--resume=run", flag]
    result = call(of_cnn_train_val.main, "--device=cpu", *argv)
    assert result.status == 2, result.stderr
    assert words in result.stderr.splitlines()[-1]


def test_flags_that_are_not_given_are_those_of_the_run(run, data):
    result = call(
        of_cnn_train_val.main,
        "--device=cpu",
        "--resume=run/snapshot_epoch_0",
        "--model_save_dir=elsewhere",
        "--wd=0.01",
        "--lr_decay=step",
    )
    assert result.status == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "from here on" in line] == [
        f"--wd=0.01 from here on; it was {1 / 32768}.",
        "--lr_decay=step from here on; it was cosine.",
    ]
    assert f"Loading data from {data / 'train'}.npz" in result.stdout
    names = ["snapshot_best", "snapshot_epoch_1", "snapshot_last"]
    assert sorted(os.listdir("elsewhere")) == [*RECORD, *names]
    flags = description("elsewhere/snapshot_last")["flags"]
    assert (flags["wd"], flags["learning_rate"], flags["num_epochs"]) == (0.01, 0.05, 2)


def test_going_back_needs_another_directory(run):
    result = call(of_cnn_train_val.main, "--device=cpu", "--resume=run/snapshot_epoch_0")
    assert result.status == 2
    assert "holds snapshot_best, which is later and would be overwritten" in result.stderr


def test_damaged_snapshots_are_passed_over(run):
    shutil.rmtree(run / "snapshot_best")
    (run / "snapshot_epoch_1" / "training.safetensors").write_bytes(b"half")
    (run / "snapshot_last" / "snapshot.json").write_text("{")
    assert find_resume("auto", "run").path == "run/snapshot_epoch_0"


def test_damaged_snapshots_do_not_stand_in_the_way(run):
    shutil.rmtree(run / "snapshot_best")
    for name in ("epoch_1", "last"):
        (run / f"snapshot_{name}" / "model.safetensors").write_bytes(b"half")
    result = call(of_cnn_train_val.main, "--device=cpu", "--model_save_dir=run", "--resume=auto")
    assert result.status == 0, result.stderr
    names = sorted(os.listdir("run"))
    assert [name for name in names if name.startswith("snapshot_")] == [
        f"snapshot_{name}" for name in ("best", "epoch_0", "epoch_1", "last")
    ]
    assert len([name for name in names if name.startswith("damaged_snapshot_")]) == 2
    for name in ("best", "epoch_0", "epoch_1", "last"):
        (run / f"snapshot_{name}" / "model.safetensors").write_bytes(b"half")
    result = call(of_cnn_train_val.main, "--device=cpu", "--model_save_dir=run", "--resume=auto")
    assert result.status == 1
    assert "none of the snapshots in run is intact" in result.stderr.splitlines()[-1]


def test_a_later_last_is_not_overwritten(run):
    for name in ("epoch_1", "best"):
        shutil.rmtree(run / f"snapshot_{name}")
    result = call(of_cnn_train_val.main, "--device=cpu", "--resume=run/snapshot_epoch_0")
    assert result.status == 2 and "holds snapshot_last, which is later" in result.stderr


def test_where_there_is_nothing_to_go_on_from(run, tmp_path):
    def refuse(status, words, *argv):
        result = call(of_cnn_train_val.main, "--device=cpu", *argv)
        assert result.status == status and words in result.stderr.splitlines()[-1], result.stderr

    refuse(2, "--resume=auto needs --model_save_dir", "--resume=auto")
    refuse(2, "--resume: there is no directory none", "--resume=none")
    (tmp_path / "empty").mkdir()
    refuse(2, "--resume: empty holds no snapshot to resume", "--resume=empty")
    (run / "snapshot_epoch_0" / "training.safetensors").unlink()
    refuse(1, "holds weights only, no training.safetensors", "--resume=run/snapshot_epoch_0")
    about = read_description("run/snapshot_epoch_1")
    converted = Snapshot(about.model, about.num_classes, about.preprocessing)
    save_snapshot("converted", TINY.build(about.num_classes), converted)
    refuse(2, "--resume=converted: it holds only weights, not a run", "--resume=converted")


def test_best_is_kept_between_the_intervals(data, monkeypatch):
    """Validation top-1 of 2, 3, 3, 1 of 14: the first of two equal ones is the best."""
    hits = iter((2, 3, 3, 1))
    monkeypatch.setattr(
        Evaluator, "round", lambda self, agreement: (Counts(next(hits), 14, 14), 1.0)
    )
    flags = (*recipe(data, "arrays"), "--num_epochs=4", "--save_epoch_interval=3")
    result = train(*flags, "--model_save_dir=run", "--save_last=False")
    assert result.status == 0, result.stderr
    saved = [line.split("snapshot_")[1] for line in result.stdout.splitlines() if "Saving" in line]
    assert saved == ["best.", "best.", "epoch_2.", "epoch_3."]
    best = description("run/snapshot_best")
    assert best["epoch"] == best["best"]["epoch"] == 1
    assert description("run/snapshot_epoch_3")["best"] == best["best"]


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_run_with_a_snapshot_and_a_second_one_at_once(name, status):
    number = getattr(signal, name)
    flags = [flag for flag in TOY_RUN if "save_every" not in flag] + ["--num_examples=4000"]
    with process(*flags, "--model_save_dir=run", "--resume=auto") as run:
        lines = [run.stdout.readline()]
        while not lines[-1].startswith("train: epoch 0, iter 3"):
            lines.append(run.stdout.readline())
        run.send_signal(number)
        lines, errors = lines + run.stdout.readlines(), run.stderr.read()
    assert run.returncode == status
    assert f"{name}: ending after this iteration" in errors
    last = errors.splitlines()[-1]
    assert f"error: interrupted by {name}; resume with --resume=run/snapshot_last" in last
    assert lines[-1] == "Saving model to run/snapshot_last.\n"
    iteration = description("run/snapshot_last")["iteration"]
    assert lines[-2].startswith(f"train: epoch 0, iter {iteration}, ")
    with process(*flags, "--model_save_dir=run", "--resume=auto") as run:
        first = next(line for line in run.stdout if line.startswith("train:"))
        assert first.startswith(f"train: epoch 0, iter {iteration + 1}, ")
        run.send_signal(number)
        while "ending after this iteration" not in run.stderr.readline():
            pass
        run.send_signal(number)
        run.communicate()
    assert run.returncode in (-number, status)
    assert find_resume("auto", "run").path == "run/snapshot_last"


@pytest.mark.parametrize("devices", [1, 2])
def test_a_terminal_that_is_lost(tmp_path, devices):
    """Every line that is written to it from then on fails; the snapshot is written."""
    flags = [flag for flag in TOY_RUN if "save_every" not in flag] + ["--num_examples=4000"]
    flags += ["--device=cpu", f"--gpu_num_per_node={devices}", "--model_save_dir=run"]
    argv = [sys.executable, str(ROOT / "tests" / "train_small.py"), *flags]
    process_id, terminal = pty.fork()
    if process_id == 0:
        os.execv(argv[0], argv)
    said = b""
    while b"train: epoch 0, iter 3" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(process_id, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert sorted(os.listdir("run")) == [*RECORD, "snapshot_last"]
    assert find_resume("auto", "run").snapshot.iteration >= 3


def test_nohup_is_obeyed():
    flags = [flag for flag in TOY_RUN if "save_every" not in flag]
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    with process(*flags, "--model_save_dir=run", "--num_epochs=2", preexec_fn=ignore) as run:
        while not run.stdout.readline().startswith("train: epoch 0, iter 1"):
            pass
        run.send_signal(signal.SIGHUP)
        out, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "train: epoch 1, iter 6" in out


def test_a_full_disk_leaves_the_last_good_snapshot(tmp_path):
    """The kernel refuses the write: a limit on the size of files stands for the full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
    code = f"{limit}import sys; sys.path.insert(0, sys.argv.pop(1)); import train_small"
    flags = [*TOY_RUN, "--model_save_dir=run", "--resume=auto"]
    with process(*flags, "--num_epochs=1") as run:
        assert run.communicate() and run.returncode == 0
    before = tree(tmp_path / "run")
    argv = [sys.executable, "-c", code, str(ROOT / "tests"), "--device=cpu", *flags]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot save the model to run/snapshot_last: File too large" in done.stderr
    assert "earlier snapshots are untouched" in done.stderr
    after = tree(tmp_path / "run")
    assert {n: d for n, d in after.items() if "snapshot_" in n} == {
        n: d for n, d in before.items() if "snapshot_" in n
    }
