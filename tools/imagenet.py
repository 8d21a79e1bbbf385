"""ImageNet's own files, the archives as downloaded or folders, as an index of images.

An archive is not unpacked: its headers are walked once, jumping over the images, and what is kept
of each image is its name, its place, its size and its label, some 60 bytes. Everything that can be
wrong with the names is found here, before anything is written.
"""

import functools
import os
import re
import sys
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cnns.data.images import IMAGE_SUFFIXES
from cnns.errors import RunError, UsageError
from tools.jpeg_util import passed_through
from tools.ofrecord_writer import BadImage, Example, file_stamp, read_classes

DATA = Path(__file__).resolve().parents[1] / "data"
CLASSES = DATA / "imagenet_classes.txt"
VAL_LABELS = DATA / "imagenet_val_labels.txt"
NUM_TRAIN = 1_281_167  # images of the official training archive
# What --input may hold, in the order of preference; two of one kind are refused.
PLACES = {
    "train": ("ILSVRC2012_img_train.tar", "train"),
    "validation": ("ILSVRC2012_img_val.tar", "validation", "val"),
}
WORDNET_ID = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TAR_BLOCK = 512
INDEX_SECONDS = 10.0  # between lines of progress


def some(names, limit: int = 5) -> str:
    """The first few of `names` for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


# The index.


@dataclass(frozen=True)
class PackedNames(Sequence):
    """A sequence of strings in one piece of memory: 1.3 million take 40 MB in place of 150."""

    blob: bytes
    bounds: np.ndarray  # (N + 1,) int64

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> str:
        return self.raw(i).decode("utf-8", "surrogateescape")

    def raw(self, i: int) -> bytes:
        return self.blob[self.bounds[i] : self.bounds[i + 1]]

    def take(self, positions) -> "PackedNames":
        return PackedNames.of(self.raw(i) for i in positions)

    @staticmethod
    def of(names) -> "PackedNames":
        blob, bounds = bytearray(), array("q", [0])
        for name in names:
            blob += name
            bounds.append(len(blob))
        return PackedNames(bytes(blob), np.array(bounds, np.int64))


class Index:
    """Images as they are found: path below the source, class folder, and place in an archive."""

    def __init__(self, source: Path):
        self.source = source
        self.is_archive = False
        self.blob, self.bounds = bytearray(), array("q", [0])
        self.offsets, self.sizes = array("q"), array("q")
        self.folders: dict[str, int] = {}  # class folder -> number, in the order of appearance
        self.folder_of = array("i")  # number of each image's folder; -1: in none
        self.others = []  # files that are no images by name

    def add_folder(self, name: str) -> int:
        return self.folders.setdefault(name, len(self.folders))

    def add(self, path: str, folder: str, offset: int = -1, size: int = -1) -> None:
        self.blob += os.fsencode(path)
        self.bounds.append(len(self.blob))
        self.offsets.append(offset)
        self.sizes.append(size)
        self.folder_of.append(self.add_folder(folder) if folder else -1)

    def names(self) -> PackedNames:
        return PackedNames(bytes(self.blob), np.array(self.bounds, np.int64))


def is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def long_name(data: bytes) -> str:
    return os.fsdecode(data.split(b"\0", 1)[0])


def pax_fields(data: bytes) -> dict[str, str]:
    """The fields of an extended header: a sequence of `<length> <key>=<value>` lines."""
    fields, at = {}, 0
    while match := re.compile(rb"(\d+) ([^=]+)=").match(data, at):
        end = at + int(match[1])
        fields[os.fsdecode(match[2])] = os.fsdecode(data[match.end() : end - 1])
        at = max(end, match.end())
    return fields


def plain_header(block: bytes) -> tuple[str, int] | None:
    """Name and size of an ordinary file, or None where tarfile has to look.

    A fifth of tarfile's time, which counts with 1.3 million headers.
    """
    if block[156:157] not in (b"0", b"\0") or len(block) < TAR_BLOCK:
        return None
    name, prefix = block[:100].rstrip(b"\0"), block[345:500].rstrip(b"\0")
    try:
        size, checksum = int(block[124:136].strip(b" \0"), 8), int(block[148:156].strip(b" \0"), 8)
    except ValueError:  # empty, or too large for this notation
        return None
    if size < 0 or prefix or not name or b"\0" in name or name.endswith(b"/"):
        return None
    # The checksum is that of the block with blanks in its own place.
    if sum(block) - sum(block[148:156]) + 8 * 32 != checksum:
        return None
    return name.decode("utf-8", "surrogateescape"), size


def walk_tar(handle: int, begin: int, end: int, where: str) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of each file in a tar archive at bytes `begin` to `end` of a file.

    Reads the headers only. Raises RunError for an archive that is cut off or damaged, or holds
    something else than files and directories.
    """
    at, name, size = begin, None, None
    while True:
        block = os.pread(handle, TAR_BLOCK, at) if at < end else b""
        plain = plain_header(block) if name is None and size is None else None
        if plain and at + TAR_BLOCK + plain[1] <= end:
            yield plain[0], at + TAR_BLOCK, plain[1]
            at += TAR_BLOCK + -(-plain[1] // TAR_BLOCK) * TAR_BLOCK
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # a block of zeros
            return
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise RunError(
                f"{where}: ends at byte {end} without tar's end mark: it is cut off; copy or "
                "download it again"
            ) from None
        except tarfile.HeaderError as error:
            if at == begin:
                gzip = ": it is compressed; gunzip it first" if block[:2] == b"\x1f\x8b" else ""
                raise RunError(f"{where}: is not a tar archive{gzip}") from None
            raise RunError(
                f"{where}: no tar header at byte {at} ({error}): the archive is damaged; copy or "
                "download it again"
            ) from None
        data, length = at + TAR_BLOCK, header.size
        if header.isreg() and size is not None:
            length = size
        at = data + -(-length // TAR_BLOCK) * TAR_BLOCK
        if data + length > end:
            raise RunError(
                f"{where}: {name or header.name} goes on to byte {data + length}, and the archive "
                f"ends at byte {end}: it is cut off; copy or download it again"
            )
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = long_name(os.pread(handle, length, data))
        elif header.type == tarfile.XHDTYPE:
            fields = pax_fields(os.pread(handle, length, data))
            name = fields.get("path", name)
            size = int(fields["size"]) if "size" in fields else size
        elif header.type == tarfile.XGLTYPE:
            continue
        elif header.isdir():
            name = size = None
        elif header.isreg() and header.type != tarfile.GNUTYPE_SPARSE:
            yield name or header.name, data, length
            name = size = None
        else:
            raise RunError(
                f"{where}: {name or header.name} is a link or a special file; pack the images "
                "themselves"
            )


def index_archive(path: Path) -> Index:
    """The images of an archive: of classes, one tar each; in folders; or flat."""
    index = Index(path)
    index.is_archive = True
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        end, printed = os.fstat(handle).st_size, time.monotonic()
        for name, offset, size in walk_tar(handle, 0, end, str(path)):
            if time.monotonic() - printed > INDEX_SECONDS:
                printed = time.monotonic()
                share = offset * 100 // end
                print(f"{path}: reading the headers, {share} % done", file=sys.stderr, flush=True)
            if not name.endswith(".tar"):
                add_member(index, name, "", offset, size)
                continue
            folder = os.path.basename(name)[: -len(".tar")]
            if folder in index.folders:
                raise RunError(f"{path}: holds two archives of the name {folder}.tar")
            index.add_folder(folder)
            inner = f"{path}: {name}"
            for member, at, length in walk_tar(handle, offset, offset + size, inner):
                add_member(index, member, folder, at, length)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    return index


def add_member(index: Index, path: str, folder: str, offset: int, size: int) -> None:
    pieces = [piece for piece in path.split("/") if piece not in ("", ".")]
    name = pieces[-1]
    if not folder and len(pieces) > 1 and WORDNET_ID.fullmatch(pieces[-2]):
        folder = pieces[-2]
    if not is_image_name(name):
        index.others.append(path)
    else:
        index.add(f"{folder}/{name}" if folder else name, folder, offset, size)


def index_folder(root: Path) -> Index:
    """The images of a folder: in class folders, or flat."""
    index = Index(root)

    def scan(folder: str) -> list[str]:
        below = []
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = os.path.join(folder, entry.name)
                    if entry.is_dir():
                        if not entry.name.startswith("."):
                            below.append(path)
                    elif is_image_name(entry.name):
                        index.add(path, folder)
                    else:
                        index.others.append(path)
        except OSError as error:
            raise UsageError(f"{error.filename}: cannot be read: {error.strerror}") from None
        return below

    for folder in scan(""):
        index.add_folder(folder)
        if deeper := scan(folder):
            raise RunError(
                f"{root / deeper[0]}: is a folder in a class folder; images lie directly in those"
            )
    return index


def make_index(source: Path) -> Index:
    return index_folder(source) if source.is_dir() else index_archive(source)


# Labels, and what may be wrong with names.


def read_val_labels(path: Path, wordnet_ids: list[str]) -> np.ndarray:
    """The label of each validation image, in the order of their numbers, which begin with 1.

    A line holds a label, counted from 0, or a WordNet id. Raises UsageError.
    """
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise UsageError(f"{path}: cannot read the labels: {reason}") from None
    label_of = {name: label for label, name in enumerate(wordnet_ids)}
    label_of |= {str(label): label for label in range(len(wordnet_ids))}
    for number, line in enumerate(lines, start=1):
        if line not in label_of:
            hint = ""
            if line == str(len(wordnet_ids)):
                hint = "; ILSVRC's own ids count from 1 and in another order"
            raise UsageError(
                f"{path}: line {number} is {line!r}, which is neither a label of 0 to "
                f"{len(wordnet_ids) - 1} nor the WordNet id of a class{hint}"
            )
    if not lines:
        raise UsageError(f"{path}: is empty; needs one label a line")
    return np.array([label_of[line] for line in lines], np.int32)


def refuse_folders(index: Index, label_of: dict[str, int], names: list[str]) -> None:
    """Raise RunError unless the class folders are the classes of the list, each with an image."""
    unknown = sorted(set(index.folders) - set(label_of))
    if unknown:
        raise RunError(
            f"{index.source}: {len(unknown)} too many: {some(unknown)} "
            f"{'is' if len(unknown) == 1 else 'are'} not among the {len(label_of)} classes"
        )
    missing = sorted(set(label_of) - set(index.folders))
    if missing:
        described = some(f"{wnid} ({names[label_of[wnid]]})" for wnid in missing)
        raise RunError(
            f"{index.source}: {len(missing)} of {len(label_of)} classes missing: {described}; "
            "without them, labels would have no images"
        )
    held = Counter(index.folder_of)
    empty = sorted(name for name, number in index.folders.items() if not held[number])
    if empty:
        raise RunError(f"{index.source}: the class {some(empty)} holds no image")


def train_labels(index: Index, label_of: dict[str, int], names: list[str]) -> np.ndarray:
    paths, folders = index.names(), list(index.folders)
    loose = np.flatnonzero(np.array(index.folder_of) < 0)
    if len(loose):
        raise RunError(
            f"{index.source}: {paths[loose[0]]} lies outside of the class folders, so it has no "
            "class"
        )
    refuse_folders(index, label_of, names)
    for i, number in enumerate(index.folder_of):
        # Of the official names, `n01440764_10026.JPEG`.
        wnid = paths.raw(i).rpartition(b"/")[2][:10].decode("ascii", "replace")
        if wnid[9:] == "_" and wnid[:9] in label_of and wnid[:9] != folders[number]:
            raise RunError(f"{index.source}: {paths[i]} is by its name of another class")
    by_folder = np.array([label_of[folder] for folder in folders], np.int32)
    return by_folder[np.array(index.folder_of)]


def validation_labels(
    index: Index, label_of: dict[str, int], names: list[str], table: np.ndarray, table_name: str
) -> np.ndarray:
    paths, folders = index.names(), list(index.folders)
    labels, seen = np.zeros(len(paths), np.int32), {}
    if folders:
        refuse_folders(index, label_of, names)
    official = 0
    for i, number in enumerate(index.folder_of):
        path = paths[i]
        name = path.rpartition("/")[2]
        if name in seen:
            raise RunError(f"{index.source}: two files have the name {name}: {seen[name]}, {path}")
        seen[name] = path
        match = VAL_NAME.fullmatch(name)
        known = match is not None and 1 <= int(match[1]) <= len(table)
        official += known
        if number >= 0:
            labels[i] = label_of[folders[number]]
            if known and labels[i] != table[int(match[1]) - 1]:
                raise RunError(
                    f"{index.source}: {path} is of class {table[int(match[1]) - 1]} by "
                    f"{table_name}, but its folder is class {labels[i]}"
                )
        elif known:
            labels[i] = table[int(match[1]) - 1]
        else:
            raise RunError(
                f"{index.source}: {path} has no label: {table_name} goes from "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(table):08d}.JPEG"
            )
    if official == len(paths) and official < len(table):
        missing = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, len(table) + 1)]
        missing = [name for name in missing if name not in seen]
        raise RunError(
            f"{index.source}: {len(missing)} of {len(table)} validation images missing: "
            f"{some(missing, 3)}"
        )
    return labels


