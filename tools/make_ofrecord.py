"""Make OFRecord parts, as the training and evaluation scripts read them, from images.

    python3 tools/make_ofrecord.py imagenet --input=downloads --output=data/imagenet/ofrecord
    python3 tools/make_ofrecord.py folder --input=my_photos --output=data/my_photos
    python3 tools/make_ofrecord.py idx --input=/usr/share/datasets/fashion-mnist \\
        --output=data/fashion_mnist --dataset=fashion_mnist
"""

import argparse
import gzip
import hashlib
import io
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.environment  # noqa: F401  (first, see there)

import numpy as np
from PIL import Image

from cnns.convert import folder
from cnns.convert.jpegs import add_max_pixels, encode_jpeg
from cnns.convert.unfinished import identity_of_manifest, partial_name
from cnns.convert.writer import (
    Example,
    Split,
    check_output,
    default_num_parts,
    shareable,
    write_dataset,
)
from cnns.data.images import CLASSES_FILE, MAX_PIXELS, read_classes
from cnns.errors import RunError, UsageError, printable, run_main
from cnns.flags.parser import Parser, add_switch
from cnns.flags.values import number
from cnns.inputs import Tree, open_input, unpacked_limit
from cnns.interrupts import exit_on_signals
from tools import cifar, imagenet

IMAGENET_PARTS = 256

IDX_MAGIC = {"images": 2051, "labels": 2049}  # unsigned bytes with 3 dimensions, with 1
IDX_PREFIXES = {"train": "train", "validation": "t10k"}
IDX_CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,"
    "Ankle boot".split(","),
}


def note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)


# Job `folder`.


def folder_job(args: argparse.Namespace) -> tuple[list[Split], list[str]]:
    """The splits and the class names of --input: one class list for training and validation."""
    if args.val_split == 1:
        raise UsageError("--val_split=1 leaves nothing to train on; give less")
    notes: list[str] = []
    roots = folder.find_roots(args.input, flag="--input", val_split=args.val_split, notes=notes)
    tree = Tree(args.input, follow_links=args.follow_links)
    for root in roots.values():
        if root != args.input and root.is_symlink():
            tree.check_link(str(root))
    classes, wordnet_ids = read_classes(args.classes) if args.classes else (None, [])
    sides, names = folder.find_sides(
        roots,
        dict.fromkeys(roots, tree),
        classes=classes,
        wordnet_ids=wordnet_ids,
        source=str(args.classes),
        notes=notes,
    )
    tree.check_once()
    if args.val_split is not None:
        (side,) = sides.values()
        digests = folder.file_digests(side.absolute)
        train, validation, about = folder.split_side(
            side, digests, share=args.val_split, seed=args.seed
        )
        sides = {"train": train, "validation": validation}
        notes += about
    for text in notes:
        note(text)
    return [
        side.split(args.output / name, max_pixels=args.max_pixels) for name, side in sides.items()
    ], names


# Job `idx`.


@dataclass(frozen=True)
class SmallImages:
    """Loads the i-th of an array of images, greyscale or RGB.

    At quality 100 a pixel of Fashion-MNIST is off by 2 of 255 at most, on average by 0.06; the
    decoders read no lossless format.
    """

    images: np.ndarray  # (N, H, W) or (N, H, W, 3) uint8
    labels: np.ndarray  # (N,) uint8

    def __call__(self, i: int) -> Example:
        image = Image.fromarray(self.images[i])
        return Example(encode_jpeg(image, quality=100), int(self.labels[i]))

    def fingerprint(self, i: int, *, with_time: bool = True) -> bytes:
        return hashlib.sha256(self.images[i].tobytes() + bytes((self.labels[i],))).digest()


