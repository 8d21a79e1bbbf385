"""Which parameters decay, the optimizers, and the learning-rate schedules.

Everything here ends up inside the training graph. A schedule counts steps from 0, and its value is
the learning rate of the update made in that step.
"""

import math
import re
from collections.abc import Callable

import oneflow as flow
from oneflow import nn
from oneflow.optim import lr_scheduler

from layer_util import BATCH_NORMS

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


class _SelectiveDecay:
    """Mixed into an optimizer: one parameter group, of which some parameters do not decay.

    OneFlow clips gradients by the norm of a parameter group, so the usual two groups, one with and
    one without decay, would be clipped by two norms. With one group the norm is global; what
    differs between parameters is set here, in the configuration of the graph.
    """

    no_decay: tuple = ()

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        confs = super()._generate_conf_for_graph(train_conf, vars_conf)
        for parameter in self.no_decay:
            vars_conf[parameter].l2 = 0.0
        return confs


class SGD(_SelectiveDecay, flow.optim.SGD):
    pass


class RMSprop(_SelectiveDecay, flow.optim.RMSprop):
    pass


class AdamW(flow.optim.AdamW):
    """Its decay is no gradient term but a rate of the group, with exceptions by name pattern."""

    no_decay: tuple = ()

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        confs = super()._generate_conf_for_graph(train_conf, vars_conf)
        names = [vars_conf[parameter].name for parameter in self.no_decay]
        for conf in confs:
            conf.weight_decay_conf.excludes.pattern.extend(f"^{re.escape(name)}$" for name in names)
        return confs


def _sgd(groups, *, momentum, **common):
    return SGD(groups, momentum=momentum, **common)


def _adam(groups, *, epsilon, **common):
    return AdamW(groups, betas=(0.9, 0.999), eps=epsilon, **common)


def _rmsprop(groups, *, decay_rate, epsilon, **common):
    return RMSprop(groups, alpha=decay_rate, eps=epsilon, **common)


# name -> (builder, the settings of its own)
OPTIMIZERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "sgd": (_sgd, ("momentum",)),
    "adam": (_adam, ("epsilon",)),
    "rmsprop": (_rmsprop, ("decay_rate", "epsilon")),
}


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    gradient_clipping: float = 0.0,
    momentum: float | None = None,
    decay_rate: float | None = None,
    epsilon: float | None = None,
) -> flow.optim.Optimizer:
    """An optimizer over all parameters of `model`, for use inside an `nn.Graph`.

    Build it after the model has been moved to its placement.

    Args:
        name: a key of OPTIMIZERS. `adam` decays weights decoupled from the gradient (AdamW).
        learning_rate: peak of the schedule.
        weight_decay: for every parameter but those of batch norms. For sgd and rmsprop it is added
            to the gradient after clipping (L2).
        gradient_clipping: largest L2 norm over the gradients of all parameters; 0: none.
        momentum: of sgd.
        decay_rate: of rmsprop's mean square.
        epsilon: of adam and rmsprop.
    """
    builder, own = OPTIMIZERS[name]
    parameters = dict(model.named_parameters())
    group = {"params": list(parameters.values())}
    if gradient_clipping > 0:
        group |= {"clip_grad_max_norm": gradient_clipping, "clip_grad_norm_type": 2.0}
    settings = {"momentum": momentum, "decay_rate": decay_rate, "epsilon": epsilon}
    optimizer = builder(
        [group],
        lr=learning_rate,
        weight_decay=weight_decay,
        **{setting: settings[setting] for setting in own},
    )
    optimizer.no_decay = tuple(parameters[name] for name in sorted(no_decay_names(model)))
    return optimizer


def _cosine(optimizer, *, decay_steps, **_):
    return lr_scheduler.CosineDecayLR(optimizer, decay_steps=decay_steps)


def _step(optimizer, *, step_milestones, warmup_steps, **_):
    milestones = [step - warmup_steps for step in step_milestones]
    return lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=STEP_FACTOR)


def _polynomial(optimizer, *, decay_steps, **_):
    return lr_scheduler.PolynomialLR(
        optimizer, decay_steps, end_learning_rate=POLYNOMIAL_END_LEARNING_RATE, power=1.0
    )


def _exponential(optimizer, *, decay_rate, exponential_steps, **_):
    return lr_scheduler.ExponentialLR(optimizer, gamma=decay_rate ** (1 / exponential_steps))


def _none(optimizer, **_):
    return None


SCHEDULES: dict[str, Callable] = {
    "cosine": _cosine,
    "step": _step,
    "polynomial": _polynomial,
    "exponential": _exponential,
    "none": _none,
}


def learning_rate_at(
    step: int,
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    step_milestones: tuple[int, ...] = (),
    decay_rate: float = 1.0,
    exponential_steps: float = 1.0,
) -> float:
    """The rate of one update by the formulas of `build_schedule`, for messages."""
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if name == "cosine":
        return learning_rate * (1 + math.cos(math.pi * progress)) / 2
    if name == "step":
        return learning_rate * STEP_FACTOR ** sum(step >= each for each in step_milestones)
    if name == "polynomial":
        return learning_rate + (POLYNOMIAL_END_LEARNING_RATE - learning_rate) * progress
    if name == "exponential":
        return learning_rate * decay_rate ** ((step - warmup_steps) / exponential_steps)
    return learning_rate


def build_schedule(
    optimizer: flow.optim.Optimizer,
    name: str,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    step_milestones: tuple[int, ...] = (),
    decay_rate: float = 1.0,
    exponential_steps: float = 1.0,
):
    """The learning-rate schedule of a run, or None where the rate is constant.

    With b the optimizer's rate, w = warmup_steps, s the step and n = total_steps - w:

        s < w          b * s / w
        cosine         b * (1 + cos(pi * (s - w) / n)) / 2
        step           b * 0.1 ** (number of step_milestones <= s)
        polynomial     b + (1e-5 - b) * (s - w) / n
        exponential    b * decay_rate ** ((s - w) / exponential_steps)
        none           b

    Args:
        name: a key of SCHEDULES.
        total_steps: updates of the whole run.
        warmup_steps: updates of the linear warm-up, less than `total_steps`.
        step_milestones: steps, counted from the start of the run and not within the warm-up.
    """
    schedule = SCHEDULES[name](
        optimizer,
        decay_steps=total_steps - warmup_steps,
        warmup_steps=warmup_steps,
        step_milestones=step_milestones,
        decay_rate=decay_rate,
        exponential_steps=exponential_steps,
    )
    if warmup_steps == 0:
        return schedule
    return lr_scheduler.WarmUpLR(
        optimizer if schedule is None else schedule,
        warmup_factor=0.0,
        warmup_iters=warmup_steps,
        warmup_method="linear",
        warmup_prefix=True,  # else the ramp would aim below the base rate
    )
