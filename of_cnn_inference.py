"""Classify images with a snapshot, or with a file that resnet_to_onnx.py has exported.

python3 of_cnn_inference.py data/cat.jpg                            # the newest run, its best
python3 of_cnn_inference.py DIRECTORY --backend=onnxruntime --top_k=5
find photos -name '*.jpg' | python3 of_cnn_inference.py - --output=csv --batch_size=8
python3 of_cnn_inference.py --help
"""

import cnns.startup  # noqa: F401  (first, see there)

import csv
import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from queue import Queue
from threading import Thread

import numpy as np

import config
from cnns.checkpoint.find import compare_export, restore
from cnns.data.images import Preprocessing, class_names, find_images, load_image
from cnns.distributed import launch_script, place, takes_cuda
from cnns.errors import RunError, UsageError, printable, report, run_main
from cnns.export import ExportedModel, find_export
from cnns.flags.checks import check_backend_flags, take_device
from cnns.graphs import Predictor
from cnns.launch.external import refuse_ranks
from cnns.launch.job import Job
from cnns.launch.worker import is_worker, leave
from cnns.log import notice
from cnns.resume import num_processes

Predict = Callable[[np.ndarray], np.ndarray]  # (N, 3, H, W) normalised to (N, C) probabilities
STDIN = "-"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.backend == "oneflow" and not is_worker() and takes_cuda(args.device):
        memory = config.memory_flags(args, batch="batch_size")
        return launch_script(__file__, argv, job=Job(), memory=memory, stdin=None)
    paths = find_paths(args.image_path)
    predict, preprocessing, names = BACKENDS[args.backend](args)
    write = WRITERS[args.output](names, args.top_k)
    failures = Failures()
    images = prefetch(
        failures.filter(load_all(paths, preprocessing, args.max_pixels)), depth=2 * args.batch_size
    )
    for batch in batches(images, args.batch_size):
        rows = predict(np.stack([image for _, image in batch]))
        for (path, _), probabilities in zip(batch, rows, strict=True):
            write(path, probabilities)
    return failures.exit_status()


def parse_args(argv: list[str] | None) -> Namespace:
    args = config.make_parser("inference", __doc__).read(argv)
    refuse_ranks("classifying")
    check_backend_flags(args)
    if num_processes(vars(args)) > 1:
        raise UsageError(
            "--num_nodes and --gpu_num_per_node: classifying runs on one device; leave them out"
        )
    if STDIN in args.image_path and len(args.image_path) > 1:
        raise UsageError("--image_path: - must be the only path: all others come on standard input")
    return args


# What computes.


def oneflow_backend(args: Namespace) -> tuple[Predict, Preprocessing, list[str]]:
    device = take_device(args)
    model, snapshot, path = restore(**config.restore_flags(args), switches=config.switches(args))
    notice(f"Restoring model from {path}.")
    predictor = Predictor(place(model, device), device=device, use_fp16=args.use_fp16)
    names = class_names(snapshot.num_classes, snapshot.classes)
    return predictor, snapshot.preprocessing, names


def onnxruntime_backend(args: Namespace) -> tuple[Predict, Preprocessing, list[str]]:
    exported = ExportedModel(find_export(args.onnx_path))
    if args.onnx_path is None:
        compare_export(exported.path, run=exported.run)
    notice(f"Restoring model from {exported.path}.")
    return exported.probabilities, exported.preprocessing, list(exported.classes)


BACKENDS = {"oneflow": oneflow_backend, "onnxruntime": onnxruntime_backend}


# Images.


def find_paths(image_path: list[str]) -> Iterable[str | RunError]:
    """The images to classify, in order, and an error for each path where there are none.

    Raises UsageError where no path of the command has any.
    """
    if image_path == [STDIN]:
        return read_stdin()
    found = [each for path in image_path for each in find_each(path, "--image_path")]
    if all(isinstance(each, RunError) for each in found):
        raise UsageError(str(found[0]))
    return found


def find_each(path: str, where: str) -> list[str | RunError]:
    """The images that a path names, or what is wrong with it."""
    try:
        return list(find_images([path]))
    except UsageError as error:
        return [RunError(str(error).replace("--image_path: ", f"{where}: "))]


