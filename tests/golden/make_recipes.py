"""Make recipes.npz, the golden file of tests/test_recipes.py, with PyTorch on a CPU.

    python3.11 -m venv venv-torch
    venv-torch/bin/pip install torch==2.13.0
    venv-torch/bin/python tests/golden/make_recipes.py

Each case is 20 steps of a small network with one item of a recipe, in float64. PyTorch's own losses
and optimizers compute it where it has them; LAMB, LARS, the average of weights and what timm makes
of targets are written out from their papers and sources. Nothing here imports the project.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import seeded
import torch
from torch import nn
from torch.nn import functional

FILE = Path(__file__).resolve().parent / "recipes.npz"
NUM_CLASSES, STEPS, SMOOTHING = 5, 20, 0.1
BATCH = {"size": 16, "pixels": 16, "num_classes": NUM_CLASSES}
FIRST_BATCH_SEED, WEIGHTS_SEED = 2000, 30
RATE, MOMENTUM, DECAY, WARMUP_STEPS = 0.1, 0.875, 0.05, 5


class Smooth(nn.Module):
    """Without a ReLU, on whose edge rounding errors would grow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, image):
        return self.fc(torch.tanh(self.bn(self.conv(image))).mean(dim=(2, 3)))


def make_network(kind: type[nn.Module] = Smooth) -> nn.Module:
    network = kind()
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
    return [p for n, p in named if "bn" in n], [p for n, p in named if "bn" not in n]


NORM_DECAY, BIAS_DECAY = 0.02, 0.2


def kinds(network: nn.Module) -> torch.optim.Optimizer:
    """A weight decay for batch norms, one for other biases, one for weights."""
    norms, others = split(network)
    biases = [p for p in others if p.ndim == 1]
    groups = [
        {"params": norms, "weight_decay": NORM_DECAY},
        {"params": biases, "weight_decay": BIAS_DECAY},
        {"params": [p for p in others if p.ndim > 1], "weight_decay": DECAY},
    ]
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    norms, others = split(network)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": DECAY}]
    return torch.optim.AdamW(groups, lr=ADAM_RATE, eps=1e-8)


ADAM_RATE, WARMUP_DECAY, MINIMUM, POWER = 0.02, 0.01, 0.03, 2.0


def torchvision_schedule(optimizer: torch.optim.Optimizer) -> Any:
    """Warm-up from a share of the peak, then a cosine to a minimum, by step and not by epoch."""
    schedulers = torch.optim.lr_scheduler
    warmup = schedulers.LinearLR(optimizer, WARMUP_DECAY, total_iters=WARMUP_STEPS)
    cosine = schedulers.CosineAnnealingLR(optimizer, STEPS - WARMUP_STEPS, eta_min=MINIMUM)
    return schedulers.SequentialLR(optimizer, [warmup, cosine], [WARMUP_STEPS])


def polynomial(optimizer: torch.optim.Optimizer) -> Any:
    schedulers = torch.optim.lr_scheduler
    warmup = schedulers.LinearLR(optimizer, WARMUP_DECAY, total_iters=WARMUP_STEPS)
    rest = schedulers.PolynomialLR(optimizer, STEPS - WARMUP_STEPS, power=POWER)
    return schedulers.SequentialLR(optimizer, [warmup, rest], [WARMUP_STEPS])


def train(
    loss: Callable = plain, optimizer: Callable = sgd, schedule: Callable | None = None
) -> dict:
    network = make_network()
    built = optimizer(network)
    scheduler = schedule and schedule(built)
    losses = []
    for step in range(STEPS):
        batch = make_batch(step)
        value = loss(network(batch[0]), batch)
        built.zero_grad()
        value.backward()
        built.step()
        if scheduler:
            scheduler.step()
        losses.append(value.item())
    return {"losses": np.array(losses), **prefixed("state", state(network))}


def prefixed(prefix: str, arrays: dict) -> dict:
    return {f"{prefix}/{key}": value for key, value in arrays.items()}


