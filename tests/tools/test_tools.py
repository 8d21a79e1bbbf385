"""Making data: the OFRecord writer, the tools on it, and what data/ ships."""

import cnns.startup  # noqa: F401

import fcntl
import gzip
import hashlib
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import oneflow as flow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oneflow.core.record.record_pb2 import OFRecord
from PIL import Image

from cnns.convert.jpegs import encode_jpeg, upright_jpeg
from cnns.convert.writer import (
    Example,
    Split,
    default_num_parts,
    shuffled_parts,
    write_dataset,
    write_part,
)
from cnns.data.format import encode_record
from cnns.data.images import CLASSES_FILE, BadImage, read_classes
from cnns.errors import RunError, UsageError
from small import ROOT, read_manifest, tree
from tools import make_mini_imagenet, make_ofrecord

# Reading back, independently of the writer.


def read_messages(path: Path) -> list[bytes]:
    data, messages, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<q", data, at)
        messages.append(data[at + 8 : at + 8 + length])
        assert len(messages[-1]) == length
        at += 8 + length
    return messages


def read_parts(directory: Path) -> list[tuple[bytes, int]]:
    """(encoded, label) of each record, in the order of the parts."""
    records = [
        OFRecord.FromString(message)
        for part in sorted(directory.glob("part-*"))
        for message in read_messages(part)
    ]
    return [
        (r.feature["encoded"].bytes_list.value[0], r.feature["class/label"].int32_list.value[0])
        for r in records
    ]


def read_natively(directory: Path) -> tuple[list[np.ndarray], list[int]]:
    """Images (H, W, 3) uint8 and labels, by OneFlow's own reader and decoder."""
    manifest = read_manifest(directory)
    reader = flow.nn.OFRecordReader(
        str(directory),
        batch_size=manifest["num_examples"],
        data_part_num=len(manifest["parts"]),
        part_name_suffix_length=5,
    )
    record = reader()
    images = flow.nn.OFRecordImageDecoder("encoded", color_space="RGB")(record).numpy()
    labels = flow.nn.OFRecordRawDecoder("class/label", shape=(), dtype=flow.int32)(record).numpy()
    shaped = [np.asarray(image).reshape(np.asarray(image).shape[-3:]) for image in images]
    return shaped, labels.tolist()


# Making input.


def picture(seed: int, size=(24, 16), mode: str = "RGB") -> Image.Image:
    """A smooth picture, of which JPEG keeps nearly everything."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR).convert(mode)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of four JPEGs for training, one each for validation."""
    for c, name in enumerate(("ant", "bee", "cow")):
        for i in range(4):
            save(picture(10 * c + i), tmp_path / "in" / "train" / name / f"{i}.jpg", quality=90)
        save(picture(100 + c), tmp_path / "in" / "validation" / name / "x.JPEG", quality=90)
    return tmp_path / "in"


def convert(*flags) -> None:
    make_ofrecord.main([str(flag) for flag in flags])


def folder(source: Path, output: Path, *flags) -> None:
    convert("folder", f"--input={source}", f"--output={output}", *flags)


