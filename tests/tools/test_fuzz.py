"""Damaged input for every reader of data: a result or one line, in seconds and little memory."""

import gzip
import io
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from cnns.convert.jpegs import decode_jpeg, passed_through, upright_jpeg
from cnns.data.checks import check_shards, look_into_record
from cnns.data.datasets import read_npz
from cnns.data.format import count_records, encode_record
from cnns.data.images import BadImage, open_image, read_picture, to_rgb, upright
from cnns.data.jpeg import walk_jpeg
from cnns.errors import RunError, UsageError
from fuzz import bounded, damaged, framed, fuzz, tar_with_checksums
from tools.cifar import CIFAR_10, CIFAR_100, read_cifar
from tools.imagenet import index_archive
from tools.make_ofrecord import read_idx
from tools.verify_ofrecord import Look, check_part, record_faults

pytestmark = pytest.mark.long

LOOK = Look(num_classes=10, decode=True, max_pixels=1_000_000)
FLAG = "--train_data_dir"


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    picture = Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8))
    picture.convert(mode).save(file, kind, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "x"
JPEGS = (
    encoded("JPEG"),
    encoded("JPEG", progressive=True, restart_marker_blocks=1),
    encoded("JPEG", "L", exif=EXIF),
    encoded("JPEG", "CMYK", comment=b"x"),
)
PICTURES = (
    *JPEGS,
    encoded("PNG"),
    encoded("PNG", "P", transparency=0),
    encoded("PNG", "I;16"),
    encoded("GIF", "P"),
    encoded("BMP"),
    encoded("WEBP", lossless=True),
    encoded("TIFF"),
    encoded("TIFF", "F"),
    encoded("TIFF", "I", compression="tiff_lzw"),
    encoded("PPM"),
    b"P2 2 2 300\n1 2\n3 300\n",
    b"Pf\n2 2\n-1.0\n" + np.array([0, 1, 2, np.nan], "<f4").tobytes(),
)
MESSAGES = (encode_record(JPEGS[0], 3), encode_record(JPEGS[0], 3, height=12, filename=b"x"))


def write(folder: str, name: str, data: bytes) -> Path:
    path = Path(folder) / name
    path.write_bytes(data)
    return path


# OFRecord.


@fuzz(150)
@given(damaged(framed(*MESSAGES), framed(MESSAGES[0])))
def test_framing(data):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "part-00000", data)
        with bounded(RunError):
            count_records(str(path))
        with bounded():
            result = check_part(path, {}, LOOK, lambda count: None)
            assert all("\n" not in fault for fault in result.faults)
        with bounded(RunError, UsageError):
            check_shards(folder, flag=FLAG)


@fuzz(300)
@given(damaged(*MESSAGES))
def test_message(data):
    with bounded():
        record_faults(data, LOOK)
    with bounded(RunError):
        look_into_record(data, "here")


# Pictures.


@fuzz(300)
@given(damaged(*JPEGS))
@example(b"\xff\xd8" + b"\xff" * (1 << 20))
@example(b"\xff\xd8" + b"\xff\xd0" * (1 << 18))
@example(b"\xff\xd8" + b"\xff\xe0\0\2" * (1 << 17))
def test_jpeg(data):
    for read in (walk_jpeg, decode_jpeg, upright_jpeg):
        with bounded(BadImage):
            read(data)
    with bounded(BadImage):
        passed_through(data, shorter=8, decode=True)


@fuzz(500)
@given(damaged(*PICTURES))
def test_pictures(data):
    with bounded(BadImage):
        with open_image(data, max_pixels=1_000_000) as image:
            image.load()
            assert to_rgb(upright(image)).mode == "RGB"


@fuzz(60)
@given(damaged(*PICTURES))
def test_picture_files(data):
    with tempfile.TemporaryDirectory() as folder, bounded(RunError):
        read_picture(str(write(folder, "x.jpg", data)), max_pixels=1_000_000)


# Archives.