# Loading.


@functools.lru_cache(maxsize=4)
def open_archive(path: str) -> int:
    return os.open(path, os.O_RDONLY)  # until the process ends


def archive_stamp(path: Path) -> str:
    state = os.stat(path)
    return f"{state.st_size} {state.st_mtime_ns}"


@dataclass(frozen=True)
class Images:
    """Loads the i-th image of an index."""

    source: str  # archive or folder
    stamp: str  # of the archive: its size and time; empty for a folder
    names: PackedNames  # path below the source
    offsets: np.ndarray  # (N,) int64; for folders without use
    sizes: np.ndarray  # (N,) int64; the same
    labels: np.ndarray  # (N,) int32
    numbers: np.ndarray  # (N,) int64, in the order of the names
    classes: list[str]
    wordnet_ids: list[str]
    resize_shorter: int | None
    decode: bool

    def read(self, i: int) -> bytes:
        try:
            if self.stamp:
                size = int(self.sizes[i])
                data = os.pread(open_archive(self.source), size, int(self.offsets[i]))
                if len(data) != size:
                    raise BadImage("the archive has become shorter")
                return data
            with open(os.path.join(self.source, self.names[i]), "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImage(error.strerror) from None

    def __call__(self, i: int) -> Example:
        data, was, info = passed_through(
            self.read(i), shorter=self.resize_shorter, decode=self.decode
        )
        label = int(self.labels[i])
        more = {
            "filename": os.path.basename(self.names.raw(i)),
            "class/synset": self.wordnet_ids[label],
            "class/text": self.classes[label],
            "height": info.height,
            "width": info.width,
            "format": "JPEG",
            "colorspace": "RGB",
            "channels": 3,
            "data_id": b"%d" % self.numbers[i],
        }
        return Example(data, label, change=was, more=more)

    def take(self, positions) -> "Images":
        return replace(
            self,
            names=self.names.take(positions),
            offsets=self.offsets[positions],
            sizes=self.sizes[positions],
            labels=self.labels[positions],
            numbers=self.numbers[positions],
        )

    def fingerprint(self, i: int) -> bytes:
        label = self.labels[i]
        if self.stamp:
            return f"{label} {self.offsets[i]} {self.sizes[i]} {self.stamp}".encode()
        return file_stamp(os.path.join(self.source, self.names[i]), label)


def sorted_images(index: Index, labels: np.ndarray, **settings) -> Images:
    """The images in the order of their names, so that archive and folder come out the same.

    Raises RunError for two of one name.
    """
    names = index.names()
    keys = [names.raw(i) for i in range(len(names))]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    for a, b in zip(order[:-1], order[1:], strict=True):
        if keys[a] == keys[b]:
            raise RunError(f"{index.source}: two files have the name {names[a]}")
    return Images(
        source=str(index.source),
        stamp=archive_stamp(index.source) if index.is_archive else "",
        names=names.take(order),
        offsets=np.array(index.offsets, np.int64)[order],
        sizes=np.array(index.sizes, np.int64)[order],
        labels=labels[order],
        numbers=np.arange(len(names)),
        **settings,
    )


# The sources.


def find_source(root: Path, split: str) -> Path:
    """The archive or the folder of a split below --input. Raises UsageError."""
    found = [name for name in PLACES[split] if (root / name).exists()]
    if not found:
        raise UsageError(
            f"--input={root}: holds neither {PLACES[split][0]} nor {PLACES[split][1]}/; give "
            f"--{split}=FILE_OR_FOLDER, or both --train and --validation without --input"
        )
    if len(found) > 1:
        raise UsageError(
            f"--input={root}: holds {' and '.join(found)}; say which by --{split}={root / found[0]}"
        )
    return root / found[0]


def find_sources(root: Path | None, train: Path | None, validation: Path | None) -> dict[str, Path]:
    """Archive or folder by the name of the split; without `root`, of those that are given."""
    given = {"train": train, "validation": validation}
    if root is None and not any(given.values()):
        raise UsageError("give --input, or --train, --validation or both")
    sources = {}
    for split, path in given.items():
        if path is not None:
            if not path.exists():
                raise UsageError(f"--{split}={path}: there is no such file or folder")
            sources[split] = path
        elif root is not None:
            if not root.is_dir():
                raise UsageError(f"--input={root}: is not a folder")
            sources[split] = find_source(root, split)
    return sources


def load_images(
    sources: dict[str, Path],
    *,
    classes_path: Path = CLASSES,
    val_labels_path: Path = VAL_LABELS,
    resize_shorter: int | None = None,
    decode: bool = False,
) -> tuple[dict[str, Images], list[str], list[str]]:
    """Loaders by split, class names, and notices. Raises UsageError and RunError."""
    names, wordnet_ids = read_classes(classes_path)
    if not wordnet_ids:
        raise UsageError(
            f"--classes={classes_path}: has no WordNet ids, by which folders are named"
        )
    label_of = {wnid: label for label, wnid in enumerate(wordnet_ids)}
    loaders, notices = {}, []
    for split, source in sources.items():
        index = make_index(source)
        if split == "train":
            labels = train_labels(index, label_of, names)
            if classes_path == CLASSES and len(labels) != NUM_TRAIN:
                notices.append(
                    f"{source}: {len(labels)} images; the official archive holds {NUM_TRAIN}"
                )
        else:
            table = read_val_labels(val_labels_path, wordnet_ids)
            labels = validation_labels(index, label_of, names, table, val_labels_path.name)
        if not len(labels):
            raise RunError(f"{source}: holds no images")
        if index.others:
            notices.append(
                f"{source}: left out, as no images by name ({len(index.others)}): "
                f"{some(index.others)}"
            )
        loaders[split] = sorted_images(
            index,
            labels,
            classes=names,
            wordnet_ids=wordnet_ids,
            resize_shorter=resize_shorter,
            decode=decode,
        )
    return loaders, names, notices
