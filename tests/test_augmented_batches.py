"""Augmented batches: a function of seed, epoch and position; and how often each record comes."""

import itertools

import numpy as np
import pytest

import config
import model_registry
import of_cnn_evaluate
import of_cnn_train_val
import ofrecord_util
from cnns.data.augment import erased_box
from cnns.data.crops import Augmentation
from cnns.data.datasets import open_train_dataset
from cnns.data.images import Preprocessing
from cnns.data.kinds import Arrays
from cnns.data.order import RecordOrder, balanced_order
from cnns.errors import UsageError
from of_cnn_train_val import make_spec, parse_args
from small import MODELS, call, validation_figures, write_sets
from tools import browse

pytestmark = pytest.mark.long

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)
SIZE, SEED, BATCH_SIZE = 24, 3, 8
PREPROCESSING = Preprocessing(SIZE, SIZE, MEAN, STD)
SETTINGS = {
    "randaugment": {"auto_augment": "randaugment"},
    "trivialaugment_wide": {"auto_augment": "trivialaugment_wide"},
    "timm": {"auto_augment": "rand-m7-mstd0.5-inc1", "interpolation": "random"},
    "jitter": {"color_jitter": (0.4, 0.4, 0.4, 0.1)},
    "erasing": {"random_erasing": 0.5},
    "bicubic": {"interpolation": "bicubic"},
    "repeats": {"repeats": 3},
    "balanced": {"balanced": True},
}
SETTINGS["all"] = {key: value for each in SETTINGS.values() for key, value in each.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("data"), {"train": (13, 9, 7)}, num_classes=4)


def make_loader(data, suffix="", **settings):
    return ofrecord_util.train_loader(
        open_train_dataset(f"{data / 'train'}{suffix}"),
        batch_size=BATCH_SIZE,
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(**settings),
        seed=SEED,
        device="cpu",
        data_order="global",
    )


