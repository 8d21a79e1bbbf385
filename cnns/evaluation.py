"""Evaluators: each example is scored exactly once; hits are added up and divided at the end."""

import time
from collections.abc import Callable

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.checkpoint.snapshot import local
from cnns.distributed import Agreement, to_device
from cnns.errors import RunError
from cnns.graphs import EvalGraph, score
from cnns.log import Counts, limit_run_ahead


class Evaluator:
    """Scores a model on a validation set, each example exactly once a round.

    The loader's batches are all of one size, and say which of their rows count.
    """

    def __init__(self, model: nn.Module, loader: nn.Module, *, top_k: int, use_fp16: bool = False):
        self.model, self.loader = model, loader
        self.graph: EvalGraph | ArrayGraph = EvalGraph(
            model, loader, top_k=top_k, use_fp16=use_fp16
        )

    def round(self, agreement: Agreement | None = None) -> tuple[Counts, float]:
        """Counts over the loader's `num_examples`, and the seconds it took (without compilation).

        Leaves the model in evaluation mode. Raises RunError where a label is outside the classes,
        and Interrupted where the processes agree to stop.
        """
        if self.model is not None:
            self.model.eval()
        start = time.perf_counter()
        outputs = []
        for batch in self.loader.batches():
            compiled = self.graph.is_compiled
            outputs.append(self.graph(*batch, **(agreement.vote() if agreement else {})))
            done = limit_run_ahead(outputs)
            if not compiled:
                start = time.perf_counter()
            if agreement:
                agreement.check(done)
        totals = np.array([[float(v.numpy()) for v in output[:4]] for output in outputs])
        seconds = time.perf_counter() - start
        top_1, top_k, bad_labels = totals[:, :3].sum(axis=0).astype(int).tolist()
        if bad_labels:
            raise RunError(
                f"the validation data have {bad_labels} labels outside the network's classes: the "
                "network is for another data set"
            )
        loss = float(totals[:, 3].sum()) / self.loader.num_examples
        return Counts(top_1, top_k, self.loader.num_examples, loss), seconds


class ArrayGraph:
    """As EvalGraph, for a network that is a function of arrays: images to logits (N, C)."""

    is_compiled = True

    def __init__(
        self, network: Callable[[np.ndarray], np.ndarray], loader: nn.Module, *, top_k: int
    ):
        self.network, self.loader, self.top_k = network, loader, top_k

    def __call__(self, row_mask: flow.Tensor, *batch: flow.Tensor) -> tuple[flow.Tensor, ...]:
        image, label = self.loader(*batch)
        logits = to_device(self.network(local(image).numpy()), label.placement)
        return score(logits, label, row_mask, top_k=self.top_k)


class ArrayEvaluator(Evaluator):
    """The same for a network that is a function of arrays, in one process on the CPU."""

    def __init__(
        self, network: Callable[[np.ndarray], np.ndarray], loader: nn.Module, *, top_k: int
    ):
        self.model, self.loader = None, loader
        self.graph = ArrayGraph(network, loader, top_k=top_k)