def frozen() -> dict:
    """Only the last layer trains, with statistics as they are; clipped over what is left."""
    network = make_network()
    for parameter in (*network.conv.parameters(), *network.bn.parameters()):
        parameter.requires_grad_(False)
    network.bn.eval()
    optimizer = torch.optim.SGD(
        network.fc.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
    )
    losses = []
    for step in range(STEPS):
        batch = make_batch(step)
        loss = plain(network(batch[0]), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.fc.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": np.array(losses), **prefixed("state", state(network))}


# Gradients of several batches for one update.

PARTS, CLIP = 4, 0.5


def warmup_cosine(step: int) -> float:
    if step < WARMUP_STEPS:
        return RATE * step / WARMUP_STEPS
    return RATE * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS))) / 2


def accumulate() -> dict:
    """Clipped over the mean of the gradients; the rate is counted in updates."""
    network = make_network()
    optimizer, losses = sgd(network), []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for rows in np.split(np.arange(BATCH["size"]), PARTS):
            batch = [each[rows] for each in make_batch(step)]
            loss = plain(network(batch[0]), batch) / PARTS
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step)
        optimizer.step()
        losses.append(total)
    return {"losses": np.array(losses), **prefixed("state", state(network))}


# LARS and LAMB, written out, and a rate for each layer; all clipped, with a rate by steps.

TRUST, LARS_RATE, LAMB_RATE, LAMB_EPSILON, LAYER_DECAY = 0.02, 2.0, 0.05, 1e-6, 0.5


class Lars:
    """arXiv:1708.03888, algorithm 1; biases and batch norms without the ratio of norms."""

    def __init__(self):
        self.v = {}

    def update(self, key, w, g, decay, rate, t):
        ratio = TRUST * w.norm() / (g.norm() + decay * w.norm()) if w.ndim > 1 else 1.0
        self.v[key] = MOMENTUM * self.v.get(key, 0.0) + LARS_RATE * rate * ratio * (g + decay * w)
        return w - self.v[key]


class Lamb:
    """arXiv:1904.00962, algorithm 2; biases and batch norms without the ratio of norms."""

    def __init__(self):
        self.m, self.v = {}, {}

    def update(self, key, w, g, decay, rate, t):
        self.m[key] = 0.9 * self.m.get(key, 0.0) + 0.1 * g
        self.v[key] = 0.999 * self.v.get(key, 0.0) + 0.001 * g**2
        m, v = self.m[key] / (1 - 0.9**t), self.v[key] / (1 - 0.999**t)
        r = m / (v.sqrt() + LAMB_EPSILON) + decay * w
        ratio = w.norm() / r.norm() if w.ndim > 1 else 1.0
        return w - LAMB_RATE * rate * ratio * r


def written_out(rule: Any) -> dict:
    network = make_network()

    def step(number: int) -> None:
        with torch.no_grad():
            for key, w in network.named_parameters():
                decay = 0.0 if key.startswith("bn") else DECAY
                w.copy_(rule.update(key, w, w.grad, decay, share_of_peak(number), number + 1))

    return clipped(network, step)


def layered(make: Callable) -> dict:
    """Half the rate for all but the last layer, in groups of PyTorch's own optimizers."""
    network = make_network()
    optimizer = make(
        [
            {"params": network.conv.parameters(), "factor": LAYER_DECAY},
            {"params": network.bn.parameters(), "factor": LAYER_DECAY, "weight_decay": 0.0},
            {"params": network.fc.parameters(), "factor": 1.0},
        ]
    )
    peak = optimizer.defaults["lr"]

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = peak * share_of_peak(number) * group["factor"]
        optimizer.step()

    return clipped(network, step)


def share_of_peak(step: int) -> float:
    return warmup_cosine(step + 1) / RATE


def clipped(network: nn.Module, step: Callable[[int], None]) -> dict:
    losses = []
    for number in range(STEPS):
        batch = make_batch(number)
        loss = plain(network(batch[0]), batch)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        step(number)
        losses.append(loss.item())
    return {"losses": np.array(losses), **prefixed("state", state(network))}


def layered_sgd(groups: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)


def layered_adamw(groups: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=ADAM_RATE, weight_decay=DECAY, eps=1e-8)


# Stochastic depth, with torchvision's formula for rows.

DROP = 0.5


