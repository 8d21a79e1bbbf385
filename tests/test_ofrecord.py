"""Checks of part files, and what the loaders give."""

import io
import itertools
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ofrecord_util
from cnns.data import checks
from cnns.data.arrays import ArrayTrainLoader, ArrayValLoader
from cnns.data.checks import check_shards
from cnns.data.crops import Augmentation, random_resized_crop
from cnns.data.datasets import open_train_dataset, open_val_dataset
from cnns.data.format import count_records
from cnns.data.images import Preprocessing, center_crop, load_image
from cnns.data.kinds import Arrays, Shards
from cnns.errors import RunError, UsageError
from small import ROOT, jpeg, record, write_manifest, write_parts

FLAG = "--train_data_dir"
PREPROCESSING = Preprocessing(32, 36, (123.68, 116.779, 103.939), (58.393, 57.12, 57.375))
LABELS = [[0, 1, 2, 3, 3], [1, 2, 0], [3, 0, 1, 2], [2, 2]]


@pytest.fixture(params=[False, True], ids=["no manifest", "manifest"])
def parts(request, tmp_path):
    directory = write_parts(tmp_path / "data", LABELS)
    if request.param:
        write_manifest(directory, num_classes=4)
    return directory


def test_records_are_counted(parts):
    shards = check_shards(str(parts), flag=FLAG)
    assert shards.part_counts == (5, 3, 4, 2)
    assert shards.num_examples == 14
    assert shards.suffix_length == 5
    assert check_shards(str(parts), flag=FLAG, part_num=2).num_examples == 8


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8), st.data())
def test_walking_finds_every_cut(tmp_path_factory, messages, data):
    path = tmp_path_factory.mktemp("walk") / "part-00000"
    whole = b"".join(struct.pack("<q", len(message)) + message for message in messages)
    path.write_bytes(whole)
    assert count_records(str(path)) == len(messages)
    ends = set(np.cumsum([0] + [8 + len(message) for message in messages]).tolist())
    cut = data.draw(st.integers(1, len(whole) - 1))
    path.write_bytes(whole[:cut])
    if cut in ends:
        assert count_records(str(path)) < len(messages)
    else:
        with pytest.raises(RunError, match="cut off"):
            count_records(str(path))


@pytest.mark.parametrize(
    "length", [0, -5, 1 << 40, struct.unpack("<q", b"\xff\xd8\xff\xe0JFIF")[0]]
)
def test_a_garbage_length_is_named_with_its_place(tmp_path, length):
    path = tmp_path / "part-00000"
    first = record(b"x" * 20, 1)
    path.write_bytes(first + struct.pack("<q", length) + b"y" * 50)
    with pytest.raises(RunError, match=f"record 1, at byte {len(first)}, claims"):
        count_records(str(path))


def test_faults_of_a_directory(parts):
    def refuse(error, words, **more):
        with pytest.raises(error, match=words):
            check_shards(str(parts), flag=FLAG, **more)

    refuse(UsageError, "--train_data_part_num=5", part_num=5)
    last, second = parts / "part-00003", parts / "part-00001"
    whole = second.read_bytes()
    second.write_bytes(whole[:-3])
    refuse(RunError, "part-00001.*cut off")
    second.write_bytes(whole)
    broken = bytearray(whole)
    broken[0:8] = struct.pack("<q", 1 << 50)
    second.write_bytes(broken)
    refuse(RunError, "part-00001: record 0, at byte 0, claims")
    second.unlink()
    refuse(UsageError, "part-00001 is missing")
    second.write_bytes(whole)
    check_shards(str(parts), flag=FLAG)
    if (parts / "manifest.json").exists():
        last.unlink()
        refuse(UsageError, "part-00003 is missing")


