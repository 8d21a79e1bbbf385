"""Weights of others: every format gives the same bits, and no file runs or breaks anything.

The files of PyTorch and OneFlow are written here by hand, without either: see `pth` and `old_pth`.
"""

import io
import json
import os
import pickle
import pickletools
import shutil
import socket
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import oneflow as flow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oneflow import nn
from safetensors.numpy import load_file, save_file

import model_registry
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
from cnns.checkpoint.external import from_timm, read_external
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import state_arrays
from cnns.checkpoint.weights import open_checkpoint
from cnns.errors import RunError, UsageError
from cnns.models.model import Model
from cnns.places import PUBLISHED_FOLDER
from fuzz import bounded, damaged, fuzz
from small import MODELS, ROOT, Tiny, call, script, write_parts
from tools import convert_snapshot

INFERENCE = of_cnn_inference.main


@pytest.fixture(autouse=True)
def _small_models(monkeypatch):
    for name, model in MODELS.items():
        monkeypatch.setitem(model_registry.MODELS, name, model)


# Files by hand.

STORAGES = {"<f4": "Float", "<f2": "Half", "<f8": "Double", "<i8": "Long", "<u2": "BFloat16"}


class Persistent:
    def __init__(self, identity):
        self.identity = identity


class Pickler(pickle._Pickler):  # that of Python, which takes an opcode for a name
    """Writes torch's names without torch."""

    def persistent_id(self, value):
        return value.identity if isinstance(value, Persistent) else None

    def reducer_override(self, value):
        return NotImplemented


class Global:
    """A name of another module, as a pickle has it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


def save_global(pickler, value):
    pickler.write(f"c{value.module}\n{value.name}\n".encode())


class Call:
    """A call of a name."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


def save_call(pickler, value):
    pickler.save(value.name)
    pickler.save(value.arguments)
    pickler.write(b"R")


Pickler.dispatch = pickle._Pickler.dispatch | {Global: save_global, Call: save_call}


