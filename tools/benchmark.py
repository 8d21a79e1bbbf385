"""Measure this toolkit on this machine; prints JSON.

python3 tools/benchmark.py
python3 tools/benchmark.py --model=resnet18 --print_steps=1
python3 tools/benchmark.py --train_data_dir=data/imagenet/ofrecord/train
python3 tools/benchmark.py --conversion --num_workers=2
python3 tools/benchmark.py --inference --image_size=224 --batch_size_per_device=1
"""

import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
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
from PIL import Image

import model_registry
import of_cnn_train_val as script
import ofrecord_util
import resnet_to_onnx
from cnns.checkpoint.snapshot import Snapshot, versions
from cnns.convert.writer import BLOCK_BYTES
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.data.images import CLASSES_FILE, read_classes, read_picture
from cnns.distributed import choose_device, place
from cnns.errors import RunError, UsageError, run_main
from cnns.export import ExportedModel
from cnns.flags.parser import Parser, add_switch
from cnns.flags.values import number
from cnns.graphs import Predictor
from cnns.interrupts import exit_on_signals
from cnns.log import limit_run_ahead
from cnns.models.layers import Switches
from cnns.record import Record
from cnns.run import Run
from tools.make_mini_imagenet import DATA, PHOTOGRAPHS, draw_box

# Crops of the demo photographs at this size and quality are 110 kB on average, as ImageNet's are.
PHOTOGRAPH_SIZE = (580, 435)
PHOTOGRAPH_QUALITY = 98
CONVERSION_PARTS = 4  # of 130 MB; ImageNet's have 560


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    report = {"date": date.today().isoformat(), "machine": describe_machine(device)}
    if args.conversion:
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
        "OneFlow and by ONNX Runtime. Prints JSON.",
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
    parser.add_argument("--train_data_dir", help="OFRecord parts: measure their loader alone")
    add_switch(parser, "--conversion", "measure tools/make_ofrecord.py imagenet")
    add_switch(parser, "--inference", "measure both backends of of_cnn_inference.py")
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


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def by_turns(
    rounds: int, *functions: Callable[[], object], before: Callable[[], object] = lambda: None
) -> tuple[list[float], float]:
    """The median seconds of each function, and the median of first to second.

    The ratio compares runs next to each other in time, so that a busy machine slows both.
    """
    seconds: list[list[float]] = []
    for _ in range(rounds):
        seconds.append([])
        for function in functions:
            before()
            seconds[-1].append(timed(function))
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return medians, statistics.median(first / second for first, second, *_ in seconds)


