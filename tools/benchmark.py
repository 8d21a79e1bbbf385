"""Measure this toolkit on this machine; prints JSON.

python3 tools/benchmark.py
python3 tools/benchmark.py --model=resnet18 --print_steps=1
python3 tools/benchmark.py --train_data_dir=data/imagenet/ofrecord/train
python3 tools/benchmark.py --conversion --num_workers=2
python3 tools/benchmark.py --inference --image_size=224 --batch_size_per_device=1
python3 tools/benchmark.py --against=torch --peer_python=torch/bin/python
"""

import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (first, see there)

import numpy as np
import onnxruntime

import model_registry
import of_cnn_train_val as script
import ofrecord_util
import resnet_to_onnx
from cnns.checkpoint.snapshot import Snapshot, versions
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.distributed import choose_device, place
from cnns.errors import UsageError, run_main
from cnns.export import ExportedModel
from cnns.flags.parser import Parser, add_switch
from cnns.flags.values import number
from cnns.graphs import Predictor
from cnns.interrupts import exit_on_signals
from cnns.log import limit_run_ahead
from cnns.models.layers import Switches
from cnns.record import Record
from cnns.run import Run
from tools.against import LAYOUTS, Peer, start_peer
from tools.benchmark_conversion import benchmark_conversion
from tools.timing import by_turns, compare, print_table, timed


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    report = {"date": date.today().isoformat(), "machine": describe_machine(device)}
    if args.peer_python is not None and args.against is None:
        raise UsageError("--peer_python has no effect without --against")
    if args.against is not None:
        report["against"] = benchmark_against(args, device)
    elif args.conversion:
        report["conversion"] = benchmark_conversion(args)
    elif args.inference:
        report["inference"] = benchmark_inference(args, device)
    elif args.train_data_dir is not None:
        report["loader"] = benchmark_loader(args, device)
    else:
        report["training_loop"] = benchmark_training_loop(args, device)
    print(json.dumps(report, indent=2))


