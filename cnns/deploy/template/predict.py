"""Classify pictures with the network of this folder.

python3 predict.py photo.jpg
python3 predict.py photos --output=csv --top_k=3
python3 predict.py photos --model=model_float32.onnx --output=json

Needs numpy, Pillow and ONNX Runtime (requirements.txt), and nothing else.
"""

import argparse
import csv
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

HERE = Path(__file__).resolve().parent
ABOUT = HERE / "about.json"  # which file is the network, and what a file that says nothing means
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MAX_PIXELS = 200_000_000  # of a picture
MAX_RESIZED_PIXELS = 1 << 26
MAX_FAULT = 200  # characters of what a library says
NEEDED = ("classes", "image_size", "resize_shorter", "rgb_mean", "rgb_std", "interpolation")


class BadPicture(Exception):
    """A picture that cannot be used; the message says why, in one line."""


class TooLarge(BadPicture):
    """One of more pixels than are allowed."""


# Pictures.


def read_picture(source: str | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file, by its path or its bytes, as an upright RGB picture; of several frames, the first.

    Raises BadPicture, before anything is decoded where there are more than `max_pixels`.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours
    try:
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source) as file:
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise TooLarge(
                        f"a picture of {width} x {height} pixels, and at most {max_pixels} are read"
                    )
                image.load()
                return to_rgb(upright(image))
    except BadPicture:
        raise
    except UnidentifiedImageError:
        raise BadPicture("not a picture that can be read" if source else "empty") from None
    except Exception as error:  # Pillow's readers raise many kinds on a broken file
        raise BadPicture(f"a damaged picture: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_FAULT] or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Turned as the camera's orientation tag says; a broken tag is ignored."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever the reader of the tags raises
        return image
    return ImageOps.exif_transpose(image) if tag in range(2, 9) else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits is scaled; transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float64)
        low, high = pixels.min(), pixels.max()
        if not 0 <= low <= high <= 65535:  # nor is a NaN
            raise BadPicture(f"grey values from {low:g} to {high:g}, and 0 to 65535 can be read")
        if image.mode != "F" or high > 255:
            pixels = pixels / 65535 * 255
        elif high <= 1:
            pixels = pixels * 255
        image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# The network.


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def read_settings(texts: dict[str, str]) -> dict:
    """What the network needs to know, from the metadata of its file, else from about.json.

    Metadata that are not JSON, as other tools write them, are left alone.
    """
    found = json.loads(ABOUT.read_text(encoding="utf-8")) if ABOUT.is_file() else {}
    for name in set(NEEDED) & set(texts):
        try:
            found[name] = json.loads(texts[name])
        except ValueError:
            continue
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise SystemExit(
            f"predict.py: error: the file does not say its {', '.join(missing)}, and there is no "
            f"{ABOUT.name} beside predict.py that does"
        )
    return found


def default_model() -> str:
    """The file that about.json names."""
    try:
        return str(HERE / json.loads(ABOUT.read_text(encoding="utf-8"))["default"])
    except (OSError, ValueError, KeyError):
        raise SystemExit(f"predict.py: error: no {ABOUT.name} here; give --model") from None


