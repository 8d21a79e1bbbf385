"""tools/deploy.py: a folder that works elsewhere, and whose card says what was measured."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import deployed
import model_registry
import small
from cnns.checkpoint.snapshot import PREFIX, Snapshot, save_snapshot
from cnns.deploy import variants
from cnns.deploy.gate import wilson
from cnns.export import open_session
from small import TINY, call
from tools import deploy

pytestmark = pytest.mark.long

NAMES = ("black", "grey", "white")
SIZE = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with its data, and the folder that was made of it."""
    root = tmp_path_factory.mktemp("deploy")
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, count).tolist() for count in (20, 21)]
    small.write_parts(root / "validation", labels, num_classes=3)
    pixels = np.stack([small.solid(i % 3, 3, rng) for i in range(12)])
    np.savez(root / "train.npz", images=pixels, labels=np.arange(12) % 3)
    network = TINY.build(3)
    for tensor in network.parameters():
        if tensor.ndim == 1:
            tensor.data.uniform_(0.2, 0.5)
    snapshot = Snapshot("tiny", 3, TINY.preprocessing(image_size=SIZE), classes=NAMES)
    snapshot.flags = {
        "train_data_dir": str(root / "train.npz"),
        "val_data_dir": str(root / "validation"),
        "learning_rate": 0.125,
        "num_epochs": 3,
    }
    (root / "run").mkdir()
    save_snapshot(str(root / "run" / f"{PREFIX}best"), network, snapshot)
    return root


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)