def test_a_manifest_that_lies_or_is_broken(tmp_path):
    directory = write_parts(tmp_path / "data", LABELS)
    write_manifest(directory, num_classes=4)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"][2]["num_examples"] = 40
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="part-00002 holds 4 records and its manifest says 40"):
        check_shards(str(directory), flag=FLAG)
    write_manifest(directory, num_classes=4)
    good = json.loads(path.read_text())
    first = good["parts"][0]
    for broken in (
        [],
        {},
        good | {"parts": []},
        good | {"parts": [{"name": 3}]},
        good | {"parts": [first | {"num_examples": "5"}]},
        good | {"num_classes": "4"},
        good | {"classes": 4},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(RunError, match="not a manifest that can be read"):
            check_shards(str(directory), flag=FLAG)
    path.write_text("{")
    with pytest.raises(RunError, match="not a manifest that can be read"):
        check_shards(str(directory), flag=FLAG)
    # The native reader opens parts by number, whatever a manifest says.
    path.write_text(json.dumps(good | {"parts": good["parts"][1:]}))
    with pytest.raises(RunError, match="its manifest lists part-00001"):
        check_shards(str(directory), flag=FLAG)


def test_directories_without_parts(tmp_path):
    with pytest.raises(UsageError, match="no directory"):
        check_shards(str(tmp_path / "none"), flag=FLAG)
    with pytest.raises(UsageError, match="holds no OFRecord parts"):
        check_shards(str(tmp_path), flag=FLAG)
    (tmp_path / "part-00000").touch()
    with pytest.raises(RunError, match="holds no records"):
        check_shards(str(tmp_path), flag=FLAG)


def encoded(mode, kind):
    file = io.BytesIO()
    Image.new(mode, (20, 20)).save(file, kind)
    return file.getvalue()


GOOD = record(encoded("RGB", "JPEG"), 2)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    "bad, words",
    [
        (record(encoded("L", "JPEG"), 0), "holds L JPEG"),
        (record(encoded("CMYK", "JPEG"), 0), "holds CMYK JPEG"),
        (record(encoded("RGB", "PNG"), 0), "holds RGB PNG"),
        (record(b"\xff\xd8 garbage", 0), "holds no image"),
        (record(b"", 0), "holds no image"),
        (struct.pack("<q", 9) + b"text only", "is not an OFRecord"),
        # Bytes behind the message: protobuf only warns, and OneFlow's reader ends the process.
        (struct.pack("<q", len(GOOD) - 7) + GOOD[8:] + b"\x0c", "is not an OFRecord"),
    ],
    ids=["grey", "cmyk", "png", "garbage", "empty", "text", "bytes_behind"],
)
def test_records_that_the_decoder_cannot_read_are_found(tmp_path, bad, words, position):
    (tmp_path / "part-00000").write_bytes(b"".join([GOOD, bad] if position else [bad, GOOD]))
    place = f"part-00000: record {position}, at byte {position * len(GOOD)}, {words}"
    with pytest.raises(RunError, match=place):
        check_shards(str(tmp_path), flag=FLAG)


def test_large_data_are_looked_into_at_the_start_of_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ALWAYS_LOOK_BYTES", 100)
    bad = record(encoded("L", "JPEG"), 0)
    (tmp_path / "part-00000").write_bytes(GOOD + bad)
    (tmp_path / "part-00001").write_bytes(GOOD)
    assert check_shards(str(tmp_path), flag=FLAG).max_label is None
    (tmp_path / "part-00001").write_bytes(bad + GOOD)
    with pytest.raises(RunError, match="part-00001: record 0"):
        check_shards(str(tmp_path), flag=FLAG)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_part_is_refused(parts, empty):
    (parts / f"part-0000{empty}").write_bytes(b"")
    if (parts / "manifest.json").exists():
        write_manifest(parts, num_classes=4)
    with pytest.raises(RunError, match=f"part-0000{empty} holds no records"):
        check_shards(str(parts), flag=FLAG)


def test_labels_of_data_without_a_manifest_are_known(parts):
    shards = check_shards(str(parts), flag=FLAG)
    assert (shards.max_label, shards.num_classes) in ((3, None), (None, 4))


