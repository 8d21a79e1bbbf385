"""Image files, one sub-folder per class: found, labelled, split, and loaded for a data set."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cnns.convert.jpegs import upright_jpeg
from cnns.convert.pool import Progress
from cnns.convert.writer import BLOCK_BYTES, Example, Split, file_stamp, read_image
from cnns.data.images import IMAGE_SUFFIXES, MAX_PIXELS
from cnns.errors import RunError, UsageError, printable
from cnns.inputs import Tree, open_input

VALIDATION_FOLDERS = ("validation", "val")
FEW_IMAGES = 10  # a class with fewer is named
READING_THREADS = 8
SHOWN_CLASSES = 20  # whose images are counted one by one

Notes = list[str]


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of `names` for a message."""
    every = list(names)
    return ", ".join(every[:limit]) + (", ..." if len(every) > limit else "")


def is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class ImageFiles:
    """Loads the i-th of many image files."""

    root: str
    paths: list[str]  # below root
    labels: list[int]
    max_pixels: int

    def __call__(self, i: int) -> Example:
        data = read_image(os.path.join(self.root, self.paths[i]))
        data, was = upright_jpeg(data, max_pixels=self.max_pixels)
        more = {"filename": os.fsencode(self.paths[i])}
        return Example(data, self.labels[i], change=was, more=more)

    def fingerprint(self, i: int, *, with_time: bool = True) -> bytes:
        path = os.path.join(self.root, self.paths[i])
        # Records of earlier versions had no name.
        return b"named " + file_stamp(path, self.labels[i], with_time=with_time)


@dataclass(frozen=True)
class Side:
    """The images of training, of validation, or of both before they are split."""

    root: Path
    paths: list[str]  # below root, by class
    labels: list[int]
    classes: list[str]
    prefix: str = ""  # in messages

    @property
    def absolute(self) -> list[str]:
        return [os.path.join(self.root, path) for path in self.paths]

    def only(self, numbers: Sequence[int]) -> "Side":
        return replace(
            self,
            paths=[self.paths[i] for i in numbers],
            labels=[self.labels[i] for i in numbers],
        )

    def split(self, output: Path, *, max_pixels: int = MAX_PIXELS) -> Split:
        """What `write_dataset` takes."""
        names = [printable(os.path.join(self.prefix, path)) for path in self.paths]
        return Split(output, names, ImageFiles(str(self.root), self.paths, self.labels, max_pixels))


# Finding them.


