"""Measure this toolkit on this machine; prints JSON.

python3 tools/benchmark.py
python3 tools/benchmark.py --model=resnet18 --print_steps=1
python3 tools/benchmark.py --train_data_dir=data/imagenet/ofrecord/train
python3 tools/benchmark.py --conversion --num_workers=2
python3 tools/benchmark.py --inference --image_size=224 --batch_size_per_device=1
python3 tools/benchmark.py --against=torch --peer_python=torch/bin/python
python3 tools/benchmark.py --against=onnxruntime --peer_python=onnxruntime/bin/python
python3 tools/benchmark.py --against=dali --peer_python=dali/bin/python
python3 tools/benchmark.py --growth batch_size image_size --steps=3 --output=growth
"""

import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (first, see there)

import onnxruntime

import model_registry
import of_cnn_train_val as script
from cnns.checkpoint.snapshot import versions
from cnns.distributed import choose_device
from cnns.errors import UsageError, run_main
from cnns.flags.parser import Parser, add_switch
from cnns.flags.values import number
from cnns.interrupts import exit_on_signals
from cnns.record import Record
from cnns.run import Run
from tools.against import Peer, check_python, start_peer
from tools.benchmark_conversion import benchmark_conversion
from tools.benchmark_growth import GROWTH, benchmark_growth
from tools.benchmark_loader import against_dali, benchmark_loader
from tools.benchmark_onnx import against_onnxruntime, benchmark_inference, predictors
from tools.timing import SIZES, asked, by_turns, compare, print_table, timed

TORCH_NETWORKS = ("resnet18", "resnet50")
TORCH_LAYOUTS = ("nchw", "channels_last")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    report = {"date": date.today().isoformat(), "machine": describe_machine(device)}
    if args.peer_python is not None and args.against is None:
        raise UsageError("--peer_python has no effect without --against")
    if args.output is not None and args.growth is None:
        raise UsageError("--output has no effect without --growth")
    if args.against is not None:
        if device != "cpu":
            raise UsageError("--against compares on a CPU: give --device=cpu")
        check_python(args.against, args.peer_python)
        report["against"] = AGAINST[args.against](args, device)
    elif args.growth is not None:
        report["growth"] = benchmark_growth(args)
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
        "OneFlow and by ONNX Runtime; or, with --against, ours and another program by turns: "
        "training and classifying beside PyTorch, evaluation beside plain ONNX Runtime, the loader "
        "beside DALI; or, with --growth, how time and memory grow, as plots. Prints JSON.",
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
    other.add_argument("--against", choices=tuple(AGAINST), help="measure ours and this by turns")
    other.add_argument(
        "--growth", nargs="+", choices=tuple(GROWTH), help="measure time and memory over these"
    )
    parser.add_argument("--output", help="growth: directory for its plots, else this one")
    parser.add_argument("--peer_python", help="against: a Python that has it")
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


def against_torch(args: Namespace, device: str) -> dict:
    """images/s of training and of classifying, of ours and of PyTorch in two layouts.

    The same network, sizes, loss and optimizer; synthetic images, without reading or resizing.
    """
    if args.model not in TORCH_NETWORKS:
        raise UsageError(f"--against=torch has {', '.join(TORCH_NETWORKS)}, and not {args.model}")
    sizes = args.batch_size_per_device, args.image_size
    with (
        start_peer("torch", args.peer_python, args.model, *sizes) as peer,
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
        f"torch {layout}": partial(peer.seconds, kind, layout, args.steps)
        for layout in TORCH_LAYOUTS
    }


AGAINST = {"torch": against_torch, "onnxruntime": against_onnxruntime, "dali": against_dali}


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
