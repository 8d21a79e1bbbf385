"""Exact counts, the lines of a run, and notices."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

import numpy as np
from tqdm import tqdm

from cnns import errors
from cnns.errors import RunError, UsageError, printable, say
from cnns.launch.terminal import find_terminal

RUN_AHEAD = 2  # steps; enough for the next to be there when one ends


@dataclass
class Counts:
    """Integer hits over a number of samples; divided once, at the end."""

    top_1: int
    top_k: int
    samples: int
    loss: float | None = None  # mean cross-entropy, where it was computed

    def accuracies(self) -> tuple[float, float]:
        return self.top_1 / self.samples, self.top_k / self.samples

    def as_scores(self, prefix: str = "") -> dict[str, float]:
        top_1, top_k = self.accuracies()
        scores = {f"{prefix}top_1": top_1, f"{prefix}top_k": top_k}
        return scores if self.loss is None else scores | {f"{prefix}loss": self.loss}

    def as_metrics(self) -> dict[str, float | int]:
        """What a snapshot keeps of them."""
        return self.as_scores("val_") | {"num_val_examples": self.samples}

    def as_figures(self, seconds: float) -> dict[str, float | int]:
        """What the record of a run keeps of them."""
        top_1, top_k = self.accuracies()
        rate = round(self.samples / seconds, 3)
        return {
            "top_1": top_1,
            "top_k": top_k,
            "samples": self.samples,
            "samples_per_second": rate,
        }


@dataclass
class Sums:
    """What the next line shows, of the iterations since the last one."""

    steps: int = 0
    loss: float = 0.0
    top_1: int = 0
    top_k: int = 0
    seconds: float = 0.0

    def add(self, losses: list[float], counts: Counts, seconds: float) -> None:
        self.steps += len(losses)
        for loss in losses:  # one after the other: a stop between them does not change the sum
            self.loss += loss
        self.top_1, self.top_k = self.top_1 + counts.top_1, self.top_k + counts.top_k
        self.seconds += seconds

    def counts(self, batch_size: int) -> Counts:
        return Counts(self.top_1, self.top_k, self.steps * batch_size)


def train_line(epoch: int, iteration: int, loss: float, counts: Counts, seconds: float) -> str:
    return f"train: epoch {epoch}, iter {iteration}, loss: {loss:.6f}, {figures(counts, seconds)}"


def validation_line(
    epoch: int, iterations: int, counts: Counts, seconds: float, *, name: str = "validation"
) -> str:
    return f"{name}: epoch {epoch}, iter {iterations}, {figures(counts, seconds)}"


def figures(counts: Counts, seconds: float) -> str:
    top_1, top_k = counts.accuracies()
    rate = counts.samples / seconds
    return f"top_1: {top_1:.6f}, top_k: {top_k:.6f}, samples/s: {rate:.3f}"


def is_first_rank() -> bool:
    """Whether this process is the one that prints and saves."""
    return int(os.environ.get("RANK", "0")) <= 0  # OneFlow sets -1 for a single process


def notice(text: str) -> None:
    """Print a line that is not a result to stderr, in the first process only."""
    if is_first_rank():
        say(text, sys.stderr)


class Bar:
    """The progress bar of a run on a terminal: epoch, loss, rate, time left of epoch and run.

    Elsewhere nothing is drawn.
    """

    def __init__(self, num_epochs: int, steps_per_epoch: int):
        self.num_epochs, self.steps_per_epoch = num_epochs, steps_per_epoch
        self.file = find_terminal() if is_first_rank() else None
        self.bar: tqdm | None = None
        self.steps, self.start = 0, time.monotonic()  # of this process

    @contextmanager
    def epoch(self, epoch: int, iteration: int) -> Iterator[None]:
        """Draw it below the lines of an epoch that stands at `iteration`."""
        if self.file is None:
            yield
            return
        self.bar = tqdm(
            desc=f"epoch {epoch + 1}/{self.num_epochs}",
            total=self.steps_per_epoch,
            initial=iteration,
            unit="iter",
            file=self.file,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        step_aside = partial(tqdm.external_write_mode, file=self.file)
        errors.aside.append(step_aside)
        try:
            yield
        finally:
            errors.aside.remove(step_aside)
            self.bar.close()
            self.bar = None

    def step(self) -> None:
        self.steps += 1
        if self.steps == 1:  # the first one compiles
            self.start = time.monotonic()
        if self.bar is not None:
            self.bar.update()

    def show(self, *, step: int, loss: float, rate: float) -> None:
        """Show figures of a line, and from the pace of this process how long the run will take."""
        if self.bar is None:
            return
        left = "?"
        if self.steps > 1:
            pace = (time.monotonic() - self.start) / (self.steps - 1)
            seconds = pace * (self.num_epochs * self.steps_per_epoch - step)
            left = str(timedelta(seconds=round(seconds)))
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} samples/s, run {left} left")


Log = Callable[[str], None]


def open_log(directory: str | None, script: str) -> Log:
    """A function that prints lines, and appends them to `<directory>/<script>.log` if given one.

    Raises UsageError where that file cannot be written.
    """
    if not is_first_rank():
        return lambda line: None
    if directory is None:
        return lambda line: say(line, sys.stdout)
    path = os.path.join(directory, f"{script}.log")
    try:
        os.makedirs(directory, exist_ok=True)
        file = open(  # noqa: SIM115  (as long as the run)
            path, "a", encoding="utf-8", errors="backslashreplace", buffering=1
        )
    except OSError as error:
        raise UsageError(f"--log_dir: cannot write {path}: {error.strerror}") from None

    def log(line: str) -> None:
        line = printable(line)
        say(line, sys.stdout)
        try:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")
        except OSError as error:
            raise RunError(f"--log_dir: cannot write {path}: {error.strerror}") from None

    return log


def limit_run_ahead(outputs: list) -> tuple | None:
    """Wait for the step RUN_AHEAD before the newest of `outputs`, and return its output.

    Calling a graph only asks for a step. Without a limit the host would ask for all of them, with
    their inputs in memory, and could not be interrupted before the last is done.
    """
    if len(outputs) <= RUN_AHEAD:
        return None
    done = outputs[-1 - RUN_AHEAD]
    done[0].numpy()
    return done


class Meter:
    """Keeps the outputs of training steps on the device until a line is due, and reads them then.

    The host stays at most RUN_AHEAD steps ahead of the device.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget what was gathered and start the clock."""
        self.pending: list[tuple] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        self.start = time.perf_counter()

    def add(self, step_output: tuple) -> tuple | None:
        """Returns the output of a step that is done, if one is known to be."""
        self.pending.append(step_output)
        return limit_run_ahead(self.pending)

    def read(self) -> tuple[list[float], Counts, int, float]:
        """Losses of the steps, hits, labels out of range, and seconds since the last `restart`.

        Waits for the steps, then restarts.
        """
        # (steps, 4, parts): a step of --accumulate_steps gives a value for each part of its batch.
        values = np.array(
            [[value.numpy().reshape(-1) for value in step[:4]] for step in self.pending], np.float64
        )
        seconds = time.perf_counter() - self.start
        top_1, top_k, bad_labels = values[:, 1:].sum(axis=(0, 2)).astype(int).tolist()
        self.restart()
        counts = Counts(top_1, top_k, self.batch_size * len(values))
        return values[:, 0].mean(axis=1).tolist(), counts, bad_labels, seconds
