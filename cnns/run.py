"""A training run: epochs, log lines, validation, snapshots, and the signals that end it.

What to run is decided in of_cnn_train_val.py; this is the order in which things happen. `Saver`
writes the snapshots, and `Meter` has what a line shows.
"""

import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import oneflow as flow
from oneflow import nn

from cnns.advice import Outlook, OverfittingWatch
from cnns.checkpoint.find import link_snapshot, prune_snapshots
from cnns.checkpoint.snapshot import (
    EPOCH_NAME,
    PREFIX,
    Progress,
    Snapshot,
    save_snapshot,
    training_arrays,
)
from cnns.data.order import RecordOrder
from cnns.distributed import Agreement, average_statistics, wait_for_all
from cnns.ema import Average
from cnns.errors import RunError
from cnns.evaluation import Evaluator
from cnns.graphs import DropoutMasks, TrainGraph
from cnns.interrupts import Interrupted, Interrupts
from cnns.log import Bar, Counts, Log, Meter, Sums, notice, train_line, validation_line
from cnns.record import Record
from cnns.stages import TrainSizes


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
    best_metric: str = "top_1"
    early_stop_epochs: int | None = None  # without a better one; None: never


def make_intervals(flags: Mapping[str, Any], *, steps_per_epoch: int) -> Intervals:
    return Intervals(
        num_epochs=flags["num_epochs"],
        steps_per_epoch=steps_per_epoch,
        print_steps=flags["loss_print_every_n_iter"],
        save_steps=flags["save_every_n_iter"],
        save_epochs=flags["save_epoch_interval"],
        keep_snapshots=flags["keep_snapshots"] or None,
        save_last=flags["save_last"],
        best_metric=flags["best_metric"],
        early_stop_epochs=flags["early_stop_epochs"],
    )


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
    # Loader and graph for images of a size, from a step on, with the state of the graph before.
    build_stage: Callable[..., tuple[nn.Module, TrainGraph]]
    train_sizes: TrainSizes
    train_size: int  # that loader and graph have
    use_fp16: bool = False
    frozen_norms: Sequence[nn.Module] = ()  # batch norms that keep their statistics
    average: Average | None = None  # of the weights
    average_evaluator: Evaluator | None = None  # of the network with the average

    def set_training(self) -> None:
        """Set the network to training, but for the batch norms that are frozen."""
        self.model.train()
        for norm in self.frozen_norms:
            norm.eval()

    def take_size(self, epoch: int, *, step: int) -> bool:
        """Take the size of an epoch, as a run does that is resumed there. True where it changes."""
        size = self.train_sizes.at(epoch)
        if size == self.train_size:
            return False
        state = training_arrays(self.graph, self.model)
        self.loader, self.graph = self.build_stage(size, step=step, state=state)
        self.train_size = size
        self.forget_graph()
        return True

    def forget_graph(self) -> None:
        """Remove what a training graph that is not used any more has left."""
        for parameter in self.model.parameters():
            parameter.grad = None  # the next graph would add its own to it
        gc.collect()

    def allocate(self, epoch: int) -> None:
        """Take the memory of the largest images before any other's.

        OneFlow 0.9.0 keeps the memory of a graph that is gone, for later ones that fit into it, so
        that growing images would take that of all sizes together.
        """
        largest = max(self.train_sizes.sizes)
        if self.train_sizes.at(epoch) == largest:
            return
        self.set_training()
        loader, graph = self.build_stage(largest, step=0, state=None)
        more: dict[str, Any] = self.masks.at(0)
        if self.average is not None and self.average.within_graph:
            more["share"] = self.average.tensor(0.0)
        graph.allocate(*next(loader.batches(epoch)), **more)
        del loader, graph
        self.forget_graph()


def is_better(metrics: dict, best: dict, *, by: str) -> bool:
    """Whether an epoch is better than the best before it, by its figure `by` (a key of
    `cnns.flags.run.BEST_METRICS`). Any is better than none; of equal ones the first is the best.
    """
    name = by.replace("top", "val_top").replace("loss", "val_loss")
    if name not in metrics or name not in best:
        return name in metrics or not best
    sign = -1 if by.endswith("loss") else 1
    return sign * metrics[name] > sign * best[name]


class Saver:
    """Writes the snapshots of a run, in the first process only."""

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
        self.saved_step = saved_step  # after which it was written
        self.writes = flow.env.get_rank() == 0

    def save(self, name: str, parts: Parts, progress: Progress, *, replace: bool = False) -> None:
        average_statistics(parts.model)
        if parts.average is not None:
            parts.average.finish()
        path = f"{self.save_dir}/{PREFIX}{name}"
        self.log(f"Saving model to {path}.")
        if self.save_dir:  # empty where only the first process knows it
            self.last_good = path
        if self.writes:
            save_snapshot(
                path,
                parts.model,
                self.describe(progress),
                graph=parts.graph if progress.step > 0 else None,
                average=parts.average.network if parts.average is not None else None,
                replace=replace,
            )
        self.saved_step = progress.step

    def link(self, progress: Progress, *, last: bool) -> None:
        """Link `best`, if it is the best, and `last` to the snapshot of the last finished epoch."""
        path = os.path.join(self.save_dir, f"{PREFIX}epoch_{progress.epoch}")
        if self.writes and progress.best.get("epoch") == progress.epoch:
            link_snapshot(path, "best")
        if self.writes and last:
            link_snapshot(path, "last")

    def link_again(self, resumed: str, progress: Progress, *, last: bool) -> None:
        """The same for the snapshot that is resumed: its run may have been killed before that."""
        directory, name = os.path.split(os.path.abspath(resumed))
        if directory == os.path.abspath(self.save_dir) and EPOCH_NAME.fullmatch(name):
            self.link(progress, last=last)

    def prune(self, keep: int) -> None:
        if self.writes:
            prune_snapshots(self.save_dir, keep)


