"""Measure this toolkit on this machine; prints JSON.

python3 tools/benchmark.py
python3 tools/benchmark.py --train_data_dir=data/imagenet/ofrecord/train
"""

import json
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import oneflow_setup  # noqa: F401  (first, see there)

from oneflow import nn

import checkpoint_util
import config
import graph_util
import model_util
import of_cnn_train_val as script
import ofrecord_util
from config import Parser, UsageError, number
from metric_util import Meter


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = graph_util.choose_device(args.device)
    report = {"date": date.today().isoformat(), "machine": describe_machine(device)}
    if args.train_data_dir is not None:
        report["loader"] = benchmark_loader(args, device)
    else:
        report["training_loop"] = benchmark_training_loop(args, device)
    print(json.dumps(report, indent=2))


def make_parser() -> Parser:
    parser = Parser(
        "Measure the training script's own loop on synthetic data against a bare loop over the "
        "same graph, or, with --train_data_dir, the loader alone. Prints JSON."
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where")
    parser.add_argument(
        "--model", choices=sorted(model_util.MODELS), default="resnet50", help="network"
    )
    parser.add_argument(
        "--image_size", type=number(int, 8), default=64, help="height and width, pixels"
    )
    parser.add_argument(
        "--batch_size_per_device", type=number(int, 1), default=8, help="images in a step"
    )
    parser.add_argument("--steps", type=number(int, 1), default=20, help="steps in a round")
    parser.add_argument(
        "--rounds",
        type=number(int, 1),
        default=5,
        help="rounds of each kind, taken by turns; the median counts",
    )
    parser.add_argument("--train_data_dir", help="OFRecord parts: measure their loader alone")
    return parser


def describe_machine(device: str) -> dict:
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        processor = names[0] if names else processor
    except OSError:
        pass  # not Linux: the platform's own word has to do
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        **checkpoint_util.versions(),
    }


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def benchmark_training_loop(args: Namespace, device: str) -> dict:
    """samples/s of `of_cnn_train_val.train_epoch` and of a loop that calls the same graph."""
    train_args = script.parse_args(
        [
            f"--device={device}",
            f"--model={args.model}",
            f"--image_size={args.image_size}",
            f"--batch_size_per_device={args.batch_size_per_device}",
            "--loss_print_every_n_iter=10",
            "--warmup_epochs=0",
            f"--num_examples={args.steps * args.batch_size_per_device}",
        ]
    )
    config.finish_train_args(train_args, device=device)
    plan = script.make_plan(train_args, None)
    snapshot = script.describe_run(train_args, None, None)
    model = graph_util.place(script.build_model(train_args, snapshot), device)
    model.train()
    graph, batches = script.build_training(
        train_args, None, model, snapshot, plan, device, lambda line: None
    )
    meter = Meter(args.batch_size_per_device)

    def own_loop():
        script.train_epoch(
            train_args, 1, graph, batches, plan, meter, lambda line: print(line, file=sink)
        )

    def bare_loop():
        for _ in range(args.steps):
            outputs = graph(*next(batches))
        outputs[0].numpy()  # waits for all steps

    with open(os.devnull, "w") as sink:
        bare_loop()  # compiles, and warms up
        seconds = {"own": [], "bare": []}
        for _ in range(args.rounds):
            seconds["own"].append(timed(own_loop))
            seconds["bare"].append(timed(bare_loop))
    samples = args.steps * args.batch_size_per_device
    own, bare = (samples / statistics.median(seconds[kind]) for kind in ("own", "bare"))
    pairs = zip(seconds["own"], seconds["bare"], strict=True)
    return {
        "model": args.model,
        "image_size": args.image_size,
        "batch_size_per_device": args.batch_size_per_device,
        "steps": args.steps,
        "rounds": args.rounds,
        "own_loop_samples_per_second": round(own, 3),
        "bare_loop_samples_per_second": round(bare, 3),
        # Of neighbours in time, so that a busy machine slows both.
        "own_to_bare": round(statistics.median(b / a for a, b in pairs), 4),
    }


class LoaderGraph(nn.Graph):
    """What a training graph does before the network."""

    def __init__(self, loader: nn.Module):
        super().__init__()
        self.loader = loader

    def build(self):
        image, label = self.loader()
        return image.mean(), label


def benchmark_loader(args: Namespace, device: str) -> dict:
    """images/s of reading, decoding and augmenting OFRecord parts, without a network."""
    if args.train_data_dir.endswith(".npz"):
        raise UsageError(f"--train_data_dir={args.train_data_dir}: a directory of parts is needed")
    data = ofrecord_util.open_train_dataset(args.train_data_dir)
    loader = ofrecord_util.train_loader(
        data,
        batch_size=args.batch_size_per_device,
        preprocessing=model_util.preprocessing(args.model, image_size=args.image_size),
        augmentation=ofrecord_util.Augmentation(),
        seed=0,
        device=device,
    )
    graph = LoaderGraph(loader)

    def load():
        for _ in range(args.steps):
            outputs = graph()
        outputs[0].numpy()

    load()
    seconds = [timed(load) for _ in range(args.rounds)]
    return {
        "train_data_dir": args.train_data_dir,
        "num_examples": data.num_examples,
        "image_size": args.image_size,
        "batch_size_per_device": args.batch_size_per_device,
        "steps": args.steps,
        "rounds": args.rounds,
        "images_per_second": round(
            args.steps * args.batch_size_per_device / statistics.median(seconds), 1
        ),
    }


if __name__ == "__main__":
    sys.exit(config.run_main(main))
