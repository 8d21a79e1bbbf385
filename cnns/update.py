"""Updates that OneFlow 0.9.0 lacks, computes otherwise, or cannot make with a rate for each layer.

The training graph then has an optimizer that changes no weight: it only keeps the gradients,
averaged and clipped, or means of them. A second graph updates by what it keeps. Runs of two graphs
never overlap, so the second needs no message from the first, and the host waits for neither.

Rules, with w a parameter, g its gradient, d its weight decay, b the rate of the step times the
factor of its layer, |x| a norm over one parameter, and v a buffer that starts from 0:

    sgd, adam, rmsprop: OneFlow's own
    lars  v = momentum v + b coefficient |w| / (|g| + d |w|) (g + d w);  w = w - v
          (arXiv:1708.03888, algorithm 1)
    lamb  u = m / (sqrt(v) + epsilon) + d w;  w = w - b |w| / |u| u, with m and v adam's corrected
          means of g and of its square (arXiv:1904.00962, algorithm 2)

The factors of norms are for parameters of more than one dimension, and 1 where a norm is 0. Of
biases and batch norms they would be those of few numbers; timm, too, leaves them out.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.distributed import on_all_devices

Tensors = tuple[flow.Tensor, ...]
BETAS = (0.9, 0.999)  # of adam and lamb


class Gradients(flow.optim.SGD):
    """Changes no weight; after a step its momentum buffers are the gradients.

    What is made of them is `update`'s.
    """

    def __init__(self, groups: list[dict], update: "Update"):
        super().__init__(groups, lr=0.0, momentum=1.0)
        self.update = update

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        confs = super()._generate_conf_for_graph(train_conf, vars_conf)
        for conf in confs:
            conf.momentum_conf.beta = 0.0
        return confs


class Means(flow.optim.Adam):
    """Changes no weight; after a step its buffers m and v are adam's. The rest is `update`'s."""

    def __init__(self, groups: list[dict], update: "Update"):
        super().__init__(groups, lr=0.0, betas=BETAS)
        self.update = update


@dataclass(frozen=True)
class Settings:
    """Of the rules; each takes its own."""

    momentum: float = 0.0
    nesterov: bool = False
    decay_rate: float = 0.9
    epsilon: float = 1e-8
    trust_coefficient: float = 1e-3


@dataclass(frozen=True)
class Step:
    """What a rule is given beside a parameter and its buffers."""

    rate: flow.Tensor  # b, (1,)
    decay: float
    corrections: Tensors  # 1 - beta^t of both betas, (1,)
    skip: Tensors  # (1,) int64, where the training graph skips updates: not 0 for such a step


def kernel(name: str, *inputs: str, step: Step) -> flow.nn.Module:
    """An operator of OneFlow that changes variables, with the optional inputs of a step."""
    more = ("skip_if",) if step.skip else ()
    op = flow.stateful_op(f"{name}_update")
    for each in ("model", "model_diff", *inputs[:1], *more, *inputs[1:]):
        op = op.Input(each)
    return op.Build()


def sgd(w: flow.Tensor, kept: Tensors, own: Tensors, step: Step, settings: Settings) -> None:
    (g,) = kept
    if not own:
        op = kernel("sgd", "learning_rate", step=step)
        flow._C.dispatch_sgd_update(op, (w, g, step.rate, *step.skip), l2=step.decay)
        return
    flow._C.dispatch_momentum_update(
        kernel("momentum", "learning_rate", "momentum", step=step),
        (w, g, step.rate, *step.skip, *own),
        l2=step.decay,
        beta=settings.momentum,
        nesterov=settings.nesterov,
    )


def rmsprop(w: flow.Tensor, kept: Tensors, own: Tensors, step: Step, settings: Settings) -> None:
    flow._C.dispatch_rmsprop_update(
        kernel("rmsprop", "learning_rate", "mean_square", step=step),
        (w, *kept, step.rate, *step.skip, *own),
        l2=step.decay,
        decay_rate=settings.decay_rate,
        epsilon=settings.epsilon,
        centered=False,
    )


def adam(w: flow.Tensor, kept: Tensors, own: Tensors, step: Step, settings: Settings) -> None:
    corrections = ("bias_correction1", "bias_correction2")
    flow._C.dispatch_adam_update(
        kernel("adam", "learning_rate", *corrections, "m", "v", step=step),
        (w, *kept, step.rate, *step.skip, *step.corrections, *own),
        weight_decay=step.decay,
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=settings.epsilon,
        do_bias_correction=True,
    )


def lars(w: flow.Tensor, kept: Tensors, own: Tensors, step: Step, settings: Settings) -> None:
    """The rate is within the momentum, as in the paper."""
    (g,) = kept
    scale = step.rate
    if w.ndim > 1:
        size = norm(w)
        scale = scale * ratio(settings.trust_coefficient * size, norm(g) + step.decay * size)
    change = g + step.decay * w if step.decay else g
    if not own:
        op = kernel("sgd", "scale_by_tensor", step=step)
        flow._C.dispatch_sgd_update(op, (w, change, scale, *step.skip), learning_rate=1.0)
        return
    flow._C.dispatch_momentum_update(
        kernel("momentum", "scale_by_tensor", "momentum", step=step),
        (w, change, scale, *step.skip, *own),
        learning_rate=1.0,
        beta=settings.momentum,
    )


def lamb(w: flow.Tensor, kept: Tensors, own: Tensors, step: Step, settings: Settings) -> None:
    (m, v), (first, second) = kept, step.corrections
    # (m / first) / (sqrt(v / second) + epsilon)
    change = m / (flow.sqrt(v * (first * first / second)) + first * settings.epsilon)
    if step.decay:
        change = change + step.decay * w
    scale = step.rate
    if w.ndim > 1:
        scale = scale * ratio(norm(w), norm(change))
    op = kernel("sgd", "scale_by_tensor", step=step)
    flow._C.dispatch_sgd_update(op, (w, change, scale, *step.skip), learning_rate=1.0)


def norm(x: flow.Tensor) -> flow.Tensor:
    return flow._C.sqrt_square_sum(x).reshape(1)


def ratio(numerator: flow.Tensor, denominator: flow.Tensor) -> flow.Tensor:
    """1 where one of them is 0."""
    usable = flow.logical_and(numerator > 0, denominator > 0)
    return flow.masked_fill(numerator / denominator, flow.logical_not(usable), 1.0)


# name -> (what the optimizer of the training graph keeps of a parameter, and the buffers of the
# rule, by their names in OneFlow; the rule)
GRADIENTS, MEANS = ("momentum",), ("m", "v")
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable]] = {
    "sgd": (GRADIENTS, ("momentum",), sgd),
    "adam": (GRADIENTS, ("m", "v"), adam),
    "rmsprop": (GRADIENTS, ("mean_square",), rmsprop),
    "lars": (GRADIENTS, ("momentum",), lars),
    "lamb": (MEANS, (), lamb),
}


class Update:
    """The update of every step by a rule, on the devices of a model."""

    def __init__(
        self,
        rule: str,
        model: nn.Module,
        *,
        rate: Callable[[int], float],
        decay: Mapping[str, float],
        factors: Mapping[str, float],
        settings: Settings,
    ):
        """
        Args:
            rule: a key of RULES.
            model: on its devices.
            rate: the learning rate of a step, counted from 0.
            decay: the weight decay of each parameter that is trained, by name.
            factors: of the rates of the same parameters.
        """
        self.kept, own, self.rule = RULES[rule]
        self.own = () if own == ("momentum",) and not settings.momentum else own
        self.model, self.rate, self.settings = model, rate, settings
        self.decay, self.factors = decay, factors
        self.parameters = {n: p for n, p in model.named_parameters() if n in decay}
        self.names: list[str] = []  # of those that the network uses
        self.placement = next(model.parameters()).placement
        # Whether the training graph skips updates, as in half precision. Such a step changes
        # nothing here either, but `rate` counts it.
        self.skips = False
        self.step = 0  # the next one
        self.loaded: Mapping[str, flow.Tensor] = {}
        self.count = 0  # of updates made before the first step here
        self.before: flow.Tensor | None = None  # the mean m of the last parameter, then
        self.graph: nn.Graph | None = None
        self.variables: dict[str, flow.Tensor] = {}  # of its own, by their names in snapshots

    @property
    def keeps_gradients(self) -> bool:
        return self.kept == GRADIENTS

    def optimizer(self, group: dict) -> flow.optim.Optimizer:
        """That of the training graph."""
        return Gradients([group], self) if self.keeps_gradients else Means([group], self)

    def take(self, buffers: Mapping[str, flow.Tensor], *, count: int) -> None:
        """Start from the buffers of another run, by their names in snapshots, after `count`
        updates."""
        self.loaded, self.count = buffers, count
        # The training graph takes these as its variables, and changes them in its first step.
        means = [each for n in self.parameters if (each := buffers.get(f"model.{n}-m")) is not None]
        self.before = means[-1].clone() if means else None

    def hold(self, state: Mapping[str, flow.Tensor]) -> nn.Module:
        """A module of all that the update reads and changes beside the model.

        `state` is that of the training graph after its first step. A parameter that the network
        does not use has no buffers there, and stays as it is.
        """
        held = nn.Module()
        used = [name for name in self.parameters if f"model.{name}-{self.kept[0]}" in state]
        for i, name in enumerate(used):
            for suffix in self.kept:
                held.register_buffer(f"kept_{suffix}_{i}", state[f"model.{name}-{suffix}"])
            for suffix in self.own:
                key = f"model.{name}-{suffix}"
                self.variables[key] = self.loaded.get(key, self.zeros(name))
                held.register_buffer(f"{suffix}_{i}", self.variables[key])
        held.register_buffer("count", self.scalar(self.count))
        if not self.keeps_gradients:
            before = self.zeros(used[-1]) if self.before is None else self.before
            held.register_buffer("before", before)
        self.names, self.loaded = used, {}
        return held

    def zeros(self, name: str) -> flow.Tensor:
        shape = self.parameters[name].shape
        return flow.zeros(*shape, placement=self.placement, sbp=flow.sbp.broadcast)

    def scalar(self, value: float) -> flow.Tensor:
        return on_all_devices(np.array([value], np.float32), self.placement)

    def __call__(self) -> None:
        """Make the update by what the training graph has left."""
        assert self.graph is not None
        self.graph(self.scalar(self.rate(self.step)))
        self.step += 1

    def build(self, model: nn.Module, held: nn.Module, rate: flow.Tensor) -> flow.Tensor:
        """The update, inside a graph. `rate` is (1,); returns the updates made, (1,)."""

        def buffers(i: int, suffixes: tuple[str, ...], prefix: str = "") -> Tensors:
            return tuple(getattr(held, f"{prefix}{suffix}_{i}") for suffix in suffixes)

        skip: Tensors = ()
        made = 1.0
        with flow.no_grad():
            if self.skips:
                # A skipped update leaves what is kept of the last parameter as it was: gradients as
                # they were cleared after the update before, a mean as it was remembered then.
                last = buffers(len(self.names) - 1, self.kept, "kept_")[0]
                moved = last if self.keeps_gradients else last - held.before
                skip = ((moved.abs().sum() == 0).to(dtype=flow.int64).reshape(1),)
                subtract([(last, last) if self.keeps_gradients else (held.before, -moved)])
                made = 1 - skip[0].to(dtype=flow.float32)
            count = held.count + made
            corrections = tuple(-flow.expm1(count * math.log(beta)) for beta in BETAS)
            subtract([(held.count, held.count - count)])
            for i, name in enumerate(self.names):
                weight = reduce(getattr, name.split("."), model)
                factor = self.factors.get(name, 1.0)
                scaled = rate * factor if factor != 1.0 else rate
                step = Step(scaled, self.decay[name], corrections, skip)
                kept, own = buffers(i, self.kept, "kept_"), buffers(i, self.own)
                self.rule(weight, kept, own, step, self.settings)
        return count


def subtract(pairs: Iterable[tuple[flow.Tensor, flow.Tensor]]) -> None:
    """Take the second of each pair from the first, a variable or a parameter.

    Inside a graph only operators that change a variable can do it, such as SGD's.
    """
    op = flow.stateful_op("sgd_update").Input("model").Input("model_diff").Build()
    with flow.no_grad():
        for variable, difference in pairs:
            flow._C.dispatch_sgd_update(op, (variable, difference), learning_rate=1.0)
