"""Export: equal, described, free in the batch, whole; and what is wrong is found."""

import json
import os
import re
from pathlib import Path

import numpy as np
import oneflow as flow
import onnx
import onnxruntime
import pytest
from oneflow import nn
from PIL import Image

import model_registry
import of_cnn_evaluate
import resnet_to_onnx
import small
from cnns.checkpoint.find import restore
from cnns.checkpoint.snapshot import PREFIX, Snapshot, save_snapshot
from cnns.data.images import load_image
from cnns.deploy.gate import Score
from cnns.errors import RunError, UsageError
from cnns.export import ExportedModel, find_export
from cnns.models.model import Model
from small import ROOT, TINY, call, tree

pytestmark = pytest.mark.long

SIZE = 64  # pixels
PHOTOGRAPHS = [str(ROOT / "data" / name) for name in ("cat.jpg", "coffee.jpg")]
NAMES = ("black", "gray", "white")


class Flat(nn.Module):
    """With a layer of the kind whose export freezes the batch: a reshape to a constant."""

    def __init__(self, num_classes: int, switches=None):
        super().__init__()
        self.body = small.Tiny(num_classes)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Linear(16, num_classes)

    def forward(self, image):
        return self.body(image) + self.fc(self.pool(self.conv(image)).flatten(1))


class Odd(Flat):
    """With an operation that oneflow-onnx does not know."""

    def forward(self, image):
        return flow.expm1(self.body(image))


def save(model: str, *, num_classes: int = 3, name: str = "epoch_0", seed: int = 0) -> str:
    """A snapshot in ./output/snapshots/run of a network with random weights."""
    flow.manual_seed(seed)
    network = model_registry.MODELS[model].build(num_classes)
    for tensor in network.parameters():
        if tensor.ndim == 1:  # the last gamma of a block begins as 0, which would hide the block
            nn.init.uniform_(tensor, 0.2, 0.5)
    snapshot = Snapshot(
        model,
        num_classes,
        model_registry.MODELS[model].preprocessing(image_size=SIZE),
        classes=NAMES if num_classes == 3 else None,
    )
    os.makedirs("output/snapshots/run", exist_ok=True)
    path = f"output/snapshots/run/{PREFIX}{name}"
    save_snapshot(path, network, snapshot)
    return path


def export(*argv: str):
    return call(resnet_to_onnx.main, "--image_path", *PHOTOGRAPHS, *argv)


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    for name, build in (("flat", Flat), ("odd", Odd)):
        monkeypatch.setitem(model_registry.MODELS, name, Model(build, image_size=SIZE))
    monkeypatch.setitem(model_registry.MODELS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)


def images(batch: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, 3, size, size), np.float32)


def test_the_newest_snapshot_is_exported_and_equal():
    path = save("tiny")
    result = export()
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    file = "onnx/model/run_epoch_0.onnx"
    assert lines[0] == f"Convert to onnx success! >>  {file}"
    for i, photograph in enumerate(PHOTOGRAPHS):
        found = lines[1 + 3 * i : 4 + 3 * i]
        assert found[:2] == [photograph, "Are the results equal? Yes"]
        assert re.fullmatch(r"Class: (black|gray|white); score: 0\.\d+", found[2])
    assert len(lines) == 7
    assert result.stderr.splitlines()[0] == f"Restoring model from {path}."
    assert re.search(r"Largest difference: \S+, of logits up to", result.stderr)
    assert len(result.stderr.splitlines()) == 2
    assert [str(p) for p in Path("onnx").rglob("*") if p.is_file()] == [file]
    # What the file says of itself.
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape) == ("images", ["batch", 3, SIZE, SIZE])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])
    held = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    fields = vars(model_registry.MODELS["tiny"].preprocessing(image_size=SIZE)).items()
    assert held == {
        "format_version": 1,
        "model": "tiny",
        "snapshot": "snapshot_epoch_0",
        "run": "run",
        "classes": list(NAMES),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in fields},
    }
    # The check says the same again, of the file alone.
    again = export(f"--onnx_path={file}", "--check_only")
    assert (again.status, again.stdout.splitlines()) == (0, lines[1:])


