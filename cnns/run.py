"""A training run: epochs, log lines, validation, snapshots, and the signals that end it.

What is run is decided in of_cnn_train_val.py; here is only in which order things happen. Snapshots
are written by `Saver`, and everything that a line shows comes from `Meter`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import oneflow as flow
from oneflow import nn

from cnns.checkpoint.find import link_snapshot, prune_snapshots
from cnns.checkpoint.snapshot import EPOCH_NAME, PREFIX, Snapshot, save_snapshot
from cnns.data.order import RecordOrder
from cnns.distributed import Agreement, average_statistics, wait_for_all
from cnns.errors import RunError
from cnns.evaluation import Evaluator
from cnns.graphs import DropoutMasks, TrainGraph
from cnns.interrupts import Interrupted, Interrupts
from cnns.log import Log, Meter, notice, train_line, validation_line


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int | None = None  # last finished epoch, validation included; None before the first
    iteration: int = 0  # iterations done in the epoch after that
    step: int = 0  # updates made
    metrics: dict = field(default_factory=dict)  # of the last finished epoch
    best: dict = field(default_factory=dict)  # epoch and metrics of the best so far, by top-1
    # RecordOrder.digest of the records used; None where OneFlow's reader chooses them.
    records_digest: str | None = None

    @property
    def current_epoch(self) -> int:
        return 0 if self.epoch is None else self.epoch + 1

    def advance(self, order: RecordOrder | None) -> None:
        """One iteration more is done."""
        if order is not None:
            batch = (self.current_epoch, self.iteration)
            self.records_digest = order.digest(self.records_digest, *batch)
        self.iteration, self.step = self.iteration + 1, self.step + 1


@dataclass(frozen=True)
class Intervals:
    """How long a run is, and when it prints and saves."""

    num_epochs: int
    steps_per_epoch: int
    print_steps: int
    save_steps: int | None  # None: only at the end of epochs
    save_epochs: int
    keep_snapshots: int | None  # of epochs; None: all
    save_last: bool


@dataclass
class Parts:
    """What a run is made of, on its devices."""

    model: nn.Module
    graph: TrainGraph
    loader: nn.Module
    record_order: RecordOrder | None  # of the loader; None where OneFlow's reader has its own
    evaluator: Evaluator | None  # None: no validation
    masks: DropoutMasks
    learning_rate: Callable[[int], float]  # of the update made in a step
    batch_size: int  # global
    device: str


class Saver:
    """Writes the snapshots of a run. Only the first process has a directory and writes."""

    def __init__(
        self,
        save_dir: str,
        describe: Callable[[Progress], Snapshot],
        log: Log,
        *,
        last_good: str | None = None,
        saved_step: int = 0,
    ):
        self.save_dir, self.describe, self.log = save_dir, describe, log
        self.last_good = last_good  # path of the newest snapshot
        self.saved_step = saved_step  # that it was written after
        self.writes = flow.env.get_rank() == 0

    def save(self, name: str, parts: Parts, progress: Progress, *, replace: bool = False) -> None:
        average_statistics(parts.model)
        self.last_good = f"{self.save_dir}/{PREFIX}{name}"
        self.log(f"Saving model to {self.last_good}.")
        if self.writes:
            save_snapshot(
                self.last_good,
                parts.model,
                self.describe(progress),
                graph=parts.graph if progress.step > 0 else None,
                replace=replace,
            )
        self.saved_step = progress.step

    def link(self, progress: Progress, *, last: bool) -> None:
        """Let `best` and `last` be the snapshot of the last finished epoch, where they are."""
        path = os.path.join(self.save_dir, f"{PREFIX}epoch_{progress.epoch}")
        if self.writes and progress.best.get("epoch") == progress.epoch:
            link_snapshot(path, "best")
        if self.writes and last:
            link_snapshot(path, "last")

    def link_again(self, resumed: str, progress: Progress, *, last: bool) -> None:
        """The same for the snapshot that is resumed: a kill may have come before it was linked."""
        directory, name = os.path.split(os.path.abspath(resumed))
        if directory == os.path.abspath(self.save_dir) and EPOCH_NAME.fullmatch(name):
            self.link(progress, last=last)

    def prune(self, keep: int) -> None:
        if self.writes:
            prune_snapshots(self.save_dir, keep)


class Run:
    """Trains, validates, prints and saves, from where `progress` stands."""

    def __init__(
        self, parts: Parts, intervals: Intervals, progress: Progress, saver: Saver, log: Log
    ):
        self.parts, self.intervals, self.progress = parts, intervals, progress
        self.saver, self.log = saver, log
        self.meter = Meter(parts.batch_size)
        self.interrupts = Interrupts()
        self.agreement = Agreement(self.interrupts, parts.device)

    @property
    def is_over(self) -> bool:
        return self.progress.current_epoch >= self.intervals.num_epochs

    def run(self) -> None:
        """The epochs that are left. A signal ends them after an iteration, with a snapshot."""
        progress = self.progress
        with self.interrupts:
            try:
                while not self.is_over:
                    self.train_epoch()
                    self.validate()
                    progress.epoch, progress.iteration = progress.current_epoch, 0
                    self.save_epoch()
                    self.agreement.check(None)
            except Interrupted as interrupted:
                self.print_line()
                if progress.step > self.saver.saved_step:
                    self.saver.save("last", self.parts, progress, replace=True)
                wait_for_all()  # one of them may be saving
                last_good = self.saver.last_good
                where = f"resume with --resume={last_good}" if last_good else "no snapshot"
                raise interrupted.saying(where) from None

    def train_epoch(self) -> None:
        """What is left of an epoch. A line is due at each interval, the end, and each snapshot."""
        parts, progress, intervals = self.parts, self.progress, self.intervals
        parts.model.train()
        batches = parts.loader.batches(progress.current_epoch, progress.iteration)
        self.meter.restart()
        for iteration in range(progress.iteration + 1, intervals.steps_per_epoch + 1):
            compiled = parts.graph.is_compiled
            masks = parts.masks.at(progress.step)
            output = parts.graph(*next(batches), **masks, **self.agreement.vote())
            done = self.meter.add(output)
            if not compiled:
                self.meter.restart_clock()
            progress.advance(parts.record_order)
            end = iteration == intervals.steps_per_epoch
            save = intervals.save_steps is not None and iteration % intervals.save_steps == 0
            if iteration % intervals.print_steps == 0 or save or end:
                self.print_line()
                done = output
            if save and not end:
                self.saver.save("last", parts, progress, replace=True)
            self.agreement.check(done)

    def validate(self) -> None:
        evaluator, progress = self.parts.evaluator, self.progress
        if evaluator is None:
            return
        average_statistics(self.parts.model)
        counts, seconds = evaluator.round(self.agreement)
        epoch, num_batches = progress.current_epoch, evaluator.loader.num_batches
        self.log(validation_line(epoch, num_batches, counts, seconds))
        progress.metrics = counts.as_metrics()
        if progress.metrics["val_top_1"] > progress.best.get("val_top_1", -1.0):
            progress.best = {"epoch": epoch} | progress.metrics

    def print_line(self) -> None:
        """The line over the iterations since the last one. Raises RunError if they went wrong."""
        if not self.meter.pending:
            return
        losses, counts, bad_labels, seconds = self.meter.read()
        epoch, iteration = self.progress.current_epoch, self.progress.iteration
        if bad_labels:
            raise RunError(
                f"the training data have {bad_labels} labels outside the network's classes in the "
                f"{len(losses)} iterations up to epoch {epoch}, iter {iteration}; give a larger "
                "--num_classes or mend the data"
            )
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            self.refuse_loss(losses[bad[0]], back=len(losses) - 1 - bad[0])
        self.log(train_line(epoch, iteration, sum(losses) / len(losses), counts, seconds))

    def refuse_loss(self, loss: float, *, back: int) -> None:
        """Raise RunError for the loss of the step that lies `back` steps before the newest."""
        step, last_good = self.progress.step - back, self.saver.last_good
        way = "try a lower --learning_rate or --gradient_clipping"
        if last_good is not None:
            way = f"the last good snapshot is {last_good}; {way} with --resume={last_good}"
        raise RunError(
            f"the loss is {loss} at epoch {self.progress.current_epoch}, iter "
            f"{self.progress.iteration - back} (step {step}, learning rate "
            f"{self.parts.learning_rate(step - 1):g}); {way}"
        )

    def save_epoch(self) -> None:
        """What is due after an epoch. `best` and `last` share the files of the epoch's snapshot."""
        progress, intervals, epoch = self.progress, self.intervals, self.progress.epoch
        if self.is_over or progress.current_epoch % intervals.save_epochs == 0:
            self.saver.save(f"epoch_{epoch}", self.parts, progress)
            self.saver.link(progress, last=intervals.save_last)
            if intervals.keep_snapshots is not None:
                self.saver.prune(intervals.keep_snapshots)
        elif progress.best.get("epoch") == epoch:
            self.saver.save("best", self.parts, progress, replace=True)


def announce(run: Run, *, restored: str | None, resumed: bool, save_init: bool) -> None:
    """Say where the weights come from, and save them if asked to."""
    progress, intervals = run.progress, run.intervals
    if restored is not None:
        run.log(f"Restoring model from {restored}.")
    if resumed and restored is not None:
        trained = progress.iteration == intervals.steps_per_epoch
        what = "validation" if trained else f"iteration {progress.iteration + 1}"
        if not run.is_over:
            notice(f"Resuming at epoch {progress.current_epoch}, {what}.")
        run.saver.link_again(restored, progress, last=intervals.save_last)
    elif save_init:
        run.saver.save("initial_model", run.parts, progress)
    if restored is None:
        run.log("Init model on demand.")
    if not run.is_over:
        notice("Compiling the training graph; on a CPU this takes 5 to 30 seconds.")