def read_idx(path: Path, what: str) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    `what` is "images", which gives (N, H, W), or "labels", which gives (N,), both uint8.
    Raises UsageError if the file cannot be opened, RunError if it is not such a file.
    """
    try:
        with open_input(path) as file:
            data = file.read()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if data[:2] == b"\x1f\x8b":
        limit = unpacked_limit(len(data))
        try:
            with gzip.open(io.BytesIO(data)) as unpacked:
                data = unpacked.read(limit + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"{path}: the gzip data are damaged: {error}") from None
        if len(data) > limit:
            raise RunError(f"{path}: unpacks to more than {limit} bytes; gunzip it first")
    magic = int.from_bytes(data[:4], "big")
    if len(data) < 4 or magic != IDX_MAGIC[what]:
        kinds = {number: f", which is a file of {kind}" for kind, number in IDX_MAGIC.items()}
        raise RunError(
            f"{path}: begins with {magic}{kinds.get(magic, '')}; "
            f"an IDX file of {what} begins with {IDX_MAGIC[what]}"
        )
    header = 4 + 4 * (magic & 0xFF)  # the last byte of the magic number counts the dimensions
    shape = tuple(int.from_bytes(data[k : k + 4], "big") for k in range(4, header, 4))
    needed = header + int(np.prod(shape, dtype=object))
    if len(data) < header or len(data) != needed:
        raise RunError(
            f"{path}: holds {len(data)} bytes, but its header says {needed} "
            f"({' x '.join(map(str, shape))} {what})"
        )
    if 0 in shape:
        raise RunError(f"{path}: holds no {what} (its header says {' x '.join(map(str, shape))})")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def find_idx_file(folder: Path, stem: str) -> Path:
    """`train-images-idx3-ubyte.gz` or one of the other spellings of that name in use."""
    spellings = [stem + end for end in (".gz", "")]
    spellings += [name.replace("-idx", ".idx") for name in spellings]
    for name in spellings:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"--input={folder}: holds no {spellings[0]}; needs the four files of the family "
        "({train,t10k}-{images-idx3,labels-idx1}-ubyte, .gz or not), or give --images and --labels"
    )


def find_idx_pairs(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """(images, labels) by the name of the output; "" for --output itself."""
    if args.input:
        if args.images or args.labels:
            raise UsageError("--input names a folder of four files: give no --images or --labels")
        return {
            name: (
                find_idx_file(args.input, f"{prefix}-images-idx3-ubyte"),
                find_idx_file(args.input, f"{prefix}-labels-idx1-ubyte"),
            )
            for name, prefix in IDX_PREFIXES.items()
        }
    if not (args.images and args.labels):
        raise UsageError("give --input, or both --images and --labels")
    if args.num_val_examples:
        raise UsageError("--num_val_examples needs --input; with --images there is no validation")
    return {"": (args.images, args.labels)}


def idx_classes(args: argparse.Namespace, num_labels: int) -> tuple[list[str], str]:
    """Class names and the flag they come from; unless given, the numbers below `num_labels`."""
    if args.dataset and args.classes:
        raise UsageError("--dataset and --classes both name the classes: give one of them")
    if args.classes:
        return read_classes(args.classes)[0], f"--classes={args.classes}"
    if args.dataset:
        return IDX_CLASSES[args.dataset], f"--dataset={args.dataset}"
    return [str(label) for label in range(num_labels)], ""


def idx_job(args: argparse.Namespace) -> tuple[list[Split], list[str]]:
    """The splits and the class names of the files of an MNIST family."""
    pairs = find_idx_pairs(args)
    arrays = {}
    for name, (image_path, label_path) in pairs.items():
        images, labels = read_idx(image_path, "images"), read_idx(label_path, "labels")
        if len(images) != len(labels):
            raise RunError(
                f"{label_path}: holds {len(labels)} labels, but {image_path} {len(images)} images"
            )
        arrays[name] = images, labels
    num_labels = 1 + max(int(labels.max()) for _, labels in arrays.values())
    classes, source = idx_classes(args, num_labels)
    splits = []
    for name, (images, labels) in arrays.items():
        if labels.max() >= len(classes):
            i = int(np.argmax(labels >= len(classes)))
            raise RunError(
                f"{pairs[name][1]}: label {labels[i]} of example {i} is outside of the "
                f"{len(classes)} classes of {source}"
            )
        flag = "num_val_examples" if name == "validation" else "num_examples"
        wanted = getattr(args, flag) or len(images)
        if wanted > len(images):
            raise UsageError(f"--{flag}={wanted}: {pairs[name][0]} holds only {len(images)} images")
        names = [f"{pairs[name][0].name}[{i}]" for i in range(wanted)]
        splits.append(Split(args.output / name, names, SmallImages(images, labels)))
    return splits, classes


# Job `cifar`.


def cifar_job(args: argparse.Namespace) -> tuple[list[Split], list[str]]:
    """The splits and the class names of a binary archive of CIFAR."""
    splits, classes = cifar.read_cifar(args.input, labels=args.labels)
    return [
        Split(args.output / name, names, SmallImages(images, labels))
        for name, (images, labels, names) in splits.items()
    ], classes


# Job `imagenet`.


def imagenet_job(args: argparse.Namespace) -> tuple[list[Split], list[str]]:
    """The splits and the class names of ImageNet's archives or folders."""
    sources = imagenet.find_sources(args.input, train=args.train, validation=args.validation)
    outputs = [args.output / name for name in sources]
    if not any(partial_name(output).exists() for output in outputs):
        for output in outputs:  # now, as indexing an archive takes a while
            if identity_of_manifest(output) is None:
                check_output(output)
    loaders, classes, notices = imagenet.load_images(
        sources,
        classes_path=args.classes or CLASSES_FILE,
        val_labels_path=args.val_labels or imagenet.VAL_LABELS,
        resize_shorter=args.resize_shorter,
        decode=args.check == "decode",
        max_pixels=args.max_pixels,
        follow_links=args.follow_links,
    )
    for notice in notices:
        note(notice)
    return [
        Split(args.output / name, loader.index.names, loader, list_changes=True)
        for name, loader in loaders.items()
    ], classes


