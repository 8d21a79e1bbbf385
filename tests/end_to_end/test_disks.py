"""Disks that are full or read-only, files that may not be read, paths too deep: one line each.

A limit of the size of a file stands for a full disk where the tests are not root.
"""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import model_registry
import of_cnn_evaluate
import of_cnn_train_val
import resnet_to_onnx
from small import MODELS, RECORD, ROOT, call, tree, write_parts
from tools import convert_snapshot, make_ofrecord

STORED = ROOT / "tests" / "stored"
SNAPSHOT = STORED / "run" / "snapshot_epoch_1"


@pytest.fixture(autouse=True)
def _small_models(tmp_path, monkeypatch):
    for name, model in MODELS.items():
        monkeypatch.setitem(model_registry.MODELS, name, model)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        shutil.copy(ROOT / "data" / "cat.jpg", tmp_path / "pictures" / name)
    return tmp_path / "pictures"


@contextmanager
def short_files(size: int):
    """No file becomes longer than this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


TRAINING = (
    *("--model=toy", "--device=cpu", "--num_epochs=1", "--batch_size_per_device=4"),
    *("--train_data_dir=data", "--model_save_dir=out/run"),
)
WRITERS = {
    "training": lambda pictures: call(of_cnn_train_val.main, *TRAINING),
    "conversion of weights": lambda pictures: call(
        convert_snapshot.main, str(SNAPSHOT), "out/snapshot_a"
    ),
    "conversion of pictures": lambda pictures: call(
        make_ofrecord.main, "folder", f"--input={pictures}", "--output=out/data"
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_grow(pictures, writer):
    os.mkdir("out")
    write_parts(Path("data"), [[0, 1, 2, 3]])
    with short_files(300):
        result = WRITERS[writer](pictures)
    assert result.status == 1, result.stderr
    assert "File too large" in result.stderr.splitlines()[-1], result.stderr
    assert [name for name in tree(Path("out")) if Path(name).name not in RECORD] == []


@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_a_disk_that_is_full_or_read_only(pictures, options):
    os.mkdir("disk")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a disk of its own")
    tool = f"'{sys.executable}' '{ROOT}/tools/make_ofrecord.py'"
    command = f"""
        mount -t tmpfs -o {options} tmpfs disk
        {tool} folder --input=pictures --output=disk/data
        status=$?
        find disk -mindepth 1
        exit $status
    """
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    said = "No space left on device" if "size" in options else "Read-only file system"
    assert done.stderr.count("\n") == 1 and said in done.stderr


def test_a_log_and_an_output_on_a_full_disk(tmp_path):
    os.mkdir("logs")
    os.symlink("/dev/full", "logs/of_cnn_evaluate.log")
    data = write_parts(Path("data"), [[0, 1, 2, 3]])
    flags = (f"--val_data_dir={data}", f"--model_load_dir={SNAPSHOT}", "--device=cpu")
    result = call(of_cnn_evaluate.main, *flags, "--log_dir=logs")
    assert result.status == 1
    assert result.stderr.splitlines()[-1].endswith(
        "--log_dir: cannot write logs/of_cnn_evaluate.log: No space left on device"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "tools" / "verify_ofrecord.py", data],
            stdout=full,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            text=True,
        )
    assert done.returncode == 1 and "cannot write to standard output" in done.stderr


@pytest.fixture
def reduced() -> list[str]:
    """What a command begins with that may not read every file."""
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root may read everything, and there is no setpriv to change that")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.mark.parametrize(
    "path, status, words",
    [
        ("a/cat.jpg", 1, "1 of 2 images are bad (listed above)"),
        ("a", 1, "pictures/a: cannot be read: Permission denied"),
        ("", 2, "--input=pictures: cannot be read: Permission denied"),
    ],
)
def test_pictures_that_may_not_be_read(pictures, reduced, path, status, words):
    os.chmod(pictures / path, 0)
    tool = [*reduced, sys.executable, ROOT / "tools" / "make_ofrecord.py", "folder"]
    try:
        done = subprocess.run(
            [*tool, "--input=pictures", "--output=data"], capture_output=True, text=True
        )
    finally:
        os.chmod(pictures / path, 0o755)
    *notes, line = done.stderr.splitlines()
    assert done.returncode == status and f"error: {words}" in line
    assert [note for note in notes if not note.startswith("note: ")] == (
        ["bad image: a/cat.jpg: Permission denied"] if path.endswith("jpg") else []
    )
    assert not os.path.exists("data")


def test_weights_that_may_not_be_read(tmp_path, reduced):
    shutil.copytree(SNAPSHOT, "snapshot_a")
    os.chmod("snapshot_a/model.safetensors", 0)
    code = "import sys; from cnns.checkpoint.snapshot import read_weights as r; r(sys.argv[1])"
    done = subprocess.run(
        [*reduced, sys.executable, "-c", code, tmp_path / "snapshot_a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "model.safetensors: Permission denied" in done.stderr.splitlines()[-1], done.stderr


def test_a_path_of_too_many_folders(tmp_path):
    result = call(convert_snapshot.main, str(SNAPSHOT), "a/" * 1900 + "b")
    assert result.status == 1 and "too many folders" in result.stderr.splitlines()[-1]
    assert os.listdir() == []
    flags = (f"--model_load_dir={SNAPSHOT}", f"--image_path={ROOT}/data/cat.jpg")
    result = call(resnet_to_onnx.main, *flags, f"--onnx_path={'x' * 300}.onnx")
    assert result.status == 2 and "File name too long" in result.stderr.splitlines()[-1]