def images_of(loader, epoch, iteration=0, *, end):
    """Normalised images of the batches from `iteration` to `end`, and their labels."""
    batches = itertools.islice(loader.batches(epoch, iteration), end - iteration)
    made = [loader(*batch) for batch in batches]
    images, labels = zip(*([x.numpy() for x in pair] for pair in made), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_batches_depend_on_epoch_and_iteration_alone(data, name, suffix):
    images, labels = images_of(make_loader(data, suffix, **SETTINGS[name]), 1, end=4)
    for iteration in (1, 3):
        found, numbers = images_of(make_loader(data, suffix, **SETTINGS[name]), 1, iteration, end=4)
        np.testing.assert_array_equal(found, images[iteration * BATCH_SIZE :])
        np.testing.assert_array_equal(numbers, labels[iteration * BATCH_SIZE :])
    plain, _ = images_of(make_loader(data, suffix), 1, end=4)
    assert not np.array_equal(plain, images)
    other, _ = images_of(make_loader(data, suffix, **SETTINGS[name]), 2, end=4)
    assert not np.array_equal(other, images)


def test_what_is_erased_is_the_mean(data):
    """As torchvision, which erases after normalising; all else is as without."""
    plain, _ = images_of(make_loader(data, ".npz"), 0, end=3)
    images, _ = images_of(make_loader(data, ".npz", random_erasing=0.5), 0, end=3)
    erased = 0
    for position, (image, own) in enumerate(zip(images, plain, strict=True)):
        rng = np.random.default_rng((SEED, 1, 0, position))
        make_loader(data, ".npz").crop(picture_at(data, position), rng)
        box = erased_box(rng, size=SIZE, probability=0.5)
        top, bottom, left, right = box.astype(int)
        expected = own.copy()
        expected[:, top:bottom, left:right] = 0
        np.testing.assert_array_equal(image, expected)
        erased += bottom > top
    assert 5 < erased < 19


def picture_at(data, position):
    loader = make_loader(data, ".npz")
    (number,) = loader.record_order.at(0, np.array([position]))
    with loader.source.open(int(number)) as (picture, _):
        return picture


def test_repeated_augmentation():
    order = RecordOrder(num_records=40, batch_size=12, seed=1, repeats=3)
    epoch = order.at(0, np.arange(48)).reshape(4, 12)
    plain = RecordOrder(num_records=40, batch_size=12, seed=1).at(0, np.arange(16))
    for batch, expected in zip(epoch, plain.reshape(4, 4), strict=True):
        # Each of 4 records three times, and mixed with another record.
        assert sorted(batch) == sorted([*expected] * 3)
        assert (batch[0::2] != batch[1::2]).all()
    # Where the batch is not a multiple, a record is carried over to the next batch.
    order = RecordOrder(num_records=40, batch_size=8, seed=1, repeats=3)
    epoch = order.at(0, np.arange(40)).reshape(5, 8)
    numbers, counts = np.unique(epoch, return_counts=True)
    assert len(numbers) == 14 and sorted(counts)[1:] == [3] * 13
    assert (epoch[:, 0::2] != epoch[:, 1::2]).all()


def test_copies_are_augmented_anew(data):
    images, labels = images_of(make_loader(data, ".npz", repeats=4), 0, end=1)
    assert len({image.tobytes() for image in images}) == 8
    order = make_loader(data, ".npz", repeats=4).record_order
    assert len(set(order.at(0, np.arange(8)).tolist())) == 2


@pytest.mark.parametrize("counts", [(100, 10, 3, 1), (5, 0, 5), (7,), (2, 3, 0, 0, 1)])
def test_balanced_order(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(0).shuffle(labels)
    present = np.flatnonzero(counts)
    orders = [balanced_order(labels, 5, epoch) for epoch in range(4)]
    for order in orders:
        assert len(order) == len(labels)
        drawn = np.bincount(labels[order], minlength=len(counts))[present]
        assert drawn.max() - drawn.min() <= 1 and drawn.sum() == len(labels)
        times = np.bincount(order, minlength=len(labels))
        for label in present:  # none comes twice as long as another of its class has not come
            own = times[labels == label]
            assert own.max() - own.min() <= 1
    np.testing.assert_array_equal(balanced_order(labels, 5, 2), orders[2])
    if len(labels) > 10:
        assert len({tuple(order) for order in orders}) == 4


def test_a_balanced_epoch_of_records_and_of_arrays(data):
    for suffix in ("", ".npz"):
        loader = make_loader(data, suffix, balanced=True)
        _, labels = images_of(loader, 0, end=4)
        counts = np.bincount(labels[:29])
        assert sorted(counts) == [7, 7, 7, 8]
        np.testing.assert_array_equal(
            loader.source.labels[loader.record_order.at(0, np.arange(32))], labels
        )


def test_two_sets_of_labels_do_not_share_an_order():
    one, other = np.arange(30) % 3, np.arange(30) // 20
    orders = [RecordOrder(30, 8, 1, labels=labels) for labels in (one, other)]
    found = [order.at(0, np.arange(30)) for order in orders]
    assert not np.array_equal(*found)
    for epoch in (3, 0, 7, 3):  # some are kept
        np.testing.assert_array_equal(
            orders[0].at(epoch, np.arange(30)), balanced_order(one, 1, epoch)
        )


def finished(*flags):
    args = config.make_parser("train").complete(parse_args(["--device=cpu", *flags]))
    return args, config.finish_train_args(args, device="cpu")


GIVEN = [
    "--auto_augment=randaugment",
    "--auto_augment=rand-m7-mstd0.5-inc1",
    "--train_interpolation=random",
    "--color_jitter=0.4,0.4,0.4,0.1",
    "--random_erasing=0.1",
    "--repeated_augmentation=3",
    "--interpolation=bilinear",
]


@pytest.mark.parametrize("flag", GIVEN)
def test_parts_come_from_the_loader_that_can_do_it(data, flag):
    args, notices = finished(f"--train_data_dir={data / 'train'}", flag)
    assert args.data_order == "global"
    assert any("--data_order=global" in text and flag.split("=")[0] in text for text in notices)
    args, notices = finished(f"--train_data_dir={data / 'train.npz'}", flag)
    assert args.data_order == "native" and not any("data_order" in text for text in notices)
    with pytest.raises(UsageError, match="synthetic"):
        finished(flag)
    for other in ("--shuffle_buffer_size=4", "--gpu_image_decoder"):
        with pytest.raises(UsageError, match="--data_order=global|needs CUDA"):
            finished(f"--train_data_dir={data / 'train'}", flag, other)


def test_parts_come_from_oneflow_otherwise(data):
    args, _ = finished(f"--train_data_dir={data / 'train'}")
    assert args.data_order == "native"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--color_jitter=0.4"], "4 numbers"),
        (["--color_jitter=0.4,0.4,0.4,0.6"], "hue"),
        (["--randaugment_magnitude=9"], "belongs to --auto_augment=randaugment"),
        (["--auto_augment=randaugment", "--randaugment_magnitude=31"], "at most 30"),
        (["--auto_augment=autoaugment"], "invalid choice"),
        (["--auto_augment=rand-m7-x3"], "'rand-m7-x3': 'x3' is not supported; after rand come m0"),
        (["--auto_augment=rand-m7", "--randaugment_magnitude=7"], "belongs to --auto_augment=rand"),
        (["--random_erasing=1.5"], "at most 1"),
        (["--train_size_stages=3"], "--train_size_stages needs --first_train_image_size"),
        (["--first_train_image_size=24", "--train_size_stages=1"], "at least 2"),
    ],
)
def test_flags_that_are_refused(data, flags, words):
    with pytest.raises(UsageError, match=words):
        finished(f"--train_data_dir={data / 'train'}", *flags)