def write_idx(path: Path, array: np.ndarray, *, magic: int | None = None) -> Path:
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x800 + array.ndim, *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def idx_files(tmp_path) -> Path:
    """A family of 30 training and 10 test images of 28 x 28."""
    source = tmp_path / "idx"
    source.mkdir()
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = np.stack([np.asarray(picture(i, (28, 28), "L")) for i in range(count)])
        write_idx(source / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(source / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return source


# The writer.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 2**31 - 1)), min_size=1, max_size=8)
)
def test_framing_round_trip(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("part") / "part-00000"
    info = write_part(path, [encode_record(*record) for record in records])
    assert read_parts(path.parent) == records
    data = path.read_bytes()
    assert info == {
        "name": "part-00000",
        "num_examples": len(records),
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


@given(st.permutations(["filename", "class/text", "height", "data_id"]))
@settings(max_examples=30, deadline=None)
def test_record_bytes_do_not_depend_on_the_order_of_features(order):
    more = {"filename": "a.jpg", "class/text": b"x", "height": 7, "data_id": -1}
    message = encode_record(b"jpeg", 3, **{name: more[name] for name in order})
    assert message == encode_record(b"jpeg", 3, **more)
    record = OFRecord.FromString(message)
    assert message == record.SerializeToString(deterministic=True)
    assert list(record.feature["data_id"].int32_list.value) == [-1]
    assert list(record.feature["filename"].bytes_list.value) == [b"a.jpg"]


def test_record_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="below 0"):
        encode_record(b"", -1)
    with pytest.raises(ValueError):
        encode_record(b"", 2**31)
    for value in (None, [1], 0.5):
        with pytest.raises(TypeError):
            encode_record(b"", 0, height=value)


@given(st.integers(1, 500), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_parts_hold_every_example_once_and_are_of_a_size(num_examples, num_parts, seed):
    parts = shuffled_parts(num_examples, min(num_parts, num_examples), seed)
    assert sorted(np.concatenate(parts)) == list(range(num_examples))
    sizes = {len(part) for part in parts}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert default_num_parts(num_examples) <= num_examples


def test_default_number_of_parts():
    counts = {1: 1, 50: 1, 128: 2, 400: 4, 511: 4, 512: 8, 80_000: 8, 80_001: 16, 1_281_167: 136}
    assert {n: default_num_parts(n) for n in counts} == counts


def test_part_that_is_interrupted_is_not_there(tmp_path):
    def messages():
        yield b"message"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "part-00000", messages())
    assert list(tmp_path.iterdir()) == []


def some_splits(root: Path, load, count: int = 8) -> list[Split]:
    names = [f"x{i}" for i in range(count)]
    return [Split(root / name, names, load) for name in ("train", "validation")]


def good(i: int) -> Example:
    return Example(b"jpeg %d" % i, 0)


def stop_at_the_last(i: int) -> Example:
    if i == shuffled_parts(8, 3, 0)[-1][0]:
        raise KeyboardInterrupt
    return good(i)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_before_a_part_is_finished_nothing_is_left(tmp_path, stop):
    def load(i):
        raise stop

    with pytest.raises(stop):
        write_dataset(some_splits(tmp_path, load), classes=["a"], made_by={}, num_parts=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_run_keeps_whole_parts_and_goes_on(tmp_path, capsys, stop):
    calls = []

    def load(i):
        calls.append(i)
        if len(calls) == 6:
            raise stop
        return good(i)

    write_dataset(some_splits(tmp_path / "whole", good), classes=["a"], made_by={}, num_parts=4)
    out = tmp_path / "out"
    with pytest.raises(stop):
        write_dataset(some_splits(out, load), classes=["a"], made_by={}, num_parts=4)
    assert sorted(tree(out)) == [
        "train.partial/journal.jsonl",
        "train.partial/part-00000",
        "train.partial/part-00001",
    ]
    assert "2 of 4 parts are finished and kept; the same command resumes" in capsys.readouterr().err
    del calls[:]
    calls += [None] * 100
    write_dataset(some_splits(out, load), classes=["a"], made_by={}, num_parts=4)
    assert len(calls) == 100 + 4 + 8  # what was finished is not made again
    assert "2 parts of 4 were there from an earlier run\n" in capsys.readouterr().err
    assert tree(out) == tree(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from cnns.convert.writer import Example, Split, write_dataset
def load(i, calls=[]):
    calls.append(i)
    if len(calls) == 6 and len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return Example(b"jpeg", 0)
write_dataset([Split(Path(sys.argv[1]), ["x"] * 8, load)], classes=["a"], made_by={}, num_parts=4)
"""


ENDED = """
import fcntl, os, sys, termios, time
from pathlib import Path
from cnns.interrupts import exit_on_signals
from cnns.convert.writer import Example, Split, write_dataset
def load(i):
    if i < 7:
        return Example(b"jpeg", 0)
    print("ready", flush=True)
    time.sleep(60)
exit_on_signals()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
splits = [Split(Path(sys.argv[1]) / "out", ["x"] * 8, load)]
write_dataset(splits, classes=["a"], made_by={}, num_parts=8, num_workers=2)
"""


@pytest.mark.parametrize("how, status", [("SIGTERM", 143), ("SIGHUP", 129), ("hang up", 129)])
def test_a_signal_to_all_processes_of_a_tool(tmp_path, how, status):
    """The finished parts are kept, as after Ctrl-C, also where the terminal is gone."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED, str(tmp_path)],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        cwd=ROOT,
    )
    os.close(end)
    with open(terminal, "rb", buffering=0) as file:
        while b"ready" not in file.read(1000):
            pass
        if how != "hang up":
            os.killpg(process.pid, signal.Signals[how])
            assert process.wait(30) == status
    assert process.wait(30) == status
    found = sorted(tree(tmp_path))
    assert found[0] == "out.partial/journal.jsonl" and not any(".tmp" in name for name in found)
    with pytest.raises(ProcessLookupError):  # no worker is left, as soon as each was told
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_killed_run_leaves_no_directory_of_that_name_and_the_next_one_goes_on(tmp_path):
    output = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, output, "die"], cwd=ROOT, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not output.exists()
    left = sorted(path.name for path in (tmp_path / "out.partial").iterdir())
    assert left[:3] == ["journal.jsonl", "part-00000", "part-00001"]
    assert re.fullmatch(r"part-00002\.\d+\.tmp", left[3]) and len(left) == 4
    for name in ("out", "other"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], cwd=ROOT, check=True)
    assert tree(output) == tree(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """A directory of which 2 parts of 4 are finished."""
    calls = []

    def load(i):
        calls.append(i)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return good(i)

    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "out", load=load)
    return tmp_path / "out.partial"


def resume(output: Path, *, load=good, seed=3, num_parts=4, classes=("a",), **arguments) -> None:
    write_dataset(
        [Split(output, [f"x{i}" for i in range(8)], load)],
        classes=classes,
        made_by={"tool": "me", "arguments": {"seed": seed, "skip_bad": False, **arguments}},
        num_parts=num_parts,
        seed=seed,
    )


@pytest.mark.parametrize(
    "change, match",
    [
        ({"seed": 4}, r"other arguments \(--seed was 3, now it is 4\); give the same"),
        ({"num_parts": 2}, "number of parts was 4, now it is 2"),
        ({"classes": ("b",)}, "classes was .*, now it is"),
        ({"input": "there"}, "--input was None, now it is there"),
    ],
)
def test_other_arguments_are_refused(unfinished, tmp_path, change, match):
    before = tree(unfinished)
    with pytest.raises(UsageError, match=match):
        resume(tmp_path / "out", **change)
    assert tree(unfinished) == before


def test_parts_that_are_not_as_the_journal_says_are_made_again(unfinished, tmp_path, capsys):
    resume(tmp_path / "whole")
    (unfinished / "part-00000").unlink()
    part = unfinished / "part-00001"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    (unfinished / "part-00002.999.tmp").write_text("half")
    with open(unfinished / "journal.jsonl", "a") as journal:
        journal.write('{"index": 2, "info": {"na')  # killed in the middle of the line
    resume(tmp_path / "out")
    assert "1 made again, as it was damaged; 1 made again, as it was missing" in (
        capsys.readouterr().err
    )
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_changed_input_is_made_again_and_said(photos, tmp_path, capsys, monkeypatch):
    # The first run stops at an image that is bad, with the other parts finished.
    whole = (photos / "validation" / "cow" / "x.JPEG").read_bytes()
    (photos / "validation" / "cow" / "x.JPEG").write_bytes(whole[:-9])
    with pytest.raises(RunError, match="^1 of 15 images are bad"):
        folder(photos, tmp_path / "out", "--num_parts=3")
    assert "3 of 3 parts are finished and kept" in capsys.readouterr().err
    save(picture(77), photos / "train" / "ant" / "0.jpg", quality=90)
    (photos / "validation" / "cow" / "x.JPEG").write_bytes(whole)
    folder(photos, tmp_path / "out", "--num_parts=3")
    err = capsys.readouterr().err
    assert "train: 2 parts of 3 were there from an earlier run; 1 made again, as the input " in err
    assert "validation: 2 parts of 3 were there from an earlier run\n" in err
    folder(photos, tmp_path / "whole", "--num_parts=3")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_unfinished_directories_of_others(unfinished, tmp_path):
    journal = unfinished / "journal.jsonl"
    lock = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match=r"out\.partial: another run is writing it now"):
        resume(tmp_path / "out")
    os.close(lock)
    kept = journal.read_bytes()
    journal.write_bytes(b"no JSON")
    with pytest.raises(UsageError, match=r"journal\.jsonl: cannot be read; remove"):
        resume(tmp_path / "out")
    journal.unlink()
    with pytest.raises(UsageError, match=r"holds part-00000 but no journal\.jsonl"):
        resume(tmp_path / "out")
    journal.write_bytes(kept)
    resume(tmp_path / "out")


