"""cnns/report/: the files of an evaluation's report, without a network."""

import csv
import errno
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import cnns.report.evaluation
from cnns.data.format import encode_record
from cnns.data.kinds import Arrays, Shards, Synthetic
from cnns.errors import RunError, UsageError
from cnns.log import Counts
from cnns.report.evaluation import Evaluation, summarise, write_report
from cnns.report.examples import look_up
from cnns.report.folder import FILES, check_report_folder
from cnns.report.metrics import reduce_logits
from cnns.report.sheet import choose_font, draw_sheet
from small import jpeg, solid, tree, write_parts

HOSTILE = ('=cmd|"/c calc"!A1', "<b>,bold\n\u202e", "猫\u0e01", "x" * 500)


def make_arrays(count: int = 12) -> Arrays:
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % 4
    images = np.stack([solid(label, 4, rng) for label in labels])
    return Arrays(path="val.npz", images=images, labels=labels, num_examples=count)


def evaluate(data, logits, labels, names=HOSTILE, top_k: int = 2) -> Evaluation:
    answers = reduce_logits(np.arange(len(labels)), labels, logits)
    counts = Counts(int(answers.right.sum()), len(labels), len(labels), 1.5)
    return Evaluation({"network": "tiny"}, data, names, answers, counts, top_k)


def some_logits(labels, *, num_classes: int = 4, wrong=(1, 6)) -> np.ndarray:
    logits = np.zeros((len(labels), num_classes), np.float32)
    for row, label in enumerate(labels):
        logits[row, (label + 1) % num_classes if row in wrong else label] = 2 + row / 10
    return logits


def read_csv(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_files_of_a_report(tmp_path):
    data = make_arrays()
    logits = some_logits(data.labels)
    logits[3, 0] = np.nan  # of class 3
    evaluation = evaluate(data, logits, data.labels)
    assert write_report(evaluation, str(tmp_path / "a" / "r")) == str(tmp_path / "a/r/report.html")
    folder = tmp_path / "a" / "r"
    assert sorted(os.listdir(folder)) == sorted(FILES)

    rows = read_csv(folder / "predictions.csv")
    assert [int(row["index"]) for row in rows] == list(range(12))
    assert rows[1]["class"] == "<b>,bold\\n\\u202e" and rows[1]["label_1"] == "2"
    assert rows[0]["class_1"] == "'" + HOSTILE[0] and rows[2]["class"] == "猫\u0e01"
    assert rows[3]["label_1"] == rows[3]["class_1"] == rows[3]["probability_1"] == ""
    shares = np.array([[float(row[f"probability_{k}"]) for k in (1, 2, 3, 4)] for row in rows[4:]])
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert float(rows[1]["probability"]) == pytest.approx(1 / (3 + np.exp(2.1)), rel=1e-6)

    with open(folder / "confusion_matrix.csv", newline="") as file:
        head, *matrix = csv.reader(file)
    assert head == ["label", "class", "'" + HOSTILE[0], "<b>,bold\\n\\u202e", *HOSTILE[2:], "none"]
    assert [row[2:] for row in matrix] == [
        ["3", "0", "0", "0", "0"],
        ["0", "2", "1", "0", "0"],
        ["0", "0", "2", "1", "0"],
        ["0", "0", "0", "2", "1"],
    ]
    of_class = read_csv(folder / "classes.csv")
    assert [float(row["accuracy"]) for row in of_class] == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])

    summary = json.loads((folder / "report.json").read_text())
    assert summary["images"] == 12 and summary["top_1"] == 9 / 12 and summary["top_2"] == 1.0
    assert summary["answers_without_confidence"] == 1 and not summary["classes_are_uneven"]
    assert summary["balanced_accuracy"] == pytest.approx(0.75)
    assert sum(each["images"] for each in summary["calibration"]) == 11
    mistakes = summary["most_confident_mistakes"]
    assert [(m["index"], m["label"], m["predicted"]) for m in mistakes] == [(6, 2, 3), (1, 1, 2)]
    assert mistakes[0]["class"] == HOSTILE[2]
    assert [(m["label"], m["predicted"]) for m in summary["most_confused"]] == [(1, 2), (2, 3)]

    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and page.count("data:image/png") == 3
    assert "<b>,bold" not in page and "&lt;b&gt;,bold\\n\\u202e" in page
    for name in ("confusion_matrix.png", "reliability.png", "mistakes.png"):
        with Image.open(folder / name) as image:
            image.load()


def test_many_classes_have_the_cells_that_are_not_zero_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(cnns.report.evaluation, "MAX_DRAWN", 3)
    monkeypatch.setattr(cnns.report.evaluation, "MAX_DENSE", 3)
    data = make_arrays()
    logits = some_logits(data.labels)
    logits[3] = np.nan
    write_report(evaluate(data, logits, data.labels), str(tmp_path))
    assert not (tmp_path / "confusion_matrix.png").exists()
    cells = [
        (row["label"], row["predicted"], row["images"])
        for row in read_csv(tmp_path / "confusion_matrix.csv")
    ]
    assert ("1", "2", "1") in cells and ("3", "-1", "1") in cells and len(cells) == 7


def test_nothing_is_a_number(tmp_path):
    (tmp_path / "mistakes.png").touch()  # of the report that this one replaces
    data = make_arrays(4)
    logits = np.full((4, 4), np.nan, np.float32)
    write_report(evaluate(data, logits, data.labels), str(tmp_path))
    assert not (tmp_path / "mistakes.png").exists()
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["expected_calibration_error"] is summary["mean_confidence"] is None


def test_one_class():
    one = evaluate(make_arrays(4), np.zeros((4, 1)), np.zeros(4, np.int32), names=["only"], top_k=1)
    summary = summarise(one, [])
    assert summary["top_1"] == summary["balanced_accuracy"] == summary["mean_confidence"] == 1


