"""The `nn.Graph`s that train, evaluate and predict, and the one function that evaluates."""

import time
from collections.abc import Callable

import numpy as np
import oneflow as flow
from oneflow import nn

from checkpoint_util import local
from config import RunError, UsageError
from metric_util import Counts, limit_run_ahead, notice
from ofrecord_util import to_device


def choose_device(name: str) -> str:
    """`cuda` or `cpu` for the flag --device; `auto` takes CUDA where there is one and says so.

    Raises UsageError where CUDA is asked for and there is none.
    """
    available = flow.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(
            "--device=cuda: no CUDA device can be used here (is there a GPU, and a driver for CUDA "
            "11.7 or newer?); give --device=cpu to run on the CPU"
        )
    if name == "auto":
        name = "cuda" if available else "cpu"
        notice(f"Device: {name} (--device=auto).")
    return name


def place(model: nn.Module, device: str) -> nn.Module:
    """Move a model to every device of the job, the same weights on each."""
    return model.to_global(flow.env.all_device_placement(device), flow.sbp.broadcast)


def hits(logits, label, top_k: int):
    """Whether each label is the first, or among the first `top_k`, of its logits.

    Equal logits rank by class number, and a NaN is beaten by nothing and beats nothing, so that a
    network that gives the same for every class is not counted as right.

    Args:
        logits: (N, C) float.
        label: (N,) int32, 0 to C - 1.

    Returns:
        Two (N,) int32 tensors of 0 and 1.
    """
    num_classes = logits.shape[1]
    own = flow.gather(logits, 1, label.to(dtype=flow.int64).unsqueeze(1))  # (N, 1)
    number = flow.arange(
        num_classes, dtype=flow.int32, placement=logits.placement, sbp=flow.sbp.broadcast
    ).unsqueeze(0)  # (1, C)
    equal_later = flow.logical_and(own == logits, number >= label.unsqueeze(1))
    beaten = flow.logical_or(own > logits, equal_later).to(dtype=flow.int32).sum(dim=1)
    rank = num_classes - beaten
    return (rank < 1).to(dtype=flow.int32), (rank < top_k).to(dtype=flow.int32)


class TrainGraph(nn.Graph):
    """One call is one step: load, forward, backward, update, all on the device.

    Returns four scalars that stay there: mean loss, top-1 hits, top-k hits, and the number of
    labels outside the network's classes (which are trained as class 0 for one step: the caller must
    look at the count and stop).
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        optimizer,
        schedule=None,
        *,
        label_smoothing: float,
        top_k: int,
    ):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.allow_fuse_model_update_ops(True)
        self.model = model
        self.loader = loader
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.top_k = top_k
        if schedule is None:
            self.add_optimizer(optimizer)
        else:
            self.add_optimizer(optimizer, lr_sch=schedule)

    def build(self, *batch):
        image, label = self.loader(*batch)  # (N, 3, H, W) float32, (N,) int32
        logits = self.model(image)  # (N, C)
        # The loss kernel aborts the process on a label it has no logit for.
        valid = flow.logical_and(label >= 0, label < logits.shape[1]).to(dtype=flow.int32)
        label = label * valid
        loss = self.cross_entropy(logits, label)  # ()
        loss.backward()
        top_1, top_k = hits(logits, label, self.top_k)
        return loss, top_1.sum(), top_k.sum(), (1 - valid).sum()


class EvalGraph(nn.Graph):
    """Top-1 hits, top-k hits and labels outside the classes, over the rows whose `counted` is 1.

    Three int32 scalars. It shares the model with a training graph and follows its updates.
    """

    def __init__(self, model: nn.Module, loader: nn.Module, *, top_k: int):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.model = model
        self.loader = loader
        self.top_k = top_k

    def build(self, counted, *batch):
        image, label = self.loader(*batch)  # (N, 3, H, W) float32, (N,) int32
        logits = self.model(image)  # (N, C)
        valid = flow.logical_and(label >= 0, label < logits.shape[1]).to(dtype=flow.int32)
        top_1, top_k = hits(logits, label * valid, self.top_k)
        bad_labels = ((1 - valid) * counted).sum()
        return (top_1 * counted).sum(), (top_k * counted).sum(), bad_labels


class PredictGraph(nn.Graph):
    """Images (N, 3, H, W) float32 to probabilities (N, C) float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.model = model

    def build(self, image):
        return flow.softmax(self.model(image), dim=1)


class Predictor:
    """Arrays of images to arrays of probabilities. Compiles once for each batch size."""

    def __init__(self, model: nn.Module, *, device: str):
        self.model = model.eval()
        self.placement = flow.env.all_device_placement(device)
        self.graphs: dict[int, PredictGraph] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32, normalised, to (N, C) float32."""
        graph = self.graphs.setdefault(len(images), PredictGraph(self.model))
        return local(graph(to_device(images, self.placement))).numpy()


class Evaluator:
    """Scores a model on a validation set, each example exactly once a round.

    The loader's batches run on behind the last example, from the first again, so that all are of
    one size. Only the first `num_examples` rows of a round are counted.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        *,
        num_examples: int,
        batch_size: int,
        top_k: int,
        device: str,
    ):
        self.model = model
        self.graph = EvalGraph(model, loader, top_k=top_k)
        self.loader = loader
        self.num_examples, self.batch_size = num_examples, batch_size
        self.placement = flow.env.all_device_placement(device)

    @property
    def num_batches(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def round(self, check: Callable[[], None] = lambda: None) -> tuple[Counts, float]:
        """Counts over `num_examples` samples, and the seconds it took (without compilation).

        Leaves the model in evaluation mode. `check` is called between batches, and may raise.
        Raises RunError where a label is outside the classes.
        """
        self.model.eval()
        start = time.perf_counter()
        outputs = []
        batches = self.loader.batches()
        for start_row in range(0, self.num_examples, self.batch_size):
            counted = np.arange(start_row, start_row + self.batch_size) < self.num_examples
            mask = to_device(counted.astype(np.int32), self.placement)
            compiled = self.graph.is_compiled
            outputs.append(self.graph(mask, *next(batches)))
            limit_run_ahead(outputs)
            if not compiled:
                start = time.perf_counter()
            check()
        totals = np.array([[value.numpy() for value in output] for output in outputs]).sum(axis=0)
        seconds = time.perf_counter() - start
        top_1, top_k, bad_labels = totals.tolist()
        if bad_labels:
            raise RunError(
                f"the validation data have {bad_labels} labels outside the network's classes; they "
                "are of another data set than the network"
            )
        return Counts(top_1, top_k, self.num_examples), seconds