def subfolders(folder: Path, *, named: str = "") -> list[str]:
    """Names of the folders in `folder`, sorted by code point, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{named}{folder}: cannot be read: {error.strerror}") from None


def find_roots(
    root: Path, *, flag: str, val_split: float | None, may_split: bool = False, notes: Notes
) -> dict[str, Path]:
    """Folders of classes in `root` by the names of their outputs; "" for one that is not split.

    Raises UsageError where `val_split` is given for what is split.

    Args:
        may_split: take train/ without a validation/ for one that is to be split, as `val_split`
            does.
    """
    names = subfolders(root, named=f"{flag}=")
    validation = [name for name in VALIDATION_FOLDERS if name in names]
    if "train" not in names or not (validation or set(names) <= {"train", "test"}):
        return {"": root}
    if not validation and (may_split or val_split is not None):
        return {"": root / "train"}
    if len(validation) != 1:
        found = "both validation/ and val/" if validation else "train/ but no validation/"
        raise UsageError(
            f"{flag}={root}: holds {found}; needs train/ and one of validation/ and val/, or the "
            f"class folders themselves ({flag}={root / 'train'} converts train/ alone, and "
            "--val_split=0.1 keeps a tenth of it for validation)"
        )
    if val_split is not None:
        raise UsageError(
            f"--val_split={val_split:g}: {root} holds {validation[0]}/ already; leave it out, or "
            f"split train/ alone ({flag}={root / 'train'})"
        )
    others = [name for name in names if name not in ("train", *validation)]
    if others:
        notes.append(f"{root}: left out, as neither train nor validation: {some(others)}")
    return {"train": root / "train", "validation": root / validation[0]}


def find_images(root: Path, tree: Tree, *, notes: Notes) -> dict[str, list[str]]:
    """Image files below each class folder of `root`, as sorted paths relative to `root`.

    Raises RunError for a folder without images, an image outside the class folders, and as `Tree`.
    """
    classes: dict[str, list[str]] = {name: [] for name in subfolders(root)}
    others = []
    source, waiting = str(root), [""]
    while waiting:
        below = waiting.pop()
        try:
            entries = list(tree.entries(str(root / below)))
        except OSError as error:
            raise RunError(f"{error.filename}: cannot be read: {error.strerror}") from None
        folders = [os.path.join(below, name) for name, is_folder in entries if is_folder]
        waiting += reversed(folders)
        for name in (name for name, is_folder in entries if not is_folder):
            path = os.path.join(below, name)
            if not is_image_name(name):
                others.append(path)
            elif not below:
                raise RunError(
                    f"{root / name}: is outside the class folders, so it has no class; move it "
                    "into one"
                )
            else:
                classes[path.split(os.sep, 1)[0]].append(path)
                tree.add(source, path)
    if not classes:
        raise RunError(f"{root}: holds no class folders; needs one sub-folder of images per class")
    for name, paths in classes.items():
        if not paths:
            raise RunError(
                f"{root / name}: holds no image ({' '.join(IMAGE_SUFFIXES)}); add "
                "images or remove the folder"
            )
        if printable(name) != name:
            raise RunError(f"{root / name}: rename it to printable UTF-8")
    if others:
        notes.append(
            f"{root}: left out, not named like images ({len(others)}): {some(sorted(others))}"
        )
    return {name: sorted(paths) for name, paths in classes.items()}


def folder_lookup(names: Sequence[str], wordnet_ids: Sequence[str]) -> dict[str, list[int]]:
    """Labels by the folder names that stand for them: WordNet id, name, first synonym."""
    lookup = defaultdict(list)
    for label, name in enumerate(names):
        for key in {name, name.split(",")[0], *wordnet_ids[label : label + 1]}:
            lookup[key].append(label)
    return lookup


def folder_labels(
    folders: Iterable[str], lookup: dict[str, list[int]], *, root: Path, source: str
) -> list[int]:
    """The label of each class folder. Raises RunError where it is none, unclear, or another's."""
    labels, folder_of = [], dict[int, str]()
    for folder in folders:
        found = lookup.get(folder)
        if not found:
            raise RunError(
                f"{root / folder}: {folder!r} is not a class of {source}; rename or remove the "
                "folder"
            )
        if len(found) > 1:
            raise RunError(
                f"{root / folder}: {folder!r} may be class {found[0]} or {found[1]} of {source}; "
                "name the folder by its WordNet id"
            )
        twin = folder_of.setdefault(found[0], folder)
        if twin != folder:
            raise RunError(
                f"{root / folder}: is the same class of {source} as {twin!r}; merge the folders"
            )
        labels.append(found[0])
    return labels


def find_sides(
    roots: Mapping[str, Path],
    trees: Mapping[str, Tree],
    *,
    classes: Sequence[str] | None,
    wordnet_ids: Sequence[str] = (),
    source: str = "",
    notes: Notes,
) -> tuple[dict[str, Side], list[str]]:
    """The images below each of `roots`, and the names of the classes.

    Args:
        trees: of the same names, for the links in each.
        classes: their order gives the labels; else the folders of the first root give it.
        source: where `classes` are from, for messages.
    """
    found = {name: find_images(root, trees[name], notes=notes) for name, root in roots.items()}
    first = next(iter(found))
    if classes is None:
        classes, source = list(found[first]), str(roots[first])
        lookup = {name: [label] for label, name in enumerate(classes)}
    else:
        lookup = folder_lookup(classes, wordnet_ids)
    sides = {}
    for name, folders in found.items():
        root = roots[name]
        labels = folder_labels(folders, lookup, root=root, source=source)
        missing = sorted(set(range(len(classes))) - set(labels))
        if missing:
            notes.append(
                f"{root}: no folder for {len(missing)} of {len(classes)} classes: "
                + some(classes[label] for label in missing)
            )
        sides[name] = Side(
            root,
            [path for paths in folders.values() for path in paths],
            [n for n, paths in zip(labels, folders.values(), strict=True) for _ in paths],
            list(classes),
            prefix=root.name if name else "",
        )
    return sides, list(classes)


# Splitting them.


def file_digest(path: str) -> str:
    """SHA-256 of a file; of one that cannot be read, its own path. The writer names those."""
    digest = hashlib.sha256()
    try:
        with open_input(path) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return path
    return digest.hexdigest()


