"""What a run writes down beside its snapshots, and how it is read back."""

import csv
import json
import resource
import sys
import time

import pytest
import yaml

from cnns import errors
from cnns.errors import RunError
from cnns.record import open_record, read_metrics, read_run


def fill(record, *, epochs: int, first: int = 0, stop: int | None = None) -> None:
    """Epochs of two lines of 2 and 1 iterations of 4 images, and a validation; `stop`: steps."""
    for epoch in range(first, epochs):
        for iteration, samples in ((2, 8), (3, 4)):
            step = 3 * epoch + iteration
            if stop is not None and step > stop:
                return
            record.add(
                "train",
                epoch=epoch,
                iteration=iteration,
                step=step,
                loss=10.0 - step,
                learning_rate=0.1 * step,
                loss_scale=None,
                top_1=step / 100,
                top_k=step / 50,
                samples=samples,
                samples_per_second=4.0,
            )
        record.add(
            "validation",
            epoch=epoch,
            iteration=1,
            step=3 * epoch + 3,
            loss=float("nan") if epoch == 1 else 1.0,
            top_1=0.5,
            top_k=0.75,
            samples=4,
            samples_per_second=4.0,
        )
        record.finish_epoch()


def opened(path, *, step=0, epochs=0, tensorboard=False):
    about = {"flags": {"random_area": (0.08, 1.0), "seed": 3}}
    return open_record(str(path), step=step, epochs=epochs, about=about, tensorboard=tensorboard)


def figures(path) -> list[dict]:
    entries = read_metrics(str(path / "metrics.jsonl"))
    return [
        {k: v for k, v in each.items() if k not in ("time", "memory_bytes")} for each in entries
    ]


def test_metrics_and_epochs(tmp_path):
    with opened(tmp_path) as record:
        fill(record, epochs=2)
    entries = figures(tmp_path)
    assert [(each["kind"], each["step"]) for each in entries] == [
        ("train", 2), ("train", 3), ("validation", 3), ("train", 5), ("train", 6), ("validation", 6)
    ]  # fmt: skip
    assert "loss_scale" not in entries[0]
    assert "loss" in entries[2] and "loss" not in entries[5]  # nan is not JSON
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    # Over samples, not over lines: 8 of loss 8 and 4 of loss 7.
    assert float(rows[0]["train_loss"]) == pytest.approx((8 * 8 + 4 * 7) / 12)
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.6)
    assert rows[0]["val_top_1"] == "0.5" and rows[1]["val_loss"] == ""


@pytest.mark.parametrize("step, epochs", [(0, 0), (2, 0), (3, 0), (3, 1), (5, 1), (9, 3)])
def test_resumed_at_any_step_equals_never_stopped(tmp_path, step, epochs):
    """(3, 0) is stopped after the training of epoch 0, before its validation is done."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    for path in (whole, run):
        path.mkdir()
        with opened(path) as record:
            fill(record, epochs=3)
    with opened(run, step=step, epochs=epochs) as record:
        assert len(figures(run)) < 9 or step == 9
        first, done = epochs, step - 3 * epochs
        if done:  # what is left of an epoch
            part = [each for each in figures(whole) if each["epoch"] == first]
            for each in part:
                if each["kind"] == "validation" or each["iteration"] > done:
                    record.add(**each)
            record.finish_epoch()
            first += 1
        fill(record, epochs=3, first=first)
    assert figures(run) == figures(whole)
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    with opened(tmp_path) as record:
        fill(record, epochs=1)
    before = figures(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "epo')
    assert figures(tmp_path) == before
    with opened(tmp_path, step=3, epochs=1):
        assert figures(tmp_path) == before


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"kind": "x"}', '{"kind": "train", "epoch": "0"}', "[" * 9999]
)
def test_damaged_metrics_are_one_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n{{}}\n")
    with pytest.raises(RunError, match="line 1 is not one of a run's figures"):
        read_metrics(str(path))


OF_TRAINING = {
    **{"kind": "train", "epoch": 0, "iteration": 1, "step": 1, "top_1": 0.5, "top_k": 1},
    **{"samples": 8, "samples_per_second": 10.5, "loss": 1.5, "learning_rate": 0.1, "time": 5},
}


@pytest.mark.parametrize(
    "name, value",
    [
        *[("time", value) for value in (1e99, -1, "x", None)],
        *[("loss", value) for value in (1e300, 10**400, None)],
        *[(name, 1e300) for name in ("learning_rate", "samples_per_second", "other")],
    ],
)
def test_figures_that_no_run_has_are_damage(tmp_path, name, value):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(OF_TRAINING) + "\n")
    assert read_metrics(str(path)) == [OF_TRAINING]
    path.write_text(json.dumps(OF_TRAINING | {name: value}) + "\n")
    with pytest.raises(RunError, match="line 1 is not one of a run's figures"):
        read_metrics(str(path))


def test_many_epochs_take_no_longer_than_few_each(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(OF_TRAINING | {"epoch": n, "step": n + 1}) for n in range(40_000)]
    path.write_text("\n".join(lines) + "\n")
    start = time.process_time()
    assert len(read_run(str(tmp_path)).epochs()) == 40_000
    assert time.process_time() - start < 30


def test_log_has_what_was_said_and_the_error(tmp_path):
    with pytest.raises(RunError), opened(tmp_path):
        errors.say("a notice\x1b[2J", sys.stderr)
        raise RunError("the loss is nan")
    errors.say("later", sys.stderr)
    text = (tmp_path / "log.txt").read_text()
    assert "a notice\\x1b[2J\n" in text
    assert text.endswith("error: the loss is nan\n")
    assert errors.listeners == []


def test_flags_are_plain_yaml(tmp_path):
    with opened(tmp_path):
        pass
    content = yaml.safe_load((tmp_path / "flags.yaml").read_text())
    assert content == {"flags": {"random_area": [0.08, 1.0], "seed": 3}}


def test_tensorboard_gets_every_figure(tmp_path):
    with opened(tmp_path, tensorboard=True) as record:
        fill(record, epochs=1)
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    for name in (b"train/loss", b"train/learning_rate", b"validation/top_1"):
        assert name in data


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(RunError, match="cannot write"), opened(tmp_path / "missing"):
        pass
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(RunError, match="cannot write .*metrics.jsonl: File too large; make room"):
        with opened(tmp_path) as record:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            try:
                fill(record, epochs=3)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(each["kind"] for each in figures(tmp_path))  # whole lines
    assert json.dumps(errors.listeners) == "[]"
