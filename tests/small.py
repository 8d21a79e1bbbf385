"""What several tests share: a tiny network, parts made by hand, runs of the scripts."""

import io
import json
import re
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.core.record.record_pb2 import OFRecord
from PIL import Image

import resnet_model
from cnns.errors import run_main
from cnns.models.layers import Dropout, Switches
from cnns.models.model import ALL_SWITCHES, Model

ROOT = Path(__file__).resolve().parent.parent
# What a run leaves beside its snapshots.
RECORD = ["flags.yaml", "log.txt", "metrics.csv", "metrics.jsonl"]
LINE = re.compile(
    r"(train|validation): epoch (\d+), iter (\d+),(?: loss: (\d+\.\d{6}),)? top_1: ([01]\.\d{6}), "
    r"top_k: ([01]\.\d{6}), samples/s: \d+\.\d{3}"
)


class Tiny(resnet_model.ResNet):
    """A network of the real blocks that compiles in a second."""

    def __init__(self, num_classes: int = 1000, switches: Switches = Switches()):
        block, depths = resnet_model.Bottleneck, (1, 1, 1, 1)
        super().__init__(block, depths, num_classes, width=8, switches=switches)


TINY = Model(Tiny, image_size=32, switches=ALL_SWITCHES, has_blocks=True)


class Toy(nn.Module):
    """A convolution, a batch norm and a linear layer: compiles in a fraction of a second."""

    def __init__(self, num_classes: int = 1000, switches: Switches = Switches()):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, image):
        x = self.bn(self.conv(image)).relu().mean(dim=(2, 3))
        return self.fc(x)


TOY = Model(Toy, image_size=32)


class Plain(Toy):
    """The same without batch norm, so that it does not matter how a batch is shared out."""

    def forward(self, image):
        return self.fc(self.conv(image).relu().mean(dim=(2, 3)))


class Branch(nn.Module):
    """A block that stochastic depth can leave out, without batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.drop = None

    def forward(self, x):
        scale = None if self.drop is None else self.drop()
        y = self.conv(x)
        return x + (y if scale is None else y * scale.reshape(-1, 1, 1, 1))


class Skipping(Plain):
    """The same with two such blocks."""

    def __init__(self, num_classes: int = 1000, switches: Switches = Switches()):
        super().__init__(num_classes, switches)
        self.blocks = nn.Sequential(Branch(), Branch())

    def forward(self, image):
        x = self.blocks(self.conv(image).relu())
        return self.fc(x.mean(dim=(2, 3)))


class Dropping(Plain):
    """The same with two dropouts, and a second classifier in training."""

    auxiliary_weight = 0.4

    def __init__(self, num_classes: int = 1000, switches: Switches = Switches()):
        super().__init__(num_classes, switches)
        self.first, self.second = Dropout(0.2, 4), Dropout(0.5, 4)
        self.auxiliary = nn.Linear(4, num_classes)

    def forward(self, image):
        x = self.conv(image).relu().mean(dim=(2, 3))
        logits = self.fc(self.second(self.first(x)))
        return (logits, self.auxiliary(x)) if self.training else logits


class GhostBatchNorm(nn.BatchNorm2d):
    """Normalises each half of a batch by itself, as two devices do. No running statistics."""

    def forward(self, x):
        n, c, h, w = x.shape
        halves = x.reshape(2, n // 2, c, h, w)
        centred = halves - halves.mean(dim=(1, 3, 4), keepdim=True)
        variance = (centred * centred).mean(dim=(1, 3, 4), keepdim=True)
        y = (centred / flow.sqrt(variance + self.eps)).reshape(n, c, h, w)
        return y * self.weight.reshape(1, c, 1, 1) + self.bias.reshape(1, c, 1, 1)


class Ghost(Toy):
    def __init__(self, num_classes: int = 1000, switches: Switches = Switches()):
        super().__init__(num_classes, switches)
        self.bn = GhostBatchNorm(4)


# Networks for the scripts, beside those of the project.
MODELS = {
    "tiny": TINY,
    "toy": TOY,
    "plain": Model(Plain, image_size=32),
    "skipping": Model(Skipping, image_size=32, has_blocks=True),
    "dropping": Model(Dropping, image_size=32),
    "ghost": Model(Ghost, image_size=32),
}


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str


def call(main, *argv: str) -> Result:
    """Run the `main` of a script in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = run_main(lambda: main(list(argv)))
        except SystemExit as exit_:  # argparse
            status = exit_.code
    return Result(status, out.getvalue(), err.getvalue())


def script(name: str, *argv: str, cwd: Path = ROOT) -> Result:
    """Run a script as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / name), *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def record(encoded: bytes, label: int) -> bytes:
    """One framed record, made without the project's own writer."""
    message = OFRecord()
    message.feature["encoded"].bytes_list.value.append(encoded)
    message.feature["class/label"].int32_list.value.append(label)
    data = message.SerializeToString()
    return struct.pack("<q", len(data)) + data


def solid(label: int, num_classes: int, rng, size: int = 40) -> np.ndarray:
    """An image whose brightness gives its label away."""
    level = 20 + 215 * label / max(1, num_classes - 1)
    return np.clip(rng.normal(level, 4, (size, size, 3)), 0, 255).astype(np.uint8)


def write_parts(directory: Path, labels: list[list[int]], *, num_classes: int = 4) -> Path:
    """OFRecord parts with the given labels, a list for each part; no manifest."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, part in enumerate(labels):
        data = b"".join(record(jpeg(solid(n, num_classes, rng)), n) for n in part)
        (directory / f"part-{i:05d}").write_bytes(data)
    return directory


def write_manifest(directory: Path, num_classes: int) -> None:
    """A manifest that tells the truth about the parts that are there."""
    parts = []
    for path in sorted(directory.glob("part-*")):
        data, count, offset = path.read_bytes(), 0, 0
        while offset < len(data):
            offset += 8 + struct.unpack_from("<q", data, offset)[0]
            count += 1
        parts.append({"name": path.name, "num_examples": count, "num_bytes": len(data)})
    manifest = {
        "format_version": 1,
        "num_examples": sum(part["num_examples"] for part in parts),
        "num_classes": num_classes,
        "classes": [f"class-{i}" for i in range(num_classes)],
        "parts": parts,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))


def write_sets(root: Path, parts: dict[str, tuple[int, ...]], *, num_classes: int) -> Path:
    """Sets by name, with so many records in each part, and as many arrays in `<name>.npz`."""
    rng = np.random.default_rng(0)
    for name, counts in parts.items():
        labels = [rng.integers(0, num_classes, count).tolist() for count in counts]
        write_parts(root / name, labels, num_classes=num_classes)
        write_manifest(root / name, num_classes)
        labels = rng.integers(0, num_classes, sum(counts))
        images = np.stack([solid(label, num_classes, rng) for label in labels])
        np.savez(root / f"{name}.npz", images=images, labels=labels)
    return root


def tree(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by their relative paths."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def read_manifest(directory: Path) -> dict:
    return json.loads((directory / "manifest.json").read_text(encoding="utf-8"))


def losses(stdout: str) -> list[float]:
    return [float(m[4]) for m in map(LINE.fullmatch, stdout.splitlines()) if m and m[4]]


def validation_figures(stdout: str) -> list[tuple[str, str]]:
    """(top_1, top_k) of the validation lines, as printed."""
    found = [LINE.fullmatch(line) for line in stdout.splitlines()]
    return [(m[5], m[6]) for m in found if m and m[1] == "validation"]
