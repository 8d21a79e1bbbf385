"""Defaults that depend on the device, the data, the network or other flags.

Nothing here parses or checks: see training.py and checks.py beside this file.
"""

import math
from collections.abc import Callable, Mapping

from cnns.errors import UsageError
from cnns.models.model import Model

BATCH_SIZE_PER_DEVICE = 64
NUM_EPOCHS = 90
WARMUP_EPOCHS = 5
SYNTHETIC_STEPS_PER_EPOCH = 20
# What a run on synthetic data takes on a CPU, so that a first try ends in about half a minute.
CPU_TRIAL = {"image_size": 32, "batch_size_per_device": 8, "num_epochs": 2}
# Learning rates per 256 images of global batch. sgd: Goyal et al. (arXiv:1706.02677) scaled as in
# NVIDIA's and OneFlow's ResNet-50 v1.5; adam: its paper's 0.001; rmsprop: 0.045 at batch 1600, of
# the Inception-v3 paper (arXiv:1512.00567); lamb: 0.005 at batch 2048, of "ResNet strikes back"
# (arXiv:2110.00476). lars has none.
LEARNING_RATE_PER_256 = {"sgd": 0.256, "adam": 0.001, "rmsprop": 0.0072, "lamb": 0.000625}
# --lr_scaling: the factor of a rate per 256 images for so many times 256 of them.
LR_SCALINGS: dict[str, Callable[[float], float]] = {
    "none": lambda times: 1.0,
    "linear": lambda times: times,
    "sqrt": math.sqrt,
}
KEEP_SNAPSHOTS = 3
# What --finetune takes unless flags say otherwise; docs/weights.md has how they were found.
# The momentum of EfficientNet's batch norms, 0.01, is for long runs: after 90 steps its running
# statistics are still mostly those of ImageNet, and validation lags far behind training.
FINETUNE = {
    "num_epochs": 10,
    "warmup_epochs": 1.0,
    "keep_snapshots": 1,
    "batch_norm_momentum": 0.1,
}
FINETUNE_RATE_PER_256 = {"sgd": 0.1, "adam": 0.002, "rmsprop": 0.0072}
# Largest and smallest batch per device; the smallest that gives an epoch so many steps is between.
FINETUNE_BATCH_SIZE, FINETUNE_MIN_BATCH_SIZE, FINETUNE_STEPS = 32, 8, 10
EPSILON = {"adam": 1e-8, "rmsprop": 1.0, "lamb": 1e-6}


def describe_learning_rates(models: Mapping[str, Model]) -> str:
    text = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATE_PER_256.items())
    text += ", per 256 images of global batch"
    networks: dict[tuple[str, float], list[str]] = {}
    for model, entry in sorted(models.items()):
        for own in entry.learning_rates.items():
            networks.setdefault(own, []).append(model)
    for (optimizer, rate), names in networks.items():
        text += f"; {optimizer} for {' and '.join(names)}: {rate:g}"
    tuned = ", ".join(f"{rate:g} for {name}" for name, rate in FINETUNE_RATE_PER_256.items())
    return f"{text}; with --finetune {tuned}"


def finetune_batch_size(num_examples: int, num_parts: int) -> int:
    """Images that a device takes at once with --finetune: so that small data have some steps.

    `num_parts` of them make the batch of a step.
    """
    share = num_examples // num_parts
    size = FINETUNE_BATCH_SIZE
    while size > FINETUNE_MIN_BATCH_SIZE and share < size * FINETUNE_STEPS:
        size //= 2
    return max(1, min(size, share))


def learning_rate_per_256(model: Model, optimizer: str, *, finetune: bool) -> float:
    """The peak learning rate unless one is given, per 256 images of global batch.

    Raises UsageError where there is none for the optimizer.
    """
    own = model.learning_rates.get(optimizer)
    rates = FINETUNE_RATE_PER_256 if finetune else LEARNING_RATE_PER_256
    if optimizer not in rates:
        tuning = " with --finetune" if finetune and optimizer in LEARNING_RATE_PER_256 else ""
        raise UsageError(
            f"--optimizer={optimizer} has no default rate{tuning}; give --learning_rate"
        )
    rate = rates[optimizer]
    return rate if own is None else min(own, rate) if finetune else own


def scaled_rate(rate: float, scaling: str, *, batch_size: int) -> float:
    """A learning rate for a global batch, by a key of LR_SCALINGS."""
    return rate * LR_SCALINGS[scaling](batch_size / 256)
