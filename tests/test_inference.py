"""Classifying many images: what is read, in which form it is written, and by which backend."""

import csv
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import of_cnn_inference
import resnet_to_onnx
from cnns import graphs
from cnns.graphs import PredictGraph
from small import ROOT, TINY, call, script, solid
from test_onnx import NAMES, save

FILES = ["photos/a.png", "photos/b.jpg", "photos/c.png", "photos/d.png", "photos/e.jpg"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a snapshot, its export and five pictures; made once."""
    import model_registry

    root = tmp_path_factory.mktemp("inference")
    before = os.getcwd()
    os.chdir(root)
    model_registry.MODELS["tiny"] = TINY
    try:
        save("tiny", seed=1)
        os.mkdir("photos")
        rng = np.random.default_rng(0)
        for i, path in enumerate(FILES):
            Image.fromarray(solid(i, 5, rng, size=50)).save(path)
        result = call(resnet_to_onnx.main, "--image_path", "photos")
        assert result.status == 0, result.stderr
    finally:
        del model_registry.MODELS["tiny"]
        os.chdir(before)
    return root


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    import model_registry

    monkeypatch.chdir(place)
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)


def classify(*argv: str):
    return call(of_cnn_inference.main, *argv)


def rows(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.long
def test_a_folder_in_batches_gives_what_single_images_give(monkeypatch):
    compiled = []

    class Counting(PredictGraph):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            compiled.append(self)

    monkeypatch.setattr(graphs, "PredictGraph", Counting)
    results = [classify("--image_path", "photos", f"--batch_size={n}") for n in (1, 2, 8)]
    assert all(result.status == 0 for result in results), results[0].stderr
    assert len(compiled) == 3  # the last, partial batch is filled up
    lines = [result.stdout.splitlines() for result in results]
    assert lines[0][::2] == FILES
    assert all(re.fullmatch(r"[01]\.\d+ (black|gray|white)", line) for line in lines[0][1::2])
    for other in lines[1:]:
        assert other[::2] == FILES
        for one, two in zip(lines[0][1::2], other[1::2], strict=True):
            assert one.split()[1] == two.split()[1]
            assert float(one.split()[0]) == pytest.approx(float(two.split()[0]), abs=1e-6)


@pytest.mark.long
def test_the_backends_agree():
    flags = "--image_path", "photos", "--output=csv", "--top_k=3", "--batch_size=2"
    ours, theirs = classify("--device=cpu", *flags), classify("--backend=onnxruntime", *flags)
    assert theirs.stderr == "Restoring model from onnx/model/run_epoch_0.onnx.\n"
    assert len(rows(ours.stdout)) == 15
    for one, two in zip(rows(ours.stdout), rows(theirs.stdout), strict=True):
        assert [one[k] for k in ("path", "rank", "name")] == [
            two[k] for k in ("path", "rank", "name")
        ]
        assert float(one["probability"]) == pytest.approx(float(two["probability"]), abs=1e-5)


def test_csv_and_json_say_what_text_says():
    flags = "--backend=onnxruntime", "--image_path", "photos", "--top_k=2"
    text = classify(*flags).stdout.splitlines()
    found = rows(classify(*flags, "--output=csv").stdout)
    assert list(found[0]) == ["path", "rank", "class", "name", "probability"]
    objects = [json.loads(line) for line in classify(*flags, "--output=json").stdout.splitlines()]
    assert [each["path"] for each in objects] == FILES == text[::3]
    for i, each in enumerate(objects):
        for k, entry in enumerate(each["classes"]):
            row = found[2 * i + k]
            assert (row["path"], int(row["rank"])) == (each["path"], k + 1) and entry[
                "rank"
            ] == k + 1
            assert row["name"] == entry["name"] == NAMES[entry["class"]] == NAMES[int(row["class"])]
            assert float(row["probability"]) == entry["probability"]
            assert text[3 * i + 1 + k] == f"{row['probability']} {row['name']}"


def test_paths_come_on_standard_input_one_after_the_other():
    command = [sys.executable, str(ROOT / "of_cnn_inference.py"), "--backend=onnxruntime"]
    with subprocess.Popen(
        [*command, "--image_path", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        run.stdin.write(f"{FILES[1]}\n")
        run.stdin.flush()
        assert run.stdout.readline() == f"{FILES[1]}\n"  # before the next one is there
        assert re.fullmatch(r"0\.\d+ (black|gray|white)\n", run.stdout.readline())
        out, err = run.communicate("\nnowhere.png\nphotos\n")
    assert run.returncode == 1
    assert out.splitlines()[::2] == FILES
    assert "there is no file or directory nowhere.png" in err and "1 of 7 files" in err


def test_standard_input_stands_alone_and_holds_something():
    result = classify("--image_path", "-", "photos")
    assert result.status == 2 and "- must be the only path" in result.stderr
    result = script(
        "of_cnn_inference.py", "--backend=onnxruntime", "--image_path=-", cwd=os.getcwd()
    )
    assert result.status == 1 and "held no paths" in result.stderr


def test_bad_files_are_reported_and_the_rest_goes_on(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    for backend in ("oneflow", "onnxruntime"):
        result = classify(
            f"--backend={backend}", "--batch_size=2", "--image_path", FILES[0], str(bad), *FILES[1:]
        )
        assert result.status == 1
        assert result.stdout.splitlines()[::2] == FILES
        assert f"{bad} is not an image" in result.stderr and "1 of 6 files" in result.stderr
    result = classify("--backend=onnxruntime", f"--image_path={bad}")
    assert (result.status, result.stdout) == (1, "") and len(result.stderr.splitlines()) == 2


def test_a_bad_path_among_others_is_named_and_the_others_are_classified(tmp_path):
    link, empty = tmp_path / "link.png", tmp_path / "empty"
    link.symlink_to("nowhere.png")
    empty.mkdir()
    flags = "--backend=onnxruntime", "--image_path"
    result = classify(*flags, FILES[0], str(link), FILES[1], str(empty), "nowhere", *FILES[2:])
    assert result.status == 1 and result.stdout.splitlines()[::2] == FILES
    lines = result.stderr.splitlines()[1:]
    for line, words in zip(lines, (str(link), str(empty), "nowhere", "3 of 8 files"), strict=True):
        assert "error: " in line and words in line
    result = classify(*flags, str(link), "nowhere")
    assert (result.status, result.stdout) == (2, "") and str(link) in result.stderr
    assert len(result.stderr.splitlines()) == 1


HOSTILE = "d/\x1b[2J\u732b\x9b\u202e.png"


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C"},
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in ({}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"})
        ),
    ],
    ids=lambda each: "-".join(each.values()) or "utf-8",
)
def test_names_that_a_terminal_cannot_print_or_would_obey(tmp_path, environment):
    (tmp_path / "d").mkdir()
    (tmp_path / HOSTILE).write_bytes((ROOT / "data" / "cat.jpg").read_bytes())
    bad = b"d/\xff\x1b[31m.png"
    (tmp_path / os.fsdecode(bad)).write_text("no image")
    flags = f"--onnx_path={os.getcwd()}/onnx/model/run_epoch_0.onnx", "--image_path=d"
    for output in ("text", "csv", "json"):
        done = subprocess.run(
            [sys.executable, ROOT / "of_cnn_inference.py", "--backend=onnxruntime", *flags,
             f"--output={output}"],
            cwd=tmp_path, env=os.environ | environment, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr
        assert b"\x1b" not in done.stderr and b"is not an image" in done.stderr
        if output == "text":
            assert b"\\x1b[2J" in done.stdout
            for control in ("\x1b", "\x9b", "\u202e"):
                assert control.encode() not in done.stdout
        elif output == "json":
            (line,) = done.stdout.splitlines()
            assert json.loads(line)["path"] == HOSTILE
        else:
            (row,) = rows(done.stdout.decode("latin-1"))
            assert row["rank"] == "1"


def test_links_of_a_folder_and_large_pictures_are_named_and_the_rest_is_classified(tmp_path):
    picture = solid(0, 5, np.random.default_rng(0), size=50)
    for name in ("in/a.png", "outside.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name)
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "c.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "dangling.png").symlink_to("nothing.png")
    flags = "--backend=onnxruntime", "--max_pixels=3000", "--image_path"
    result = classify(*flags, str(tmp_path / "in"), str(tmp_path / "dangling.png"))
    assert result.status == 1
    assert result.stdout.splitlines()[::2] == [str(tmp_path / "in" / "a.png")]
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert "b.png is not an image that can be read: a picture of 60 x 60 pixels" in lines[0]
    assert "c.png is a link to" in lines[1]
    assert "dangling.png is a link to nothing.png, which is not there" in lines[2]
    assert "3 of 4 files could not be read" in lines[3]


def test_a_folder_is_read_with_those_below_it_and_what_is_skipped_is_named(tmp_path):
    """Paths stand without a flag, beside others."""
    picture = Image.fromarray(solid(0, 5, np.random.default_rng(0), size=50))
    names = ("b.png", "a/z.png", "a/deep/y.png", "c/x.png", ".hidden/w.png")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "in" / name)
    (tmp_path / "in" / "a" / "notes.txt").write_text("x")
    (tmp_path / "out").mkdir()
    picture.save(tmp_path / "out" / "v.png")
    (tmp_path / "in" / "a" / "loop").symlink_to("..")
    (tmp_path / "in" / "d").symlink_to("c")
    (tmp_path / "in" / "e").symlink_to("../out")
    root = str(tmp_path / "in")
    result = classify(root, "--backend=onnxruntime", FILES[0])
    expected = [os.path.join(root, name) for name in (names[0], names[1], names[2], names[3])]
    assert sorted(result.stdout.splitlines()[::2]) == sorted([*expected, FILES[0]])
    assert result.status == 1
    assert f"Left out, not named like images (1): {root}/a/notes.txt." in result.stderr
    lines = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert f"{root}/d is the same directory as {root}/c" in lines[0]
    assert f"{root}/e is a link to {tmp_path}/out; give that to have it read" in lines[1]
    assert f"{root}/a/loop is the same directory as {root}" in lines[2]
    assert "3 of 8 files could not be read" in lines[3] and len(lines) == 4


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("--onnx_path=x.onnx",),
            "--onnx_path has no effect with --backend=oneflow; it belongs to --backend=onnxruntime",
        ),
        (("--backend=onnxruntime", "--model_load_dir=x"), "--model_load_dir contradicts"),
        (("--backend=onnxruntime", "--fuse_bn_relu"), "--fuse_bn_relu contradicts"),
        (("--backend=onnxruntime", "--device=cuda"), "--device=cuda contradicts"),
        (("--backend=onnxruntime", "--onnx_path=x.onnx"), "there is no file x.onnx"),
    ],
)
def test_flags_that_contradict_are_refused(flags, words):
    result = classify("--image_path", "photos", *flags)
    assert (result.status, result.stdout) == (2, "") and words in result.stderr
    assert len(result.stderr.splitlines()) == 1