@pytest.mark.parametrize("opset, external", [(9, False), (13, True), (21, False)])
def test_opsets_external_data_and_any_batch(opset, external, tmp_path):
    snapshot = save("flat")
    result = export(f"--opset={opset}", f"--external_data={external}", "--onnx_path=a/b.onnx")
    assert result.status == 0, result.stderr
    assert sorted(tree(tmp_path / "a")) == ["b.onnx", *(["b.onnx.data"] if external else [])]
    onnx.checker.check_model("a/b.onnx")
    model = onnx.load("a/b.onnx")
    assert model.opset_import[0].version == opset
    network, *_ = restore(snapshot, model=None, num_classes=None, models=model_registry.MODELS)
    exported = ExportedModel("a/b.onnx")
    for batch in (1, 3, 8):
        ours = resnet_to_onnx.Reference(network).logits(images(batch))
        np.testing.assert_allclose(exported.logits(images(batch)), ours, rtol=1e-4, atol=1e-5)
    # The next one, of the other kind, leaves no weights of this one behind.
    assert export(f"--external_data={not external}", "--onnx_path=a/b.onnx").status == 0
    assert sorted(tree(tmp_path / "a")) == ["b.onnx", *([] if external else ["b.onnx.data"])]


def tamper(model: onnx.ModelProto) -> None:
    """Change one weight by little."""
    tensor = next(each for each in model.graph.initializer if len(each.dims) == 4)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] += 0.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def test_a_changed_weight_is_found(monkeypatch, tmp_path):
    save("tiny")
    assert export().status == 0
    before, right = tree(tmp_path / "onnx"), resnet_to_onnx.convert

    def wrong(*args, **kwargs):
        model = right(*args, **kwargs)
        tamper(model)
        return model

    monkeypatch.setattr(resnet_to_onnx, "convert", wrong)
    result = export()
    assert result.status == 1
    assert "Are the results equal? No" in result.stdout and "success" not in result.stdout
    assert "run_epoch_0.onnx differs from" in result.stderr and "it was not kept" in result.stderr
    assert tree(tmp_path / "onnx") == before
    # And in a file that is there.
    path = "onnx/model/run_epoch_0.onnx"
    model = onnx.load(path)
    tamper(model)
    onnx.save(model, path)
    result = export("--check_only")
    assert result.status == 1 and "differs from" in result.stderr


def test_equality_is_of_logits_and_of_probabilities():
    ours = np.array([[10.0, 1e-7, -3.0]], np.float32)
    assert resnet_to_onnx.are_equal(ours + 1e-5, ours)
    assert not resnet_to_onnx.are_equal(ours + 2e-3, ours)  # which softmax would not see
    assert not resnet_to_onnx.are_equal(np.full_like(ours, np.nan), ours)
    assert not resnet_to_onnx.are_equal(ours[:, :2], ours)


def test_what_cannot_be_exported_or_written_is_one_line(tmp_path):
    save("odd")
    result = export()
    assert result.status == 1 and "oneflow-onnx cannot export" in result.stderr
    assert len(result.stderr.splitlines()) == 2 and "success" not in result.stdout
    assert not list(Path("onnx").rglob("*.onnx"))
    save("tiny", name="epoch_1")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.onnx").mkdir()
    for flag, words in (
        ("--onnx_path=file/x.onnx", "file is a file"),
        ("--onnx_path=taken.onnx", "taken.onnx is a directory"),
        ("--onnx_path=x.pb", "must end in .onnx"),
        ("--opset=22", "at most 21"),
        ("--opset=8", "at least 9"),
    ):
        result = export(flag)
        assert (result.status, result.stdout) == (2, "") and words in result.stderr, flag
    result = export("--check_only", "--opset=13")
    assert result.status == 2 and "--opset has no effect" in result.stderr


