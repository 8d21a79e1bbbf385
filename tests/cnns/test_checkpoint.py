"""Snapshots: whole or not there, exact, and refused where they do not fit."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oneflow as flow
import pytest
from safetensors.numpy import load_file, save_file

import cnns.checkpoint.snapshot as snapshot_module
import model_registry
from cnns.checkpoint.files import lock_directory
from cnns.checkpoint.find import (
    compare_export,
    find_resume,
    find_snapshot,
    link_snapshot,
    open_save_dir,
    prune_snapshots,
    restore,
)
from cnns.checkpoint.snapshot import (
    PREFIX,
    Progress,
    Snapshot,
    read_description,
    read_weights,
    save_snapshot,
    state_arrays,
)
from cnns.data.images import Preprocessing
from cnns.distributed import place
from cnns.errors import RunError, UsageError
from cnns.places import SNAPSHOT_ROOT
from cnns.run import Saver
from small import ROOT, TINY, Tiny, tree

PREPROCESSING = Preprocessing(32, 37, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)


def describe(**more):
    return Snapshot(model="tiny", num_classes=4, preprocessing=PREPROCESSING, **more)


def save(save_dir, name, model, snapshot, **more):
    path = f"{save_dir}/{PREFIX}{name}"
    save_snapshot(path, model, snapshot, **more)
    return path


@pytest.fixture
def saved(tmp_path):
    flow.manual_seed(1)
    model = place(Tiny(4), "cpu")
    snapshot = describe(classes=("a", "b", "c", "d"), epoch=3, step=7, metrics={"val_top_1": 0.5})
    path = save(str(tmp_path), "epoch_3", model, snapshot)
    return Path(path), model, snapshot


def test_round_trip_is_exact(saved):
    path, model, snapshot = saved
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "snapshot.json"]
    assert path.name == "snapshot_epoch_3"
    network, read, found = restore(
        str(path), model=None, num_classes=None, models=model_registry.MODELS
    )
    assert (read, found) == (snapshot, str(path))
    theirs = state_arrays(model)
    mine = state_arrays(network)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize(
    "name, count, tensors", [("resnet18", 11_689_512, 102), ("resnet50", 25_557_032, 267)]
)
def test_parameters_are_those_of_torchvision(name, count, tensors):
    model = model_registry.MODELS[name].build(1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    arrays = state_arrays(model)
    # torchvision's state_dict has these and a num_batches_tracked for each batch norm.
    assert len(arrays) == tensors
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer2.0.downsample.0.weight": {"resnet18": (128, 64, 1, 1)}.get(name, (512, 256, 1, 1)),
        "layer2.0.downsample.1.running_mean": {"resnet18": (128,)}.get(name, (512,)),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "fc.weight": {"resnet18": (1000, 512)}.get(name, (1000, 2048)),
        "fc.bias": (1000,),
    }
    assert {key: arrays[key].shape for key in expected} == expected


def test_the_stride_is_on_the_3x3():
    block = model_registry.MODELS["resnet50"].build(10).layer2[0]
    strides = [tuple(c.stride) for c in (block.conv1, block.conv2, block.conv3)]
    assert strides == [(1, 1), (2, 2), (1, 1)]


def test_snapshots_that_cannot_be_read(saved, tmp_path):
    path, _, _ = saved

    def refuse(error, words, where=path, **flags):
        flags = {"model": None, "num_classes": None} | flags
        with pytest.raises(error, match=words):
            restore(str(where), **flags, models=model_registry.MODELS)

    refuse(UsageError, "there is no file or directory", where=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuse(RunError, "holds no snapshot.json", where=tmp_path / "empty")
    os.rmdir(tmp_path / "empty")
    refuse(UsageError, "--num_classes=5", num_classes=5)
    refuse(UsageError, "--model=resnet50", model="resnet50")
    refuse(UsageError, "--resize_shorter=16", resize_shorter=16)
    weights, description = path / "model.safetensors", path / "snapshot.json"
    whole, text = weights.read_bytes(), description.read_text()
    for cut in (0, 5, 1000, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refuse(RunError, "damaged or cut off")
    weights.unlink()
    refuse(RunError, "holds no model.safetensors")
    arrays = load_safely(whole, tmp_path)
    save_file({k: v for k, v in arrays.items() if k != "fc.bias"}, weights)
    refuse(UsageError, "1 missing, first fc.bias")
    save_file(arrays | {"fc.bias": np.zeros(3, np.float32)}, weights)
    refuse(UsageError, "fc.bias is")
    save_file(arrays | {"extra": np.zeros(3, np.float32)}, weights)
    refuse(UsageError, "1 unexpected, first extra")
    weights.write_bytes(whole)
    for broken in (text[: len(text) // 2], "[]", "{}", text.replace("image_size", "size")):
        description.write_text(broken)
        refuse(RunError, "damaged")
    description.write_text(text.replace('"tiny"', '"alexnet9"'))
    refuse(UsageError, "does not know")
    description.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    refuse(RunError, "format 2")


def load_safely(data, tmp_path):
    file = tmp_path / "whole.safetensors"
    file.write_bytes(data)
    return load_file(file)


def test_the_newest_snapshot_is_found(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no snapshot under"):
        find_snapshot(None, models=model_registry.MODELS)
    _, model, snapshot = saved
    for i, run in enumerate(("model_save-2", "model_save-1")):
        save_dir = os.path.join(SNAPSHOT_ROOT, run)
        os.makedirs(save_dir)
        path = save(save_dir, "epoch_0", model, snapshot)
        os.utime(os.path.join(path, "snapshot.json"), (i, i))
    half = os.path.join(SNAPSHOT_ROOT, "model_save-1", ".snapshot_x.tmp-1")
    os.makedirs(half)
    Path(half, "snapshot.json").touch()
    assert find_snapshot(None, models=model_registry.MODELS) == path
    assert find_snapshot("output", models=model_registry.MODELS) == "output"


def test_of_a_run_the_best_is_read_else_the_one_that_got_furthest(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, model, snapshot = saved
    run = os.path.join(SNAPSHOT_ROOT, "run")
    os.makedirs(run)
    find = partial(find_snapshot, models=model_registry.MODELS)
    for epoch in (0, 1):
        save(run, f"epoch_{epoch}", model, replace(snapshot, epoch=epoch))
        link_snapshot(os.path.join(run, f"snapshot_epoch_{epoch}"), "last")
    assert find(run) == find(None) == f"{run}/snapshot_epoch_1"
    Path(run, "snapshot_epoch_1", "snapshot.json").write_text("{")  # damaged, and `last` with it
    assert find(run) == f"{run}/snapshot_epoch_0"
    link_snapshot(os.path.join(run, "snapshot_epoch_0"), "best")
    assert find(run) == find(run + "/") == find(None) == f"{run}/snapshot_best"
    assert find(f"{run}/snapshot_epoch_0") == f"{run}/snapshot_epoch_0"
    # What lies right below SNAPSHOT_ROOT is of no run.
    other = save(SNAPSHOT_ROOT, "converted", model, snapshot)
    save(SNAPSHOT_ROOT, "best", model, snapshot)
    os.utime(os.path.join(other, "snapshot.json"), (2e9, 2e9))
    assert find(None) == other


def test_an_exported_file_that_is_not_of_the_newest_run_is_named(
    saved, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("x.onnx").touch()
    compare_export("x.onnx", run=None)
    assert capsys.readouterr().err == ""
    _, model, snapshot = saved
    run = os.path.join(SNAPSHOT_ROOT, "run")
    os.makedirs(run)
    path = save(run, "epoch_0", model, snapshot)
    for of, words in (("old", "is of the run old; the newest is"), (None, "is not of a run")):
        compare_export("x.onnx", run=of)
        assert f"x.onnx {words}" in capsys.readouterr().err
    os.utime("x.onnx", (0, 0))
    compare_export("x.onnx", run="run")
    assert f"x.onnx is older than {path}" in capsys.readouterr().err
    os.utime("x.onnx")
    compare_export("x.onnx", run="run")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fails_at", ["model.safetensors", "snapshot.json", "rename"])
def test_a_full_disk_leaves_what_was_there(saved, tmp_path, monkeypatch, fails_at):
    path, model, snapshot = saved
    before = sorted(p.name for p in tmp_path.rglob("*"))
    write, rename = snapshot_module.write_durably, os.rename

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_some(file_path, data):
        if file_path.endswith(fails_at):
            write(file_path, data[: len(data) // 2])
            full()
        write(file_path, data)

    monkeypatch.setattr(snapshot_module, "write_durably", write_some)
    monkeypatch.setattr(os, "rename", full if fails_at == "rename" else rename)
    with pytest.raises(RunError, match="No space left on device"):
        save(str(tmp_path), "epoch_4", model, snapshot)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_file_size_limit_of_the_system_is_reported(tmp_path):
    """As above, with a write that the kernel refuses."""
    code = """
