"""Find a learning rate: train some steps with a rate that rises, and draw the loss over it.

python3 tools/find_learning_rate.py --train_data_dir=DIR/train --batch_size_per_device=64
python3 tools/find_learning_rate.py --train_data_dir=DIR/train --model=efficientnet_lite0 --finetune
python3 tools/find_learning_rate.py --optimizer=lars --lr_from=0.01 --lr_to=100 --steps=200

The range test of Smith (arXiv:1506.01186), with a rate that rises by the same factor at each step.
It takes the flags of the training script, on one device, and saves no weights.
"""

import csv
import io
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (first, see there)

import numpy as np

import config
import of_cnn_train_val as script
from cnns.configfile import read_config
from cnns.data.format import write_whole
from cnns.errors import RunError, UsageError, run_main, say
from cnns.flags.defaults import scaled_rate
from cnns.flags.parser import CONFIGURED, Flag, FlagParser
from cnns.flags.values import number, path
from cnns.interrupts import exit_on_signals
from cnns.log import notice
from cnns.report.plots import plot_style, pyplot
from cnns.resume import num_processes
from cnns.run import Parts
from optimizer_util import Schedule

SMOOTHING = 0.9  # share of the former losses in the smoothed one, corrected for its start from 0
DIVERGED = 4.0  # times the lowest smoothed loss: there the test ends
OWN_FLAGS = {
    "lr_from": Flag("first learning rate", number(float, 0, above=True), 1e-5),
    "lr_to": Flag("last learning rate, unless the loss diverges before", number(float, 0), 10.0),
    "steps": Flag("iterations", number(int, 10), 100),
    "output": Flag(
        "picture of the curve; the figures go to a .csv file beside it; both are replaced",
        path,
        "learning_rate.png",
    ),
}
# Flags of the training script that contradict the test, and those that do not matter to it.
REFUSED = ("learning_rate", "resume", "warmup_epochs", "lr_decay", "lr_min", "lr_warmup_decay")
LEFT_OUT = (
    *("ema_decay", "ema_steps", "best_metric", "early_stop_epochs"),
    *("first_train_image_size", "train_size_stages"),  # the test has the last size alone
)