def with_metadata(path: str, **changes) -> str:
    """A copy of an exported file that says something else of itself."""
    model = onnx.load(path)
    held = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, held | {k: json.dumps(v) for k, v in changes.items()})
    onnx.save(model, "changed.onnx")
    return "changed.onnx"


def test_files_that_are_damaged_or_lie_are_one_line():
    save("tiny")
    assert export("--onnx_path=whole.onnx").status == 0
    data = Path("whole.onnx").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        spoiled = bytearray(data)
        # Near the ends is the structure, in between are weights.
        place = int(rng.integers(0, 4000)) * int(rng.choice([1, -1]))
        spoiled[place] ^= int(rng.integers(1, 256))
        Path("spoiled.onnx").write_bytes(spoiled)
        try:
            ExportedModel("spoiled.onnx")
        except RunError:
            refused += 1
    assert refused > 20
    for changes in (
        {"interpolation": "foo"},
        {"image_size": "x"},
        {"image_size": -3},
        {"image_size": 32},
        {"resize_shorter": None},
        {"rgb_mean": [1, 2]},
        {"rgb_std": [0, 0, 0]},
        {"classes": ["one"]},
        {"classes": [1, 2, 3]},
        {"format_version": 2},
    ):
        with pytest.raises(RunError):
            ExportedModel(with_metadata("whole.onnx", **changes))


def test_a_file_that_cannot_be_replaced_stays(monkeypatch, tmp_path):
    save("tiny")
    assert export("--onnx_path=a/x.onnx", "--external_data").status == 0
    before, rename = tree(tmp_path / "a"), os.replace

    def failing(source, target):
        if target == "a/x.onnx" and not source.endswith(".old"):
            raise OSError(5, "Input/output error", target)
        rename(source, target)

    monkeypatch.setattr(resnet_to_onnx.os, "replace", failing)
    for external in (True, False):
        result = export("--onnx_path=a/x.onnx", f"--external_data={external}")
        assert result.status == 1 and "cannot write a/x.onnx" in result.stderr
        assert "success" not in result.stdout
        assert tree(tmp_path / "a") == before
    monkeypatch.undo()
    (tmp_path / "x.onnx.data").mkdir()
    monkeypatch.chdir(tmp_path)
    result = export(f"--onnx_path={tmp_path}/x.onnx")
    assert result.status == 2


def test_an_export_that_is_killed_is_tidied_up_by_the_next(monkeypatch, tmp_path):
    """Killed before each rename, and after the last; the old file and its weights come back."""
    save("tiny")
    assert export("--onnx_path=a/x.onnx", "--external_data").status == 0
    before, rename = tree(tmp_path / "a"), os.replace
    for moment in range(5):
        renames = iter(range(moment))

        def killed(source, target, renames=renames):
            if next(renames, None) is None:
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(resnet_to_onnx.os, "replace", killed)
            patch.setattr(resnet_to_onnx.shutil, "rmtree", lambda *_, **__: None)
            export("--onnx_path=a/x.onnx", "--external_data")
        (left,) = Path("a").glob(".x.onnx.tmp-*")
        left.rename("a/.x.onnx.tmp-1")
        with resnet_to_onnx.staging("a/x.onnx"):
            pass
        assert sorted(os.listdir("a")) == ["x.onnx", "x.onnx.data"]
        if moment < 4:
            assert tree(tmp_path / "a") == before
    assert export("--onnx_path=a/x.onnx", "--check_only").status == 0


def test_a_file_of_something_else_is_refused_by_name(tmp_path):
    save("tiny")
    assert export().status == 0
    model = onnx.load("onnx/model/run_epoch_0.onnx")
    del model.metadata_props[:]
    onnx.save(model, "other.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for path, words in (("other", "not a file of resnet_to_onnx.py"), ("broken", "cannot read")):
        with pytest.raises(RunError, match=words):
            ExportedModel(f"{path}.onnx")
    with pytest.raises(UsageError, match="there is no file"):
        find_export("nowhere.onnx")
    save("tiny", num_classes=4, name="epoch_1")
    result = export("--check_only", "--onnx_path=onnx/model/run_epoch_0.onnx")
    assert result.status == 1 and "differ in classes" in result.stderr


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, count).tolist() for count in (9, 5, 7)]
    small.write_parts(tmp_path / "validation", labels, num_classes=3)
    pixels = np.stack([small.solid(n, 3, rng) for n in sum(labels, [])])
    np.savez(tmp_path / "validation.npz", images=pixels, labels=np.array(sum(labels, [])))
    return tmp_path


