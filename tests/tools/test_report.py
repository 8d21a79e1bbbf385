"""tools/report.py and tools/runs.py: the records of runs as curves and as a table."""

import base64
import fcntl
import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import cnns.report.curves
import tools.report
import tools.runs
from cnns.errors import RunError
from cnns.record import open_record, read_run
from cnns.report.curves import epochs_done, thin
from cnns.report.finished import report_curves
from fuzz import bounded, fuzz, mutated
from small import call


def make_run(path, *, epochs: int, learning_rate: float, steps_per_epoch: int = 4, **more) -> None:
    flags = {"num_epochs": 3, "learning_rate": learning_rate, "train_data_dir": "a & b", **more}
    about = {
        "flags": flags,
        "model": "resnet18",
        "steps_per_epoch": steps_per_epoch,
        "val_images": 8,
    }
    path.mkdir(parents=True)
    with open_record(str(path), step=0, epochs=0, about=about, tensorboard=False) as record:
        for epoch in range(epochs):
            for iteration in range(1, steps_per_epoch + 1):
                record.add(
                    "train",
                    epoch=epoch,
                    iteration=iteration,
                    step=steps_per_epoch * epoch + iteration,
                    loss=1 / (epoch + 1),
                    learning_rate=learning_rate,
                    top_1=0.1 * epoch,
                    top_k=0.5,
                    samples=8,
                    samples_per_second=100.0,
                )
            record.add(
                "validation",
                epoch=epoch,
                iteration=1,
                step=steps_per_epoch * (epoch + 1),
                loss=1.5,
                top_1=0.25 * (epoch + 1),
                top_k=0.9,
                samples=8,
                samples_per_second=100.0,
            )
            record.finish_epoch()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "<b>one $x$", epochs=3, learning_rate=0.1)
    make_run(tmp_path / "runs" / "deep" / "two", epochs=2, learning_rate=0.2, steps_per_epoch=900)
    return ["runs/<b>one $x$", "runs/deep/two"]


def test_report_is_one_page_with_its_pictures(runs):
    result = call(tools.report.main, *runs, "--output=out")
    assert result.status == 0, result.stderr
    assert result.stdout.strip() == "out/report.html" and result.stderr == ""
    page = Path("out/report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    names = ("loss", "accuracy", "learning_rate", "throughput")
    assert [base64.b64decode(p) for p in pictures] == [
        Path(f"out/{name}.png").read_bytes() for name in names
    ]
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs no other file
    assert "<b>one" not in page and "&lt;b&gt;one $x$" in page
    differing = page.partition("Flags that differ")[2].partition("<h2>")[0]
    assert "--learning_rate</td><td>0.1</td><td>0.2" in differing and "num_epochs" not in differing
    assert "3 of 3 epochs" in page and "2 of 3 epochs" in page and "0.75" in page


def test_curves_stand_at_their_epochs(runs):
    one, two = map(read_run, runs)
    assert epochs_done(one, one.of_kind("train"))[:5] == [0.25, 0.5, 0.75, 1, 1.25]
    assert epochs_done(two, two.of_kind("validation")) == [1, 2]
    points = thin([float(i) for i in range(1800)])
    assert len(points) == 360 and points[0] == 2.0 and points[-1] == 1797.0


def test_report_of_a_run_that_goes_on_writes_into_it(runs):
    path = f"{runs[1]}/metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"kind": "tra')
    result = call(tools.report.main, runs[1])
    assert result.status == 0 and os.path.exists(f"{runs[1]}/report/report.html")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["missing"], "missing is not the directory of a run"),
        (["empty"], "has no figures yet"),
        (["damaged"], "line 1 is not one of a run's figures"),
        (["flagged"], "flags.yaml cannot be read"),
        (["runs/deep/two", "--output=/proc/x"], "/proc/x"),
    ],
)
def test_report_of_what_is_not_a_run(runs, argv, words):
    for name, text in (("empty", ""), ("damaged", "{}\n"), ("flagged", "")):
        os.makedirs(name)
        with open(f"{name}/metrics.jsonl", "w") as file:
            file.write(text)
    with open("flagged/flags.yaml", "w") as file:
        file.write("a: [")
    result = call(tools.report.main, *argv)
    assert result.status in (1, 2) and words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_at_the_end_of_a_run_is_a_notice(runs, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "report/loss.png")

    monkeypatch.setattr(cnns.report.curves, "write_curves", full)
    report_curves(runs[1])
    assert capsys.readouterr().err == (
        "Curves: not written, No space left on device: report/loss.png; tools/report.py "
        "runs/deep/two does it.\n"
    )


def lines(result) -> list[str]:
    assert result.status == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines() if line.strip()]


