"""The end of a training run: its curves, what its best snapshot gets wrong, and what comes next.

The reports stand beside the snapshots. A run does not fail where one cannot be written: a notice
says why, and what writes it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.advice import next_steps
from cnns.checkpoint.snapshot import PREFIX, Snapshot, local, read_weights
from cnns.convert.cache import is_photo_folder
from cnns.data.images import class_names
from cnns.data.kinds import Dataset
from cnns.distributed import wait_for_all
from cnns.errors import RunError, UsageError, describe
from cnns.evaluation import Collector
from cnns.log import is_first_rank, notice
from cnns.models.layers import from_standard
from cnns.record import read_run
from cnns.report.folder import check_report_folder
from cnns.run import Run

CURVES, EVALUATION = "report", "evaluation"  # directories in that of the run


def finish(
    run: Run, about: Snapshot, *, save_dir: str, val_data: Dataset | None, scripts: str
) -> None:
    """Write the reports of a run that has ended, and say what comes next; in all processes.

    Args:
        about: what its snapshots say of its network and flags.
        scripts: the directory of the scripts.
    """
    flags = about.flags
    snapshot = f"{save_dir}/{PREFIX}best"
    if not os.path.isdir(snapshot):  # no validation, or the best is where the run was resumed from
        snapshot = f"{save_dir}/{PREFIX}epoch_{flags['num_epochs'] - 1}"
    if flags["report"]:
        report_curves(save_dir)
    if flags["report"] and val_data is not None:
        report_mistakes(run, about, val_data, snapshot=snapshot)
    if flags["report"] or flags["finetune"] or is_photo_folder(flags["train_data_dir"]):
        path = val_data.path if val_data else None
        for text in next_steps(snapshot, val_data=path, scripts=scripts):
            notice(text)


def report_curves(save_dir: str) -> None:
    """Write the curves of the run in a directory, in the first process."""
    if not is_first_rank():
        return
    from cnns.report.curves import write_curves  # matplotlib takes a second

    with attempt("Curves", by=f"tools/report.py {save_dir}"):
        run = read_run(save_dir)
        if not run.metrics:
            raise RunError(f"{save_dir} has no figures")
        say_written("Curves", write_curves([run], os.path.join(save_dir, CURVES)))


def report_mistakes(run: Run, about: Snapshot, data: Dataset, *, snapshot: str) -> None:
    """Score a snapshot of a run once more, and write what it gets wrong; in all processes.

    The run's network gets the weights of the snapshot, which only the first process reads.
    """
    evaluator = run.parts.evaluator
    assert evaluator is not None and evaluator.gives_logits
    weights: dict[str, np.ndarray] = {}
    what, by = "What it gets wrong", f"of_cnn_evaluate.py --model_load_dir={snapshot} --report=DIR"
    with attempt(what, by=by):
        weights = read_weights(snapshot) if is_first_rank() else {}
    take_weights(run.parts.model, weights)
    collector = Collector(evaluator.loader)
    counts, _ = evaluator.round(run.agreement, collector)
    answers = collector.answers()
    if weights:
        from cnns.report.evaluation import Evaluation, write_report

        evaluation = Evaluation(
            about={
                "network": about.model,
                "weights": os.path.normpath(snapshot),
                "data": data.path,
                "backend": "oneflow",
            },
            data=data,
            class_names=class_names(about.num_classes, about.classes or data.classes),
            answers=answers,
            counts=counts,
            top_k=evaluator.top_k,
        )
        folder = os.path.join(os.path.dirname(snapshot), EVALUATION)
        with attempt(what, by=by):
            check_report_folder(folder)
            written = write_report(evaluation, folder)
            if evaluation.balance_line:
                notice(evaluation.balance_line)
            say_written(what, written)
    wait_for_all()  # a process that ends while others still read from it aborts them


def take_weights(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Copy weights that the first process has read to every device; where it has none, its own."""
    for name, tensor in model.state_dict().items():
        if name in weights:
            own = flow.tensor(from_standard(model, name, weights[name]))
        else:
            own = local(tensor)
        # All get what the first process holds.
        tensor.copy_(own.to_global(tensor.placement, flow.sbp.broadcast))


def say_written(what: str, page: str) -> None:
    notice(f"{what}: {os.path.normpath(page)}")


@contextmanager
def attempt(what: str, *, by: str) -> Iterator[None]:
    """Say why something is not written, and what writes it."""
    try:
        yield
    except (OSError, RunError, UsageError, ValueError) as error:
        notice(f"{what}: not written, {describe(error)[1]}; {by} does it.")
