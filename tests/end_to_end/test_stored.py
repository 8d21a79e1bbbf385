"""Snapshots, parts and an ONNX file that an earlier commit wrote work as they did.

tests/stored was written by commit 86c6264, the last before everything moved to `cnns`, from 12
pictures: 2 epochs of the small network `toy`, and an export of `tiny`.
"""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import model_registry
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
from cnns.checkpoint.find import find_resume
from cnns.export import ExportedModel
from small import MODELS, ROOT, call, validation_figures

# Of the exported file, for a ramp from -1 to 1, as the earlier commit computed them.
LOGITS = (-0.66183037, -0.09573592, 1.5513252, 0.8878234)


@pytest.fixture(autouse=True)
def _stored(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "stored", tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    monkeypatch.setitem(model_registry.MODELS, "toy", MODELS["toy"])


def test_a_run_is_resumed_to_what_it_became():
    resumed = call(
        of_cnn_train_val.main,
        "--device=cpu",
        "--resume=run/snapshot_epoch_0",
        "--model_save_dir=again",
    )
    assert resumed.status == 0, resumed.stderr
    for name in ("model", "training"):
        was = load_file(f"run/snapshot_epoch_1/{name}.safetensors")
        now = load_file(f"again/snapshot_epoch_1/{name}.safetensors")
        assert was.keys() == now.keys()
        for key, array in was.items():  # to the bit on the machine that wrote it
            np.testing.assert_allclose(now[key], array, rtol=1e-4, atol=1e-6)
    found = find_resume("run", None)
    assert (found.path, found.snapshot.step) == ("run/snapshot_epoch_1", 6)
    assert found.snapshot.flags["random_area"] == [0.08, 1.0]


def test_a_snapshot_is_evaluated():
    flags = ("--device=cpu", "--val_data_dir=data/train", "--model_load_dir=run/snapshot_epoch_1")
    result = call(of_cnn_evaluate.main, *flags)
    assert result.status == 0, result.stderr
    # As the earlier commit printed it.
    assert validation_figures(result.stdout) == [("0.250000", "1.000000")]


def test_an_exported_file_classifies():
    """One of the small network `tiny`, with random weights."""
    exported = ExportedModel("tiny.onnx")
    assert (exported.model, list(exported.classes)) == ("tiny", ["a", "b", "c", "d"])
    images = np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)
    np.testing.assert_allclose(exported.logits(images), [LOGITS], rtol=1e-4, atol=1e-5)
    photograph = str(ROOT / "data" / "cat.jpg")
    flags = ("--backend=onnxruntime", "--onnx_path=tiny.onnx", f"--image_path={photograph}")
    result = call(of_cnn_inference.main, *flags)
    assert result.status == 0, result.stderr
    assert result.stdout.splitlines()[0] == photograph