def make_parser() -> Parser:
    parser = Parser(
        "Measure the training script's own loop on synthetic data against a bare loop over the "
        "same graph, and what the record of a run costs; or, with --train_data_dir, the loader "
        "alone; or, with --conversion, how fast an archive of photographs becomes OFRecord parts, "
        "against a plain copy of its bytes; or, with --inference, how fast a network classifies by "
        "OneFlow and by ONNX Runtime; or, with --against, training and classifying beside "
        "PyTorch, by turns. Prints JSON.",
        doc=__doc__,
        epilog="Read on: docs/measured.md.",
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device")
    parser.add_argument(
        "--model", choices=sorted(model_registry.MODELS), default="resnet50", help="network"
    )
    parser.add_argument(
        "--image_size", type=number(int, 8), default=64, help="height and width, pixels"
    )
    parser.add_argument(
        "--batch_size_per_device", type=number(int, 1), default=8, help="images in a step"
    )
    parser.add_argument("--steps", type=number(int, 1), default=20, help="steps in a round")
    parser.add_argument(
        "--print_steps", type=number(int, 1), default=10, help="training: steps between lines"
    )
    add_switch(parser, "--tensorboard", "training: with --tensorboard")
    parser.add_argument(
        "--rounds",
        type=number(int, 1),
        default=5,
        help="rounds of each kind, in turn; the median counts",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--train_data_dir", help="OFRecord parts: measure their loader alone")
    add_switch(other, "--conversion", "measure tools/make_ofrecord.py imagenet")
    add_switch(other, "--inference", "measure both backends of of_cnn_inference.py")
    other.add_argument("--against", choices=("torch",), help="measure ours and this by turns")
    parser.add_argument("--peer_python", help="against: a Python that has PyTorch")
    parser.add_argument(
        "--num_images",
        type=number(int, 1000),
        default=5000,
        help="conversion: photographs in the archive, 110 kB each, in 1000 classes",
    )
    parser.add_argument(
        "--num_workers", type=number(int, 1), default=2, help="conversion: processes"
    )
    return parser


def describe_machine(device: str) -> dict:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        **versions(),
    }


def asked(args: Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


SIZES = ("model", "image_size", "batch_size_per_device", "steps", "rounds")


def benchmark_training_loop(args: Namespace, device: str) -> dict:
    """samples/s of `cnns.run.Run.train_epoch` and of a loop that calls the same graph; and what the
    record of the run costs, with a line for each step.
    """
    samples = args.steps * args.batch_size_per_device
    with training_run(args, device) as (run, record):
        (bare, own), ratio = time_loops(args, run)
        costs = time_record(args, run, record)
    return asked(args, *SIZES, "print_steps", "tensorboard") | {
        "own_loop_samples_per_second": round(samples / own, 3),
        "bare_loop_samples_per_second": round(samples / bare, 3),
        "own_to_bare": round(ratio, 4),
        "record": costs,
    }


@contextmanager
def training_run(args: Namespace, device: str) -> Iterator[tuple[Run, "TimedRecord"]]:
    """A run on synthetic data whose epoch is --steps steps long, and that saves nothing."""
    given = script.parse_args(
        [
            f"--device={device}",
            f"--model={args.model}",
            f"--image_size={args.image_size}",
            f"--batch_size_per_device={args.batch_size_per_device}",
            f"--num_examples={args.steps * args.batch_size_per_device}",
            "--warmup_epochs=0",
            f"--loss_print_every_n_iter={args.print_steps}",
            f"--tensorboard={args.tensorboard}",
        ]
    )
    spec = script.make_spec(given)
    with tempfile.TemporaryDirectory() as folder, script.make_record(spec, folder) as kept:
        record = TimedRecord(kept)
        yield script.build_run(spec, save_dir="", log=record.line, record=record), record


def train_loop(run: Run) -> Callable[[], None]:
    """The script's own loop over an epoch, again and again."""

    def train() -> None:
        run.train_epoch()
        run.progress.iteration = 0

    return train


def time_loops(args: Namespace, run: Run) -> tuple[list[float], float]:
    """Medians of seconds of the bare loop and of the script's, and their ratio."""
    graph, loader, masks = run.parts.graph, run.parts.loader, run.parts.masks.at(0)
    run.parts.set_training()

    def bare_loop():
        for batch in itertools.islice(loader.batches(0), args.steps):
            outputs = graph(*batch, **masks)
        outputs[0].numpy()  # waits for all steps

    bare_loop()  # compiles, and warms up
    return by_turns(args.rounds, bare_loop, train_loop(run))


class TimedRecord(Record):
    """A record that adds up the seconds it takes, for each kind of call."""

    def __init__(self, record: Record):
        self.record = record
        self.seconds: dict[str, list[float]] = {"line": [], "add": [], "finish_epoch": []}

    def line(self, text: str) -> None:
        self.seconds["line"].append(timed(partial(self.record.line, text)))

    def add(self, *kind: str, **figures: Any) -> None:
        self.seconds["add"].append(timed(partial(self.record.add, *kind, **figures)))

    def finish_epoch(self) -> None:
        self.seconds["finish_epoch"].append(timed(self.record.finish_epoch))


def time_record(args: Namespace, run: Run, record: TimedRecord) -> dict:
    """What writing down costs: the median time of it, and epochs with it against such without."""
    for seconds in record.seconds.values():
        seconds.clear()
    train = train_loop(run)

    def recorded() -> None:
        train()
        record.finish_epoch()

    def unrecorded() -> None:
        kept = run.record, run.log
        run.record, run.log = Record(), lambda line: None
        train()
        run.record, run.log = kept

    (_, without), ratio = by_turns(args.rounds, recorded, unrecorded)
    line, figures, epoch = (1000 * statistics.median(each) for each in record.seconds.values())
    step = 1000 * without / args.steps
    return {
        "milliseconds_per_line": round(line + figures, 3),
        "milliseconds_per_epoch": round(epoch, 3),
        "milliseconds_of_a_step": round(step, 1),
        "line_to_step": round((line + figures) / step, 5),
        "with_to_without": round(ratio, 4),
    }


@contextmanager
def predictors(
    args: Namespace, device: str
) -> Iterator[tuple[dict[str, Callable[[np.ndarray], object]], np.ndarray]]:
    """The same network, with random weights, by both backends, and images (N, 3, H, W) for them."""
    model = model_registry.MODELS[args.model]
    preprocessing, classes = model.preprocessing(image_size=args.image_size), 1000
    network = model.build(classes, Switches())
    shape = (args.batch_size_per_device, 3, args.image_size, args.image_size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "network.onnx")
        snapshot = Snapshot(args.model, classes, preprocessing)
        reference = resnet_to_onnx.Reference(network)
        exported = resnet_to_onnx.convert(reference, snapshot, "random", opset=12)
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


def benchmark_against(args: Namespace, device: str) -> dict:
    """images/s of training and of classifying, of ours and of PyTorch in two layouts.

    The same network, sizes, loss and optimizer; synthetic images, without reading or resizing.
    """
    if device != "cpu":
        raise UsageError("--against compares on a CPU: give --device=cpu")
    if args.peer_python is None:
        raise UsageError(f"--against={args.against} needs --peer_python, a Python that has it")
    with (
        start_peer(
            args.peer_python,
            model=args.model,
            batch_size=args.batch_size_per_device,
            image_size=args.image_size,
        ) as peer,
        training_run(args, device) as (run, _),
        predictors(args, device) as (backends, images),
    ):
        held = sum(parameter.numel() for parameter in run.parts.model.parameters())
        if held != peer.about["parameters"]:
            raise RuntimeError(f"{held} parameters against {peer.about['parameters']}")
        train = train_loop(run)

        def classify(backend: str) -> float:
            return timed(lambda: [backends[backend](images) for _ in range(args.steps)])

        kinds: dict[str, dict[str, Callable[[], float]]] = {
            "training": {"ours": lambda: timed(train)} | peer_sides(args, peer, "train"),
            "predicting": {
                "ours": partial(classify, "oneflow"),
                "onnxruntime": partial(classify, "onnxruntime"),
            }
            | peer_sides(args, peer, "predict"),
        }
        report = compare(args.rounds, kinds, args.steps * len(images))
        versions = {"torch": peer.about["version"], "onnxruntime": onnxruntime.__version__}
    print_table(report)
    return asked(args, *SIZES) | versions | report


def peer_sides(args: Namespace, peer: Peer, kind: str) -> dict[str, Callable[[], float]]:
    return {
        f"torch {layout}": partial(peer.seconds, kind, layout, args.steps) for layout in LAYOUTS
    }


LOADERS = {  # --data_order and augmentation
    "native": ("native", Augmentation()),
    "global": ("global", Augmentation()),
    "trivialaugment_wide": (
        "global",
        Augmentation(auto_augment="trivialaugment_wide", random_erasing=0.1),
    ),
    "randaugment": ("global", Augmentation(auto_augment="randaugment")),
    "color_jitter": ("global", Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.1))),
}


