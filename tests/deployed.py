"""A deployed folder with a network of a few bytes, for tests of its programs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cnns.data.images import Preprocessing
from cnns.export import describe
from small import ROOT

TEMPLATE = ROOT / "cnns" / "deploy" / "template"
CLASSES = ["red", "green", "blue"]
PREPROCESSING = Preprocessing(16, 18, (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))


def network(size: int = 16) -> onnx.ModelProto:
    """Twice the mean of each colour."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["mean"], "mean"),
            helper.make_node("Flatten", ["mean"], ["flat"], "flat"),
            helper.make_node("MatMul", ["flat", "weight"], ["logits"], "fc"),
        ],
        "graph",
        [value("images", TensorProto.FLOAT, ["batch", 3, size, size])],
        [value("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(2 * np.eye(3, dtype=np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    about = describe(
        model="tiny", snapshot="snapshot_best", classes=CLASSES, preprocessing=PREPROCESSING
    )
    # As other tools add it: not JSON.
    helper.set_model_props(model, about | {"onnx.infer": "onnxruntime.quant", "author": "{x"})
    return model


def make_folder(folder: Path) -> Path:
    """As tools/deploy.py writes one, without a card."""
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__*"))
    onnx.save(network(), str(folder / "model.onnx"))
    about = {"default": "model.onnx", "classes": CLASSES, **vars(PREPROCESSING)}
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def environment() -> dict[str, str]:
    """Without anything of this repository."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def predict(folder: Path, *argv: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, str(folder / "predict.py"), *argv],
        cwd=folder.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def solid(colour: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)