def test_killed_on_the_last_steps(tmp_path, capsys, monkeypatch):
    """Between the renames of the two splits, and after the journal is gone."""
    splits = some_splits(tmp_path / "whole", good)
    write_dataset(splits, classes=["a"], made_by={}, num_parts=2)
    for last in range(3):  # the rename that does not happen; 2: all of them do
        out, calls = tmp_path / f"out{last}", []
        rename = os.rename

        def stop(source, target, calls=calls, last=last, rename=rename):
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(rename(source, target))

        monkeypatch.setattr(os, "rename", stop)
        if last < 2:
            with pytest.raises(KeyboardInterrupt):
                write_dataset(some_splits(out, good), classes=["a"], made_by={}, num_parts=2)
            assert (out / "train").exists() == (last == 1)
            assert not (out / ("validation" if last else "train")).exists()
        monkeypatch.setattr(os, "rename", rename)
        write_dataset(some_splits(out, good), classes=["a"], made_by={}, num_parts=2)
        assert tree(out) == tree(tmp_path / "whole")
        before = tree(out)
        capsys.readouterr()
        write_dataset(some_splits(out, good), classes=["a"], made_by={}, num_parts=2)
        assert tree(out) == before and capsys.readouterr().err.count("is complete") == 2


def test_sigterm_cleans_up(photos, tmp_path):
    # Pictures that take a while, so that the signal comes in the middle of the run.
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "PNG")
    for i in range(100):
        (photos / "train" / "ant" / f"large{i}.png").write_bytes(file.getvalue())
    script = ROOT / "tools" / "make_ofrecord.py"
    command = [sys.executable, script, "folder", f"--input={photos}", f"--output={tmp_path}/out"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
        for _ in range(600):
            if (tmp_path / "out" / "train.partial").exists():
                break
            time.sleep(0.05)
        run.terminate()
        assert run.wait(timeout=30) == 143
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    split = Split(tmp_path / "out", ["x"], lambda i: Example(b"jpeg", 0))
    with pytest.raises(RunError, match="cannot write: No space left on device"):
        write_dataset([split], classes=["a"], made_by={})
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_refused(tmp_path, monkeypatch):
    def make(output):
        write_dataset(
            [Split(output, ["x"], lambda i: Example(b"jpeg", 0))], classes=["a"], made_by={}
        )

    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="file: is a file"):
        make(file)
    for name in ("part-00000", "manifest.json", "notes.txt"):
        taken = tmp_path / f"has {name}"
        taken.mkdir()
        (taken / name).write_text("mine")
        with pytest.raises(UsageError, match=f"already holds {name}"):
            make(taken)
        assert tree(taken) == {name: b"mine"}
    with pytest.raises(RunError, match="cannot write"):
        make(file / "below")

    empty = tmp_path / "empty"
    empty.mkdir()
    link = tmp_path / "link"
    link.symlink_to(empty)
    make(link)
    assert (empty / "manifest.json").is_file() and link.is_symlink()

    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(UsageError, match="mount point.*--output="):
        make(tmp_path / "mounted")