def tar_of(*members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT, **pax: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()[: -tarfile.RECORDSIZE + 2048]


IMAGE = ("n00000001_1.JPEG", JPEGS[0])
TARS = (
    tar_of(("n00000001.tar", tar_of(IMAGE)), ("n00000002.tar", tar_of(("x" * 120, b"x")))),
    tar_of(IMAGE, ("y.JPEG", b""), size="5", mtime="1.5"),
    tar_of(("y" * 150 + ".JPEG", b"x"), form=tarfile.GNU_FORMAT),
)


def is_header(block: bytes) -> bool:
    return block[257:262] == b"ustar" or block[:1] in b"nxy."


@fuzz(300)
@given(damaged(*TARS), st.booleans())
@example(tar_of(IMAGE, size="-1"), False)
@example(tar_of(IMAGE, size="abcd"), False)
@example(tar_of(IMAGE, size=str(2**63)), False)
@example(tar_of(IMAGE, **{"GNU.sparse.map": "1,x", "GNU.sparse.size": "9"}), False)
@example(tar_of(IMAGE, hdrcharset="BINARY"), False)
def test_tar(data, repaired):
    data = tar_with_checksums(data, is_header) if repaired else data
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, "x.tar", data)
        with bounded(RunError, UsageError):
            index_archive(path).sort()
        with bounded(RunError, UsageError):
            read_cifar(path, labels=None)


# Arrays.


IDX = (
    bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 2)) + bytes(12),
    bytes((0, 0, 8, 1, 0, 0, 0, 5)) + bytes(5),
)


@fuzz(200)
@given(damaged(*IDX, *map(gzip.compress, IDX)), st.sampled_from(("images", "labels")))
def test_idx(data, what):
    with tempfile.TemporaryDirectory() as folder, bounded(RunError):
        array = read_idx(write(folder, "x", data), what)
        assert array.size > 0 and array.ndim == (3 if what == "images" else 1)


RECORDS = bytes(3073) + b"\1" + bytes(3072)
TEN = {name: RECORDS for names in CIFAR_10.values() for name in names}
TEN["batches.meta.txt"] = b"cat\ndog\n"
HUNDRED = {name: bytes(3074) for names in CIFAR_100.values() for name in names}
HUNDRED |= {"fine_label_names.txt": b"cat\n", "coarse_label_names.txt": b"pet\n"}


@fuzz(120)
@given(st.data(), st.sampled_from((TEN, HUNDRED)))
def test_cifar(data, files):
    with tempfile.TemporaryDirectory() as folder:
        hurt = data.draw(st.sampled_from(sorted(files)))
        for name, content in files.items():
            write(folder, name, data.draw(damaged(content)) if name == hurt else content)
        with bounded(RunError, UsageError):
            read_cifar(Path(folder), labels=None)
    packed = tar_of(*files.items())
    packed = gzip.compress(packed) if data.draw(st.booleans()) else packed
    with tempfile.TemporaryDirectory() as folder, bounded(RunError, UsageError):
        read_cifar(write(folder, "x.tar", data.draw(damaged(packed))), labels=None)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ARRAYS = {"images.npy": npy(np.zeros((2, 4, 4, 3), np.uint8)), "labels.npy": npy(np.arange(2))}


def zipped(files: dict[str, bytes], method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
NPZ = [zipped(ARRAYS, method) for method in METHODS]


@fuzz(200)
@given(damaged(*NPZ))
def test_npz(data):
    with tempfile.TemporaryDirectory() as folder, bounded(RunError, UsageError):
        read_npz(str(write(folder, "x.npz", data)), flag=FLAG)


@fuzz(250)
@given(st.sampled_from(sorted(ARRAYS)), st.data())
def test_headers_in_npz(name, data):
    files = {**ARRAYS, name: data.draw(damaged(ARRAYS[name][:140], ARRAYS[name]))}
    with tempfile.TemporaryDirectory() as folder, bounded(RunError, UsageError):
        read_npz(str(write(folder, "x.npz", zipped(files, zipfile.ZIP_STORED))), flag=FLAG)
