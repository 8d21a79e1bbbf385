"""What a run says beside its lines: its time, its disk, and that it overfits."""

import os

import pytest

from cnns import advice
from cnns.advice import Outlook, OverfittingWatch, check_disk, duration, most_snapshots, size
from cnns.errors import UsageError
from cnns.graphs import limit_top_k
from cnns.log import Counts
from small import Toy


def test_the_time_of_a_run_is_said_once_after_some_steps(capsys):
    outlook = Outlook(1000)
    outlook.add(4, steps=4, seconds=2.0)
    assert capsys.readouterr().err == ""
    outlook.add(12, steps=8, seconds=4.0)
    outlook.add(20, steps=8, seconds=4.0)
    assert capsys.readouterr().err.splitlines() == [
        "Time left: about 8 min, 0.5 s per iteration; validation and snapshots are not counted."
    ]
    Outlook(1000, images_grow=True).add(20, steps=20, seconds=4.0)
    assert capsys.readouterr().err.endswith(" are not counted, and images that grow take longer.\n")
    Outlook(20).add(20, steps=20, seconds=1.0)  # nothing is left
    assert capsys.readouterr().err == ""


def test_durations_and_sizes_for_a_person():
    times = {40.2: "40 s", 90: "2 min", 3599: "1 h 0 min", 12000: "3 h 20 min", 190000: "2 d 4 h"}
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {999: "999 bytes", 999_900: "1 MB", 204_700_000: "205 MB", 1.234e9: "1.23 GB"}
    assert {num_bytes: size(num_bytes) for num_bytes in sizes} == sizes


def run(*epochs: tuple[int, float]) -> None:
    watch = OverfittingWatch()
    for hits, val_top_1 in epochs:
        watch.add(Counts(hits, hits, 50))
        watch.add(Counts(hits, hits, 50))
        watch.end_epoch(val_top_1, best_epoch=0)


def test_overfitting_is_said_once(capsys):
    run((10, 0.5), (20, 0.4), (30, 0.3), (40, 0.2), (41, 0.1), (42, 0.0))
    (line,) = capsys.readouterr().err.splitlines()
    assert "for 3 epochs validation top_1 has fallen, to 0.2000," in line
    assert "to 0.8000. The best is of epoch 0." in line
    run((10, 0.5), (20, 0.4), (30, 0.3), (40, 0.35), (41, 0.3), (42, 0.2))  # a better one between
    run((10, 0.5), (9, 0.4), (8, 0.3), (7, 0.2), (6, 0.1))  # training falls as well
    watch = OverfittingWatch()
    watch.end_epoch(0.5, best_epoch=0)  # resumed right before validation: nothing was counted
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "count, flags",
    [
        (90, {"keep": None}),
        (5, {"keep": 3}),  # the next is there before the oldest goes, and best is an older one
        (4, {"keep": 3, "validates": False}),
        (7, {"keep": 3, "saves_last": True}),
        (2, {"keep": 3, "num_epochs": 2}),
        (11, {"keep": None, "save_epochs": 9}),
    ],
)
def test_how_many_snapshots_there_are_at_once(count, flags):
    usual = {"num_epochs": 90, "save_epochs": 1, "validates": True, "saves_last": False}
    assert most_snapshots(**usual | flags) == count


def test_the_bytes_of_a_snapshot_are_those_of_weights_and_optimizer():
    parameters = 3 * 4 * 64 + 2 * 4 + 4 * 5 + 5
    statistics = 2 * 4
    for optimizer, buffers in (("sgd", 1), ("adam", 2), ("rmsprop", 1), ("lars", 1), ("lamb", 2)):
        flags = {"optimizer": optimizer, "momentum": 0.9}
        found = advice.snapshot_bytes(Toy(5), flags)
        assert found == (4 * (parameters + statistics), 4 * parameters * buffers)


def test_a_disk_that_cannot_hold_the_snapshots_is_refused(tmp_path, monkeypatch, capsys):
    room = {"count": 4, "weights": 1_000_000, "state": 1_000_000, "save_init": True}
    free = 8_999_000
    usage = type("", (), {"free": free})
    monkeypatch.setattr(advice.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"take up to 9 MB in .* \(4 of 2 MB\), and 9 MB are free"):
        check_disk(str(tmp_path), **room)
    (tmp_path / "held").write_bytes(bytes(1000))  # what a resumed run has is replaced
    os.link(tmp_path / "held", tmp_path / "twin")
    check_disk(str(tmp_path), **room)
    assert "Snapshots: up to 9 MB in" in capsys.readouterr().err
    usage.free -= 1
    with pytest.raises(UsageError, match="smaller --keep_snapshots"):
        check_disk(str(tmp_path), **room)


def test_top_k_is_less_than_the_classes():
    assert [limit_top_k(5, n) for n in (1, 2, 3, 5, 6, 1000)] == [1, 1, 2, 4, 5, 5]