def file_digests(paths: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(READING_THREADS) as pool, Progress(len(paths), unit="files") as bar:
        digests = []
        for digest in pool.map(file_digest, paths):
            digests.append(digest)
            bar.advance()
    return digests


def content_digest(sources: Mapping[str, tuple["Side", Sequence[str]]]) -> str:
    """Tells images of other names, contents or classes, wherever they lie and however old."""
    digest = hashlib.sha256()
    for name, (side, digests) in sources.items():
        for path, label, each in zip(side.paths, side.labels, digests, strict=True):
            digest.update(os.fsencode(f"{name}\0{path}\0{label}\0{each}\0"))
    return digest.hexdigest()


def choose_validation(
    labels: Sequence[int], digests: Sequence[str], *, share: float, seed: int
) -> list[int]:
    """Which images are for validation: `share` of each class, rounded, at least one of two.

    It depends on the contents and the seed alone, and equal files stay on one side. Those of more
    than one class are for training.
    """
    groups = defaultdict(list)
    for i, digest in enumerate(digests):
        groups[digest].append(i)

    def key(group: list[int]) -> bytes:
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(digests[group[0]])).digest()

    of_class: dict[int, list[list[int]]] = defaultdict(list)
    for group in sorted(groups.values(), key=key):
        if len({labels[i] for i in group}) == 1:
            of_class[labels[group[0]]].append(group)
    chosen: list[int] = []
    for label, count in Counter(labels).items():
        wanted = min(max(1, round(share * count)), count - 1)
        taken: list[int] = []
        for group in of_class[label]:
            if len(taken) + len(group) <= wanted:
                taken += group
        if not taken and wanted:  # every picture of it is there several times
            smallest = min(of_class[label], key=len, default=[])
            taken = smallest if len(smallest) < count else []
        chosen += taken
    return sorted(chosen)


def split_side(
    side: Side, digests: Sequence[str], *, share: float, seed: int
) -> tuple[Side, Side, Notes]:
    """Training and validation of `side`, and what the user should know of it.

    Raises RunError where nothing can be kept for validation.
    """
    validation = choose_validation(side.labels, digests, share=share, seed=seed)
    if not validation:
        raise RunError(
            f"{side.root}: no class has two different images, so none can be kept for validation; "
            "add images, or give a folder of others with --val_data_dir"
        )
    held = set(validation)
    train = [i for i in range(len(side.paths)) if i not in held]
    sides = {"train": side.only(train), "validation": side.only(validation)}
    return sides["train"], sides["validation"], describe(sides, {"": (side, digests)})


def describe(sides: Mapping[str, Side], sources: Mapping[str, tuple[Side, Sequence[str]]]) -> Notes:
    """Images per class, classes with few of them, and files that are equal.

    `sources` are the images as they were found, with their digests.
    """
    classes = next(iter(sides.values())).classes
    counts = {name: Counter(side.labels) for name, side in sides.items()}
    per_class = [[count[label] for count in counts.values()] for label in range(len(classes))]
    totals = list(map(sum, per_class))
    if len(classes) <= SHOWN_CLASSES:
        text = ", ".join(
            f"{name} {'+'.join(map(str, each))}"
            for name, each in zip(classes, per_class, strict=True)
        )
    else:
        text = f"{len(classes)} classes of {min(totals)} to {max(totals)}"
    notes = [f"Images ({' + '.join(sides)}): {text}."]
    few = [(total, name) for total, name in zip(totals, classes, strict=True) if total < FEW_IMAGES]
    if few:
        listed = some((f"{name} ({total})" for total, name in sorted(few)), 10)
        notes.append(f"Classes with fewer than {FEW_IMAGES} images: {listed}.")
    return notes + describe_equal(sources)


def describe_equal(sources: Mapping[str, tuple[Side, Sequence[str]]]) -> Notes:
    groups: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for name, path, label, digest in each_file(sources):
        groups[digest].append((name, label, path))
    equal = [group for group in groups.values() if len(group) > 1]
    of_two_sides = [group for group in equal if len({name for name, *_ in group}) > 1]
    of_two_classes = [group for group in equal if len({label for _, label, _ in group}) > 1]
    notes = []
    for found, what in (
        (of_two_sides, "in training and in validation, which makes its figures too good"),
        (of_two_classes, "in two classes, of which one is wrong"),
        ([g for g in equal if g not in of_two_sides + of_two_classes], "there more than once"),
    ):
        if found:
            shown = some(" = ".join(printable(path) for *_, path in group[:3]) for group in found)
            plural = "images are" if len(found) > 1 else "image is"
            notes.append(f"{len(found)} {plural} {what}: {shown}.")
    return notes


def each_file(
    sources: Mapping[str, tuple[Side, Sequence[str]]],
) -> Iterator[tuple[str, str, int, str]]:
    """(name of the source, path, label, digest) of every image."""
    for name, (side, digests) in sources.items():
        for path, label, digest in zip(side.paths, side.labels, digests, strict=True):
            yield name, os.path.join(side.prefix, path), label, digest