def dump(value) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensors(arrays: dict, extra=()) -> tuple[OrderedDict, dict[str, bytes]]:
    """What stands for `arrays` in a pickle of torch, and the storages by key."""
    storages, result = {}, OrderedDict()
    for key, (name, array) in enumerate(arrays.items()):
        array = np.asarray(array)
        base = array.T if array.ndim > 1 and array.flags.f_contiguous else array
        storages[str(key)] = np.ascontiguousarray(base).tobytes()
        kind = Global("torch", STORAGES[array.dtype.str] + "Storage")
        storage = Persistent(("storage", kind, str(key), "cpu", array.size, *extra))
        strides = tuple(s // array.itemsize for s in array.strides)
        rebuild = Global("torch._utils", "_rebuild_tensor_v2")
        result[name] = Call(rebuild, storage, 0, array.shape, strides, False, OrderedDict())
    return result, storages


def zip_file(path: Path, data: bytes, storages: dict[str, bytes], **settings) -> Path:
    with zipfile.ZipFile(path, "w", **settings) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def pth(path: Path, arrays: dict, wrap=lambda state: state) -> Path:
    """As torch.save writes it since 1.6."""
    state, storages = tensors(arrays)
    return zip_file(path, dump(wrap(state)), storages)


def old_pth(path: Path, arrays: dict, *, keys: bytes | None = None) -> Path:
    """As torch.save wrote it before; `keys`: a pickle in place of that of the storages' keys."""
    state, storages = tensors(arrays, extra=(None,))
    data = dump(0x1950A86A20F9469CFC6C) + dump(1001) + dump({"little_endian": True})
    data += dump(state) + (keys or dump(list(storages)))
    for content, array in zip(storages.values(), arrays.values(), strict=True):
        data += struct.pack("<q", np.asarray(array).size) + content
    path.write_bytes(data)
    return path


def variable(folder: Path, array: np.ndarray, *, meta: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "out").write_bytes(array.tobytes())
    if meta:
        dims = "".join(f"  dim: {n}\n" for n in array.shape)
        (folder / "meta").write_text(f"shape {{\n{dims}}}\ndata_type: kFloat\n")


def name_of_2020(name: str, *, fused: bool) -> str:
    """The 2020 name of torchvision's."""
    layer, _, what = name.rpartition(".")
    if layer == "fc":
        return f"Resnet-fc1001-{what}"
    what_bn = {"weight": "gamma", "bias": "beta"}.get(what, what)
    what_bn = what_bn.replace("running_mean", "moving_mean").replace(
        "running_var", "moving_variance"
    )
    if "." not in layer:
        base, is_bn, last = "conv1", layer == "bn1", False
    else:
        stage, block, part, *rest = layer.split(".")
        is_bn = part.startswith("bn") or rest == ["1"]
        branch = "1" if part == "downsample" else "2" + "abc"[int(part[-1]) - 1]
        base, last = f"res{int(stage[-1]) + 1}_{block}_branch{branch}", branch == "2c"
    suffix = ""
    if is_bn:
        suffix = "_bn"
        if fused and not base.endswith("branch1"):
            suffix = "_bn_add_relu" if last else "_bn_relu"
    return f"Resnet-{base}{suffix}-{what_bn if is_bn else what}"


def folder_of_2020(
    path: Path, arrays: dict, *, meta=True, fused=False, padded=False, channel_last=False
) -> Path:
    for name, array in arrays.items():
        if padded and name == "conv1.weight":  # the fourth channel saw only zeros: any weights
            array = np.concatenate([array, np.full_like(array[:, :1], 0.5)], axis=1)
        if channel_last and array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        variable(path / name_of_2020(name, fused=fused), array, meta=meta)
    variable(path / "System-Train-TrainStep-train_job", np.zeros(1, np.int64), meta=False)
    variable(path / "Resnet-conv1-weight-momentum", np.zeros(3, np.float32), meta=meta)
    (path / "snapshot_done").touch()
    return path


@pytest.fixture(scope="module")
def resnet50():
    """Weights of a ResNet-50 with 7 classes, and images."""
    flow.manual_seed(5)
    network = model_registry.MODELS["resnet50"].build(7)
    rng = np.random.default_rng(5)
    arrays = state_arrays(network)
    for name, array in arrays.items():
        if array.ndim == 1:
            arrays[name] = rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
    return arrays, rng.standard_normal((1, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def reference(resnet50, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "weights.safetensors"
    save_file(resnet50[0], path)
    return logits(path, resnet50[1])


def logits(path, image, *, layout=None) -> bytes:
    checkpoint = open_checkpoint(str(path), layout=layout, models=model_registry.MODELS)
    assert (checkpoint.snapshot.model, checkpoint.snapshot.num_classes) == ("resnet50", 7)
    network = model_registry.MODELS["resnet50"].build(7)
    checkpoint.load(network)
    network.eval()
    return network(flow.tensor(image)).numpy().tobytes()


VARIANTS = [
    {},
    {"meta": False},
    {"fused": True},
    {"padded": True},
    {"padded": True, "meta": False},
    {"channel_last": True},
    {"channel_last": True, "padded": True, "fused": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_folders_of_2020_give_the_same_logits(resnet50, reference, tmp_path, variant):
    path = folder_of_2020(tmp_path / "folder", resnet50[0], **variant)
    assert logits(path, resnet50[1]) == reference


def test_a_folder_without_meta_can_be_said_to_be_channels_last(resnet50, reference, tmp_path):
    arrays, image = resnet50
    path = folder_of_2020(tmp_path / "a", arrays, meta=False, channel_last=True, padded=True)
    assert logits(path, image, layout="OHWI") == reference
    assert logits(path, image) != reference


@pytest.mark.long
def test_files_of_pytorch_give_the_same_logits(resnet50, reference, tmp_path):
    arrays, image = resnet50
    tracked = arrays | {"bn1.num_batches_tracked": np.array(3)}
    assert logits(pth(tmp_path / "new.pth", tracked), image) == reference
    assert logits(old_pth(tmp_path / "old.pth", tracked), image) == reference


# What is read.


@pytest.fixture(scope="module")
def small_weights():
    flow.manual_seed(1)
    return state_arrays(Tiny(4))


def same(path, arrays) -> None:
    found = read_external(str(path)).arrays
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array)


def test_wrappers_and_prefixes(small_weights, tmp_path):
    path = tmp_path / "a.pth"
    same(
        pth(path, small_weights, lambda s: {"epoch": 3, "x": [1.5, None], "model": s}),
        small_weights,
    )
    same(pth(path, small_weights, lambda s: {"state_dict": {"model": s}}), small_weights)
    prefixed = {f"module.model.{name}": array for name, array in small_weights.items()}
    same(pth(path, prefixed), small_weights)


def test_strides_and_number_formats(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {
        "a": np.asfortranarray(array),
        "b": array.astype(np.float16),
        "c": array.astype(np.float64),
        "d": (array.view(np.uint32) >> 16).astype(np.uint16),  # bfloat16
        "e": np.float32(2),
        "f": np.zeros((0, 3), np.float32),
    }
    wanted = {name: array for name in "abcd"} | {"e": arrays["e"], "f": arrays["f"]}
    same(pth(tmp_path / "a.pth", arrays), wanted)
    same(old_pth(tmp_path / "b.pth", arrays), wanted)
    data = {k: np.ascontiguousarray(v) for k, v in arrays.items() if k in "abc"}
    save_file(data, tmp_path / "c.safetensors")
    same(tmp_path / "c.safetensors", {k: array for k in "abc"})


def test_a_folder_of_flow_save(small_weights, tmp_path):
    state = Tiny(4).state_dict()
    for name, array in small_weights.items():
        state[name].copy_(flow.tensor(array))
    flow.save(state, str(tmp_path / "plain"))
    flow.save({"model": state, "epoch": 3}, str(tmp_path / "wrapped"))
    same(tmp_path / "plain", small_weights)
    same(tmp_path / "wrapped", small_weights)
    for name, array in small_weights.items():
        variable(tmp_path / "graph" / f"model.{name}", array)
    same(tmp_path / "graph", small_weights)


def test_names_of_timm():
    arrays = {
        "conv_stem.weight": np.zeros((32, 3, 3, 3)),
        "blocks.0.0.conv_pw.weight": np.zeros(1),
        "blocks.2.1.bn3.bias": np.zeros(2),
        "blocks.6.0.bn3.weight": np.zeros(3),
        "classifier.bias": np.zeros(4),
    }
    assert list(from_timm(arrays)) == [
        "features.0.0.weight",
        "features.1.conv.1.weight",
        "features.5.conv.3.bias",
        "features.17.conv.3.weight",
        "classifier.1.bias",
    ]
    arrays = {
        "features.0.weight": np.zeros((64, 3, 3, 3)),
        "pre_logits.fc1.weight": np.zeros((5, 2, 7, 7)),
        "head.fc.bias": np.zeros(4),
    }
    renamed = from_timm(arrays)
    assert list(renamed) == ["features.0.weight", "classifier.0.weight", "classifier.6.bias"]
    assert renamed["classifier.0.weight"].shape == (5, 98)


# What is refused. Each pickle would make a file named `ran` in the working directory.

COMMAND = "touch ran"
REDUCE = f"cos\nsystem\n(S'{COMMAND}'\ntR.".encode()
PICKLES = {
    "reduce": REDUCE,
    "posix": REDUCE.replace(b"cos\n", b"cposix\n"),
    "eval": b'cbuiltins\neval\n(S\'open("ran", "w")\'\ntR.',
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
    "inst": f"(S'{COMMAND}'\nios\nsystem\n.".encode(),
    "obj": f"(cos\nsystem\nS'{COMMAND}'\no.".encode(),
    "newobj": b"\x80\x02cos\nsystem\nX\x09\0\0\0touch ran\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\nX\x09\0\0\0touch ran\x85}\x92.",
    "build": b"\x80\x02cos\nsystem\n)\x81}X\x01\0\0\0aK\x01sb.",
    "build of a name": b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0aK\x01sb.",
    "extension": b"\x80\x02\x82\x01.",
    "as the value of a key": b"\x80\x02}X\x01\0\0\0a" + REDUCE[:-1] + b"s.",
    "dotted": REDUCE.replace(b"cos\nsystem", b"ctorch._utils\n_rebuild_tensor_v2.__globals__"),
}


@pytest.mark.parametrize("kind", ["pth", "old", "folder"])
@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_runs(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    data = PICKLES[name]
    if kind == "pth":
        zip_file(tmp_path / "weights", data, {})
    elif kind == "old":
        head = dump(0x1950A86A20F9469CFC6C) + dump(1001) + dump({"little_endian": True})
        (tmp_path / "weights").write_bytes(head + data)
    else:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "pickled_data").write_bytes(data)
    result = call(INFERENCE, "--model_load_dir=weights", f"--image_path={ROOT}/data/cat.jpg")
    assert result.status == 1
    assert "weights is refused" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_the_pickles_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reduce", "posix", "stack_global", "inst", "obj", "eval"):
        pickle.loads(PICKLES[name])  # noqa: S301  (to see that the test above tests something)
        assert (tmp_path / "ran").exists(), name
        (tmp_path / "ran").unlink()


@pytest.mark.long
def test_in_a_process_of_its_own(tmp_path):
    zip_file(tmp_path / "evil.pth", REDUCE, {})
    write_parts(tmp_path / "data", [[0, 1, 2, 3]])
    for name, flags in (
        ("of_cnn_inference.py", f"--image_path={ROOT}/data/cat.jpg"),
        ("of_cnn_evaluate.py", "--val_data_dir=data"),
        ("of_cnn_train_val.py", "--image_size=32"),
    ):
        result = script(name, "--model_load_dir=evil.pth", flags, cwd=tmp_path)
        assert result.status == 1, result.stderr
        assert "evil.pth is refused: it would call os.system" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "ran").exists()


def spoiled(tmp_path, small_weights):
    """Files that are damaged or lie, with words of what is said of them."""
    name, array = "fc.bias", np.zeros(4, np.float32)
    whole = pth(tmp_path / "whole.pth", small_weights).read_bytes()
    old = old_pth(tmp_path / "old.pth", small_weights).read_bytes()
    save_file(small_weights, tmp_path / "whole.safetensors")
    safe = (tmp_path / "whole.safetensors").read_bytes()
    for cut in (0, 3, 200, len(whole) // 2, len(whole) - 1):
        yield f"cut{cut}.pth", whole[:cut], ""
    for cut in (20, 100, len(old) // 2, len(old) - 1):
        yield f"cutold{cut}.pth", old[:cut], ""
    deep = b"\x80\x02])" + b"\x85" * 1_000_000 + b"a."  # a tuple in a tuple, a million times
    yield (
        "deep.pth",
        old_pth(tmp_path / "o", small_weights, keys=deep).read_bytes(),
        "not a dict of",
    )
    for cut in (0, 5, 1000, len(safe) - 1):
        yield f"cut{cut}.safetensors", safe[:cut], ""
    yield "text.pth", b"some text that is long enough", "not in a known format"
    yield "pickle.pkl", pickle.dumps({"a": 1}), "not a file of PyTorch"

    def lie(**changes):
        storage = {"kind": "FloatStorage", "key": "0", "count": 4} | changes
        identity = ("storage", Global("torch", storage["kind"]), storage["key"], "cpu")
        call_ = Call(
            Global("torch._utils", "_rebuild_tensor_v2"),
            Persistent((*identity, storage["count"])),
            changes.get("offset", 0),
            changes.get("shape", (4,)),
            changes.get("strides", (1,)),
            False,
            OrderedDict(),
        )
        file = zip_file(tmp_path / "lie", dump({name: call_}), {"0": array.tobytes()})
        return file.read_bytes()

    for i, (changes, words) in enumerate(
        [
            ({"key": "../../../etc/passwd"}, "not named by a number"),
            ({"key": "7"}, "data/7 is missing"),
            ({"count": 10**15, "shape": (10**15,)}, "larger than the file"),
            ({"count": 5, "shape": (5,)}, "has 16 bytes and should have 20"),
            ({"shape": (5,)}, "beyond its storage"),
            ({"offset": 1}, "beyond its storage"),
            ({"shape": (10**9,), "strides": (0,)}, "beyond its storage"),
            ({"strides": (-1,)}, "not a whole number"),
            ({"offset": -1}, "not a whole number"),
            ({"shape": (2, 2)}, "an impossible shape"),
            ({"kind": "QInt8Storage"}, "QInt8Storage"),
            ({"shape": (1 << 3_000_000,) * 8, "strides": (1,) * 8}, "more than 128 bits"),
            ({"shape": (1 << 100,)}, "not a whole number, or too large"),
            ({"shape": (0, 1 << 40, 1 << 40), "strides": (1, 1, 1)}, "an impossible shape"),
            ({"shape": (1,) * 40, "strides": (1,) * 40}, "an impossible shape"),
            ({"count": 1 << 40}, "larger than the file"),
            ({"kind": "x" * 1000}, "more than 200 characters"),
        ]
    ):
        yield f"lie{i}.pth", lie(**changes), words
    long = {f"{'module.' * 10_000}x": array}
    yield "long.pth", pth(tmp_path / "l", long).read_bytes(), "more than 1000 characters"
    # A call with a long list, again and again.
    pairs = b"\x80\x02]" + dump([("a", 1)] * 50_000)[2:-1] + b"\x85q\x07a"
    slow = pairs + b"ccollections\nOrderedDict\nh\x07Ra" * 40_000 + b"."
    yield "slow.pth", zip_file(tmp_path / "s", slow, {}).read_bytes(), "steps"
    bomb = zip_file(tmp_path / "b", b"(" * 9_000_000, {}, compression=zipfile.ZIP_DEFLATED)
    yield "bomb.pth", bomb.read_bytes(), "compressed or too large"
    big = zip_file(tmp_path / "b", b"(" * 9_000_000, {})
    yield "big.pth", big.read_bytes(), "compressed or too large"
    nan = small_weights | {name: np.full(4, np.nan, np.float32)}
    yield "nan.pth", pth(tmp_path / "n", nan).read_bytes(), "fc.bias is not finite"
    save_file(nan, tmp_path / "n")
    yield "nan.safetensors", (tmp_path / "n").read_bytes(), "fc.bias is not finite"
    yield "list.pth", pth(tmp_path / "n", nan, lambda s: [1]).read_bytes(), "no dict of tensors"
    yield "empty.pth", pth(tmp_path / "n", {}).read_bytes(), "holds no tensors"
    mixed = pth(tmp_path / "n", nan, lambda s: s | {"x": [1]})
    yield "mixed.pth", mixed.read_bytes(), "x in it is not a tensor"


@pytest.mark.long
def test_damaged_files_and_files_that_lie(tmp_path, small_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data, words in spoiled(tmp_path, small_weights):
        (tmp_path / name).write_bytes(data)
        result = call(
            INFERENCE,
            f"--model_load_dir={name}",
            "--model=tiny",
            f"--image_path={ROOT}/data/cat.jpg",
        )
        assert result.status == 1, (name, result.stderr)
        assert name in result.stderr.splitlines()[-1], name
        assert words in result.stderr.splitlines()[-1], (name, result.stderr)
        assert "Traceback" not in result.stderr


SECONDS = 2  # that a small file may take


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """Whole files of 2 kB, in each format that has structure."""
    folder = tmp_path_factory.mktemp("small")
    arrays = {"fc.weight": np.ones((4, 3), np.float32), "fc.bias": np.arange(4.0)}
    whole = [
        pth(folder / "new.pth", arrays, lambda state: {"epoch": 3, "state_dict": state}),
        old_pth(folder / "old.pth", arrays),
        folder / "x.safetensors",
    ]
    save_file({name: np.float32(array) for name, array in arrays.items()}, whole[2])
    pickled = pth(folder / "pickled.pth", arrays)
    with zipfile.ZipFile(pickled) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    return folder, [path.read_bytes() for path in whole], members


def read_spoiled(path: Path, data: bytes) -> None:
    """Read a file that may be anything: weights, or RunError, soon."""
    path.write_bytes(data)
    with bounded(RunError):
        external = read_external(str(path))
        assert sum(array.nbytes for array in external.arrays.values()) <= 4 * len(data)


@fuzz(300)
@given(st.data())
def test_any_bytes(small_files, data):
    folder, whole, _ = small_files
    kind = data.draw(st.integers(0, 2))
    read_spoiled(folder / f"spoiled{kind}", data.draw(damaged(whole[kind])))


@st.composite
def instructions(draw) -> bytes:
    """Instructions of a pickle in any order, with arguments that fit them, now and then."""
    code = b""
    for each in draw(st.lists(st.sampled_from(pickletools.opcodes), min_size=1, max_size=30)):
        code += each.code.encode("latin-1")
        if each.arg is not None:
            code += draw(st.sampled_from(ARGUMENTS) | st.binary(max_size=9))
    return code


ARGUMENTS = (
    *(b"\0", b"\1", b"\2\0", b"\1\0\0\0", b"\xff\xff\xff\x7f", b"\xff" * 4, b"\xff" * 8),
    *(b"1\n", b"-1\n", b"99999999999999999999\n", b"nan\n", b"'x'\n", b"x\n", b"\1\0\0\0x"),
    *(b"collections\nOrderedDict\n", b"torch._utils\n_rebuild_tensor_v2\n", b"os\nsystem\n"),
    *(b"torch\nFloatStorage\n", b"oneflow\nTensor\n", b"\7storage", b"\3cpu", b"\4fc.weight"),
)


@fuzz(300)
@given(st.data())
def test_any_pickle_in_a_whole_archive(small_files, data):
    folder, _, members = small_files
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            if name.endswith(".pkl"):
                content = data.draw(damaged(content))
                at = data.draw(st.integers(0, len(content)))
                content = content[:at] + data.draw(st.just(b"") | instructions()) + content[at:]
            file.writestr(name, content)
    read_spoiled(folder / "spoiled.pth", archive.getvalue())


@fuzz(300)
@given(st.data())
def test_any_zip_around_whole_tensors(small_files, data):
    """Its list of members and their headers, which a change of the numbers does not reach."""
    folder, whole, _ = small_files
    start = whole[0].rindex(b"PK\x01\x02", 0, whole[0].index(b"PK\x01\x02") + 4)
    read_spoiled(folder / "zip.pth", whole[0][:start] + data.draw(damaged(whole[0][start:])))


@fuzz(100)
@given(st.data())
def test_any_folder_of_oneflow(small_files, data):
    """`pickled_data` and `meta` of flow.save."""
    folder = small_files[0] / "flow"
    if not folder.exists():
        flow.save(Tiny(4).state_dict(), str(folder))
    names = ["pickled_data", *(f"{path.name}/meta" for path in sorted(folder.glob("tensor_*"))[:3])]
    path = folder / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    try:
        with bounded(RunError):
            read_external(str(folder))
    finally:
        path.write_bytes(content)


def test_an_archive_of_many_members(tmp_path):
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    entry, end = data[at : data.rindex(b"PK\x05\x06")], data[data.rindex(b"PK\x05\x06") :]
    many = entry * 100_000
    end = end[:8] + struct.pack("<HHL", 65535, 65535, len(many)) + end[16:]
    start = time.perf_counter()
    path.write_bytes(data[:at] + many + end)
    with pytest.raises(RunError, match="list of members has more than"):
        read_external(str(path))
    assert time.perf_counter() - start < SECONDS


def test_what_is_not_a_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    for name, kind in (("fifo", "a FIFO"), ("socket", "a socket"), ("/dev/zero", "a device")):
        result = call(INFERENCE, f"--model_load_dir={name}", f"--image_path={ROOT}/data/cat.jpg")
        assert result.status == 1
        assert f"{name}: it is {kind}, and a file is needed" in result.stderr.splitlines()[-1]


def test_damaged_folders(tmp_path, small_weights):
    def refuse(words):
        with pytest.raises(RunError, match=words):
            read_external(str(path))

    path = tmp_path / "flow"
    flow.save(Tiny(4).state_dict(), str(path))
    pickled = path / "pickled_data"
    data = pickled.read_bytes()
    first = sorted(path.glob("tensor_*"))[0]
    name = first.name.encode()
    for evil in (b"../" + name[3:], b"/" + name[1:], b"a/" + name[2:]):
        pickled.write_bytes(data.replace(name, evil))
        refuse("in it lies at")
    pickled.write_bytes(data[:-40])
    refuse("damaged or cut off")
    pickled.write_bytes(data)
    (first / "out").write_bytes(b"123")
    refuse("has 3 bytes")
    (first / "meta").write_text("shape {")
    refuse("meta is damaged")
    (first / "meta").write_text("shape { dim: -4 } data_type: kFloat")
    refuse("not a whole number")
    (first / "meta").write_text("shape { dim: 4 } data_type: kOFRecord")
    refuse("kOFRecord")
    (first / "meta").write_text("shape { dim: 0 " + "dim: 1 " * 40 + "} data_type: kFloat")
    refuse("an impossible shape")
    (first / "meta").write_text(f"shape {{ dim: 0 dim: {2**62} }} data_type: kFloat")
    refuse("not a whole number, or too large")
    (first / "out").unlink()
    refuse("out is missing")
    os.mkfifo(first / "out")
    refuse("out is missing")
    (first / "out").unlink()
    (first / "out").symlink_to("/etc/passwd")
    refuse("a link that leads out of it")
    path = tmp_path / "folder"
    variable(path / "fc.bias", small_weights["fc.bias"])
    variable(path / "fc.weight", small_weights["fc.weight"], meta=False)
    refuse("some do not")


def test_an_auxiliary_classifier_may_be_missing(tmp_path, monkeypatch):
    """As in timm's Inception v3, since only training uses it."""

    class WithAuxiliary(nn.Module):
        def __init__(self, num_classes=1000, switches=None):
            super().__init__()
            self.fc, self.AuxLogits = nn.Linear(3, num_classes), nn.Module()
            self.AuxLogits.fc = nn.Linear(3, num_classes)

        def forward(self, image):
            return self.fc(image.mean(dim=(2, 3)))

    entry = Model(WithAuxiliary, image_size=32)
    monkeypatch.setitem(model_registry.MODELS, "inceptionv3", entry)
    monkeypatch.chdir(tmp_path)
    arrays = {"fc.weight": np.ones((4, 3), np.float32), "fc.bias": np.zeros(4, np.float32)}
    save_file(arrays, "without.safetensors")
    flags = "--model=inceptionv3", f"--image_path={ROOT}/data/cat.jpg", "--device=cpu"
    result = call(INFERENCE, "--model_load_dir=without.safetensors", *flags)
    assert result.status == 0 and "no auxiliary classifier" in result.stderr, result.stderr
    save_file(arrays | {"AuxLogits.fc.bias": np.zeros(4, np.float32)}, "half.safetensors")
    result = call(INFERENCE, "--model_load_dir=half.safetensors", *flags)
    assert result.status == 2 and "1 missing, first AuxLogits.fc.weight" in result.stderr


def test_a_mismatch_names_the_first_of_each_kind(tmp_path, small_weights):
    arrays = small_weights | {"x.a": np.zeros(1, np.float32), "bn1.bias": np.zeros(3, np.float32)}
    del arrays["bn1.weight"]
    path = str(pth(tmp_path / "a.pth", arrays))
    with pytest.raises(UsageError) as caught:
        restore(path, model="tiny", num_classes=None, models=model_registry.MODELS)
    assert (
        "1 missing, first bn1.weight; 1 unexpected, first x.a; 1 wrongly shaped, first bn1.b"
        in (str(caught.value))
    )
    with pytest.raises(UsageError, match="match no network here"):
        restore(path, model=None, num_classes=None, models=model_registry.MODELS)
    with pytest.raises(UsageError, match="--num_classes=5, but .* has 4 classes$"):
        restore(path, model="tiny", num_classes=5, models=model_registry.MODELS)


def test_a_small_file_of_many_classes(tmp_path, small_weights, monkeypatch):
    """No network of 750,000 classes is built for it."""

    def build(num_classes, *more):
        assert num_classes == 1
        return Tiny(num_classes)

    monkeypatch.setitem(model_registry.MODELS, "tiny", Model(build, image_size=32))
    many = {"fc.weight": np.ones((750_000, 1), np.float32), "fc.bias": np.ones(750_000, np.float32)}
    path = pth(tmp_path / "a.pth", small_weights | many)
    ours = tmp_path / "snapshot_a"
    shutil.copytree(ROOT / "tests" / "stored" / "run" / "snapshot_epoch_1", ours)
    description = json.loads((ours / "snapshot.json").read_text())
    description |= {"model": "tiny", "num_classes": 900_000, "classes": None}
    (ours / "snapshot.json").write_text(json.dumps(description))
    for each in (path, ours):
        with pytest.raises(UsageError, match="fc.weight has .* numbers, and .* classes need"):
            restore(str(each), model="tiny", num_classes=None, models=model_registry.MODELS)


# The scripts.


@pytest.mark.long
def test_the_published_folder_is_the_default(resnet50, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of_2020(tmp_path / PUBLISHED_FOLDER, resnet50[0], meta=False)
    image = f"--image_path={ROOT}/data/cat.jpg"
    result = call(INFERENCE, image, "--image_size=32")
    assert result.status == 0, result.stderr
    assert f"Restoring model from {PUBLISHED_FOLDER}." in result.stderr
    assert "taken as resnet50 with 7 classes" in result.stderr
    assert "taken as (O, I, H, W)" in result.stderr


def train(tmp_path, *flags, to="run"):
    data = tmp_path / "data"
    if not data.exists():
        write_parts(data, [[0, 1, 2, 3, 4]] * 2, num_classes=5)
    return call(
        of_cnn_train_val.main,
        *(f"--train_data_dir={data}", "--batch_size_per_device=5", "--num_epochs=1"),
        *(
            "--image_size=32",
            "--learning_rate=0",
            f"--model_save_dir={tmp_path / to}",
            "--save_init",
        ),
        *flags,
    )


@pytest.mark.parametrize("kind", ["pth", "ours"])
def test_finetune_takes_all_but_the_last_layer(tmp_path, kind):
    flow.manual_seed(3)
    network = MODELS["toy"].build(4)
    weights = state_arrays(network)
    source = tmp_path / "toy.pth"
    pth(source, weights)
    if kind == "ours":
        target = tmp_path / "snapshot_toy"
        result = call(convert_snapshot.main, str(source), str(target), "--model=toy")
        assert result.status == 0, result.stderr
        source = target
    load = (f"--model_load_dir={source}", "--model=toy")
    result = train(tmp_path, *load, "--num_classes=5")
    assert result.status == 2
    assert "has 4 classes; --finetune takes all" in result.stderr.splitlines()[-1]
    result = train(tmp_path, *load, "--num_classes=5", "--finetune")
    assert result.status == 0, result.stderr
    assert "the last layer starts from random weights" in result.stderr
    path = tmp_path / "run" / "snapshot_initial_model"
    found = load_file(path / "model.safetensors")
    assert found["fc.weight"].shape == (5, 4)
    for name, array in weights.items():
        if not name.startswith("fc."):
            np.testing.assert_array_equal(found[name], array)
    assert json.loads((path / "snapshot.json").read_text())["num_classes"] == 5
    result = train(tmp_path, "--finetune", "--model=toy", to="other")
    assert (result.status, "needs --model_load_dir" in result.stderr) == (2, True)


@pytest.mark.long
def test_conversion_and_evaluation(tmp_path, small_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = pth(tmp_path / "a.pth", small_weights)
    target = tmp_path / "made" / "snapshot_a"
    argv = (str(source), str(target), "--model=tiny")
    result = call(convert_snapshot.main, *argv)
    assert result.status == 0, result.stderr
    assert sorted(os.listdir(target)) == ["model.safetensors", "snapshot.json"]
    for name, array in load_file(target / "model.safetensors").items():
        np.testing.assert_array_equal(array, small_weights[name])
    result = call(convert_snapshot.main, *argv)
    assert (result.status, "nothing is overwritten" in result.stderr) == (2, True)
    write_parts(tmp_path / "data", [[0, 1, 2, 3]])
    figures = []
    for flags in ((str(source), "--model=tiny"), (str(target),)):
        path, *more = flags
        result = call(
            of_cnn_evaluate.main, "--val_data_dir=data", f"--model_load_dir={path}", *more
        )
        assert result.status == 0, result.stderr
        figures.append(result.stdout.splitlines()[-1].rpartition(", samples")[0])
    assert figures[0] == figures[1]
