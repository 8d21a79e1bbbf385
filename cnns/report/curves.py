"""The curves of one or several runs: pictures, and a page that needs no other file."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cnns.data.format import write_whole
from cnns.record import COLUMNS, RunRecord
from cnns.report.page import page, picture, pictures, table, text
from cnns.report.plots import plot_style, pyplot

MAX_POINTS = 400  # of a curve; beyond that, means over neighbouring lines
TITLES = {
    "loss": "Loss",
    "accuracy": "Top-1 accuracy",
    "learning_rate": "Learning rate",
    "throughput": "Training, samples/s",
}


def write_curves(runs: Sequence[RunRecord], folder: str) -> str:
    """Write the pictures and the page, and return the page's path. Raises OSError."""
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    names, files = name_runs(runs), {}
    with plot_style():
        for name in TITLES:
            files[name] = output / f"{name}.png"
            draw(name, runs, names, files[name])
    written = output / "report.html"
    write_whole(written, make_page(runs, names, files).encode())
    return str(written)


def name_runs(runs: Sequence[RunRecord]) -> list[str]:
    """Short names that tell the runs apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]


# Curves.


def epochs_done(run: RunRecord, entries: Iterable[dict]) -> list[float]:
    """Where lines stand, in epochs, so that runs with other batch sizes can be compared."""
    steps = run.about.get("steps_per_epoch")
    if not steps:
        steps = max((each["iteration"] for each in run.of_kind("train")), default=1)
    return [each["step"] / max(steps, 1) for each in entries]


def thin(values: Sequence[float]) -> list[float]:
    """At most some MAX_POINTS means over as many neighbours each."""
    width = max(1, -(-len(values) // MAX_POINTS))
    groups = [values[i : i + width] for i in range(0, len(values), width)]
    return [sum(group) / len(group) for group in groups]


def draw(curve: str, runs: Sequence[RunRecord], names: Sequence[str], path: Path) -> None:
    figure, axes = pyplot.subplots()
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = f"C{number % 10}"
        prefix = f"{name}, " if len(runs) > 1 else ""
        train, validation = run.of_kind("train"), run.of_kind("validation")
        x = thin(epochs_done(run, train))
        if curve in ("loss", "accuracy"):
            field = "loss" if curve == "loss" else "top_1"
            axes.plot(x, thin([each[field] for each in train]), color=colour, alpha=0.5, lw=1,
                      label=f"{prefix}training")  # fmt: skip
            validation = [each for each in validation if field in each]
            axes.plot(epochs_done(run, validation), [each[field] for each in validation],
                      color=colour, marker="o", ms=3, label=f"{prefix}validation")  # fmt: skip
        else:
            field = "learning_rate" if curve == "learning_rate" else "samples_per_second"
            axes.plot(x, thin([each[field] for each in train]), color=colour, lw=1, label=name)
    axes.set_title(TITLES[curve], loc="left")
    axes.set_xlabel("epochs")
    axes.set_ylim(bottom=0)
    if curve in ("loss", "accuracy") or len(runs) > 1:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


# The page.


def differing_flags(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Flags that are not the same in all runs, with the value in each."""
    flags = sorted({name for run in runs for name in run.flags})
    values = {name: [run.flags.get(name) for run in runs] for name in flags}
    return {name: held for name, held in values.items() if any(v != held[0] for v in held)}


def state(run: RunRecord) -> str:
    """How far a run has got."""
    done = len([row for row in run.epochs() if "val_top_1" in row]) or len(run.epochs())
    planned = run.flags.get("num_epochs")
    return f"{done} of {planned} epochs" if planned else f"{done} epochs"


def summary(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        scored = [row for row in run.epochs() if row.get("val_top_1") is not None]
        best = max(scored, key=lambda row: row["val_top_1"], default={})
        commit = run.about.get("git_commit") or ""
        last = datetime.fromtimestamp(run.metrics[-1].get("time", 0)).isoformat(" ", "seconds")
        rows.append(
            (name, run.about.get("model"), run.about.get("train_images"), state(run),
             best.get("val_top_1"), best.get("epoch"), commit[:12], last)
        )  # fmt: skip
    head = "run, network, training images, done, best top-1, in epoch, commit, last line"
    return table(head.split(", "), rows)


def make_page(runs: Sequence[RunRecord], names: Sequence[str], files: dict[str, Path]) -> str:
    title = " and ".join(names) if len(names) < 3 else f"{len(names)} runs"
    parts = [f"<h1>{text(title)}</h1>", summary(runs, names)]
    parts.append(pictures(picture(path, TITLES[name]) for name, path in files.items()))
    if len(runs) > 1:
        differing = differing_flags(runs)
        parts.append("<h2>Flags that differ</h2>")
        rows = [(f"--{flag}", *values) for flag, values in differing.items()]
        parts.append(table(("flag", *names), rows) if rows else "<p>None.</p>")
    for run, name in zip(runs, names, strict=True):
        parts.append(f"<h2>Epochs of {text(name)}</h2>")
        parts.append(table(COLUMNS, ([row.get(c) for c in COLUMNS] for row in run.epochs())))
        rows = [(f"--{flag}", value) for flag, value in run.flags.items()]
        parts.append(
            f"<details><summary>All flags</summary>{table(('flag', 'value'), rows)}</details>"
        )
    return page(title, parts)