class Residual(Smooth):
    """Two blocks of ResNet-18 behind a convolution; the second is left out for some images."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, image, noise):
        x = torch.tanh(self.bn(self.conv(image)))
        for block, factor in zip(self.blocks, (None, noise), strict=True):
            x = block(x, factor)
        return self.fc(x.mean(dim=(2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x, noise):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu((y if noise is None else y * noise) + x)


def row_noise(step: int) -> torch.Tensor:
    """Of each image (N, 1, 1, 1): 1 with the probability of survival, divided by that, or 0."""
    kept = seeded.rng_of(FIRST_BATCH_SEED + step, "drop").uniform(0, 1, BATCH["size"]) >= DROP
    return torch.tensor(kept / (1 - DROP)).reshape(-1, 1, 1, 1)


def stochastic_depth() -> dict:
    network = make_network(Residual)
    optimizer, losses = sgd(network), []
    for step in range(STEPS):
        batch = make_batch(step)
        loss = plain(network(batch[0], row_noise(step)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": np.array(losses), **prefixed("state", state(network))}


# The average of weights, with the rules of torchvision's reference script.

EMA = {"decay": 0.9995, "interval": 2, "steps_per_epoch": 5, "warmup_epochs": 1}


def average() -> dict:
    network, epochs = make_network(), STEPS // EMA["steps_per_epoch"]
    share = min(1.0, (1 - EMA["decay"]) * BATCH["size"] * EMA["interval"] / epochs)
    averaged = torch.optim.swa_utils.AveragedModel(
        network, avg_fn=lambda mean, now, n: (1 - share) * mean + share * now, use_buffers=True
    )
    optimizer = sgd(network)
    for step in range(STEPS):
        epoch, iteration = divmod(step, EMA["steps_per_epoch"])
        batch = make_batch(step)
        loss = plain(network(batch[0]), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % EMA["interval"] == 0:
            averaged.update_parameters(network)
            if epoch < EMA["warmup_epochs"]:
                averaged.n_averaged.fill_(0)
    return prefixed("average", state(averaged.module))


CASES: dict[str, Callable[[], dict]] = {
    "plain": train,
    "mixed": lambda: train(mixed),
    "bce": lambda: train(bce),
    "bce_sum": lambda: train(bce_sum),
    "bce_threshold": lambda: train(bce_threshold),
    "kinds": lambda: train(optimizer=kinds),
    "nesterov": lambda: train(optimizer=partial(sgd, nesterov=True)),
    "adamw": lambda: train(optimizer=adamw),
    "schedule": lambda: train(schedule=torchvision_schedule),
    "polynomial": lambda: train(schedule=polynomial),
    "freeze": frozen,
    "accumulate": accumulate,
    "lars": lambda: written_out(Lars()),
    "lamb": lambda: written_out(Lamb()),
    "layered_sgd": lambda: layered(layered_sgd),
    "layered_adam": lambda: layered(layered_adamw),
    "stochastic_depth": stochastic_depth,
    "ema": average,
}


def main() -> None:
    torch.set_num_threads(1)
    content = {"torch": torch.__version__, "steps": STEPS, "smoothing": SMOOTHING}
    content |= {"norm_decay": NORM_DECAY, "bias_decay": BIAS_DECAY, "adam_rate": ADAM_RATE}
    content |= {"warmup_decay": WARMUP_DECAY, "minimum": MINIMUM, "power": POWER}
    content |= {"trust": TRUST, "lars_rate": LARS_RATE, "lamb_rate": LAMB_RATE}
    content |= {"lamb_epsilon": LAMB_EPSILON, "layer_decay": LAYER_DECAY}
    content |= {"drop": DROP}
    content |= {"parts": PARTS, "clip": CLIP, "warmup_steps": WARMUP_STEPS}
    content |= {"rate": RATE, "momentum": MOMENTUM, "decay": DECAY}
    content |= {"first_batch_seed": FIRST_BATCH_SEED, "weights_seed": WEIGHTS_SEED}
    content |= prefixed("batch", BATCH) | prefixed("ema", EMA)
    for name, run in CASES.items():
        result = run()
        print(name, *result.get("losses", np.zeros(0)).round(3))
        content |= prefixed(name, result)
    np.savez_compressed(FILE, **content)


if __name__ == "__main__":
    main()