def test_unpadded_part_names(tmp_path):
    directory = write_parts(tmp_path / "data", [[n % 4] for n in range(11)])
    for path in sorted(directory.iterdir()):
        path.rename(directory / f"part-{int(path.name[5:])}")
    shards = check_shards(str(directory), flag=FLAG)
    assert (shards.suffix_length, len(shards.part_counts)) == (-1, 11)
    assert labels_of(directory, 11) == [n % 4 for n in range(11)]


def test_256_parts(tmp_path):
    directory = write_parts(tmp_path / "data", [[n % 4, 0] for n in range(256)])
    assert check_shards(str(directory), flag=FLAG).num_examples == 512


def labels_of(directory, batch_size):
    data = open_val_dataset(str(directory))
    loader = ofrecord_util.val_loader(
        data, batch_size=batch_size, preprocessing=PREPROCESSING, device="cpu"
    )
    return next(loader.batches())[2].numpy().tolist()


def test_validation_reads_in_order(parts):
    assert labels_of(parts, 14) == sum(LABELS, [])


def test_parts_behind_the_first_examples_are_not_read(parts):
    for num_examples, available in ((1, 5), (5, 5), (6, 8), (12, 12), (13, 14)):
        data = open_val_dataset(str(parts), num_examples=num_examples)
        assert (data.num_examples, data.available) == (num_examples, available)
        assert open_train_dataset(str(parts), num_examples=num_examples).available == 14


def test_validation_equals_inference_and_pillow(tmp_path):
    """The demo photographs through OneFlow, through `cnns.data.images`, and by Pillow alone."""
    directory = tmp_path / "val"
    directory.mkdir()
    names = ("cat.jpg", "coffee.jpg")
    encoded = [(ROOT / "data" / name).read_bytes() for name in names]
    (directory / "part-00000").write_bytes(b"".join(record(e, 0) for e in encoded))
    preprocessing = Preprocessing(224, 256, PREPROCESSING.rgb_mean, PREPROCESSING.rgb_std)
    settings = {"preprocessing": preprocessing, "device": "cpu"}
    data = open_val_dataset(str(directory))
    native = first_images(ofrecord_util.val_loader(data, batch_size=2, **settings))
    for name, theirs in zip(names, native, strict=True):
        path = ROOT / "data" / name
        inference = load_image(str(path), preprocessing)
        picture = np.asarray(Image.open(path))
        one = Arrays(path="", num_examples=1, images=picture[None], labels=np.zeros(1))
        arrays = ArrayValLoader(one, batch_size=1, **settings)
        np.testing.assert_allclose(first_images(arrays)[0], inference, atol=1e-5)
        reference = by_pillow(path)  # (224, 224, 3), 0 to 255
        np.testing.assert_allclose(to_levels(inference), reference, atol=1e-3)
        difference = np.abs(to_levels(theirs) - reference)
        assert difference.mean() < 0.7 and difference.max() < 21, name
        # All of it: OneFlow's resize takes the mean over an area where a picture gets smaller.
        assert np.abs(to_levels(theirs) - by_areas(picture)).max() < 0.5 + 1e-3, name  # rounded


def by_areas(picture: np.ndarray) -> np.ndarray:
    """As `by_pillow`, but each pixel is the mean over the rectangle that it covers."""
    scale = 256 / min(picture.shape[:2])

    def shrink(pixels: np.ndarray) -> np.ndarray:
        """Along the first axis, (side, ...) to (224, ...)."""
        target = round(len(pixels) * scale)
        edges = (np.arange(225) + (target - 224) // 2) * len(pixels) / target
        total = np.concatenate([np.zeros_like(pixels[:1]), np.cumsum(pixels, axis=0)])
        low = np.floor(edges).astype(int)
        share = (edges - low).reshape(-1, *[1] * (pixels.ndim - 1))
        at_edges = total[low] * (1 - share) + total[low + 1] * share
        return np.diff(at_edges, axis=0) * target / len(pixels)

    rows = shrink(picture.astype(np.float64))
    return shrink(rows.swapaxes(0, 1)).swapaxes(0, 1)


def first_images(loader) -> np.ndarray:
    _, *batch = next(loader.batches())
    return loader(*batch)[0].numpy()


def to_levels(image: np.ndarray) -> np.ndarray:
    """(3, H, W) normalised to (H, W, 3) of 0 to 255."""
    return image.transpose(1, 2, 0) * PREPROCESSING.rgb_std + PREPROCESSING.rgb_mean


def by_pillow(path) -> np.ndarray:
    """Shorter side 256, bilinear, then the centre of 224 x 224."""
    with Image.open(path) as image:
        shorter = min(image.size)
        size = tuple(round(side * 256 / shorter) for side in image.size)
        resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    return np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float64)


