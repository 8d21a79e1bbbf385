"""An exponential moving average of the weights, beside the network that is trained.

The average is a network of its own, with parameters and running statistics blended into it inside
the training graph, so nothing waits for the host:

    average = average - share * (average - weights)

A step sees the weights as the update before it has left them. So what is due after an update is
done by the next step, or by `settle`, with the same arithmetic, before the average is read. With
accumulated gradients it is always done by `settle`, outside the graph: OneFlow 0.9.0 aborts on CUDA
where it compiles both.

When it is due, and how large the share is, follows torchvision's reference script.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.checkpoint.snapshot import state_arrays, state_tensors
from cnns.checkpoint.weights import load_weights
from cnns.distributed import average_statistics, on_all_devices, place
from cnns.update import subtract


def adjusted_decay(decay: float, *, batch_size: int, interval: int, num_epochs: int) -> float:
    """What an update keeps of the average, for a `decay` that does not depend on these.

    1 - decay counts for one image and one epoch: it is multiplied by the images between two
    updates and divided by the epochs.
    """
    return 1.0 - min(1.0, (1.0 - decay) * batch_size * interval / num_epochs)


@dataclass(frozen=True)
class AverageSchedule:
    """After which updates the average is, and what share of the weights then goes into it."""

    decay: float  # adjusted
    interval: int  # iterations of an epoch
    warmup_epochs: float

    def share(self, epoch: int, iteration: int) -> float:
        """After the update of an iteration, counted from 0 in its epoch; 0: nothing.

        During the warm-up, and at the first time after it, the weights are copied.
        """
        if iteration % self.interval:
            return 0.0
        first = iteration == 0 and epoch == math.ceil(self.warmup_epochs)
        return 1.0 if epoch < self.warmup_epochs or first else 1.0 - self.decay


def blend(average: Any, model: Any, names: Iterable[str], share: flow.Tensor) -> None:
    """Move parameters and buffers of `average` towards those of `model` by `share`, a scalar; both
    may be modules of a graph."""

    def pairs() -> Iterator[tuple[flow.Tensor, flow.Tensor]]:
        for name in names:
            mine, theirs = (reduce(getattr, name.split("."), m) for m in (average, model))
            yield mine, (mine - theirs) * share

    subtract(pairs())


def make_average_schedule(flags: Mapping[str, Any], *, batch_size: int) -> AverageSchedule:
    """That of a run with these flags; `batch_size` is the global one."""
    decay = adjusted_decay(
        flags["ema_decay"],
        batch_size=batch_size,
        interval=flags["ema_steps"],
        num_epochs=flags["num_epochs"],
    )
    return AverageSchedule(decay, flags["ema_steps"], flags["warmup_epochs"])


class Average:
    """The averaged network of a run, and what is due."""

    def __init__(
        self,
        network: nn.Module,
        model: nn.Module,
        schedule: AverageSchedule,
        *,
        start: tuple[dict[str, np.ndarray], str] | None,
        device: str,
        within_graph: bool = True,
    ):
        """
        Args:
            network: one like `model`, which is trained, but still on the host.
            start: the average to start from, and the path of its snapshot; None: the weights.
            within_graph: whether the training graph has this average.
        """
        arrays, path = start or (state_arrays(model), "the network")
        load_weights(network, arrays, path=path)
        self.network, self.model, self.schedule = place(network, device).eval(), model, schedule
        self.placement = flow.env.all_device_placement(device)
        self.within_graph = within_graph
        self.names = [*state_tensors(network)]  # of all that is averaged
        self.due = 0.0  # share of the newest weights that is not in the average yet
        self.shares: dict[float, flow.Tensor] = {}  # sent to the devices once

    def arguments(self) -> dict[str, flow.Tensor]:
        """For the call of a training graph, which does what is due."""
        if not self.within_graph:
            return {}
        share, self.due = self.due, 0.0
        return {"share": self.tensor(share)}

    def note(self, epoch: int, iteration: int) -> None:
        """An update has been made."""
        self.due = self.schedule.share(epoch, iteration)
        if not self.within_graph:
            self.settle()

    def settle(self) -> None:
        """Do what is due; all processes call this. Does not wait for the devices."""
        if self.due:
            blend(self.network, self.model, self.names, self.tensor(self.due))
            self.due = 0.0

    def finish(self) -> None:
        """Before it is read: do what is due, and give all processes the same statistics."""
        self.settle()
        average_statistics(self.network)

    def tensor(self, share: float) -> flow.Tensor:
        if share not in self.shares:
            self.shares[share] = on_all_devices(np.array([share], np.float32), self.placement)
        return self.shares[share]
