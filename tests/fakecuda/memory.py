"""Device memory that training takes, by batch size and precision, as a Markdown table in GiB.

python3 tests/fakecuda/memory.py                                      # ResNet-50 at 224 px
python3 tests/fakecuda/memory.py --model=resnet18 --batch_sizes 64 128

Measured on a device that computes nothing: what OneFlow asks for, while it compiles and in three
steps. A real device needs some more: the CUDA context of the process, cuDNN's workspaces, and
validation, which has memory of its own for --val_batch_size_per_device images.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

import fake
import jobs

PRECISIONS = {
    "float32": (),
    "`--use_fp16`": ("--use_fp16",),
    "`--use_fp16 --channel_last --fuse_bn_relu --fuse_bn_add_relu`": (
        "--use_fp16",
        "--channel_last",
        "--fuse_bn_relu",
        "--fuse_bn_add_relu",
    ),
}
BATCH_SIZES = (64, 128, 192, 256, 512)
STEPS = 3
DEVICE_MB = 80 * 1024


def peak_bytes(*flags: str, model: str, image_size: int, batch_size: int) -> int:
    """Most bytes in use at once. The batches come from arrays: a pool of images would count."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        images = np.zeros((STEPS * batch_size, 16, 16, 3), np.uint8)
        labels = np.zeros(len(images), np.int64)
        np.savez(directory / "train.npz", images=images, labels=labels)
        session = jobs.Session(
            (
                "train",
                "--device=cuda",
                f"--model={model}",
                f"--image_size={image_size}",
                f"--batch_size_per_device={batch_size}",
                "--train_data_dir=train.npz",
                "--num_epochs=1",
                "--model_save_dir=run",
                *flags,
            ),
            env=fake.environment(memory_mb=DEVICE_MB, log=directory / "device.log"),
            cwd=directory,
        )
        (done,) = session.finish(timeout=1800)
        log = jobs.read_log(directory / "device.log")
    if done.status or log.faults:
        raise RuntimeError(f"{model}, {batch_size} images: {done.stderr} {log.faults[:3]}")
    return log.peak


def table(*, model: str, image_size: int, batch_sizes: list[int]) -> list[str]:
    """The lines of the table."""
    lines = [
        "| " + " | ".join(["Images per device", *PRECISIONS]) + " |",
        "|---:" * (1 + len(PRECISIONS)) + "|",
    ]
    for batch_size in batch_sizes:
        network = {"model": model, "image_size": image_size, "batch_size": batch_size}
        peaks = [peak_bytes(*flags, **network) / 2**30 for flags in PRECISIONS.values()]
        lines.append("| " + " | ".join([str(batch_size), *(f"{n:.1f}" for n in peaks)]) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="resnet50", help="name of the network")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=BATCH_SIZES, help="images per device"
    )
    args = parser.parse_args(argv)
    fake.build()
    print("\n".join(table(**vars(args))))


if __name__ == "__main__":
    main()
