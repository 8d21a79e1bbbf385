"""What an exported network is made into: smaller ones that have passed the gate, and files that
take pictures."""

import json
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from cnns.data.images import Preprocessing
from cnns.deploy.gate import FLOAT32, Score, refusal, score
from cnns.deploy.pictures import Pictures, calibration_pictures, validation_pictures
from cnns.deploy.preprocess import (
    OPSET,
    Difference,
    add_preprocessing,
    add_softmax,
    compare_pixels,
    preprocessing_alone,
)
from cnns.deploy.quantise import INT8_OPSET, layer_errors, to_fp16, to_int8
from cnns.errors import RunError, UsageError
from cnns.log import notice

COMPARED = 16  # pictures whose pixels are compared
LAYER_IMAGES = 16  # for the layers that lose most


@dataclass(frozen=True)
class Data:
    """What a smaller network is calibrated and scored on."""

    calibration: Pictures | None
    validation: Pictures
    max_drop: float
    calibration_images: int

    def chosen(self) -> Pictures:
        """The images that ranges are taken from."""
        assert self.calibration is not None
        return self.calibration.part(self.calibration.choose(self.calibration_images))


def open_data(
    *,
    precisions: tuple[str, ...],
    calibration_dir: str | None,
    calibration_images: int,
    val_data_dir: str | None,
    max_drop: float,
    flags: dict,
    classes: tuple[str, ...] | None,
    num_classes: int,
) -> Data:
    """The pictures of a command, else of the run that left `flags`. Raises UsageError."""
    validation = validation_pictures(
        val_data_dir, flags=flags, classes=classes, num_classes=num_classes
    )
    if validation is None:
        raise UsageError(
            "--val_data_dir is needed: labelled images to measure accuracy on before and after"
        )
    calibration = None
    if "int8" in precisions:
        calibration = calibration_pictures(calibration_dir, flags=flags)
        if calibration is None:
            raise UsageError(
                "--calibration_dir is needed: images of the kind that the network was trained on"
            )
    return Data(calibration, validation, max_drop, calibration_images)


def lowest_opset(*, precision: str, preprocess: bool) -> int:
    """The lowest version of ONNX's operators that can express a file."""
    return OPSET if preprocess else INT8_OPSET if precision == "int8" else 0


def make_smaller(
    model: onnx.ModelProto, precision: str, data: Data, preprocessing: Preprocessing
) -> onnx.ModelProto:
    """The network in a smaller precision; not yet scored."""
    if precision == "fp16":
        smaller = to_fp16(model)
    else:
        chosen = data.chosen()
        images = [chosen.array(i, preprocessing)[0] for i in range(len(chosen))]
        smaller = to_int8(model, images)
    label(smaller, precision)
    return smaller


def label(model: onnx.ModelProto, precision: str) -> None:
    """Write the precision into the metadata."""
    held = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, held | {"precision": json.dumps(precision)})


def explain_refusal(
    model: onnx.ModelProto,
    smaller: onnx.ModelProto,
    precision: str,
    result: Score,
    data: Data,
    preprocessing: Preprocessing,
) -> str:
    """The line for a network that did not pass, with the layers that lose most."""
    layers = []
    if precision == "int8" and result.count:
        notice("Looking for the layers that lose most ...")
        chosen = data.chosen()
        count = min(LAYER_IMAGES, len(chosen))
        images = np.stack([chosen.array(i, preprocessing)[0] for i in range(count)])
        layers = layer_errors(model, smaller, images)
    return refusal(
        precision, result, max_drop=data.max_drop, path=data.validation.path, layers=layers
    )


def gated(
    model: onnx.ModelProto, precision: str, data: Data, preprocessing: Preprocessing
) -> onnx.ModelProto:
    """The network in a smaller precision, which has passed. Raises RunError where it does not."""
    smaller = make_smaller(model, precision, data, preprocessing)
    files = {FLOAT32: model.SerializeToString(), precision: smaller.SerializeToString()}
    result = score(files, data.validation, preprocessing)[precision]
    if not result.passes(data.max_drop):
        raise RunError(explain_refusal(model, smaller, precision, result, data, preprocessing))
    kind = "right" if result.labelled else "as confident answers of float32"
    notice(
        f"{precision}: {result.hits} of {result.count} {kind}, {result.hits_of(result.reference)} "
        f"in float32; the first answer is the same for {result.agreement:.1%}."
    )
    return smaller


def take_pictures(
    model: onnx.ModelProto,
    preprocessing: Preprocessing,
    compared: Pictures,
) -> Difference:
    """Put the preprocessing into a file, and compare it on photographs.

    Raises RunError where it differs by more than the tolerance from what of_cnn_inference.py does.
    """
    add_preprocessing(model, preprocessing)
    numbers = compared.choose(COMPARED)
    difference = compare_pixels(
        preprocessing_alone(preprocessing), preprocessing, (compared.open(i)[0] for i in numbers)
    )
    if not difference.is_small:
        raise RunError(f"--preprocess: the pixels differ by {difference}; nothing was written")
    return difference


def finish(
    model: onnx.ModelProto,
    data: Data | None,
    *,
    precision: str,
    preprocess: bool,
    softmax: bool,
    photographs: Pictures,
    preprocessing: Preprocessing,
) -> onnx.ModelProto:
    """What the flags of deployment make of a network that equals OneFlow's.

    Raises RunError where it loses more than --max_drop, or prepares pictures differently.
    """
    if data is not None:
        model = gated(model, precision, data, preprocessing)
    if preprocess:
        compared = photographs if data is None else data.validation
        difference = take_pictures(model, preprocessing, compared)
        notice(f"Pixels against of_cnn_inference.py's: {difference}.")
    if softmax:
        add_softmax(model)
    return model
