"""Smaller exported files: 8-bit integers, and half precision.

int8: onnxruntime.quantization, static, QDQ; activations are unsigned bytes with a zero point of
their own, weights signed, a scale for each output channel. ONNX Runtime makes one integer
convolution of each convolution with its batch norm, which oneflow-onnx has folded, and its ReLU.
Weights have 7 bits: the instruction that adds pairs of products on processors without VNNI (AVX2,
AVX-512) saturates with 8, so that answers would depend on the processor. They are rounded so that
the layers' outputs change least (rounding.py), which is worth more than the eighth bit. Activations
that are signed as well would leave a third of the convolutions of EfficientNet-Lite0 in float32.

fp16: weights and arithmetic in half precision, `images` and `logits` stay float32.
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from cnns.deploy.rounding import attribute, round_to_inputs, weight_makers
from cnns.errors import RunError
from cnns.export import INPUT, OUTPUT, open_session

INT8_OPSET = 13  # the first with a scale for each channel
MAX_WEIGHT = 64  # of 7 bits; onnxruntime.quantization takes both ends of the range
MAX_HALF = 65504


class Reader(CalibrationDataReader):
    """Calibration images, one at a time."""

    def __init__(self, images: Iterable[np.ndarray]):
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {INPUT: image[None]}


def opset_of(model: onnx.ModelProto) -> int:
    return next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


def copy(model: onnx.ModelProto, *, at_least: int = 0) -> onnx.ModelProto:
    """A model of its own, of a version of ONNX's operators that is new enough."""
    if opset_of(model) < at_least:
        return version_converter.convert_version(model, at_least)
    return onnx.ModelProto.FromString(model.SerializeToString())