def test_part_without_a_good_image_is_refused(tmp_path):
    def load(i):
        if i == 1:
            raise BadImage("torn")
        return Example(b"jpeg", 0)

    split = Split(tmp_path / "out", ["good", "bad"], load)
    with pytest.raises(RunError, match="would be empty.*fewer --num_parts"):
        write_dataset([split], classes=["a"], made_by={}, num_parts=2, skip_bad=True)
    assert list(tmp_path.iterdir()) == []


# make_ofrecord.py folder.


def test_folder_with_train_and_validation(photos, tmp_path, capsys):
    folder(photos, tmp_path / "out", "--num_parts=3")
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest["format_version"] == 1
    assert manifest["num_examples"] == 12 and manifest["num_classes"] == 3
    assert manifest["classes"] == ["ant", "bee", "cow"]
    assert [part["name"] for part in manifest["parts"]] == [f"part-0000{k}" for k in range(3)]
    assert [part["num_examples"] for part in manifest["parts"]] == [4, 4, 4]
    for part in manifest["parts"]:
        data = (tmp_path / "out" / "train" / part["name"]).read_bytes()
        assert part["num_bytes"] == len(data)
        assert part["sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest["made_by"] == {
        "tool": "tools/make_ofrecord.py folder",
        "arguments": {
            "input": str(photos),
            "num_parts": 3,
            "seed": 0,
            "classes": None,
            "skip_bad": False,
        },
        "input": manifest["made_by"]["input"],
    }
    stored = sorted(read_parts(tmp_path / "out" / "train"))
    expected = sorted(
        (path.read_bytes(), label)
        for label, name in enumerate(("ant", "bee", "cow"))
        for path in (photos / "train" / name).iterdir()
    )
    assert stored == expected  # RGB JPEGs are stored byte for byte
    assert len(read_parts(tmp_path / "out" / "validation")) == 3
    size = sum(part["num_bytes"] for part in manifest["parts"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/out/train: 12 examples of 3 classes in 3 parts, {size} bytes"


def test_folder_reads_back_through_oneflow(photos, tmp_path):
    folder(photos / "train", tmp_path / "out", "--num_parts=2")
    images, labels = read_natively(tmp_path / "out")
    records = read_parts(tmp_path / "out")
    assert labels == [label for _, label in records]
    assert Counter(labels) == {0: 4, 1: 4, 2: 4}
    for image, (encoded, _) in zip(images, records, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(io.BytesIO(encoded))))


@pytest.mark.parametrize("name", ["valid_name", "val"])
def test_folder_names_of_validation(photos, tmp_path, name):
    (photos / "validation").rename(photos / name)
    if name == "val":
        folder(photos, tmp_path / "out")
        assert read_manifest(tmp_path / "out" / "validation")["num_examples"] == 3
    else:  # then train/ and the other are taken for classes
        folder(photos, tmp_path / "out")
        assert read_manifest(tmp_path / "out")["classes"] == ["train", name]


def test_folder_same_seed_same_bytes_other_seed_other_order(photos, tmp_path):
    for output, seed in (("a", 5), ("b", 5), ("c", 6)):
        folder(photos, tmp_path / output, f"--seed={seed}", "--num_parts=2")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    a, c = read_parts(tmp_path / "a" / "train"), read_parts(tmp_path / "c" / "train")
    assert a != c and sorted(a) == sorted(c)


# What OneFlow's decoders cannot take, by name: each must come back as the picture it was.
ODD = {
    "grey.jpg": (picture(1, mode="L"), {"quality": 90}, "greyscale JPEG"),
    "cmyk.jpg": (picture(2, mode="CMYK"), {"quality": 95}, "CMYK JPEG"),
    "colour.png": (picture(3), {}, "PNG"),
    "grey.png": (picture(4, mode="L"), {}, "PNG"),
    "alpha.png": (picture(5, mode="RGBA"), {}, "PNG"),
    "palette.gif": (picture(6, mode="P"), {}, "GIF"),
    "bitmap.bmp": (picture(7), {}, "BMP"),
    "lossless.webp": (picture(8), {"lossless": True}, "WEBP"),
    "really_a.png.jpg": (picture(9), {"format": "PNG"}, "PNG"),
    "UPPER.PNG": (picture(10), {}, "PNG"),
}


def test_folder_encodes_what_oneflow_cannot_decode(tmp_path, capsys):
    for name, (image, options, _) in ODD.items():
        save(image, tmp_path / "in" / name.replace(".", "_") / name, **options)
    deep = np.linspace(0, 65535, 16 * 24).reshape(16, 24).astype(np.uint16)
    save(Image.fromarray(deep), tmp_path / "in" / "z_deep" / "deep.png")
    folder(tmp_path / "in", tmp_path / "out")
    expected = {
        name.replace(".", "_"): np.asarray(
            Image.open(tmp_path / "in" / name.replace(".", "_") / name).convert("RGB"), int
        )
        for name in ODD
    }
    expected["z_deep"] = np.repeat((deep / 257)[..., None], 3, axis=2)
    classes = read_manifest(tmp_path / "out")["classes"]
    images, labels = read_natively(tmp_path / "out")
    assert len(images) == len(expected)
    for image, label in zip(images, labels, strict=True):
        error = np.abs(image - expected[classes[label]])
        assert error.max() <= 20 and error.mean() < 3, classes[label]
    kinds = Counter([kind for _, _, kind in ODD.values()] + ["PNG"])
    assert read_manifest(tmp_path / "out")["made_by"]["re_encoded"] == kinds
    assert "encoded as RGB JPEG: 1 BMP, 1 CMYK JPEG, 1 GIF" in capsys.readouterr().out


def test_greyscale_jpeg_loses_next_to_nothing():
    photograph = Image.open(ROOT / "data" / "coffee.jpg").convert("L")
    for quality in (60, 90):
        buffer = io.BytesIO()
        photograph.save(buffer, "JPEG", quality=quality)
        encoded, was = upright_jpeg(buffer.getvalue())
        assert was == "greyscale JPEG"
        before, after = (
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
            for data in (buffer.getvalue(), encoded)
        )
        assert np.abs(before - after).mean() < 0.02
        assert len(encoded) < 1.1 * len(buffer.getvalue())


def test_picture_on_its_side_is_stored_upright(tmp_path):
    tags = Image.Exif()
    tags[0x112] = 6
    lying = save(picture(1, (24, 16)), tmp_path / "in" / "a" / "x.jpg", exif=tags, quality=95)
    folder(tmp_path / "in", tmp_path / "out")
    [(encoded, _)] = read_parts(tmp_path / "out")
    upright = Image.open(io.BytesIO(encoded))
    turned = Image.open(lying).transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (16, 24) and 0x112 not in upright.getexif()
    assert np.abs(np.asarray(upright, int) - np.asarray(turned, int)).mean() < 2
    assert read_manifest(tmp_path / "out")["made_by"]["re_encoded"] == {"turned RGB JPEG": 1}


@pytest.fixture
def torn_photos(photos) -> Path:
    """`photos` with five bad images of five kinds."""
    whole = (photos / "train" / "ant" / "0.jpg").read_bytes()
    (photos / "train" / "ant" / "0.jpg").write_bytes(whole[:-40])
    (photos / "train" / "bee" / "text.png").write_text("hello")
    (photos / "train" / "cow" / "empty.bmp").write_bytes(b"")
    (photos / "train" / "cow" / "link.jpg").symlink_to("nowhere")
    torn = save(picture(1, (200, 200)), photos / "validation" / "cow" / "torn.png")
    torn.write_bytes(torn.read_bytes()[:120])
    return photos


BAD = [
    "train/ant/0.jpg",
    "train/bee/text.png",
    "train/cow/empty.bmp",
    "train/cow/link.jpg",
    "validation/cow/torn.png",
]


def test_bad_images_are_all_named_and_nothing_is_made(torn_photos, tmp_path, capsys):
    with pytest.raises(RunError, match="^5 of 19 images are bad .*--skip_bad"):
        folder(torn_photos, tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("bad image: ")] == BAD
    assert not (tmp_path / "out" / "train").exists()
    assert not (tmp_path / "out" / "validation").exists()


def test_skip_bad_leaves_them_out_and_says_so(torn_photos, tmp_path, capsys):
    folder(torn_photos, tmp_path / "out", "--skip_bad")
    train, validation = (read_manifest(tmp_path / "out" / name) for name in ("train", "validation"))
    assert (train["num_examples"], validation["num_examples"]) == (11, 3)
    left_out = train["made_by"]["left_out"] + validation["made_by"]["left_out"]
    assert [item["file"] for item in left_out] == BAD
    assert left_out[2]["reason"] == "empty file"
    assert "bad images left out, as listed in manifest.json: 4" in capsys.readouterr().out
    images, labels = read_natively(tmp_path / "out" / "train")
    assert Counter(labels) == {0: 3, 1: 4, 2: 4}


def test_files_that_are_no_images_are_named(photos, tmp_path, capsys):
    (photos / "train" / "ant" / "Thumbs.db").write_text("x")
    (photos / "train" / ".hidden").mkdir()
    (photos / "train" / "bee" / "._0.jpg").write_text("x")
    folder(photos, tmp_path / "out")
    assert "not named like images (2): ant/Thumbs.db, bee/._0.jpg" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out" / "train")["classes"] == ["ant", "bee", "cow"]


def test_class_folders_may_have_folders(photos, tmp_path):
    save(picture(1), photos / "train" / "ant" / "more" / "deep" / "y.jpg")
    folder(photos, tmp_path / "out")
    assert Counter(label for _, label in read_parts(tmp_path / "out" / "train"))[0] == 5


def test_folder_refusals(photos, tmp_path):
    def refused(error, match, *flags, source=photos):
        with pytest.raises(error, match=match):
            folder(source, tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()

    refused(UsageError, "nowhere: cannot be read: No such", source=tmp_path / "nowhere")
    refused(UsageError, r"--num_parts=4: .*validation has 3 examples", "--num_parts=4")
    (tmp_path / "bare").mkdir()
    refused(RunError, "bare: holds no class folders", source=tmp_path / "bare")

    stray = save(picture(1), photos / "train" / "stray.jpg")
    refused(RunError, "stray.jpg: is outside the class folders")
    stray.unlink()

    (photos / "train" / "empty").mkdir()
    refused(RunError, "empty: holds no image .*remove the folder")
    (photos / "train" / "empty").rmdir()

    dog = save(picture(1), photos / "validation" / "dog" / "x.jpg")
    refused(RunError, "'dog' is not a class of .*train; rename or remove")
    dog.unlink()
    dog.parent.rmdir()

    (photos / "val").mkdir()
    refused(UsageError, "both validation/ and val/")
    (photos / "val").rmdir()
    (photos / "validation").rename(tmp_path / "away")
    refused(UsageError, "train/ but no validation/.*--input=.*train converts train/ alone")


def test_a_complete_conversion_says_so_and_another_output_is_refused_and_kept(
    photos, tmp_path, capsys
):
    folder(photos, tmp_path / "out")
    before, said = tree(tmp_path / "out"), capsys.readouterr().out
    folder(photos, tmp_path / "out")
    again = capsys.readouterr()
    assert again.out == said and again.err.count("is complete") == 2
    with pytest.raises(UsageError, match="train: already holds manifest.json and 1 more"):
        folder(photos, tmp_path / "out", "--seed=1")
    with pytest.raises(UsageError, match="train: already holds"):
        folder(photos, tmp_path / "out", "--skip_bad")
    image = next((photos / "train" / "ant").iterdir())
    image.rename(image.with_name("renamed.jpg"))
    with pytest.raises(UsageError, match="train: already holds"):
        folder(photos, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_conversion_that_was_begun_with_another_default_of_parts_is_resumed(tmp_path):
    splits = some_splits(tmp_path, good)[:1]
    with pytest.raises(KeyboardInterrupt):
        write_dataset(
            [Split(splits[0].output, splits[0].names, stop_at_the_last)],
            classes=["a"],
            made_by={},
            choose_num_parts=lambda n: 3,
        )
    assert (tmp_path / "train.partial").is_dir()
    write_dataset(splits, classes=["a"], made_by={})
    assert len(read_manifest(tmp_path / "train")["parts"]) == 3


def test_class_list_gives_the_labels(tmp_path, capsys):
    names = {"n02123045": 281, "espresso": 967, "goldfish": 1, "tiger, Panthera tigris": 292}
    for label_name in names:
        save(picture(1), tmp_path / "in" / label_name / "x.jpg")
    folder(tmp_path / "in", tmp_path / "out", f"--classes={CLASSES_FILE}")
    assert sorted(label for _, label in read_parts(tmp_path / "out")) == [1, 281, 292, 967]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["num_classes"] == 1000 and manifest["classes"][967] == "espresso"
    assert "no folder for 996 of 1000 classes: tench, Tinca tinca" in capsys.readouterr().err


@pytest.mark.parametrize(
    "folders, match",
    [
        (["crane"], "'crane' may be class 134 or 517 .*WordNet id"),
        (["n00000000"], "'n00000000' is not a class of"),
        (["n01440764", "tench"], "'n01440764'; merge the folders"),
    ],
)
def test_class_list_refusals(tmp_path, folders, match):
    for name in folders:
        save(picture(1), tmp_path / "in" / name / "x.jpg")
    with pytest.raises(RunError, match=match):
        folder(tmp_path / "in", tmp_path / "out", f"--classes={CLASSES_FILE}")


@pytest.mark.parametrize(
    "text, match",
    [
        (b"", "is empty"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\ndog\ncat\n", "'cat' stands in line 1 and line 3"),
        (b"n01440764 tench\ngoldfish\n", "line 2 .'goldfish'. has no WordNet id"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_broken_class_lists(tmp_path, text, match):
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UsageError, match=match):
        read_classes(path)


# make_ofrecord.py idx.


def idx(source: Path, output: Path, *flags) -> None:
    convert("idx", f"--input={source}", f"--output={output}", *flags)


def test_idx_converts_both_sets(idx_files, tmp_path):
    idx(idx_files, tmp_path / "out", "--dataset=fashion_mnist")
    for name, prefix, count in (("train", "train", 30), ("validation", "t10k", 10)):
        manifest = read_manifest(tmp_path / "out" / name)
        assert (manifest["num_examples"], manifest["num_classes"]) == (count, 10)
        assert manifest["classes"][0] == "T-shirt/top" and manifest["classes"][9] == "Ankle boot"
        source = make_ofrecord.read_idx(idx_files / f"{prefix}-images-idx3-ubyte.gz", "images")
        [order] = shuffled_parts(count, 1, 0)
        images, labels = read_natively(tmp_path / "out" / name)
        assert labels == [i % 10 for i in order]
        for image, i in zip(images, order, strict=True):
            assert image.shape == (28, 28, 3)
            assert np.abs(image - source[i].astype(int)[..., None]).max() <= 3


def test_idx_same_seed_same_bytes(idx_files, tmp_path):
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        idx(idx_files, tmp_path / output, f"--seed={seed}", "--num_parts=2")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert read_parts(tmp_path / "a" / "train") != read_parts(tmp_path / "c" / "train")


def test_idx_takes_the_first_so_many(idx_files, tmp_path):
    idx(idx_files, tmp_path / "out", "--num_examples=7", "--num_val_examples=2")
    labels = sorted(label for _, label in read_parts(tmp_path / "out" / "train"))
    assert labels == list(range(7))
    manifest = read_manifest(tmp_path / "out" / "validation")
    assert manifest["num_examples"] == 2
    assert manifest["classes"] == [str(digit) for digit in range(10)]


def test_idx_one_pair_not_gzipped_with_names_of_its_own(tmp_path):
    images = write_idx(tmp_path / "images", np.zeros((3, 5, 7)))
    labels = write_idx(tmp_path / "labels", np.array([0, 2, 1]))
    (tmp_path / "names").write_text("red\ngreen\nblue\n")
    flags = ["idx", f"--images={images}", f"--labels={labels}"]
    convert(*flags, f"--output={tmp_path / 'out'}", f"--classes={tmp_path / 'names'}")
    assert read_manifest(tmp_path / "out")["classes"] == ["red", "green", "blue"]
    assert sorted(label for _, label in read_parts(tmp_path / "out")) == [0, 1, 2]
    convert(*flags, f"--output={tmp_path / 'out2'}")
    assert read_manifest(tmp_path / "out2")["classes"] == ["0", "1", "2"]


def test_idx_broken_files(tmp_path):
    good = np.zeros((4, 28, 28))
    images = write_idx(tmp_path / "images.gz", good)
    labels = write_idx(tmp_path / "labels.gz", np.arange(4))

    def refused(error, match, *flags, images=images, labels=labels):
        with pytest.raises(error, match=match):
            convert(
                "idx", f"--images={images}", f"--labels={labels}", f"--output={tmp_path}/o", *flags
            )
        assert not (tmp_path / "o").exists()

    refused(RunError, "begins with 2049, which is a file of labels", images=labels)
    refused(RunError, "begins with 2051, which is a file of images", labels=images)
    other = write_idx(tmp_path / "other", good, magic=7)
    refused(RunError, "other: begins with 7; an IDX file of images begins with 2051", images=other)
    three = write_idx(tmp_path / "three", np.arange(3))
    refused(RunError, "three: holds 3 labels, but .*images.gz 4 images", labels=three)
    plain = gzip.decompress(images.read_bytes())
    short, long, header = (tmp_path / name for name in ("short", "long", "header"))
    short.write_bytes(plain[:-1])
    refused(RunError, "holds 3151 bytes, but its header says 3152", images=short)
    long.write_bytes(plain + b"x")
    refused(RunError, "holds 3153 bytes, but its header says 3152", images=long)
    header.write_bytes(plain[:9])
    refused(RunError, "header: holds 9 bytes", images=header)
    torn = tmp_path / "torn.gz"
    torn.write_bytes(images.read_bytes()[:-9])
    refused(RunError, "torn.gz: the gzip data are damaged", images=torn)
    none = write_idx(tmp_path / "none", np.zeros((0, 28, 28)))
    refused(RunError, "none: holds no images", images=none)
    refused(UsageError, "nowhere: cannot be read: No such file", images=tmp_path / "nowhere")
    high = write_idx(tmp_path / "high", np.array([0, 1, 12, 3]))
    refused(
        RunError,
        "label 12 of example 2 is outside of the 10 classes of --dataset=mnist",
        "--dataset=mnist",
        labels=high,
    )
    refused(UsageError, "--num_examples=5: .*holds only 4 images", "--num_examples=5")
    refused(UsageError, "--num_val_examples needs --input", "--num_val_examples=1")
    refused(UsageError, "both name the classes", "--dataset=mnist", f"--classes={CLASSES_FILE}")
    refused(UsageError, "--input names a folder", f"--input={tmp_path}")
    with pytest.raises(UsageError, match="give --input, or both"):
        convert("idx", f"--images={images}", f"--output={tmp_path}/o")
    with pytest.raises(UsageError, match="holds no train-images-idx3-ubyte.gz; needs the four"):
        idx(tmp_path, tmp_path / "o")


# The command line.


@pytest.mark.parametrize(
    "script, flags, status, match",
    [
        ("make_ofrecord.py", [], 2, "make_ofrecord.py: error: .*JOB"),
        ("make_ofrecord.py", ["folder"], 2, "error: .*--input, --output"),
        ("make_ofrecord.py", ["folder", "--input=a", "--out=b"], 2, "error: .*--output"),
        (
            "make_ofrecord.py",
            ["folder", "--input=/nowhere", "--output=x"],
            2,
            "^make_ofrecord.py: error: --input=/nowhere: cannot be read: No such file",
        ),
        (
            "make_ofrecord.py",
            ["idx", "--images=README.md", "--labels=data/cat.jpg", "--output=x"],
            1,
            "^make_ofrecord.py: error: .*an IDX file of images begins with 2051",
        ),
        ("make_mini_imagenet.py", ["--num_examples=0"], 2, "error: .*at least 1"),
    ],
)
def test_errors_are_one_line_with_the_right_status(tmp_path, script, flags, status, match):
    (tmp_path / "README.md").write_text("no IDX file")
    command = [sys.executable, ROOT / "tools" / script, *flags]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat.jpg").write_text("neither")
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == status
    assert run.stdout == "" and run.stderr.count("\n") == 1
    assert re.search(match, run.stderr)
    assert not (tmp_path / "x").exists()


# The demo data.


def test_class_list_of_imagenet():
    names, ids = read_classes(CLASSES_FILE)
    assert len(names) == len(set(ids)) == 1000
    assert ids == sorted(ids)
    facts = {
        0: ("n01440764", "tench, Tinca tinca"),
        1: ("n01443537", "goldfish, Carassius auratus"),
        134: ("n02012849", "crane"),
        281: ("n02123045", "tabby, tabby cat"),
        292: ("n02129604", "tiger, Panthera tigris"),
        517: ("n03126707", "crane"),
        638: ("n03710637", "maillot"),
        639: ("n03710721", "maillot, tank suit"),
        967: ("n07920052", "espresso"),
    }
    assert {label: (ids[label], names[label]) for label in facts} == facts


@pytest.fixture(scope="module")
def mini_imagenet(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("mini") / "imagenet" / "ofrecord"
    make_mini_imagenet.main([f"--output={output}"])
    return output


def test_mini_imagenet(mini_imagenet):
    crops = set()
    for name in ("train", "validation"):
        manifest = read_manifest(mini_imagenet / name)
        assert (manifest["num_examples"], manifest["num_classes"]) == (50, 1000)
        assert len(manifest["parts"]) == 1
        images, labels = read_natively(mini_imagenet / name)
        assert Counter(labels) == {281: 25, 967: 25}
        assert {manifest["classes"][label] for label in labels} == {"tabby, tabby cat", "espresso"}
        assert labels[:25].count(281) not in (0, 25)  # mixed, not one class after the other
        for image, label in zip(images, labels, strict=True):
            height, width = image.shape[:2]
            whole = 451 * 300 if label == 281 else 600 * 400
            assert min(height, width) >= 200 and 0.29 <= height * width / whole <= 1
        crops |= {encoded for encoded, _ in read_parts(mini_imagenet / name)}
    assert len(crops) == 100  # no crop twice, and none of validation in training


def test_mini_imagenet_seed_and_sizes(mini_imagenet, tmp_path):
    make_mini_imagenet.main([f"--output={tmp_path / 'same'}"])
    assert tree(tmp_path / "same") == tree(mini_imagenet)
    flags = ["--seed=1", "--num_examples=3", "--num_val_examples=2"]
    make_mini_imagenet.main([f"--output={tmp_path / 'other'}", *flags])
    train = read_parts(tmp_path / "other" / "train")
    assert len(train) == 3 and len(read_parts(tmp_path / "other" / "validation")) == 2
    assert not {e for e, _ in train} & {e for e, _ in read_parts(mini_imagenet / "train")}
    with pytest.raises(UsageError, match="already holds"):
        make_mini_imagenet.main([f"--output={tmp_path / 'other'}"])


def test_encode_jpeg_is_rgb_whatever_comes_in():
    for mode in ("L", "P", "CMYK", "RGB"):
        assert Image.open(io.BytesIO(encode_jpeg(picture(1, mode=mode)))).mode == "RGB"
