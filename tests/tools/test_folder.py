"""Folders of images: how they are split, kept in a cache, and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cnns.convert import cache
from cnns.convert.cache import Settings, convert_for_evaluation, convert_for_training
from cnns.convert.folder import choose_validation
from cnns.data.checks import check_shards
from cnns.data.format import decode_record
from cnns.errors import RunError, UsageError
from small import ROOT, call, read_manifest, tree
from tools import browse, make_ofrecord

SETTINGS = Settings(val_split=None, cache_dir="cache", skip_bad=False, follow_links=False)
CLASSES = {"a cat": 12, "dög": 8, "one": 1}


def picture(path, seed: int, size=(24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Class folders with names that are not ASCII, one image in a class, and nested ones."""
    monkeypatch.chdir(tmp_path)
    for k, (name, count) in enumerate(CLASSES.items()):
        for i in range(count):
            below = f"deep/er/{i}.png" if i == 2 else f"{i} ü.png"
            picture(tmp_path / "photos" / name / below, 100 * k + i)
    return tmp_path / "photos"


def convert(path="photos", validation=None, **settings):
    """(directories, notices, what the conversion says)."""
    values = vars(SETTINGS) | settings
    train, val, notices = convert_for_training(str(path), validation, settings=Settings(**values))
    return train, val, notices


def make(capfd, **settings) -> tuple[str, str | None, str]:
    train, val, notices = convert(**settings)
    return train, val, "\n".join([capfd.readouterr().err, *notices])


def records(directory: str) -> list[tuple[str, int]]:
    """Names and labels, sorted."""
    found = []
    for part in sorted(os.listdir(directory)):
        if not part.startswith("part-"):
            continue
        with open(os.path.join(directory, part), "rb") as file:
            while field := file.read(8):
                record = decode_record(file.read(int.from_bytes(field, "little")))
                name = record.feature["filename"].bytes_list.value[0]
                found.append((os.fsdecode(name), record.feature["class/label"].int32_list.value[0]))
    return sorted(found)


# The split.


@given(
    classes=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    contents=st.lists(st.integers(0, 40), min_size=60, max_size=60),
    share=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
)
def test_a_split_is_stratified_by_content_and_leaves_something_to_train_on(
    classes, contents, share
):
    digests = [str(content) for content in contents[: len(classes)]]
    chosen = set(choose_validation(classes, digests, share=share, seed=0))
    sides = [i in chosen for i in range(len(classes))]
    for digest in set(digests):
        assert len({side for side, each in zip(sides, digests, strict=True) if each == digest}) == 1
    for label, count in Counter(classes).items():
        held = sum(side for side, each in zip(sides, classes, strict=True) if each == label)
        assert held <= max(1, round(share * count)) or held < count
        assert held < count
    if len(set(digests)) == len(digests):  # no equal files: exactly the share
        for label, count in Counter(classes).items():
            held = sum(side for side, each in zip(sides, classes, strict=True) if each == label)
            assert held == min(max(1, round(share * count)), count - 1)


def test_a_split_depends_on_contents_and_seed_and_not_on_names_or_order():
    digests = [f"{i:02d}" for i in range(40)]
    chosen = choose_validation([0] * 40, digests, share=0.25, seed=0)
    turned = choose_validation([0] * 40, digests[::-1], share=0.25, seed=0)
    assert len(chosen) == 10 and sorted(39 - i for i in turned) == chosen
    assert choose_validation([0] * 40, digests, share=0.25, seed=1) != chosen
    # Another image changes little of it.
    more = choose_validation([0] * 41, [*digests, "new"], share=0.25, seed=0)
    assert len(set(more) ^ set(chosen)) <= 2


# The cache.