import resource, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests", sys.argv[1] + "/tests/cnns"]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import test_checkpoint, small
from cnns.checkpoint.snapshot import save_snapshot
from cnns.errors import run_main
save_snapshot(sys.argv[2] + "/snapshot_a", small.Tiny(4), test_checkpoint.describe())
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save = lambda: save_snapshot(
    sys.argv[2] + "/snapshot_b", small.Tiny(4), test_checkpoint.describe())
sys.exit(run_main(save))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "cannot save the model" in done.stderr and "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot_a"]
    read_weights(str(tmp_path / "snapshot_a"))


def test_runs_of_one_second_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        made = [stack.enter_context(open_save_dir(None)) for _ in range(12)]
    assert len(set(made)) == 12 and all(os.path.isdir(path) for path in made)
    assert all(path.startswith("./output/snapshots/model_save-2") for path in made)


def test_processes_that_do_not_save_name_no_directory_but_a_given_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    parts = SimpleNamespace(model=flow.nn.Linear(1, 1), average=None)
    for given, last_good in ((None, None), ("run", "run/snapshot_last")):
        with open_save_dir(given) as save_dir:
            saver = Saver(save_dir, describe, log=lambda line: None)
            saver.writes = False
            saver.save("last", parts, Progress())
        assert saver.last_good == last_good
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_number_format_are_refused(saved):
    path, _, _ = saved
    weights = path / "model.safetensors"
    arrays = load_file(weights)
    save_file(arrays | {"fc.bias": arrays["fc.bias"].astype(np.float16)}, weights)
    with pytest.raises(RunError, match="fc.bias is float16"):
        read_weights(str(path))
    data = weights.read_bytes().replace(b'"F16"', b'"BF16"')
    size = int.from_bytes(data[:8], "little") + 1
    weights.write_bytes(size.to_bytes(8, "little") + data[8:])
    with pytest.raises(RunError, match="model.safetensors"):
        read_weights(str(path))


