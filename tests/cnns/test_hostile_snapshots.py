"""Files of snapshots and data sets that are broken or hostile: one line, at once."""

import json
import os
import shutil
import signal
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import config
import model_registry
import of_cnn_train_val
from cnns.checkpoint.external import read_external
from cnns.checkpoint.find import find_resume
from cnns.checkpoint.snapshot import check_files, read_description, read_weights
from cnns.checkpoint.training import BUFFERS
from cnns.checkpoint.weights import open_checkpoint, read_resumable
from cnns.data.checks import check_shards
from cnns.data.format import read_manifest
from cnns.errors import RunError, UsageError, report
from cnns.jsonfile import MAX_BYTES, Damaged, parse_json
from cnns.resume import unknown_flags
from fuzz import JSON, bounded, fuzz, mutated
from optimizer_util import NAMES
from small import MODELS, ROOT, call

FILES = ("snapshot.json", "model.safetensors", "training.safetensors")


@pytest.fixture(autouse=True)
def _stored(tmp_path, monkeypatch):
    """A run of an earlier version; and nothing may hang."""
    shutil.copytree(ROOT / "tests" / "stored", tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    monkeypatch.setitem(model_registry.MODELS, "toy", MODELS["toy"])
    signal.alarm(60)
    yield
    signal.alarm(0)


SNAPSHOT = Path("run/snapshot_epoch_1")


def resume(*argv):
    return call(of_cnn_train_val.main, "--device=cpu", f"--resume={SNAPSHOT}", *argv)


def refused(words: str, *argv: str, status: int = 1) -> None:
    """The snapshot is refused by name, and --resume=auto takes the one before it."""
    result = resume(*argv)
    assert result.status == status, result.stderr
    assert words in result.stderr.splitlines()[-1], result.stderr
    spec = make_spec("--resume=auto", "--model_save_dir=run")
    assert spec.resumed.path == "run/snapshot_epoch_0"


def make_spec(*argv: str):
    return of_cnn_train_val.make_spec(of_cnn_train_val.parse_args(["--device=cpu", *argv]))


def change(**fields):
    path = SNAPSHOT / "snapshot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Training state.


def without(name):
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


WEIGHT = "model.fc.weight-momentum"
STEP = "System-Train-TrainStep"
LOSS_SCALE = "System-Train-DynamicLossScale-TrainGraph-LossScale"
GOOD_STEPS = "System-Train-DynamicLossScale-TrainGraph-GoodStepCounter"


@pytest.mark.parametrize(
    "words, edit",
    [
        (f"lacks '{WEIGHT}', 1 in all", without(WEIGHT)),
        (f"lacks '{STEP}'", without(STEP)),
        ("lacks 'System-Train-TrainStep', 6 in all", lambda arrays: {}),
        (
            "has the unexpected 'model.more-momentum'",
            lambda arrays: arrays | {"model.more-momentum": np.zeros(3, np.float32)},
        ),
        (
            "has the unexpected 'model.fc.weight-m'",
            lambda arrays: arrays | {"model.fc.weight-m": arrays[WEIGHT]},
        ),
        (
            f"{WEIGHT} is (4, 4) float16, and (4, 4) float32",
            lambda arrays: arrays | {WEIGHT: arrays[WEIGHT].astype(np.float16)},
        ),
        (
            f"{WEIGHT} is (16,) float32, and (4, 4) float32",
            lambda arrays: arrays | {WEIGHT: arrays[WEIGHT].reshape(16)},
        ),
        (
            f"{STEP} is (1,) float32, and (1,) int64",
            lambda arrays: arrays | {STEP: arrays[STEP].astype(np.float32)},
        ),
        ("is of step 7, and the snapshot.json", lambda arrays: arrays | {STEP: arrays[STEP] + 1}),
        (
            f"{WEIGHT} is not finite",
            lambda arrays: arrays | {WEIGHT: arrays[WEIGHT] * np.float32(np.nan)},
        ),
        ("LossScale", lambda arrays: arrays | {LOSS_SCALE: np.ones(1, np.float32)}),
    ],
)
def test_a_training_state_has_to_be_whole(words, edit):
    path = SNAPSHOT / "training.safetensors"
    save_file(edit(load_file(path)), path)
    refused(words)


def test_half_precision_skips_steps_that_overflow():
    """Then the counter of OneFlow stays behind; without --use_fp16 it counts as the run does."""
    path, flags = SNAPSHOT / "training.safetensors", read_description(str(SNAPSHOT)).flags
    state = load_file(path)
    one = np.ones(1, np.int64)
    state |= {LOSS_SCALE: one.astype(np.float32), GOOD_STEPS: one, STEP: 5 * one}
    save_file(state, path)
    change(flags=flags | {"use_fp16": True})
    result = resume("--use_fp16=False", "--num_epochs=3", "--model_save_dir=new")
    assert result.status == 0, result.stderr
    now = load_file("new/snapshot_last/training.safetensors")
    assert (now[STEP].item(), GOOD_STEPS in now) == (9, False)
    read_resumable("new/snapshot_last", read_description("new/snapshot_last"))
    save_file(state | {STEP: 7 * one}, path)
    refused("is of step 7")


@pytest.mark.parametrize("name", ["model", "training"])
def test_files_of_two_snapshots_are_not_mixed(name):
    result = call(
        of_cnn_train_val.main,
        "--device=cpu",
        "--resume=run/snapshot_epoch_0",
        "--model_save_dir=new",
        "--num_epochs=3",
        "--save_last=False",
    )
    assert result.status == 0, result.stderr
    shutil.rmtree("run")
    shutil.copytree("new", "run")
    shutil.rmtree("run/snapshot_best", ignore_errors=True)
    os.rename("run/snapshot_epoch_2", "run/snapshot_epoch_0")  # which is whole
    file = SNAPSHOT / f"{name}.safetensors"
    arrays = load_file(file)
    name = next(key for key in arrays if key.startswith(("model.fc", "fc")))
    arrays[name] = arrays[name] + 1
    save_file(arrays, file)
    refused("does not belong to the snapshot.json beside it")


def test_weights_of_another_snapshot_are_not_evaluated():
    change(checksums={"model.safetensors": 1})
    result = call(of_cnn_train_val.main, "--device=cpu", f"--model_load_dir={SNAPSHOT}")
    assert result.status == 1
    assert "does not belong" in result.stderr.splitlines()[-1]


def test_what_each_optimizer_keeps_is_known():
    assert BUFFERS.keys() == NAMES


@pytest.mark.parametrize("before, after", [(0, 0.9), (0.9, 0)])
def test_a_momentum_that_is_switched_on_or_off(before, after):
    """In a resumed run, where it starts from zero; what that one saves can be resumed again."""
    flags = ("--model_save_dir=new", "--num_epochs=1", f"--momentum={before}")
    first = call(
        of_cnn_train_val.main,
        "--device=cpu",
        "--model=toy",
        "--num_classes=4",
        "--batch_size_per_device=4",
        "--num_examples=8",
        *flags,
    )
    assert first.status == 0, first.stderr
    for epochs in (2, 3):
        again = call(
            of_cnn_train_val.main,
            "--device=cpu",
            "--resume=new",
            f"--momentum={after}",
            f"--num_epochs={epochs}",
        )
        assert again.status == 0, again.stderr


# snapshot.json.

UNPRINTED = {"steps": 1, "loss": 1.5, "top_1": 1, "top_k": 1, "seconds": 0.5}


@pytest.mark.parametrize(
    "words, fields",
    [
        ("iteration is 1000000000, and an epoch has 3", {"iteration": 10**9}),
        ("epoch is -2", {"epoch": -2}),
        ("step is 5, but 2 epochs of 3 iterations and 0 make 6", {"step": 5}),
        ("step is 6, but 1 epochs", {"epoch": 0}),
        ("step is 6, but 0 epochs", {"epoch": None}),
        ("epoch is true", {"epoch": True}),
        ("epoch is 1.0", {"epoch": 1.0}),
        ("step is -6", {"step": -6}),
        ("iteration is a list of 0", {"iteration": []}),
        ("steps_per_epoch is 0", {"steps_per_epoch": 0}),
        ("global_batch_size without the other", {"global_batch_size": None}),
        ("the best epoch is 7, and 2 are finished", {"best": {"epoch": 7}}),
        ("best.val_top_1 is '1'", {"best": {"epoch": 0, "val_top_1": "1"}}),
        ("metrics.val_top_1 is 2", {"metrics": {"val_top_1": 2}}),
        ("num_classes is '4'", {"num_classes": "4"}),
        ("num_classes is 1000001", {"num_classes": 1_000_001}),
        ("classes[0] is 3", {"classes": [3]}),
        ("classes is 'abcd'", {"classes": "abcd"}),
        ("model is a list", {"model": ["toy"]}),
        ("preprocessing is null", {"preprocessing": None}),
        ("train_data has no examples", {"train_data": {}}),
        ("flags is a list", {"flags": []}),
        ("flags.seed is an object", {"flags": {"seed": {}}}),
        ("versions.python is 3", {"versions": {"python": 3}}),
        ("records_digest is 'abc'", {"records_digest": "abc"}),
        ("unprinted is 3", {"unprinted": 3}),
        ("unprinted.loss is '1'", {"unprinted": UNPRINTED | {"loss": "1"}}),
        ("unprinted has more than the 0 iterations", {"unprinted": UNPRINTED}),
        (
            "unprinted has more than the 1 iterations",
            {"iteration": 1, "step": 7, "unprinted": UNPRINTED | {"top_k": 10**9}},
        ),
        ("'more', which is unknown", {"more": 1}),
        ("checksums.model.safetensors", {"checksums": {"model.safetensors": -1}}),
        ("format_version is '1'", {"format_version": "1"}),
        ("--learning_rate is 'fast'", {"flags": {"learning_rate": "fast"}}),
        ("--wd is -1", {"flags": {"wd": -1}}),
        ("--num_nodes is None", {"flags": {"num_nodes": None}}),
        ("--use_fp16 is 1", {"flags": {"use_fp16": 1}}),
        ("--seed is '0'", {"flags": {"seed": "0"}}),
        ("--optimizer is 'adagrad'", {"flags": {"optimizer": "adagrad"}}),
        ("--rgb_mean is a list of 2", {"flags": {"rgb_mean": [1, 2]}}),
        ("--momentum is True", {"flags": {"momentum": True}}),
    ],
)
def test_a_description_that_cannot_be_so(words, fields):
    change(**fields)
    refused(words.replace("true", "True").replace("null", "None"))


@pytest.mark.parametrize(
    "words, data",
    [
        ("nested too deeply", b"[" * 100_000),
        ("nested too deeply", b'{"a":' * 100_000),
        ("not JSON", b""),
        ("not JSON", b"{"),
        ("not JSON", b"\xef\xbb\xbf{}"),
        ("not UTF-8", b'{"model": "\xff"}'),
        ("it has 'a' twice", b'{"a": 1, "b": 2, "a": 1}'),
        ("NaN is not a number", b'{"step": NaN}'),
        ("-Infinity is not a number", b'{"step": -Infinity}'),
        ("'1e999' is too large", b'{"step": 1e999}'),
        ("is too large", b'{"step": ' + b"9" * 5000 + b"}"),
        ("is too large", b'{"step": 9223372036854775808}'),
        ("it is a list of 0", b"[]"),
        ("it is 3", b"3"),
        ("has more than 32 MiB", b" " * (MAX_BYTES + 1)),
    ],
)
@pytest.mark.parametrize("name", ["snapshot.json", "manifest.json"])
def test_json_that_is_not_read(words, data, name):
    if name == "snapshot.json":
        (SNAPSHOT / name).write_bytes(data)
        refused(words)
    else:
        Path("data/train", name).write_bytes(data)
        with pytest.raises(RunError, match="is not a manifest") as error:
            read_manifest("data/train")
        assert words in str(error.value) and "\n" not in str(error.value)


def test_flags_of_other_versions_are_named():
    content = json.loads((SNAPSHOT / "snapshot.json").read_text())
    change(flags=content["flags"] | {"turbo": True, "\x1b[31m": 1})
    result = resume()
    assert result.status == 0, result.stderr
    line = next(line for line in result.stderr.splitlines() if "unknown here" in line)
    assert line == rf"{SNAPSHOT} has flags that are unknown here: --\x1b[31m, --turbo."
    many = unknown_flags({f"a{i:02d}": 1 for i in range(12)}, config.make_parser("train"), path="x")
    assert many[0].endswith("--a09 and 2 more.")


# Not files.


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as held:
            held.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "make, words",
    [
        (make_fifo, "a FIFO, not a file"),
        (make_socket, "a socket, not a file"),
        (make_device, "a device, not a file"),
        (Path.mkdir, "a directory, not a file"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_a_file_is_named_and_not_opened(make, words, name):
    path = SNAPSHOT / name
    path.unlink()
    make(path)
    refused(words)
    if name != "training.safetensors":
        with pytest.raises(RunError, match=words):
            checkpoint = open_checkpoint(str(SNAPSHOT), models=model_registry.MODELS)
            checkpoint.load(MODELS["toy"].build(4))
    if name != "snapshot.json":
        with pytest.raises(RunError, match=words):
            check_files(str(SNAPSHOT))


def test_a_manifest_that_is_a_fifo():
    os.mkfifo("data/train/manifest.json")
    with pytest.raises(RunError, match="a FIFO, not a file"):
        read_manifest("data/train")


# safetensors.


def header(content, *, length=None) -> bytes:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def tensor(shape, end, kind="F32", start=0):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "no elements, 2^63 rows": header({"a": tensor([0, 2**63], 0)}),
    "no elements, 2^64 bytes": header({"a": tensor([0, 2**62, 4], 0)}),
    "40 dimensions": header({"a": tensor([1] * 40, 4)}) + bytes(4),
    "product overflows": header({"a": tensor([2**32, 2**32], 4)}) + bytes(4),
    "overlapping": header({"a": tensor([1], 4), "b": tensor([1], 4)}) + bytes(4),
    "offsets beyond the file": header({"a": tensor([100], 400)}) + bytes(4),
    "offsets backwards": header({"a": tensor([1], 0, start=4)}) + bytes(4),
    "bytes left over": header({"a": tensor([1], 4)}) + bytes(8),
    "negative": header({"a": tensor([-1], 4)}) + bytes(4),
    "header beyond the file": header({}, length=1 << 20),
    "header of 2^63": header({}, length=1 << 63),
    "header of 2^64 - 1": header({}, length=(1 << 64) - 1),
    "header of 0": header(b""),
    "deep": header(b'{"a":' + b"[" * 100_000),
    "a list": header([]),
    "not UTF-8": header(b'{"\xff": 3}'),
    "colours": header({"a": tensor([1], 4, kind="\x1b[31m")}) + bytes(4),
    "of bfloat16": header({"a": tensor([2], 4, kind="BF16")}) + bytes(4),
    "of float8": header({"a": tensor([4], 4, kind="F8_E4M3")}) + bytes(4),
    "of float4": header({"a": tensor([8], 4, kind="F4")}) + bytes(4),
    "a name in colours": header({"\x1b[31m": tensor([1], 4, kind="I32")}) + bytes(4),
}


@pytest.mark.parametrize("name", ["model", "training"])
@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_hostile_safetensors_of_a_snapshot(data, name):
    path = SNAPSHOT / f"{name}.safetensors"
    path.write_bytes(data)
    refused(f"{name}.safetensors")
    assert "\x1b" not in resume().stderr


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_hostile_safetensors_of_others(data, capsys):
    Path("x.safetensors").write_bytes(data)
    try:
        external = read_external("x.safetensors")
    except RunError as error:
        report(error)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "\x1b" not in said
    else:
        assert external.arrays["a"].dtype == np.float32


# Fuzzing. A seed is what an earlier version wrote.

DESCRIPTION = json.loads((ROOT / "tests" / "stored" / SNAPSHOT / "snapshot.json").read_text())
PARTS = [
    {"name": f"part-0000{i}", "num_examples": 6, "num_bytes": (i + 1) * 1000} for i in range(2)
]
MANIFEST = {"format_version": 1, "num_examples": 12, "num_classes": 4, "parts": PARTS}
MANIFEST |= {"classes": ["a", "b", "c", "d"], "made_by": {"seed": 0}}


@pytest.mark.long
@fuzz(300)
@given(mutated(DESCRIPTION))
def test_any_description_is_read_or_refused(data):
    (SNAPSHOT / "snapshot.json").write_bytes(data)
    with bounded(RunError, UsageError):
        make_spec(f"--resume={SNAPSHOT}")


@fuzz(300)
@given(mutated(DESCRIPTION))
def test_no_description_stands_in_the_way(data):
    (SNAPSHOT / "snapshot.json").write_bytes(data)
    with bounded():
        found = find_resume("auto", "run")
        assert found.path in ("run/snapshot_epoch_0", "run/snapshot_epoch_1")


@pytest.mark.long
@fuzz(300)
@given(mutated(MANIFEST))
def test_any_manifest_is_read_or_refused(data):
    Path("data/train/manifest.json").write_bytes(data)
    with bounded(RunError, UsageError):
        check_shards("data/train", flag="--train_data_dir")


@fuzz(300)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_text_is_parsed_or_refused(data):
    with bounded(Damaged):
        parse_json(data.decode(errors="replace"))


@pytest.mark.long
@fuzz(300)
@given(st.data())
def test_any_safetensors_header_is_read_or_refused(data):
    """That of `training` and `model`, with places of its JSON, or its bytes, changed."""
    path = SNAPSHOT / data.draw(st.sampled_from(["model.safetensors", "training.safetensors"]))
    whole = (ROOT / "tests" / "stored" / path).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    changed = data.draw(mutated(json.loads(whole[8:end])))
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + whole[end:])
    try:
        with bounded(RunError):
            read_resumable(str(SNAPSHOT), read_description(str(SNAPSHOT)))
        with bounded(RunError):
            read_weights(str(SNAPSHOT))
    finally:
        path.write_bytes(whole)
