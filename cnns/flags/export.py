"""Flags of an export: the file, and what it can be made into for deployment."""

from cnns.flags.parser import Flag
from cnns.flags.values import COUNT, number, onnx_path, path
from cnns.places import ONNX_ROOT

OPSETS = (9, 21)  # lowest and highest that resnet_to_onnx.py writes
OPSET = 12  # unless something else needs a later one
PRECISIONS = ("float32", "fp16", "int8")
SMALLER = PRECISIONS[1:]
CALIBRATION_IMAGES = 128
MAX_DROP = 0.5  # points
EXPORT_FLAGS = {
    "onnx_path": Flag(
        "file to write; an existing one is replaced after the new one has passed the comparison",
        onnx_path,
        otherwise=f"{ONNX_ROOT}/<name of the snapshot>.onnx",
    ),
    "opset": Flag(
        f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[1]}",
        number(int, *OPSETS),
        otherwise=f"{OPSET}; 13 with --precision=int8, 18 with --preprocess",
    ),
    "external_data": Flag(
        "put the weights into a second file, <onnx_path>.data, which has to stay beside it",
        default=False,
    ),
    "check_only": Flag("export nothing; compare the file that is there", default=False),
}
GATE_FLAGS = {
    "calibration_dir": Flag(
        "images that the ranges of its integers are taken from: a directory with images "
        "anywhere below, OFRecord parts, or an .npz file",
        path,
        otherwise="the training data of the run",
    ),
    "calibration_images": Flag("how many of them", COUNT, CALIBRATION_IMAGES),
    "val_data_dir": Flag(
        "labelled images that accuracy is measured on before and after: OFRecord parts, an .npz "
        "file, or a folder with one folder of images per class",
        path,
        otherwise="the validation data of the run",
    ),
    "max_drop": Flag(
        "points of top-1 accuracy that a smaller network may lose; one that loses more is not "
        "written",
        number(float, 0, 100),
        MAX_DROP,
    ),
}
# The precisions that each of them belongs to.
NEEDS_DATA = {
    "calibration_dir": ("int8",),
    "calibration_images": ("int8",),
    "val_data_dir": SMALLER,
    "max_drop": SMALLER,
}
VARIANT_FLAGS = {
    "preprocess": Flag(
        "take `pictures` (batch, height, width, 3) uint8, RGB, of any size: resize, centre crop "
        "and normalisation are in the file",
        default=False,
    ),
    "softmax": Flag("give `probabilities` in place of `logits`", default=False),
    "dynamic_size": Flag("take images of any height and width", default=False),
    "precision": Flag(
        "fp16: half the size, input and output float32; int8: a quarter of the size; both have to "
        "pass --max_drop",
        default=PRECISIONS[0],
        choices=PRECISIONS,
    ),
}
