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
from cnns.checkpoint.snapshot import state_arrays, training_arrays
from cnns.distributed import place, to_device
from cnns.ema import Average, AverageSchedule, make_average_schedule
from cnns.errors import UsageError
from cnns.freeze import freeze
from cnns.graphs import DropoutMasks, TrainGraph
from cnns.log import Meter
from cnns.losses import build_loss
from cnns.models.layers import Switches, drop_blocks
from golden import seeded
from model_registry import MODELS
from optimizer_util import Schedule
from resnet_model import BasicBlock

pytestmark = pytest.mark.long

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
        return self.fc(x)


def network(kind: type[nn.Module] = Smooth) -> nn.Module:
    model = kind()
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
    model: nn.Module,
    *,
    loss=None,
    optimizer: str = "sgd",
    schedule=None,
    loader=None,
    graph=None,
    **settings,
) -> TrainGraph:
    """The graph with `graph` as further settings, and `settings` of the optimizer."""
    given = {"learning_rate": RATE, "weight_decay": DECAY} | settings
    if optimizer == "sgd":
        given = SGD | given
    built = optimizer_util.build_optimizer(model, optimizer, **given)
    smoothing = GOLDEN["smoothing"].item()
    loss = loss or build_loss("cross_entropy", label_smoothing=smoothing)
    schedule = schedule and schedule.build(built)
    loader = loader or Given()
    return TrainGraph(model, loader, built, schedule, loss=loss, top_k=2, **(graph or {}))


def check(
    name: str, losses: list[float], model: nn.Module, rtol: float = 2e-5, *, values=GOLDEN
) -> None:
    np.testing.assert_allclose(losses, values[f"{name}/losses"], rtol=rtol)
    assert state_error(model, f"{name}/state", values=values) < 5 * rtol


def state_error(model: nn.Module, golden: str, *, values=GOLDEN) -> float:
    """The largest over all arrays, as a share of its norm."""
    errors = [
        np.linalg.norm(array - values[f"{golden}/{key}"]) / np.linalg.norm(array)
        for key, array in state_arrays(model).items()
    ]
    return max(errors)


def losses_of(graph: TrainGraph, *, mixed: bool = False) -> list[float]:
    outputs = (graph(*batch(step, mixed=mixed)) for step in range(STEPS))
    return [float(output[0].numpy().mean()) for output in outputs]


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


# Optimizers and schedules.


def test_weight_decay_of_each_kind():
    model = network()
    decay = {f"{kind}_weight_decay": GOLDEN[f"{kind}_decay"].item() for kind in ("norm", "bias")}
    check("kinds", losses_of(build(model, **decay)), model)


def test_nesterov():
    model = network()
    check("nesterov", losses_of(build(model, nesterov=True)), model)


def test_adamw():
    """Its first steps divide a gradient by its own size, however small that is: so fewer digits."""
    model = network()
    rate = GOLDEN["adam_rate"].item()
    graph = build(model, optimizer="adam", learning_rate=rate, epsilon=1e-8)
    check("adamw", losses_of(graph), model, rtol=1e-4)


def test_schedule_of_torchvision():
    model = network()
    schedule = Schedule(
        "cosine",
        learning_rate=RATE,
        total_steps=STEPS,
        warmup_steps=GOLDEN["warmup_steps"].item(),
        warmup_factor=GOLDEN["warmup_decay"].item(),
        minimum=GOLDEN["minimum"].item(),
    )
    check("schedule", losses_of(build(model, schedule=schedule)), model)
    assert schedule.rate(0) == pytest.approx(RATE * GOLDEN["warmup_decay"].item())
    assert schedule.rate(STEPS) == pytest.approx(GOLDEN["minimum"].item())


def test_polynomial_schedule():
    model = network()
    schedule = Schedule(
        "polynomial",
        learning_rate=RATE,
        total_steps=STEPS,
        warmup_steps=GOLDEN["warmup_steps"].item(),
        warmup_factor=GOLDEN["warmup_decay"].item(),
        minimum=0.0,
        power=GOLDEN["power"].item(),
    )
    check("polynomial", losses_of(build(model, schedule=schedule)), model)


# Updates composed of operators (cnns/update.py).


