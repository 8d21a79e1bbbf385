"""Preprocessing inside a file, integers, half precision, and the gate, on small networks."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import deployed
from cnns.data.images import Preprocessing, as_input
from cnns.deploy.card import cell, table
from cnns.deploy.gate import Score, refusal, score, wilson
from cnns.deploy.pictures import Pictures, calibration_pictures, crops, find_photographs
from cnns.deploy.preprocess import (
    TOLERANCE,
    add_preprocessing,
    add_softmax,
    compare_pixels,
    preprocessing_alone,
)
from cnns.deploy.quantise import layer_errors, run, to_fp16, to_int8
from cnns.deploy.variants import Data, gated
from cnns.errors import RunError, UsageError
from cnns.export import open_session
from cnns.report.metrics import reduce_logits
from small import ROOT

PHOTOGRAPHS = [
    Image.open(ROOT / "data" / name).convert("RGB") for name in ("cat.jpg", "coffee.jpg")
]
SIZE = 16


def convolutions(seed: int = 0, *, outlier: bool = False) -> onnx.ModelProto:
    """Two convolutions with ReLU, a mean, a linear layer. With an outlier, one channel of the
    second is so large that 8 bits leave nothing of the others; nothing reads that channel."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "b1": (8,), "b2": (8,), "w3": (8, 3)}
    arrays = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    if outlier:
        arrays["w2"][0] *= 1e4
        arrays["w3"][0] = 0
    make = helper.make_node
    nodes = [
        make("Conv", ["images", "w1", "b1"], ["c1"], "first", pads=[1] * 4),
        make("Relu", ["c1"], ["r1"], "relu1"),
        make("Conv", ["r1", "w2", "b2"], ["c2"], "second", pads=[1] * 4),
        make("Relu", ["c2"], ["r2"], "relu2"),
        make("GlobalAveragePool", ["r2"], ["mean"], "mean"),
        make("Flatten", ["mean"], ["flat"], "flat"),
        make("MatMul", ["flat", "w3"], ["logits"], "fc"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [value("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [value("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)


def images(count: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


# Preprocessing.


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, shorter", [(224, 256), (64, 64), (33, 37), (20, 400)])
def test_a_file_prepares_photographs_as_inference_does(interpolation, size, shorter):
    """Of both orientations, enlarged and made smaller by up to 15 times."""
    preprocessing = Preprocessing(size, shorter, (123.0, 117.0, 104.0), (58.0, 57.0, 56.0))
    preprocessing = Preprocessing(*list(vars(preprocessing).values())[:4], interpolation)
    model = preprocessing_alone(preprocessing)
    onnx.checker.check_model(model, full_check=True)
    shapes = ((28, 28), (31, 77), (225, 301), (301, 225), (500, 499))
    pictures = [*PHOTOGRAPHS, *(PHOTOGRAPHS[0].resize(shape) for shape in shapes)]
    difference = compare_pixels(model, preprocessing, pictures)
    assert difference.is_small, difference
    assert difference.largest <= TOLERANCE.largest and difference.mean < 0.01


def test_the_comparison_of_pixels_finds_another_crop():
    preprocessing = Preprocessing(64, 72, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    model = preprocessing_alone(preprocessing)
    other = Preprocessing(64, 74, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert not compare_pixels(model, other, PHOTOGRAPHS).is_small


def test_pictures_in_and_probabilities_out_in_batches():
    model = deployed.network()
    plain = onnx.ModelProto.FromString(model.SerializeToString())
    add_preprocessing(model, deployed.PREPROCESSING)
    add_softmax(model)
    onnx.checker.check_model(model, full_check=True)
    pictures = np.stack([np.asarray(PHOTOGRAPHS[0]), np.asarray(PHOTOGRAPHS[0])[:, ::-1]])
    (found,) = open_session(model.SerializeToString()).run(None, {"pictures": pictures})
    inputs = [as_input(Image.fromarray(each), deployed.PREPROCESSING) for each in pictures]
    logits = run(plain, np.stack(inputs))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    old = convolutions()
    with pytest.raises(UsageError, match="--opset=18"):
        add_preprocessing(old, deployed.PREPROCESSING)


# Smaller ones.


def test_int8_is_integers_throughout_and_near():
    model = convolutions()
    before = model.SerializeToString()
    quantised = to_int8(model, images())
    assert model.SerializeToString() == before
    onnx.checker.check_model(quantised, full_check=True)
    kinds = {t.data_type for t in quantised.graph.initializer if len(t.dims) == 4}
    assert kinds == {TensorProto.INT8}
    for tensor in quantised.graph.initializer:  # 7 bits: no sum of two products saturates
        if tensor.data_type == TensorProto.INT8:
            assert np.abs(numpy_helper.to_array(tensor).astype(int)).max() <= 64
    ours, theirs = run(model, images(seed=2)), run(quantised, images(seed=2))
    assert 0 < np.abs(ours - theirs).max() < 0.1 * ours.std()
    (scale,) = [t for t in quantised.graph.initializer if t.name == "w1_scale"]
    assert list(scale.dims) == [8]  # one for each channel


def test_onnx_runtime_computes_the_convolutions_in_integers(tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    model = to_int8(convolutions(), images()).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node]
    assert kinds.count("QLinearConv") == 2 and "Conv" not in kinds and "Relu" not in kinds


def test_fp16_halves_the_file_and_keeps_the_ends():
    model = convolutions()
    half = to_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    ends = [*half.graph.input, *half.graph.output]
    assert {end.type.tensor_type.elem_type for end in ends} == {TensorProto.FLOAT}
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.FLOAT16}
    np.testing.assert_allclose(run(half, images()), run(model, images()), atol=0.01, rtol=0.01)
    with pytest.raises(RunError, match="too large for fp16"):
        to_fp16(huge())


def huge() -> onnx.ModelProto:
    model = convolutions()
    tensor = next(t for t in model.graph.initializer if t.name == "w2")
    values = numpy_helper.to_array(tensor) * 1e6
    tensor.CopyFrom(numpy_helper.from_array(values, "w2"))
    return model


def test_the_layers_that_lose_most_are_named():
    model = convolutions(outlier=True)
    errors = layer_errors(model, to_int8(model, images()), images(8))
    assert [name for name, _ in errors][0] in ("second", "fc")  # its output, or what reads it
    assert errors[0][1] > 20 * dict(errors)["first"]
    fine = layer_errors(convolutions(), to_int8(convolutions(), images()), images(8))
    assert {name for name, _ in fine} == {"first", "second", "fc"} and fine[0][1] < 0.1


# The gate.


def answers(predicted: list[int], labels: list[int], margin: float = 5.0):
    logits = np.zeros((len(predicted), 3), np.float32)
    logits[np.arange(len(predicted)), predicted] = margin
    return reduce_logits(np.arange(len(predicted)), np.array(labels), logits)


def test_points_lost_are_counted_against_float32():
    labels = [0, 1, 2, 0] * 50
    wrong = [1, *labels[1:]]
    whole = Score(answers(wrong, labels), answers(labels, labels), True)
    assert (whole.hits, whole.count, whole.drop, whole.agreement) == (199, 200, 0.5, 0.995)
    assert whole.passes(0.5) and not whole.passes(0.4)
    better = Score(answers(labels, labels), answers(wrong, labels), True)
    assert better.drop == -0.5 and better.passes(0)
    line = refusal("int8", whole, max_drop=0.4, path="DIR", layers=[("conv", 0.25)])
    assert "0.50 points" in line and "199 of 200" in line and "conv (25%)" in line


def test_a_network_that_integers_spoil_is_refused_with_its_layers():
    size = Preprocessing(SIZE, SIZE, (127.5,) * 3, (60.0,) * 3)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 1, 1, 3), np.uint8)
    pixels = np.broadcast_to(colours, (40, SIZE, SIZE, 3))
    inputs = np.stack([as_input(Image.fromarray(each), size) for each in pixels])
    for outlier in (False, True):
        model = convolutions(outlier=outlier)
        labels = run(model, inputs).argmax(axis=1)
        assert len(set(labels)) == 3
        pictures = Pictures(
            "HERE", str, lambda i, own=labels: (Image.fromarray(pixels[i]), own[i]), 40, True
        )
        data = Data(pictures, pictures, 10, 40)
        if not outlier:
            assert gated(model, "int8", data, size)
            continue
        with pytest.raises(RunError, match=r"int8 loses \d+\.\d+ points on HERE") as found:
            gated(model, "int8", data, size)
        assert re.search(r"when they alone are int8: (second|fc) \(", str(found.value))


def test_the_layers_alone_add_up_to_about_the_whole():
    """ONNX Runtime must not round more than was asked for."""
    model = convolutions()
    quantised = to_int8(model, images())
    alone = sum(error**2 for _, error in layer_errors(model, quantised, images(8))) ** 0.5
    exact = run(model, images(8))
    whole = np.sqrt(np.square(run(quantised, images(8)) - exact).mean()) / exact.std()
    assert 0.3 * whole < alone < 3 * whole


def test_without_labels_confident_answers_are_scored_and_none_is_no_pass():
    labels = [-1] * 4
    sure, unsure = answers([0, 1, 2, 0], labels), answers([0, 1, 2, 0], labels, margin=0.1)
    changed = answers([0, 1, 2, 1], labels)
    found = Score(changed, sure, False)
    assert (found.count, found.hits, found.drop, found.agreement) == (4, 3, 25, 0.75)
    nothing = Score(changed, unsure, False)
    assert nothing.count == 0 and not nothing.passes(100)
    assert "cannot be checked" in refusal("int8", nothing, max_drop=1, path="DIR", layers=[])


@pytest.mark.parametrize(
    "hits, count, low, high",
    # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_that_of_the_literature(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


def test_all_variants_score_the_same_pictures():
    pictures = Pictures(
        "made", str, lambda i: (deployed.solid(deployed.CLASSES[i % 3]), i % 3), 70, True
    )
    model = deployed.network()
    files = {"float32": model.SerializeToString(), "fp16": to_fp16(model).SerializeToString()}
    found = score(files, pictures, deployed.PREPROCESSING)
    assert [each.hits for each in found.values()] == [70, 70]
    foreign = Pictures("made", str, lambda i: (deployed.solid("red"), 9), 3, True)
    with pytest.raises(RunError, match="another data set"):
        score(files, foreign, deployed.PREPROCESSING)


# Pictures.


def test_the_choice_of_pictures_is_always_the_same():
    found = crops([("cat", PHOTOGRAPHS[0])], count=10, path="cat")
    again = crops([("cat", PHOTOGRAPHS[0])], count=10, path="cat")
    assert [found.names(i) for i in range(10)] == [again.names(i) for i in range(10)]
    assert len({found.names(i) for i in range(10)}) == 10
    assert found.choose(4) == found.choose(4) and len(set(found.choose(4))) == 4
    part = found.part([7, 2])
    assert part.names(1) == found.names(2) and part.open(0)[0].size == found.open(7)[0].size


def test_calibration_takes_images_anywhere_below(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    deployed.solid("red").save(tmp_path / "a" / "b" / "x.png")
    found = calibration_pictures(str(tmp_path), flags={})
    assert found is not None and len(found) == 1 and not found.labelled
    assert calibration_pictures(None, flags={}) is None
    with pytest.raises(UsageError, match="--calibration_dir"):
        calibration_pictures(str(tmp_path / "gone"), flags={})


def test_without_a_run_the_photographs_of_data_are_compared(monkeypatch, tmp_path):
    """Wherever the command is given."""
    monkeypatch.chdir(tmp_path)
    found = find_photographs([], flags={})
    assert [found.names(i) for i in range(len(found))] == ["data/cat.jpg", "data/coffee.jpg"]
    assert found.open(1)[0].mode == "RGB"


# The card.


def test_names_from_outside_stay_in_their_cells():
    assert cell("a|b\n<x>") == "a\\|b\\n&lt;x>"
    assert table(("a", "b"), [("1", "|")]).splitlines()[2] == "| 1 | \\| |"
