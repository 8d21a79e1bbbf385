"""From ImageNet's own archives to parts: labels, oddities, refusals, and going on when killed."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model_registry
import of_cnn_train_val
from cnns.convert.jpegs import decode_jpeg, passed_through
from cnns.convert.pool import Progress, run_tasks
from cnns.data.format import decode_record
from cnns.data.images import CLASSES_FILE, BadImage, read_classes
from cnns.data.jpeg import walk_jpeg
from cnns.errors import RunError
from small import LINE, ROOT, TINY, Result, call, read_manifest, tree
from tools import imagenet, make_ofrecord, verify_ofrecord

pytestmark = pytest.mark.long

NAMES, WNIDS = read_classes(CLASSES_FILE)
TINY_WNIDS = WNIDS[:4]


# Making input.


def picture(seed: int, size=(48, 40), mode: str = "RGB") -> Image.Image:
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(seed: int, **options) -> bytes:
    return encoded(picture(seed), quality=85, **options)


def tar_bytes(members, form=tarfile.USTAR_FORMAT) -> bytes:
    """A tar archive of (name, bytes); of a directory, where the bytes are None."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def class_files(wnids, per_class: int) -> dict[str, list[tuple[str, bytes]]]:
    return {
        wnid: [(f"{wnid}_{10 * k}.JPEG", photo(100 * c + k)) for k in range(per_class)]
        for c, wnid in enumerate(wnids)
    }


def train_tar(files: dict[str, list[tuple[str, bytes]]]) -> bytes:
    """A tar of tars, as ILSVRC2012_img_train.tar."""
    return tar_bytes([(f"{wnid}.tar", tar_bytes(members)) for wnid, members in files.items()])


def val_files(count: int) -> list[tuple[str, bytes]]:
    return [(f"ILSVRC2012_val_{k:08d}.JPEG", photo(5000 + k)) for k in range(1, count + 1)]


VAL_LABELS = [2, 0, 3, 1, 2, 2]


@pytest.fixture
def source(tmp_path) -> Path:
    """Both archives with four classes, a class list and a table of labels for them."""
    root = tmp_path / "in"
    root.mkdir()
    lines = [f"{wnid} {NAMES[k]}" for k, wnid in enumerate(TINY_WNIDS)]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in VAL_LABELS))
    (root / "ILSVRC2012_img_train.tar").write_bytes(train_tar(class_files(TINY_WNIDS, 3)))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val_files(len(VAL_LABELS))))
    return root


def flags(source: Path, output: Path, *more: str) -> list[str]:
    return [
        "imagenet",
        f"--input={source}",
        f"--output={output}",
        f"--classes={source / 'classes.txt'}",
        f"--val_labels={source / 'labels.txt'}",
        *map(str, more),
    ]


def convert(source: Path, output: Path, *more: str) -> Result:
    return call(make_ofrecord.main, *flags(source, output, *more))