def test_a_folder_is_split_and_converted_once(photos, capfd):
    picture(photos / "a cat" / "again.png", 1)  # as the one of that seed
    picture(photos / "dög" / "wrong.png", 3)  # a cat
    (photos / "dög" / "notes.txt").write_text("x")
    train, val, said = make(capfd)
    assert os.path.dirname(train) == os.path.dirname(val)
    assert os.path.basename(os.path.dirname(train)).startswith("photos-")
    for line in (
        "photos is not split: 10% of each class are kept for validation (--val_split=0.1).",
        "Images (train + validation): a cat 12+1, dög 8+1, one 1+0.",
        "Classes with fewer than 10 images: one (1), dög (9).",
        "1 image is in two classes, of which one is wrong: a cat/3 ü.png = dög/wrong.png.",
        "1 image is there more than once: a cat/1 ü.png = a cat/again.png.",
        "left out, not named like images (1): dög/notes.txt",
    ):
        assert line in said, said
    held, kept = records(val), records(train)
    assert len(held) == 2 and len(kept) == 21 and not set(held) & set(kept)
    assert ("a cat/deep/er/2.png", 0) in held + kept
    assert read_manifest(photos.parent / val)["classes"] == list(CLASSES)
    check_shards(train, flag="--train_data_dir")
    before = tree(photos.parent / "cache")
    assert make(capfd)[:2] == (train, val)
    assert tree(photos.parent / "cache") == before
    assert "unchanged, read from cache" in convert()[2][1]


def test_what_changes_the_stamp_and_what_does_not(photos, capfd):
    train, _, _ = make(capfd)
    first = check_shards(train, flag="").fingerprint()
    os.rename(photos, photos.parent / "moved")
    moved, _, _ = make(capfd, path="moved")
    assert moved.replace("moved", "photos") == train
    assert tree(photos.parent / os.path.dirname(moved)) == tree(
        photos.parent / os.path.dirname(train)
    )
    os.rename(photos.parent / "moved", photos)
    os.utime(photos / "one" / "0 ü.png")
    touched, _, said = make(capfd)
    assert touched != train and "to be removed if unneeded: cache/photos-" in said
    assert check_shards(touched, flag="").fingerprint() == first  # the same images
    picture(photos / "one" / "0 ü.png", 999)
    other = make(capfd)[0]
    assert check_shards(other, flag="").fingerprint() != first
    assert make(capfd, val_split=0.5)[0] not in (train, touched, other)


def test_no_split_and_the_folders_of_a_split(photos, tmp_path, capfd):
    train, val, _ = make(capfd, val_split=0.0)
    assert val is None and len(records(train)) == 21
    os.makedirs("both")
    os.rename(photos, "both/train")
    assert make(capfd, path="both")[2].count("both/train is not split") == 1
    for i in range(3):
        picture(tmp_path / "both" / "val" / "dög" / f"{i}.png", 700 + i)
    picture(tmp_path / "both" / "val" / "a cat" / "seen.png", 1)
    train, val, said = make(capfd, path="both")
    assert "both/val: no folder for 1 of 3 classes: one" in said
    assert "1 image is in training and in validation" in said
    assert [label for _, label in records(val)] == [0, 1, 1, 1]  # by the classes of train/
    assert (train, val) == make(capfd, path="both/train", validation="both/val")[:2]
    with pytest.raises(UsageError, match="both holds val/ already; leave it out"):
        convert("both", val_split=0.2)
    with pytest.raises(UsageError, match="no effect beside --val_data_dir"):
        convert("both/train", "both/val", val_split=0.2)


def test_evaluation_scores_what_training_kept_and_asks_where_that_is_not_known(photos, capfd):
    _, val, _ = make(capfd)

    def score(path="photos", trained_on=None, **settings):
        given = Settings(**vars(SETTINGS) | settings)
        return convert_for_evaluation(
            path, settings=given, classes=list(CLASSES), trained_on=trained_on or {}
        )[0]

    assert score(trained_on={"train_data_dir": "photos", "val_split": None}) == val
    assert score(val_split=0.1) == val
    assert len(records(score(val_split=1.0))) == 21
    with pytest.raises(UsageError, match="not split into training and validation: --val_split=0.1"):
        score()
    os.makedirs("set/validation")
    os.rename(photos / "dög", "set/validation/dög")
    assert {label for _, label in records(score("set/validation"))} == {1}
    assert score("set/validation/nothing") == "set/validation/nothing"


