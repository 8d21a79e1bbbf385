"""Optimizers and schedules inside a graph, against their formulas."""

import math

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

import config
import optimizer_util
import resnet_model
from cnns.data.kinds import Synthetic
from cnns.data.synthetic import SyntheticTrainLoader
from cnns.distributed import place
from cnns.graphs import QuietGraph, TrainGraph
from cnns.losses import CrossEntropy
from optimizer_util import Schedule
from small import TINY

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


class ToyGraph(QuietGraph):
    def __init__(self, model, optimizer, schedule=None):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)  # as TrainGraph does
        self.config.allow_fuse_model_update_ops(True)
        self.model = model
        self.add_optimizer(optimizer, **({} if schedule is None else {"lr_sch": schedule}))

    def build(self, a, b):
        loss = self.model(a, b)
        loss.backward()
        return loss


def everywhere(array):
    placement = flow.env.all_device_placement("cpu")
    return flow.tensor(np.float32(array)).to_global(placement, flow.sbp.broadcast)


def run(name, gradients, *, clip=0.0, **settings):
    """Weights and gammas after each step."""
    weight, gamma = np.float32([1.0, -2.0, 3.0]), np.float32([0.5, 2.0])
    model = place(Toy(weight, gamma), "cpu")
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


@pytest.mark.parametrize(
    "name, num_decaying, total",
    [("resnet18", 22, 62), pytest.param("resnet50", 55, 161, marks=pytest.mark.long)],
)
def test_only_batch_norms_do_not_decay(name, num_decaying, total):
    """Every parameter, in the model and in the graph that OneFlow would compile from it."""
    model = place(getattr(resnet_model, name)(), "cpu").train()
    parameters = dict(model.named_parameters())
    # Convolution and fc weights are the ones of more than one dimension.
    decaying = {key for key, value in parameters.items() if value.ndim > 1} | {"fc.bias"}
    assert (len(decaying), len(parameters)) == (num_decaying, total)
    assert all("conv" in key or "downsample.0" in key or "fc." in key for key in decaying)
    assert optimizer_util.no_decay_names(model) == parameters.keys() - decaying

    decay = 1 / 32768
    optimizer = optimizer_util.build_optimizer(
        model, "sgd", learning_rate=LR, weight_decay=decay, momentum=0.875
    )
    loader = SyntheticTrainLoader(
        Synthetic(num_examples=4, num_classes=9),
        batch_size=2,
        preprocessing=TINY.preprocessing(),
        device="cpu",
    )
    graph = TrainGraph(model, loader, optimizer, loss=CrossEntropy(label_smoothing=0.1), top_k=5)
    graph.build_graph(*next(loader.batches()))
    updates = [op for op in graph._full_graph_proto.net.op if op.name.endswith("_optimizer")]
    found = {
        op.name.removeprefix("model.").removesuffix("_optimizer"): op.user_conf.attr["l2"].at_float
        for op in updates
    }
    assert found == {key: decay if key in decaying else 0.0 for key in parameters}
    assert {op.user_conf.op_type_name for op in updates} == {"momentum_update"}


def rates(name, *, steps, base=1.0, **settings):
    """The learning rate of every step, seen from outside: gradient 1, no momentum, no decay."""
    model = place(Toy(np.zeros(1, np.float32), np.zeros(1, np.float32)), "cpu")
    optimizer = optimizer_util.build_optimizer(
        model, "sgd", learning_rate=base, weight_decay=0.0, momentum=0.0
    )
    schedule = Schedule(name, learning_rate=base, **settings).build(optimizer)
    graph = ToyGraph(model, optimizer, schedule)
    positions = [0.0]
    for _ in range(steps):
        graph(everywhere([[1.0]]), everywhere([0.0])).numpy()
        positions.append(float(model.fc.weight.numpy()[0, 0]))
    return -np.diff(positions)


@pytest.mark.parametrize("warmup", [pytest.param(0, marks=pytest.mark.long), 10])
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


# The plan of 90 epochs of ImageNet. A graph computes its rate in native code, from a step counter
# that a restored graph starts with; the schedule's Python side is its twin and is fast enough to be
# asked for every step.

