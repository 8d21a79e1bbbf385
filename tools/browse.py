"""Draw a contact sheet of what training sees of a data set: crops and flips, with their labels.

python3 tools/browse.py photos
python3 tools/browse.py data/imagenet/ofrecord/train --epoch=3 --num=40 --output=sheet.png
python3 tools/browse.py train.npz --image_size=32

The pictures come out of the loader that training uses, so the same --seed, --model and
--batch_size_per_device give those of the first iterations of a run with one process.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (first, see there)

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import config
import ofrecord_util
from cnns.convert.cache import Settings, convert_for_training
from cnns.data.datasets import open_train_dataset
from cnns.data.images import Preprocessing, class_names
from cnns.data.kinds import Dataset
from cnns.errors import RunError, UsageError, run_main
from cnns.flags.augment import BY_PICTURE, picture_flags_given
from cnns.flags.data import AUGMENTATION_FLAGS, FOLDER_FLAGS
from cnns.flags.defaults import BATCH_SIZE_PER_DEVICE
from cnns.flags.parser import Parser
from cnns.flags.values import number
from cnns.log import notice
from model_registry import MODELS

CELL_WIDTH = 128  # pixels, at least, so that labels can be read
LABEL_HEIGHT, MARGIN, COLUMNS = 18, 6, 8
FONT = 12


def make_parser() -> Parser:
    parser = Parser("Draw what training sees of a data set, after crop and flip, with labels.")
    add = parser.add_argument
    add("data", metavar="DATA", help="directory of parts, .npz file or folder of images")
    add(
        "--output",
        type=Path,
        default=Path("browse.png"),
        help="file to write, .png or .jpg; unless given, browse.png",
    )
    add("--num", type=number(int, 1, 1000), default=32, help="pictures; unless given, 32")
    add("--epoch", type=number(int, 0), default=0, help="of training; unless given, 0")
    parser.formatter_class = argparse.HelpFormatter  # the texts of flags name their defaults
    group = parser.add_argument_group("as in training")
    flags = config.make_parser("train").flags
    own = {"model": "resnet50", "batch_size_per_device": BATCH_SIZE_PER_DEVICE}
    names = ("seed", *own, "image_size", *AUGMENTATION_FLAGS, *BY_PICTURE)
    names += ("shuffle_buffer_size",)
    for name in (*names, *FOLDER_FLAGS):
        flags[name].add_to(group, name)
        parser.set_defaults(**{name: own.get(name, flags[name].default)})
    return parser


def open_data(args: Namespace) -> Dataset:
    settings = Settings(**{name: getattr(args, name) for name in FOLDER_FLAGS})
    path, _, notices = convert_for_training(args.data, None, settings=settings)
    for text in notices:
        notice(text)
    try:
        return open_train_dataset(path)
    except UsageError as error:
        raise UsageError(str(error).replace("--train_data_dir", "DATA")) from None


def pictures(
    data: Dataset, args: Namespace, preprocessing: Preprocessing
) -> Iterator[tuple[np.ndarray, int]]:
    """(size, size, 3) uint8 and label of each, in the order of training, without end."""
    loader = ofrecord_util.train_loader(
        data,
        batch_size=min(args.batch_size_per_device, data.num_examples),
        preprocessing=preprocessing,
        augmentation=config.augmentation(args),
        seed=args.seed,
        device="cpu",
        data_order="global" if picture_flags_given(args, BY_PICTURE) else "native",
    )
    mean, std = np.array(preprocessing.rgb_mean), np.array(preprocessing.rgb_std)
    for batch in loader.batches(args.epoch):
        images, labels = loader(*batch)
        rows = images.to_local().numpy().transpose(0, 2, 3, 1) * std + mean
        yield from zip(
            np.rint(rows).clip(0, 255).astype(np.uint8), labels.to_local().numpy(), strict=True
        )


def draw_sheet(cells: list[tuple[np.ndarray, str]]) -> Image.Image:
    """Pictures in rows, each with a line of text below it."""
    size = max(CELL_WIDTH, cells[0][0].shape[0])
    columns = min(COLUMNS, len(cells))
    step = size + MARGIN, size + LABEL_HEIGHT + MARGIN
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step[0] + MARGIN, rows * step[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for i, (pixels, text) in enumerate(cells):
        left, top = MARGIN + i % columns * step[0], MARGIN + i // columns * step[1]
        picture = Image.fromarray(pixels)
        if picture.width < size:  # small pictures are shown with square pixels
            picture = picture.resize((size, size), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        while len(text) > 1 and draw.textlength(text, font) > size:
            text = text[:-2].rstrip() + "…"
        draw.text((left, top + size + 2), text, "black", font)
    return sheet


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--output={args.output} must end in .png or .jpg")
    data = open_data(args)
    preprocessing = MODELS[args.model].override(
        MODELS[args.model].preprocessing(), image_size=args.image_size
    )
    names = class_names(data.num_classes or 1000, data.classes)
    cells = []
    for pixels, label in pictures(data, args, preprocessing):
        known = 0 <= label < len(names)
        cells.append((pixels, names[label] if known else f"class {label}"))
        if len(cells) == args.num:
            break
    try:
        draw_sheet(cells).save(args.output)
    except OSError as error:
        raise RunError(f"--output={args.output}: cannot write: {error.strerror}") from None
    print(f"{args.output}: {len(cells)} pictures of epoch {args.epoch}, from {data.path}")


if __name__ == "__main__":
    sys.exit(run_main(main))
