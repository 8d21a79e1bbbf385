"""Items of training recipes, each in 20 steps against PyTorch (golden/make_recipes.py).

The network has no ReLU, so that rounding errors do not grow: losses and weights agree with float64
to some 1e-6. What a fault would make is seen between the cases, which all start alike.
"""

from pathlib import Path

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

import optimizer_util
from cnns.checkpoint.snapshot import state_arrays
from cnns.distributed import place, to_device
from cnns.graphs import TrainGraph
from cnns.losses import build_loss
from golden import seeded
from small import ballast

PLACEMENT = flow.env.all_device_placement("cpu")
with np.load(Path(__file__).resolve().parent / "golden" / "recipes.npz") as file:
    GOLDEN = {key: array[()] for key, array in file.items()}
BATCH = {k: GOLDEN[f"batch/{k}"].item() for k in ("size", "pixels", "num_classes")}
STEPS, RATE, DECAY = (GOLDEN[name].item() for name in ("steps", "rate", "decay"))
SGD = {"momentum": GOLDEN["momentum"].item()}


class Smooth(nn.Module):
    """As in golden/make_recipes.py."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, BATCH["num_classes"])

    def forward(self, image):
        x = flow.tanh(self.bn(self.conv(image))).mean(dim=(2, 3))
        return self.fc(x) + ballast(image.placement)


def network() -> nn.Module:
    model = Smooth()
    shapes = {name: array.shape for name, array in state_arrays(model).items()}
    for name, array in seeded.any_state(shapes, GOLDEN["weights_seed"].item()).items():
        model.state_dict()[name].copy_(flow.tensor(array))
    return place(model, "cpu").train()


class Given(nn.Module):
    """A loader of batches that the test hands over."""

    def forward(self, *batch):
        return batch


def batch(step: int, *, mixed: bool = False) -> tuple[flow.Tensor, ...]:
    seed = GOLDEN["first_batch_seed"].item() + step
    image, label = seeded.batch(seed, **BATCH)
    arrays = [image, label]
    if mixed:
        share = seeded.rng_of(seed, "share").uniform(0, 1, BATCH["size"]).astype(np.float32)
        arrays += [np.roll(label, 1), share]
    return tuple(to_device(array, PLACEMENT) for array in arrays)


def build(
    model: nn.Module, *, loss=None, optimizer: str = "sgd", loader=None, **settings
) -> TrainGraph:
    given = {"learning_rate": RATE, "weight_decay": DECAY} | settings
    if optimizer == "sgd":
        given = SGD | given
    built = optimizer_util.build_optimizer(model, optimizer, **given)
    smoothing = GOLDEN["smoothing"].item()
    loss = loss or build_loss("cross_entropy", label_smoothing=smoothing)
    return TrainGraph(model, loader or Given(), built, loss=loss, top_k=2)


def check(
    name: str, losses: list[float], model: nn.Module, rtol: float = 2e-5, *, values=GOLDEN
) -> None:
    np.testing.assert_allclose(losses, values[f"{name}/losses"], rtol=rtol)
    arrays = state_arrays(model)
    for key, array in arrays.items():
        golden = values[f"{name}/state/{key}"]
        error = np.linalg.norm(array - golden) / np.linalg.norm(golden)
        assert error < 5 * rtol, (key, error)


def losses_of(graph: TrainGraph, *, mixed: bool = False) -> list[float]:
    return [float(graph(*batch(step, mixed=mixed))[0].numpy()) for step in range(STEPS)]


LOSSES = {
    "plain": {},
    "mixed": {},
    "bce": {"name": "bce"},
    "bce_sum": {"name": "bce", "label_smoothing": 0.0, "sum_classes": True},
    "bce_threshold": {"name": "bce", "label_smoothing": 0.0, "target_threshold": 0.2},
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses(case):
    settings = {"name": "cross_entropy", "label_smoothing": GOLDEN["smoothing"].item()}
    model = network()
    graph = build(model, loss=build_loss(**(settings | LOSSES[case])))
    check(case, losses_of(graph, mixed=case in ("mixed", "bce_threshold")), model)


def test_hits_of_mixed_rows_are_those_of_the_larger_share():
    """With a rate of 0 all steps see the same network: hits are how often it says a class."""
    graph = build(network(), learning_rate=0.0)
    image = batch(0)[0]

    def hits(label: int, other: int, share: float) -> int:
        rows = [np.full(BATCH["size"], n, np.int32) for n in (label, other)]
        rows.append(np.full(BATCH["size"], share, np.float32))
        return int(graph(image, *(to_device(each, PLACEMENT) for each in rows))[1].numpy())

    said = [hits(label, 0, 1.0) for label in range(BATCH["num_classes"])]
    assert sum(said) == BATCH["size"] and max(said) > min(said)
    most, least = int(np.argmax(said)), int(np.argmin(said))
    for share, label in ((0.5, most), (0.51, most), (0.49, least), (0.0, least)):
        assert hits(most, least, share) == said[label]
