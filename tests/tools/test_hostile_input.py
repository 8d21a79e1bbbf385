"""The tools on input that was made to mislead them: one line, no wait, nothing read unasked."""

import gzip
import io
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from cnns.data.format import LENGTH, encode_record
from small import call, jpeg, read_manifest, solid
from tools import make_ofrecord, verify_ofrecord

FILES = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]


def make(*argv):
    return call(make_ofrecord.main, *map(str, argv))


def put(path, number: int, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 0, 0)).save(path)
    return path


def claiming(width: int, height: int) -> bytes:
    data = bytearray(jpeg(solid(0, 2, np.random.default_rng(0))))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(("ant", "bee")):
        put(tmp_path / "in" / name / "0.jpg", i)
    return tmp_path / "in"


@pytest.fixture
def refused(tmp_path):
    def refused(match: str, *argv, status: int = 1):
        result = make(*argv, f"--output={tmp_path / 'out'}")
        lines = result.stderr.splitlines()
        assert (result.status, result.stdout) == (status, ""), result.stderr
        assert sum(": error: " in line for line in lines) == 1
        assert match in result.stderr.replace(f"{tmp_path}/", ""), result.stderr
        assert not (tmp_path / "out").exists()
        return lines

    return refused


# Links.


def test_a_loop_does_not_multiply_images(photos, tmp_path, refused):
    """It made 82 examples of 2 images, most of them with the label of another class."""
    (photos / "ant" / "loop").symlink_to("..")
    for more in ((), ("--follow_links",)):
        refused("in/ant/loop: is the same folder as in, ", "folder", f"--input={photos}", *more)


def test_links_out_of_the_input_are_refused_or_followed(photos, tmp_path, refused):
    outside = put(tmp_path / "elsewhere" / "x.jpg", 9)
    (photos / "bee" / "x.jpg").symlink_to(outside)
    refused(f"in/bee/x.jpg: is a link to {tmp_path}"[:24], "folder", f"--input={photos}")
    (photos / "bee" / "x.jpg").unlink()
    (photos / "cow").symlink_to(outside.parent)
    refused("give --follow_links", "folder", f"--input={photos}")
    out = tmp_path / "out"
    result = make("folder", f"--input={photos}", f"--output={out}", "--follow_links")
    assert result.status == 0, result.stderr
    manifest = read_manifest(out)
    assert manifest["classes"] == ["ant", "bee", "cow"] and manifest["num_examples"] == 3
    assert manifest["made_by"]["arguments"]["follow_links"] is True


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("follow", [True, False])
def test_a_file_of_two_names_is_refused(photos, refused, hard, follow):
    if hard:
        os.link(photos / "ant" / "0.jpg", photos / "bee" / "1.jpg")
    else:
        (photos / "bee" / "1.jpg").symlink_to("../ant/0.jpg")
    refused(
        "in/bee/1.jpg: is the same file as",
        "folder",
        f"--input={photos}",
        f"--follow_links={follow}",
    )


def test_validation_that_is_a_link_to_training_is_refused(tmp_path, refused):
    put(tmp_path / "in" / "train" / "ant" / "0.jpg", 0)
    (tmp_path / "in" / "validation").symlink_to("train")
    refused("in/validation: is the same folder", "folder", f"--input={tmp_path / 'in'}")


def test_folders_of_imagenet_are_walked_in_the_same_way(tmp_path, refused):
    classes = tmp_path / "classes.txt"
    classes.write_text("n00000001 ant\nn00000002 bee\n")
    train = tmp_path / "train"
    for i in (1, 2):
        put(train / f"n0000000{i}" / f"n0000000{i}_0.JPEG", i)
    argv = ("imagenet", f"--train={train}", f"--classes={classes}")
    os.link(train / "n00000001" / "n00000001_0.JPEG", train / "n00000002" / "x.JPEG")
    refused("n00000002/x.JPEG: is the same file as", *argv)
    (train / "n00000002" / "x.JPEG").unlink()
    (train / "n00000002" / "n00000002_0.JPEG").rename(tmp_path / "y.JPEG")
    (train / "n00000002" / "y.JPEG").symlink_to(tmp_path / "y.JPEG")
    refused("n00000002/y.JPEG: is a link to", *argv)
    result = make(*argv, "--follow_links", f"--output={tmp_path / 'out'}")
    assert result.status == 0, result.stderr


# What is not a file.


def test_fifos_are_named_and_not_opened(photos, tmp_path, refused):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    os.mkfifo(photos / "ant" / "1.jpg")
    lines = refused("1 of 3 images are bad", "folder", f"--input={photos}")
    assert lines[0] == "bad image: ant/1.jpg: it is a FIFO, and a file is needed"
    what = "fifo: cannot be read: it is a FIFO, and a file is needed"
    refused(what, "idx", f"--images={fifo}", f"--labels={fifo}", status=2)
    refused(what, "cifar", f"--input={fifo}", status=2)
    refused(what, "imagenet", f"--train={fifo}", status=2)
    parts = tmp_path / "parts"
    parts.mkdir()
    os.mkfifo(parts / "part-00000")
    result = call(verify_ofrecord.main, str(parts))
    assert result.status == 1
    assert "part-00000: cannot be read: it is a FIFO, and a file is needed" in result.stdout


