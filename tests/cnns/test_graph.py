"""The graphs: exact counts, exact evaluation, and training that really trains."""

import gc

import numpy as np
import oneflow as flow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oneflow import nn

import ofrecord_util
import optimizer_util
from cnns.data.datasets import open_val_dataset
from cnns.data.images import Preprocessing
from cnns.data.kinds import Synthetic
from cnns.data.synthetic import SyntheticTrainLoader, SyntheticValLoader
from cnns.distributed import choose_device, place, to_device
from cnns.errors import RunError, UsageError
from cnns.evaluation import Evaluator
from cnns.graphs import Predictor, TrainGraph, hits
from cnns.log import limit_run_ahead
from cnns.losses import CrossEntropy
from small import Tiny, write_parts

PREPROCESSING = Preprocessing(32, 32, (123.0, 117.0, 104.0), (58.0, 57.0, 57.0))


def global_tensor(array):
    return to_device(np.asarray(array), flow.env.all_device_placement("cpu"))


def rank_of_label(logits, label):
    """How many classes come before the label's, by numpy: equal logits by class number."""
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.argmax(order == label[:, None], axis=1)


def graph_hits(logits, label, top_k):
    top_1, top_k = hits(global_tensor(np.float32(logits)), global_tensor(np.int32(label)), top_k)
    return top_1.numpy(), top_k.numpy()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 15), st.sampled_from([1, 3, 1000])
)
def test_hits_equal_a_stable_sort_even_with_ties(seed, num_classes, top_k, num_levels):
    """All logits equal, many ties, hardly any; k above the number of classes."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-num_levels, num_levels, (6, num_classes)) // 2
    logits = logits.astype(np.float32)
    label = rng.integers(0, num_classes, 6).astype(np.int32)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = [(order[:, :k] == label[:, None]).any(axis=1) for k in (1, top_k)]
    for mine, theirs in zip(graph_hits(logits, label, top_k), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_hits_of_a_thousand_classes_and_of_infinite_logits():
    """As on ImageNet; the loop counts, for each label, what comes before it."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((512, 1000)).astype(np.float32).round(1)
    logits[::7, :500] = np.inf
    logits[::5, 500:] = -np.inf
    label = rng.integers(0, 1000, 512)
    label[:400] = np.argsort(-logits, axis=1)[:400, rng.integers(0, 8, 400)].diagonal()
    classes = np.arange(1000)
    ranks = []
    for row, own in zip(logits, label, strict=True):
        before = (row > row[own]) | ((row == row[own]) & (classes < own))
        ranks.append(before.sum())
    for k in (1, 5, 1000, 2000):
        top_1, top_k = graph_hits(logits, label, k)
        np.testing.assert_array_equal(top_1, np.array(ranks) < 1)
        np.testing.assert_array_equal(top_k, np.array(ranks) < k)
    assert 0 < (np.array(ranks) < 1).sum() < (np.array(ranks) < 5).sum() < 512


def test_a_network_that_knows_nothing_scores_nothing():
    for value in (0.0, np.nan):
        top_1, top_k = graph_hits(np.full((4, 10), value), [1, 5, 6, 9], 5)
        assert top_1.sum() == 0
        assert top_k.sum() == (1 if value == 0.0 else 0)  # class 1 is among the first five


class Counting(nn.Module):
    """Gives record numbers in place of images, with labels k % 4, as the native reader runs: round
    and round, batches across the end."""

    def __init__(self, available, batch_size, num_examples=None):
        super().__init__()
        self.available, self.batch_size = available, batch_size
        self.num_examples = num_examples or available

    def batches(self):
        for start in range(0, self.num_examples, self.batch_size):
            row = np.arange(start, start + self.batch_size)
            record = (row % self.available).astype(np.int32)
            row_mask = (row < self.num_examples).astype(np.int32)
            yield global_tensor(row_mask), global_tensor(record), global_tensor(record % 4)

    def forward(self, record, label):
        return record, label


class Fixed(nn.Module):
    """Logits from a table, by record number: which records are hits is known."""

    def __init__(self, table):
        super().__init__()
        value = flow.tensor(table).to_global(
            flow.env.all_device_placement("cpu"), flow.sbp.broadcast
        )
        self.register_buffer("table", value)

    def forward(self, record):
        return flow.index_select(self.table, 0, record.to(dtype=flow.int64))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 14, 20, 50])
@pytest.mark.parametrize("num_examples", [13, 6])
def test_every_example_counts_once_in_every_round(batch_size, num_examples):
    available = 13
    rng = np.random.default_rng(1)
    table = rng.standard_normal((available, 4), np.float32)
    label = np.arange(available) % 4
    rank = rank_of_label(table, label)[:num_examples]
    evaluator = Evaluator(
        Fixed(table),
        Counting(available, batch_size, num_examples),
        top_k=2,
    )
    for _ in range(3):
        counts, seconds = evaluator.round()
        assert (counts.top_1, counts.top_k) == ((rank < 1).sum(), (rank < 2).sum())
        assert counts.samples == num_examples
        assert seconds > 0


