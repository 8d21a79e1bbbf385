"""Exported files as anybody may have written them: run, or refused in one line."""

import itertools
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cnns import export
from cnns.data.images import Preprocessing
from cnns.errors import RunError, UsageError
from cnns.export import ExportedModel, describe, find_export
from fuzz import bounded, damaged, fuzz

SECONDS = 2  # that a small file may take
CLASSES = ["black", "gray", "white"]
PREPROCESSING = Preprocessing(8, 8, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
ABOUT = describe(
    model="tiny", snapshot="snapshot_last", classes=CLASSES, preprocessing=PREPROCESSING
)


def network(nodes=(), **more) -> onnx.ModelProto:
    """The mean of each colour; `more` are arguments of make_graph."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Add", ["flat", "bias"], ["logits"]),
            *nodes,
        ],
        "graph",
        [value("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["batch", 3])],
        **{"initializer": [numpy_helper.from_array(np.zeros(3, np.float32), "bias")]} | more,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    helper.set_model_props(model, ABOUT)
    return model


def with_texts(**texts: str) -> onnx.ModelProto:
    model = network()
    helper.set_model_props(model, ABOUT | texts)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


def load(folder: Path, content: onnx.ModelProto | bytes) -> ExportedModel:
    path = folder / "x.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    start = time.process_time()
    try:
        return ExportedModel(str(path))
    except RunError as error:
        assert "x.onnx" in str(error) and len(str(error)) < 600
        raise
    finally:
        assert time.process_time() - start < SECONDS


def test_a_whole_one_runs(folder):
    exported = load(folder, network())
    assert (exported.model, list(exported.classes)) == ("tiny", CLASSES)
    images = np.ones((2, 3, 8, 8), np.float32)
    np.testing.assert_allclose(exported.logits(images), 1)


def test_names_that_are_not_utf_8_survive(folder):
    names = ["\udcff", "猫", 'a"\\\n\x1b[2J']
    about = describe(
        model="tiny", snapshot="snapshot_\udc80", classes=names, preprocessing=PREPROCESSING
    )
    assert list(load(folder, with_texts(**about)).classes) == names


DEEP = "[" * 100_000
WRONG = {
    "model": ["[1]", "null", "3", '["resnet50"]', "{}", json.dumps("x" * 2000)],
    "snapshot": ["[]", "null", "1.5"],
    "run": ["[]", "3", json.dumps("x" * 2000)],
    "classes": [
        *('"abc"', '{"a": 1, "b": 2, "c": 3}', '["a", "b", 3]', "[]", "null", '["a", "b"]', "3"),
        '["a", "b", "c", "d"]',
        json.dumps(["x" * 2000] * 3),
    ],
    "image_size": [
        "true",
        "8.0",
        '"8"',
        "0",
        "-8",
        "1e3",
        "16",
        "[8]",
        "null",
        "9" * 5000,
        "99999",
    ],
    "resize_shorter": ["true", "0", "-1", "1e400", "[]", "null", "9" * 4000],
    "rgb_mean": [
        *('"123"', "[1, 2]", "[1, 2, NaN]", "[1, 2, Infinity]", "[1, 2, true]", "null", "3"),
        *('["1", "2", "3"]', "[1, 2, 1e39]", "[1, 2, " + "9" * 4000 + "]", "[[1], [2], [3]]"),
    ],
    "rgb_std": ["[0, 1, 1]", "[-1, 1, 1]", "[1e-40, 1, 1]", "[NaN, 1, 1]", "[]", '{"a": 1}'],
    "interpolation": ["[]", "{}", '"nearest"', "1", "null"],
    "format_version": ["true", '"1"', "2", "1.0", "[1]", "null", "-1"],
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_of_wrong_types(folder, name):
    for text in [
        *WRONG[name],
        "",
        "{",
        "not JSON",
        DEEP,
        "\udcff".encode(errors="replace").decode(),
    ]:
        with pytest.raises(RunError):
            load(folder, with_texts(**{name: text}))
    model = network()
    kept = {key: text for key, text in ABOUT.items() if key != name}
    helper.set_model_props(model, kept)
    if name in ("interpolation", "run"):  # older files have none
        load(folder, model)
    else:
        with pytest.raises(RunError, match=name):
            load(folder, model)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(), each, max_size=3),
    max_leaves=8,
)


@fuzz(150)
@given(name=st.sampled_from(sorted(ABOUT)), value=json_values)
@example(name="rgb_mean", value=[10**400, 1, 1])
def test_any_metadata(folder, name, value):
    try:
        exported = load(folder, with_texts(**{name: json.dumps(value)}))
    except RunError:
        return
    assert isinstance(exported.model, str) and exported.num_classes == 3
    assert all(isinstance(each, str) for each in exported.classes)
    assert np.isfinite([exported.preprocessing.rgb_mean, exported.preprocessing.rgb_std]).all()


@pytest.mark.parametrize("text", [b"GlobalAveragePool", b"images", b"bias", b"snapshot_last"])
def test_texts_that_are_not_utf_8(folder, text, capfd):
    data = network().SerializeToString().replace(text, b"\xff" + text[1:])
    with pytest.raises(RunError, match="is not UTF-8"):
        load(folder, data)
    assert capfd.readouterr().err == ""


def run(folder: Path, content: onnx.ModelProto | bytes) -> None:
    with bounded(RunError):
        load(folder, content).logits(np.ones((1, 3, 8, 8), np.float32))


@fuzz(200)
@given(damaged(network().SerializeToString()))
def test_any_bytes(folder, data):
    run(folder, data)


def numbers_of(message) -> list:
    """(message, field, index) of every number and text in a message, where index may be None."""
    found = []
    for field, value in message.ListFields():
        repeated = field.label == field.LABEL_REPEATED
        for i, each in enumerate(value if repeated else [value]):
            if field.message_type is not None:
                found += numbers_of(each)
            elif field.type != field.TYPE_ENUM:
                found.append((message, field.name, i if repeated else None))
    return found


OPERATORS = ("ConstantOfShape", "Shape", "Expand", "Conv", "Relu", "Exp", "Tile", "Gemm", "Pad")


@fuzz(100)
@given(st.data())
def test_any_graph(folder, data):
    """The numbers and names in the structure of a whole file are changed, and nodes are added."""
    names = st.sampled_from(["images", "mean", "flat", "bias", "logits", "batch", "", "x"])
    model = network(
        [
            helper.make_node(data.draw(st.sampled_from(OPERATORS)), [data.draw(names)], [f"n{i}"])
            for i in range(data.draw(st.integers(0, 3)))
        ]
    )
    model.graph.node[2].input[0] = data.draw(st.sampled_from(["flat", "n0", "n1"]))
    for _ in range(data.draw(st.integers(0, 3))):
        message, field, i = data.draw(st.sampled_from(numbers_of(model.graph)))
        old = getattr(message, field) if i is None else getattr(message, field)[i]
        if isinstance(old, bytes):
            new: object = data.draw(st.binary(max_size=20))
        elif isinstance(old, str):
            new = data.draw(names)
        elif isinstance(old, int):
            new = data.draw(st.sampled_from([-1, 0, 1, 2, 3, 8, 2**10, 2**20, 2**31 - 1]))
        else:
            new = data.draw(st.floats(width=32))
        if i is None:
            setattr(message, field, new)
        else:
            getattr(message, field)[i] = new
    run(folder, model)


# Numbers that are in another file.


def elsewhere(location: str | None, **entries: int) -> TensorProto:
    tensor = TensorProto(name="bias", data_type=TensorProto.FLOAT, dims=[3])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A folder with weights inside and outside of it; ONNX Runtime must not be reached."""
    (tmp_path / "secret").write_bytes(b"secret numbers")
    place = tmp_path / "model"
    place.mkdir()
    (place / "x.onnx.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (place / "link").symlink_to("../secret")
    (place / "up").symlink_to("..")
    (place / "folder").mkdir()
    os.mkfifo(place / "fifo")

    def opened(*args, **kwargs):
        raise AssertionError("ONNX Runtime was called")

    monkeypatch.setattr(export.onnxruntime, "InferenceSession", opened)
    return place


def test_numbers_beside_the_file_are_read(guarded, monkeypatch):
    monkeypatch.undo()
    model = network(initializer=[elsewhere("x.onnx.data", offset=4, length=12)])
    logits = load(guarded, model).logits(np.zeros((1, 3, 8, 8), np.float32))
    assert logits.tolist() == [[1, 2, 3]]


def places(tmp_path: Path) -> list[TensorProto]:
    outside = [
        *("/etc/passwd", "/dev/zero", "../secret", "folder/../../secret", "link", "up/secret"),
        str(tmp_path / "secret"),
    ]
    inside = ["fifo", "folder", "nothing", "", ".", "x.onnx.data\0", "*/_ORT_MEM_ADDR_/*"]
    twice = elsewhere("x.onnx.data")
    twice.external_data.add(key="location", value="/etc/passwd")
    unmarked = elsewhere("/etc/passwd")
    unmarked.data_location = TensorProto.DEFAULT
    return [
        *(elsewhere(location) for location in [*outside, *inside, None]),
        *(elsewhere("x.onnx.data", offset=n) for n in (-4, 17, 10**30)),
        *(elsewhere("x.onnx.data", length=n) for n in (-4, 17, 10**30)),
        elsewhere("x.onnx.data", offset="x"),  # type: ignore[arg-type]
        twice,
        unmarked,
    ]


def test_numbers_outside_of_the_folder_are_not_read(guarded, tmp_path):
    for tensor in places(tmp_path):
        with pytest.raises(RunError):
            load(guarded, network(initializer=[tensor]))


def test_they_are_found_wherever_they_hide(guarded):
    tensor = elsewhere("../secret")
    sparse = onnx.SparseTensorProto(values=tensor, dims=[3])
    node = helper.make_node
    in_function = network()
    in_function.functions.add(name="f").node.append(node("Constant", [], ["c"], value=tensor))
    in_training = network()
    in_training.training_info.add().initialization.initializer.append(tensor)
    branch = helper.make_graph([], "branch", [], [], initializer=[tensor])
    for model in (
        network([node("Constant", [], ["c"], value=tensor)]),
        network([node("Constant", [], ["c"], sparse_value=sparse)]),
        network([node("If", ["c"], ["d"], then_branch=branch, else_branch=branch)]),
        network(sparse_initializer=[sparse]),
        in_function,
        in_training,
    ):
        with pytest.raises(RunError):
            load(guarded, model)


def test_loops_are_refused(guarded):
    body = helper.make_graph([], "body", [], [])
    with pytest.raises(RunError, match="branches or loops"):
        load(guarded, network([helper.make_node("Loop", ["", ""], ["x"], body=body)]))


# What a graph computes.


def computing(side: int, products: int) -> onnx.ModelProto:
    """The mean of each colour, and a matrix (side, side) of zeros times itself, over and over."""
    node = helper.make_node
    names = [f"c{i}" for i in range(products + 1)]
    bias = numpy_helper.from_array(np.zeros(3, np.float32), "bias")
    shape = numpy_helper.from_array(np.array([side, side], np.int64), "shape")
    nodes = [
        node("ConstantOfShape", ["shape"], ["c0"]),
        *(node("MatMul", [a, a], [b]) for a, b in itertools.pairwise(names)),
        node("ReduceMax", [names[-1]], ["zero"], keepdims=0),
        node("Add", ["zero", "bias"], ["sum"]),
    ]
    model = network(nodes, initializer=[bias, shape])
    model.graph.node[2].input[1] = "sum"
    ordered = [*model.graph.node[:2], *model.graph.node[3:], model.graph.node[2]]
    model.graph.ClearField("node")
    model.graph.node.extend(ordered)
    return model


def test_time_and_memory_of_a_graph_are_bounded(folder, monkeypatch):
    image = np.ones((1, 3, 8, 8), np.float32)
    assert load(folder, computing(10, 2)).logits(image).tolist() == [[1, 1, 1]]
    monkeypatch.setattr(export, "SECONDS_PER_IMAGE", 0.2)
    exported = load(folder, computing(1024, 200))
    with pytest.raises(RunError, match="takes more than 0.2 s for an image"):
        exported.logits(image)
    exported = load(folder, computing(1 << 20, 1))
    with pytest.raises(RunError, match="cannot run"):
        exported.logits(image)


# What is not a file of ONNX.


def test_what_is_not_a_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "gone").symlink_to("nowhere")
    for name, words in (
        *(("folder", "Is a directory"), ("fifo", "a FIFO"), ("socket", "a socket")),
        *(
            ("text", "not an ONNX file"),
            ("empty", "format_version"),
            ("gone", "cannot read.*No such file"),
        ),
    ):
        with pytest.raises(RunError, match=words):
            ExportedModel(str(tmp_path / name))
    for path, words in ((tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(UsageError, match=words):
            find_export(str(path))


def test_logits_of_another_shape_or_not_finite(folder):
    model = network()
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.array([0, np.nan, 0], np.float32), "bias")
    )
    with pytest.raises(RunError, match="finite logits"):
        load(folder, model).logits(np.zeros((1, 3, 8, 8), np.float32))
