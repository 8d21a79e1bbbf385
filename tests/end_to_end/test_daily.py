"""docs/daily.md from top to bottom: its commands on fewer pictures, and what they leave.

The network is the page's, with its installed weights.
"""

import base64
import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cnns.checkpoint.snapshot import read_description
from cnns.record import COLUMNS, read_metrics
from small import ROOT, validation_figures

DOCS = ROOT / "docs"
PAGE = (DOCS / "daily.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
WRAPPERS = ("train.sh", "evaluate.sh", "inference.sh")
PER_CLASS = 10  # so one of each class, and 10 in all, are for validation
RUN = Path("output/snapshots/first")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's directory, as far as the page needs it, with the Python of this test."""
    root = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "tools", ROOT / "data"):
        (root / path.name).symlink_to(path)
    for name in WRAPPERS:
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "env.sh").write_text('python="$PWD/.venv/bin/python3"\n')
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (root / ".venv" / "bin" / "activate").write_text(f'PATH="{python.parent}:$PATH"\n')
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What the package of Fashion-MNIST holds: here squares whose place is that of their class."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    labels = np.arange(10 * PER_CLASS, dtype=np.uint8) % 10
    images = rng.integers(0, 40, (len(labels), 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        x, y = 2 + 5 * (label % 5), 2 + 14 * (label // 5)
        image[y : y + 10, x : x + 5] = 255
    for name, header, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        content = gzip.compress(bytes(header) + data.tobytes())
        (root / f"train-{name}-ubyte.gz").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def said(project, source) -> list[str]:
    """What the blocks of the page print, one after the other; of output, what came before."""
    printed = [""]
    environ = os.environ | {"NUM_EPOCH": "2"}
    environ.pop("PYTHONPATH", None)
    for language, text in BLOCKS:
        text = text.replace("--image_size=48", "--image_size=32")
        text = text.replace("/usr/share/datasets/fashion-mnist", str(source))
        if language == "python":
            command = [sys.executable, "-c", text]
        elif language == "sh":
            command = ["sh", "-euc", f". .venv/bin/activate\n{text}"]
        else:
            printed.append(printed[-1])
            continue
        done = subprocess.run(
            command,
            cwd=project,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        printed.append(done.stdout)
    return printed[1:]


def mask(line: str) -> str:
    """A line without its figures, times, sizes, the place of Python, and what NUM_EPOCH gives."""
    line = re.sub(r"photos-[0-9a-f]{12}", "photos-STAMP", " ".join(line.split()))
    line = re.sub(r"\S*python3 ", "python3 ", line).replace("--num_epochs=10 ", "")
    line = re.sub(r"\d[\d.]*", "0", line)
    return re.sub(r"0 (h 0 min|min|s)\b|0 [kMG]?B", "0 UNIT", line)


def test_the_page_shows_what_is_printed(said):
    shown = 0
    for (language, text), printed in zip(BLOCKS, said, strict=True):
        lines = {mask(line) for line in printed.splitlines()}
        for line in text.splitlines() if language == "text" else ():
            if line != "...":
                assert mask(line) in lines, f"{line}\n{printed}"
                shown += 1
    assert shown > 20


def test_every_file_that_the_page_names_is_there(project, said):
    quoted = re.findall(r"`([\w./-]+\.(?:html|csv|jsonl|yaml|txt|png|onnx))`", PAGE)
    assert len(quoted) >= 10
    for name in quoted:
        places = [project / RUN / name, project / name]
        assert any(place.exists() for place in places), name
    assert sorted(name for name in os.listdir(project / RUN) if name.startswith("snapshot_")) == [
        *(f"snapshot_{name}" for name in ("best", "epoch_1", "initial_model", "last"))
    ]
    with Image.open(project / "sheet.png") as sheet:
        assert sheet.width > 800


def test_the_run_is_what_was_asked_for(project, said):
    run = project / RUN
    flags = yaml.safe_load((run / "flags.yaml").read_text())["flags"]
    asked = {"model": "efficientnet_lite0", "image_size": 32, "num_epochs": 2, "finetune": True}
    assert asked.items() <= flags.items()
    second = yaml.safe_load((run.parent / "second" / "flags.yaml").read_text())["flags"]
    assert {name for name in flags if flags[name] != second.get(name)} == {"random_area"}
    steps = -(-9 * PER_CLASS // 8)
    entries = read_metrics(str(run / "metrics.jsonl"))
    assert [each["step"] for each in entries if each["kind"] == "validation"] == [steps, 2 * steps]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert tuple(rows[0]) == COLUMNS and [row["epoch"] for row in rows] == ["0", "1"]


def test_its_reports_are_of_it(project, said):
    run = project / RUN
    page = (run / "report" / "report.html").read_text()
    names = ("loss", "accuracy", "learning_rate", "throughput")
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert pictures == [(run / "report" / f"{name}.png").read_bytes() for name in names]
    about = json.loads((run / "evaluation" / "report.json").read_text())
    best = read_description(str(run / "snapshot_best"))
    assert about["top_1"] == best.metrics["val_top_1"] and about["images"] == PER_CLASS
    rows = list(csv.reader((run / "evaluation" / "predictions.csv").open()))
    (shown,) = (text for language, text in BLOCKS if language == "csv")
    head = shown.splitlines()[0].removesuffix("...").strip(",").split(",")
    assert rows[0][: len(head)] == head and len(rows) == 1 + PER_CLASS
    assert all((project / "photos" / row[2]).exists() for row in rows[1:])
    matrix = list(csv.reader((run / "evaluation" / "confusion_matrix.csv").open()))
    assert sum(int(cell) for row in matrix[1:] for cell in row[2:]) == PER_CLASS
    page = (project / "comparison" / "report.html").read_text()
    differing = page.partition("Flags that differ")[2].partition("<h2>")[0]
    assert re.findall(r"<td>(--\w+)", differing) == ["--random_area"]
    # The exported file scores what the snapshot of the second run scores.
    best = read_description(str(run.parent / "second" / "snapshot_best"))
    assert validation_figures(said[-1])[-1][0] == f"{best.metrics['val_top_1']:.6f}"


def test_the_pictures_of_the_page_are_small():
    pictures = re.findall(r"\]\(([\w-]+\.png)\)", PAGE)
    assert len(pictures) >= 4
    for name in pictures:
        assert (DOCS / name).stat().st_size < 60_000
