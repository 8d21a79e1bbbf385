"""predict.py of a deployed folder, away from this repository, against the project's own code."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import deployed
import predict
from cnns.data.images import load_image
from cnns.errors import RunError
from cnns.export import ExportedModel
from small import ROOT

pytestmark = pytest.mark.long

PHOTOGRAPHS = [str(ROOT / "data" / name) for name in ("cat.jpg", "coffee.jpg")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return deployed.make_folder(tmp_path_factory.mktemp("predict") / "served")


def pictures(tmp_path) -> list[str]:
    """Of every kind that the project reads."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), np.uint16))
    half = rgb.convert("RGBA")
    half.putalpha(Image.fromarray(rng.integers(0, 256, (37, 53), np.uint8)))
    made = {
        "rgb.png": (rgb, {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "grey.png": (rgb.convert("L"), {}),
        "deep.png": (deep, {}),
        "float.tif": (Image.fromarray(rng.random((20, 30)).astype(np.float32)), {}),
        "palette.gif": (rgb.convert("P"), {}),
        "half.png": (half, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "tall.png": (rgb.resize((20, 400)), {}),
        "small.png": (rgb.resize((5, 4)), {}),
    }
    for name, (image, more) in made.items():
        image.save(tmp_path / name, **more)
    return [*PHOTOGRAPHS, *(str(tmp_path / name) for name in made)]


def test_a_picture_becomes_the_same_array_as_in_the_project(folder, tmp_path):
    network = predict.Network(str(folder / "model.onnx"))
    for path in pictures(tmp_path):
        theirs = network.prepare(predict.read_picture(path))
        np.testing.assert_array_equal(theirs, load_image(path, deployed.PREPROCESSING), path)


def test_bad_pictures_are_bad_for_both(tmp_path):
    for name, data in {
        "empty.png": b"",
        "text.png": b"hello",
        "cut.jpg": Path(PHOTOGRAPHS[0]).read_bytes()[:3000],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(predict.BadPicture):
            predict.read_picture(str(tmp_path / name))
        with pytest.raises(RunError):
            load_image(str(tmp_path / name), deployed.PREPROCESSING)
    with pytest.raises(predict.TooLarge):
        predict.read_picture(PHOTOGRAPHS[0], max_pixels=1000)


def test_the_command_in_its_three_forms(folder, tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("red", "deeper/blue"):
        deployed.solid(name.rpartition("/")[2]).save(tmp_path / "in" / f"{name}.png")
    where = str(tmp_path / "in")
    text = deployed.predict(folder, where, "--batch_size=2").stdout.splitlines()
    assert [line.split()[-1] for line in text[1::2]] == ["red", "blue"]
    assert text[0::2] == [f"{where}/red.png", f"{where}/deeper/blue.png"]
    rows = list(csv.DictReader(io.StringIO(deployed.predict(folder, where, "--output=csv").stdout)))
    assert [(row["rank"], row["class"], row["name"]) for row in rows] == [
        ("1", "0", "red"),
        ("1", "2", "blue"),
    ]
    lines = deployed.predict(folder, where, "--output=json", "--top_k=3").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [each["classes"][0]["name"] for each in answers] == ["red", "blue"]
    total = sum(each["probability"] for each in answers[0]["classes"])
    assert abs(total - 1) < 1e-6


def test_a_file_that_cannot_be_read_is_a_line_and_status_1(folder, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    deployed.solid("green").save(tmp_path / "green.png")
    done = deployed.predict(folder, str(tmp_path))
    assert done.returncode == 1 and done.stdout.splitlines()[1].endswith("green")
    assert len(done.stderr.splitlines()) == 1 and "not a picture" in done.stderr
    done = deployed.predict(folder, str(folder))
    assert done.returncode == 1 and "no pictures" in done.stderr


def test_files_of_other_tools(folder, tmp_path):
    """With metadata that are not JSON, as quantisers leave them, and with none at all."""
    model = deployed.network()
    assert any(entry.value == "onnxruntime.quant" for entry in model.metadata_props)
    onnx.save(model, str(tmp_path / "marked.onnx"))
    exported = ExportedModel(str(tmp_path / "marked.onnx"))  # --backend=onnxruntime
    image = load_image(PHOTOGRAPHS[0], deployed.PREPROCESSING)[None]
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    answers = []
    for name in ("marked", "bare"):
        flags = f"--model={tmp_path / name}.onnx", "--output=json", "--top_k=3"
        done = deployed.predict(folder, PHOTOGRAPHS[0], *flags)
        assert done.returncode == 0, done.stderr
        answers.append({c["name"]: c["probability"] for c in json.loads(done.stdout)["classes"]})
    ours = dict(zip(deployed.CLASSES, exported.probabilities(image)[0].tolist(), strict=True))
    assert answers[0] == answers[1] == pytest.approx(ours, rel=1e-5)


def test_what_is_not_a_network_is_one_line(folder, tmp_path):
    (tmp_path / "x.onnx").write_text("hello")
    done = deployed.predict(folder, PHOTOGRAPHS[0], f"--model={tmp_path / 'x.onnx'}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_folder_runs_in_an_environment_of_its_own_requirements(folder, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "own")], check=True)
    python = str(tmp_path / "own" / "bin" / "python3")
    install = [python, "-m", "pip", "install", "-q", "-r", str(folder / "requirements.txt")]
    subprocess.run(install, check=True, env=deployed.environment())
    theirs = deployed.predict(folder, *PHOTOGRAPHS, "--output=json", python=python)
    ours = deployed.predict(folder, *PHOTOGRAPHS, "--output=json")
    assert theirs.returncode == 0 and theirs.stdout == ours.stdout
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert "oneflow" not in listed and "onnxruntime" in listed