def evaluate(*argv: str):
    return call(of_cnn_evaluate.main, "--top_k=2", "--val_batch_size_per_device=4", *argv)


def test_evaluation_by_both_backends_gives_the_same_figures(data):
    save("tiny", seed=3)
    assert export().status == 0
    for held in ("validation", "validation.npz"):
        flags = f"--val_data_dir={data / held}", "--num_val_examples=18"
        theirs = evaluate("--backend=onnxruntime", f"--report=theirs-{held}", *flags)
        ours = evaluate("--device=cpu", f"--report=ours-{held}", *flags)
        assert theirs.status == ours.status == 0, theirs.stderr + ours.stderr
        figures = small.validation_figures(theirs.stdout)
        assert figures == small.validation_figures(ours.stdout) and len(figures) == 1
        assert (float(figures[0][0]) * 18) % 1 < 1e-4 or (float(figures[0][0]) * 18) % 1 > 0.9999
        assert theirs.stdout.splitlines()[0] == (
            "Restoring model from onnx/model/run_epoch_0.onnx."
        )
        one, other = (f"{name}-{held}/confusion_matrix.csv" for name in ("theirs", "ours"))
        assert Path(one).read_text() == Path(other).read_text()


@pytest.mark.parametrize(
    "flag",
    ["--model=tiny", "--image_size=64", "--use_fp16", "--device=cuda", "--gpu_num_per_node=2",
     "--model_load_dir=x", "--rgb_mean=1,2,3"],
)  # fmt: skip
def test_flags_that_contradict_the_backend(flag):
    result = evaluate("--val_data_dir=x", "--backend=onnxruntime", flag)
    assert result.status == 2 and "contradict" in result.stderr
    assert flag.split("=")[0] in result.stderr and len(result.stderr.splitlines()) == 1


def test_onnx_path_needs_its_backend():
    result = evaluate("--val_data_dir=x", "--onnx_path=x.onnx")
    assert (
        result.status == 2
        and "--onnx_path has no effect with --backend=oneflow; it belongs to --backend=onn"
        in result.stderr
    )


def test_names_that_are_not_utf_8(tmp_path):
    snapshot = save("tiny", name="epoch_0\udcff")
    result = export("--onnx_path=b.onnx", f"--model_load_dir={snapshot}")
    assert result.status == 0, result.stderr
    assert tree(tmp_path).keys() >= {"b.onnx"}
    for flag in ("--onnx_path=b\udcff.onnx", f"--model_load_dir={snapshot}"):
        result = export(flag)  # named after the snapshot, unless it is named
        assert result.status == 2 and "is not UTF-8" in result.stderr, result.stderr
    assert [name for name in tree(tmp_path) if name.endswith(".onnx")] == ["b.onnx"]


# For deployment.


@pytest.fixture
def own_data(data, monkeypatch):
    """A snapshot of a run on data of its own."""

    original = Snapshot

    def save_with_flags(*argv, **settings):
        snapshot = original(*argv, **settings)
        snapshot.flags = {
            "train_data_dir": str(data / "validation.npz"),
            "val_data_dir": str(data / "validation"),
        }
        return snapshot

    monkeypatch.setitem(globals(), "Snapshot", save_with_flags)
    return data