def test_table_of_runs(runs):
    with open("runs/deep/two/flags.yaml", "r+") as file:
        content = yaml.safe_load(file) | {"model": "vgg"}
        file.seek(0)
        yaml.safe_dump(content, file)
    handle = os.open("runs/deep/two", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # as a run that goes on holds it
        *_, one, two = lines(call(tools.runs.main, "runs"))
    finally:
        os.close(handle)
    assert one.startswith("<b>one $x$ finished 3/3 0.7500 (epoch 2) resnet18 0 MiB a & b")
    assert two.startswith("two running 2/3 0.5000 (epoch 1) vgg 0 MiB a & b")
    assert one.endswith("learning_rate=0.1") and two.endswith("learning_rate=0.2")
    assert "two interrupted" in lines(call(tools.runs.main, "runs"))[-1]


def test_prune_keeps_best_last_and_newest(runs):
    for number in (2, 9, 10):
        os.makedirs(f"{runs[0]}/snapshot_epoch_{number}")
        with open(f"{runs[0]}/snapshot_epoch_{number}/model.safetensors", "wb") as file:
            file.write(bytes(3 << 20))
    os.makedirs(f"{runs[0]}/snapshot_best")
    shared = "model.safetensors"
    os.link(f"{runs[0]}/snapshot_epoch_9/{shared}", f"{runs[0]}/snapshot_best/{shared}")
    gone = [f"{runs[0]}/snapshot_epoch_{number}" for number in (2, 9)]
    shown = call(tools.runs.main, "runs", "--prune")
    assert shown.stdout.splitlines() == gone
    assert "2 snapshots, 3 MiB, would be removed" in shown.stderr
    assert all(map(os.path.exists, gone))
    removed = call(tools.runs.main, "runs", "--prune", "--yes")
    assert removed.stdout.splitlines() == gone and "3 MiB, removed" in removed.stderr
    left = [name for name in sorted(os.listdir(runs[0])) if name.startswith("snapshot_")]
    assert left == ["snapshot_best", "snapshot_epoch_10"]


def test_prune_leaves_what_only_has_the_name_of_a_snapshot(runs, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    os.symlink(tmp_path / "elsewhere", f"{runs[0]}/snapshot_epoch_1")
    os.mkfifo(f"{runs[0]}/snapshot_epoch_2")  # to open it would be to wait
    os.symlink(".", f"{runs[0]}/snapshot_epoch_3")
    for number in (4, 5):
        os.makedirs(f"{runs[0]}/snapshot_epoch_{number}")
    removed = call(tools.runs.main, "runs", "--prune", "--yes")
    assert removed.stdout.splitlines() == [f"{runs[0]}/snapshot_epoch_4"]
    left = [name for name in sorted(os.listdir(runs[0])) if name.startswith("snapshot_")]
    assert left == [f"snapshot_epoch_{number}" for number in (1, 2, 3, 5)]
    assert (tmp_path / "elsewhere" / "kept").exists()


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 100)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("git_commit: 5", "git_commit is 5"),
        ("model: {a: b}", "model is an object"),
        ("train_images: [1]", "train_images is a list"),
        ("val_images: x", "val_images is 'x'"),
        ("steps_per_epoch: -1", "steps_per_epoch is -1"),
        ("flags: [1, 2]", "flags is a list of 2"),
        ("flags: {1: 2, a: 3, null: 4}", "a name in flags is 1"),
        ("flags: {model: {a: b}}", "flags.model is an object"),
        ("flags: {model: [[1]]}", "flags.model is a list"),
        ("flags: {model: &a [*a]}", "alias, '*a'"),
        (f"{ALIASES}flags: {{model: *g}}", "alias, '*a'"),
        ("5", "it is 5"),
        ("", "it is None"),
    ],
)
def test_hostile_flags_of_a_run_are_one_line(runs, text, words):
    Path(runs[0], "flags.yaml").write_text(text)
    result = call(tools.report.main, runs[0])
    assert result.status == 1 and len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    table = call(tools.runs.main, "runs")
    assert table.status == 0 and words in table.stderr


def test_a_run_that_has_only_validated(runs):
    path = Path(runs[0], "metrics.jsonl")
    kept = [line for line in path.read_text().splitlines(True) if '"validation"' in line]
    path.write_text("".join(kept))
    assert call(tools.report.main, runs[0]).status == 0
    assert call(tools.runs.main, "runs").status == 0


@pytest.mark.parametrize("argv", [["missing"], ["."], ["runs", "--yes"]])
def test_runs_elsewhere_are_one_line(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    result = call(tools.runs.main, *argv)
    assert result.status == 2 and len(result.stderr.splitlines()) == 1


# A record of a run, in which the values of one file are changed.

ENTRIES = [
    {**{"kind": "train", "epoch": 0, "iteration": 1, "step": 1, "top_1": 0.5, "top_k": 1},
     **{"samples": 8, "samples_per_second": 10.5, "loss": 1.5, "learning_rate": 0.1, "time": 5}},
    {**{"kind": "validation", "epoch": 0, "iteration": 1, "step": 1, "top_1": 0.5, "top_k": 1},
     **{"samples": 8, "samples_per_second": 10.5, "loss": 1.5, "time": 5}},
]  # fmt: skip
ABOUT = {
    **{"started": "2026-01-01T00:00:00+00:00", "git_commit": "abc", "command": ["x"]},
    **{"model": "toy", "train_images": 8, "val_images": 8, "steps_per_epoch": 1},
    "flags": {"num_epochs": 1, "rgb_std": [1.0, 2.0, 3.0], "train_data_dir": None},
}


@pytest.mark.long
@fuzz(100)
@given(
    metrics=st.lists(st.sampled_from(ENTRIES).flatmap(mutated), max_size=3), about=mutated(ABOUT)
)
def test_any_record_of_a_run(tmp_path_factory, metrics, about):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in metrics))
    (folder / "flags.yaml").write_bytes(about)
    with bounded(RunError):
        run = read_run(str(folder))
        if run.metrics:
            cnns.report.curves.make_page([run, run], ["x", "y"], {})
    with bounded():
        assert call(tools.runs.main, str(folder)).status == 0
