"""Files of the user's: special files, links, and pictures that are not what they seem."""

import io
import os
import socket
import struct
import subprocess
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from cnns.data import checks, images
from cnns.data.datasets import read_npz
from cnns.data.format import LENGTH, count_records, encode_record
from cnns.data.images import BadImage, TooLarge, find_images, open_image, read_picture, to_rgb
from cnns.errors import RunError, UsageError, printable, report
from cnns.inputs import Tree, open_input, unpacked_limit
from small import jpeg, solid, write_manifest, write_parts

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def special_files(folder) -> dict[str, str]:
    """A FIFO, a socket and a device, each with what it is called in a message."""
    os.mkfifo(folder / "fifo")
    held = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(folder)  # the path of a socket has 108 bytes at most
    try:
        held.bind("socket")
    finally:
        os.chdir(before)
        held.close()
    os.symlink("/dev/zero", folder / "device")
    return {"fifo": "FIFO", "socket": "socket", "device": "device"}


def test_special_files_are_named_and_never_opened(tmp_path, monkeypatch):
    for name, kind in special_files(tmp_path).items():
        path = str(tmp_path / name)
        start = time.monotonic()
        with pytest.raises(OSError, match=f"is a {kind}, and a file is needed"):
            open_input(path)
        with pytest.raises(RunError, match=f"{name}.*is a {kind}"):
            read_picture(path)
        with pytest.raises(RunError, match=f"cannot read .*{name}: it is a {kind}"):
            count_records(path)
        os.symlink(path, f"{path}.npz")
        with pytest.raises(UsageError, match=f"{name}.npz: it is a {kind}"):
            read_npz(f"{path}.npz", flag="--train_data_dir")
        (tmp_path / name[0]).mkdir()
        os.symlink(path, tmp_path / name[0] / "part-00000")
        with pytest.raises(RunError, match=f"part-00000: it is a {kind}"):
            checks.check_shards(str(tmp_path / name[0]), flag="--train_data_dir")
        assert time.monotonic() - start < 2
    with pytest.raises(OSError, match="Is a directory"):
        open_input(tmp_path)


# Links.


def put(path, number: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return path


def test_a_tree_ends_at_loops_and_at_its_root(tmp_path):
    root = tmp_path / "in"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "loop").symlink_to("..")
    tree = Tree(root)
    assert list(tree.entries(str(root))) == [("a", True)]
    assert list(tree.entries(str(root / "a"))) == [("b", True)]
    assert list(tree.entries(str(root / "a" / "b"))) == [("loop", True)]
    with pytest.raises(RunError, match="b/loop: is the same folder as .*in/a, .*remove the link"):
        list(tree.entries(str(root / "a" / "b" / "loop")))
    (root / "out").symlink_to(tmp_path)
    with pytest.raises(RunError, match="out: is a link to .*outside of .*--follow_links"):
        list(Tree(root).entries(str(root)))
    assert list(Tree(root, follow_links=True).entries(str(root))) == [("a", True), ("out", True)]


def test_a_tree_has_every_file_once(tmp_path):
    first = put(tmp_path / "x.png")
    os.link(first, tmp_path / "y.png")
    tree = Tree(tmp_path)
    tree.add(str(tmp_path), first.name)
    tree.add(str(tmp_path), "nowhere")
    tree.check_once()
    tree.add(str(tmp_path), "y.png")
    with pytest.raises(RunError, match="y.png: is the same file as .*x.png"):
        tree.check_once()


def test_inference_takes_no_links_out_of_a_folder(tmp_path):
    outside = put(tmp_path / "outside.png")
    folder = tmp_path / "in"
    put(folder / "a.png")
    (folder / "b.png").symlink_to(outside)
    (folder / "c.png").symlink_to("a.png")
    (folder / "d.png").symlink_to("nothing.png")
    found = find_images([str(folder), str(folder / "b.png")])
    assert [x for x in found if isinstance(x, str)] == [
        str(folder / "a.png"),
        str(folder / "d.png"),  # its reader says that there is nothing
        str(folder / "b.png"),
    ]
    errors = [str(x) for x in found if isinstance(x, RunError)]
    assert "b.png is a link to" in errors[0] and "give that to have it read" in errors[0]
    assert "c.png is the same file as" in errors[1]
    [error] = find_images([str(folder / "d.png")])
    assert "d.png is a link to nothing.png, which is not there" in str(error)


