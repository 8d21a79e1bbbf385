"""What tools/benchmark.py --inference and --against=onnxruntime measure: exported networks."""

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from oneflow import nn

import model_registry
import ofrecord_util
import resnet_to_onnx
from cnns.checkpoint.snapshot import Snapshot
from cnns.data.datasets import open_val_dataset
from cnns.data.images import find_images, load_image
from cnns.deploy.quantise import to_int8
from cnns.distributed import place
from cnns.evaluation import ArrayEvaluator
from cnns.export import ExportedModel
from cnns.graphs import Predictor
from cnns.models.layers import Switches
from tools.against import start_peer
from tools.photographs import draw_imagenet, write_photographs
from tools.timing import SIZES, asked, by_turns, compare, print_table, timed

CALIBRATED = 4  # photographs whose ranges int8 has; its speed does not depend on them


def export(args: Namespace) -> tuple[nn.Module, onnx.ModelProto]:
    """A network with random weights for --image_size, and what is exported of it."""
    model, classes = model_registry.MODELS[args.model], 1000
    network = model.build(classes, Switches())
    preprocessing = model.preprocessing(image_size=args.image_size)
    snapshot = Snapshot(args.model, classes, preprocessing)
    reference = resnet_to_onnx.Reference(network)
    return network, resnet_to_onnx.convert(reference, snapshot, "random", opset=12)


@contextmanager
def predictors(
    args: Namespace, device: str
) -> Iterator[tuple[dict[str, Callable[[np.ndarray], object]], np.ndarray]]:
    """The same network, with random weights, by both backends, and images (N, 3, H, W) for them."""
    network, exported = export(args)
    shape = (args.batch_size_per_device, 3, args.image_size, args.image_size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "network.onnx")
        resnet_to_onnx.write(exported, path, external_data=False)
        oneflow = Predictor(place(network, device), device=device)
        yield {"oneflow": oneflow, "onnxruntime": ExportedModel(path).probabilities}, images


def benchmark_inference(args: Namespace, device: str) -> dict:
    """Milliseconds per image of the same network by both backends.

    Without reading and resizing the images.
    """
    with predictors(args, device) as (backends, images):

        def repeat(predict: Callable[[np.ndarray], object]) -> Callable[[], object]:
            predict(images)  # compiles, and warms up
            return lambda: [predict(images) for _ in range(args.steps)]

        (oneflow, onnx), ratio = by_turns(args.rounds, *map(repeat, backends.values()))
    milliseconds = 1000 / (args.steps * len(images))
    return asked(args, *SIZES) | {
        "onnxruntime": onnxruntime.__version__,
        "oneflow_milliseconds_per_image": round(oneflow * milliseconds, 2),
        "onnxruntime_milliseconds_per_image": round(onnx * milliseconds, 2),
        "onnxruntime_times_as_fast": round(ratio, 2),
    }


def against_onnxruntime(args: Namespace, device: str) -> dict:
    """images/s of of_cnn_evaluate.py --backend=onnxruntime, from OFRecord parts of JPEGs to hits.

    Beside it are ONNX Runtime on the float32 file with its input ready in memory, and a plain
    script that reads the same JPEGs with Pillow, one after the other.
    """
    preprocessing = model_registry.MODELS[args.model].preprocessing(image_size=args.image_size)
    count = args.steps * args.batch_size_per_device
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(draw_imagenet(count), root, num_parts=1)
        paths = {name: str(root / f"{name}.onnx") for name in ("float32", "int8")}
        model = export(args)[1]
        resnet_to_onnx.write(model, paths["float32"], external_data=False)
        files = find_images([str(root / "files")])[:CALIBRATED]
        calibration = [load_image(str(path), preprocessing) for path in files]
        resnet_to_onnx.write(to_int8(model, calibration), paths["int8"], external_data=False)

        def evaluate(precision: str) -> Callable[[], float]:
            loader = ofrecord_util.val_loader(
                open_val_dataset(str(root / "parts")),
                batch_size=args.batch_size_per_device,
                preprocessing=preprocessing,
                device=device,
            )
            evaluator = ArrayEvaluator(ExportedModel(paths[precision]).logits, loader, top_k=5)
            return lambda: timed(evaluator.round)

        ours = {precision: evaluate(precision) for precision in paths}
        sizes = args.batch_size_per_device, preprocessing.resize_shorter, args.image_size
        with start_peer(
            "onnxruntime", args.peer_python, paths["float32"], str(root / "files"), *sizes
        ) as peer:
            sides = {
                "input ready": partial(peer.seconds, "ready", args.steps),
                "plain script": partial(peer.seconds, "photographs", args.steps),
            }
            report = compare(
                args.rounds,
                {
                    "float32": {"ours": ours["float32"]} | sides,
                    "int8": {"ours": ours["int8"], "ours, float32": ours["float32"]} | sides,
                },
                count,
            )
            versions = {"ours": onnxruntime.__version__, "peer": peer.about["version"]}
    print_table(report)
    return asked(args, *SIZES) | {"onnxruntime": versions} | report
