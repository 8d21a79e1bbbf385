"""Make a tiny data set of ImageNet's shape from the two demo photographs in data/.

python3 tools/make_mini_imagenet.py
python3 tools/make_mini_imagenet.py --num_examples=200 --output=data/mini
"""

import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.environment  # noqa: F401  (first, see there)

from PIL import Image

from cnns.convert.jpegs import encode_jpeg
from cnns.convert.writer import Example, Split, write_dataset
from cnns.data.images import CLASSES_FILE, read_classes, read_picture
from cnns.errors import run_main
from cnns.flags.parser import Parser
from cnns.flags.values import number
from cnns.interrupts import exit_on_signals

DATA = CLASSES_FILE.parent
PHOTOGRAPHS = {"cat.jpg": "tabby, tabby cat", "coffee.jpg": "espresso"}
AREA = (0.3, 1.0)  # share of the photograph
ASPECT_RATIO = (3 / 4, 4 / 3)  # width over height
SHORTEST_SIDE = 200  # pixels
MAX_EXAMPLES = 10_000  # far fewer than there are boxes to draw, so that drawing ends


def draw_box(rng: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop, in pixels."""
    while True:
        area = rng.uniform(*AREA) * width * height
        ratio = rng.uniform(*ASPECT_RATIO)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if min(w, h) >= SHORTEST_SIDE and w <= width and h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h


def draw_crops(
    photographs: list[tuple[int, Image.Image]], count: int, rng: random.Random, taken: set[tuple]
) -> list[Example]:
    """Crops of (label, photograph) in turn, so that classes are balanced; none is in `taken`."""
    examples = []
    for label, photograph in itertools.islice(itertools.cycle(photographs), count):
        box = draw_box(rng, *photograph.size)
        while (label, box) in taken:
            box = draw_box(rng, *photograph.size)
        taken.add((label, box))
        examples.append(Example(encode_jpeg(photograph.crop(box)), label))
    return examples


def make_parser() -> Parser:
    parser = Parser(
        "Make a tiny data set of ImageNet's shape: random crops of the two photographs in data/, "
        "with their ImageNet labels (281 tabby, 967 espresso) among 1000 classes, one part each in "
        "<output>/train and <output>/validation. No crop of one is in the other.",
        doc=__doc__,
        epilog="Read on: tools/README.md, docs/training.md.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/imagenet/ofrecord"), help="directory"
    )
    count = number(int, 1, MAX_EXAMPLES)
    parser.add_argument("--num_examples", type=count, default=50, help="training images")
    parser.add_argument("--num_val_examples", type=count, default=50, help="validation images")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of crops and order")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    classes, _ = read_classes(CLASSES_FILE)
    photographs = [
        (classes.index(name), read_picture(str(DATA / file))) for file, name in PHOTOGRAPHS.items()
    ]
    splits, rng, taken = [], random.Random(args.seed), set[tuple]()
    for name, count in (("train", args.num_examples), ("validation", args.num_val_examples)):
        examples = draw_crops(photographs, count, rng, taken)
        names = [f"crop {i}" for i in range(count)]
        splits.append(Split(args.output / name, names, examples.__getitem__))
    arguments = {k: getattr(args, k) for k in ("num_examples", "num_val_examples", "seed")}
    write_dataset(
        splits,
        classes=classes,
        num_parts=1,
        seed=args.seed,
        made_by={"tool": "tools/make_mini_imagenet.py", "arguments": arguments},
    )


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
