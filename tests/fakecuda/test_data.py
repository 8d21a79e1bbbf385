"""Training and validation data on their way to CUDA, and what comes back in a step."""

import re

import pytest

import fake
import jobs
import small
from cnns.log import RUN_AHEAD

pytestmark = pytest.mark.usefixtures("device")

NUM_CLASSES = 4
BATCH_SIZE = 3
SIZE = 32  # pixels
STEPS = (4, 8)  # of two runs that differ in nothing else
VALIDATION = 5  # images
COPY = re.compile(r"^COPY (HD|DH) (\d+)", re.MULTILINE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    parts = {"train": (BATCH_SIZE * max(STEPS),), "validation": (VALIDATION,)}
    return small.write_sets(root, parts, num_classes=NUM_CLASSES)


def train(data, suffix, *more, cwd, steps) -> jobs.Session:
    cwd.mkdir()
    return jobs.Session(
        (
            "train",
            "--device=cuda",
            "--model=toy",
            f"--num_classes={NUM_CLASSES}",
            f"--image_size={SIZE}",
            f"--train_data_dir={data / 'train'}{suffix}",
            f"--val_data_dir={data / 'validation'}{suffix}",
            f"--batch_size_per_device={BATCH_SIZE}",
            f"--val_batch_size_per_device={BATCH_SIZE}",
            f"--num_examples={steps * BATCH_SIZE}",
            "--num_epochs=1",
            "--loss_print_every_n_iter=1000",
            "--model_save_dir=run",
            *more,
        ),
        env=fake.environment(log=cwd / "device.log"),
        cwd=cwd,
    )


def check(session: jobs.Session, *, steps: int) -> jobs.Done:
    (done,) = session.finish()
    assert done.status in (0, None), done.stderr
    found = re.findall(r"^(?:train|validation): epoch 0, iter \d+", done.stdout, re.MULTILINE)
    batches = -(-VALIDATION // BATCH_SIZE)
    assert found == [f"train: epoch 0, iter {steps}", f"validation: epoch 0, iter {batches}"]
    return done


@pytest.mark.parametrize("suffix, use_fp16", [("", False), (".npz", True)])
def test_a_step_copies_its_batch_and_scalars(data, tmp_path, suffix, use_fp16):
    """Parts are decoded and normalised on the host, arrays go over as bytes.

    A step reads one scalar of an earlier step, which keeps the host from running ahead. What is
    printed is read when it is printed.
    """
    flags = ("--use_fp16",) if use_fp16 else ()
    sessions = [
        train(data, suffix, *flags, cwd=tmp_path / f"{steps}", steps=steps) for steps in STEPS
    ]
    for session, steps in zip(sessions, STEPS, strict=True):
        check(session, steps=steps)
    few, many = (jobs.read_log(tmp_path / f"{steps}" / "device.log") for steps in STEPS)
    assert few.faults == many.faults == []
    more = STEPS[1] - STEPS[0]
    image = BATCH_SIZE * 3 * SIZE * SIZE * (1 if suffix else 4)
    label = BATCH_SIZE * 4

    to_device = many.copied("HD") - few.copied("HD")
    assert to_device.pop(image) == to_device.pop(label) == more
    # The learning rate; in half precision the loss scale and its inverse as well.
    assert to_device == {4: (3 if use_fp16 else 1) * more}

    # The loss and three counts, when the line is printed, and the loss of an earlier step; in half
    # precision how many gradients were not finite, too.
    from_device = many.copied("DH") - few.copied("DH")
    assert from_device == {4: 2 * more, 8: (4 if use_fp16 else 3) * more}

    text = (tmp_path / f"{STEPS[1]}" / "device.log").read_text()
    copies = [(way, int(size)) for way, size in COPY.findall(text)]
    batches = [i for i, copy in enumerate(copies) if copy == ("HD", image)][: STEPS[1]]
    # The last batches may still be on their way when the line is printed.
    before_printing = copies[: batches[-1 - RUN_AHEAD]]
    assert before_printing.count(("DH", 8)) <= (STEPS[1] if use_fp16 else 0)


def test_images_are_decoded_on_the_device(data, tmp_path):
    session = train(data, "", "--gpu_image_decoder", cwd=tmp_path / "run", steps=STEPS[0])
    check(session, steps=STEPS[0])
    assert jobs.read_log(tmp_path / "run" / "device.log").faults == []


@pytest.mark.parametrize("suffix, more", [("", ()), (".npz", ()), ("", ("--gpu_image_decoder",))])
def test_images_are_mixed_on_the_device(data, tmp_path, suffix, more):
    """A step copies six numbers for each image more, in half precision and channels-last too.

    Of four images, as the labels of two would have the size of a count, and be read as one.
    """
    flags = ("--mixup_alpha=0.2", "--cutmix_alpha=1", "--batch_size_per_device=4")
    flags += ("--num_examples=16", "--model=tiny", "--use_fp16", "--channel_last")
    session = train(data, suffix, *flags, *more, cwd=tmp_path / "run", steps=STEPS[0])
    done = check(session, steps=4)
    # All of it, and the targets, are computed in float32; the image is cast when it is done.
    own = [op for op in done.jobs["TrainGraph"] if not op.name.startswith(("model", "System"))]
    assert any(op.kind == "flip" for op in own)
    assert all(op.kind == "cast" for op in own if "float16" in op.dtypes)
    log = jobs.read_log(tmp_path / "run" / "device.log")
    assert log.faults == []
    assert log.copied("HD")[4 * 6 * 4] == 4


def test_images_are_augmented_on_the_host_and_erased_on_the_device(data, tmp_path):
    """Bytes and a box for each image go over, and they are mixed there as well."""
    flags = ("--auto_augment=trivialaugment_wide", "--random_erasing=0.1", "--mixup_alpha=0.2")
    flags += ("--batch_size_per_device=4", "--num_examples=16")
    flags += ("--model=tiny", "--use_fp16", "--channel_last", "--train_image_size=24")
    flags += ("--class_weights=auto",)
    session = train(data, "", *flags, cwd=tmp_path / "run", steps=STEPS[0])
    check(session, steps=4)
    log = jobs.read_log(tmp_path / "run" / "device.log")
    assert log.faults == []
    copied = log.copied("HD")
    assert copied[4 * 3 * 24 * 24] == copied[4 * 6 * 4] == 4
    assert copied[4 * 4 * 4] >= 4  # some parameters have this size


def test_images_grow_from_stage_to_stage(data, tmp_path):
    """Each size has a graph of its own, which takes over where the one before stood."""
    flags = ("--first_train_image_size=24", "--train_size_stages=2", "--num_epochs=2")
    flags += ("--batch_size_per_device=4", "--num_examples=16", "--optimizer=lamb")
    flags += ("--model=tiny", "--use_fp16", "--channel_last", "--ema_decay=0.99")
    session = train(data, ".npz", *flags, cwd=tmp_path / "run", steps=STEPS[0])
    (done,) = session.finish()
    assert done.status in (0, None), done.stderr
    assert len(re.findall(r"^train: epoch [01], iter 4", done.stdout, re.MULTILINE)) == 2
    log = jobs.read_log(tmp_path / "run" / "device.log")
    assert log.faults == []
    copied = log.copied("HD")
    # With one batch more the graph of the largest size is compiled first, for its memory.
    assert copied[4 * 3 * 24 * 24] == 4 and copied[4 * 3 * SIZE * SIZE] == 1 + 4