@pytest.mark.parametrize("batch_size", [3, 5, 14, 30])
def test_evaluation_of_parts_does_not_depend_on_the_batch_size(tmp_path, batch_size):
    directory = write_parts(tmp_path / "val", [[0, 1, 2, 3, 3], [1, 2, 0], [3, 0, 1, 2], [2, 2]])
    data = open_val_dataset(str(directory))
    flow.manual_seed(3)
    model = place(Tiny(4), "cpu")
    loader = ofrecord_util.val_loader(
        data, batch_size=batch_size, preprocessing=PREPROCESSING, device="cpu"
    )
    evaluator = Evaluator(model, loader, top_k=2)
    rounds = [evaluator.round()[0] for _ in range(3)]
    assert rounds[0] == rounds[1] == rounds[2]
    predict = Predictor(model, device="cpu")
    images, labels = read_all(data)
    ranks = rank_of_label(predict(images), labels)
    assert (rounds[0].top_1, rounds[0].top_k) == ((ranks < 1).sum(), (ranks < 2).sum())


def read_all(data):
    """The whole validation set as arrays, through the native pipeline."""
    loader = ofrecord_util.val_loader(
        data, batch_size=data.available, preprocessing=PREPROCESSING, device="cpu"
    )
    _, image, label = next(loader.batches())
    return image.numpy(), label.numpy()


def synthetic(loader, seed=0):
    data = Synthetic(num_examples=16, num_classes=10, seed=seed)
    return loader(data, batch_size=8, preprocessing=PREPROCESSING, device="cpu")


def training(model, *, seed=0, steps=100, lr=0.05, name="sgd", **optimizer):
    settings = {"momentum": 0.875} if name == "sgd" else {}
    built = optimizer_util.build_optimizer(
        model, name, learning_rate=lr, weight_decay=1e-4, **settings, **optimizer
    )
    schedule = optimizer_util.Schedule("cosine", learning_rate=lr, total_steps=steps).build(built)
    loader = synthetic(SyntheticTrainLoader, seed=seed)
    graph = TrainGraph(
        model, loader, built, schedule, loss=CrossEntropy(label_smoothing=0.1), top_k=5
    )
    return graph, loader.batches()


def learn(*, evaluate):
    """Losses of 60 steps, and the hits of an evaluation after every 12 of them."""
    flow.manual_seed(0)
    model = place(Tiny(10), "cpu")
    graph, batches = training(model)
    evaluator = Evaluator(model, synthetic(SyntheticValLoader), top_k=5)
    losses, scores = [], []
    for _ in range(5):
        model.train()
        for _ in range(12):
            losses.append(float(graph(*next(batches))[0].numpy()))
        if evaluate:
            scores.append(evaluator.round()[0].top_1)
    return losses, scores


@pytest.mark.long
def test_training_learns_and_evaluation_beside_it_disturbs_nothing():
    alone, _ = learn(evaluate=False)
    losses, scores = learn(evaluate=True)
    assert losses == alone
    assert len(set(losses)) == len(losses)  # a graph that no longer updates repeats its losses
    assert losses[-1] < losses[0] - 1
    assert scores[0] < scores[-1] and scores[-1] >= 14  # the evaluated weights are the new ones


def test_the_step_counts_hits_and_bad_labels():
    flow.manual_seed(0)
    model = place(Tiny(10), "cpu")

    class Bad(SyntheticTrainLoader):
        def batches(self, step=0):
            image, label = self.pool[0]
            shifted = label.numpy()
            shifted[:3] = (-1, 10, 2000)
            while True:
                yield image, global_tensor(shifted)

    graph, batches = training(model)
    loss, top_1, top_k, bad = graph(*next(synthetic(Bad).batches()))
    assert np.isfinite(loss.numpy())
    assert bad.numpy() == 3
    assert 0 <= top_1.numpy() <= top_k.numpy() <= 8


def test_evaluation_refuses_labels_outside_the_classes():
    class Foreign(Counting):
        def forward(self, record, label):
            return record, label + 1  # 1 to 4, where 0 to 3 are known

    evaluator = Evaluator(Fixed(np.zeros((13, 4), np.float32)), Foreign(13, 4), top_k=2)
    with pytest.raises(RunError, match="3 labels outside"):
        evaluator.round()


def test_label_smoothing_is_that_of_the_formula():
    """Frozen weights: the loss of a step against the cross entropy with smoothed labels."""
    flow.manual_seed(0)
    model = place(Tiny(10), "cpu")
    graph, batches = training(model, lr=0.0)
    image, label = next(batches)
    model.train()
    loss = float(graph(image, label)[0].numpy())
    logits = model(image).numpy().astype(np.float64)  # the same statistics of the same batch
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full_like(log_p, 0.1 / 10)
    target[np.arange(8), label.numpy()] += 0.9
    assert abs(loss - -(target * log_p).sum(axis=1).mean()) < 1e-5


def test_the_host_does_not_run_far_ahead():
    class Output:
        def __init__(self, number):
            self.number = number

        def numpy(self):
            waited.append(self.number)

    waited, outputs = [], []
    for number in range(5):
        outputs.append([Output(number)])
        limit_run_ahead(outputs)
    assert waited == [0, 1, 2]  # when step 4 has been asked for, step 2 is done


def test_choose_device(capsys):
    assert not flow.cuda.is_available()
    assert choose_device("auto") == "cpu"
    assert "cpu" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--device=cuda"):
        choose_device("cuda")


def test_nothing_is_collected_while_a_graph_compiles(monkeypatch):
    """What dies then may take the variables of the graph with it (docs/oneflow-notes.md)."""
    internal, seen = flow._oneflow_internal, []
    original = internal.DumpVariableTensorMgr
    monkeypatch.setattr(
        internal, "DumpVariableTensorMgr", lambda: seen.append(gc.isenabled()) or original()
    )
    assert gc.isenabled()
    Predictor(place(Tiny(4), "cpu"), device="cpu")(np.zeros((1, 3, 32, 32), np.float32))
    assert seen == [False] and gc.isenabled()
