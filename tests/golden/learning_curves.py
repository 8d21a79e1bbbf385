"""Compare how this toolkit and a PyTorch script of the same recipe learn Fashion-MNIST.

    python3 tests/golden/learning_curves.py data --output=data/curves
    python3 tests/golden/learning_curves.py torch --data=data/curves \\
        --seed=0 --log=data/curves/torch_0.log
    python3 tests/golden/learning_curves.py compare \\
        --oneflow data/curves/oneflow_*/of_cnn_train_val.log --torch data/curves/torch_*.log

The toolkit's own runs are commands of `of_cnn_train_val.py`; docs/recipe.md, "Learning curves", has
all of them. `torch` runs in an environment of its own, Python 3.11 after
`pip install torch==2.13.0 numpy pillow`, for `--auto_augment` with torchvision 0.29.1; the other
jobs need numpy only. All this is run by hand: it takes an hour, and no test needs it.
"""

import argparse
import gzip
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np

# --log_dir puts the time in front.
VALIDATION_LINE = r"^(?:\S+ )?validation{}: epoch (\d+), .*top_1: ([\d.]+)"

UNEVEN = [100, 68, 46, 31, 21, 14, 10, 7, 5, 3]  # training images of each class of `uneven`
UNEVEN_TEST = 50  # test images of each


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare the learning curves of this toolkit and of PyTorch.",
        allow_abbrev=False,
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("data", help="write train.npz and val.npz", allow_abbrev=False)
    job.add_argument("--input", default="/usr/share/datasets/fashion-mnist", type=Path)
    job.add_argument("--output", required=True, type=Path)
    job.add_argument("--num_examples", default=5000, type=int, help="training images, the first")
    job = jobs.add_parser("uneven", help="the same, of uneven classes", allow_abbrev=False)
    job.add_argument("--input", default="/usr/share/datasets/fashion-mnist", type=Path)
    job.add_argument("--output", required=True, type=Path)
    job = jobs.add_parser("torch", help="train in PyTorch", allow_abbrev=False)
    job.add_argument("--data", required=True, type=Path, help="directory of train.npz and val.npz")
    job.add_argument("--log", required=True, type=Path, help="file for the lines")
    job.add_argument("--seed", required=True, type=int)
    job.add_argument("--image_size", default=32, type=int)
    job.add_argument("--min_area", default=0.6, type=float, help="of a random crop")
    job.add_argument("--num_epochs", default=3, type=int)
    job.add_argument("--warmup_epochs", default=0.5, type=float)
    job.add_argument("--batch_size", default=25, type=int)
    job.add_argument("--learning_rate", default=0.025, type=float)
    job.add_argument("--num_val_examples", type=int, help="test images, the first; all")
    job.add_argument(
        "--auto_augment",
        choices=("trivialaugment_wide", "randaugment"),
        help="torchvision's, and its random erasing, mixup and CutMix",
    )
    job.add_argument("--bce", action="store_true", help="binary cross entropy")
    job.add_argument("--ema_decay", type=float, help="average of the weights, torchvision's")
    job = jobs.add_parser("compare", help="print the figures", allow_abbrev=False)
    job.add_argument("--oneflow", required=True, nargs="+", type=Path, help="a log for each seed")
    job.add_argument("--torch", required=True, nargs="+", type=Path, help="a log for each seed")
    job.add_argument("--num_test", default=10_000, type=int, help="test images")
    job.add_argument("--ema", action="store_true", help="of the averages of the weights")
    return parser


def read_idx(path: Path) -> np.ndarray:
    """The bytes of a gzipped idx file: two of zero, type, rank, big-endian sizes, data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        sys.exit(f"{path} is not an idx file of bytes")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_set(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28, 3) uint8 and labels (N,), as the toolkit takes arrays."""
    grey = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    return np.repeat(grey[..., np.newaxis], 3, axis=3), labels


def make_uneven_data(source: Path, output: Path) -> None:
    """Training images of UNEVEN counts, the first of each class; as many test images of each."""
    output.mkdir(parents=True, exist_ok=True)
    for name, prefix, counts in (
        ("train", "train", UNEVEN),
        ("val", "t10k", [UNEVEN_TEST] * len(UNEVEN)),
    ):
        images, labels = read_set(source, prefix)
        own = [np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)]
        chosen = np.concatenate(own)
        np.savez(output / f"{name}.npz", images=images[chosen], labels=labels[chosen])
        print(f"{output / name}.npz: {len(chosen)} images, per class {counts}")


