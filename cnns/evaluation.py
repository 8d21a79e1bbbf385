"""Evaluators: each example is scored exactly once; hits are added up and divided at the end."""

import time
from collections.abc import Callable

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.checkpoint.snapshot import local
from cnns.distributed import Agreement, to_device, to_global
from cnns.errors import RunError
from cnns.graphs import NUM_SCORES, EvalGraph, score
from cnns.log import RUN_AHEAD, Counts, limit_run_ahead
from cnns.report.metrics import Answers, reduce_logits

PADDING = -1  # in place of an index: the row is not an example


class Evaluator:
    """Scores a model on a validation set, each example exactly once a round.

    The loader's batches are all of one size, and say which of their rows count.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        *,
        top_k: int,
        use_fp16: bool = False,
        gives_logits: bool = False,
    ):
        self.model, self.loader, self.gives_logits = model, loader, gives_logits
        self.top_k, self.use_fp16 = top_k, use_fp16
        self.graph: EvalGraph | ArrayGraph = EvalGraph(
            model, loader, top_k=top_k, use_fp16=use_fp16, gives_logits=gives_logits
        )

    def of(self, model: nn.Module) -> "Evaluator":
        """The same for another model."""
        return Evaluator(model, self.loader, top_k=self.top_k, use_fp16=self.use_fp16)

    def round(
        self, agreement: Agreement | None = None, collector: "Collector | None" = None
    ) -> tuple[Counts, float]:
        """Counts over the loader's `num_examples`, and the seconds it took (without compilation).

        A collector, for an evaluator that `gives_logits`, gets the answers to them.

        Leaves the model in evaluation mode. Raises RunError where a label is outside the classes,
        and Interrupted where the processes agree to stop.
        """
        if self.model is not None:
            self.model.eval()
        start = time.perf_counter()
        outputs = []
        for batch in self.loader.batches():
            compiled = self.graph.is_compiled
            output = self.graph(*batch, **(agreement.vote() if agreement else {}))
            if self.gives_logits:  # which are too many to keep
                logits = output[NUM_SCORES]
                output = *output[:NUM_SCORES], *output[NUM_SCORES + 1 :]
                if collector:
                    collector.add(batch, logits)
            outputs.append(output)
            done = limit_run_ahead(outputs)
            if not compiled:
                start = time.perf_counter()
            if agreement:
                agreement.check(done)
        totals = np.array([[float(v.numpy()) for v in output[:NUM_SCORES]] for output in outputs])
        seconds = time.perf_counter() - start
        top_1, top_k, bad_labels = totals[:, :3].sum(axis=0).astype(int).tolist()
        if bad_labels:
            raise RunError(
                f"the validation data have {bad_labels} labels outside the network's classes: the "
                "network is for another data set"
            )
        loss = float(totals[:, 3].sum()) / self.loader.num_examples
        return Counts(top_1, top_k, self.loader.num_examples, loss), seconds


class Collector:
    """Gathers a network's answers to the examples of a round, from all processes.

    Only what a report needs is kept: 52 bytes an example in place of 4 a class.
    """

    def __init__(self, loader: nn.Module):
        self.loader = loader
        self.pending: list[tuple] = []  # not read yet: these steps may still run
        self.packed: list[np.ndarray] = []

    def add(self, batch: tuple, logits: flow.Tensor) -> None:
        """Take the logits of the loader's next batch, without waiting for them."""
        row_mask, *_, label = batch
        self.pending.append((row_mask, label, logits))
        if len(self.pending) > RUN_AHEAD:
            self.read()

    def read(self) -> None:
        row_mask, label, logits = (each.to_local().numpy() for each in self.pending.pop(0))
        index = self.loader.positions(len(self.packed))
        packed = reduce_logits(index, label, logits).pack()
        packed[row_mask == 0, 0] = PADDING
        self.packed.append(packed)

    def answers(self) -> Answers:
        """All answers, on every process, which all call this, in the order of the data set."""
        while self.pending:
            self.read()
        own = flow.tensor(np.concatenate(self.packed))
        packed = local(to_global(own, self.loader.placement)).numpy()
        return Answers.unpack(packed[packed[:, 0] != PADDING])


class ArrayGraph:
    """As EvalGraph, for a network that is a function of arrays: images to logits (N, C)."""

    is_compiled = True

    def __init__(
        self,
        network: Callable[[np.ndarray], np.ndarray],
        loader: nn.Module,
        *,
        top_k: int,
        gives_logits: bool,
    ):
        self.network, self.loader, self.top_k = network, loader, top_k
        self.gives_logits = gives_logits

    def __call__(self, row_mask: flow.Tensor, *batch: flow.Tensor) -> tuple[flow.Tensor, ...]:
        image, label = self.loader(*batch)
        logits = to_device(self.network(local(image).numpy()), label.placement)
        scores = score(logits, label, row_mask, top_k=self.top_k)
        return (*scores, logits) if self.gives_logits else scores


class ArrayEvaluator(Evaluator):
    """The same for a network that is a function of arrays, in one process on the CPU."""

    def __init__(
        self,
        network: Callable[[np.ndarray], np.ndarray],
        loader: nn.Module,
        *,
        top_k: int,
        gives_logits: bool = False,
    ):
        self.model, self.loader = None, loader
        self.top_k, self.gives_logits = top_k, gives_logits
        self.graph = ArrayGraph(network, loader, top_k=top_k, gives_logits=gives_logits)
