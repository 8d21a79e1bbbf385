"""Which parameters decay, the optimizers, and the learning-rate schedules.

Everything here ends up inside the training graph. A schedule counts steps from 0, and its value is
the learning rate of the update made in that step.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oneflow as flow
from oneflow import nn
from oneflow.optim import lr_scheduler

from cnns.models.layers import BATCH_NORMS
from cnns.update import RULES, Settings, Update

POLYNOMIAL_END_LEARNING_RATE = 1e-5  # as in OneFlow-Benchmark
STEP_FACTOR = 0.1


def no_decay_names(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: those of batch norms."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }


def decay_rates(
    model: nn.Module, weight_decay: float, *, norm: float = 0.0, bias: float | None = None
) -> dict[str, float]:
    """The weight decay of each parameter by name: `norm` that of batch norms, `bias` that of all
    other biases (None: as of weights), `weight_decay` that of weights."""
    norms = no_decay_names(model)

    def rate(name: str) -> float:
        if name in norms:
            return norm
        return bias if bias is not None and name.endswith("bias") else weight_decay

    return {name: rate(name) for name, _ in model.named_parameters()}


class _SelectiveDecay:
    """Mixed into an optimizer: one parameter group, whose parameters decay at rates of their own.

    OneFlow clips gradients by the norm of a parameter group, so the usual two groups, one with and
    one without decay, would be clipped by two norms. With one group the norm is global; what
    differs between parameters is set here, in the configuration of the graph.
    """

    decay_of: tuple = ()  # pairs of parameters and rates

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        confs = super()._generate_conf_for_graph(train_conf, vars_conf)  # type: ignore[misc]
        for parameter, rate in self.decay_of:
            vars_conf[parameter].l2 = rate
        return confs


class SGD(_SelectiveDecay, flow.optim.SGD):
    pass


class RMSprop(_SelectiveDecay, flow.optim.RMSprop):
    pass


class AdamW(flow.optim.AdamW):
    """Its decay is not a gradient term but a rate of the group, with exceptions by name pattern,
    which do not decay."""

    decay_of: tuple = ()

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        confs = super()._generate_conf_for_graph(train_conf, vars_conf)
        names = [vars_conf[parameter].name for parameter, rate in self.decay_of if not rate]
        for conf in confs:
            conf.weight_decay_conf.excludes.pattern.extend(f"^{re.escape(name)}$" for name in names)
        return confs


# Each takes the one parameter group, and of the settings those that are its own.
OPTIMIZERS: dict[str, Callable[..., flow.optim.Optimizer]] = {
    "sgd": lambda group, own, **common: SGD(
        [group], momentum=own["momentum"], nesterov=own["nesterov"], **common
    ),
    "adam": lambda group, own, **common: AdamW(
        [group], betas=(0.9, 0.999), eps=own["epsilon"], **common
    ),
    "rmsprop": lambda group, own, **common: RMSprop(
        [group], alpha=own["decay_rate"], eps=own["epsilon"], **common
    ),
}
NAMES = {*OPTIMIZERS, *RULES}  # those of RULES alone are not OneFlow's, whose formulas differ


def layers_of(model: nn.Module) -> list[list[str]]:
    """The parameters' names by layer, from the input on, for `layer_factors`.

    A layer is a top-level module, or a numbered part of one (layer1.0); what has only parameters of
    one dimension, a batch norm, belongs to the layer before it. Those of ResNets are timm's.
    """
    layers: dict[str, list[str]] = {}
    weights: set[str] = set()
    for name, parameter in model.named_parameters():
        top, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        layer = f"{top}.{number}" if number.isdigit() else top
        layers.setdefault(layer, []).append(name)
        if parameter.ndim > 1:
            weights.add(layer)
    merged: list[list[str]] = []
    for layer, names in layers.items():
        if layer in weights or not merged:
            merged.append(names)
        else:
            merged[-1] += names
    return merged


def layer_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The factor of each parameter's learning rate by name: 1 in the last layer, and layer_decay
    times that of the layer behind it in every other one."""
    return {
        name: layer_decay**back
        for back, names in enumerate(reversed(layers_of(model)))
        for name in names
    }


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    norm_weight_decay: float = 0.0,
    bias_weight_decay: float | None = None,
    layer_decay: float = 1.0,
    gradient_clipping: float = 0.0,
    momentum: float | None = None,
    nesterov: bool = False,
    decay_rate: float | None = None,
    epsilon: float | None = None,
    trust_coefficient: float | None = None,
) -> flow.optim.Optimizer:
    """An optimizer over the parameters of `model` that are not frozen, for an `nn.Graph`.

    Build it after the model has been moved to its placement.

    Args:
        name: one of NAMES. `adam` decays weights decoupled from the gradient (AdamW).
        learning_rate: peak of the schedule.
        weight_decay, norm_weight_decay, bias_weight_decay: see `decay_rates`. For sgd and rmsprop
            it is added to the gradient after clipping (L2). With adam all that decay have one rate.
        layer_decay: see `layer_factors`. Unless it is 1, and for lars and lamb, the optimizer only
            keeps gradients, and its `update` does the rest; see cnns/update.py.
        gradient_clipping: largest L2 norm over the gradients of all parameters; 0: none.
        momentum: of sgd and lars.
        nesterov: of sgd.
        decay_rate: of rmsprop's mean square.
        epsilon: of adam, rmsprop and lamb.
        trust_coefficient: of lars.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    group: dict[str, Any] = {"params": list(parameters.values())}
    if gradient_clipping > 0:
        group |= {"clip_grad_max_norm": gradient_clipping, "clip_grad_norm_type": 2.0}
    own: dict[str, Any] = {
        "momentum": momentum,
        "nesterov": nesterov,
        "decay_rate": decay_rate,
        "epsilon": epsilon,
        "trust_coefficient": trust_coefficient,
    }
    rates = decay_rates(model, weight_decay, norm=norm_weight_decay, bias=bias_weight_decay)
    if name not in OPTIMIZERS or layer_decay != 1.0:
        return Update(
            name,
            model,
            rate=lambda step: learning_rate,
            decay={each: rates[each] for each in parameters},
            factors=layer_factors(model, layer_decay),
            settings=Settings(**{key: value for key, value in own.items() if value is not None}),
        ).optimizer(group)
    common = max(rates.values(), default=0.0) if name == "adam" else weight_decay
    assert name != "adam" or {*rates.values()} <= {0.0, common}
    optimizer = OPTIMIZERS[name](group, own, lr=learning_rate, weight_decay=common)
    optimizer.decay_of = tuple((each, rates[name]) for name, each in parameters.items())
    return optimizer


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step of a run: as a number, and as OneFlow's inside the graph.

    With b the peak rate, w = warmup_steps, s the step from 0 and n = total_steps - w, the rate of
    the update made in step s is

        s < w          b * (f + (1 - f) * s / w)        f = warmup_factor
        cosine         m + (b - m) * (1 + cos(pi * (s - w) / n)) / 2        m = minimum
        polynomial     m + (b - m) * (1 - (s - w) / n) ** power
        step           b * 0.1 ** (number of step_milestones <= s)
        exponential    b * decay_rate ** ((s - w) / exponential_steps)
        none           b

    Args:
        name: a key of SCHEDULES.
        learning_rate: the peak.
        total_steps: updates of the whole run.
        warmup_steps: updates of the linear warm-up, less than `total_steps`.
        step_milestones: steps, counted from the start of the run and not within the warm-up.
        warmup_factor: share of the peak that the warm-up starts from.
        minimum: where cosine and polynomial end; None: 0, and 1e-5 of the polynomial.
        power: of the polynomial.
    """

    name: str
    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    step_milestones: tuple[int, ...] = ()
    decay_rate: float = 1.0
    exponential_steps: float = 1.0
    warmup_factor: float = 0.0
    minimum: float | None = None
    power: float = 1.0

    def rate(self, step: int) -> float:
        """The rate of one update."""
        if step < self.warmup_steps:
            done = step / self.warmup_steps
            return self.learning_rate * (self.warmup_factor + (1 - self.warmup_factor) * done)
        formula, _ = SCHEDULES[self.name]
        return formula(self, step)

    def build(self, optimizer: flow.optim.Optimizer, *, first_step: int = 0) -> Any:
        """The same for a graph, or None where the rate is constant.

        `optimizer` was built with this schedule's learning rate. Its state, where a run is resumed
        at `first_step`, says where it stands, but for what is left to `Update`.
        """
        update = getattr(optimizer, "update", None)
        if update is not None:
            update.rate, update.step = self.rate, first_step
            return None
        _, builder = SCHEDULES[self.name]
        schedule = builder(self, optimizer)
        if self.warmup_steps == 0:
            return schedule
        return lr_scheduler.WarmUpLR(
            optimizer if schedule is None else schedule,
            warmup_factor=self.warmup_factor,
            warmup_iters=self.warmup_steps,
            warmup_method="linear",
            warmup_prefix=True,  # else the ramp would aim below the base rate
        )

    @property
    def decay_steps(self) -> int:
        return self.total_steps - self.warmup_steps

    def progress(self, step: int) -> float:
        """From 0 at the end of the warm-up to 1 at the end of the run."""
        return (step - self.warmup_steps) / self.decay_steps

    @property
    def end(self) -> float:
        if self.minimum is not None:
            return self.minimum
        return POLYNOMIAL_END_LEARNING_RATE if self.name == "polynomial" else 0.0

    @property
    def factor_of_a_step(self) -> float:
        """Of the exponential schedule."""
        return self.decay_rate ** (1 / self.exponential_steps)


