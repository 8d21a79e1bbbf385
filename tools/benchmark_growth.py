"""What tools/benchmark.py --growth measures: how time and memory grow, each as a plot.

Every point is one run of something that a user starts.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import model_registry
import ofrecord_util
from cnns.convert.jpegs import encode_jpeg
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.errors import RunError
from tools.benchmark_conversion import convert, make_archive
from tools.photographs import write_photographs
from tools.timing import timed

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
IMAGE_SIZES = (32, 64, 128, 224)  # pixels
NUM_IMAGES = (1000, 2000, 4000, 8000)  # of 110 kB, in an archive
NUM_PARTS = (1, 10, 100, 1000, 10_000)  # the last fewer, where not so many may be open
NUM_RECORDS = 10_000  # in all parts together


@dataclass(frozen=True)
class Growth:
    """Figures over what grows, each a list as long as `over`, by what they are and their unit."""

    what: str
    over: Sequence[int]
    figures: dict[str, list[float]]
    power: int = 1  # of `over`, that is in proportion to the work

    def table(self) -> dict:
        return {self.what: list(self.over), **self.figures}


def step(args: Namespace, *, image_size: int, batch_size: int) -> tuple[float, float]:
    """Seconds of a training step, and the most memory of its process, in MB.

    In a process of its own, whose memory nothing else has made larger.
    """
    command = [sys.executable, str(Path(__file__).with_name("benchmark.py")), "--device=cpu"]
    command += [f"--model={args.model}", f"--image_size={image_size}"]
    command += [
        f"--batch_size_per_device={batch_size}",
        f"--steps={args.steps}",
        f"--rounds={args.rounds}",
    ]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, errors):
            file.seek(0)
        if process.returncode:
            raise RunError(f"--growth: {errors.read().strip()}")
        found = json.load(out)["training_loop"]
    return batch_size / found["own_loop_samples_per_second"], used.ru_maxrss * 1024 / 1e6


def over_batch_size(args: Namespace) -> Growth:
    found = [step(args, image_size=args.image_size, batch_size=each) for each in BATCH_SIZES]
    return steps("images in a step", BATCH_SIZES, found, power=1)


def over_image_size(args: Namespace) -> Growth:
    batch_size = args.batch_size_per_device
    found = [step(args, image_size=each, batch_size=batch_size) for each in IMAGE_SIZES]
    return steps("height and width, pixels", IMAGE_SIZES, found, power=2)


def steps(
    what: str, over: Sequence[int], found: list[tuple[float, float]], *, power: int
) -> Growth:
    seconds, megabytes = zip(*found, strict=True)
    return Growth(
        what,
        over,
        {
            "step, seconds": [round(each, 4) for each in seconds],
            "memory, MB": [round(each) for each in megabytes],
        },
        power,
    )


def over_images(args: Namespace) -> Growth:
    """The conversion of an archive; the memory is that of all its processes."""
    seconds, megabytes = [], []
    for count in NUM_IMAGES:
        with tempfile.TemporaryDirectory(prefix="ofrecord-growth-") as folder:
            make_archive(Path(folder, "a.tar"), count)
            os.sync()
            start = time.perf_counter()
            most = convert(Path(folder, "a.tar"), Path(folder, "out"), args.num_workers)
            seconds.append(round(time.perf_counter() - start, 3))
            megabytes.append(round(most, 1))
    figures = {"conversion, seconds": seconds, "memory, MB": megabytes}
    return Growth("images in the archive", NUM_IMAGES, figures)


def over_parts(args: Namespace) -> Growth:
    """From the name of a directory to the first batch of training; the records stay the same.

    The native reader has two files of each part open at a time (ofrecord_util.allow_open_files).
    """
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    records = [encode_jpeg(Image.fromarray(pixels))] * NUM_RECORDS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = NUM_RECORDS if hard == resource.RLIM_INFINITY else (hard - 256) // 2
    num_parts = [min(count, most) for count in NUM_PARTS]
    figures: dict[str, list[float]] = {}
    for count in num_parts:
        with tempfile.TemporaryDirectory(prefix="ofrecord-growth-") as folder:
            write_photographs(records, Path(folder), num_parts=count)
            for order in ("native", "global"):
                first_batch(folder, order)  # makes the index of the global order, and warms up
                seconds = timed(partial(first_batch, folder, order))
                figures.setdefault(f"{order} order, seconds", []).append(round(seconds, 4))
                gc.collect()  # closes the parts
    return Growth("parts", num_parts, figures)


def first_batch(folder: str, data_order: str) -> None:
    loader = ofrecord_util.train_loader(
        open_train_dataset(os.path.join(folder, "parts")),
        batch_size=8,
        preprocessing=model_registry.MODELS["resnet18"].preprocessing(image_size=32),
        augmentation=Augmentation(),
        seed=0,
        device="cpu",
        data_order=data_order,
    )
    batches = loader.batches(0)
    next(batches)[0].numpy()
    batches.close()


GROWTH: dict[str, Callable[[Namespace], Growth]] = {
    "batch_size": over_batch_size,
    "image_size": over_image_size,
    "images": over_images,
    "parts": over_parts,
}


def benchmark_growth(args: Namespace) -> dict:
    """The figures of each kind of --growth, and where the plot of each was written."""
    from cnns.report.plots import plot_style  # matplotlib takes a second

    folder, report = Path(args.output or "."), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.growth:
        growth = GROWTH[name](args)
        path = folder / f"growth-{name}.png"
        with plot_style():
            draw(growth, path)
        report[name] = {"plot": str(path), **growth.table()}
    return report


def draw(growth: Growth, path: Path) -> None:
    """One plot for each figure, with logarithmic axes; what grows in proportion goes along the
    dotted line."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from cnns.report.plots import pyplot

    figure, all_axes = pyplot.subplots(1, len(growth.figures), figsize=(6.4, 2.8), dpi=100)
    over = np.array(growth.over)
    for axes, (what, values) in zip(np.atleast_1d(all_axes), growth.figures.items(), strict=True):
        axes.loglog(over, values, "o-", markersize=4)
        axes.loglog(over, values[-1] * (over / over[-1]) ** growth.power, ":", color="grey", lw=1)
        axes.set_ylim(min(values) / 2, max(values) * 2)
        axes.set_xticks(over, [f"{each:,}" for each in over], fontsize="small")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", labelsize="small")
        axes.set_xlabel(growth.what)
        axes.set_title(what, loc="left", fontsize="medium")
    figure.savefig(path)
    pyplot.close(figure)
