"""Device memory that training takes: the table that tests/fakecuda/memory.py prints."""

import re

import pytest

import memory

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shrinks_with_half_precision(capsys):
    # Large enough for the search for cuDNN's algorithms, 1 GiB and a bit, not to be the peak.
    memory.main(["--model=resnet18", "--image_size=224", "--batch_sizes", "128", "256"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == 2 + len(memory.PRECISIONS)
    small, large = [[float(n) for n in re.findall(r"\d+\.\d", row)] for row in rows]
    for few, many in zip(small, large, strict=True):
        assert 1.2 * few < many < 2 * few
    float32, fp16, fused = large
    assert max(fp16, fused) < 0.8 * float32


def test_the_peak_is_found():
    """The least that training takes is the search for algorithms, with a workspace of 1 GB."""
    peak = memory.peak_bytes(model="toy", image_size=32, batch_size=2)
    assert 0 < peak < 1.2 * 2**30


@pytest.mark.slow
def test_images_that_grow_take_the_memory_of_the_largest():
    """And that of the search for cuDNN's algorithms, 1 GiB and a bit, at the same time."""
    settings = {"model": "resnet18", "image_size": 224, "batch_size": 128}
    alone = memory.peak_bytes("--num_epochs=3", **settings)
    flags = ("--num_epochs=3", "--first_train_image_size=192", "--train_size_stages=3")
    assert memory.peak_bytes(*flags, **settings) < alone + 1.5 * 2**30
