"""Flags of the optimizer, its schedule and the batches."""

from collections.abc import Iterable, Mapping

from cnns.flags.defaults import (
    BATCH_SIZE_PER_DEVICE,
    CPU_TRIAL,
    EPSILON,
    FINETUNE,
    FINETUNE_BATCH_SIZE,
    LR_SCALINGS,
    WARMUP_EPOCHS,
    describe_learning_rates,
)
from cnns.flags.parser import Flag
from cnns.flags.values import COUNT, number, numbers, optimizer_name
from cnns.losses import LOSSES
from cnns.models.model import Model

BATCH_FLAGS = {
    "batch_size_per_device": Flag(
        "training images that a device takes at once",
        COUNT,
        otherwise="a share of --global_batch_size if that is given, else "
        f"{BATCH_SIZE_PER_DEVICE}, {CPU_TRIAL['batch_size_per_device']} for synthetic data on a "
        f"CPU, and with --finetune {FINETUNE_BATCH_SIZE}, less for small data",
        of="start",
    ),
    "global_batch_size": Flag(
        "training images of all devices per step, divided among them; a resumed run keeps it on "
        "any number of devices",
        COUNT,
        otherwise="--batch_size_per_device times the number of devices and --accumulate_steps",
    ),
    "accumulate_steps": Flag(
        "batches of --batch_size_per_device that make one iteration and one update, with the mean "
        "of their gradients; batch norms see one at a time",
        COUNT,
        1,
    ),
}


def optimizer_flags(
    models: Mapping[str, Model], optimizers: Iterable[str], schedules: Iterable[str]
) -> dict[str, Flag]:
    return {
        "optimizer": Flag(
            "adam decays weights decoupled from the gradient, so adamw is the same; lars and lamb, "
            "for large batches, are their papers' (arXiv:1708.03888, arXiv:1904.00962); "
            "--model_update=momentum is sgd",
            optimizer_name,
            "sgd",
            choices=optimizers,
            aliases=("--model_update",),
            fixed=True,
        ),
        "learning_rate": Flag(
            "peak learning rate", number(float, 0), otherwise=describe_learning_rates(models)
        ),
        "wd": Flag(
            "weight decay of every parameter for which --norm_wd and --bias_wd give no other",
            number(float, 0),
            1 / 32768,
            otherwise="1/32768",
        ),
        "norm_wd": Flag("weight decay of batch norms", number(float, 0), 0.0),
        "bias_wd": Flag(
            "weight decay of the biases of convolutions and linear layers",
            number(float, 0),
            otherwise="--wd",
        ),
        "nesterov": Flag("Nesterov's momentum", default=False, needs=("optimizer", ("sgd",))),
        "momentum": Flag(
            "momentum", number(float, 0, 1), 0.875, needs=("optimizer", ("sgd", "lars"))
        ),
        "trust_coefficient": Flag(
            "factor of the ratio of norms, weights to gradients",
            number(float, 0, above=True),
            0.001,
            needs=("optimizer", ("lars",)),
        ),
        "layer_decay": Flag(
            "factor of the learning rate of each layer to that of the next, the last layer having "
            "the whole rate; 1: off",
            number(float, 0, 1, above=True),
            1.0,
        ),
        "decay_rate": Flag(
            "decay of the mean square", number(float, 0, 1), 0.9, needs=("optimizer", ("rmsprop",))
        ),
        "epsilon": Flag(
            "added to the denominator of the update",
            number(float, 0),
            otherwise=" and ".join(f"{value:g} for {name}" for name, value in EPSILON.items()),
            needs=("optimizer", tuple(EPSILON)),
        ),
        "gradient_clipping": Flag(
            "largest global norm of the gradients, before weight decay is added; 0: no limit",
            number(float, 0),
            0.0,
        ),
        "batch_norm_momentum": Flag(
            "share of the newest batch in the running statistics of batch norms",
            number(float, 0, 1, above=True),
            otherwise=f"the network's own, and {FINETUNE['batch_norm_momentum']:g} with --finetune",
        ),
        "ema_decay": Flag(
            "also keep an average of the weights, of which an update keeps this share, adjusted to "
            "batch, --ema_steps and epochs as by torchvision (its recipe: 0.99998); 0: none",
            number(float, 0, 1),
            0.0,
        ),
        "ema_steps": Flag("iterations between updates of that average", COUNT, 32),
        "loss": Flag(
            "cross_entropy, or bce: each class by itself, as in the A recipes of timm",
            str.lower,
            "cross_entropy",
            choices=LOSSES,
        ),
        "stochastic_depth": Flag(
            "share of the images for which the last block is left out in training; 0 for the first "
            "block, and in proportion in between; 0: off",
            number(float, 0, 0.99),
            0.0,
        ),
        "label_smoothing": Flag("label smoothing factor", number(float, 0, 1), 0.1),
        "bce_target_threshold": Flag(
            "targets above it count as 1 and all others as 0; A recipes: 0.2",
            number(float, 0, 1),
            otherwise="targets as mixing and smoothing leave them",
            needs=("loss", ("bce",)),
        ),
        "bce_sum": Flag(
            "add up the classes of an image, in place of their mean",
            default=False,
            needs=("loss", ("bce",)),
        ),
        "warmup_epochs": Flag(
            "epochs of linear warm-up",
            number(float, 0),
            otherwise=f"{WARMUP_EPOCHS}, {FINETUNE['warmup_epochs']:g} with --finetune, but at "
            "most half of the run",
        ),
        "lr_scaling": Flag(
            "take --learning_rate, or its default, per 256 images of global batch and scale it: "
            "linear, in proportion; sqrt, by the square root, as is usual for adam",
            str.lower,
            "none",
            choices=LR_SCALINGS,
        ),
        "lr_warmup_decay": Flag(
            "share of the peak that the warm-up starts from", number(float, 0, 1), 0.0
        ),
        "lr_min": Flag(
            "learning rate at the end",
            number(float, 0),
            otherwise="0, and 1e-05 for polynomial, as in OneFlow-Benchmark",
            needs=("lr_decay", ("cosine", "polynomial")),
        ),
        "lr_power": Flag(
            "power of the share of steps that are left; for lars usually 2",
            number(float, 0, above=True),
            1.0,
            needs=("lr_decay", ("polynomial",)),
        ),
        "lr_decay": Flag("schedule after the warm-up", str.lower, "cosine", choices=schedules),
        "lr_step_epochs": Flag(
            "epochs after which the rate is divided by 10",
            numbers(None, low=0),
            (30.0, 60.0, 80.0),
            needs=("lr_decay", ("step",)),
        ),
        "lr_decay_rate": Flag(
            "factor per --lr_decay_epochs",
            number(float, 0, 1, above=True),
            0.94,
            needs=("lr_decay", ("exponential",)),
        ),
        "lr_decay_epochs": Flag(
            "epochs per --lr_decay_rate",
            number(float, 0, above=True),
            2.0,
            needs=("lr_decay", ("exponential",)),
        ),
    }
