"""Weights rounded to integers so that what a layer gives changes least, rather than the weights.

Frantar et al. 2022, GPTQ (arXiv:2210.17323): the weights of an output channel are rounded one after
the other, and those still to be rounded make good what each of them changes in the output. How far
one can stand in for another is seen in what the layer reads on calibration images: H = X X^T, X of
shape (inputs of an output channel, places).
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnns.export import INPUT, open_session

LAYERS = ("Conv", "Gemm", "MatMul")  # with weights
DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
BLOCK = 128  # inputs that are rounded before all further weights are corrected
MAX_INPUTS = 6000  # of a layer; H of more takes too much memory, and weights stay as they are
PLACES = 64  # of an image that H is made of
BATCH = 8  # images between two sums into H, which is the slow part


def round_to_inputs(
    quantised: onnx.ModelProto,
    model: onnx.ModelProto,
    images: Sequence[np.ndarray],
    *,
    largest: int,
) -> None:
    """Replace the integer weights of a QDQ graph, from -largest to largest; the scales stay.

    `model` is the network in float32, its layers named as there; `images` are (3, H, W).
    """
    real = {tensor.name: tensor for tensor in model.graph.initializer}
    held = {tensor.name: tensor for tensor in quantised.graph.initializer}
    makers = weight_makers(quantised)
    layers = [
        node
        for node in model.graph.node
        if node.name in makers and as_rows(weights(node, real), node).shape[-1] <= MAX_INPUTS
    ]
    hessians = measure_inputs(model, layers, images)
    for node in layers:
        scale, target = (held[makers[node.name].input[i]] for i in (1, 0))
        exact = weights(node, real)
        rows = as_rows(exact, node)  # (groups, outputs of a group, inputs)
        scales = numpy_helper.to_array(scale).astype(np.float64)
        scales = np.broadcast_to(scales, rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
        rounded = round_rows(rows, hessians[node.name], scales, largest).astype(np.int8)
        if is_transposed(node):
            rounded = rounded[0].T
        target.CopyFrom(numpy_helper.from_array(rounded.reshape(exact.shape), target.name))


def weight_makers(quantised: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """By the names of layers, the nodes that make their weights of integers."""
    makers = {node.output[0]: node for node in quantised.graph.node}
    constants = {tensor.name for tensor in quantised.graph.initializer}
    found = {n.name: makers.get(n.input[1]) for n in quantised.graph.node if n.op_type in LAYERS}
    return {name: maker for name, maker in found.items() if maker and maker.input[0] in constants}


def weights(node: onnx.NodeProto, tensors: dict[str, TensorProto]) -> np.ndarray:
    return numpy_helper.to_array(tensors[node.input[1]])


def is_transposed(node: onnx.NodeProto) -> bool:
    """Whether weights are (inputs, outputs)."""
    return node.op_type != "Conv" and not attribute(node, "transB", 0)


def as_rows(values: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    """Weights as (groups, outputs of a group, inputs)."""
    if is_transposed(node):
        values = values.T
    groups = attribute(node, "group", 1)
    return values.reshape(groups, len(values) // groups, -1)


def attribute(node: onnx.NodeProto, name: str, default):  # type: ignore[no-untyped-def]
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return found.get(name, default)


def round_rows(
    rows: np.ndarray, hessian: np.ndarray, scale: np.ndarray, largest: int
) -> np.ndarray:
    """Weights (groups, outputs, inputs) as integers, by H (groups, inputs, inputs) and scales
    (groups, outputs)."""
    left = rows.astype(np.float64)  # what is still to be rounded, corrected
    count = left.shape[2]
    diagonal = np.einsum("gii->gi", hessian)
    damping = DAMPING * diagonal.mean(axis=1, keepdims=True)
    damping = np.where(damping > 0, damping, 1)  # a group that reads nothing but 0
    inverse = np.linalg.inv(hessian + damping[..., None] * np.eye(count))
    upper = np.linalg.cholesky(inverse).transpose(0, 2, 1)
    integers = np.zeros_like(left)
    for start in range(0, count, BLOCK):
        end = min(start + BLOCK, count)
        errors = np.zeros((*left.shape[:2], end - start))
        for i in range(start, end):
            integers[..., i] = np.clip(np.rint(left[..., i] / scale), -largest, largest)
            error = (left[..., i] - integers[..., i] * scale) / upper[:, i, i, None]
            left[..., i + 1 : end] -= error[..., None] * upper[:, None, i, i + 1 : end]
            errors[..., i - start] = error
        left[..., end:] -= errors @ upper[:, start:end, end:]
    return integers


def measure_inputs(
    model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], images: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """H of each layer by its name: (groups, inputs, inputs) float64."""
    names = sorted({layer.input[0] for layer in layers} - {INPUT})
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    shown.graph.output.extend(infos)
    session = open_session(shown.SerializeToString())
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(images), BATCH):
        values = {INPUT: np.stack(images[start : start + BATCH])}
        if names:
            values |= dict(zip(names, session.run(names, values), strict=True))
        for layer in layers:
            read = inputs_at_places(values[layer.input[0]], layer, shapes[layer.input[1]], rng)
            hessian = read @ read.transpose(0, 2, 1)
            found[layer.name] = found.get(layer.name, 0) + hessian.astype(np.float64)
    return found


def inputs_at_places(
    value: np.ndarray, layer: onnx.NodeProto, shape: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """What a layer reads of some images, a convolution at PLACES drawn ones of each: (groups,
    inputs, all places) float32. `shape` is that of its weights."""
    if layer.op_type != "Conv":
        return value.reshape(1, len(value), -1).transpose(0, 2, 1)
    ones = [1, 1]
    strides, dilations = (attribute(layer, name, ones) for name in ("strides", "dilations"))
    span = [(k - 1) * d + 1 for k, d in zip(shape[2:], dilations, strict=True)]
    pads = attribute(layer, "pads", [0, 0, 0, 0])
    if attribute(layer, "auto_pad", b"NOTSET") == b"SAME_UPPER":  # of --dynamic_size
        sizes = zip(value.shape[2:], strides, span, strict=True)
        both = [max((-(-n // stride) - 1) * stride + size - n, 0) for n, stride, size in sizes]
        pads = [n // 2 for n in both] + [n - n // 2 for n in both]
    padded = np.pad(value, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (1, 1, *span))[..., 0, 0, :, :]
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    height, width = windows.shape[2:4]
    places = rng.permutation(height * width)[:PLACES]
    read = windows[:, :, places // width, places % width]  # (N, channels, places, kernel's sides)
    groups, count = attribute(layer, "group", 1), len(value) * len(places)
    return read.transpose(1, 3, 4, 0, 2).reshape(groups, -1, count)