# Pictures that claim too much.


def test_a_header_that_claims_too_many_pixels(photos, tmp_path, refused):
    (photos / "ant" / "1.jpg").write_bytes(claiming(65000, 65000))
    lines = refused("1 of 3 images are bad", "folder", f"--input={photos}")
    assert lines[:-1] == [
        "bad image: ant/1.jpg: a picture of 65000 x 65000 pixels, which is more than 200000000 in "
        "all"
    ]
    put(photos / "ant" / "1.jpg", 1, (30, 30))
    refused("which is more than 400", "folder", f"--input={photos}", "--max_pixels=400")
    result = make("folder", f"--input={photos}", f"--output={tmp_path}/out", "--max_pixels=900")
    assert result.status == 0, result.stderr


@pytest.mark.parametrize("decode", [True, False])
def test_verify_finds_headers_that_claim_too_many_pixels(tmp_path, decode):
    pictures = [claiming(65535, 65535), claiming(65500, 65500), jpeg(solid(0, 2, np.random))]
    messages = [encode_record(data, 0) for data in pictures]
    (tmp_path / "part-00000").write_bytes(b"".join(LENGTH.pack(len(m)) + m for m in messages))
    result = call(verify_ofrecord.main, str(tmp_path), f"--decode={decode}")
    assert result.status == 1 and result.stderr.count("\n") == 1
    first, second, summary = result.stdout.splitlines()
    assert "record 0, at byte 0: the image: a picture of 65535 x 65535 pixels" in first
    assert "record 1, at byte" in second and "which is more than 200000000 in all" in second
    result = call(verify_ofrecord.main, str(tmp_path), "--max_pixels=10")
    assert result.stdout.count("which is more than 10 in all") == 2


def test_verify_reads_no_record_that_is_longer_than_any_may_be(tmp_path, monkeypatch):
    message = encode_record(jpeg(solid(0, 2, np.random)), 0)
    (tmp_path / "part-00000").write_bytes(LENGTH.pack(len(message)) + message)
    monkeypatch.setattr(verify_ofrecord, "MAX_RECORD_BYTES", len(message) - 1)
    result = call(verify_ofrecord.main, str(tmp_path))
    assert f"its length field says {len(message)}, and" in result.stdout


# Archives and arrays.


def pack(path, members, mode: str = "w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data, pax in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("value", ["-1", "-512", "abcd", "1e99", str(1 << 62), str(-(1 << 62))])
def test_sizes_of_members_that_cannot_be(tmp_path, refused, value):
    archive = pack(tmp_path / "x.tar.gz", [("test_batch.bin", bytes(3073), {"size": value})])
    refused("x.tar.gz: ", "cifar", f"--input={archive}")
    plain = pack(tmp_path / "x.tar", [("n00000001.tar", bytes(3073), {"size": value})], "w")
    refused("x.tar: ", "imagenet", f"--train={plain}")


def test_archives_that_unpack_to_too_much(tmp_path, refused):
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        info = tarfile.TarInfo("test_batch.bin")
        info.size = 300 << 20
        file.write(info.tobuf())
        for _ in range(300):
            file.write(bytes(1 << 20))
    refused("unpacks to more than 268435456 bytes", "cifar", f"--input={path}")
    refused("unpacks to more than 268435456 bytes", "idx", f"--images={path}", f"--labels={path}")


def test_a_folder_in_place_of_a_file_of_cifar_is_named(tmp_path, refused):
    folder = tmp_path / "cifar"
    folder.mkdir()
    for name in [*FILES, "batches.meta.txt"]:
        (folder / name).write_bytes(b"")
    (folder / "test_batch.bin").unlink()
    (folder / "test_batch.bin").mkdir()
    what = "cifar/test_batch.bin: cannot be read: Is a directory"
    refused(what, "cifar", f"--input={folder}", status=2)


def test_dimensions_of_an_idx_file_that_cannot_be(tmp_path, refused):
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">4I", 0x803, *[0xFFFFFFFF] * 3) + bytes(100))
    labels = tmp_path / "labels"
    labels.write_bytes(struct.pack(">2I", 0x801, 4) + bytes(4))
    needed = 16 + 0xFFFFFFFF**3
    refused(
        f"images: holds 116 bytes, but its header says {needed}",
        "idx",
        f"--images={path}",
        f"--labels={labels}",
    )


# Names.


def test_names_are_printed_escaped(photos, refused):
    name = b"a\x1b[31m\xff.jpg"
    with open(os.path.join(os.fsencode(photos), b"ant", name), "wb") as file:
        file.write(b"no picture")
    (photos / "bee" / "\x1b]0;x\x07.txt").touch()
    lines = refused("1 of 3 images are bad", "folder", f"--input={photos}")
    assert lines[0].endswith(r"not named like images (1): bee/\x1b]0;x\x07.txt")
    assert lines[1] == r"bad image: ant/a\x1b[31m\xff.jpg: not an image that Pillow can read"
