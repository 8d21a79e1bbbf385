"""tools/verify_ofrecord.py: every kind of fault is found, and named with its place."""

import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnns.convert.writer import Example, Split, write_dataset
from cnns.data.format import LENGTH, OFRecord
from small import Result, call, jpeg, solid, write_manifest, write_parts
from tools import verify_ofrecord

LABELS = [[0, 1, 2], [3, 0, 1, 2], [1, 3]]


def verify(*argv) -> Result:
    return call(verify_ofrecord.main, *map(str, argv))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(jpeg(solid(n, 4, rng)), n) for n in (0, 1, 2, 3, 0, 1, 2, 1, 3)]


@pytest.fixture
def ours(tmp_path, examples) -> Path:
    """Nine records in three parts, by our writer, with a manifest."""
    split = Split(tmp_path / "ours", [f"x{i}" for i in range(9)], examples.__getitem__)
    write_dataset([split], classes=list("abcd"), made_by={}, num_parts=3)
    return tmp_path / "ours"


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Parts by others: protobuf's own serialisation, no manifest."""
    return write_parts(tmp_path / "theirs", LABELS)


def offsets(path: Path) -> list[int]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        found.append(at)
        at += 8 + LENGTH.unpack_from(data, at)[0]
    return found


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def encode(features: dict) -> bytes:
    """A serialised OFRecord with lists of bytes or int32, or one of them each."""
    record = OFRecord()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        feature = record.feature[name]
        lists = feature.bytes_list if isinstance(values[0], bytes) else feature.int32_list
        lists.value.extend(values)
    return record.SerializeToString()


def faults(directory: Path, *argv) -> list[str]:
    """The lines of faults, less the directory; checks the rest of what is printed."""
    result = verify(directory, *argv)
    *lines, summary = result.stdout.splitlines()
    count = len(lines) or "no"
    assert summary.startswith(f"{directory}: ")
    assert summary.endswith(f": {count} fault{'' if count == 1 else 's'}")
    assert result.status == (1 if lines else 0)
    if lines:
        assert re.fullmatch(r"\S+: error: \d+ faults?, listed above\n", result.stderr)
    return [line.removeprefix(f"{directory}: ") for line in lines]


SHA = "its SHA-256 differs from the manifest's: it was changed"


def test_whole_directories_have_no_fault(ours, theirs):
    for argv in ((), ("--decode",), ("--num_workers=2",), ("--num_classes=4",)):
        assert faults(ours, *argv) == []
        assert faults(theirs, *argv) == []
    summary = verify(theirs, "--decode").stdout
    size = sum(path.stat().st_size for path in theirs.iterdir())
    assert summary == (
        f"{theirs}: 9 examples in 3 parts, {size} bytes, labels up to 3, checksums not compared, "
        "as there is no manifest, images decoded: no faults\n"
    )
    assert "labels up to 3, checksums compared, images walked: no faults" in verify(ours).stdout
    write_manifest(theirs, 4)
    assert faults(theirs) == []


