"""Wrong input, as a user meets it: a process of its own, one line, the right status.

Native code is out of reach of Python, so whether a fault was found before it can only be seen from
outside the process.
"""

import io
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from small import ROOT, record, script, write_parts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with one good data set, and broken copies of it."""
    root = tmp_path_factory.mktemp("errors")
    good = write_parts(root / "good", [[0, 1, 2], [3, 2, 1, 0], [1, 1, 1]])
    (root / "empty").mkdir()

    def spoil(name):
        shutil.copytree(good, root / name)
        return root / name / "part-00001"

    spoil("gap").unlink()
    spoil("hollow").write_bytes(b"")
    part = spoil("grey")
    file = io.BytesIO()
    Image.new("L", (20, 20)).save(file, "JPEG")
    part.write_bytes(part.read_bytes() + record(file.getvalue(), 1))
    part = spoil("cut")
    part.write_bytes(part.read_bytes()[:-100])
    part = spoil("garbage")
    data = bytearray(part.read_bytes())
    struct.pack_into("<q", data, 8 + struct.unpack_from("<q", data)[0], -7)
    part.write_bytes(data)
    (root / "text.jpg").write_text("no image")
    (root / "notes").mkdir()
    (root / "notes" / "notes.txt").touch()
    (root / "half").mkdir()
    (root / "half" / "snapshot.json").write_text('{"format_version": 1, "mod')
    np.savez(root / "images.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    return root


TRAIN, EVALUATE, INFERENCE = "of_cnn_train_val.py", "of_cnn_evaluate.py", "of_cnn_inference.py"
CASES = [
    (TRAIN, "--train_data_dir=none", 2, "--train_data_dir: there is no directory none"),
    (TRAIN, "--train_data_dir=empty", 2, "empty holds no OFRecord parts"),
    (TRAIN, "--train_data_dir=gap", 2, "part-00001 is missing"),
    (TRAIN, "--train_data_dir=cut", 1, "part-00001: record 3, at byte"),
    (TRAIN, "--train_data_dir=garbage", 1, "claims a length of -7 bytes"),
    (TRAIN, "--train_data_dir=hollow", 1, "part-00001 holds no records"),
    (TRAIN, "--train_data_dir=grey", 1, "part-00001: record 4, at byte"),
    (
        TRAIN,
        "--train_data_dir=good --batch_size_per_device=4 --num_classes=3",
        2,
        "--num_classes=3",
    ),
    (TRAIN, "--train_data_dir=images.npz", 1, "must hold `images` and `labels`"),
    (TRAIN, "--train_data_dir=good --num_examples=11", 2, "--num_examples=11, but good holds 10"),
    (TRAIN, "--train_data_dir=good --train_data_part_num=4", 2, "--train_data_part_num=4, but"),
    (TRAIN, "--train_data_dir=good --batch_size_per_device=11", 2, "there are 10 training images"),
    (TRAIN, "--train_data_dir=good --batch_size_per_device=4 --val_data_dir=cut", 1, "cut off"),
    (TRAIN, "--batch_size_per_device=0", 2, "--batch_size_per_device: 0 must be at least 1"),
    (TRAIN, "--model=resnet51", 2, "'resnet51', did you mean 'resnet50'?"),
    (TRAIN, "--optimizer=sdg", 2, "--optimizer"),
    (TRAIN, "--lr_decay=cos", 2, "--lr_decay: invalid choice: 'cos'"),
    (TRAIN, "--device=cuda", 2, "--device=cuda: no CUDA device"),
    (TRAIN, "--num_nodes=2", 2, "--num_nodes=2 needs --node_ips"),
    (TRAIN, "--num_nodes=2 --node_ips=10.0.0.1", 2, "has 1 addresses and --num_nodes is 2"),
    (TRAIN, "--num_nodes=2 --node_ips=10.0.0.1,10.0.0.2", 2, "is an address of this machine"),
    (
        TRAIN,
        "--train_data_dir=good --gpu_num_per_node=9 --batch_size_per_device=1",
        2,
        "parts to read, and each of 9 processes needs one",
    ),
    (TRAIN, "--model_save_dir=/proc/x", 2, "--model_save_dir: cannot write to /proc/x"),
    (TRAIN, "--model_load_dir=none", 2, "--model_load_dir: there is no file or directory none"),
    (TRAIN, "--model_load_dir=half", 1, "snapshot.json is damaged"),
    (TRAIN, "--no_such_flag", 2, "unrecognized arguments: --no_such_flag"),
    (EVALUATE, "", 2, "no snapshot under"),
    (
        EVALUATE,
        "--val_data_dir=goood",
        2,
        "--val_data_dir: there is no directory goood; did you mean g",
    ),
    (EVALUATE, "--val_data_dir=cut", 1, "is cut off"),
    (EVALUATE, "--val_data_dir=good", 2, "no snapshot under"),
    (EVALUATE, "--val_data_dir=good --num_val_examples=11", 2, "--num_val_examples=11, but good"),
    (EVALUATE, "--val_data_dir=good --report=cut", 2, "--report: cut holds part-00000, which"),
    (INFERENCE, "--image_path none.jpg", 2, "there is no file or directory none.jpg"),
    (INFERENCE, "--image_path notes", 2, "the directory notes holds no images"),
    (INFERENCE, "--image_path text.jpg", 2, "no snapshot under"),
    (INFERENCE, "--image_path text.jpg --model_load_dir=empty", 1, "holds no snapshot.json"),
]


@pytest.mark.parametrize("name, flags, status, words", CASES)
def test_one_line_and_the_right_status(place, name, flags, status, words):
    result = script(name, *flags.split(), cwd=place)
    assert result.status == status, result.stderr
    # Notices may come before; the fault is one line, and it is the last.
    errors = [line for line in result.stderr.splitlines() if f"{name}: error: " in line]
    assert errors == result.stderr.splitlines()[-1:]
    assert words in errors[0]
    assert "Traceback" not in result.stderr and "oneflow/" not in result.stderr
    assert not (place / "output").exists()


def test_odd_images_and_what_is_none(tmp_path):
    """One run: train, then classify images of every kind."""
    trained = script(
        TRAIN,
        *"--model=resnet18 --image_size=32 --num_examples=8 --num_epochs=1".split(),
        cwd=tmp_path,
    )
    assert trained.status == 0, trained.stderr
    picture = Image.open(ROOT / "data" / "cat.jpg")
    kinds = {"grey.png": "L", "palette.png": "P", "cmyk.jpg": "CMYK"}
    for file_name, mode in kinds.items():
        picture.convert(mode).save(tmp_path / file_name)
    wide = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "sixteen.png")
    names = [*kinds, "sixteen.png"]
    result = script(INFERENCE, "--image_path", *names, cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert result.stdout.splitlines()[::2] == names
    (tmp_path / "text.jpg").write_text("no image")
    result = script(INFERENCE, "--image_path", "text.jpg", cwd=tmp_path)
    assert result.status == 1
    assert result.stderr.splitlines()[-1].endswith("text.jpg is not an image that can be read")
    assert "Traceback" not in result.stderr
    snapshot = next((tmp_path / "output").rglob("snapshot_epoch_0"))
    for flags, words in (
        (("--model=resnet50", f"--model_load_dir={snapshot}"), "--model=resnet50, but"),
        (("--model=resnet50",), "no snapshot of resnet50 under"),
        (("--num_classes=7",), "--num_classes=7, but"),
    ):
        result = script(INFERENCE, "--image_path=grey.png", *flags, cwd=tmp_path)
        assert result.status == 2
        assert words in result.stderr.splitlines()[-1]
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    result = script(INFERENCE, "--image_path=grey.png", cwd=tmp_path)
    assert result.status == 1
    assert "model.safetensors is damaged or cut off" in result.stderr.splitlines()[-1]


def test_nothing_of_oneflow_shows_where_there_is_no_gpu(tmp_path):
    result = script(TRAIN, "--help", cwd=tmp_path)
    assert result.status == 0
    assert result.stderr == ""
    assert "--train_data_dir" in result.stdout
