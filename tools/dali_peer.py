"""DALI's CPU pipeline: the peer of tools/benchmark.py --against=dali.

Runs under a Python that has NVIDIA DALI and needs nothing of this repository, nor a GPU. It reads
one JSON list a line, [folder, batches], and answers each with one JSON object: the seconds that so
many batches took, and the processor's time for them. Each folder of JPEGs has a pipeline of its
own, made when it is first asked for. The first line that it writes says what it is. The end of its
input ends it.
"""

import json
import sys
import time
from functools import cache, partial
from pathlib import Path

import nvidia.dali
from nvidia.dali import Pipeline, fn, pipeline_def, types

AREA, ASPECT_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)


@pipeline_def
def training_images(files: list[str], size: int) -> tuple:
    """JPEGs, shuffled, to images (N, 3, H, W) float32, normalised, and labels (N, 1) int32."""
    encoded, label = fn.readers.file(
        files=files, labels=[0] * len(files), random_shuffle=True, name="reader"
    )
    image = fn.decoders.image_random_crop(
        encoded,
        device="cpu",
        output_type=types.RGB,
        random_area=AREA,
        random_aspect_ratio=ASPECT_RATIO,
    )
    # Triangular: as a picture gets smaller, the mean over an area, as OneFlow's resizing takes.
    image = fn.resize(image, resize_x=size, resize_y=size, interp_type=types.INTERP_TRIANGULAR)
    image = fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=MEAN,
        std=STD,
        mirror=fn.random.coin_flip(probability=0.5),
    )
    return image, label


def make_pipeline(folder: str, *, batch_size: int, size: int, threads: int) -> Pipeline:
    pipeline = training_images(
        files=[str(path) for path in sorted(Path(folder).iterdir())],
        size=size,
        batch_size=batch_size,
        num_threads=threads,
        device_id=None,
        seed=0,
        prefetch_queue_depth=2,
    )
    pipeline.build()
    return pipeline


def main(batch_size: str, size: str, threads: str) -> None:
    make = partial(make_pipeline, batch_size=int(batch_size), size=int(size), threads=int(threads))
    pipeline = cache(make)
    print(json.dumps({"version": nvidia.dali.__version__}), flush=True)
    for line in sys.stdin:
        folder, batches = json.loads(line)
        made = pipeline(folder)
        start, used = time.perf_counter(), time.process_time()
        for _ in range(batches):
            made.run()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "processor": time.process_time() - used}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
