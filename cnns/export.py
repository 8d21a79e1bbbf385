"""Exported files: what they say of themselves, and how they are run. Nothing here needs OneFlow.

A file of resnet_to_onnx.py takes `images` (batch, 3, H, W) float32, RGB, normalised, and gives
`logits` (batch, classes) float32, before softmax. Its metadata are texts, each of them JSON:

    format_version  1
    model           name in the table of models
    snapshot        name of the snapshot that it was made from
    classes         names of the classes, in the order of the logits
    image_size, resize_shorter, rgb_mean, rgb_std, interpolation   of cnns.data.images.Preprocessing
"""

import json
import os

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from cnns.data.images import Preprocessing, read_preprocessing
from cnns.errors import RunError, UsageError
from cnns.places import ONNX_ROOT

INPUT, OUTPUT = "images", "logits"
FORMAT_VERSION = 1
DATA_SUFFIX = ".data"  # of the file with the weights, where they are kept apart
ERRORS = (
    native.EPFail,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.ModelLoaded,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
)


def find_export(path: str | None) -> str:
    """The file to read: the one named, else the newest in ONNX_ROOT.

    Raises UsageError where there is none.
    """
    if path is not None:
        if not os.path.isfile(path):
            raise UsageError(f"--onnx_path: there is no file {path}; check the path")
        return path
    held = os.listdir(ONNX_ROOT) if os.path.isdir(ONNX_ROOT) else []
    found = [
        os.path.join(ONNX_ROOT, name)
        for name in held
        if name.endswith(".onnx") and not name.startswith(".")
    ]
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UsageError(
            f"no exported file in {ONNX_ROOT}: make one first (python3 resnet_to_onnx.py), or name "
            "one with --onnx_path"
        )
    return max(found, key=lambda path: (os.stat(path).st_mtime_ns, path))


def describe(
    *, model: str, snapshot: str, classes: list[str], preprocessing: Preprocessing
) -> dict[str, str]:
    """The metadata of a file."""
    held = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "snapshot": snapshot,
        "classes": classes,
        **vars(preprocessing),
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in held.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) to probabilities along C."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class ExportedModel:
    """A file of resnet_to_onnx.py, ready to run on the CPU.

    Raises RunError where it is damaged, or was made by something else.
    """

    def __init__(self, path: str):
        self.path = path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is raised
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            self.read_metadata(self.session.get_modelmeta().custom_metadata_map)
            self.check_ends()
        except ERRORS as error:
            raise RunError(f"ONNX Runtime cannot read {path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{path} is not a file of resnet_to_onnx.py, or a damaged one "
                f"({type(error).__name__}: {error})"
            ) from None

    def read_metadata(self, texts: dict[str, str]) -> None:
        about = {name: json.loads(text) for name, text in texts.items()}
        if about["format_version"] != FORMAT_VERSION:
            raise RunError(
                f"{self.path} is of format {about['format_version']}, and this version reads "
                f"{FORMAT_VERSION}; export it again"
            )
        self.model = about["model"]
        self.classes = tuple(about["classes"])
        if not all(isinstance(name, str) for name in self.classes):
            raise TypeError("classes that are no texts")
        self.preprocessing = read_preprocessing(about)

    def check_ends(self) -> None:
        """Raise ValueError where input and output are not as the metadata say."""
        size = self.preprocessing.image_size
        found = [
            (value.name, value.type, value.shape[1:])
            for value in (*self.session.get_inputs(), *self.session.get_outputs())
        ]
        needed = [
            (INPUT, "tensor(float)", [3, size, size]),
            (OUTPUT, "tensor(float)", [self.num_classes]),
        ]
        if found != needed:
            raise ValueError(f"it has {found} for {needed}")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32, normalised, to (N, C) float32. Raises RunError."""
        try:
            return self.session.run([OUTPUT], {INPUT: images})[0]
        except ERRORS as error:
            raise RunError(f"ONNX Runtime cannot run {self.path}: {error}") from None

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        return softmax(self.logits(images))
