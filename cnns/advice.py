"""What a run tells its user beside its lines: length, disk, overfitting, what comes next."""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from oneflow import nn

from cnns.checkpoint.snapshot import state_tensors
from cnns.checkpoint.training import buffers_of, parameters
from cnns.errors import UsageError
from cnns.inputs import is_within
from cnns.log import Counts, is_first_rank, notice

OUTLOOK_STEPS = 10  # after which the time of a run is told
OVERFITTING_EPOCHS = 3


class Outlook:
    """Says once, after some steps, how long the rest of a run takes."""

    def __init__(self, total_steps: int, *, images_grow: bool = False):
        self.total_steps, self.images_grow = total_steps, images_grow
        self.steps, self.seconds, self.said = 0, 0.0, False

    def add(self, step: int, *, steps: int, seconds: float) -> None:
        """`steps` more have taken `seconds`, and the run is after `step`."""
        self.steps, self.seconds = self.steps + steps, self.seconds + seconds
        left = self.total_steps - step
        if self.said or self.steps < OUTLOOK_STEPS or left <= 0:
            return
        self.said = True
        pace = self.seconds / self.steps
        more = ", and images that grow take longer" if self.images_grow else ""
        notice(
            f"Time left: about {duration(pace * left)}, {pace:.3g} s per iteration; validation and "
            f"snapshots are not counted{more}."
        )


def duration(seconds: float) -> str:
    """A rough time for a person: `40 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


class OverfittingWatch:
    """Says once that validation has fallen for some epochs while training accuracy rose."""

    def __init__(self) -> None:
        self.hits = self.samples = 0  # of the epoch
        self.before: tuple[float, float] | None = None  # training and validation top-1
        self.epochs, self.said = 0, False

    def add(self, counts: Counts) -> None:
        """What the training lines count."""
        self.hits, self.samples = self.hits + counts.top_1, self.samples + counts.samples

    def end_epoch(self, val_top_1: float, *, best_epoch: int) -> None:
        if not self.samples:  # resumed right before validation
            return
        train_top_1 = self.hits / self.samples
        self.hits = self.samples = 0
        apart = self.before is not None and (
            train_top_1 > self.before[0] and val_top_1 < self.before[1]
        )
        self.before, self.epochs = (train_top_1, val_top_1), self.epochs + 1 if apart else 0
        if self.epochs < OVERFITTING_EPOCHS or self.said:
            return
        self.said = True
        notice(
            f"Overfitting: for {OVERFITTING_EPOCHS} epochs validation top_1 has fallen, to "
            f"{val_top_1:.4f}, and training top_1 has risen, to {train_top_1:.4f}. The best is of "
            f"epoch {best_epoch}. More data, a larger --wd, a smaller --random_area or fewer "
            "--num_epochs may help."
        )


def next_steps(snapshot: str, *, val_data: str | None, scripts: str) -> list[str]:
    """The commands for what comes after a run.

    Args:
        snapshot: The one to go on with.
        val_data: Path of the validation data, if there are any.
        scripts: The directory of the scripts.
    """
    python = sys.executable
    if is_within(python, os.getcwd()) or is_within(sys.prefix, os.getcwd()):
        python = os.path.relpath(python)
    flags = [f"--model_load_dir={os.path.normpath(snapshot)}"]
    scored = [f"--val_data_dir={val_data}"] if val_data else []
    steps = {
        "Score it": ["of_cnn_evaluate.py", *flags, *scored],
        "Classify": ["of_cnn_inference.py", *flags, "--image_path", "PHOTO.jpg"],
        "Export it": ["resnet_to_onnx.py", *flags],
        "Deploy it": ["tools/deploy.py", os.path.normpath(snapshot)],
    }
    if not scored:
        del steps["Score it"]
    root = os.path.relpath(scripts)
    return [
        f"{what}: {shlex.join([python, os.path.normpath(os.path.join(root, script)), *more])}"
        for what, (script, *more) in steps.items()
    ]


# Disk.


def snapshot_bytes(model: nn.Module, flags: Mapping[str, object]) -> tuple[int, int]:
    """Bytes of the weights of a snapshot, with their average, and of what else a run needs to
    resume from it."""
    sizes = {
        name: 4 * tensor.numel()  # float32
        for name, tensor in state_tensors(model).items()
    }
    networks = 2 if flags.get("ema_decay") else 1
    return networks * sum(sizes.values()), len(buffers_of(flags)) * sum(
        sizes[n] for n in parameters(sizes)
    )


def check_room(
    model: nn.Module, flags: Mapping[str, Any], *, save_dir: str, validates: bool
) -> None:
    """Raise UsageError where the disk cannot hold the snapshots of a run."""
    weights, state = snapshot_bytes(model, flags)
    count = most_snapshots(
        num_epochs=flags["num_epochs"],
        save_epochs=flags["save_epoch_interval"],
        keep=flags["keep_snapshots"] or None,
        validates=validates,
        saves_last=flags["save_every_n_iter"] is not None,
    )
    save_init = flags["save_init"]
    check_disk(save_dir, count=count, weights=weights, state=state, save_init=save_init)


def most_snapshots(
    *, num_epochs: int, save_epochs: int, keep: int | None, validates: bool, saves_last: bool
) -> int:
    """How many snapshots with different files a run has at once, at most, but for the initial one.

    The next is written before the oldest is removed, and `last` before the one that it replaces.
    """
    of_epochs = math.ceil(num_epochs / save_epochs)
    pruned = keep is not None and keep < of_epochs
    kept = keep + 1 if keep is not None and pruned else of_epochs
    own_best = validates and (pruned or save_epochs > 1)
    return kept + own_best + 2 * saves_last


def check_disk(save_dir: str, *, count: int, weights: int, state: int, save_init: bool) -> None:
    """Say what the snapshots of a run take. Raises UsageError where that does not fit."""
    if not is_first_rank():
        return
    needed = count * (weights + state) + weights * save_init
    free = shutil.disk_usage(save_dir).free
    text = f"up to {size(needed)} in {save_dir} ({count} of {size(weights + state)})"
    if needed > free + held_bytes(save_dir):
        raise UsageError(
            f"--model_save_dir: the snapshots take {text}, and {size(free)} are free; give another "
            "directory, a smaller --keep_snapshots or a larger --save_epoch_interval"
        )
    notice(f"Snapshots: {text}; {size(free)} are free (--keep_snapshots).")


def held_bytes(save_dir: str) -> int:
    """What a directory holds; a file with several names counts once."""
    states = (
        os.lstat(os.path.join(folder, name))
        for folder, _, names in os.walk(save_dir)
        for name in names
    )
    return sum({(state.st_dev, state.st_ino): state.st_size for state in states}.values())


def size(num_bytes: float) -> str:
    """`205 MB`, `1.2 GB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:.3g} {units[0]}"