def test_what_timms_operations_leave_empty_has_the_mean_colour(data):
    """Of the normalisation, rounded, as in timm."""
    loader = make_loader(data, ".npz", auto_augment="rand-m10-p1-n1", area=(1.0, 1.0), flip=0.0)
    rows = [loader.make_row(0, position) for position in range(29)]
    mean = np.array(MEAN).astype(np.uint8)
    corners = np.array(
        [image[row, column] for image, _ in rows for row in (0, -1) for column in (0, -1)]
    )
    assert loader.mean_colour == (120, 110, 100)
    assert (corners == mean).all(1).sum() >= 5 and not (corners == 0).all(1).any()


def test_the_interpolation_is_kept_with_the_network(data):
    spec = make_spec(
        parse_args(
            ["--device=cpu", f"--train_data_dir={data / 'train'}", "--interpolation=bicubic"]
            + ["--batch_size_per_device=4", "--model=resnet18"]
        )
    )
    assert spec.about.preprocessing.interpolation == "bicubic"


def test_training_on_smaller_images_than_are_evaluated(data, tmp_path, monkeypatch):
    """Both sizes are those asked for, and a snapshot is of the larger one."""
    monkeypatch.setitem(model_registry.MODELS, "tiny", MODELS["tiny"])
    val = f"--val_data_dir={data / 'train.npz'}"
    flags = ["--device=cpu", "--model=tiny", f"--train_data_dir={data / 'train.npz'}", val]
    flags += ["--batch_size_per_device=8"]
    flags += ["--num_epochs=1", "--mixup_alpha=0.2", "--random_erasing=0.5", "--image_size=40"]
    flags += ["--train_image_size=24", f"--model_save_dir={tmp_path / 'run'}"]
    seen = []
    forward = MODELS["tiny"].network.forward

    def look(self, image):
        seen.append(tuple(image.shape))
        return forward(self, image)

    monkeypatch.setattr(MODELS["tiny"].network, "forward", look)
    done = call(of_cnn_train_val.main, *flags)
    assert done.status in (0, None), done.stderr
    assert {(8, 3, 24, 24), (50, 3, 40, 40)} == set(seen)
    last = f"--model_load_dir={tmp_path / 'run' / 'snapshot_last'}"
    scored = call(of_cnn_evaluate.main, "--device=cpu", last, val)
    assert validation_figures(scored.stdout) == validation_figures(done.stdout)
    assert seen[-1] == (50, 3, 40, 40)
    with pytest.raises(UsageError, match="--train_image_size=24 is too small"):
        make_spec(parse_args([flags[0], "--model=inceptionv3", *flags[2:], "--image_size=96"]))
    for first in (24, 32):
        with pytest.raises(UsageError, match=f"--first_train_image_size={first} must be less than"):
            make_spec(parse_args([*flags, "--num_epochs=2", f"--first_train_image_size={first}"]))
    with pytest.raises(UsageError, match="--first_train_image_size needs two epochs"):
        make_spec(parse_args([*flags, "--first_train_image_size=16"]))
    with pytest.raises(UsageError, match="--first_train_image_size has no effect on synthetic"):
        finished("--first_train_image_size=24")


def test_it_can_be_looked_at(data, tmp_path):
    done = call(
        browse.main,
        str(data / "train"),
        "--image_size=32",
        "--num=8",
        "--auto_augment=trivialaugment_wide",
        "--random_erasing=1",
        f"--output={tmp_path / 'sheet.png'}",
    )
    assert done.status in (0, None), done.stderr
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_arrays_need_labels_of_their_own():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    arrays = Arrays(path="", num_examples=6, images=images, labels=np.array([0, 0, 0, 0, 1, 2]))
    loader = ofrecord_util.train_loader(
        arrays,
        batch_size=6,
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(balanced=True),
        seed=0,
        device="cpu",
    )
    _, labels = images_of(loader, 0, end=1)
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