def asked(args: Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


SIZES = ("model", "image_size", "batch_size_per_device", "steps", "rounds")


def benchmark_training_loop(args: Namespace, device: str) -> dict:
    """samples/s of `cnns.run.Run.train_epoch` and of a loop that calls the same graph; and what the
    record of the run costs, with a line for each step.
    """
    samples = args.steps * args.batch_size_per_device
    given = script.parse_args(
        [
            f"--device={device}",
            f"--model={args.model}",
            f"--image_size={args.image_size}",
            f"--batch_size_per_device={args.batch_size_per_device}",
            f"--num_examples={samples}",
            "--warmup_epochs=0",
            f"--loss_print_every_n_iter={args.print_steps}",
            f"--tensorboard={args.tensorboard}",
        ]
    )
    spec = script.make_spec(given)
    with tempfile.TemporaryDirectory() as folder, script.make_record(spec, folder) as kept:
        record = TimedRecord(kept)
        # Saves nothing.
        run = script.build_run(spec, save_dir="", log=record.line, record=record)
        (bare, own), ratio = time_loops(args, run)
        costs = time_record(args, run, record)
    return asked(args, *SIZES, "print_steps", "tensorboard") | {
        "own_loop_samples_per_second": round(samples / own, 3),
        "bare_loop_samples_per_second": round(samples / bare, 3),
        "own_to_bare": round(ratio, 4),
        "record": costs,
    }


def train_loop(run: Run) -> Callable[[], None]:
    """The script's own loop over an epoch, again and again."""

    def train() -> None:
        run.train_epoch()
        run.progress.iteration = 0

    return train


def time_loops(args: Namespace, run: Run) -> tuple[list[float], float]:
    """Medians of seconds of the bare loop and of the script's, and their ratio."""
    graph, loader, masks = run.parts.graph, run.parts.loader, run.parts.masks.at(0)
    run.parts.model.train()

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


def benchmark_inference(args: Namespace, device: str) -> dict:
    """Milliseconds per image of the same network, with random weights, by both backends.

    Without reading and resizing the images.
    """
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
        backends: tuple[Callable[[np.ndarray], object], ...] = (
            Predictor(place(network, device), device=device),
            ExportedModel(path).probabilities,
        )

        def repeat(predict: Callable[[np.ndarray], object]) -> Callable[[], object]:
            predict(images)  # compiles, and warms up
            return lambda: [predict(images) for _ in range(args.steps)]

        (oneflow, onnx), ratio = by_turns(args.rounds, *map(repeat, backends))
    milliseconds = 1000 / (args.steps * len(images))
    return asked(args, *SIZES) | {
        "onnxruntime": onnxruntime.__version__,
        "oneflow_milliseconds_per_image": round(oneflow * milliseconds, 2),
        "onnxruntime_milliseconds_per_image": round(onnx * milliseconds, 2),
        "onnxruntime_times_as_fast": round(ratio, 2),
    }


def benchmark_loader(args: Namespace, device: str) -> dict:
    """images/s of reading, decoding and augmenting OFRecord parts, without a network.

    Each --data_order in turn. The native one normalises, and the global one leaves that to the
    graph. The processor's time tells more than the clock where other programs run beside.
    """
    if args.train_data_dir.endswith(".npz"):
        raise UsageError(f"--train_data_dir={args.train_data_dir}: a directory of parts is needed")
    data = open_train_dataset(args.train_data_dir)

    def make_load(data_order: str) -> Callable[[], None]:
        model = model_registry.MODELS[args.model]
        loader = ofrecord_util.train_loader(
            data,
            batch_size=args.batch_size_per_device,
            preprocessing=model.preprocessing(image_size=args.image_size),
            augmentation=Augmentation(),
            seed=0,
            device=device,
            data_order=data_order,
        )

        def load() -> None:
            held, start = [], time.process_time()
            for image, label in itertools.islice(loader.batches(0), args.steps):
                held.append((image.to_local()[0, 0, 0, 0], label))
                limit_run_ahead(held)
            held[-1][0].numpy()
            processor[data_order].append(time.process_time() - start)

        load()
        return load

    orders = ("native", "global")
    processor: dict[str, list[float]] = {order: [] for order in orders}
    seconds, ratio = by_turns(args.rounds, *map(make_load, orders))
    count = args.steps * args.batch_size_per_device
    rates = [round(count / each, 1) for each in seconds]
    return {
        **asked(args, "train_data_dir"),
        "num_examples": data.num_examples,
        **asked(args, "image_size", "batch_size_per_device", "steps", "rounds"),
        "images_per_second": dict(zip(orders, rates, strict=True)),
        "global_to_native": round(ratio, 3),
        "processor_milliseconds_per_image": {
            order: round(1000 * statistics.median(each[1:]) / count, 3)
            for order, each in processor.items()
        },
    }


def add_member(archive: tarfile.TarFile, name: str, file: io.BytesIO) -> int:
    """Add what was written to a file in memory; returns the number of its bytes."""
    member = tarfile.TarInfo(name)
    member.size = file.tell()
    file.seek(0)
    archive.addfile(member, file)
    return member.size


def make_archive(path: Path, num_images: int) -> int:
    """An archive of the official shape, a tar of 1000 tars; returns the bytes of its images."""
    _, wordnet_ids = read_classes(CLASSES_FILE)
    photographs = [read_picture(str(DATA / name)) for name in PHOTOGRAPHS]
    rng, num_bytes, done = random.Random(0), 0, 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as outer:
        for label, wordnet_id in enumerate(wordnet_ids):
            members = io.BytesIO()
            with tarfile.open(fileobj=members, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                while done * len(wordnet_ids) < (label + 1) * num_images:
                    photograph = photographs[done % len(photographs)]
                    crop = photograph.crop(draw_box(rng, *photograph.size))
                    crop = crop.resize(PHOTOGRAPH_SIZE, Image.Resampling.BICUBIC)
                    encoded = io.BytesIO()
                    crop.save(encoded, "JPEG", quality=PHOTOGRAPH_QUALITY)
                    num_bytes += add_member(inner, f"{wordnet_id}_{done}.JPEG", encoded)
                    done += 1
            add_member(outer, f"{wordnet_id}.tar", members)
    return num_bytes


def copy_plainly(source: Path, target: Path) -> None:
    """Copy a file and flush it to the disk, as a part is."""
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while block := reader.read(BLOCK_BYTES):
            writer.write(block)
        os.fsync(writer.fileno())


def resident_megabytes(pid: int) -> float:
    """Resident memory of a process and those that it started."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    own = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return own + sum(resident_megabytes(int(child)) for child in children)


@contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block: what remains of it is asked to end."""
    with subprocess.Popen(command, **options) as run:
        try:
            yield run
        finally:
            run.terminate()


def convert(archive: Path, output: Path, num_workers: int) -> float:
    """Run the conversion; return the peak memory of all its processes together, in MB."""
    tool, most = str(Path(__file__).with_name("make_ofrecord.py")), 0.0
    command = [sys.executable, tool, "imagenet", f"--train={archive}", f"--output={output}"]
    command += [f"--num_parts={CONVERSION_PARTS}", f"--num_workers={num_workers}"]
    with tempfile.TemporaryFile("w+") as messages:
        with process(command, stdout=messages, stderr=messages) as run:
            while run.poll() is None:
                most = max(most, resident_megabytes(run.pid))
                time.sleep(0.02)
        messages.seek(0)
        if run.returncode:
            raise RunError(f"the conversion failed: {messages.read().strip()}")
    return most


def benchmark_conversion(args: Namespace) -> dict:
    """images/s of the whole command, from its start to its end, and of a copy of the archive.

    Both read from the page cache, where the archive has just been written, and both wait for the
    disk.
    """
    megabytes = []
    with tempfile.TemporaryDirectory(prefix="ofrecord-benchmark-") as folder:
        archive, copied, output = (Path(folder, name) for name in ("a.tar", "copy", "out"))
        num_bytes = make_archive(archive, args.num_images)

        def clear():
            copied.unlink(missing_ok=True)
            shutil.rmtree(output, ignore_errors=True)
            os.sync()

        (copy, conversion), ratio = by_turns(
            args.rounds,
            lambda: copy_plainly(archive, copied),
            lambda: megabytes.append(convert(archive, output, args.num_workers)),
            before=clear,
        )
    return {
        "num_images": args.num_images,
        "bytes_per_image": num_bytes // args.num_images,
        "num_workers": args.num_workers,
        "num_parts": CONVERSION_PARTS,
        "rounds": args.rounds,
        "images_per_second": round(args.num_images / conversion, 1),
        "megabytes_per_second": round(num_bytes / conversion / 1e6, 1),
        "plain_copy_megabytes_per_second": round(num_bytes / copy / 1e6, 1),
        "to_plain_copy": round(ratio, 3),
        "memory_of_all_processes_megabytes": round(max(megabytes), 1),
    }


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