def setting(name: str) -> float:
    return GOLDEN[name].item()


COMPOSED = {
    "lars": {"learning_rate": setting("lars_rate"), "trust_coefficient": setting("trust")} | SGD,
    "lamb": {"learning_rate": setting("lamb_rate"), "epsilon": setting("lamb_epsilon")},
    "layered_sgd": {"nesterov": True, "layer_decay": setting("layer_decay")},
    "layered_adam": {
        "learning_rate": setting("adam_rate"),
        "epsilon": 1e-8,
        "layer_decay": setting("layer_decay"),
    },
}


class OneAhead(Schedule):
    """As in golden/make_recipes.py, so that the first update is not by 0."""

    def rate(self, step):
        return super().rate(step + 1)


@pytest.mark.parametrize("case", COMPOSED)
@pytest.mark.parametrize("use_fp16", [False, True])
def test_composed_updates(case, use_fp16):
    """Clipped over all, by a schedule; on a CPU half precision skips no update."""
    model, settings = network(), COMPOSED[case]
    schedule = OneAhead(
        "cosine",
        learning_rate=settings.get("learning_rate", RATE),
        total_steps=STEPS,
        warmup_steps=GOLDEN["warmup_steps"].item(),
    )
    graph = build(
        model,
        optimizer=case.removeprefix("layered_"),
        schedule=schedule,
        gradient_clipping=GOLDEN["clip"].item(),
        graph={"use_fp16": use_fp16},
        **settings,
    )
    check(case, losses_of(graph), model, rtol=1e-4 if case == "layered_adam" else 2e-5)