def test_flags_that_are_no_text_can_be_kept(saved, tmp_path):
    _, model, snapshot = saved
    snapshot.flags = {"log_dir": "bad\udcff"}
    path = save(str(tmp_path), "x", model, snapshot)
    assert read_description(path).flags == snapshot.flags


def test_save_directories(tmp_path, saved):
    def refuse(words, path, **more):
        with pytest.raises(UsageError, match=words), open_save_dir(str(path), **more):
            pass

    refuse("already holds snapshot_epoch_3", tmp_path)
    new = tmp_path / "a" / "b"
    with open_save_dir(str(new)) as path:
        assert path == str(new) and list(new.iterdir()) == []
        refuse("another run is writing to", new)
    with open_save_dir(str(new)):
        pass
    (tmp_path / "file").touch()
    refuse("cannot write to", tmp_path / "file")
    refuse("cannot write to", "/proc/snapshots")  # not even root can


def test_a_resumed_run_writes_beside_its_snapshot(tmp_path, saved):
    path, model, snapshot = saved
    debris = tmp_path / ".snapshot_last.tmp-123"
    debris.mkdir()
    (debris / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").touch()
    with open_save_dir(None, resumed=str(path)) as save_dir:
        assert os.path.samefile(save_dir, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "snapshot_epoch_3"]
    snapshot.epoch, snapshot.step = 4, 9
    save(str(tmp_path), "epoch_4", model, snapshot)
    with (
        pytest.raises(UsageError, match="holds snapshot_epoch_4, which is later"),
        open_save_dir(None, resumed=str(path)),
    ):
        pass
    with open_save_dir(str(tmp_path / "elsewhere"), resumed=str(path)) as save_dir:
        assert save_dir == str(tmp_path / "elsewhere")


def test_what_killed_processes_have_left_is_removed(tmp_path, saved):
    """By whoever writes there next, unless a process that is alive is still writing to it."""
    _, model, snapshot = saved
    new = tmp_path / "new"
    for name in (".snapshot_last.tmp-1", ".snapshot_last.old.tmp-2", ".snapshot_epoch_0.tmp-3"):
        (new / name).mkdir(parents=True)
        (new / name / "model.safetensors").write_bytes(b"half")
    (new / ".snapshot_file.tmp-4").touch()
    (new / ".notes.tmp-5").mkdir()
    handle = lock_directory(str(new / ".snapshot_epoch_0.tmp-3"))
    with open_save_dir(str(new)):
        kept = [".notes.tmp-5", ".snapshot_epoch_0.tmp-3", ".snapshot_file.tmp-4"]
        assert sorted(os.listdir(new)) == kept
    os.close(handle)
    save(str(new), "epoch_0", model, snapshot)  # as tools/convert_snapshot.py does
    kept = [".notes.tmp-5", ".snapshot_file.tmp-4", "snapshot_epoch_0"]
    assert sorted(os.listdir(new)) == kept


def test_leftovers_in_the_directory_of_another_run_are_not_touched(tmp_path, saved):
    (tmp_path / ".snapshot_last.tmp-1").mkdir()
    with pytest.raises(UsageError, match="already holds"), open_save_dir(str(tmp_path)):
        pass
    assert (tmp_path / ".snapshot_last.tmp-1").is_dir()


def test_a_link_to_nothing_does_not_stand_in_the_way(tmp_path, saved):
    path, _, _ = saved
    (tmp_path / "snapshot_lost").symlink_to(tmp_path / "nowhere")
    assert find_resume("auto", str(tmp_path / "none")) is None
    with open_save_dir(str(tmp_path), resumed=str(path)):
        names = sorted(os.listdir(tmp_path))
    assert names == [f"damaged_snapshot_lost_{os.getpid()}", "snapshot_epoch_3"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, saved):
    _, model, snapshot = saved
    model.fc.bias.data.fill_(float("nan"))
    with pytest.raises(RunError, match="fc.bias is no longer finite"):
        save(str(tmp_path), "epoch_4", model, snapshot)
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot_epoch_3"]


def test_a_snapshot_is_replaced_by_a_whole_one(tmp_path, saved):
    path, model, snapshot = saved
    for step in (8, 9):
        snapshot.step = step
        save(tmp_path, "last", model, snapshot, replace=True)
        assert read_description(str(tmp_path / "snapshot_last")).step == step
    link_snapshot(str(path), "last")
    assert tree(tmp_path / "snapshot_last") == tree(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshot_epoch_3", "snapshot_last"]
    shutil.rmtree(path)
    read_weights(str(tmp_path / "snapshot_last"))


@pytest.mark.parametrize("killed", [True, False])
def test_each_moment_of_replacing_leaves_a_whole_snapshot(tmp_path, saved, monkeypatch, killed):
    """Killed, or refused by the disk, before each rename; then resumed and written once more."""
    path, model, snapshot = saved
    shutil.rmtree(path)
    last, rename = str(tmp_path / "snapshot_last"), os.rename
    snapshot.step = 0
    for moment in range(4):
        snapshot.epoch = 8
        save(tmp_path, "last", model, snapshot, replace=True)
        renames = iter(range(moment))

        def stop(source, target, renames=renames):
            if next(renames, None) is None:
                raise SystemExit if killed else OSError(errno.EIO, os.strerror(errno.EIO))
            rename(source, target)

        snapshot.epoch = 9
        with monkeypatch.context() as patch, suppress(SystemExit, RunError):
            patch.setattr(os, "rename", stop)
            save(tmp_path, "last", model, snapshot, replace=True)
        found = find_resume("auto", str(tmp_path))
        assert found.snapshot.epoch == (9 if moment >= 2 else 8)
        assert find_resume(last, None).snapshot == found.snapshot
        assert find_snapshot(last, models=model_registry.MODELS) == found.path
        with open_save_dir(str(tmp_path), resumed=found.path):
            save(tmp_path, "last", model, found.snapshot, replace=True)
        assert os.listdir(tmp_path) == ["snapshot_last"]


def test_a_replaced_snapshot_gets_its_name_back(tmp_path, saved):
    """Of a run that was killed while it replaced `best`, and is resumed from another one."""
    path, model, snapshot = saved
    for name in ("best", "last"):
        shutil.copytree(path, tmp_path / f"snapshot_{name}.old")
    save(tmp_path, "last", model, snapshot)
    with open_save_dir(str(tmp_path), resumed=str(path)):
        names = [f"snapshot_{name}" for name in ("best", "epoch_3", "last")]
        assert sorted(os.listdir(tmp_path)) == names


def test_files_are_copied_where_links_are_not_to_be_had(tmp_path, saved, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    path, _, _ = saved
    monkeypatch.setattr(os, "link", link)
    link_snapshot(str(path), "best")
    assert tree(tmp_path / "snapshot_best") == tree(path)


def test_only_old_snapshots_of_epochs_are_pruned(tmp_path, saved):
    path, model, snapshot = saved
    for number in (0, 2, 10, 9):
        save(str(tmp_path), f"epoch_{number}", model, snapshot)
    others = ["snapshot_best", "snapshot_epoch_x", "snapshot_initial_model", "epoch_1"]
    for name in others:
        (tmp_path / name).mkdir()
    prune_snapshots(str(tmp_path), 9)
    assert len(list(tmp_path.iterdir())) == 5 + len(others)
    prune_snapshots(str(tmp_path), 2)
    kept = ["snapshot_epoch_10", "snapshot_epoch_9"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others + kept)


def test_the_description_is_plain_json(saved):
    path, _, _ = saved
    content = json.loads((path / "snapshot.json").read_text())
    assert content["model"] == "tiny"
    assert content["preprocessing"]["resize_shorter"] == 37
    assert content["classes"] == ["a", "b", "c", "d"]