def test_bad_images_are_named_and_left_out_if_asked(photos, capfd):
    (photos / "dög" / "bad.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="1 of 22 images are bad.*--skip_bad"):
        convert()
    assert "bad image: dög/bad.png: not an image that Pillow can read" in capfd.readouterr().err
    train, val, _ = make(capfd, skip_bad=True)
    assert len(records(train) + records(val)) == 21
    assert sorted(os.listdir("cache")) == [os.path.basename(os.path.dirname(train))]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda p: (p / "empty").mkdir(), "empty: holds no image"),
        (lambda p: picture(p / "loose.png", 1), "loose.png: is outside the class folders"),
        (lambda p: (p / "dög" / "loop").symlink_to(p), "is the same folder as"),
        (lambda p: (p / "dög" / "out.png").symlink_to("/etc/passwd"), "give --follow_links"),
        (lambda p: (p / "dög" / "gone.png").symlink_to("nothing"), "1 of 22 images are bad"),
        (lambda p: os.mkfifo(p / "dög" / "pipe.png"), "1 of 22 images are bad"),
    ],
)
def test_odd_folders_are_one_line(photos, spoil, words):
    spoil(photos)
    with pytest.raises((RunError, UsageError), match=words):
        convert()
    assert not any("manifest.json" in names for *_, names in os.walk("cache"))


def test_a_folder_without_images_or_without_two_in_any_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "few" / "a" / "1.png", 1)
    with pytest.raises(RunError, match="no class has two different images"):
        convert("few")
    (tmp_path / "flat").mkdir()
    picture(tmp_path / "flat" / "1.png", 1)
    assert convert("flat")[0] == "flat"
    with pytest.raises(UsageError, match="no OFRecord parts .*and no folders of images"):
        check_shards("flat", flag="--train_data_dir")
    with pytest.raises(UsageError, match="few is not split .*: --x=few --val_split=0.1 splits it"):
        check_shards("few/train", flag="--x")


def test_a_cache_within_the_folder_is_refused(photos):
    with pytest.raises(UsageError, match="--cache_dir=photos/cache lies in photos"):
        convert(cache_dir="photos/cache")


def test_a_cache_that_cannot_be_written(photos):
    (photos.parent / "cache").write_text("a file")
    with pytest.raises(RunError, match="--cache_dir: cannot write to .*cache.*: "):
        convert()


def test_what_changes_while_it_is_converted_is_not_kept(photos, monkeypatch):
    found = cache.Request({"": "photos"}, 0.1, None, SETTINGS)
    fill = cache.fill

    def and_change(*args):
        fill(*args)
        picture(photos / "one" / "late.png", 5)

    monkeypatch.setattr(cache, "fill", and_change)
    with redirect_stderr(StringIO()), pytest.raises(RunError, match="changed while it was conv"):
        cache.make_entry(found)
    assert os.listdir("cache") == []


def test_a_full_disk_keeps_what_is_finished_and_the_next_run_goes_on(photos, monkeypatch, capsys):
    request = cache.Request({"": "photos"}, 0.1, None, SETTINGS)
    written = []
    from cnns.convert import writer

    write_part = writer.write_part

    def full(path, messages):
        written.append(path.name)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return write_part(path, messages)

    monkeypatch.setattr(writer, "write_part", full)
    with pytest.raises(RunError, match="part-00002: cannot write: No space left"):
        cache.make_entry(request)
    assert "2 of 4 parts are finished and kept" in capsys.readouterr().err
    monkeypatch.setattr(writer, "write_part", write_part)
    entry = cache.make_entry(request)
    assert "2 parts of 4 were there from an earlier run" in capsys.readouterr().err
    assert sum(len(records(str(entry / side))) for side in ("train", "validation")) == 21