class Run:
    """Trains, validates, prints and saves, starting from `progress`."""

    def __init__(
        self,
        parts: Parts,
        intervals: Intervals,
        progress: Progress,
        saver: Saver,
        log: Log,
        record: Record,
    ):
        self.parts, self.intervals, self.progress = parts, intervals, progress
        self.saver, self.log, self.record = saver, log, record
        self.meter, self.sums = Meter(parts.batch_size), Sums(**(progress.unprinted or {}))
        self.bar = Bar(intervals.num_epochs, intervals.steps_per_epoch)
        self.outlook = Outlook(
            intervals.num_epochs * intervals.steps_per_epoch, images_grow=parts.train_sizes.grow
        )
        self.watch = OverfittingWatch()
        self.interrupts = Interrupts()
        self.agreement = Agreement(
            self.interrupts, parts.device, parts=parts.graph.accumulate_steps
        )

    @property
    def is_over(self) -> bool:
        return self.progress.current_epoch >= self.intervals.num_epochs or self.stops_early

    @property
    def stops_early(self) -> bool:
        """Whether the newest of the finished epochs are no better than the one before them."""
        patience, progress = self.intervals.early_stop_epochs, self.progress
        if patience is None or progress.epoch is None or progress.iteration:
            return False
        return progress.epoch - progress.best.get("epoch", progress.epoch) >= patience

    def run(self) -> None:
        """Run the epochs that are left. A signal ends it after an iteration, with a snapshot."""
        progress = self.progress
        with self.interrupts:
            try:
                if self.parts.device == "cuda" and not self.is_over:
                    self.parts.allocate(progress.current_epoch)
                while not self.is_over:
                    with self.bar.epoch(progress.current_epoch, progress.iteration):
                        self.train_epoch()
                    self.validate()
                    progress.epoch, progress.iteration = progress.current_epoch, 0
                    self.record.finish_epoch()
                    self.save_epoch()
                    self.agreement.check(None)
                if self.stops_early and progress.current_epoch < self.intervals.num_epochs:
                    notice(
                        f"Stopped after epoch {progress.epoch}: none of the last "
                        f"{self.intervals.early_stop_epochs} was better than epoch "
                        f"{progress.best['epoch']} (--early_stop_epochs)."
                    )
            except Interrupted as interrupted:
                self.print_stop()
                if progress.step > self.saver.saved_step:
                    self.saver.save("last", self.parts, progress, replace=True)
                wait_for_all()  # the first may be saving
                last_good = self.saver.last_good
                where = f"resume with --resume={last_good}" if last_good else "no snapshot"
                raise interrupted.saying(where) from None

    def train_epoch(self) -> None:
        """Run what is left of an epoch, with a line at each interval, snapshot, and the end."""
        parts, progress, intervals = self.parts, self.progress, self.intervals
        average = parts.average
        self.enter_epoch()
        parts.set_training()
        batches = parts.loader.batches(progress.current_epoch, progress.iteration)
        self.meter.restart()
        for iteration in range(progress.iteration + 1, intervals.steps_per_epoch + 1):
            compiled = parts.graph.is_compiled
            more = parts.masks.at(progress.step) | self.agreement.vote()
            if average is not None:
                more |= average.arguments()
            output = parts.graph(*next(batches), **more)
            if average is not None:
                average.note(progress.current_epoch, progress.iteration)
            done = self.meter.add(output)
            if not compiled:
                self.meter.restart_clock()
            progress.advance(parts.record_order)
            self.bar.step()
            end = iteration == intervals.steps_per_epoch
            save = intervals.save_steps is not None and iteration % intervals.save_steps == 0
            if iteration % intervals.print_steps == 0 or save or end:
                self.print_line()
                done = output
            if save and not end:
                self.saver.save("last", parts, progress, replace=True)
            self.agreement.check(done)

    def enter_epoch(self) -> None:
        """Take the size of images that an epoch has, and say it where it is new."""
        parts, epoch = self.parts, self.progress.current_epoch
        changes = parts.take_size(epoch, step=self.progress.step)
        if self.progress.iteration == self.intervals.steps_per_epoch:
            return  # resumed before a validation, nothing is trained
        if parts.train_sizes.grow and (changes or not parts.graph.is_compiled):
            notice(f"Training on images of {parts.train_size} px from epoch {epoch} on.")

    def validate(self) -> None:
        """Score the network, and the average of its weights where there is one."""
        parts, progress = self.parts, self.progress
        if parts.evaluator is None:
            return
        average_statistics(parts.model)
        counts, seconds = self.score(parts.evaluator, "validation")
        metrics = counts.as_metrics()
        figures = counts.as_figures(seconds) | counts.as_scores()
        if parts.average is not None and parts.average_evaluator is not None:
            parts.average.finish()
            averaged, _ = self.score(parts.average_evaluator, "validation (ema)")
            metrics |= {f"ema_{name}": value for name, value in averaged.as_scores("val_").items()}
            figures |= {f"ema_{name}": value for name, value in averaged.as_scores().items()}
        epoch = progress.current_epoch
        self.record.add(
            "validation",
            epoch=epoch,
            iteration=parts.evaluator.loader.num_batches,
            step=progress.step,
            **figures,
        )
        progress.metrics = metrics
        if is_better(metrics, progress.best, by=self.intervals.best_metric):
            progress.best = {"epoch": epoch} | progress.metrics
        best_epoch = progress.best.get("epoch", epoch)
        self.watch.end_epoch(progress.metrics["val_top_1"], best_epoch=best_epoch)

    def score(self, evaluator: Evaluator, name: str) -> tuple[Counts, float]:
        """A round of an evaluator, and its line."""
        counts, seconds = evaluator.round(self.agreement)
        epoch, num_batches = self.progress.current_epoch, evaluator.loader.num_batches
        self.log(validation_line(epoch, num_batches, counts, seconds, name=name))
        return counts, seconds

    def print_line(self) -> None:
        """Print the iterations since the last line. Raises RunError for bad labels or losses."""
        if not self.read_meter():
            return
        sums, self.sums, self.progress.unprinted = self.sums, Sums(), None
        counts, loss, step = self.show(sums), sums.loss / sums.steps, self.progress.step
        self.bar.show(step=step, loss=loss, rate=counts.samples / sums.seconds)
        self.watch.add(counts)
        self.outlook.add(step, steps=sums.steps, seconds=sums.seconds)
        self.record.add(
            "train",
            epoch=self.progress.current_epoch,
            iteration=self.progress.iteration,
            step=step,
            loss=loss,
            learning_rate=self.parts.learning_rate(step - 1),
            records_digest=self.progress.records_digest,
            loss_scale=self.parts.graph.loss_scale if self.parts.use_fp16 else None,
            image_size=self.parts.train_size if self.parts.train_sizes.grow else None,
            **counts.as_figures(sums.seconds),
        )

    def print_stop(self) -> None:
        """Print what the next line would have shown, and keep it for that of the resumed run."""
        if self.read_meter():
            self.show(self.sums)
            self.progress.unprinted = vars(self.sums)

    def show(self, sums: Sums) -> Counts:
        counts = sums.counts(self.parts.batch_size)
        epoch, iteration = self.progress.current_epoch, self.progress.iteration
        self.log(train_line(epoch, iteration, sums.loss / sums.steps, counts, sums.seconds))
        return counts

    def read_meter(self) -> bool:
        """Add the iterations that are done to the sums. False: there are none.

        Raises RunError for bad labels or losses.
        """
        if not self.meter.pending:
            return False
        losses, counts, bad_labels, seconds = self.meter.read()
        epoch, iteration = self.progress.current_epoch, self.progress.iteration
        if bad_labels:
            raise RunError(
                f"the training data have {bad_labels} labels outside the network's classes in the "
                f"{len(losses)} iterations up to epoch {epoch}, iter {iteration}; give a larger "
                "--num_classes or fix the data"
            )
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            self.refuse_loss(losses[bad[0]], back=len(losses) - 1 - bad[0])
        self.sums.add(losses, counts, seconds)
        return True

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
        """Save after an epoch. `best` and `last` share the files of the epoch's snapshot."""
        progress, intervals, epoch = self.progress, self.intervals, self.progress.epoch
        if self.is_over or progress.current_epoch % intervals.save_epochs == 0:
            self.saver.save(f"epoch_{epoch}", self.parts, progress)
            self.saver.link(progress, last=intervals.save_last)
            if intervals.keep_snapshots is not None:
                self.saver.prune(intervals.keep_snapshots)
        elif progress.best.get("epoch") == epoch:
            self.saver.save("best", self.parts, progress, replace=True)


def announce(run: Run, *, restored: str | None, resumed: bool, save_init: bool) -> None:
    """Print where the weights come from, and save them if asked to."""
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
        total = intervals.num_epochs * intervals.steps_per_epoch
        left = f", {total - progress.step} of them left" if progress.step else ""
        plural = "epochs" if intervals.num_epochs > 1 else "epoch"
        notice(
            f"{intervals.num_epochs} {plural} of {intervals.steps_per_epoch} iterations: {total} "
            f"in all{left}."
        )
        notice("Compiling the training graph; on a CPU this takes 5 to 30 seconds.")