def test_balanced_accuracy_where_classes_are_uneven():
    labels = np.array([0, 0, 0, 0, 1, 1])
    logits = some_logits(labels, num_classes=2, wrong=(4,))
    evaluation = evaluate(Synthetic(num_examples=6), logits, labels, names="ab")
    assert "0.750000" in evaluation.balance_line and "2 to 4 images" in evaluation.balance_line


# Where examples come from.


def write_named_parts(root) -> Shards:
    rng = np.random.default_rng(0)
    names = [["cat/a b.jpg", "cat/\udcff.jpg"], ["=dog.jpg", "dog/damaged.jpg", "dog/last.jpg"]]
    root.mkdir()
    for i, part in enumerate(names):
        with open(root / f"part-{i:05d}", "wb") as file:
            for name in part:
                encoded = jpeg(solid(i, 2, rng))
                encoded = encoded[:200] if "damaged" in name else encoded
                data = encode_record(encoded, i, filename=os.fsencode(name))
                file.write(len(data).to_bytes(8, "little") + data)
    return Shards(path=str(root), suffix_length=5, part_counts=(2, 3), num_examples=4)


def test_names_and_pictures_of_records(tmp_path):
    examples = look_up(write_named_parts(tmp_path / "parts"), {1, 3})
    assert examples.columns == ("part", "record", "filename")
    assert examples.names == [
        ("part-00000", 0, "cat/a b.jpg"),
        ("part-00000", 1, "cat/\udcff.jpg"),
        ("part-00001", 0, "=dog.jpg"),
        ("part-00001", 1, "dog/damaged.jpg"),
    ]
    assert examples.pictures[1].size == (160, 160) and examples.pictures[3] is None


def test_records_without_names_are_read_only_for_pictures(tmp_path):
    parts = write_parts(tmp_path / "parts", [[0, 3], [2, 1, 0]])
    data = Shards(path=str(parts), suffix_length=5, part_counts=(2, 3), num_examples=5)
    examples = look_up(data, {2})
    assert examples.columns == ("part", "record") and examples.names[4] == ("part-00001", 2)
    assert np.asarray(examples.pictures[2]).mean() == pytest.approx(20 + 215 * 2 / 3, abs=3)


def test_parts_that_change_while_they_are_scored(tmp_path):
    data = write_named_parts(tmp_path / "parts")
    os.truncate(tmp_path / "parts" / "part-00001", 0)
    with pytest.raises(RunError, match="part-00001 has changed"):
        look_up(data, {1})
    os.remove(tmp_path / "parts" / "part-00001")
    with pytest.raises(RunError, match="cannot read .*part-00001"):
        look_up(data, {1})


def test_report_of_records_with_a_damaged_picture(tmp_path):
    data = write_named_parts(tmp_path / "parts")
    labels = np.array([0, 0, 1, 1])
    logits = some_logits(labels, num_classes=2, wrong=(1, 3))
    write_report(evaluate(data, logits, labels, names=("cat", "dog")), str(tmp_path / "r"))
    rows = read_csv(tmp_path / "r" / "predictions.csv")
    assert [row["filename"] for row in rows][1:3] == ["cat/\\xff.jpg", "'=dog.jpg"]
    assert (rows[3]["part"], rows[3]["record"], rows[3]["label"]) == ("part-00001", "1", "1")
    summary = json.loads((tmp_path / "r" / "report.json").read_text())
    assert summary["most_confident_mistakes"][0]["filename"] == "dog/damaged.jpg"


def test_text_of_the_sheet():
    _, text = choose_font("3 na\u00efve \u732b\U0010fffd")
    assert text.startswith("3 na\u00efve ") and text.endswith("?")
    sheet = draw_sheet([(None, ["x" * 400, "b"]), (Image.new("RGB", (160, 90)), ["a\nb", "=c"])])
    assert sheet.size[0] < 400 and sheet.getpixel((20, 100)) == (0xDD,) * 3


# The directory.


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_text("mine"), "is not a directory"),
        (lambda path: os.symlink("nowhere", path), "is not a directory"),
        (lambda path: (path.mkdir(), (path / "thesis.txt").touch()), "holds thesis.txt"),
        (lambda path: (path.mkdir(), (path / "predictions.csv").touch()), "holds predictions.csv"),
    ],
)
def test_a_directory_that_is_not_a_reports(tmp_path, make, words):
    make(tmp_path / "r")
    before = tree(tmp_path)
    for path in (
        (tmp_path / "r", tmp_path / "r" / "deeper") if "is not" in words else (tmp_path / "r",)
    ):
        with pytest.raises(UsageError, match=words):
            check_report_folder(str(path))
    assert tree(tmp_path) == before


def test_directories_that_can_be_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    for path in ("new/deeper", "new", "r", str(tmp_path / "r") + "/"):
        check_report_folder(path)
    assert os.listdir() == ["r"]
    (tmp_path / "r" / "report.json").touch()
    (tmp_path / "r" / ".report.tmp-123").mkdir()  # of a process that was killed
    check_report_folder("r")
    with pytest.raises(UsageError, match="cannot write to /proc"):
        check_report_folder("/proc/x")


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, before):
    data = make_arrays()
    evaluation = evaluate(data, some_logits(data.labels), data.labels)
    folder = tmp_path / "r"
    if before:
        write_report(evaluation, str(folder))
    held = tree(tmp_path)

    def full(path, *_):
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(cnns.report.evaluation, "draw_reliability", lambda _, path: full(path))
    with pytest.raises(RunError, match="cannot write the report to .*r: No space left on device"):
        write_report(evaluation, str(folder))
    assert tree(tmp_path) == held and folder.exists() == before