@dataclass(frozen=True)
class Curve:
    rates: list[float]
    losses: list[float]  # of one batch each

    @property
    def smoothed(self) -> np.ndarray:
        return np.array(list(smooth(self.losses)))

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss was lowest."""
        return self.rates[int(np.argmin(self.smoothed))]

    @property
    def steepest(self) -> float:
        """The rate at which the loss fell most per factor of the rate, up to its lowest: by the
        slope of a straight line through a fifth of all steps."""
        end = int(np.argmin(self.smoothed)) + 1
        width = max(5, len(self.rates) // 5)
        if end <= width:
            return self.rates[end // 2]
        log_rates = np.log(self.rates)
        slopes = [
            np.polyfit(log_rates[i : i + width], self.losses[i : i + width], 1)[0]
            for i in range(end - width + 1)
        ]
        return self.rates[int(np.argmin(slopes)) + width // 2]

    @property
    def suggested(self) -> float:
        """A tenth of where the loss was lowest: one that is held for longer must be smaller."""
        return self.lowest / 10


def smooth(losses: list[float]) -> Iterator[float]:
    mean = 0.0
    for count, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        yield mean / (1 - SMOOTHING**count)


def main(argv: list[str] | None = None) -> None:
    given, own = parse_args(argv)
    spec = script.make_spec(given)
    for text in spec.notices:
        if not text.startswith("Learning rate:"):
            notice(text)
    curve = measure(make_parts(spec, own), own, steps_per_epoch=spec.plan.steps_per_epoch)
    check_and_tell(curve, spec, own)


def make_parser() -> FlagParser:
    train = config.make_parser("train")
    groups = {"learning-rate test": OWN_FLAGS} | dict(train.groups)
    return FlagParser(
        "Train some steps with a learning rate that rises, and draw the loss over it. Takes the "
        "flags of of_cnn_train_val.py as well.",
        groups,
        doc=__doc__,
        epilog="Read on: docs/training.md, docs/flags.md.",
    )


def parse_args(argv: list[str] | None) -> tuple[Namespace, Namespace]:
    """The flags of the training script that were given, and those of the test, all."""
    parser = make_parser()
    given = parser.parse_args(argv)
    own = Namespace(**{name: getattr(given, name, f.default) for name, f in OWN_FLAGS.items()})
    for name in (*OWN_FLAGS, *LEFT_OUT):
        vars(given).pop(name, None)
    if "config" in given:
        configured = read_config(given.config, config.make_parser("train").flags)
        kept = {k: v for k, v in configured.items() if k not in REFUSED + LEFT_OUT}
        setattr(given, CONFIGURED, kept)
    for name in REFUSED:
        if name in given:
            raise UsageError(f"--{name}: the test starts anew, with its own rates; leave it out")
    if num_processes(vars(given)) > 1:
        raise UsageError("--gpu_num_per_node and --num_nodes: the test runs on one device")
    if own.lr_to <= own.lr_from:
        raise UsageError(f"--lr_to={own.lr_to:g} must be above --lr_from={own.lr_from:g}")
    given.learning_rate, given.warmup_epochs = own.lr_to, 0.0
    return given, own


def make_parts(spec: script.RunSpec, own: Namespace) -> Parts:
    """What the training script would train, with the rates of the test."""
    schedule = Schedule(
        "exponential",
        learning_rate=own.lr_from,
        total_steps=own.steps,
        decay_rate=own.lr_to / own.lr_from,
        exponential_steps=own.steps - 1,
    )
    spec = replace(spec, schedule=schedule, val_data=None)
    return script.build_run(spec, save_dir="", log=notice).parts


def measure(parts: Parts, own: Namespace, *, steps_per_epoch: int) -> Curve:
    """Train, and read the loss of each step, until it diverges."""
    parts.set_training()
    curve = Curve([], [])
    batches: Iterator = iter(())
    for step in range(own.steps):
        epoch, iteration = divmod(step, steps_per_epoch)
        if iteration == 0:
            batches = parts.loader.batches(epoch, 0)
        loss = float(parts.graph(*next(batches), **parts.masks.at(step))[0].numpy().mean())
        if not math.isfinite(loss):
            break
        curve.rates.append(parts.learning_rate(step))
        curve.losses.append(loss)
        smoothed = curve.smoothed
        if len(smoothed) > 10 and smoothed[-1] > DIVERGED * smoothed.min():
            break
    return curve


def check_and_tell(curve: Curve, spec: script.RunSpec, own: Namespace) -> None:
    """Write and print what was found. Raises RunError."""
    if len(curve.rates) < 10:
        raise RunError(
            f"the loss diverged after {len(curve.rates)} steps; try a lower --lr_from and --lr_to"
        )
    scale = scaled_rate(1.0, spec.flags["lr_scaling"], batch_size=spec.batch_size)
    write(curve, own.output)
    say(f"lowest loss: {curve.smoothed.min():.6f} at learning rate {curve.lowest:.3g}", sys.stdout)
    say(f"steepest fall at learning rate {curve.steepest:.3g}", sys.stdout)
    if len(curve.rates) < own.steps:
        say(f"diverged at learning rate {curve.rates[-1]:.3g}", sys.stdout)
    say(
        f"try --learning_rate={curve.suggested / scale:.2g}, a tenth of the rate of the lowest "
        f"loss; the curve: {own.output}",
        sys.stdout,
    )


def write(curve: Curve, output: str) -> None:
    """The picture and, beside it, the figures. Raises RunError."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("learning_rate", "loss", "smoothed_loss"))
    rows.writerows(zip(curve.rates, curve.losses, curve.smoothed.tolist(), strict=True))
    try:
        write_whole(Path(output).with_suffix(".csv"), table.getvalue().encode())
        with plot_style():
            draw(curve, output)
    except (OSError, ValueError) as error:  # ValueError: not a kind of picture
        raise RunError(f"--output: cannot write {output}: {error}") from None


def draw(curve: Curve, output: str) -> None:
    figure, axes = pyplot.subplots()
    axes.semilogx(curve.rates, curve.losses, lw=0.8, alpha=0.4, label="loss of a batch")
    axes.semilogx(curve.rates, curve.smoothed, label="smoothed")
    axes.axvline(curve.steepest, color="C2", ls="--", lw=1, label=f"steepest: {curve.steepest:.2g}")
    axes.axvline(curve.lowest, color="C3", ls=":", lw=1, label=f"lowest: {curve.lowest:.2g}")
    low, high = float(curve.smoothed.min()), float(curve.smoothed[0])
    axes.set_ylim(low - 0.1 * abs(high - low), max(high, low) + 0.5 * abs(high - low) + 1e-3)
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend(fontsize="small")
    figure.savefig(output)
    pyplot.close(figure)


if __name__ == "__main__":
    exit_on_signals()
    sys.exit(run_main(main))