IMAGENET = config.epochs_to_steps(
    num_examples=1_281_167,
    global_batch_size=256,
    num_epochs=90,
    warmup_epochs=5,
    lr_step_epochs=(30, 60, 80),
    lr_decay_epochs=2,
)
PEAK = 0.256


def imagenet_rates(name: str) -> np.ndarray:
    """The rate of each of the 450,450 steps, by the closed form, in float64."""
    step = np.arange(450_450, dtype=np.float64)
    epoch = step / 5005
    after = {
        "cosine": PEAK * (1 + np.cos(np.pi * (epoch - 5) / 85)) / 2,
        "step": PEAK * 0.1 ** ((epoch >= 30).astype(int) + (epoch >= 60) + (epoch >= 80)),
        "polynomial": PEAK + (1e-5 - PEAK) * (epoch - 5) / 85,
        "exponential": PEAK * 0.94 ** ((epoch - 5) / 2),
        "none": np.full_like(step, PEAK),
    }[name]
    return np.where(epoch < 5, PEAK * epoch / 5, after)


def imagenet_schedule(model, name: str) -> tuple[flow.optim.Optimizer, Schedule]:
    optimizer = optimizer_util.build_optimizer(
        model, "sgd", learning_rate=PEAK, weight_decay=0.0, momentum=0.0
    )
    schedule = Schedule(
        name,
        learning_rate=PEAK,
        total_steps=IMAGENET.total_steps,
        warmup_steps=IMAGENET.warmup_steps,
        step_milestones=IMAGENET.step_milestones,
        decay_rate=0.94,
        exponential_steps=IMAGENET.exponential_steps,
    )
    return optimizer, schedule


def toy(size: int):
    return place(Toy(np.zeros(size, np.float32), np.zeros(1, np.float32)), "cpu")


@pytest.mark.long
@pytest.mark.parametrize("name", optimizer_util.SCHEDULES)
def test_the_rate_of_every_step_of_90_epochs(name):
    optimizer, schedule = imagenet_schedule(toy(1), name)
    built = schedule.build(optimizer)
    (group,) = optimizer.param_groups
    seen, said = np.empty((2, IMAGENET.total_steps))
    for step in range(IMAGENET.total_steps):
        seen[step], said[step] = group["lr"], schedule.rate(step)
        built.step()
    for rates in (seen, said):
        np.testing.assert_allclose(rates, imagenet_rates(name), rtol=1e-9, atol=1e-15)


def native_rates(name: str, first: int, count: int) -> np.ndarray:
    """The rates that a graph restored at step `first` updates with, float32.

    The gradient of step i is 1 for weight i and 0 for the others, which all start at 0.
    """
    model = toy(count)
    optimizer, schedule = imagenet_schedule(model, name)
    graph = ToyGraph(model, optimizer, schedule.build(optimizer))
    counter = flow.tensor([first], dtype=flow.int64)
    placement = flow.env.all_device_placement("cpu")
    state = graph.state_dict()
    state["System-Train-TrainStep"] = counter.to_global(placement, flow.sbp.broadcast)
    graph.load_state_dict(state)
    for gradient in np.eye(count):
        graph(everywhere([gradient]), everywhere([0.0])).numpy()
    return -model.fc.weight.numpy()[0]


@pytest.mark.long
@pytest.mark.parametrize("name", optimizer_util.SCHEDULES)
def test_native_rates_at_the_turning_points_of_90_epochs(name):
    """float32 around the start, the end of the warm-up, epochs 30, 60 and 80, and the last step."""
    expected = imagenet_rates(name)
    for epoch in (0, 2.5, 5, 30, 60, 80, 90):
        first = min(max(round(epoch * 5005) - 2, 0), IMAGENET.total_steps - 4)
        seen = native_rates(name, first, 4)
        np.testing.assert_allclose(seen, expected[first : first + 4], rtol=3e-7, atol=1e-15)


def test_the_step_schedule_drops_after_epochs_30_60_and_80():
    rates = imagenet_rates("step")
    drops = np.flatnonzero(np.diff(rates[25_025:]) < 0) + 25_026
    assert drops.tolist() == [30 * 5005, 60 * 5005, 80 * 5005] == list(IMAGENET.step_milestones)
    np.testing.assert_allclose(rates[drops], [0.0256, 0.00256, 0.000256])
