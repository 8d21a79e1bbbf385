"""Make recipes.npz, the golden file of tests/test_recipes.py, with PyTorch on a CPU.

    python3.11 -m venv venv-torch
    venv-torch/bin/pip install torch==2.13.0
    venv-torch/bin/python tests/golden/make_recipes.py

Each case is 20 steps of a small network with one item of a recipe, in float64. PyTorch's own losses
and optimizers compute it where it has them; LAMB, LARS, the average of weights and what timm makes
of targets are written out from their papers and sources. Nothing here imports the project.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import seeded
import torch
from torch import nn
from torch.nn import functional

FILE = Path(__file__).resolve().parent / "recipes.npz"
NUM_CLASSES, STEPS, SMOOTHING = 5, 20, 0.1
BATCH = {"size": 16, "pixels": 16, "num_classes": NUM_CLASSES}
FIRST_BATCH_SEED, WEIGHTS_SEED = 2000, 30
RATE, MOMENTUM, DECAY = 0.1, 0.875, 0.05


class Smooth(nn.Module):
    """Without a ReLU, on whose edge rounding errors would grow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, image):
        return self.fc(torch.tanh(self.bn(self.conv(image))).mean(dim=(2, 3)))


def make_network() -> nn.Module:
    network = Smooth()
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items() if v.ndim}
    arrays = seeded.any_state(shapes, WEIGHTS_SEED)
    network.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()}, strict=False)
    return network.double().train()


def state(network: nn.Module) -> dict[str, np.ndarray]:
    return {k: v.numpy().copy() for k, v in network.state_dict().items() if v.ndim}


# Losses. A batch is image, label, other label, share of the first label.


def one_hot(label: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(label, NUM_CLASSES).double()


def mixed_target(batch: tuple) -> torch.Tensor:
    _, label, other, share = batch
    share = share[:, None]
    return share * one_hot(label) + (1 - share) * one_hot(other)


def plain(logits, batch):
    return functional.cross_entropy(logits, batch[1], label_smoothing=SMOOTHING)


def mixed(logits, batch):
    """As torchvision's reference: smoothing comes on top of mixing."""
    return functional.cross_entropy(logits, mixed_target(batch), label_smoothing=SMOOTHING)


def bce(logits, batch):
    """As timm: the label gets 1 - s + s/C, all others s/C."""
    off = SMOOTHING / NUM_CLASSES
    target = torch.full_like(logits, off)
    target.scatter_(1, batch[1][:, None], 1 - SMOOTHING + off)
    return functional.binary_cross_entropy_with_logits(logits, target)


def bce_sum(logits, batch):
    return (
        functional.binary_cross_entropy_with_logits(logits, one_hot(batch[1]), reduction="none")
        .sum(1)
        .mean()
    )


def bce_threshold(logits, batch):
    """Mixed, and what is above 0.2 counts as 1, as in A1 to A3."""
    target = (mixed_target(batch) > 0.2).double()
    return functional.binary_cross_entropy_with_logits(logits, target)


# Training.


def make_batch(step: int) -> tuple:
    image, label = seeded.batch(FIRST_BATCH_SEED + step, **BATCH)
    share = seeded.rng_of(FIRST_BATCH_SEED + step, "share").uniform(0, 1, BATCH["size"])
    share = share.astype(np.float32)
    label = torch.tensor(label).long()
    return torch.tensor(image).double(), label, label.roll(1), torch.tensor(share).double()


def sgd(network: nn.Module, **settings) -> torch.optim.Optimizer:
    norms, others = split(network)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others}]
    return torch.optim.SGD(
        groups, **({"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY} | settings)
    )


def split(network: nn.Module) -> tuple[list, list]:
    """Parameters of batch norms, and all others."""
    named = list(network.named_parameters())
    return [p for n, p in named if n.startswith("bn")], [
        p for n, p in named if not n.startswith("bn")
    ]


def train(loss: Callable = plain, optimizer: Callable = sgd) -> dict:
    network = make_network()
    built = optimizer(network)
    losses = []
    for step in range(STEPS):
        batch = make_batch(step)
        value = loss(network(batch[0]), batch)
        built.zero_grad()
        value.backward()
        built.step()
        losses.append(value.item())
    return {"losses": np.array(losses), **prefixed("state", state(network))}


def prefixed(prefix: str, arrays: dict) -> dict:
    return {f"{prefix}/{key}": value for key, value in arrays.items()}


CASES: dict[str, Callable[[], dict]] = {
    "plain": train,
    "mixed": lambda: train(mixed),
    "bce": lambda: train(bce),
    "bce_sum": lambda: train(bce_sum),
    "bce_threshold": lambda: train(bce_threshold),
}


def main() -> None:
    content = {"torch": torch.__version__, "steps": STEPS, "smoothing": SMOOTHING}
    content |= {"rate": RATE, "momentum": MOMENTUM, "decay": DECAY}
    content |= {"first_batch_seed": FIRST_BATCH_SEED, "weights_seed": WEIGHTS_SEED}
    content |= prefixed("batch", BATCH)
    for name, run in CASES.items():
        result = run()
        print(f"{name}: {result['losses'].round(3).tolist()}")
        content |= prefixed(name, result)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