def test_processes_that_start_at_once_convert_once(photos):
    asked = json.dumps({"roots": {"": "photos"}, "share": 0.1, "classes": None})
    asked = json.dumps(json.loads(asked) | {"settings": vars(SETTINGS)})
    command = [sys.executable, str(ROOT / "cnns" / "convert" / "cache.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    said = []
    for run in runs:
        run.stdin.write(asked)
        run.stdin.close()
    for run in runs:
        said.append((run.stdout.read(), run.stderr.read()))
        assert run.wait() == 0
    assert len({out for out, _ in said}) == 1
    assert sum("Converting 21 images" in err for _, err in said) == 1
    assert len(os.listdir("cache")) == 1


def test_sigterm_ends_a_conversion_that_can_be_resumed(photos):
    for i in range(150):
        picture(photos / "a cat" / f"more {i}.png", 1000 + i, size=(200, 200))
    asked = {"roots": {"": "photos"}, "share": 0.1, "classes": None, "settings": vars(SETTINGS)}
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "cnns" / "convert" / "cache.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    run.stdin.write(json.dumps(asked))
    run.stdin.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(photos.parent.glob("cache/*/train.partial/p*")):
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 143 and run.stdout.read() == ""
    run.stdout.close()
    train, val, _ = convert()
    assert len(records(train)) + len(records(val)) == 171
    assert len(os.listdir("cache")) == 1


# The tools.


def test_make_ofrecord_splits_as_training_does(photos, capfd):
    train, val, _ = make(capfd)
    flags = ["folder", "--input=photos", "--output=out", "--val_split=0.1"]
    result = call(make_ofrecord.main, *flags)
    assert result.status == 0 and "Images (train + validation): a cat 11+1" in result.stderr
    assert records("out/train") == records(train) and records("out/validation") == records(val)
    result = call(make_ofrecord.main, "folder", "--input=photos", "--output=whole")
    assert result.status == 0 and "val_split" not in str(read_manifest(photos.parent / "whole"))
    with pytest.raises(UsageError, match="whole holds parts that are not split.*--val_split=0.1"):
        check_shards("whole/train", flag="--train_data_dir")


def test_a_contact_sheet_shows_what_training_sees(photos):
    flags = ["photos", "--num=5", "--image_size=32", "--batch_size_per_device=4"]
    result = call(browse.main, *flags, "--cache_dir=cache")
    assert result.status == 0 and "browse.png: 5 pictures of epoch 0" in result.stdout
    with Image.open("browse.png") as first:
        assert first.size == (5 * 134 + 6, 152 + 6)
        pixels = np.asarray(first)

    def sheet(*more):
        name = "other.png"
        assert call(browse.main, *flags, "--cache_dir=cache", f"--output={name}", *more).status == 0
        with Image.open(name) as image:
            return np.asarray(image)

    assert np.array_equal(sheet(), pixels)
    assert not np.array_equal(sheet("--epoch=1"), pixels)
    assert not np.array_equal(sheet("--seed=1"), pixels)
    assert call(browse.main, "photos", "--output=x.gif").status == 2


def test_a_contact_sheet_of_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.full((3, 8, 8, 3), [[[[0]]], [[[128]]], [[[255]]]], np.uint8)
    np.savez("x.npz", images=images, labels=[0, 1, 2])
    result = call(browse.main, "x.npz", "--num=3", "--image_size=8", "--output=sheet.png")
    assert result.status == 0
    with Image.open("sheet.png") as sheet:  # whole pictures, normalised and back
        levels = {sheet.getpixel((6 + 134 * k + 64, 70)) for k in range(3)}
    assert levels == {(0, 0, 0), (128, 128, 128), (255, 255, 255)}
