"""images/s of a PyTorch DataLoader with torchvision's transforms, beside tools/benchmark.py.

    python3.11 -m venv venv-torchvision
    venv-torchvision/bin/pip install torch==2.14.1 torchvision==0.29.1 pillow==12.3.0
    venv-torchvision/bin/python tests/golden/torch_loader.py photos --num_workers=2

`photos` is a folder with a folder of pictures per class, of which tools/make_ofrecord.py makes the
parts for the other side. What comes out is not normalised, as there. By hand: no test needs it.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
import torchvision
from torchvision import transforms
from torchvision.transforms import InterpolationMode

BILINEAR = InterpolationMode.BILINEAR
# Between crop and flip and the tensor of bytes, and after that.
TRANSFORMS = {
    "plain": ([], []),
    "trivialaugment_wide": (
        [transforms.TrivialAugmentWide(interpolation=BILINEAR)],
        [transforms.RandomErasing(0.1)],
    ),
    "randaugment": ([transforms.RandAugment(interpolation=BILINEAR)], []),
    "color_jitter": ([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], []),
}


def make_loader(args: argparse.Namespace, name: str) -> torch.utils.data.DataLoader:
    before, after = TRANSFORMS[name]
    crop = transforms.RandomResizedCrop(args.image_size, interpolation=BILINEAR)
    whole = [crop, transforms.RandomHorizontalFlip(), *before, transforms.PILToTensor(), *after]
    photographs = torchvision.datasets.ImageFolder(args.photos, transforms.Compose(whole))
    return torch.utils.data.DataLoader(
        photographs,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        drop_last=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaders = {name: make_loader(args, name) for name in TRANSFORMS}
    for loader in loaders.values():  # starts its processes
        next(iter(loader))
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(args.rounds):
        for name, loader in loaders.items():
            start = time.perf_counter()
            for _ in itertools.islice(loader, args.steps):
                pass
            seconds[name].append(time.perf_counter() - start)
    count = args.steps * args.batch_size
    rates = {name: round(count / statistics.median(each), 1) for name, each in seconds.items()}
    print(json.dumps({"torchvision": torchvision.__version__, "images_per_second": rates}))


if __name__ == "__main__":
    main()