def test_any_size_is_proved_at_another_one_or_refused():
    snapshot = save("tiny")
    assert export("--dynamic_size", "--opset=13", "--onnx_path=any.onnx").status == 0
    onnx.checker.check_model(onnx.load("any.onnx"), full_check=True)
    session = onnxruntime.InferenceSession("any.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    network, *_ = restore(snapshot, model=None, num_classes=None, models=model_registry.MODELS)
    odd = np.random.default_rng(0).standard_normal((2, 3, 70, 90)).astype(np.float32)
    ours = resnet_to_onnx.Reference(network).logits(odd)
    np.testing.assert_allclose(session.run(None, {"images": odd})[0], ours, rtol=1e-4, atol=1e-5)
    assert ExportedModel("any.onnx").logits(images(1)).shape == (1, 3)  # --backend=onnxruntime
    save("flat", name="epoch_1")  # adaptive pooling, which is slices
    result = export("--dynamic_size", "--onnx_path=flat.onnx")
    assert result.status == 1 and "needs images of one size" in result.stderr
    assert not os.path.exists("flat.onnx")


def test_a_file_that_takes_pictures():
    save("tiny")
    result = export("--preprocess", "--softmax", "--onnx_path=pictures.onnx")
    assert result.status == 0, result.stderr
    assert re.search(r"Pixels against of_cnn_inference.py's: mean 0\.0\d+", result.stderr)
    onnx.checker.check_model("pictures.onnx", full_check=True)
    assert export("--onnx_path=plain.onnx").status == 0
    plain, session = ExportedModel("plain.onnx"), onnxruntime.InferenceSession("pictures.onnx")
    for path in PHOTOGRAPHS:
        picture = np.asarray(Image.open(path).convert("RGB"))[None]
        ours = plain.probabilities(load_image(path, plain.preprocessing)[None])
        (theirs,) = session.run(["probabilities"], {"pictures": picture})
        np.testing.assert_allclose(theirs, ours, atol=2e-3)
    with pytest.raises(RunError, match="exported with --preprocess"):
        ExportedModel("pictures.onnx")
    for flags, words in (
        (["--opset=17"], "needs at least 18"),
        (["--dynamic_size"], "drop --dynamic_size"),
        (["--check_only"], "--preprocess has no effect"),
    ):
        result = export("--preprocess", *flags)
        assert result.status == 2 and words in result.stderr


def test_int8_of_the_run_s_own_data_passes_the_gate_or_is_not_written(own_data, monkeypatch):
    save("tiny", seed=3)
    result = export("--precision=int8", "--max_drop=100", "--onnx_path=small.onnx")
    assert result.status == 0, result.stderr
    assert re.search(r"int8: \d+ of 21 right, \d+ in float32; the first answer", result.stderr)
    assert ExportedModel("small.onnx").precision == "int8"
    kinds = {t.data_type for t in onnx.load("small.onnx").graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    before = Path("small.onnx").read_bytes()
    monkeypatch.setattr(Score, "drop", property(lambda self: 12.5))
    result = export("--precision=int8", "--onnx_path=small.onnx")
    assert result.status == 1 and "success" not in result.stdout
    assert "int8 loses 12.50 points" in result.stderr and "--max_drop=0.5" in result.stderr
    assert re.search(r"when they alone are int8: model\S+ \(\d+%\)", result.stderr)
    assert Path("small.onnx").read_bytes() == before
    result = export("--check_only", "--onnx_path=small.onnx")
    assert result.status == 1 and "is int8" in result.stderr


def test_a_smaller_one_needs_data(data):
    save("tiny")
    result = export("--precision=fp16")
    assert result.status == 2 and "--val_data_dir is needed" in result.stderr
    result = export("--precision=int8", f"--val_data_dir={data / 'validation'}")
    assert result.status == 2 and "--calibration_dir is needed" in result.stderr
    result = export("--max_drop=1")
    assert result.status == 2 and "--max_drop has no effect" in result.stderr
    result = export("--precision=fp16", f"--val_data_dir={data / 'validation.npz'}")
    assert result.status == 0, result.stderr


def test_the_check_prints_images_of_the_run_s_own_validation_data(own_data):
    save("tiny")
    result = call(resnet_to_onnx.main)
    assert result.status == 0, result.stderr
    named = [line for line in result.stdout.splitlines() if ", image " in line]
    assert len(named) == 2 and all(str(own_data / "validation") in line for line in named)