# name -> (the rate after the warm-up, the same as OneFlow's schedule)
SCHEDULES: dict[str, tuple[Callable, Callable]] = {
    "cosine": (
        lambda s, step: (
            s.end + (s.learning_rate - s.end) * (1 + math.cos(math.pi * s.progress(step))) / 2
        ),
        lambda s, optimizer: lr_scheduler.CosineDecayLR(
            optimizer,
            decay_steps=s.decay_steps,
            alpha=s.end / s.learning_rate if s.end else 0.0,
        ),
    ),
    "step": (
        lambda s, step: s.learning_rate * STEP_FACTOR ** sum(step >= m for m in s.step_milestones),
        lambda s, optimizer: lr_scheduler.MultiStepLR(
            optimizer, [step - s.warmup_steps for step in s.step_milestones], gamma=STEP_FACTOR
        ),
    ),
    "polynomial": (
        lambda s, step: s.end + (s.learning_rate - s.end) * (1 - s.progress(step)) ** s.power,
        lambda s, optimizer: lr_scheduler.PolynomialLR(
            optimizer, s.decay_steps, end_learning_rate=s.end, power=s.power
        ),
    ),
    "exponential": (
        lambda s, step: s.learning_rate * s.factor_of_a_step ** (step - s.warmup_steps),
        lambda s, optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=s.factor_of_a_step),
    ),
    "none": (lambda s, step: s.learning_rate, lambda s, optimizer: None),
}
