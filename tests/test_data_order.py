"""--data_order=global: an order that seed and epoch decide, read by indexes of records."""

import itertools
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import config
import ofrecord_util
from cnns.checkpoint.snapshot import Snapshot
from cnns.data import records
from cnns.data.arrays import ArraySource
from cnns.data.checks import check_shards
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.data.images import Preprocessing
from cnns.data.kinds import Arrays
from cnns.data.order import RecordOrder
from cnns.data.pictures import PictureTrainLoader
from cnns.data.records import RecordSource, index_path
from cnns.errors import RunError, UsageError
from cnns.resume import compare_flags, inherited_flags
from small import ROOT, jpeg, record

PREPROCESSING = Preprocessing(16, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
COUNTS = (13, 1, 9, 17)  # 40 records


def picture(number: int) -> np.ndarray:
    """Its levels are 3 times its number, but for a ramp that shows crops and flips."""
    ramp = np.linspace(0, 100, 24, dtype=np.uint8)[None, :, None] * np.uint8([0, 1, 0])
    return np.full((20, 24, 3), 3 * number, np.uint8) // np.uint8([1, 255, 1]) + ramp


def write_numbered(directory, counts=COUNTS):
    """Parts whose labels are the numbers of their records."""
    directory.mkdir()
    numbers = itertools.count()
    for i, count in enumerate(counts):
        data = [record(jpeg(picture(n)), n) for n in itertools.islice(numbers, count)]
        (directory / f"part-{i:05d}").write_bytes(b"".join(data))
    return directory


@pytest.fixture
def numbered(tmp_path):
    return write_numbered(tmp_path / "data")


def make_loader(directory, *, batch_size=8, seed=3):
    return ofrecord_util.train_loader(
        open_train_dataset(str(directory)),
        batch_size=batch_size,
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(),
        seed=seed,
        device="cpu",
        data_order="global",
    )


def batches_of(loader, epoch, iteration=0, *, end):
    """(images, labels) of the batches from `iteration` to `end`, as arrays."""
    batches = itertools.islice(loader.batches(epoch, iteration), end - iteration)
    images, labels = zip(*([x.numpy() for x in batch] for batch in batches), strict=True)
    return np.concatenate(images), np.concatenate(labels).tolist()


def test_every_record_once_an_epoch(numbered):
    loader = make_loader(numbered, batch_size=7)
    orders = []
    for epoch in range(3):
        images, labels = batches_of(loader, epoch, end=6)
        assert sorted(labels[:40]) == list(range(40))
        assert labels[40:] == labels[:2]  # the first of the epoch fill its last batch up
        # The picture is that of the label.
        assert np.abs(images[..., 0].mean(axis=(1, 2)) / 3 - labels).max() < 0.5
        orders.append(labels)
    assert len(set(map(tuple, orders))) == 3
    assert batches_of(make_loader(numbered, batch_size=7), 1, end=6)[1] == orders[1]
    assert batches_of(make_loader(numbered, batch_size=7, seed=4), 1, end=6)[1] != orders[1]
    # The first of a batch of another size are the same.
    assert batches_of(make_loader(numbered, batch_size=10), 1, end=4)[1] == orders[1][:40]


def test_batches_depend_on_epoch_and_iteration_alone(numbered):
    images, labels = batches_of(make_loader(numbered), 2, end=5)
    for iteration in range(1, 5):
        found, numbers = batches_of(make_loader(numbered), 2, iteration, end=5)
        assert numbers == labels[8 * iteration :]
        np.testing.assert_array_equal(found, images[8 * iteration :])
    crops = {crop.tobytes() for crop in images[..., 1]}  # the ramp is the same in all pictures
    assert len(crops) > 30


def test_arrays_and_records_give_the_same_batches(numbered):
    """The source is all that differs."""
    images = []
    for number in range(40):
        (numbered / "one.jpg").write_bytes(jpeg(picture(number)))
        with Image.open(numbered / "one.jpg") as image:
            images.append(np.asarray(image))
    arrays = Arrays(path="", num_examples=40, images=np.stack(images), labels=np.arange(40))
    settings = {"preprocessing": PREPROCESSING, "seed": 3, "device": "cpu"}
    loader = ofrecord_util.train_loader(
        arrays, batch_size=8, augmentation=Augmentation(), **settings
    )
    found, labels = batches_of(make_loader(numbered), 1, end=5)
    expected, numbers = batches_of(loader, 1, end=5)
    assert labels == numbers
    np.testing.assert_array_equal(found, expected)


def test_another_crop_can_be_put_in(numbered):
    """What augmentations build on."""
    loader = make_loader(numbered)
    seen = []

    def crop(picture, rng):
        seen.append(picture.size)
        return np.full((16, 16, 3), rng.integers(256), np.uint8)

    loader.crop = crop
    images, _ = batches_of(loader, 0, end=2)
    assert set(seen) == {(24, 20)}
    again, _ = batches_of(loader, 0, 1, end=2)
    np.testing.assert_array_equal(again, images[8:])


def test_large_jpegs_are_decoded_at_a_smaller_scale(tmp_path, monkeypatch):
    """Four times as large as the crop: the same picture but for how it is shrunk."""
    y, x = np.mgrid[0:160, 0:240]
    pixels = np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "part-00000").write_bytes(record(jpeg(pixels), 0))
    source = RecordSource(check_shards(str(directory), flag="--train_data_dir"))
    arrays = Arrays(path="", num_examples=1, images=pixels[None], labels=np.zeros(1))
    loaders = [
        PictureTrainLoader(
            each,
            batch_size=1,
            preprocessing=PREPROCESSING,
            augmentation=Augmentation(area=(0.5, 1.0)),
            seed=0,
            device="cpu",
        )
        for each in (source, ArraySource(arrays))
    ]
    sizes = []
    with source.open(0) as (image, _):
        draft = type(image).draft

    def draft_seen(self, mode, size):
        found = draft(self, mode, size)
        sizes.append(self.size)
        return found

    monkeypatch.setattr(f"{draft.__module__}.JpegImageFile.draft", draft_seen)
    for epoch in range(10):
        small, whole = (loader.make_row(epoch, 0)[0].astype(int) for loader in loaders)
        assert np.abs(small - whole).max() < 10
    assert all(max(size) < 240 for size in sizes) and len(sizes) == 10


