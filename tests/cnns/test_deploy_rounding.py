"""The rounding of int8's weights: what a layer reads, and that its outputs change least."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnns.deploy.quantise import copy, run, to_int8
from cnns.deploy.rounding import PLACES, as_rows, inputs_at_places, measure_inputs, round_rows
from cnns.export import open_session

CONVOLUTIONS = {
    "of 1 pixel": ((8, 6, 1, 1), {}),
    "padded": ((8, 6, 3, 3), {"pads": [1, 1, 1, 1]}),
    "padded unevenly, with a stride": ((8, 6, 3, 3), {"pads": [0, 1, 1, 0], "strides": [2, 2]}),
    "in groups": ((8, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise, for any size": (
        (6, 1, 5, 5),
        {"group": 6, "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    "dilated": ((4, 6, 3, 3), {"dilations": [2, 1]}),
}


def one_layer(kind: str, weight: np.ndarray, height: int, **settings) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(kind, ["images", "w"], ["logits"], "layer", **settings)],
        "graph",
        [value("images", TensorProto.FLOAT, None)],
        [value("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_its_weights_times_what_it_reads(name):
    """At the places that were drawn, in their order."""
    shape, settings = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape)
    model = one_layer("Conv", weight, 9, **settings)
    image = rng.normal(size=(2, 6, 9, 11)).astype(np.float32)
    output = run(model, image).reshape(2, len(weight), -1)
    (node,) = model.graph.node
    read = inputs_at_places(image, node, shape, np.random.default_rng(1))
    order = np.random.default_rng(1).permutation(output.shape[2])[:PLACES]
    expected = output[..., order].transpose(1, 0, 2).reshape(len(weight), -1)
    computed = (as_rows(weight, node) @ read).reshape(len(weight), -1)
    np.testing.assert_allclose(computed, expected, atol=1e-4)


def changes(rows, hessian, integers, scale):
    """How much each output changes, squared, over all that was read."""
    rounded = integers * scale[..., None] - rows
    return np.einsum("goi,gij,goj->go", rounded, hessian, rounded)


@pytest.mark.parametrize("inputs", [9, 150])
def test_outputs_change_less_than_with_the_nearest_integers(inputs):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 5, inputs))
    mixing = rng.normal(size=(2, inputs, inputs)) * (0.8 ** np.arange(inputs))  # much alike
    read = mixing @ rng.normal(size=(2, inputs, 400))
    hessian = read @ read.transpose(0, 2, 1)
    scale = np.abs(rows).max(axis=2) / 64
    integers = round_rows(rows, hessian, scale, 64)
    assert np.abs(integers).max() <= 64 and (integers == np.rint(integers)).all()
    nearest = changes(rows, hessian, np.rint(rows / scale[..., None]), scale)
    assert changes(rows, hessian, integers, scale).sum() < 0.8 * nearest.sum()


def test_inputs_that_are_not_alike_are_rounded_to_the_nearest():
    """Also those that are always 0."""
    rows = np.random.default_rng(0).normal(size=(1, 3, 7))
    scale = np.abs(rows).max(axis=2) / 64
    for hessian in (np.eye(7)[None], np.zeros((1, 7, 7))):
        found = round_rows(rows, hessian, scale, 64)
        np.testing.assert_array_equal(found, np.rint(rows / scale[..., None]))


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm, transposed"])
def test_linear_layers_either_way_round(kind):
    """A network of one, in int8, is nearer to float32 than with plain rounding."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 4)).astype(np.float32)
    if kind.endswith("transposed"):
        model = one_layer("Gemm", weight.T, 1, transB=1)
    else:
        model = one_layer(kind, weight, 1)
    shape = model.graph.input[0].type.tensor_type.shape
    shape.dim.add().dim_param, shape.dim.add().dim_value = "batch", 12
    images = (rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)) * 0.3).astype(np.float32)
    (node,) = model.graph.node
    hessian = measure_inputs(copy(model), [node], images)["layer"]
    np.testing.assert_allclose(hessian[0], images.T @ images, rtol=1e-3, atol=1e-2)
    quantised = to_int8(model, list(images))
    held = {t.name: numpy_helper.to_array(t) for t in quantised.graph.initializer}
    integers, scale = held["w_quantized"], held["w_scale"]
    assert (
        integers.dtype == np.int8
        and integers.shape == numpy_helper.to_array(model.graph.initializer[0]).shape
    )
    rows, ours = as_rows(weight.T if node.attribute else weight, node), as_rows(integers, node)
    scales = np.broadcast_to(scale, 4)[None].astype(np.float64)
    nearest = changes(rows, hessian, np.rint(rows / scales[..., None]), scales)
    assert changes(rows, hessian, ours, scales).sum() < 0.7 * nearest.sum()
    assert open_session(quantised.SerializeToString()).run(None, {"images": images})