class Network:
    """An exported file, ready to run on the CPU."""

    def __init__(self, path: str | None = None, *, threads: int = 0):
        """`threads` of ONNX Runtime for one picture; 0: as many as there are cores."""
        self.path = path or default_model()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what is wrong is raised
        try:
            self.session = onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has a dozen kinds
            raise SystemExit(
                f"predict.py: error: cannot read {self.path}: {one_line(error)}"
            ) from None
        settings = read_settings(self.session.get_modelmeta().custom_metadata_map)
        self.classes = list(settings["classes"])
        self.size, self.shorter = settings["image_size"], settings["resize_shorter"]
        self.mean = np.asarray(settings["rgb_mean"], np.float32)
        self.std = np.asarray(settings["rgb_std"], np.float32)
        self.resample = INTERPOLATIONS[settings["interpolation"]]
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self.takes_pictures = self.input.type == "tensor(uint8)"

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An RGB picture as the input of the network: resized, its centre cut out, normalised.

        For a file that does that itself, the picture as it is. Raises BadPicture.
        """
        width, height = image.size
        scale = self.shorter / min(width, height)
        shape = (round(width * scale), round(height * scale))
        if shape[0] * shape[1] > MAX_RESIZED_PIXELS:
            raise BadPicture(f"a picture of {width} x {height} pixels is too long for its width")
        if self.takes_pictures:
            return np.asarray(image)
        image = image.resize(shape, self.resample)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return np.ascontiguousarray(((pixels - self.mean) / self.std).transpose(2, 0, 1))

    def probabilities(self, images: list[np.ndarray]) -> np.ndarray:
        """What `prepare` made to (N, classes)."""
        alike = len({image.shape for image in images}) == 1
        if not alike:  # pictures of several sizes
            return np.concatenate([self.probabilities([image]) for image in images])
        (answers,) = self.session.run([self.output.name], {self.input.name: np.stack(images)})
        return answers if self.output.name == "probabilities" else softmax(answers)

    def best(self, probabilities: np.ndarray, top_k: int) -> list[dict]:
        """The most probable classes of one picture, the first first."""
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        return [
            {
                "rank": rank,
                "class": int(i),
                "name": self.classes[i],
                "probability": float(str(probabilities[i])),  # the digits that a float32 has
            }
            for rank, i in enumerate(order, 1)
        ]


# The command.


def find_pictures(paths: list[str]) -> Iterator[str]:
    """Files as they are, folders by the pictures below them; hidden folders are left out."""
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES):
                    yield os.path.join(folder, name)


def as_text(path: str) -> str:
    """A path with bytes that are not UTF-8 as text."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


def write_text(path: str, rows: list[dict]) -> None:
    print(as_text(path))
    for row in rows:
        print(row["probability"], row["name"])


def write_csv(path: str, rows: list[dict]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerows((as_text(path), *row.values()) for row in rows)


def write_json(path: str, rows: list[dict]) -> None:
    print(json.dumps({"path": as_text(path), "classes": rows}))


WRITERS: dict[str, Callable[[str, list[dict]], None]] = {
    "text": write_text,
    "csv": write_csv,
    "json": write_json,
}


def classify(
    network: Network, batch: list[tuple[str, np.ndarray]], args: argparse.Namespace
) -> None:
    """Write the answers to a batch."""
    if batch:
        answers = network.probabilities([image for _, image in batch])
        for (path, _), row in zip(batch, answers, strict=True):
            WRITERS[args.output](path, network.best(row, args.top_k))
        sys.stdout.flush()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify pictures.", allow_abbrev=False)
    parser.add_argument("paths", nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--model", help="ONNX file; unless given, the one that about.json names")
    parser.add_argument("--output", choices=sorted(WRITERS), default="text", help="form")
    parser.add_argument("--top_k", type=int, default=1, help="classes for each picture")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures at once")
    args = parser.parse_args(argv)
    if min(args.top_k, args.batch_size) < 1:
        parser.error("--top_k and --batch_size must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where a picture could not be read."""
    args = parse_args(argv)
    network = Network(args.model)
    if args.output == "csv":
        print("path,rank,class,name,probability")
    batch: list[tuple[str, np.ndarray]] = []
    count = bad = 0
    for path in find_pictures(args.paths):
        count += 1
        try:
            batch.append((path, network.prepare(read_picture(path))))
        except BadPicture as error:
            bad += 1
            print(f"predict.py: error: {as_text(path)}: {error}", file=sys.stderr)
        if len(batch) == args.batch_size:
            classify(network, batch, args)
            batch = []
    classify(network, batch, args)
    if count == 0:
        print("predict.py: error: no pictures there", file=sys.stderr)
    return 1 if bad or count == 0 else 0


if __name__ == "__main__":
    try:
        status = main()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