def rows_of(card: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    part = card.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[each.strip() for each in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def folder(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_registry.MODELS, "tiny", TINY)
        made = place / "served"
        result = call(deploy.main, str(place / "run"), f"--output={made}", "--max_drop=100")
    assert result.status == 0, result.stderr
    assert f"Serve it: python3 {made}/serve.py" in result.stdout
    assert len(re.findall(r"^(float32|fp16|int8) ", result.stdout, re.M)) == 3
    return made


def test_the_folder_is_complete_and_its_files_are_as_the_card_says(folder):
    card = (folder / "model_card.md").read_text()
    listed = {name.strip("`"): digest.strip("`") for name, digest in rows_of(card, "Files")}
    found = {path.name for path in folder.iterdir()}
    assert found == {*listed, "model_card.md"} and "pictures.onnx" in found
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    for name in deploy.PROGRAMS:
        assert (folder / name).read_bytes() == (deployed.TEMPLATE / name).read_bytes()
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)


def test_the_figures_of_the_card_are_those_of_the_files(folder, place):
    """Counted again here, with predict.py's own network on the parts."""
    card = (folder / "model_card.md").read_text()
    default = json.loads((folder / "about.json").read_text())["default"]
    data = variants.validation_pictures(
        str(place / "validation"), flags={}, classes=NAMES, num_classes=3
    )
    answers: dict[str, list[int]] = {}
    labels = [data.open(i)[1] for i in range(41)]
    for file in folder.glob("model_*.onnx"):
        batches = data.batches(TINY.preprocessing(image_size=SIZE), 41)
        logits = open_session(str(file)).run(None, {"images": next(batches)[0]})[0]
        answers[file.name] = logits.argmax(axis=1).tolist()
    for file, size, top_1, interval, lost, same, *times in rows_of(card, "Measured"):
        name = file.strip("`")
        hits = sum(a == b for a, b in zip(answers[name], labels, strict=True))
        assert f"({hits} of 41)" in top_1
        low, high = wilson(hits, 41)
        assert interval == f"{low:.2%} to {high:.2%}"
        agreeing = np.mean(np.array(answers[name]) == answers["model_float32.onnx"])
        assert same == f"{agreeing:.2%}"
        assert len(times) == 2 and all(float(each) > 0 for each in times)
        assert float(size.split()[0]) > 0 and float(lost) <= 100
    per_class = rows_of(card, "Each class")
    assert sum(int(row[1]) for row in per_class) == 41
    for name, support, recall, *_ in per_class:
        own = [a for a, b in zip(answers[default], labels, strict=True) if NAMES[b] == name]
        assert int(support) == len(own)
        if own:
            assert recall == f"{own.count(NAMES.index(name)) / len(own):.1%}"
    assert "--learning_rate=0.125" in card and "--num_epochs=3" in card
    assert "Fewer than 30 images" in card


def test_the_folder_works_away_from_the_repository(folder, place, tmp_path):
    away = tmp_path / "elsewhere"
    shutil.copytree(folder, away)
    Image.fromarray(small.solid(2, 3, np.random.default_rng(0))).save(tmp_path / "x.png")
    answers = {}
    for path in away.glob("*.onnx"):
        flags = f"--model={path}", "--output=json", "--top_k=3"
        done = deployed.predict(away, str(tmp_path / "x.png"), *flags)
        assert done.returncode == 0, done.stderr
        classes = json.loads(done.stdout)["classes"]
        answers[path.name] = [
            next(c["probability"] for c in classes if c["name"] == n) for n in NAMES
        ]
    np.testing.assert_allclose(answers["model_fp16.onnx"], answers["model_float32.onnx"], atol=0.01)
    default = json.loads((away / "about.json").read_text())["default"]
    np.testing.assert_allclose(answers["pictures.onnx"], answers[default], atol=0.01)


def test_what_loses_too_much_is_left_out_and_status_1(place, monkeypatch):
    """float32 and fp16 are there all the same, and the card says what was refused."""
    monkeypatch.setattr(deploy, "explain_refusal", lambda *args: "int8 loses 9 points")
    monkeypatch.setattr(variants.Score, "passes", lambda self, most: self.agreement == 1)
    monkeypatch.setattr(variants.Score, "agreement", property(lambda self: 0.9))
    made = place / "refused"
    result = call(deploy.main, str(place / "run"), f"--output={made}", "--precisions", "int8")
    assert result.status == 1 and "int8 loses 9 points" in result.stderr
    assert not (made / "model_int8.onnx").exists() and (made / "model_float32.onnx").exists()
    card = (made / "model_card.md").read_text()
    assert "int8, refused" in card and "Refused: int8 loses 9 points." in card
    assert json.loads((made / "about.json").read_text())["default"] == "model_float32.onnx"


def test_a_place_with_something_else_in_it_is_left_alone(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    result = call(deploy.main, str(place / "run"), f"--output={tmp_path / 'mine'}")
    assert result.status == 2 and "not a folder of tools/deploy.py" in result.stderr
    (tmp_path / "mine" / "model_card.md").write_text("# mine")
    result = call(deploy.main, str(place / "run"), f"--output={tmp_path / 'mine'}")
    assert result.status == 2 and "holds thesis.txt" in result.stderr
    assert Path(tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_one_picture_is_not_enough(place, tmp_path):
    (tmp_path / "few").mkdir()
    deployed.solid("red").save(tmp_path / "few" / "x.png")
    network = TINY.build(3)
    save_snapshot(
        str(tmp_path / f"{PREFIX}last"),
        network,
        Snapshot("tiny", 3, TINY.preprocessing(image_size=SIZE), classes=NAMES),
    )
    result = call(
        deploy.main, str(tmp_path / f"{PREFIX}last"), f"--calibration_dir={tmp_path / 'few'}"
    )
    assert result.status == 2 and "has one picture" in result.stderr


def test_without_labelled_pictures_the_card_says_that_nothing_is_known(
    place, tmp_path, monkeypatch
):
    """Also where the command is not given in the project's directory."""
    monkeypatch.chdir(tmp_path)
    network = TINY.build(3)
    snapshot = Snapshot("tiny", 3, TINY.preprocessing(image_size=SIZE), classes=NAMES)
    save_snapshot(str(tmp_path / f"{PREFIX}last"), network, snapshot)
    made = tmp_path / "served"
    result = call(
        deploy.main, str(tmp_path / f"{PREFIX}last"), f"--output={made}", "--precisions=fp16"
    )
    assert result.status == 0, result.stderr
    assert "accuracy is not measured" in result.stderr
    card = (made / "model_card.md").read_text()
    assert "**Accuracy was not measured**" in card and "Each class" not in card
    assert "random crops of data/cat.jpg and data/coffee.jpg" in card