def unpack(source: Path) -> Path:
    """The folders that the archives of `source` hold, in place of these."""
    root = source.with_name("unpacked")
    root.mkdir()
    for name in ("classes.txt", "labels.txt"):
        shutil.copy(source / name, root / name)
    with tarfile.open(source / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            folder = root / "train" / member.name[: -len(".tar")]
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(folder)
    with tarfile.open(source / "ILSVRC2012_img_val.tar") as archive:
        archive.extractall(root / "val")
    return root


# Reading back.


def records(directory: Path) -> dict[str, dict]:
    """The features of each record, by file name."""
    found = {}
    for part in sorted(directory.glob("part-*")):
        data, at = part.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            record = decode_record(data[at + 8 : at + 8 + length])
            features = {
                name: getattr(feature, feature.WhichOneof("kind")).value[0]
                for name, feature in record.feature.items()
            }
            found[features["filename"].decode()] = features
            at += 8 + length
    return found


def parts_of(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(directory).items() if "manifest" not in name}


# The whole way.


def test_official_shape_to_training(tmp_path, monkeypatch):
    """1000 wnids in a tar of tars and a flat validation tar, with nothing to count by hand."""
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    table = imagenet.read_val_labels(imagenet.VAL_LABELS, WNIDS)
    files = class_files(WNIDS, 1)
    for name, data in (
        ("ILSVRC2012_img_train.tar", train_tar(files)),
        ("ILSVRC2012_img_val.tar", tar_bytes(val_files(30))),
        ("labels.txt", "".join(f"{label}\n" for label in table[:30]).encode()),
    ):
        (downloads / name).write_bytes(data)
    made = call(
        make_ofrecord.main,
        "imagenet",
        "--input=downloads",
        "--output=data",
        "--val_labels=downloads/labels.txt",
    )
    assert made.status == 0, made.stderr
    assert made.stderr == (
        "note: downloads/ILSVRC2012_img_train.tar: 1000 images; the official archive holds "
        "1281167\n"
    )
    assert re.match(r"data/train: 1000 examples of 1000 classes in 256 parts", made.stdout)
    assert "data/validation: 30 examples of 1000 classes in 24 parts" in made.stdout
    checked = call(verify_ofrecord.main, "--decode", "data")
    assert checked.status == 0 and checked.stdout.count("no faults") == 2
    found = records(tmp_path / "data" / "train")
    for label, wnid in enumerate(WNIDS):
        features = found[f"{wnid}_0.JPEG"]
        assert features["class/label"] == label and features["encoded"] == files[wnid][0][1]
    found = records(tmp_path / "data" / "validation")
    facts = {1: "n01751748", 2: "n09193705", 3: "n02105855"}
    for k, wnid in facts.items():
        assert found[f"ILSVRC2012_val_{k:08d}.JPEG"]["class/synset"].decode() == wnid

    result = call(
        of_cnn_train_val.main,
        "--model=tiny",
        "--device=cpu",
        "--train_data_dir=data/train",
        "--val_data_dir=data/validation",
        "--batch_size_per_device=500",
        "--num_epochs=1",
    )
    assert result.status == 0, result.stderr
    lines = [m.groups() for m in map(LINE.fullmatch, result.stdout.splitlines()) if m]
    assert [line[:3] for line in lines] == [("train", "0", "2"), ("validation", "0", "1")]


def test_label_table_of_the_validation_images():
    table = imagenet.read_val_labels(imagenet.VAL_LABELS, WNIDS)
    assert len(table) == 50_000
    assert np.array_equal(np.bincount(table), np.full(1000, 50))
    assert table[:3].tolist() == [65, 970, 230]
    assert [WNIDS[label] for label in table[:3]] == ["n01751748", "n09193705", "n02105855"]


def test_every_feature(source, tmp_path):
    assert convert(source, tmp_path / "out").status == 0
    name = f"{TINY_WNIDS[1]}_10.JPEG"
    features = records(tmp_path / "out" / "train")[name]
    assert features == {
        "encoded": photo(101),
        "class/label": 1,
        "filename": name.encode(),
        "class/synset": TINY_WNIDS[1].encode(),
        "class/text": NAMES[1].encode(),
        "height": 40,
        "width": 48,
        "format": b"JPEG",
        "colorspace": b"RGB",
        "channels": 3,
        "data_id": b"4",
    }
    held = records(tmp_path / "out" / "validation")
    labels = [held[name]["class/label"] for name, _ in val_files(len(VAL_LABELS))]
    assert labels == VAL_LABELS
    listed = read_manifest(tmp_path / "out" / "train")
    assert listed["classes"] == NAMES[:4] and listed["num_examples"] == 12


def test_the_page_about_the_format(source, tmp_path):
    """Its ten lines read a part, and its table has the features, and no others."""
    page = (ROOT / "docs" / "ofrecord.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    reader = {}
    exec(code, reader)
    assert convert(source, tmp_path / "out", "--num_parts=2").status == 0
    found = [
        record
        for part in sorted((tmp_path / "out" / "train").glob("part-*"))
        for record in reader["read_part"](part)
    ]
    written = records(tmp_path / "out" / "train")
    assert found == [(f["encoded"], f["class/label"]) for f in written.values()]
    rows = re.findall(r"^\| (`.*?) \|.*\| `?[a-z ]+`? \|$", page, re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == set(next(iter(written.values())))


def test_the_bytes_depend_on_input_and_seed_alone(source, tmp_path):
    """Not on the number of workers, nor on whether the input is packed."""
    for name, more in {
        "one": ["--num_workers=1"],
        "three": ["--num_workers=3"],
        "other": ["--seed=1"],
    }.items():
        assert convert(source, tmp_path / name, "--num_parts=3", *more).status == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    assert parts_of(tmp_path / "one") != parts_of(tmp_path / "other")
    assert records(tmp_path / "one" / "train") == records(tmp_path / "other" / "train")
    unpacked = unpack(source)
    assert convert(unpacked, tmp_path / "folders", "--num_parts=3").status == 0
    assert parts_of(tmp_path / "folders") == parts_of(tmp_path / "one")


def test_validation_in_class_folders_and_archives_of_other_makes(source, tmp_path):
    files = val_files(len(VAL_LABELS))
    in_folders = [
        (f"./{TINY_WNIDS[label]}/{name}", data)
        for label, (name, data) in zip(VAL_LABELS, files, strict=True)
    ]
    directories = [(f"./{wnid}/", None) for wnid in TINY_WNIDS]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        packed = tar_bytes([("./", None), *directories, *in_folders, ("./LICENSE", b"x")], form)
        (source / "ILSVRC2012_img_val.tar").write_bytes(packed)
        long = "d" * 120  # a name for which each format has its own extension
        train = [
            (f"{long}/{wnid}/{name}", data)
            for wnid, held in class_files(TINY_WNIDS, 1).items()
            for name, data in held
        ]
        (source / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(train, form))
        output = tmp_path / f"out{form}"
        result = convert(source, output)
        assert result.status == 0, result.stderr
        assert "left out, not named like images (1): ./LICENSE" in result.stderr
        held = records(output / "validation")
        assert [held[name]["class/label"] for name, _ in files] == VAL_LABELS
        assert len(records(output / "train")) == 4


def test_one_split_alone(source, tmp_path):
    archive = source / "ILSVRC2012_img_val.tar"
    argv = [f for f in flags(source, tmp_path / "out") if not f.startswith("--input")]
    assert call(make_ofrecord.main, *argv, f"--validation={archive}").status == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["validation"]


# Bytes and oddities.


def test_oddities_become_rgb_jpegs_and_are_named(source, tmp_path):
    files = class_files(TINY_WNIDS, 2)
    odd = {
        "CMYK JPEG": encoded(picture(1, mode="CMYK"), quality=95),
        "PNG": encoded(picture(2), "PNG"),
        "greyscale JPEG": encoded(picture(3, mode="L"), quality=90),
        "JPEG with stray bytes": photo(4)[:20] + b"xx" + photo(4)[20:],
    }
    for wnid, data in zip(TINY_WNIDS, odd.values(), strict=True):
        files[wnid].append((f"{wnid}_99.JPEG", data))
    (source / "ILSVRC2012_img_train.tar").write_bytes(train_tar(files))
    result = convert(source, tmp_path / "out")
    assert result.status == 0, result.stderr
    made_by = read_manifest(tmp_path / "out" / "train")["made_by"]
    assert made_by["re_encoded"] == dict.fromkeys(sorted(odd), 1)
    held = records(tmp_path / "out" / "train")
    for wnid, (kind, data) in zip(TINY_WNIDS, odd.items(), strict=True):
        name = f"{wnid}_99.JPEG"
        assert made_by["re_encoded_files"][kind] == [f"{wnid}/{name}"]
        assert f"train: {kind}: {wnid}/{name}\n" in result.stdout
        stored = held[name]["encoded"]
        assert walk_jpeg(stored).oddity == ""
        before, after = (
            np.asarray(Image.open(io.BytesIO(d)).convert("RGB"), int) for d in (data, stored)
        )
        assert np.abs(before - after).mean() < 2
    assert held[f"{TINY_WNIDS[0]}_0.JPEG"]["encoded"] == files[TINY_WNIDS[0]][0][1]
    assert call(verify_ofrecord.main, str(tmp_path / "out"), "--decode").status == 0


def test_orientation_tags_do_not_turn_a_picture(source, tmp_path):
    tags = Image.Exif()
    tags[0x112] = 6
    files = class_files(TINY_WNIDS, 1)
    lying = photo(1, exif=tags)
    files[TINY_WNIDS[0]] = [(f"{TINY_WNIDS[0]}_0.JPEG", lying)]
    (source / "ILSVRC2012_img_train.tar").write_bytes(train_tar(files))
    assert convert(source, tmp_path / "out").status == 0
    features = records(tmp_path / "out" / "train")[f"{TINY_WNIDS[0]}_0.JPEG"]
    assert features["encoded"] == lying and (features["width"], features["height"]) == (48, 40)


def test_resize_shorter(source, tmp_path):
    files = class_files(TINY_WNIDS, 1)
    large = encoded(picture(1, (300, 200)), quality=95)
    files[TINY_WNIDS[0]].append((f"{TINY_WNIDS[0]}_99.JPEG", large))
    (source / "ILSVRC2012_img_train.tar").write_bytes(train_tar(files))
    assert convert(source, tmp_path / "out", "--resize_shorter=64").status == 0
    held = records(tmp_path / "out" / "train")
    features = held[f"{TINY_WNIDS[0]}_99.JPEG"]
    image = Image.open(io.BytesIO(features["encoded"]))
    assert image.size == (96, 64) == (features["width"], features["height"])
    expected = Image.open(io.BytesIO(large)).resize((96, 64), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 2
    # Smaller pictures keep their bytes.
    assert held[f"{TINY_WNIDS[0]}_0.JPEG"]["encoded"] == files[TINY_WNIDS[0]][0][1]


def test_walking_a_jpeg_takes_what_pillow_writes_and_nothing_cut_off():
    for options in (
        {},
        {"progressive": True},
        {"subsampling": 0, "optimize": True},
        {"exif": b"Exif\0\0" + bytes(500), "comment": b"hello"},
        {"restart_marker_blocks": 2},
    ):
        data = photo(1, **options)
        info = walk_jpeg(data)
        assert (info.width, info.height, info.channels, info.oddity) == (48, 40, 3, "")
        assert walk_jpeg(data + b"\0trailing\xff") == info
        for end in range(len(data)):
            with pytest.raises(BadImage, match="cut off|empty|not a JPEG"):
                walk_jpeg(data[:end])
    assert walk_jpeg(encoded(picture(1, mode="L"))).oddity == "greyscale JPEG"
    assert walk_jpeg(encoded(picture(1, mode="CMYK"))).oddity == "CMYK JPEG"


def test_walking_damaged_jpegs_gives_one_line():
    rng = random.Random(0)
    whole = photo(1, progressive=True)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        for check in (walk_jpeg, decode_jpeg):
            try:
                check(bytes(data))
            except BadImage as error:
                assert "\n" not in str(error)


def test_check_decode_finds_what_the_walk_does_not():
    data = bytearray(photo(1))
    at = data.index(b"\xff\xc4") + 5  # numbers of Huffman codes of each length
    data[at : at + 3] = b"\xff\xff\xff"
    assert passed_through(bytes(data), shorter=None, decode=False)[0] == data
    with pytest.raises(BadImage):
        passed_through(bytes(data), shorter=None, decode=True)


# Bad images.


@pytest.fixture
def damaged(source) -> Path:
    """`source` with three bad images."""
    files = class_files(TINY_WNIDS, 3)
    for c, data in enumerate((photo(1)[:-30], b"", b"hello")):
        files[TINY_WNIDS[c]][2] = (f"{TINY_WNIDS[c]}_20.JPEG", data)
    (source / "ILSVRC2012_img_train.tar").write_bytes(train_tar(files))
    return source


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_end_the_run_at_its_end_and_can_be_left_out(damaged, tmp_path, workers):
    argv = (f"--num_workers={workers}", "--num_parts=2")
    result = convert(damaged, tmp_path / "out", *argv)
    assert result.status == 1
    bad = [line for line in result.stderr.splitlines() if line.startswith("bad image: ")]
    reasons = ["cut off at byte", "empty file", "not an image that Pillow can read"]
    for line, wnid, reason in zip(bad, TINY_WNIDS, reasons, strict=False):
        assert line.startswith(f"bad image: {wnid}/{wnid}_20.JPEG: {reason}")
    assert "error: 3 of 18 images are bad (listed above); no data set was made" in result.stderr
    assert not (tmp_path / "out" / "train").exists()

    result = convert(damaged, tmp_path / "out", *argv, "--skip_bad")
    assert result.status == 0, result.stderr
    assert "train: bad images left out, as listed in manifest.json: 3" in result.stdout
    listed = read_manifest(tmp_path / "out" / "train")
    assert listed["num_examples"] == 9
    assert [item["file"] for item in listed["made_by"]["left_out"]] == [
        f"{wnid}/{wnid}_20.JPEG" for wnid in TINY_WNIDS[:3]
    ]
    fresh = convert(damaged, tmp_path / "fresh", *argv, "--skip_bad")
    assert fresh.status == 0 and tree(tmp_path / "fresh") == tree(tmp_path / "out")


# Refusals, each before anything is written.


def refused(source: Path, match: str, *more: str, status: int = 1) -> None:
    output = source.parent / "refused"
    result = convert(source, output, *more)
    assert result.status == status
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert re.search(match, result.stderr), result.stderr
    assert not output.exists()


def with_train(source: Path, data: bytes) -> Path:
    (source / "ILSVRC2012_img_train.tar").write_bytes(data)
    return source


def with_val(source: Path, members) -> Path:
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(members))
    return source


def test_a_class_that_is_missing(source):
    files = class_files(TINY_WNIDS, 1)
    del files[TINY_WNIDS[2]]
    refused(
        with_train(source, train_tar(files)),
        f"train.tar: 1 of 4 classes missing: {TINY_WNIDS[2]} \\({NAMES[2].split(',')[0]}",
    )


def test_a_class_without_images(source):
    files = class_files(TINY_WNIDS, 1)
    files[TINY_WNIDS[3]] = []
    refused(with_train(source, train_tar(files)), f"class {TINY_WNIDS[3]} holds no image")


def test_a_class_too_many_and_an_unknown_wnid(source):
    files = class_files([*TINY_WNIDS, WNIDS[9]], 1)
    refused(
        with_train(source, train_tar(files)),
        f"train.tar: folders that are not among the 4 classes .1.: {WNIDS[9]}",
    )
    files = class_files([*TINY_WNIDS, "n99999999", "photos"], 1)
    refused(with_train(source, train_tar(files)), "4 classes .2.: n99999999, photos")


def test_a_class_twice(source):
    inner = [(f"{wnid}.tar", tar_bytes(f)) for wnid, f in class_files(TINY_WNIDS, 1).items()]
    refused(
        with_train(source, tar_bytes([*inner, inner[1]])),
        f"two archives named {TINY_WNIDS[1]}.tar",
    )


def test_two_files_of_one_name(source):
    files = class_files(TINY_WNIDS, 2)
    files[TINY_WNIDS[0]].append(files[TINY_WNIDS[0]][0])
    refused(
        with_train(source, train_tar(files)),
        f"train.tar: two files are named {TINY_WNIDS[0]}/{TINY_WNIDS[0]}_0.JPEG",
    )
    with_train(source, train_tar(class_files(TINY_WNIDS, 1)))
    held = val_files(len(VAL_LABELS))
    refused(with_val(source, [*held, held[2]]), "val.tar: two files are named ILSVRC2012_val_")
    other = f"{TINY_WNIDS[VAL_LABELS[0]]}/{held[0][0]}"
    with_val(source, [*held, (other, held[0][1])])
    refused(source, "3 of 4 classes missing|two files are named")


def test_an_image_of_another_class_or_none(source):
    files = class_files(TINY_WNIDS, 1)
    files[TINY_WNIDS[0]].append((f"{TINY_WNIDS[1]}_77.JPEG", photo(1)))
    refused(with_train(source, train_tar(files)), "_77.JPEG belongs to another class by its name")
    inner = [(f"{wnid}.tar", tar_bytes(f)) for wnid, f in class_files(TINY_WNIDS, 1).items()]
    refused(
        with_train(source, tar_bytes([*inner, ("loose.JPEG", photo(1))])),
        "loose.JPEG is outside the class folders",
    )


def test_validation_files_without_a_label(source):
    held = val_files(len(VAL_LABELS))
    refused(
        with_val(source, [*held, ("ILSVRC2012_val_00000007.JPEG", photo(1))]),
        "00000007.JPEG has no label: labels.txt covers .*00000001.JPEG to .*00000006.JPEG",
    )
    refused(with_val(source, [*held, ("holiday.JPEG", photo(1))]), "holiday.JPEG has no label")


def test_validation_files_that_are_missing(source):
    held = val_files(len(VAL_LABELS))
    refused(
        with_val(source, held[:1] + held[2:]),
        "1 of 6 validation images missing: ILSVRC2012_val_00000002.JPEG",
    )
    refused(with_val(source, []), "6 of 6 validation images missing")


def test_a_folder_that_contradicts_the_table(source):
    held = val_files(len(VAL_LABELS))
    labels = [0, *VAL_LABELS[1:]]  # the first is of class 2
    members = [
        (f"{TINY_WNIDS[n]}/{name}", data) for n, (name, data) in zip(labels, held, strict=True)
    ]
    refused(with_val(source, members), "is of class 2 by labels.txt, but its folder is class 0")


def test_archives_that_are_cut_off_or_none(source):
    archive = source / "ILSVRC2012_img_train.tar"
    whole = archive.read_bytes()
    files = class_files(TINY_WNIDS, 3)
    end = len(train_tar(files).rstrip(b"\0"))
    for length in (end - 40, end - 1000, len(whole) // 2, 700, 512, 100):
        refused(with_train(source, whole[:length]), "train.tar.*is cut off; copy or download it")
    refused(with_train(source, b""), "ends at byte 0 without tar's end mark")
    refused(
        with_train(source, b"\x1f\x8b" + whole), "is not a tar archive: it is compressed; gunzip"
    )
    refused(with_train(source, photo(1) * 9), "is not a tar archive$|is not a tar archive\n")
    noise = bytearray(whole)
    at = 512 + 512 + -(-len(files[TINY_WNIDS[0]][0][1]) // 512) * 512
    noise[at : at + 20] = b"?" * 20
    refused(with_train(source, bytes(noise)), f"the tar header at byte {at} .*is damaged")
    link = tarfile.TarInfo("x.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "y.JPEG"
    refused(
        with_train(source, link.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)),
        "x.JPEG is a link or a special file",
    )


def pax_header(fields: bytes, size: int | None = None, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with these bytes in it, which may claim another size."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(fields) if size is None else size
    return header.tobuf(tarfile.GNU_FORMAT) + fields + bytes(-len(fields) % 512)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "header",
    [
        pax_header(b"11 size=-1\n"),
        pax_header(b"18 size=-99999999\n"),
        pax_header(b"21 size=999999999999\n"),
        pax_header(b"13 size=text\n"),
        pax_header(b"0 size=1\n"),
        pax_header(b"", size=-512),
        pax_header(b"", size=1 << 40),
        pax_header(b"", size=-512, kind=tarfile.GNUTYPE_LONGNAME),
        pax_header(b"", size=1 << 40, kind=tarfile.GNUTYPE_LONGNAME),
        pax_header(b"x\0", kind=tarfile.GNUTYPE_LONGNAME) * 2000,
        pax_header(b"", size=-(1 << 20), kind=tarfile.REGTYPE),
        pax_header(b"11 size=99\n", kind=tarfile.XGLTYPE)
        + pax_header(b"", size=-2048, kind=tarfile.REGTYPE),
        pax_header(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        pax_header(b"", size=512, kind=tarfile.GNUTYPE_SPARSE),
    ],
)
def test_hostile_headers_are_one_line(source, header, first):
    """Neither a loop without end, nor an archive read into memory."""
    name = f"{TINY_WNIDS[0]}_0.JPEG"
    files = [] if first else [("a.JPEG", photo(2))]
    end = tar_bytes([(name, photo(1))])
    before = tar_bytes(files).rstrip(b"\0")
    before += bytes(-len(before) % 512)
    refused(with_train(source, before + header + end), "train.tar: .*; (copy|pack)")


def test_inputs_that_are_not_there_or_ambiguous(source, tmp_path):
    refused(source, "--train=.*nowhere: there is no such", "--train=nowhere", status=2)
    (source / "train").mkdir()
    refused(source, "holds ILSVRC2012_img_train.tar and train; choose by --train=", status=2)
    (source / "ILSVRC2012_img_train.tar").unlink()
    refused(source, "4 of 4 classes missing")
    (source / "train").rmdir()
    refused(source, "holds neither ILSVRC2012_img_train.tar nor train/", status=2)
    refused(source, "--input=.*: is not a folder", f"--input={source / 'labels.txt'}", status=2)
    result = call(make_ofrecord.main, "imagenet", f"--output={tmp_path / 'x'}")
    assert result.status == 2 and "give --input, or --train, --validation" in result.stderr


def test_folders_that_are_refused(source):
    root = unpack(source)
    (root / "train" / TINY_WNIDS[0] / "more").mkdir()
    refused(root, "more: is a folder in a class folder")
    (root / "train" / TINY_WNIDS[0] / "more").rmdir()
    shutil.rmtree(root / "train" / TINY_WNIDS[1])
    refused(root, "train: 1 of 4 classes missing")
    (root / "train" / TINY_WNIDS[1]).mkdir()
    refused(root, f"class {TINY_WNIDS[1]} holds no image")


def test_tables_that_are_refused(source):
    for text, match in (
        ("0\n1\n4\n", r"line 3 is '4', which is neither a label of 0 to 3 .*count from 1"),
        ("0\nn99999999\n", "line 2 is 'n99999999', which is neither"),
        ("", "labels.txt: is empty"),
    ):
        (source / "labels.txt").write_text(text)
        refused(source, match, status=2)
    (source / "labels.txt").unlink()
    refused(source, "labels.txt: cannot read the labels: No such file", status=2)
    (source / "classes.txt").write_text("tench\ngoldfish\n")
    refused(source, "--classes=.* has no WordNet ids", status=2)


def test_wordnet_ids_as_validation_labels(source, tmp_path):
    (source / "labels.txt").write_text("".join(f"{TINY_WNIDS[n]}\n" for n in VAL_LABELS))
    assert convert(source, tmp_path / "out").status == 0
    held = records(tmp_path / "out" / "validation")
    assert [held[name]["class/label"] for name, _ in val_files(6)] == VAL_LABELS


def test_parts_are_refused_that_nothing_fills(source):
    refused(source, "--num_parts=7: .*validation has 6 examples", "--num_parts=7", status=2)


# Killed, and started again.


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """Pictures that take a while to resize: 4 classes of 50, 40 for validation."""
    root = tmp_path_factory.mktemp("slow") / "in"
    root.mkdir()
    lines = [f"{wnid} {NAMES[k]}" for k, wnid in enumerate(TINY_WNIDS)]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    pictures = [encoded(picture(k, (400, 300)), quality=90) for k in range(10)]
    files = {
        wnid: [(f"{wnid}_{k}.JPEG", pictures[k % 10]) for k in range(50)] for wnid in TINY_WNIDS
    }
    (root / "labels.txt").write_text("".join(f"{k % 4}\n" for k in range(40)))
    val = [(f"ILSVRC2012_val_{k + 1:08d}.JPEG", pictures[k % 10]) for k in range(40)]
    (root / "ILSVRC2012_img_train.tar").write_bytes(train_tar(files))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    return root


SLOW_FLAGS = ("--resize_shorter=200", "--num_parts=20")


@pytest.fixture(scope="module")
def uninterrupted(slow, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert convert(slow, output, *SLOW_FLAGS, "--num_workers=1").status == 0
    return tree(output)


def start(source: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "make_ofrecord.py")]
    return subprocess.Popen(
        command + flags(source, output, *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def num_parts_there(output: Path) -> int:
    return sum(1 for path in output.glob("*/part-*") if not path.name.endswith(".tmp"))


def ends(group: int) -> bool:
    """Whether every process of a group has ended within ten seconds."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("moment", range(20))
def test_killed_at_a_random_moment_and_restarted(slow, uninterrupted, tmp_path, moment):
    """Every moment from the start of the process to its end is as likely as another."""
    rng = random.Random(moment)
    output = tmp_path / "out"
    wanted = rng.uniform(-6, 40)  # parts that are there; below 0: before the first one is begun
    with start(slow, output, *SLOW_FLAGS, "--num_workers=2") as run:
        if wanted < 0:
            time.sleep(rng.uniform(0, 0.4))
        while num_parts_there(output) < wanted and run.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.killpg(run.pid, signal.SIGKILL)
    interrupted = not (output / "validation").exists()
    result = convert(slow, output, *SLOW_FLAGS, "--num_workers=1")
    if interrupted:
        assert result.status == 0, result.stderr
    else:  # it was done
        assert "already holds manifest.json" in result.stderr
    assert tree(output) == uninterrupted


def test_ctrl_c_keeps_whole_parts_and_ends_the_workers(slow, uninterrupted, tmp_path):
    output = tmp_path / "out"
    with start(slow, output, *SLOW_FLAGS, "--num_workers=2") as run:
        while num_parts_there(output) < 8 and run.poll() is None:
            time.sleep(0.001)
        os.killpg(run.pid, signal.SIGINT)
        _, messages = run.communicate(timeout=20)
    assert run.returncode == 130
    lines = messages.splitlines()
    assert re.search(r"train.partial: \d+ of 20 parts are finished and kept", lines[-2])
    assert lines[-1] == "make_ofrecord.py: error: interrupted"
    assert ends(run.pid)
    assert not list(output.glob("*/*.tmp"))
    assert convert(slow, output, *SLOW_FLAGS).status == 0
    assert tree(output) == uninterrupted


def test_a_parent_that_is_killed_takes_its_workers_with_it(slow, tmp_path):
    with start(slow, tmp_path / "out", *SLOW_FLAGS, "--num_workers=2") as run:
        while num_parts_there(tmp_path / "out") < 2 and run.poll() is None:
            time.sleep(0.001)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert ends(run.pid)


# Workers.


class Square:
    def __init__(self, n: int):
        self.n = n

    def __call__(self, advance):
        if self.n < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.n > 100:
            raise RunError(f"{self.n} is too large")
        advance(1)
        return self.n**2


def test_workers_give_every_result_once():
    for workers in (1, 2):
        steps = []
        tasks = [Square(n) for n in range(4)]
        found = dict(run_tasks(iter(tasks), num_workers=workers, advance=steps.append))
        assert found == {n: n**2 for n in range(4)} and sum(steps) == 4


def test_a_worker_that_dies_or_fails_ends_the_run():
    with pytest.raises(RunError, match="a worker process ended .exit code -9.*--num_workers"):
        list(run_tasks([Square(1), Square(-1)], num_workers=2, advance=print))
    with pytest.raises(RunError, match="500 is too large"):
        list(run_tasks([Square(500), Square(1)], num_workers=2, advance=print))


def test_progress_in_a_log(capsys, monkeypatch):
    with Progress(1000) as progress:
        progress.started -= 10
        progress.advance(100)
        assert capsys.readouterr().err == ""
        progress.printed -= 60
        progress.advance(100)
    line = capsys.readouterr().err
    assert re.fullmatch(r"200 of 1000 images, (19|20) images/s, 0:00:4\d left\n", line)


def test_the_tools_do_without_oneflow():
    code = (
        "import sys, tools.make_ofrecord, tools.verify_ofrecord, tools.make_mini_imagenet\n"
        "assert 'oneflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