def benchmark_loader(args: Namespace, device: str) -> dict:
    """images/s of reading, decoding and augmenting OFRecord parts, without a network.

    Each of LOADERS in turn. The native one normalises, and the others leave that to the graph. The
    processor's time tells more than the clock where other programs run beside.
    """
    if args.train_data_dir.endswith(".npz"):
        raise UsageError(f"--train_data_dir={args.train_data_dir}: a directory of parts is needed")
    data = open_train_dataset(args.train_data_dir)

    def make_load(name: str) -> Callable[[], None]:
        data_order, augmentation = LOADERS[name]
        model = model_registry.MODELS[args.model]
        loader = ofrecord_util.train_loader(
            data,
            batch_size=args.batch_size_per_device,
            preprocessing=model.preprocessing(image_size=args.image_size),
            augmentation=augmentation,
            seed=0,
            device=device,
            data_order=data_order,
        )

        def load() -> None:
            held, start = [], time.process_time()
            for image, label, *_ in itertools.islice(loader.batches(0), args.steps):
                held.append((image.to_local()[0, 0, 0, 0], label))
                limit_run_ahead(held)
            held[-1][0].numpy()
            processor[name].append(time.process_time() - start)

        load()
        return load

    processor: dict[str, list[float]] = {name: [] for name in LOADERS}
    seconds, ratio = by_turns(args.rounds, *map(make_load, LOADERS))
    count = args.steps * args.batch_size_per_device
    rates = [round(count / each, 1) for each in seconds]
    return {
        **asked(args, "train_data_dir"),
        "num_examples": data.num_examples,
        **asked(args, "image_size", "batch_size_per_device", "steps", "rounds"),
        "images_per_second": dict(zip(LOADERS, rates, strict=True)),
        "global_to_native": round(ratio, 3),
        "processor_milliseconds_per_image": {
            name: round(1000 * statistics.median(each[1:]) / count, 3)
            for name, each in processor.items()
        },
    }


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
