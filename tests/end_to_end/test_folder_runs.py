"""From a folder of images: training, fine-tuning, resuming and evaluation, with a tiny network."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import model_registry
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
import resnet_to_onnx
from cnns.checkpoint.snapshot import read_description
from small import ROOT, TINY, call, solid, validation_figures
from tools import deploy

CLASSES = ("dark", "grey", "light")
SCRIPTS = {
    "of_cnn_evaluate.py": of_cnn_evaluate,
    "of_cnn_inference.py": of_cnn_inference,
    "resnet_to_onnx.py": resnet_to_onnx,
    "deploy.py": deploy,
}


@pytest.fixture(autouse=True)
def photos(monkeypatch, tmp_path):
    """Twelve images of each class, whose brightness gives it away."""
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = solid(label, len(CLASSES), rng)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    return tmp_path / "photos"


def train(*argv):
    return call(of_cnn_train_val.main, "--model=tiny", "--device=cpu", "--top_k=2", *argv)


def started(*argv) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    script = str(ROOT / "tests" / "train_small.py")
    return subprocess.run(
        [sys.executable, script, "--model=tiny", "--device=cpu", "--top_k=2", *argv],
        capture_output=True,
        text=True,
        timeout=300,
    )


def held(directory: str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.startswith("snapshot_"))


def test_a_folder_is_fine_tuned_and_the_commands_that_follow_run(photos):
    first = train("--train_data_dir=photos", "--num_epochs=1", "--batch_size_per_device=8")
    assert first.status == 0, first.stderr
    (start,) = os.listdir("output/snapshots")
    start = f"--model_load_dir=output/snapshots/{start}/snapshot_last"
    run = train(
        "--train_data_dir=photos",
        "--finetune",
        start,
        "--num_epochs=3",
        "--model_save_dir=tuned",
        "--learning_rate=0.05",
    )
    assert run.status == 0, run.stderr
    assert (
        "Fine-tuning: --warmup_epochs=1 --keep_snapshots=1 --batch_norm_momentum=0.1; give"
        in run.stderr
    )
    assert "Fine-tuning: --batch_size_per_device=8." in run.stderr
    assert "photos: unchanged, read from output/cache/photos-" in run.stderr
    assert held("tuned") == ["snapshot_best", "snapshot_epoch_2", "snapshot_last"]
    flags = read_description("tuned/snapshot_last").flags
    assert flags["train_data_dir"] == "photos" and flags["num_epochs"] == 3
    commands = [line.partition(": ")[2] for line in run.stderr.splitlines()[-4:]]
    results = {}
    for command in commands:
        python, name, *argv = shlex.split(command.replace("PHOTO.jpg", "photos/dark/3.jpg"))
        assert os.path.samefile(python, sys.executable)
        name = os.path.basename(name)
        if name == "resnet_to_onnx.py":  # its default is a picture of the project's directory
            argv += ["--image_path", "photos/dark/3.jpg"]
        results[name] = call(SCRIPTS[name].main, *argv)
        assert results[name].status == 0, results[name].stderr
    assert set(results) == set(SCRIPTS)
    best = read_description("tuned/snapshot_best").metrics["val_top_1"]
    assert (
        "\nCurves: tuned/report/report.html\nWhat it gets wrong: tuned/evaluation/report.html\n"
        in (run.stderr)
    )
    about = json.loads(Path("tuned/evaluation/report.json").read_text())
    assert about["top_1"] == best and about["weights"] == "tuned/snapshot_best"
    scored = results["of_cnn_evaluate.py"].stdout
    assert validation_figures(scored)[0][0] == f"{best:.6f}"
    assert results["of_cnn_inference.py"].stdout.split()[-1] in CLASSES
    # Resumed, the record still says how the run began, for --config.
    again = train("--resume=tuned", "--report=False")
    assert again.status == 0 and "has finished all 3 epochs" in again.stderr
    flags = yaml.safe_load(Path("tuned/flags.yaml").read_text())["flags"]
    assert flags["finetune"] and start == f"--model_load_dir={flags['model_load_dir']}"
    # Of a folder that the run has split, what it kept for validation is scored.
    named = call(
        of_cnn_evaluate.main, "--val_data_dir=photos", "--model_load_dir=tuned/snapshot_best"
    )
    assert validation_figures(named.stdout) == validation_figures(scored)


def test_the_report_is_of_the_best_snapshot_in_any_number_of_processes(photos):
    """At a rate that is far too high, the best epoch is not the last."""
    flags = ("--train_data_dir=photos", "--num_epochs=4", "--batch_size_per_device=4", "--wd=0")
    rate = ("--learning_rate=3", "--val_split=0.25")
    run = started("--gpu_num_per_node=2", "--model_save_dir=run", *flags, *rate)
    assert run.returncode == 0, run.stderr
    assert "Curves: run/report/report.html\n" in run.stderr
    said = json.loads(Path("run/evaluation/report.json").read_text())
    best, last = (read_description(f"run/snapshot_{name}") for name in ("best", "last"))
    assert best.epoch < last.epoch and said["images"] == 9
    assert said["top_1"] == best.metrics["val_top_1"]
    losses = {}
    for name in ("best", "last"):
        flags = (f"--model_load_dir=run/snapshot_{name}", "--val_split=0.25")
        scored = call(of_cnn_evaluate.main, "--val_data_dir=photos", *flags)
        losses[name] = float(re.search(r"Loss: (\S+),", scored.stderr)[1])
    assert said["loss"] == pytest.approx(losses["best"], rel=1e-3)
    assert said["loss"] != pytest.approx(losses["last"], rel=1e-2)
    # Nothing to train: only the reports are written again. One that cannot be is a notice.
    shutil.rmtree("run/evaluation")
    shutil.rmtree("run/report")
    Path("run/report").write_text("in the way")
    again = train("--resume=run")
    assert again.status == 0, again.stderr
    said_again = json.loads(Path("run/evaluation/report.json").read_text())
    assert said_again["loss"] == pytest.approx(said["loss"], rel=1e-3)
    assert re.search(r"^Curves: not written, File exists: \S+/run/report; ", again.stderr, re.M)
    Path("run/evaluation/mine.txt").write_text("")
    again = train("--resume=run")
    assert again.status == 0 and "/run/evaluation holds mine.txt" in again.stderr
    assert Path("run/evaluation/mine.txt").exists()


def test_reports_are_left_out_where_told_and_asked_for_where_there_is_no_folder(photos):
    flags = ("--num_epochs=1", "--batch_size_per_device=8")
    run = train("--train_data_dir=photos", "--report=False", "--model_save_dir=run", *flags)
    assert run.status == 0 and "Curves" not in run.stderr and "Score it: " in run.stderr
    assert not os.path.exists("run/report") and not os.path.exists("run/evaluation")
    (entry,) = os.listdir("output/cache")
    parts = f"--train_data_dir=output/cache/{entry}/train"
    run = train(parts, "--report", "--model_save_dir=parts", *flags)
    assert run.status == 0, run.stderr
    assert os.path.exists("parts/report/report.html") and not os.path.exists("parts/evaluation")
    refused = train("--report")
    assert refused.status == 2 and "--report has no effect on synthetic data" in refused.stderr


def test_the_defaults_of_fine_tuning(photos):
    first = train("--train_data_dir=photos", "--num_epochs=1", "--batch_size_per_device=8")
    assert first.status == 0, first.stderr
    (start,) = os.listdir("output/snapshots")
    start = f"--model_load_dir=output/snapshots/{start}/snapshot_last"
    given = of_cnn_train_val.parse_args(["--finetune", start, "--train_data_dir=photos"])
    for optimizer, rate in (("sgd", 0.1), ("adam", 0.002), ("rmsprop", 0.0072)):
        given.optimizer = optimizer
        flags = of_cnn_train_val.make_spec(given).flags
        assert flags["num_epochs"] == 10 and flags["warmup_epochs"] == 1
        assert flags["batch_norm_momentum"] == 0.1
        assert flags["keep_snapshots"] == 1 and flags["batch_size_per_device"] == 8
        assert flags["learning_rate"] == pytest.approx(rate * 8 / 256)
    given.batch_norm_momentum = 0.3
    model = of_cnn_train_val.build_model(of_cnn_train_val.make_spec(given))
    assert {m.momentum for m in model.modules() if hasattr(m, "running_mean")} == {0.3}


def go_back(directory: str) -> None:
    """Remove all snapshots but that of epoch 0."""
    for name in held(directory):
        if name != "snapshot_epoch_0":
            shutil.rmtree(os.path.join(directory, name))


def test_resuming_with_the_folder_moved_and_the_cache_gone(photos):
    flags = ("--batch_size_per_device=8", "--model_save_dir=run", "--num_epochs=2")
    whole = train("--train_data_dir=photos", *flags)
    assert whole.status == 0, whole.stderr
    go_back("run")
    shutil.rmtree("output/cache")
    os.rename(photos, "elsewhere")
    for path in ("elsewhere/dark/1.jpg", "elsewhere/grey/2.jpg"):
        os.utime(path)
    gone = train("--resume=run")
    assert gone.status == 2 and "there is no directory photos" in gone.stderr
    again = train("--resume=run", "--train_data_dir=elsewhere")
    assert again.status == 0, again.stderr
    assert "Resuming at epoch 1" in again.stderr
    assert validation_figures(again.stdout) == validation_figures(whole.stdout)[1:]
    go_back("run")
    Image.new("RGB", (40, 40)).save("elsewhere/dark/1.jpg")
    other = train("--resume=run", "--train_data_dir=elsewhere")
    assert other.status == 2 and "is not what run/snapshot_" in other.stderr


def test_flags_of_folders_are_refused_without_one(photos, tmp_path):
    np.savez("x.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=[0, 1, 0, 1])
    refused = train("--train_data_dir=x.npz", "--val_split=0.2")
    assert refused.status == 2 and "--val_split belongs to a folder of images" in refused.stderr
    refused = train("--train_data_dir=photos", "--train_data_part_num=1")
    assert refused.status == 2 and "--train_data_part_num has no effect" in refused.stderr
    refused = train("--train_data_dir=photos/train", "--num_epochs=1")
    assert refused.status == 2
    assert "photos is not split into train/ and validation/: --train_data_dir=photos" in (
        refused.stderr
    )


def test_several_processes_convert_once_and_share_the_parts(photos):
    run = started(
        *("--gpu_num_per_node=2", "--train_data_dir=photos"),
        *("--num_epochs=1", "--batch_size_per_device=4", "--report=False"),
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Converting 36 images of photos") == 1
    assert len(validation_figures(run.stdout)) == 1