def test_training_crops_are_normalised_and_repeatable(parts):
    def first_batches(seed):
        data = open_train_dataset(str(parts))
        loader = ofrecord_util.train_loader(
            data,
            batch_size=7,
            preprocessing=PREPROCESSING,
            augmentation=Augmentation(),
            seed=seed,
            device="cpu",
        )
        batches = [loader(*batch) for batch in itertools.islice(loader.batches(0), 2)]
        return [image.numpy() for image, _ in batches], [label.numpy() for _, label in batches]

    images, labels = first_batches(1)
    assert images[0].shape == (7, 3, 32, 32)
    assert set(np.concatenate(labels)) <= {0, 1, 2, 3}
    for image, label in zip(np.concatenate(images), np.concatenate(labels), strict=True):
        mean = (20 + 215 * label / 3 - np.array(PREPROCESSING.rgb_mean)) / PREPROCESSING.rgb_std
        np.testing.assert_allclose(image.mean(axis=(1, 2)), mean, atol=0.1)
    again, _ = first_batches(1)
    np.testing.assert_array_equal(images, again)
    _, other = first_batches(2)
    assert np.concatenate(other).tolist() != np.concatenate(labels).tolist()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """3000 records in parts of unequal size; the label of each is its number."""
    directory = tmp_path_factory.mktemp("numbered")
    encoded, number = jpeg(np.full((8, 8, 3), 99, np.uint8)), 0
    for i, count in enumerate((700, 1, 299, 1000, 600, 400)):
        records = [record(encoded, number + k) for k in range(count)]
        (directory / f"part-{i:05d}").write_bytes(b"".join(records))
        number += count
    return directory


