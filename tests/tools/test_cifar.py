"""Job `cifar`: the binary archives of CIFAR-10 and CIFAR-100."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnns.data.format import decode_record
from small import Result, call, read_manifest, tree
from tools import make_ofrecord, verify_ofrecord

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COARSE, FINE = ["fish", "flowers"], ["aquarium_fish", "shark", "orchid"]


def image(seed: int) -> np.ndarray:
    """(32, 32, 3) uint8, smooth."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((32, 32), Image.Resampling.BILINEAR))


def batch(seeds, *labels) -> bytes:
    """Records of the images of `seeds`; `labels` give the label bytes of a seed."""
    return b"".join(
        bytes(label(seed) for label in labels) + image(seed).transpose(2, 0, 1).tobytes()
        for seed in seeds
    )


def pack(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def ten_files() -> dict[str, bytes]:
    """Four images in each batch of CIFAR-10; the label is the last digit of the seed."""
    files = {"batches.meta.txt": ("\n".join(TEN) + "\n\n").encode(), "readme.html": b"<p>"}
    for k in range(1, 6):
        files[f"data_batch_{k}.bin"] = batch(range(10 * k, 10 * k + 4), lambda s: s % 10)
    files["test_batch.bin"] = batch(range(905, 910), lambda s: s % 10)
    return files


def hundred_files() -> dict[str, bytes]:
    labels = (lambda s: s % 3 // 2, lambda s: s % 3)
    return {
        "coarse_label_names.txt": "\n".join(COARSE).encode(),
        "fine_label_names.txt": "\n".join(FINE).encode(),
        "train.bin": batch(range(9), *labels),
        "test.bin": batch(range(20, 24), *labels),
    }


def convert(source: Path, output: Path, *more: str) -> Result:
    return call(make_ofrecord.main, "cifar", f"--input={source}", f"--output={output}", *more)


def read(directory: Path) -> list[tuple[np.ndarray, int]]:
    found = []
    for part in sorted(directory.glob("part-*")):
        data, at = part.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            features = decode_record(data[at + 8 : at + 8 + length]).feature
            [encoded] = features["encoded"].bytes_list.value
            pixels = np.asarray(Image.open(io.BytesIO(encoded)), int)
            found.append((pixels, *features["class/label"].int32_list.value))
            at += 8 + length
    return found


def check_images(directory: Path, seeds, label) -> None:
    """Every image is there once, with its label."""
    left = {seed: (image(seed).astype(int), label(seed)) for seed in seeds}
    for pixels, found in read(directory):
        seed = min(left, key=lambda s: np.abs(left[s][0] - pixels).mean())
        expected, wanted = left.pop(seed)
        assert np.abs(expected - pixels).max() <= 6 and found == wanted
    assert not left


def test_cifar_10(tmp_path):
    source = pack(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", ten_files())
    assert convert(source, tmp_path / "out").status == 0
    assert read_manifest(tmp_path / "out" / "train")["classes"] == TEN
    seeds = [10 * k + i for k in range(1, 6) for i in range(4)]
    check_images(tmp_path / "out" / "train", seeds, lambda s: s % 10)
    check_images(tmp_path / "out" / "validation", range(905, 910), lambda s: s % 10)
    assert call(verify_ofrecord.main, "--decode", str(tmp_path / "out")).status == 0
    # The folder it was unpacked to gives the same parts.
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert convert(tmp_path / "unpacked" / "cifar-10-batches-bin", tmp_path / "two").status == 0
    for directory in ("train", "validation"):
        made = tree(tmp_path / "out" / directory), tree(tmp_path / "two" / directory)
        assert made[0]["part-00000"] == made[1]["part-00000"]


@pytest.mark.parametrize(
    "more, classes, label",
    [
        ((), FINE, lambda s: s % 3),
        (("--labels=fine",), FINE, lambda s: s % 3),
        (("--labels=coarse",), COARSE, lambda s: s % 3 // 2),
    ],
)
def test_cifar_100(tmp_path, more, classes, label):
    source = pack(tmp_path / "c.tar.gz", "cifar-100-binary", hundred_files())
    assert convert(source, tmp_path / "out", *more).status == 0
    assert read_manifest(tmp_path / "out" / "train")["classes"] == classes
    check_images(tmp_path / "out" / "train", range(9), label)
    check_images(tmp_path / "out" / "validation", range(20, 24), label)


def test_cifar_refusals(tmp_path):
    def refused(source: Path, match: str, *more: str, status: int = 1):
        result = convert(source, tmp_path / "out", *more)
        assert result.status == status and result.stdout == ""
        assert result.stderr.count("\n") == 1 and re.search(match, result.stderr), result.stderr
        assert not (tmp_path / "out").exists()

    def archive(**changes) -> Path:
        files = {**ten_files(), **{f"{name}.bin": data for name, data in changes.items()}}
        return pack(tmp_path / "x.tar.gz", "d", {k: v for k, v in files.items() if v is not None})

    refused(tmp_path / "nowhere", "nowhere: cannot be read: No such file", status=2)
    refused(archive(data_batch_3=None), "x.tar.gz: data_batch_3.bin is missing")
    refused(archive(test_batch=b"x" * 3072), "3072 bytes, which is not a multiple of 3073")
    refused(archive(test_batch=b""), "test_batch.bin holds 0 bytes")
    refused(
        archive(test_batch=b"\x0a" + bytes(3072)),
        "test_batch.bin: label 10 of image 0 is outside of the 10 classes of batches.meta.txt",
    )
    refused(archive(), "--labels=fine: .* is CIFAR-10", "--labels=fine", status=2)
    python = pack(tmp_path / "p.tar.gz", "d", {"data_batch_1": b"x", "batches.meta": b"x"})
    refused(python, "holds neither .* needs the binary version", status=2)
    whole = archive().read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "x.tar.gz", "is not a complete tar archive")
    (tmp_path / "x.tar.gz").write_bytes(b"hello" * 300)
    refused(tmp_path / "x.tar.gz", "is not a tar archive")
