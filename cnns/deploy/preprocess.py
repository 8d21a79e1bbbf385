"""Exported graphs that take pictures, and give probabilities.

`add_preprocessing` puts in front of `images` what cnns.data.images does to a picture: its shorter
side is resized, the centre is cut out, the levels are normalised. The input is then

    pictures  (batch, height, width, 3) uint8, RGB, of any height and width

ONNX's Resize with antialiasing filters as Pillow does, and ONNX Runtime rounds to whole levels
after each direction, as Pillow does. Sizes are the same to the pixel, levels nearly: see TOLERANCE.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cnns.data.images import Preprocessing, center_crop
from cnns.deploy.quantise import opset_of
from cnns.errors import UsageError
from cnns.export import (
    HEIGHT,
    INPUT,
    OUTPUT,
    PICTURES,
    PROBABILITIES,
    WIDTH,
    open_session,
)

OPSET = 18  # the first with antialiasing in Resize
MODES = {"bilinear": ("linear", None), "bicubic": ("cubic", -0.5)}  # with Pillow's coefficient


@dataclass(frozen=True)
class Difference:
    """Between the pixels of two ways to prepare pictures, in levels of 0 to 255."""

    mean: float
    largest: float
    over_one: float  # share of the pixels that differ by more than one level

    @property
    def is_small(self) -> bool:
        return (
            self.mean <= TOLERANCE.mean
            and self.largest <= TOLERANCE.largest
            and self.over_one <= TOLERANCE.over_one
        )

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.4f}, largest {self.largest:.3g} levels of 255, {self.over_one:.2%} "
            "of the pixels by more than one level"
        )


TOLERANCE = Difference(mean=0.05, largest=3, over_one=0.001)


def add_preprocessing(model: onnx.ModelProto, preprocessing: Preprocessing) -> None:
    """Make a graph that takes `images` take `pictures`.

    Raises UsageError where the opset is too old, or the crop is larger than what is resized.
    """
    opset = opset_of(model)
    if opset < OPSET:
        raise UsageError(f"--preprocess needs --opset={OPSET} or more, not {opset}")
    if preprocessing.resize_shorter < preprocessing.image_size:
        raise UsageError(
            f"--preprocess: the crop of {preprocessing.image_size} pixels is larger than the "
            f"shorter side that it is cut from, {preprocessing.resize_shorter}"
        )
    graph = model.graph
    nodes, constants = preprocessing_nodes(preprocessing)
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    graph.initializer.extend(constants)
    del graph.input[:]
    shape = ["batch", HEIGHT, WIDTH, 3]
    graph.input.append(helper.make_tensor_value_info(PICTURES, TensorProto.UINT8, shape))
    model.ir_version = max(model.ir_version, 8)


def preprocessing_nodes(
    preprocessing: Preprocessing,
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """From `pictures` to `images`."""
    mode, coefficient = MODES[preprocessing.interpolation]
    size = preprocessing.image_size
    constants = {
        "shorter": np.array(preprocessing.resize_shorter, np.float64),
        "crop": np.array([size, size], np.int64),
        "two": np.array(2, np.int64),
        "sides": np.array([1, 2], np.int64),
        "mean": np.array(preprocessing.rgb_mean, np.float32),
        "std": np.array(preprocessing.rgb_std, np.float32),
    }
    more = {} if coefficient is None else {"cubic_coeff_a": coefficient}
    steps: list[tuple[str, Sequence[str], str, dict]] = [
        # Of height and width: resize_shorter over the smaller, as a double, as Python computes it.
        ("Shape", [PICTURES], "held", {"start": 1, "end": 3}),
        ("Cast", ["held"], "held_real", {"to": TensorProto.DOUBLE}),
        ("ReduceMin", ["held_real"], "smaller", {"keepdims": 0}),
        ("Div", ["shorter", "smaller"], "scale", {}),
        ("Mul", ["held_real", "scale"], "wanted_real", {}),
        ("Round", ["wanted_real"], "wanted_round", {}),  # half to even, as Python does
        ("Cast", ["wanted_round"], "wanted", {"to": TensorProto.INT64}),
        (
            "Resize",
            [PICTURES, "", "", "wanted"],
            "resized",
            {"mode": mode, "antialias": 1, "exclude_outside": 1, "axes": [1, 2]}
            | {"coordinate_transformation_mode": "half_pixel"}
            | more,
        ),
        ("Sub", ["wanted", "crop"], "rest", {}),
        ("Div", ["rest", "two"], "start", {}),
        ("Add", ["start", "crop"], "end", {}),
        ("Slice", ["resized", "start", "end", "sides"], "centre", {}),
        ("Cast", ["centre"], "levels", {"to": TensorProto.FLOAT}),
        ("Sub", ["levels", "mean"], "centred", {}),
        ("Div", ["centred", "std"], "normalised", {}),
        ("Transpose", ["normalised"], INPUT, {"perm": [0, 3, 1, 2]}),
    ]
    own = {*constants} | {result for _, _, result, _ in steps} - {INPUT}

    def full(name: str) -> str:
        return f"preprocess/{name}" if name in own else name

    nodes = [
        helper.make_node(kind, [full(n) for n in names], [full(result)], full(result), **settings)
        for kind, names, result, settings in steps
    ]
    return nodes, [numpy_helper.from_array(v, full(name)) for name, v in constants.items()]


def add_softmax(model: onnx.ModelProto) -> None:
    """Make a graph that gives `logits` give `probabilities`."""
    graph = model.graph
    shape = [dim.dim_param or dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim]
    graph.node.append(helper.make_node("Softmax", [OUTPUT], [PROBABILITIES], "softmax", axis=1))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, shape))


def preprocessing_alone(preprocessing: Preprocessing) -> onnx.ModelProto:
    """A graph from `pictures` to `images`, with nothing behind."""
    size = preprocessing.image_size
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, size, size])
    graph = helper.make_graph([], "preprocessing", [images], [images])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    add_preprocessing(model, preprocessing)
    return model


def compare_pixels(
    model: onnx.ModelProto, preprocessing: Preprocessing, pictures: Iterable[Image.Image]
) -> Difference:
    """What `preprocessing_alone` makes of RGB pictures against what of_cnn_inference.py does."""
    session = open_session(model.SerializeToString())
    std = np.asarray(preprocessing.rgb_std, np.float32)
    mean = np.asarray(preprocessing.rgb_mean, np.float32)
    differences = []
    for picture in pictures:
        (theirs,) = session.run([INPUT], {PICTURES: np.asarray(picture)[None]})
        ours = center_crop(
            picture,
            resize_shorter=preprocessing.resize_shorter,
            size=preprocessing.image_size,
            interpolation=preprocessing.interpolation,
        )
        levels = theirs[0].transpose(1, 2, 0) * std + mean
        differences.append(np.abs(levels - ours).ravel())
    levels = np.concatenate(differences)
    return Difference(float(levels.mean()), float(levels.max()), float((levels > 1.01).mean()))