# The command line.


def add_paths(parser: Parser, **texts: str) -> None:
    for name, text in texts.items():
        parser.add_argument(f"--{name}", type=Path, help=text)


def add_output_flags(parser: Parser, *, parts: str) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, help="new or empty directory")
    text = f"parts per directory; unless given, {parts}"
    add("--num_parts", type=number(int, 1, 99999), help=text)
    add("--seed", type=number(int, 0), default=0, help="of the shuffle over all parts")
    text = "processes; unless given, one per core, and fewer for small data; the bytes are the same"
    add("--num_workers", type=number(int, 1, 999), help=text)


DEFAULT_PARTS = (
    "one per 10000 examples, rounded up to a multiple of 8, which 2, 4 and 8 processes can share; "
    "for small data 4, 2 or 1, of 64 examples at least"
)


def add_image_flags(parser: Parser) -> None:
    add_switch(parser, "--skip_bad", "leave bad images out, and list them in the manifest")
    text = "read what links lead to outside of the input folder; unless given, they are refused"
    add_switch(parser, "--follow_links", text)
    add_max_pixels(parser)


def add_imagenet_parser(jobs: "argparse._SubParsersAction[Parser]") -> None:
    parser = jobs.add_parser(
        "imagenet",
        help="ImageNet's archives as downloaded, or unpacked",
        description="Convert ImageNet (ILSVRC 2012) from its two archives, which are not unpacked, "
        "or from folders, into <output>/train and <output>/validation. RGB JPEGs are stored as "
        "they are, after a check; CMYK and greyscale JPEGs and other formats become RGB JPEGs, and "
        "the report says which. Names are checked before anything is written. A bad image ends the "
        "run at its end, with a list. An interrupted run is resumed when it is started again.",
    )
    add_paths(
        parser,
        input="folder with ILSVRC2012_img_train.tar or train/, and ILSVRC2012_img_val.tar or "
        "validation/ or val/",
        train="archive or folder, in place of what --input holds",
        validation="the same; without --input, only what is given is converted",
    )
    add_output_flags(parser, parts=f"{IMAGENET_PARTS}, or fewer for tiny data")
    parser.add_argument(
        "--resize_shorter",
        type=number(int, 16),
        help="shrink larger pictures to this many pixels on the shorter side, as JPEG of quality "
        "95; unless given, bytes are kept",
    )
    parser.add_argument(
        "--check",
        choices=("markers", "decode"),
        default="markers",
        help="how JPEGs are checked: walk their structure to the end, or decode them as well, "
        "which takes several times as long",
    )
    add_image_flags(parser)
    add_paths(
        parser,
        classes="lines of a WordNet id and a name: their order gives the labels; unless given, "
        "data/imagenet_classes.txt",
        val_labels="lines of a label or a WordNet id, one for each flat validation image, in the "
        "order of their numbers; unless given, data/imagenet_val_labels.txt",
    )
    parser.set_defaults(
        make=imagenet_job, choose_num_parts=lambda n: shareable(min(IMAGENET_PARTS, n))
    )


