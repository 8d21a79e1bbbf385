"""Classify images with a snapshot.

python3 of_cnn_inference.py --image_path data/cat.jpg               # the newest snapshot
python3 of_cnn_inference.py --image_path DIRECTORY --model_load_dir=SNAPSHOT --top_k=5
python3 of_cnn_inference.py --help
"""

import oneflow_setup  # noqa: F401  (first, see there)

import sys
from argparse import Namespace

import numpy as np

import checkpoint_util
import config
import graph_util
import image_util
import model_util
from config import RunError, UsageError
from layer_util import Switches
from metric_util import notice


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = graph_util.choose_device(args.device)
    for text in config.check_precision_flags(args, device=device):
        notice(text)
    paths = image_util.find_images(args.image_path)
    model, snapshot, snapshot_path = checkpoint_util.restore(
        args.model_load_dir,
        model=args.model,
        num_classes=args.num_classes,
        switches=Switches(**config.switch_flags(args)),
        **config.preprocessing_flags(args),
    )
    notice(f"Restoring model from {snapshot_path}.")
    names = image_util.class_names(snapshot.num_classes, snapshot.classes)
    predictor = graph_util.Predictor(
        graph_util.place(model, device), device=device, use_fp16=args.use_fp16
    )
    failures = 0
    for path in paths:
        try:
            image = image_util.load_image(path, snapshot.preprocessing)  # (3, H, W) float32
        except RunError as error:
            if len(paths) == 1:
                raise
            config.report(error)
            failures += 1
            continue
        print_result(path, predictor(image[None])[0], names, top_k=args.top_k)
    if failures:
        raise RunError(f"{failures} of {len(paths)} files could not be read; see above")


def parse_args(argv: list[str] | None) -> Namespace:
    args = config.inference_parser(models=model_util.MODELS).parse_args(argv)
    if config.num_processes(args) > 1:
        raise UsageError(
            "--num_nodes and --gpu_num_per_node: classifying runs on one device; leave them out"
        )
    return args


def print_result(path: str, probabilities: np.ndarray, names: list[str], *, top_k: int) -> None:
    """The path, then the `top_k` most probable classes, one `probability name` a line."""
    print(path)
    for i in np.argsort(-probabilities, kind="stable")[:top_k]:
        print(probabilities[i], names[i], flush=True)


if __name__ == "__main__":
    sys.exit(config.run_main(main))