def make_data(source: Path, output: Path, num_examples: int) -> None:
    """Both sets as the toolkit takes arrays: images (N, 28, 28, 3) uint8 and labels (N,)."""
    output.mkdir(parents=True, exist_ok=True)
    for name, prefix, count in (("train", "train", num_examples), ("val", "t10k", None)):
        images, labels = (each[:count] for each in read_set(source, prefix))
        path = output / f"{name}.npz"
        np.savez(path, images=images, labels=labels)
        print(f"{path}: {len(labels)} images, per class {np.bincount(labels).tolist()}")


def train_in_torch(args: argparse.Namespace) -> None:
    # Only this job needs PyTorch.
    import torch
    import torch_recipe

    # More threads wait for one another on a busy machine, and gain little for pictures so small.
    torch.set_num_threads(1)
    sets = []
    for name in ("train", "val"):
        with np.load(args.data / f"{name}.npz") as arrays:
            count = args.num_val_examples if name == "val" else None
            sets.append((arrays["images"][:count], arrays["labels"][:count]))
    if len(sets[0][0]) % args.batch_size != 0:
        sys.exit(f"--batch_size={args.batch_size} does not divide {len(sets[0][0])} images")
    if args.log.exists():
        sys.exit(f"--log: {args.log} exists; remove it, or give another")
    with open(args.log, "w", encoding="utf-8", buffering=1) as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file)

        torch_recipe.train(
            *sets,
            size=args.image_size,
            min_area=args.min_area,
            num_epochs=args.num_epochs,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_epochs=args.warmup_epochs,
            seed=args.seed,
            log=log,
            auto_augment=args.auto_augment,
            bce=args.bce,
            ema_decay=args.ema_decay,
        )


def read_accuracies(paths: list[Path], *, ema: bool = False) -> np.ndarray:
    """Test accuracies in percent, (runs, epochs), of the validation lines of one log for each."""
    runs = []
    line = re.compile(VALIDATION_LINE.format(r" \(ema\)" if ema else ""), re.MULTILINE)
    for path in paths:
        found = line.findall(path.read_text(encoding="utf-8"))
        if not found or [int(epoch) for epoch, _ in found] != list(range(len(found))):
            sys.exit(f"{path} does not hold the validation lines of one run, from epoch 0")
        runs.append([100 * float(top_1) for _, top_1 in found])
    if len({len(run) for run in runs}) != 1:
        sys.exit(f"these logs are of runs of different lengths: {', '.join(map(str, paths))}")
    return np.array(runs)


def compare(oneflow: np.ndarray, torch: np.ndarray, num_test: int) -> str:
    """The comparison as Markdown, of accuracies in percent, (runs, epochs) each."""
    sides = {"this toolkit": oneflow, "PyTorch": torch}
    epochs = range(oneflow.shape[1])
    lines = [
        "| test accuracy, % | after the last epoch, by seed | mean | standard error "
        "| mean after each epoch |",
        "|---|---|---|---|---|",
    ]
    errors = []
    for name, runs in sides.items():
        last = runs[:, -1]
        errors.append(statistics.stdev(last) / math.sqrt(len(last)))
        by_seed = ", ".join(f"{value:.2f}" for value in last)
        curve = ", ".join(f"{runs[:, epoch].mean():.2f}" for epoch in epochs)
        lines.append(f"| {name} | {by_seed} | {last.mean():.2f} | {errors[-1]:.2f} | {curve} |")
    difference = oneflow[:, -1].mean() - torch[:, -1].mean()
    error = math.hypot(*errors)
    p = np.concatenate([oneflow[:, -1], torch[:, -1]]).mean() / 100
    binomial = 100 * math.sqrt(p * (1 - p) / num_test)
    verdict = "within" if abs(difference) <= 2 * error else "NOT within"
    lines += [
        "",
        f"Difference {difference:+.2f}, its standard error {error:.2f}: {difference / error:+.2f} "
        f"standard errors, {verdict} two.",
        f"Binomial standard error of one accuracy on {num_test} images: {binomial:.2f}.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.job == "data":
        make_data(args.input, args.output, args.num_examples)
    elif args.job == "uneven":
        make_uneven_data(args.input, args.output)
    elif args.job == "torch":
        train_in_torch(args)
    else:
        accuracies = (read_accuracies(paths, ema=args.ema) for paths in (args.oneflow, args.torch))
        print(compare(*accuracies, args.num_test))


if __name__ == "__main__":
    main()