def to_int8(model: onnx.ModelProto, images: Sequence[np.ndarray]) -> onnx.ModelProto:
    """The network in 8-bit integers; `images` (3, H, W) float32, normalised, show what ranges its
    tensors have, and how its weights are best rounded.

    Raises RunError where ONNX Runtime cannot make it.
    """
    # A copy in any case: quantize_static moves the weights of what it is given to a file.
    model = copy(model, at_least=INT8_OPSET)
    exact = copy(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = os.path.join(folder, "int8.onnx")
        try:
            quantize_static(
                model,
                path,
                Reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:  # of any kind, for what it does not know
            raise RunError(
                f"onnxruntime.quantization cannot make int8 of the network: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from None
        quantised = onnx.load(path)
    helper.set_model_props(quantised, metadata)  # without what its tools add
    remove_unused(quantised.graph)
    round_to_inputs(quantised, exact, images, largest=MAX_WEIGHT)
    return quantised


def remove_unused(graph: onnx.GraphProto) -> None:
    """Drop constants that nothing uses: bounds of a ReLU6 that became part of a convolution."""
    used = {each for node in graph.node for each in node.input}
    nodes = [n for n in graph.node if n.op_type != "Constant" or n.output[0] in used]
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in half precision, its input and output in float32.

    Raises RunError where a weight is too large for that.
    """
    model = copy(model)
    graph = model.graph
    for tensor in (*graph.initializer, *constant_tensors(graph)):
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if (np.abs(values[np.isfinite(values)]) > MAX_HALF).any():
                raise RunError(f"{tensor.name} has weights above {MAX_HALF}, too large for fp16")
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    del graph.value_info[:]  # they say float32
    names = {INPUT: f"{INPUT}/half", OUTPUT: f"{OUTPUT}/half"}
    for node in graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
        node.output[:] = [names.get(each, each) for each in node.output]
    first = helper.make_node("Cast", [INPUT], [names[INPUT]], "to_half", to=TensorProto.FLOAT16)
    last = helper.make_node("Cast", [names[OUTPUT]], [OUTPUT], "to_float", to=TensorProto.FLOAT)
    nodes = [first, *graph.node, last]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def constant_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """The values of nodes that are constants."""
    return [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice of the converters, which is about what they are not asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# Which layers lose most.


def layer_errors(
    model: onnx.ModelProto, quantised: onnx.ModelProto, images: np.ndarray
) -> list[tuple[str, float]]:
    """Layers by what the logits of `images` (N, 3, H, W) change if that layer alone is in int8.

    The change is the root of the mean square, relative to the spread of the logits in float32.
    The worst comes first.
    """
    float_logits = run(model, images)
    spread = float(float_logits.std()) or 1.0
    ranges, weights = activation_ranges(quantised), rounded_weights(quantised)
    errors = []
    for name, weight in weights.items():
        # As it is: ONNX Runtime would round float32 weights between integers once more.
        changed = run(with_one_layer(model, name, weight, ranges), images, as_it_is=True)
        changed -= float_logits
        errors.append((name, float(np.sqrt(np.square(changed).mean())) / spread))
    return sorted(errors, key=lambda each: -each[1])


def run(model: onnx.ModelProto, images: np.ndarray, *, as_it_is: bool = False) -> np.ndarray:
    session = open_session(model.SerializeToString(), as_it_is=as_it_is)
    return session.run([OUTPUT], {INPUT: images})[0]


def rounded_weights(quantised: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights that the integers of each layer stand for, in float32."""
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    found = {}
    for name, maker in weight_makers(quantised).items():
        integers, scale = (held[each] for each in maker.input[:2])
        axis = attribute(maker, "axis", 1)
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
        found[name] = integers * (scale.reshape(shape) if scale.ndim else scale)
    return found


def activation_ranges(quantised: onnx.ModelProto) -> dict[str, tuple[onnx.TensorProto, ...]]:
    """Scale and zero point of each tensor that is quantised while the network computes."""
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    return {
        node.input[0]: (constants[node.input[1]], constants[node.input[2]])
        for node in quantised.graph.node
        if node.op_type == "QuantizeLinear"
    }


def with_one_layer(
    model: onnx.ModelProto,
    name: str,
    weight: np.ndarray,
    ranges: dict[str, tuple[onnx.TensorProto, ...]],
) -> onnx.ModelProto:
    """The network in float32, with the weights, the input and the output of one layer rounded as
    in int8."""
    model = copy(model, at_least=INT8_OPSET)
    graph = model.graph
    layer = next(node for node in graph.node if node.name == name)
    rounded = numpy_helper.from_array(weight.astype(np.float32), f"{name}/rounded")
    graph.initializer.append(rounded)
    layer.input[1] = rounded.name
    followers = {each: node for node in graph.node for each in node.input}
    result = layer.output[0]
    while result not in ranges and result in followers:  # a ReLU, or the bias of a MatMul
        result = followers[result].output[0]
    for tensor in {layer.input[0], result} & set(ranges):
        round_tensor(graph, tensor, ranges[tensor])
    return model


def round_tensor(graph: onnx.GraphProto, tensor: str, how: tuple[onnx.TensorProto, ...]) -> None:
    """Put a rounding to 8 bits behind a tensor, in front of all that use it."""
    scale, zero = (onnx.TensorProto.FromString(each.SerializeToString()) for each in how)
    scale.name, zero.name = f"{tensor}/scale", f"{tensor}/zero"
    graph.initializer.extend([scale, zero])
    for node in graph.node:
        node.input[:] = [f"{tensor}/real" if each == tensor else each for each in node.input]
    places = [i for i, node in enumerate(graph.node) if tensor in node.output]
    pair = [
        helper.make_node("QuantizeLinear", [tensor, scale.name, zero.name], [f"{tensor}/integer"]),
        helper.make_node(
            "DequantizeLinear", [f"{tensor}/integer", scale.name, zero.name], [f"{tensor}/real"]
        ),
    ]
    at = places[0] + 1 if places else 0
    nodes = list(graph.node)
    nodes[at:at] = pair
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.output:
        if value.name == tensor:  # the logits: what is rounded gets their name
            swap(graph, tensor)


def swap(graph: onnx.GraphProto, tensor: str) -> None:
    """Give the name of an output to its rounded values."""
    names = {tensor: f"{tensor}/exact", f"{tensor}/real": tensor}
    for node in graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
        node.output[:] = [names.get(each, each) for each in node.output]
