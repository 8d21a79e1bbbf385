"""ONNX Runtime as a plain script uses it: the peer of tools/benchmark.py --against=onnxruntime.

Runs under a Python that has numpy, Pillow and ONNX Runtime, and needs nothing of this repository.
It reads one JSON list a line, [kind, steps], and answers each with one JSON object, {"seconds": the
time of so many batches}; the first line that it writes says what it is. The end of its input ends
it.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

MEAN = np.array((123.68, 116.779, 103.939), np.float32)
STD = np.array((58.393, 57.12, 57.375), np.float32)


def read_image(path: Path, *, shorter: int, size: int) -> np.ndarray:
    """A photograph as (3, size, size) float32, normalised: a crop of one with this shorter side."""
    with Image.open(path, formats=("JPEG",)) as image:
        scale = shorter / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32)
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


class Peer:
    """A file of the network, and photographs for it."""

    def __init__(
        self, model: str, folder: str, *, batch_size: int, shorter: int, size: int, threads: int
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.input = self.session.get_inputs()[0].name
        self.paths = itertools.cycle(sorted(Path(folder).iterdir()))
        self.batch_size, self.shorter, self.size = batch_size, shorter, size
        self.images = self.read_batch()
        self.kinds: dict[str, Callable[[], object]] = {
            "ready": lambda: self.predict(self.images),
            "photographs": lambda: self.predict(self.read_batch()),
        }

    def read_batch(self) -> np.ndarray:
        paths = itertools.islice(self.paths, self.batch_size)
        images = [read_image(path, shorter=self.shorter, size=self.size) for path in paths]
        return np.ascontiguousarray(images)

    def predict(self, images: np.ndarray) -> list[np.ndarray]:
        return self.session.run(None, {self.input: images})

    def run(self, kind: str, steps: int) -> float:
        """Seconds of so many batches: "ready" in memory, or "photographs" read one by one."""
        step = self.kinds[kind]
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - start


def main(model: str, folder: str, *numbers: str) -> None:
    names = ("batch_size", "shorter", "size", "threads")
    peer = Peer(model, folder, **dict(zip(names, map(int, numbers), strict=True)))
    print(json.dumps({"version": onnxruntime.__version__}), flush=True)
    for line in sys.stdin:
        kind, steps = json.loads(line)
        print(json.dumps({"seconds": peer.run(kind, steps)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
