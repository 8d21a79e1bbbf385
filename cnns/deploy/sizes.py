"""Exported graphs that take images of any height and width."""

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from cnns.errors import RunError
from cnns.export import HEIGHT, WIDTH


def free_size(model: onnx.ModelProto) -> None:
    """Make a graph that takes `images` (batch, 3, H, W), H and W numbers, take any H and W.

    oneflow-onnx writes a mean over all pixels as a sum, times one over their number; that becomes
    a mean. It leaves out padding that the size at hand does not need; that becomes what other sizes
    need. The comparison with OneFlow at another size has to prove it.

    Raises RunError where a layer needs a fixed number of pixels.
    """
    graph = model.graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in shape_inference.infer_shapes(model).graph.value_info
    }
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users = {name: node for node in graph.node for name in node.input}
    for node in [node for node in graph.node if node.op_type == "ReduceSum"]:
        scaled = users.get(node.output[0])
        if scaled is None or scaled.op_type != "Mul":
            continue
        factor = next((constants[n] for n in scaled.input if n in constants), None)
        pixels = shapes.get(node.input[0], [])[2:]
        if factor is None or not is_inverse(factor, pixels) or axes_of(node) != [2, 3]:
            continue
        node.op_type, node.output[0] = "ReduceMean", scaled.output[0]
        graph.node.remove(scaled)
    for node in graph.node:
        free_padding(node)
    fixed = [node.name for node in graph.node if is_fixed(node, graph)]
    if fixed:
        raise RunError(
            f"--dynamic_size: {graph.name} needs images of one size: {fixed[0]} takes a fixed "
            "number of pixels"
        )
    dims = graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_param, dims[3].dim_param = HEIGHT, WIDTH


def free_padding(node: onnx.NodeProto) -> None:
    """Make the padding of a layer hold for any size, where it is not the same on both sides.

    A pooling pads as much behind as in front, with nothing that could be a maximum; a convolution
    is one of TensorFlow's, with padding by the size, by the rule that ONNX calls SAME_UPPER.
    """
    pads = next((each for each in node.attribute if each.name == "pads"), None)
    if pads is None or list(pads.ints[:2]) == list(pads.ints[2:]):
        return
    if node.op_type == "MaxPool" and min(pads.ints[:2]) > 0:
        pads.ints[2:] = pads.ints[:2]
    elif node.op_type == "Conv":
        node.attribute.remove(pads)
        node.attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))


def axes_of(node: onnx.NodeProto) -> list[int]:
    """Of a reduction, as it was up to opset 12."""
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    return sorted(axis % 4 for axis in found.get("axes", []))


def is_inverse(factor: onnx.TensorProto, pixels: list[int]) -> bool:
    """Whether a constant is one over a number of pixels."""
    value = numpy_helper.to_array(factor)
    return value.size == 1 and len(pixels) == 2 and np.isclose(value.item() * np.prod(pixels), 1)


def is_fixed(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether a layer has a number of pixels in it: slices, which adaptive pooling is made of, and
    reshapes to a number of features."""
    if node.op_type == "Slice":
        return True
    if node.op_type != "Reshape":
        return False
    shape = next((t for t in graph.initializer if t.name == node.input[1]), None)
    return shape is not None and all(each != -1 for each in numpy_helper.to_array(shape)[1:])