def add_folder_parser(jobs: "argparse._SubParsersAction[Parser]") -> None:
    parser = jobs.add_parser(
        "folder",
        help="image files, one sub-folder per class",
        description="Convert image files. If --input holds train/ and validation/ (or val/), each "
        "with one sub-folder per class, both go into <output>/train and <output>/validation, with "
        "the classes of train/. Else --input itself holds one sub-folder per class, and --output "
        "becomes one directory of parts. Labels are the sub-folders in the order of their names "
        "(by code point), counted from 0. Upright RGB JPEGs are stored as they are, everything "
        "else as an upright RGB JPEG. All images are checked; a bad one ends the run, with a list "
        "and no output.",
    )
    parser.add_argument("--input", type=Path, required=True, help="directory of images")
    add_output_flags(parser, parts=DEFAULT_PARTS)
    add_paths(
        parser,
        classes="file with one class name a line, or a WordNet id and a name as in "
        "data/imagenet_classes.txt: its order gives the labels, and folders are named by id, name "
        "or first synonym",
    )
    parser.add_argument(
        "--val_split",
        type=number(float, 0, 1, above=True),
        help="share of each class that goes into <output>/validation, while the rest goes into "
        "<output>/train; drawn by --seed and content, and equal files stay on one side; unless "
        "given, a folder that is not split becomes one directory",
    )
    add_image_flags(parser)
    parser.set_defaults(make=folder_job)


def add_idx_parser(jobs: "argparse._SubParsersAction[Parser]") -> None:
    parser = jobs.add_parser(
        "idx",
        help="IDX files of the MNIST family",
        description="Convert IDX files, gzipped or not. --input with the family's four files makes "
        "<output>/train and <output>/validation, for example: python3 tools/make_ofrecord.py idx "
        "--input=/usr/share/datasets/fashion-mnist --output=data/fashion_mnist "
        "--dataset=fashion_mnist. --images and --labels make --output one directory of parts. "
        "Images are stored as RGB JPEG of quality 100.",
    )
    add_paths(
        parser,
        input="directory with {train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, "
        "with or without .gz",
        images="one file of images, in place of --input",
        labels="its labels",
    )
    add_output_flags(parser, parts=DEFAULT_PARTS)
    add = parser.add_argument
    add("--num_examples", type=number(int, 1), help="convert only the first N; unless given, all")
    add("--num_val_examples", type=number(int, 1), help="the same for the validation set")
    text = "whose class names go into the manifest"
    add("--dataset", choices=sorted(IDX_CLASSES), help=text)
    add_paths(
        parser,
        classes="file with one class name a line; unless this or --dataset is given, names are "
        "the labels' numbers",
    )
    parser.set_defaults(make=idx_job)


def add_cifar_parser(jobs: "argparse._SubParsersAction[Parser]") -> None:
    parser = jobs.add_parser(
        "cifar",
        help="binary archives of CIFAR-10 and CIFAR-100",
        description="Convert the binary version of CIFAR-10 or CIFAR-100 into <output>/train and "
        "<output>/validation. Class names are the archive's. Images are stored as RGB JPEG of "
        "quality 100.",
    )
    text = "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, or the folder it was unpacked to"
    parser.add_argument("--input", type=Path, required=True, help=text)
    add_output_flags(parser, parts=DEFAULT_PARTS)
    text = "CIFAR-100 only: 100 or 20 classes; unless given, fine"
    parser.add_argument("--labels", choices=("fine", "coarse"), help=text)
    parser.set_defaults(make=cifar_job)


def make_parser() -> Parser:
    parser = Parser(
        "Make OFRecord parts, as the training and evaluation scripts read them.",
        doc=__doc__,
        epilog="Read on: JOB --help, tools/README.md, docs/data.md.",
    )
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB", title="jobs")
    for add_parser in (add_imagenet_parser, add_folder_parser, add_idx_parser, add_cifar_parser):
        add_parser(jobs)
    return parser


# Not named in the manifest unless given, as older directories that are resumed do not know them.
UNREMARKABLE = (("follow_links", False), ("max_pixels", MAX_PIXELS), ("val_split", None))
# Not in the manifest, so that equal runs into two places give equal bytes.
NOT_IN_MANIFEST = ("job", "make", "choose_num_parts", "output", "num_workers")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    splits, classes = args.make(args)
    arguments = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in NOT_IN_MANIFEST and (name, value) not in UNREMARKABLE
    }
    write_dataset(
        splits,
        classes=classes,
        num_parts=args.num_parts,
        choose_num_parts=getattr(args, "choose_num_parts", default_num_parts),
        seed=args.seed,
        skip_bad=getattr(args, "skip_bad", False),
        num_workers=args.num_workers,
        made_by={"tool": f"tools/make_ofrecord.py {args.job}", "arguments": arguments},
    )


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