def read_stdin() -> Iterator[str | RunError]:
    """The images of the paths on standard input, one a line; an error for a missing one."""
    if sys.stdin is None:
        raise RunError("--image_path=-: standard input is closed")
    # Not sys.stdin: the interpreter cannot exit while a thread waits in it.
    with open(
        sys.stdin.fileno(), encoding="utf-8", errors="surrogateescape", closefd=False
    ) as file:
        for line in file:
            path = line.rstrip("\r\n")
            if path:
                yield from find_each(path, "standard input")


def load_all(
    paths: Iterable[str | RunError], preprocessing: Preprocessing, max_pixels: int
) -> Iterator[tuple[str, np.ndarray | RunError]]:
    """Each path with its image (3, H, W), or with what is wrong with it."""
    for path in paths:
        if isinstance(path, RunError):
            yield "", path
            continue
        try:
            yield path, load_image(path, preprocessing, max_pixels=max_pixels)
        except RunError as error:
            yield path, error


def prefetch(items: Iterable, *, depth: int) -> Iterator:
    """The same items; a thread produces up to `depth` of them in advance."""
    queue: Queue = Queue(depth)
    end, errors = object(), []

    def fill() -> None:
        try:
            for item in items:
                queue.put(item)
        except BaseException as error:  # raised where the items are used
            errors.append(error)
        queue.put(end)

    # A daemon, since it may still be waiting for standard input at exit.
    Thread(target=fill, daemon=True).start()
    while (item := queue.get()) is not end:
        yield item
    if errors:
        raise errors[0]


class Failures:
    """Counts images, and reports those that cannot be read."""

    def __init__(self) -> None:
        self.count, self.bad = 0, 0

    def filter(
        self, images: Iterable[tuple[str, np.ndarray | RunError]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The images that could be read."""
        for path, image in images:
            self.count += 1
            if isinstance(image, RunError):
                self.bad += 1
                report(image)
            else:
                yield path, image

    def exit_status(self) -> int:
        if self.count == 0:
            raise RunError("--image_path=-: standard input held no paths")
        if self.bad and self.count > 1:  # a single one has been reported
            report(f"{self.bad} of {self.count} files could not be read; see above")
        return 1 if self.bad else 0


def batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch


# Results. Each of these returns what writes the probabilities (C,) of one image.

Write = Callable[[str, np.ndarray], None]


def best(probabilities: np.ndarray, top_k: int) -> np.ndarray:
    return np.argsort(-probabilities, kind="stable")[:top_k]


def text_writer(names: list[str], top_k: int) -> Write:
    """The path, then the most probable classes, one `probability name` a line."""

    def write(path: str, probabilities: np.ndarray) -> None:
        print(printable(as_text(path)))
        for i in best(probabilities, top_k):
            print(probabilities[i], printable(names[i]), flush=True)

    return write


def csv_writer(names: list[str], top_k: int) -> Write:
    """A header, then one line for each class."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "name", "probability"))

    def write(path: str, probabilities: np.ndarray) -> None:
        for rank, i in enumerate(best(probabilities, top_k), 1):
            writer.writerow((as_text(path), rank, i, names[i], probabilities[i]))
        sys.stdout.flush()

    return write


def json_writer(names: list[str], top_k: int) -> Write:
    """One object a line, `{"path": ..., "classes": [{"rank": 1, ...}]}`."""

    def write(path: str, probabilities: np.ndarray) -> None:
        classes = []
        for rank, i in enumerate(best(probabilities, top_k), 1):
            probability = float(str(probabilities[i]))  # the digits that a float32 has
            row = {"rank": rank, "class": int(i), "name": names[i], "probability": probability}
            classes.append(row)
        print(json.dumps({"path": as_text(path), "classes": classes}), flush=True)

    return write


def as_text(path: str) -> str:
    """A path with bytes that are not UTF-8 as text."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


WRITERS = {"text": text_writer, "csv": csv_writer, "json": json_writer}


if __name__ == "__main__":
    sys.exit(run_main(main, leave=leave))
