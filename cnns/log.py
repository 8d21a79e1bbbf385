"""Exact counts, and the lines that the user reads."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from cnns.errors import RunError, UsageError, printable, say

RUN_AHEAD = 2  # steps; enough for the next to be there when one ends


@dataclass
class Counts:
    """Integer hits over a number of samples; divided once, at the end."""

    top_1: int
    top_k: int
    samples: int

    def accuracies(self) -> tuple[float, float]:
        return self.top_1 / self.samples, self.top_k / self.samples

    def as_metrics(self) -> dict[str, float | int]:
        top_1, top_k = self.accuracies()
        return {"val_top_1": top_1, "val_top_k": top_k, "num_val_examples": self.samples}


def train_line(epoch: int, iteration: int, loss: float, counts: Counts, seconds: float) -> str:
    return f"train: epoch {epoch}, iter {iteration}, loss: {loss:.6f}, {figures(counts, seconds)}"


def validation_line(epoch: int, iterations: int, counts: Counts, seconds: float) -> str:
    return f"validation: epoch {epoch}, iter {iterations}, {figures(counts, seconds)}"


def figures(counts: Counts, seconds: float) -> str:
    top_1, top_k = counts.accuracies()
    rate = counts.samples / seconds
    return f"top_1: {top_1:.6f}, top_k: {top_k:.6f}, samples/s: {rate:.3f}"


def is_first_rank() -> bool:
    """Whether this process is the one that prints and saves."""
    return int(os.environ.get("RANK", "0")) <= 0  # OneFlow puts -1 there for a process alone


def notice(text: str) -> None:
    """Print something worth knowing that is not a result to stderr."""
    if is_first_rank():
        say(text, sys.stderr)


Log = Callable[[str], None]


def open_log(directory: str | None, script: str) -> Log:
    """What prints the lines of a run, and appends them to `<directory>/<script>.log` if asked to.

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
    """Wait for the step RUN_AHEAD before the newest of `outputs`, and return what it gave.

    Calling a graph only asks for a step. Without a limit the host would ask for all of them, with
    their inputs in memory, and could not be interrupted before the last is done.
    """
    if len(outputs) <= RUN_AHEAD:
        return None
    done = outputs[-1 - RUN_AHEAD]
    done[0].numpy()
    return done


class Meter:
    """Gathers what training steps return, untouched on the device, until a line is due.

    All are read when a line is due; until then the host stays RUN_AHEAD steps before the device.
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

        Waits for the steps; then starts anew.
        """
        values = np.array([[float(value.numpy()) for value in step[:4]] for step in self.pending])
        seconds = time.perf_counter() - self.start
        top_1, top_k, bad_labels = values[:, 1:].sum(axis=0).astype(int).tolist()
        self.restart()
        counts = Counts(top_1, top_k, self.batch_size * len(values))
        return values[:, 0].tolist(), counts, bad_labels, seconds