def test_a_directory_of_both_splits(ours, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    ours.rename(root / "train")
    write_parts(root / "validation", LABELS)
    result = verify(root)
    assert result.status == 0 and result.stdout.count("no faults") == 2
    flip(root / "train" / "part-00000", 100)
    (root / "validation" / "part-00001").unlink()
    result = verify(root)
    assert result.status == 1
    assert f"{root}/train: part-00000: {SHA}\n" in result.stdout
    assert f"{root}/validation: part-00001: is missing" in result.stdout


# The four of the issue.


def test_one_byte_cut_off(ours, theirs):
    for root in (ours, theirs):
        part = root / "part-00001"
        start, count = offsets(part)[-1], len(offsets(part))
        size = part.stat().st_size
        part.write_bytes(part.read_bytes()[:-1])
        found = faults(root)
        length = size - start - 8
        assert found[0] == (
            f"part-00001: record {count - 1}, at byte {start}: its length field says {length}, and "
            f"{length - 1} bytes follow: it is damaged, or the part is cut off; what follows in "
            "this part was not looked at"
        )
        if root == ours:
            assert found[1:] == [
                f"part-00001: holds {size - 1} bytes, and the manifest says {size}",
                f"part-00001: holds {count - 1} complete records, and the manifest says {count}",
                f"part-00001: {SHA}",
            ]


def test_every_bit_of_a_jpeg_is_under_the_checksum(ours):
    part = ours / "part-00002"
    whole = part.read_bytes()
    rng = random.Random(0)
    for _ in range(20):
        flip(part, rng.randrange(len(whole)), rng.randrange(8))
        assert f"part-00002: {SHA}" in faults(ours)
        part.write_bytes(whole)


def test_a_bit_of_a_jpeg_that_shows_has_a_place(ours, theirs):
    for root in (ours, theirs):
        part = root / "part-00001"
        start = offsets(part)[1]
        at = part.read_bytes().index(b"\xff\xc0", start)
        flip(part, at, 3)  # the frame's marker
        found = faults(root)
        assert re.match(
            rf"part-00001: record 1, at byte {start}: the image: byte \d+ is 0xf7 where a marker "
            "should be",
            found[0],
        )
        assert found[1:] == ([f"part-00001: {SHA}"] if root == ours else [])


@pytest.mark.parametrize("bit", range(0, 64, 5))
def test_one_bit_of_a_length(ours, theirs, bit):
    for root in (ours, theirs):
        part = root / "part-00001"
        start = offsets(part)[1]
        flip(part, start + bit // 8, bit % 8)
        found = faults(root)
        assert found[0].startswith(f"part-00001: record 1, at byte {start}: ")
        assert root == theirs or found[-1] == f"part-00001: {SHA}"


def test_one_bit_of_a_label(ours):
    part = ours / "part-00000"
    data, start = part.read_bytes(), offsets(part)[0]
    at = data.index(b"class/label", start) + len(b"class/label") + 6
    label = data[at]
    assert label < 4
    flip(part, at, 0)  # still a label
    assert faults(ours) == [f"part-00000: {SHA}"]
    part.write_bytes(data)
    flip(part, at, 5)
    where = f"part-00000: record 0, at byte {start}: "
    assert faults(ours) == [
        f"{where}label {label + 32} is outside of 0 to 3",
        f"part-00000: {SHA}",
    ]
    (ours / "manifest.json").unlink()
    assert faults(ours, "--num_classes=4") == [f"{where}label {label + 32} is outside of 0 to 3"]
    assert faults(ours) == []


# The rest.


def test_records_that_oneflow_cannot_read(tmp_path):
    def image(mode: str, kind: str = "JPEG") -> bytes:
        file = io.BytesIO()
        Image.new(mode, (20, 10)).save(file, kind)
        return file.getvalue()

    rgb = image("RGB")
    messages = {
        encode({"encoded": image("L"), "class/label": 0}): "the image: greyscale JPEG, which "
        "OneFlow decodes to noise without an error",
        encode({"encoded": image("CMYK"), "class/label": 0}): "the image: CMYK JPEG, on which "
        "OneFlow's decoder fails",
        encode({"encoded": image("RGB", "PNG"), "class/label": 0}): "the image: not a JPEG, and "
        "OneFlow's decoder reads nothing else",
        encode({"encoded": rgb[:-2], "class/label": 0}): f"the image: cut off at byte "
        f"{len(rgb) - 2}, before the end of the image",
        encode({"encoded": rgb}): "has no `class/label`",
        encode({"class/label": 0}): "has no `encoded`",
        encode({"encoded": rgb, "class/label": [1, 2]}): "`class/label` holds 2 values of int32, "
        "not one of int32",
        encode({"encoded": rgb, "class/label": b"cat"}): "`class/label` holds 1 values of bytes, "
        "not one of int32",
        encode({"encoded": rgb, "class/label": -1}): "label -1 is outside of 0 to 999999",
        encode({"encoded": rgb, "class/label": 0, "height": 11}): "`height` is [11], and the image "
        "has 10",
        encode({"encoded": rgb, "class/label": 0}) + b"h\x01": "is not an OFRecord: it has other "
        "fields as well",
        b"hello": "is not an OFRecord: it ends before its last byte",
        b"world": "is not an OFRecord: protobuf cannot parse it",
    }
    (tmp_path / "part-00000").write_bytes(
        b"".join(LENGTH.pack(len(message)) + message for message in messages)
    )
    found = faults(tmp_path)
    starts = offsets(tmp_path / "part-00000")
    for i, (line, what) in enumerate(zip(found, messages.values(), strict=True)):
        assert line.startswith(f"part-00000: record {i}, at byte {starts[i]}: {what}"), line


def test_decode_finds_what_only_a_decoder_sees(theirs):
    part = theirs / "part-00002"
    data = bytearray(part.read_bytes())
    at = data.index(b"\xff\xc4") + 5
    data[at : at + 3] = b"\xff\xff\xff"  # no code has so many words
    part.write_bytes(data)
    assert faults(theirs) == []
    [line] = faults(theirs, "--decode")
    assert line.startswith("part-00002: record 0, at byte 0: the image: ")


def test_parts_that_are_missing_or_too_many(ours, theirs):
    (theirs / "part-00001").unlink()
    assert faults(theirs) == ["part-00001: is missing; parts are numbered from 0 without a gap"]
    (ours / "part-00002").rename(ours / "part-00003")
    (ours / "part-00001").write_bytes(b"")
    size = json.loads((ours / "manifest.json").read_text())["parts"][1]["num_bytes"]
    assert faults(ours) == [
        "part-00002: is missing; the manifest lists it",
        "part-00003: is not in the manifest",
        "part-00001: holds no record, and OneFlow's reader cannot open that",
        f"part-00001: holds 0 bytes, and the manifest says {size}",
        "part-00001: holds 0 complete records, and the manifest says 3",
        f"part-00001: {SHA}",
    ]


def test_manifests_that_are_wrong(ours):
    path = ours / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "num_examples": 10, "num_classes": 5}))
    assert faults(ours) == [
        "manifest.json: num_examples is 10, its parts have 9",
        "manifest.json: num_classes is 5, 4 are named",
    ]
    for text in ("{", '{"parts": [1]}', '{"parts": [{"name": 1}]}', "[]", '{"parts": null}'):
        path.write_text(text)
        [line] = faults(ours)
        assert line == "manifest.json: is not a manifest that can be read"


def test_directories_that_hold_nothing(tmp_path):
    for path, match in ((tmp_path, "holds no OFRecord parts"), (tmp_path / "no", "no such dir")):
        result = verify(path)
        assert result.status == 2 and result.stderr.count("\n") == 1
        assert match in result.stderr
    assert verify().status == 2