# Indexes.


def indexes(directory):
    return sorted(name for name in os.listdir(directory) if name.endswith(".index"))


def labels_read(directory):
    source = RecordSource(check_shards(str(directory), flag="--train_data_dir"))
    return [source.read(number)[1] for number in range(len(source))]


def walks(monkeypatch):
    """The parts that are walked from now on."""
    walked = []
    original = records.walk_records

    def walk(fd, path):
        walked.append(os.path.basename(path))
        return original(fd, path)

    monkeypatch.setattr(records, "walk_records", walk)
    return walked


def test_an_index_is_made_once_and_anew_for_a_part_that_changed(numbered, monkeypatch):
    walked = walks(monkeypatch)
    assert labels_read(numbered) == list(range(40))
    assert sorted(walked) == [f"part-0000{i}" for i in range(4)]
    assert indexes(numbered) == [f".part-0000{i}.index" for i in range(4)]
    walked.clear()
    assert labels_read(numbered) == list(range(40)) and walked == []
    # Records of other sizes, and more of them.
    part = numbered / "part-00002"
    part.write_bytes(b"".join(record(jpeg(picture(n)), n + 100) for n in range(9)))
    assert labels_read(numbered)[14:23] == list(range(100, 109)) and walked == ["part-00002"]
    walked.clear()
    part.write_bytes(record(jpeg(picture(1)), 7) * 5)
    assert labels_read(numbered)[14:19] == [7] * 5 and walked == ["part-00002"]
    walked.clear()
    # Of the same size, swapped: only the time tells.
    state = part.stat()
    part.write_bytes(part.read_bytes())
    os.utime(part, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    labels_read(numbered)
    assert walked == ["part-00002"]


def damage(data: bytes, kind: str) -> bytes:
    header, count = records.HEADER.size, struct.unpack_from("<q", data, 24)[0]
    body = bytearray(data)
    if kind == "empty":
        return b""
    if kind == "cut off":
        return data[:-9]
    if kind == "longer":
        return data + b"\0" * 8
    if kind == "another format":
        body[7:8] = b"2"
    elif kind == "a flipped bit":
        body[header + 9] ^= 1
        return bytes(body)
    elif kind == "many records":
        body[24:32] = struct.pack("<q", 1 << 60)
    else:
        offsets = {
            "outside": [0, *[1 << 60] * (count - 1)],
            "negative": [-8, *range(count - 1)],
            "falling": [0, *range(9 * count, 9, -9)],
        }[kind]
        body[header : header + 8 * count] = struct.pack(f"<{count}q", *offsets[:count])
    whole = bytes(body[:-4])
    return whole + records.CHECKSUM.pack(records.zlib.crc32(whole))


@pytest.mark.parametrize(
    "kind",
    ["empty", "cut off", "longer", "another format", "a flipped bit", "many records", "outside",
     "negative", "falling"],
)  # fmt: skip
def test_a_damaged_index_is_made_anew(numbered, kind, monkeypatch):
    labels_read(numbered)
    path = numbered / ".part-00003.index"
    good = path.read_bytes()
    path.write_bytes(damage(good, kind))
    assert path.read_bytes() != good
    walked = walks(monkeypatch)
    assert labels_read(numbered) == list(range(40))
    assert walked == ["part-00003"] and path.read_bytes() == good


def test_what_stands_in_the_place_of_an_index(numbered, capsys):
    fifo, folder, link = (numbered / f".part-0000{i}.index" for i in range(3))
    os.mkfifo(fifo)
    folder.mkdir()
    outside = numbered.parent / "outside"
    outside.write_text("not ours")
    link.symlink_to(outside)
    assert labels_read(numbered) == list(range(40))
    (line,) = capsys.readouterr().err.splitlines()
    assert "indexes of its records cannot be kept there (Is a directory)" in line
    assert outside.read_text() == "not ours" and not link.is_symlink() and fifo.is_file()


def test_a_directory_that_cannot_be_written(numbered, monkeypatch, capsys):
    def refuse(part, data):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(records, "write_index", refuse)
    assert labels_read(numbered) == list(range(40))
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be kept there (Read-only file system); they are made anew" in line
    assert indexes(numbered) == []


def test_an_index_that_lies_is_found_out(numbered):
    """One that passes its own checks, for a part of the same size and time."""
    labels_read(numbered)
    part = str(numbered / "part-00000")
    with open(index_path(part), "rb") as file:
        data = file.read()
    count = COUNTS[0]
    offsets = np.frombuffer(data, "<i8", count, records.HEADER.size).copy()
    offsets[5] += 9
    body = data[: records.HEADER.size] + offsets.tobytes()
    with open(index_path(part), "wb") as file:
        file.write(body + records.CHECKSUM.pack(records.zlib.crc32(body)))
    place = rf"part-00000: record 4, at byte {offsets[4]}, is not what its index says.*remove"
    with pytest.raises(RunError, match=place):
        labels_read(numbered)


def test_parts_are_opened_and_closed_as_the_limit_asks(numbered, monkeypatch):
    monkeypatch.setattr(records.resource, "getrlimit", lambda which: (4, 4))
    source = RecordSource(check_shards(str(numbered), flag="--train_data_dir"))
    before = len(os.listdir("/proc/self/fd"))
    for number in (*range(40), *range(0, 40, 7)):
        assert source.read(number)[1] == number
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_images_that_cannot_be_read(numbered):
    whole = jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    cut_off = record(whole[: len(whole) // 2], 0)
    (numbered / "part-00001").write_bytes(cut_off)
    data = check_shards(str(numbered), flag="--train_data_dir")
    source = RecordSource(data)
    with source.open(13) as (image, _):  # decoded in part, as by OneFlow's decoder
        pixels = np.asarray(image)

    assert pixels.std(axis=(1, 2))[:24].min() > 20 and pixels[-8:].std() < 1
    (numbered / "part-00001").write_bytes(record(b"\xff\xd8 garbage", 0))
    with pytest.raises(RunError, match="part-00001: record 0, at byte 0, holds an image that"):
        with RecordSource(data).open(13):
            pass
    (numbered / "part-00001").write_bytes(struct.pack("<q", 9) + b"text only")
    with pytest.raises(RunError, match="record 0, at byte 0, is not an OFRecord with one"):
        RecordSource(data).read(13)
    # An error in a thread ends the run.
    with pytest.raises(RunError, match="is not an OFRecord"):
        loader = make_loader(numbered)
        loader.source = RecordSource(data)
        batches_of(loader, 0, end=5)


# The digest.


def test_the_digest_is_of_all_records_used():
    order = RecordOrder(num_records=10, batch_size=4, seed=1)
    digest = None
    for epoch in range(2):
        for iteration in range(3):
            assert order.digest_at(epoch, iteration, steps_per_epoch=3) == digest
            digest = order.digest(digest, epoch, iteration)
    others = [
        RecordOrder(num_records=10, batch_size=4, seed=2).digest_at(2, 0, steps_per_epoch=3),
        RecordOrder(num_records=11, batch_size=4, seed=1).digest_at(2, 0, steps_per_epoch=3),
        RecordOrder(num_records=10, batch_size=2, seed=1).digest_at(2, 0, steps_per_epoch=3),
        order.digest_at(1, 3, steps_per_epoch=3),
        order.digest_at(0, 6, steps_per_epoch=3),
    ]
    assert order.digest_at(2, 0, steps_per_epoch=3) == digest
    assert len({digest, others[0], others[1], others[2], others[4]}) == 5
    assert others[3] == digest


def test_what_a_resumed_run_inherits():
    parser = config.make_parser("train")
    # Of an earlier version, on 4 processes.
    flags = {"train_data_dir": "x", "batch_size_per_device": 2, "gpu_num_per_node": 4}
    snapshot = Snapshot("toy", 4, PREPROCESSING, global_batch_size=8, flags=flags)

    def resume(*argv):
        given = parser.parse_args(list(argv))
        inherited = inherited_flags(snapshot, parser, given=given, device="cpu")
        args = parser.complete(given, inherited)
        compare_flags(args, snapshot.flags, parser, path="run")
        config.finish_train_args(args, device="cpu")
        return args.batch_size_per_device, args.global_batch_size, args.data_order

    assert resume() == (8, 8, "native")
    assert resume("--gpu_num_per_node=2") == (4, 8, "native")
    assert resume("--batch_size_per_device=8") == (8, 8, "native")
    assert resume("--batch_size_per_device=2")[1] == 2  # compare_runs refuses it
    with pytest.raises(UsageError, match="--global_batch_size=8 cannot be divided among 3"):
        resume("--gpu_num_per_node=3")
    refused = "--data_order=global, but run is of a run with native; leave it out"
    with pytest.raises(UsageError, match=refused):
        resume("--data_order=global")
    snapshot.flags["data_order"] = "global"
    assert resume()[2] == "global"
    with pytest.raises(UsageError, match="--data_order=native, but run is of a run with global"):
        resume("--data_order=native")


RANK = """
import sys
sys.path[:0] = sys.argv[1:3]
import cnns.startup, json, os, test_data_order as here
import oneflow as flow
from cnns.data.pictures import count_threads
loader = here.make_loader("data", batch_size=8)
labels, sums = [], []
for epoch, first in ((0, 0), (1, 3)):
    batches = loader.batches(epoch, first)
    for _ in range(first, 5):
        image, label = next(batches)
        labels.append(label.to_local().numpy().tolist())
        sums.append(image.to_local().numpy().astype(int).sum(axis=(1, 2, 3)).tolist())
found = {"labels": labels, "sums": sums, "threads": count_threads()}
open(f"rank-{os.environ['RANK']}", "w").write(json.dumps(found))
"""


@pytest.mark.long
def test_a_global_batch_is_the_same_on_any_number_of_processes(numbered, tmp_path):
    """As read by each process: the labels are the numbers of the records."""
    images = {}
    for processes in (1, 2, 4):
        for name in indexes(numbered):
            os.remove(numbered / name)
        driver = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from cnns.launch.job import make_job
from cnns.launch.parent import launch
job = make_job(num_nodes=1, node_ips=None, processes_per_node={processes}, ctrl_port=50051)
command = [sys.executable, "-c", {RANK!r}, {str(ROOT)!r}, {str(ROOT / "tests")!r}]
sys.exit(launch(command, job=job, facts=dict))
"""
        done = subprocess.run([sys.executable, "-c", driver], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        ranks = [json.loads((tmp_path / f"rank-{i}").read_text()) for i in range(processes)]
        cores = len(os.sched_getaffinity(0))
        assert {rank["threads"] for rank in ranks} == {max(1, cores // processes)}
        for what in ("labels", "sums"):
            shares = [rank[what] for rank in ranks]
            whole = [sum(rows, []) for rows in zip(*shares, strict=True)]  # global batches
            assert images.setdefault(what, whole) == whole
    assert sorted(sum(images["labels"][:5], [])) == list(range(40))