# Pictures.


def test_only_the_formats_of_the_documentation_are_opened(tmp_path, monkeypatch):
    """Content counts, not the name: EPS would start Ghostscript."""
    ran = tmp_path / "ran"
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\necho >> {ran}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    path = tmp_path / "x.jpg"
    path.write_bytes(EPS)
    with pytest.raises(RunError, match="x.jpg is not an image that can be read"):
        read_picture(str(path))
    with pytest.raises(RunError, match="holds no image"):
        checks.look_into_record(encode_record(EPS, 0), "here")
    script = f"from PIL import Image; Image.open({str(path)!r}).load()"
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ran.exists()  # so Pillow does
    ran.unlink()
    with pytest.raises(BadImage):
        with open_image(EPS) as image:
            image.load()
    assert not ran.exists()
    for kind in ("ICO", "TGA", "PCX", "SGI", "PDF"):
        data = io.BytesIO()
        Image.new("RGB", (16, 16)).save(data, kind)
        with pytest.raises(BadImage, match="not an image that Pillow can read"):
            with open_image(data.getvalue()):
                pass


def test_every_format_of_the_documentation_is_opened(tmp_path):
    for suffix in images.IMAGE_SUFFIXES:
        path = tmp_path / f"x{suffix}"
        Image.new("RGB", (8, 8), (200, 200, 200)).save(path)
        assert read_picture(str(path)).getpixel((3, 3)) == (200, 200, 200)


def test_no_module_opens_a_picture_by_itself():
    from small import ROOT

    files = [*ROOT.glob("*.py"), *(ROOT / "cnns").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    users = {file.name for file in files if "Image.open(" in file.read_text(encoding="utf-8")}
    # predict.py is copied to where this repository is not; its own tests refuse the same pictures.
    # onnxruntime_peer.py runs in another environment, and reads JPEGs that tools/benchmark.py made.
    assert users == {"images.py", "predict.py", "onnxruntime_peer.py"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 65536.0])
def test_values_that_are_no_brightness_are_refused(tmp_path, value):
    pixels = np.full((8, 8), 0.5, np.float32)
    pixels[3, 4] = value
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(RunError, match="x.tif .*grey values from .*0 to 65535 can be read"):
        read_picture(str(path))


@pytest.mark.parametrize("value", [-1, 65536, -(2**31), 2**31 - 1])
def test_integers_outside_16_bits_are_refused(value):
    with pytest.raises(BadImage, match="grey values from"):
        to_rgb(Image.fromarray(np.array([[value, 3]], np.int32)))


def test_floats_and_16_bit_pictures_are_scaled_as_documented():
    def grey(array) -> int:
        return to_rgb(Image.fromarray(array)).getpixel((0, 0))[0]

    assert grey(np.array([[0.5, 1]], np.float32)) == 128
    assert grey(np.array([[128, 200]], np.float32)) == 128
    assert grey(np.array([[65535, 0]], np.float32)) == 255
    for dtype in ("<u2", ">u2"):
        assert grey(np.array([[128 * 257, 0]], dtype)) == 128
    assert grey(np.array([[128 * 257, 0]], np.int32)) == 128


