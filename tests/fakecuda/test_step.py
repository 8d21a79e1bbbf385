"""What a training step has the host copy, wait for and allocate, on one device and on two.

Two runs are compared that differ in their number of steps alone: what only they do more of belongs
to a step, and not to the start, a printed line or the end.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import fake
import jobs
import small
from small import ROOT

pytestmark = pytest.mark.usefixtures("device")

BATCH_SIZE = 3  # of each device
SIZE = 32  # pixels
STEPS = (6, 12)
MORE = STEPS[1] - STEPS[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    each = BATCH_SIZE * max(STEPS)
    return small.write_sets(root, {"train": (each, each), "validation": (2, 2)}, num_classes=4)


def start(data: Path, *flags: str, devices: int, steps: int, cwd: Path) -> subprocess.Popen:
    cwd.mkdir()
    command = [
        sys.executable,
        str(ROOT / "tests" / "train_small.py"),
        "--device=cuda",
        "--model=toy",
        "--num_classes=4",
        f"--image_size={SIZE}",
        f"--train_data_dir={data / 'train'}",
        f"--val_data_dir={data / 'validation'}",
        f"--batch_size_per_device={BATCH_SIZE}",
        f"--num_examples={steps * BATCH_SIZE * devices}",
        f"--gpu_num_per_node={devices}",
        "--num_epochs=1",
        "--loss_print_every_n_iter=1000",
        "--model_save_dir=run",
        *flags,
    ]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=fake.environment(devices=devices, log=cwd / "log.%d"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_logs(process: subprocess.Popen, cwd: Path) -> list[jobs.Log]:
    """The logs of the ranks, in their order; the parent's has nothing in it."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (out, errors)
    logs = [jobs.read_log(path) for path in cwd.glob("log.*")]
    assert all(log.faults == [] for log in logs)
    return sorted((log for log in logs if log.devices), key=lambda log: log.rank or 0)


@pytest.mark.parametrize(("devices", "flags"), [(1, ()), (2, ("--use_fp16",))])
def test_a_step_has_no_wait_no_allocation_and_no_copy_that_is_not_needed(
    data, tmp_path, devices, flags
):
    runs = [
        start(data, *flags, devices=devices, steps=steps, cwd=tmp_path / f"{steps}")
        for steps in STEPS
    ]
    few, many = (
        read_logs(run, tmp_path / f"{steps}") for run, steps in zip(runs, STEPS, strict=True)
    )
    assert len(few) == len(many) == devices
    image, label = BATCH_SIZE * 3 * SIZE * SIZE * 4, BATCH_SIZE * 4
    for rank, (short, long) in enumerate(zip(few, many, strict=True)):
        # OneFlow's pollers, threads of their own, wait for events; the thread of the script never.
        assert set(long.waits - short.waits) == {("event", "other")}
        assert long.allocations == short.allocations

        # The learning rate; with several devices the number of them, by which a sum is divided;
        # in half precision the loss scale and its inverse.
        scalars = 1 + (devices > 1) + 2 * bool(flags)
        assert per_step(long, short, "HD") == {image: 1, label: 1, 4: scalars}
        # The batch once more: a graph copies what it is given.
        device = per_step(long, short, "DD")
        assert device[image] == device[label] == 1 and max(device) == image
        # The loss of an earlier step, and when the line is printed each step's loss and counts;
        # with several devices one more sum, and in half precision the first rank alone reads how
        # many gradients were not finite.
        counts = 3 + (devices > 1) + (bool(flags) and rank == 0)
        assert per_step(long, short, "DH") == {4: 2, 8: counts}


def per_step(long: jobs.Log, short: jobs.Log, direction: str) -> dict[int, float]:
    """Bytes of a copy -> how often in a step."""
    more = long.copied(direction) - short.copied(direction)
    return {size: count / MORE for size, count in more.items()}