def test_every_rule_with_one_rate_is_oneflows():
    """With a factor of 1 in all layers, or so little below it that it does not count."""
    for name, own in {
        "sgd": SGD,
        "adam": {"epsilon": 1e-8, "learning_rate": setting("adam_rate")},
        "rmsprop": {"decay_rate": 0.9, "epsilon": 1e-3, "learning_rate": 0.01},
    }.items():
        ends = []
        for layer_decay in (1.0, 1 - 1e-12):
            model = network()
            graph = build(model, optimizer=name, layer_decay=layer_decay, **own)
            assert (graph.update is None) == (layer_decay == 1.0)
            losses = losses_of(graph)
            ends.append((losses, state_arrays(model), training_arrays(graph, model)))
        (losses, weights, buffers), (others, mine, kept) = ends
        np.testing.assert_allclose(losses, others, rtol=1e-5)
        assert buffers.keys() == kept.keys()
        for arrays, same in ((weights, mine), (buffers, kept)):
            for key, array in arrays.items():
                np.testing.assert_allclose(array, same[key], rtol=1e-3, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("case", COMPOSED)
def test_a_skipped_update_changes_nothing(case):
    """As in half precision after an overflow: what the training graph keeps is as it was left."""
    model, settings = network(), COMPOSED[case]
    graph = build(model, optimizer=case.removeprefix("layered_"), **settings)
    graph.update.skips = True
    start = state_arrays(model)
    graph(*batch(0))[0].numpy()
    before = state_arrays(model), training_arrays(graph, model)
    graph.update()
    after = state_arrays(model), training_arrays(graph, model)
    assert any((start[name] != after[0][name]).any() for name in dict(model.named_parameters()))
    for one, other in zip(before, after, strict=True):
        for key, array in one.items():
            np.testing.assert_array_equal(array, other[key], err_msg=key)
    assert float(graph.update.graph.held.to(nn.Module).count.numpy()) == 1.0
    assert graph.update.step == 2


def test_layers_of_a_resnet_are_timms():
    """Stem, each block, head: 18 layers of ResNet-50. Batch norms are of the layer before."""
    model = MODELS["resnet50"].build(10)
    factors = optimizer_util.layer_factors(model, 0.5)
    assert factors.keys() == dict(model.named_parameters()).keys()
    assert {name: factors[name] for name in ("fc.weight", "fc.bias")} == dict.fromkeys(
        ("fc.weight", "fc.bias"), 1.0
    )
    assert factors["layer4.2.bn3.bias"] == 0.5
    assert factors["layer4.0.downsample.1.weight"] == 0.5**3
    assert factors["layer1.0.conv1.weight"] == 0.5**16
    assert factors["conv1.weight"] == factors["bn1.bias"] == 0.5**17


# Stochastic depth.


class Residual(Smooth):
    """As in golden/make_recipes.py, of the project's own blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(BasicBlock(6, 6, 1, Switches()) for _ in range(2)))

    def forward(self, image):
        x = self.blocks(flow.tanh(self.bn(self.conv(image))))
        return self.fc(x.mean(dim=(2, 3)))


def test_stochastic_depth():
    """The first block is never left out, and evaluation leaves out none."""
    model = network(Residual)
    drop_blocks(model, setting("drop"))
    assert model.blocks[0].drop is None and model.blocks[1].drop.rate == setting("drop")
    graph, losses = build(model), []
    for step in range(STEPS):
        drawn = seeded.rng_of(GOLDEN["first_batch_seed"].item() + step, "drop")
        kept = drawn.uniform(0, 1, BATCH["size"]) >= setting("drop")
        mask = (kept / (1 - setting("drop"))).astype(np.float32)[:, None]
        output = graph(*batch(step), masks=(to_device(mask, PLACEMENT),))
        losses.append(float(output[0].numpy()))
    check("stochastic_depth", losses, model)
    image, plain = batch(0)[0], network(Residual)
    plain.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(model.eval()(image).numpy(), plain.eval()(image).numpy())


def test_masks_of_blocks_are_of_their_rates():
    """Of each row and block by itself, as a function of seed and step."""
    model = MODELS["resnet50"].build(10)
    drop_blocks(model, 0.3)
    masks = DropoutMasks(model, seed=1, batch_size=2048, device="cpu")
    assert [layer.rate for layer in masks.layers] == pytest.approx(
        [0.3 * place / 15 for place in range(1, 16)]
    )
    drawn = [each.numpy() for each in masks.at(3)["masks"]]
    for layer, mask in zip(masks.layers, drawn, strict=True):
        assert mask.shape == (2048, 1)
        assert set(mask.ravel()) == {np.float32(0), np.float32(1 / (1 - layer.rate))}
        assert abs((mask == 0).mean() - layer.rate) < 4 * (layer.rate / 2048) ** 0.5
    assert (drawn[-1] != drawn[-2]).any() and (drawn[-1] != masks.at(4)["masks"][-1].numpy()).any()


# Frozen parts.


@pytest.mark.parametrize("names", [("conv", "bn"), ("backbone",), ("bn", "conv.weight")])
def test_frozen_parts(names):
    """No bit of them changes, and the rest is clipped and trained as by PyTorch."""
    model = network()
    before = state_arrays(model)
    norms = freeze(model, names, last_layer="fc")
    assert norms == [model.bn]
    model.train()
    model.bn.eval()
    check("freeze", losses_of(build(model, gradient_clipping=GOLDEN["clip"].item())), model)
    for name, array in state_arrays(model).items():
        assert name.startswith("fc.") or (array == before[name]).all(), name


def test_parts_that_cannot_be_frozen():
    with pytest.raises(UsageError, match="--freeze=layer9: the network has no such part; it has c"):
        freeze(network(), ("layer9",), last_layer="fc")
    with pytest.raises(UsageError, match="leaves nothing to train"):
        freeze(network(), ("backbone", "fc"), last_layer="fc")


# Accumulated gradients.


@pytest.mark.parametrize("mixed", [False, True])
def test_accumulated_gradients(mixed):
    """Clipped over the mean of all parts, with a rate by updates; batch norms see a part.

    With mixed rows, which have no golden figures, every part must get its own.
    """
    parts = GOLDEN["parts"].item()
    model = network()
    graph = build(
        model,
        gradient_clipping=GOLDEN["clip"].item(),
        schedule=Schedule(
            "cosine",
            learning_rate=RATE,
            total_steps=STEPS,
            warmup_steps=GOLDEN["warmup_steps"].item(),
        ),
        graph={"accumulate_steps": parts},
    )
    if not mixed:
        check("accumulate", losses_of(graph), model)
        return
    rows = batch(0, mixed=True)
    losses = graph(*rows)[0].numpy()
    assert losses.shape == (parts,)
    alone = build(network(), graph={"accumulate_steps": 1})
    size = BATCH["size"] // parts
    first = [to_device(each.numpy()[:size], PLACEMENT) for each in rows]
    np.testing.assert_allclose(losses[0], alone(*first)[0].numpy(), rtol=1e-5)


class WithoutBatchNorm(Smooth):
    def forward(self, image):
        x = flow.tanh(self.conv(image)).mean(dim=(2, 3))
        return self.fc(x)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With nothing that looks at a batch, an average beside it, and counts of hits."""
    ends = {}
    for parts in (1, 2, 8):
        model = network(WithoutBatchNorm)
        average = average_of(model, AverageSchedule(0.7, 3, 0), parts=parts, kind=WithoutBatchNorm)
        within = {"average": average.network} if parts == 1 else {}
        graph = build(model, graph={"accumulate_steps": parts, **within})
        meter = Meter(BATCH["size"])
        for step in range(STEPS):
            meter.add(graph(*batch(step), **average.arguments()))
            average.note(0, step)
        average.settle()
        losses, counts, bad_labels, _ = meter.read()
        assert bad_labels == 0
        ends[parts] = losses, counts, [state_arrays(m) for m in (model, average.network)]
    for losses, counts, states in ends.values():
        np.testing.assert_allclose(losses, ends[1][0], rtol=1e-5)
        assert counts == ends[1][1] and counts.samples == STEPS * BATCH["size"]
        for arrays, whole in zip(states, ends[1][2], strict=True):
            for name, array in arrays.items():
                np.testing.assert_allclose(array, whole[name], rtol=1e-5, atol=1e-6)


# The average of weights.


def ema_setting(name: str) -> float:
    return GOLDEN[f"ema/{name}"].item()


def average_of(
    model: nn.Module, schedule: AverageSchedule | None = None, *, parts: int = 1, kind=Smooth
) -> Average:
    if schedule is None:
        flags = {
            f"ema_{key}": ema_setting(k) for key, k in (("decay", "decay"), ("steps", "interval"))
        }
        flags["warmup_epochs"] = ema_setting("warmup_epochs")
        flags["num_epochs"] = STEPS // ema_setting("steps_per_epoch")
        schedule = make_average_schedule(flags, batch_size=BATCH["size"])
    return Average(kind(), model, schedule, start=None, device="cpu", within_graph=parts == 1)


@pytest.mark.parametrize("settled_every", [1, 7, STEPS])
def test_average_of_weights(settled_every):
    """Running statistics as well; whenever it is read, and never the weights that are trained."""
    model = network()
    average = average_of(model)
    graph = build(model, graph={"average": average.network})
    losses = []
    for step in range(STEPS):
        output = graph(*batch(step), **average.arguments())
        average.note(*divmod(step, ema_setting("steps_per_epoch")))
        losses.append(float(output[0].numpy()))
        if (step + 1) % settled_every == 0:
            average.settle()
    check("plain", losses, model)
    average.settle()
    assert state_error(average.network, "ema/average") < 1e-5
    assert state_error(model, "ema/average") > 1e-2


def test_settling_changes_no_bit():
    """What is due is the same, computed by the next step or at once: a resumed run needs that."""
    ends = []
    for settled in (False, True):
        model = network()
        average = average_of(model, AverageSchedule(0.7, 1, 0))
        graph = build(model, graph={"average": average.network})
        for step in range(6):
            graph(*batch(step), **average.arguments())[0].numpy()
            average.note(0, step)
            if settled:
                average.settle()
        average.settle()
        ends.append(state_arrays(average.network))
    for name, array in ends[0].items():
        np.testing.assert_array_equal(array, ends[1][name])


def test_when_the_average_is_updated():
    schedule = AverageSchedule(0.9, 4, 1.5)
    shares = {e: [schedule.share(e, i) for i in range(9)] for e in (0, 1, 2, 3)}
    often = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert shares[0] == shares[1] == often  # the warm-up ends in epoch 1
    later = [0.1 * due for due in often]
    assert shares[2] == pytest.approx([1.0, *later[1:]])
    assert shares[3] == pytest.approx(later)