def claiming(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = bytearray(jpeg(solid(0, 2, np.random.default_rng(0))))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def test_a_picture_of_too_many_pixels_is_refused_without_a_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for width, height in ((65535, 65535), (20_000, 10_001)):
            with pytest.raises(TooLarge, match=f"of {width} x {height} pixels, .*200000000"):
                with open_image(claiming(width, height)):
                    pass
        with open_image(claiming(20_000, 10_000)) as image:
            assert image.size == (20_000, 10_000)
        with pytest.raises(TooLarge):
            with open_image(claiming(100, 101), max_pixels=10_000):
                pass
    assert not caught
    for width, height in ((65535, 65535), (65535, 1)):  # OneFlow's decoder ends at either
        with pytest.raises(RunError, match=f"here holds a picture of {width} x {height} pixels"):
            checks.look_into_record(encode_record(claiming(width, height), 0), "here")


def test_warnings_of_pillow_are_not_printed(tmp_path):
    """A TIFF with a tag that is cut off draws one."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "TIFF", description="x" * 100)
    path = tmp_path / "x.tif"
    path.write_bytes(data.getvalue()[:-60])
    script = "import sys; from cnns.data.images import *\ntry:\n read_picture(sys.argv[1])\n"
    script += "except RunError: pass"
    run = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_a_record_with_a_jpeg_that_is_cut_off_is_named_before_training(tmp_path, capsys):
    root = write_parts(tmp_path / "parts", [[0, 1], [1]])
    whole = jpeg(solid(0, 2, np.random.default_rng(0)))
    messages = [encode_record(data, 1) for data in (whole, whole[:-20], whole)]
    (root / "part-00001").write_bytes(b"".join(LENGTH.pack(len(m)) + m for m in messages))
    shards = checks.check_shards(str(root), flag="--train_data_dir")
    assert shards.num_examples == 5
    at = 8 + len(messages[0])
    assert capsys.readouterr().err == (
        f"{root}/part-00001: record 1, at byte {at}, holds a damaged JPEG: cut off at byte "
        f"{len(whole) - 20}, before the end of the image\n"
    )
    message = encode_record(whole[:-20], 1)
    (root / "part-00001").write_bytes(9 * (LENGTH.pack(len(message)) + message))
    checks.check_shards(str(root), flag="--train_data_dir")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("4 more records hold a damaged JPEG")
    write_manifest(root, 2)


# Arrays.


def describe(shape: str) -> bytes:
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()


def npz(path, header: bytes, body: bytes = b"", name: str = "images.npy") -> str:
    """An .npz file of which one array has this header, and the other is whole."""
    labels = io.BytesIO()
    np.save(labels, np.arange(2))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
        archive.writestr(name, start + header + body)
        archive.writestr("labels.npy", labels.getvalue())
    return str(path)


@pytest.mark.parametrize(
    "shape, body",
    [
        ("(2, 9223372036854775807, 4, 3)", b"x" * 24),
        ("(1099511627776, 1, 1, 3)", b"x" * 24),
        ("(4294967296, 4294967296, 1, 3)", b""),
        ("(-2, 2, -2, 3)", b"x" * 24),
        ("(2, 2, 2, 3)", b"x" * 23),
        ("(" * 3000, b""),
        ("[2, 2, 2, 3]", b"x" * 24),
        ("(True, 2, 2, 3)", b"x" * 24),
    ],
)
def test_arrays_that_claim_another_size_than_they_have_are_refused(tmp_path, shape, body):
    path = npz(tmp_path / "x.npz", describe(shape), body)
    with pytest.raises(RunError, match="x.npz (is not a readable .npz file|: `images` is)"):
        read_npz(path, flag="--train_data_dir")


def test_what_unpacks_to_more_than_is_allowed_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    npz(path, describe("(100, 1000, 1000, 3)"), bytes(300_000_000))
    assert path.stat().st_size < 1 << 20 and unpacked_limit(path.stat().st_size) == 256 << 20
    with pytest.raises(RunError, match="images.npy claims to be 3000000.. bytes, unpacked"):
        read_npz(str(path), flag="--train_data_dir")


# Names.


def test_names_reach_the_terminal_escaped(capsys):
    assert printable("häßlich, 日本 x.jpg") == "häßlich, 日本 x.jpg"
    assert printable("a\x1b[31m\x07\n\x9b\u202e\udcff\ud800b") == (
        r"a\x1b[31m\x07\n\x9b\u202e\xff\ud800b"
    )
    report("no \x1b]0;title\x07 \udcfe")
    assert capsys.readouterr().err.endswith(": error: no \\x1b]0;title\\x07 \\xfe\n")


def test_what_is_there_but_no_directory_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("x")
    for name, words in (
        ("fifo", "is a FIFO, and"),
        ("text", "is a file, and"),
        ("x", "there is no"),
    ):
        with pytest.raises(UsageError, match=words):
            checks.check_shards(str(tmp_path / name), flag="--train_data_dir")
