"""The network, its gradients and the whole recipe against PyTorch, which is not needed to run this.

`golden/make_golden.py` made the figures, with a network, optimizer and schedule of its own, in
float64. It tells what float32 can be expected to give:

- OneFlow's CPU kernel of batch norm adds up x and its square in float32, one value after another,
  and so gets the statistics right to some 1e-5 where PyTorch's float32 is right to 1e-7. PyTorch
  with sums of that kind deviates from the reference just as far as OneFlow does. Nearly all of the
  difference between the two is this.
- An input of a ReLU that is within a rounding error of 0 falls on one side or the other, and all
  gradients below it differ by up to some percent. Seeds, betas and the rate were chosen, among some
  dozen that were tried, so that none was seen: the tolerances hold for these, not for any weights.
"""

from pathlib import Path

import numpy as np
import oneflow as flow
import pytest
from oneflow import nn

import optimizer_util
import resnet_model
from cnns.checkpoint.snapshot import state_arrays
from cnns.distributed import place, to_device
from cnns.graphs import Predictor, TrainGraph
from cnns.losses import CrossEntropy
from golden import seeded
from small import Tiny

GOLDEN = Path(__file__).resolve().parent / "golden"
PLACEMENT = flow.env.all_device_placement("cpu")


def read(name: str) -> dict:
    """The arrays of a golden file; single values as values."""
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return {key: array.item() if array.ndim == 0 else array for key, array in file.items()}


def part(golden: dict, prefix: str) -> dict:
    return {k[len(prefix) :]: v for k, v in golden.items() if k.startswith(prefix)}


def build(network: nn.Module, weights: dict) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """The network with seeded weights, placed, and those weights."""
    shapes = {name: array.shape for name, array in state_arrays(network).items()}
    arrays = seeded.state(shapes, **weights)
    state = network.state_dict()
    for name, array in arrays.items():
        state[name].copy_(flow.tensor(array))
    return place(network, "cpu"), arrays


class Given(nn.Module):
    """A loader of batches that the test hands over."""

    def forward(self, image, label):
        return image, label


def on_device(image, label):
    return to_device(image, PLACEMENT), to_device(label, PLACEMENT)


def errors(arrays: dict, golden: dict) -> np.ndarray:
    """Of each array, as a share of its norm."""
    return seeded.relative_errors(seeded.summary(arrays), golden)


# ResNet-50, 4 images of 64 px, 1000 classes.


@pytest.fixture(scope="module")
def golden():
    return read("resnet50.npz")


@pytest.fixture(scope="module")
def batch(golden):
    return seeded.batch(**part(golden, "batch_"))


@pytest.fixture(scope="module")
def resnet50(golden, batch):
    """The model and its weights. Tests that change them set them back."""
    model, arrays = build(resnet_model.resnet50(), part(golden, "weights_"))
    drawn = seeded.checksum(arrays | {"image": batch[0]})
    assert drawn == golden["checksum"], "this numpy draws other numbers than the golden file's"
    return model, arrays


def close(logits: np.ndarray, golden: np.ndarray) -> None:
    """To 1e-4 relative, and where a logit is near 0, to 1e-5 of what logits are like."""
    np.testing.assert_allclose(logits, golden, rtol=1e-4, atol=1e-5 * golden.std())


def test_logits_in_evaluation(golden, batch, resnet50):
    model, _ = resnet50
    model.eval()
    close(model(on_device(*batch)[0]).numpy(), golden["eval_logits"])


def test_the_graph_that_predicts(golden, batch, resnet50):
    probabilities = Predictor(resnet50[0], device="cpu")(batch[0])
    exponential = np.exp(golden["eval_logits"] - golden["eval_logits"].max(axis=1, keepdims=True))
    theirs = exponential / exponential.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.long