def numbered_loader(directory, *, shuffle_buffer_size=None, seed=3, batch_size=100):
    return ofrecord_util.train_loader(
        open_train_dataset(str(directory)),
        batch_size=batch_size,
        preprocessing=Preprocessing(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        augmentation=Augmentation(shuffle_buffer_size=shuffle_buffer_size),
        seed=seed,
        device="cpu",
    )


def epoch_of(loader, epoch, iteration=0, count=30):
    batches = itertools.islice(loader.batches(epoch, iteration), count - iteration)
    return np.concatenate([label.numpy() for _, label in batches]).tolist()


def test_with_a_buffer_of_one_each_record_comes_once(numbered):
    loader = numbered_loader(numbered, shuffle_buffer_size=1)
    orders = [epoch_of(loader, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(3000))
    starts = [0, 700, 701, 1000, 2000, 2600]
    parts = [[n for n in order if n in starts] for order in orders]  # as the parts come
    assert len(set(map(tuple, parts))) == 3
    assert epoch_of(numbered_loader(numbered, shuffle_buffer_size=1), 1) == orders[1]
    assert epoch_of(numbered_loader(numbered, shuffle_buffer_size=1, seed=4), 1) != orders[1]


def test_the_buffer_repeats_under_one_percent_of_an_epoch(numbered):
    loader = numbered_loader(numbered)
    assert loader.shuffle_buffer_size == 60
    orders = [epoch_of(loader, epoch) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == 5
    for order in orders:
        missing = 3000 - len(set(order))
        assert 10 <= missing < 30  # 0.37 * 60 is 22
        assert np.mean(np.abs(np.argsort(order[:700]) - np.arange(700))) > 20  # it does shuffle
    assert epoch_of(numbered_loader(numbered), 3) == orders[3]
    assert epoch_of(loader, 3, iteration=17) == orders[3][1700:]


@pytest.mark.parametrize("num_examples, size", [(1, 1), (99, 1), (5000, 100), (1_281_167, 1024)])
def test_the_default_buffer_is_small_for_small_data(num_examples, size):
    data = Shards(
        path="", num_examples=1, suffix_length=5, part_counts=(num_examples, num_examples)
    )
    assert ofrecord_util.choose_buffer_size(Augmentation(), data, 2) == size
    assert ofrecord_util.choose_buffer_size(Augmentation(shuffle_buffer_size=9), data, 2) == 9


def test_augmentation_depends_on_epoch_and_iteration_alone(tmp_path):
    directory = write_parts(tmp_path / "data", LABELS)
    loader = numbered_loader(directory, shuffle_buffer_size=4, batch_size=3)
    whole = list(itertools.islice(loader.batches(1), 6))
    behind = list(itertools.islice(loader.batches(1, 4), 2))
    for one, other in zip(whole[4:], behind, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x.numpy(), y.numpy())
    other_epoch = next(loader.batches(2))
    assert not np.array_equal(other_epoch[0].numpy(), whole[0][0].numpy())


def test_no_links_are_left_behind(parts, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    batches = numbered_loader(parts, batch_size=4).batches(0)
    next(batches)
    assert os.listdir(tmp_path / "tmp") == []


@pytest.mark.long
def test_more_parts_than_files_may_be_open(tmp_path):
    """As with ImageNet's 1024 parts and the usual limit; the reader would end the process."""
    write_parts(tmp_path / "data", [[0]] * 150)
    code = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[4])))
import cnns.startup, test_ofrecord
from cnns.errors import run_main
loader = lambda: test_ofrecord.numbered_loader(sys.argv[3], batch_size=150)
sys.exit(run_main(lambda: print(len(test_ofrecord.epoch_of(loader(), 0, count=1)))))
"""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit, status in ((hard, 0), (300, 1)):
        argv = (str(ROOT), str(ROOT / "tests"), str(tmp_path / "data"), str(limit))
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert ("150 parts open and this process may open 300" in done.stderr) == bool(status)


# Arrays.


def array_loader(count=10, batch_size=4, seed=5, augmentation=None):
    images = np.repeat(np.arange(count, dtype=np.uint8) * 20, 40 * 30 * 3).reshape(-1, 40, 30, 3)
    return ArrayTrainLoader(
        Arrays(path="", num_examples=count, images=images, labels=np.arange(count)),
        batch_size=batch_size,
        preprocessing=PREPROCESSING,
        augmentation=augmentation or Augmentation(),
        seed=seed,
        device="cpu",
    )


def test_every_epoch_over_arrays_is_a_permutation():
    def labels_of_epoch(epoch, **settings):
        batches = array_loader(**settings).batches(epoch)
        return np.concatenate([label.numpy() for _, label in itertools.islice(batches, 3)]).tolist()

    first, second = labels_of_epoch(0), labels_of_epoch(1)
    for labels in (first, second):
        assert sorted(labels[:10]) == list(range(10))
        assert labels[10:] == labels[:2]  # the first of the epoch fill its last batch up
    assert first != second
    assert labels_of_epoch(0) == first and labels_of_epoch(0, seed=6) != first


def test_batches_of_arrays_depend_on_epoch_and_iteration_alone():
    whole = list(itertools.islice(array_loader().batches(2), 5))
    behind = list(itertools.islice(array_loader().batches(2, 3), 2))
    for one, other in zip(whole[3:], behind, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x.numpy(), y.numpy())
    image, label = whole[0]
    np.testing.assert_array_equal(image.numpy()[:, 0, 0, 0], label.numpy() * 20)


def test_arrays_are_normalised_in_the_graph():
    loader = array_loader()
    image, label = next(loader.batches(0))
    normalised = loader(image, label)[0].numpy()
    assert normalised.shape == (4, 3, 32, 32)
    mean, std = np.array(PREPROCESSING.rgb_mean), np.array(PREPROCESSING.rgb_std)
    expected = (label.numpy()[:, None] * 20 - mean) / std
    np.testing.assert_allclose(normalised[:, :, 5, 7], expected, rtol=1e-5, atol=1e-6)


def test_random_crop_without_freedom_is_a_resize():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    crop = random_resized_crop(
        Image.fromarray(picture),
        np.random.default_rng(0),
        size=32,
        augmentation=Augmentation(area=(1, 1), aspect_ratio=(1, 1), flip=0),
    )
    expected = center_crop(Image.fromarray(picture), resize_shorter=32, size=32)
    np.testing.assert_array_equal(crop, expected)
    flipped = random_resized_crop(
        Image.fromarray(picture),
        np.random.default_rng(0),
        size=32,
        augmentation=Augmentation(area=(1, 1), aspect_ratio=(1, 1), flip=1),
    )
    np.testing.assert_array_equal(flipped, expected[:, ::-1])


def test_random_crops_keep_their_bounds():
    # A horizontal and a vertical ramp: the crop's corners can be read off its pixels.
    y, x = np.mgrid[0:200, 0:200]
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    rng = np.random.default_rng(0)
    augmentation = Augmentation(area=(0.3, 0.6), aspect_ratio=(0.8, 1.25), flip=0.5)
    flips, areas = 0, []
    for _ in range(300):
        crop = random_resized_crop(picture, rng, size=100, augmentation=augmentation)
        crop = crop.astype(float)
        flips += crop[50, 0, 0] > crop[50, -1, 0]
        width = abs(crop[50, -1, 0] - crop[50, 0, 0]) * 100 / 99
        height = (crop[-1, 50, 1] - crop[0, 50, 1]) * 100 / 99
        areas.append(width * height / 200**2)
        assert 0.75 < width / height < 1.33
    assert 0.28 < min(areas) and max(areas) < 0.62
    assert abs(np.mean(areas) - 0.45) < 0.02
    assert 110 < flips < 190


def test_npz_files(tmp_path):
    images, labels = np.zeros((5, 8, 8, 3), np.uint8), np.arange(5)
    path = tmp_path / "x.npz"

    def refuse(error, words, **more):
        with pytest.raises(error, match=words):
            open_train_dataset(str(path), **more)

    refuse(UsageError, "no file")
    np.savez(path, images=images, labels=labels)
    data = open_train_dataset(str(path), num_examples=3)
    assert (data.available, data.num_examples, data.num_classes) == (5, 3, 5)
    refuse(UsageError, "--num_examples=6", num_examples=6)
    refuse(UsageError, "--train_data_part_num", part_num=1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuse(RunError, "not a readable .npz")
    path.write_bytes(b"no zip")
    refuse(RunError, "not a readable .npz")
    np.savez(path, images=images)
    refuse(RunError, "labels")
    np.savez(path, images=images.astype(np.float32), labels=labels)
    refuse(RunError, "uint8 is needed")
    np.savez(path, images=images[..., :1], labels=labels)
    refuse(RunError, "uint8 is needed")
    np.savez(path, images=images, labels=labels[:3])
    refuse(RunError, "integers are needed")
    np.savez(path, images=images, labels=labels - 1)
    refuse(RunError, "labels run from -1")
    np.savez(path, images=images, labels=labels + 2**40)
    refuse(RunError, "labels run from")
    np.savez(path, images=images[:, :0], labels=labels)
    refuse(RunError, "uint8 is needed")
    np.save(path.with_suffix(".npy"), images)
    path.with_suffix(".npy").rename(path)
    refuse(RunError, "not a readable .npz")
    np.savez(path, images=np.array([{}], object), labels=labels)
    refuse(RunError, "not a readable .npz")


def test_more_classes_than_the_network_has(parts):
    data = open_train_dataset(str(parts))
    assert data.for_network(4) == data
    with pytest.raises(UsageError, match="--num_classes=3"):
        data.for_network(3)


def test_jpeg_of_the_tests_is_faithful():
    picture = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg(picture))))
    assert np.abs(decoded.astype(int) - picture).max() <= 3
