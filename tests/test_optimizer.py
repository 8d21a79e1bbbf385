"""Optimizers and schedules inside a graph, against their formulas."""

import math

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

import graph_util
import optimizer_util
from small import ballast, tiny

LR, WD, EPS = 0.1, 0.05, 1e-3


class Toy(nn.Module):
    """A weight that decays and a batch norm that does not; its loss gives known gradients."""

    def __init__(self, weight, gamma):
        super().__init__()
        self.fc = nn.Linear(len(weight), 1, bias=False)
        self.bn = nn.BatchNorm2d(len(gamma))
        self.fc.weight.data.copy_(flow.tensor(weight[None]))
        self.bn.weight.data.copy_(flow.tensor(gamma))

    def forward(self, a, b):
        """Gradient `a` for the weight, `b` for gamma, 1e-9 for beta (it must be in the graph)."""
        return (self.fc.weight * a).sum() + (self.bn.weight * b).sum() + 1e-9 * self.bn.bias.sum()


class ToyGraph(nn.Graph):
    def __init__(self, model, optimizer, schedule=None):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)  # as TrainGraph does
        self.config.allow_fuse_model_update_ops(True)
        self.model = model
        self.add_optimizer(optimizer, **({} if schedule is None else {"lr_sch": schedule}))

    def build(self, a, b):
        loss = self.model(a, b) + ballast(a.placement)
        loss.backward()
        return loss


def everywhere(array):
    placement = flow.env.all_device_placement("cpu")
    return flow.tensor(np.float32(array)).to_global(placement, flow.sbp.broadcast)


def run(name, gradients, *, clip=0.0, **settings):
    """Weights and gammas after each step."""
    weight, gamma = np.float32([1.0, -2.0, 3.0]), np.float32([0.5, 2.0])
    model = graph_util.place(Toy(weight, gamma), "cpu")
    optimizer = optimizer_util.build_optimizer(
        model,
        name,
        learning_rate=LR,
        weight_decay=WD,
        gradient_clipping=clip,
        **settings,
    )
    graph = ToyGraph(model, optimizer)
    history = []
    for a, b in gradients:
        graph(everywhere([a]), everywhere(b)).numpy()
        history.append((model.fc.weight.numpy()[0].copy(), model.bn.weight.numpy().copy()))
    return history


def reference(name, gradients, *, clip=0.0, momentum=0.0, decay_rate=0.0):
    values = {"w": np.float64([1.0, -2.0, 3.0]), "g": np.float64([0.5, 2.0])}
    first = {key: np.zeros_like(value) for key, value in values.items()}
    second = {key: np.zeros_like(value) for key, value in values.items()}
    history = []
    for t, (a, b) in enumerate(gradients, 1):
        grads = {"w": np.float64(a), "g": np.float64(b)}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for key, value in values.items():
            decay = WD if key == "w" else 0.0
            grad = grads[key] * scale
            if name != "adam":
                grad = grad + decay * value
            if name == "sgd":
                first[key] = momentum * first[key] + grad
                values[key] = value - LR * first[key]
            elif name == "rmsprop":
                second[key] = decay_rate * second[key] + (1 - decay_rate) * grad**2
                values[key] = value - LR * grad / np.sqrt(second[key] + EPS)
            else:
                first[key] = 0.9 * first[key] + 0.1 * grad
                second[key] = 0.999 * second[key] + 0.001 * grad**2
                m, v = first[key] / (1 - 0.9**t), second[key] / (1 - 0.999**t)
                values[key] = value - LR * (m / (np.sqrt(v) + EPS) + decay * value)
        history.append((values["w"].copy(), values["g"].copy()))
    return history


CASES = {
    "sgd": {"momentum": 0.875},
    "adam": {"epsilon": EPS},
    "rmsprop": {"decay_rate": 0.9, "epsilon": EPS},
}


@pytest.mark.parametrize("name", optimizer_util.OPTIMIZERS)
@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_updates_follow_the_formula(name, clip):
    rng = np.random.default_rng(0)
    # The first gradients are within the clipping norm together, the later ones only apart: a norm
    # per group, not over all, would leave them whole.
    gradients = [(rng.normal(0, s, 3), rng.normal(0, s, 2)) for s in (0.1, 0.8, 0.8, 3.0)]
    gradients.append(([0.8, 0.8, 0.4], [1.2, 0.4]))
    settings = {key: value for key, value in CASES[name].items() if key != "epsilon"}
    mine = run(name, gradients, clip=clip, **CASES[name])
    theirs = reference(name, gradients, clip=clip, **settings)
    for (w1, g1), (w2, g2) in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(w1, w2, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(g1, g2, rtol=2e-5, atol=2e-6)


def test_only_batch_norms_do_not_decay():
    model = tiny(10)
    no_decay = optimizer_util.no_decay_names(model)
    decay = {name for name, _ in model.named_parameters()} - no_decay
    assert {"fc.weight", "fc.bias", "conv1.weight", "layer1.0.downsample.0.weight"} <= decay
    assert {"bn1.weight", "bn1.bias", "layer1.0.downsample.1.bias"} <= no_decay
    assert all("bn" in name or "downsample.1" in name for name in no_decay)
    assert not any("bn" in name or "downsample.1" in name for name in decay)


def rates(name, *, steps, base=1.0, **settings):
    """The learning rate of every step, seen from outside: gradient 1, no momentum, no decay."""
    model = graph_util.place(Toy(np.zeros(1, np.float32), np.zeros(1, np.float32)), "cpu")
    optimizer = optimizer_util.build_optimizer(
        model, "sgd", learning_rate=base, weight_decay=0.0, momentum=0.0
    )
    schedule = optimizer_util.build_schedule(optimizer, name, **settings)
    graph = ToyGraph(model, optimizer, schedule)
    positions = [0.0]
    for _ in range(steps):
        graph(everywhere([[1.0]]), everywhere([0.0])).numpy()
        positions.append(float(model.fc.weight.numpy()[0, 0]))
    return -np.diff(positions)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", optimizer_util.SCHEDULES)
def test_schedules_equal_their_closed_form(name, warmup):
    steps, base = 60, 0.5
    after = {
        "cosine": lambda s: base * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup))) / 2,
        "step": lambda s: base * 0.1 ** sum(s >= m for m in (20, 40, 50)),
        "polynomial": lambda s: base + (1e-5 - base) * (s - warmup) / (steps - warmup),
        "exponential": lambda s: base * 0.94 ** ((s - warmup) / 7.5),
        "none": lambda s: base,
    }[name]
    expected = [base * s / warmup if s < warmup else after(s) for s in range(steps)]
    seen = rates(
        name,
        steps=steps,
        base=base,
        total_steps=steps,
        warmup_steps=warmup,
        step_milestones=(20, 40, 50),
        decay_rate=0.94,
        exponential_steps=7.5,
    )
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=3e-6)