def test_a_step(golden, batch, resnet50):
    """Loss, gradients of every parameter and running statistics, through the training graph.

    A step of plain SGD moves each weight by rate * gradient. With a rate of 1024, a power of two,
    the move is far larger than the weight, so that hardly any of its digits are lost.
    """
    model, before = resnet50
    rate = 1024.0
    optimizer = optimizer_util.build_optimizer(
        model, "sgd", learning_rate=rate, weight_decay=0.0, momentum=0.0
    )
    graph = TrainGraph(
        model.train(),
        Given(),
        optimizer,
        loss=CrossEntropy(label_smoothing=golden["label_smoothing"]),
        top_k=5,
    )
    loss = float(graph(*on_device(*batch))[0].numpy())
    after = state_arrays(model)
    names = [name for name, _ in model.named_parameters()]
    gradients = {name: (before[name].astype(np.float64) - after[name]) / rate for name in names}
    running = {name: after[name] for name in after.keys() - gradients.keys()}
    assert len(gradients) == 161 and len(running) == 106

    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    # The running variance is the unbiased one; in layer4, with 16 values, the biased is 6 % less.
    # PyTorch with OneFlow's sums: gradients 3.3e-5 off at most, running statistics 5.3e-6.
    # OneFlow here: 4.0e-5 and 5.0e-6. Tenfold is left for other processors.
    for mine, name in ((gradients, "gradient"), (running, "running")):
        expected = errors_of_summing(golden, name)
        found = errors(mine, part(golden, f"{name}_"))
        assert found.max() < 10 * expected.max(), (name, found.max())
        assert np.median(found) < 5 * np.median(expected), (name, np.median(found))


def errors_of_summing(golden: dict, name: str) -> np.ndarray:
    """How far PyTorch is from the reference with statistics summed as by OneFlow."""
    return seeded.relative_errors(part(golden, f"summing_{name}_"), part(golden, f"{name}_"))


def test_logits_in_training(golden, batch):
    model, _ = build(resnet_model.resnet50(), part(golden, "weights_"))
    with flow.no_grad():
        logits = model.train()(on_device(*batch)[0]).numpy()
    close(logits, golden["train_logits"])


# Twenty steps of a small network of the same blocks.


@pytest.fixture(scope="module")
def training():
    return read("training.npz")


def train(training: dict, weight_decay: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses of all steps, and parameters and buffers after them: the recipe, by our own parts."""
    batches = part(training, "batch_")
    model, _ = build(Tiny(batches["num_classes"]), part(training, "weights_"))
    optimizer = optimizer_util.build_optimizer(
        model,
        "sgd",
        learning_rate=training["peak_rate"],
        weight_decay=weight_decay,
        momentum=training["momentum"],
    )
    schedule = optimizer_util.Schedule(
        "cosine",
        learning_rate=float(training["peak_rate"]),
        total_steps=int(training["steps"]),
        warmup_steps=int(training["warmup_steps"]),
    )
    graph = TrainGraph(
        model.train(),
        Given(),
        optimizer,
        schedule.build(optimizer),
        loss=CrossEntropy(label_smoothing=training["label_smoothing"]),
        top_k=5,
    )
    losses = [
        float(
            graph(*on_device(*seeded.batch(training["first_batch_seed"] + step, **batches)))[
                0
            ].numpy()
        )
        for step in range(training["steps"])
    ]
    return np.array(losses), state_arrays(model)


STATE_TOLERANCE = 1e-3  # of an array's norm; summing as OneFlow does makes 2e-4 of it


@pytest.mark.long
@pytest.mark.parametrize("case", ["recipe", "strong"])
def test_training(training, case):
    """`recipe` has the weight decay of the recipe, `strong` one that shows in 20 steps."""
    losses, state = train(training, training[f"{case}_weight_decay"])
    np.testing.assert_allclose(losses, training[f"{case}_losses"], rtol=1e-4)
    assert errors(state, part(training, f"{case}_state_")).max() < STATE_TOLERANCE
    print(
        np.abs(losses / training[f"{case}_losses"] - 1).max(),
        errors(state, part(training, f"{case}_state_")).max(),
        training[f"{case}_summing"],
    )


@pytest.mark.parametrize(
    "fault",
    [
        "early_warmup",
        "cosine_from_the_start",
        "everything_decays",
        "fc_bias_does_not_decay",
        "no_smoothing",
        "rate_inside_the_buffer",
    ],
)
def test_a_fault_in_the_recipe_would_be_noticed(training, fault):
    """PyTorch with that fault is further from the recipe than test_training allows."""
    by_losses, by_state = training[f"strong_{fault}"]
    assert by_losses > 10 * 1e-4 and by_state > 10 * STATE_TOLERANCE
