"""Sizes of training images that grow over a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnns.stages import TrainSizes, make_train_sizes, stage_sizes


@pytest.mark.parametrize(
    ("first", "last", "stages", "sizes"),
    [
        (160, 224, 4, (160, 184, 200, 224)),
        (128, 300, 4, (128, 184, 240, 300)),  # EfficientNetV2-S (arXiv:2104.00298, table 6)
        (160, 224, 2, (160, 224)),
        (99, 101, 4, (99, 99, 101, 101)),
    ],
)
def test_sizes_of_stages(first, last, stages, sizes):
    assert stage_sizes(first, last, stages) == sizes


@given(st.integers(8, 400), st.integers(1, 200), st.integers(1, 40), st.integers(2, 100))
def test_every_epoch_has_a_size_and_sizes_grow(first, more, num_epochs, stages):
    flags = {"train_image_size": first + more, "first_train_image_size": first}
    flags |= {"train_size_stages": stages, "num_epochs": num_epochs}
    sizes = make_train_sizes(flags, image_size=999)
    found = [sizes.at(epoch) for epoch in range(num_epochs + 3)]
    assert found == sorted(found) and found[-1] == found[num_epochs - 1] == first + more
    assert found[0] == first or num_epochs == 1
    if num_epochs >= stages and len(set(sizes.sizes)) == stages:
        counts = [found[:num_epochs].count(size) for size in sizes.sizes]
        assert sum(counts) == num_epochs and max(counts) - min(counts) <= 1


def test_one_size_unless_asked_for_more():
    flags = {"train_image_size": None, "first_train_image_size": None}
    flags |= {"train_size_stages": 4, "num_epochs": 9}
    assert make_train_sizes(flags, image_size=224) == TrainSizes((224,), 9)
    assert not make_train_sizes(flags | {"train_image_size": 176}, image_size=224).grow
