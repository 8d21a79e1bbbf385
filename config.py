"""What flags each script has; what is made of them; and the arithmetic from epochs to steps.

The flags themselves, a record each, are in cnns/flags/, a file for each group. To add one, add its
record there and read it in the script. A script composes the groups that it uses. Names are those
of OneFlow-Benchmark's scripts. Closed choices are the keys of the table that builds the thing, so
that an advertised choice always exists.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cnns.convert.cache import Settings
from cnns.data.crops import Augmentation
from cnns.data.images import MAX_PIXELS
from cnns.errors import UsageError
from cnns.flags import checks
from cnns.flags.augment import CLASS_FLAGS, MIXING_FLAGS, PICTURE_FLAGS, TRAIN_SIZE_FLAGS
from cnns.flags.data import FOLDER_FLAGS, VAL_DATA_FLAGS, train_data_flags
from cnns.flags.defaults import BATCH_SIZE_PER_DEVICE, scaled_rate
from cnns.flags.devices import CUDA_TRAINING_FLAGS, DEVICE_FLAGS
from cnns.flags.export import EXPORT_FLAGS, GATE_FLAGS, NEEDS_DATA, VARIANT_FLAGS
from cnns.flags.network import (
    PRECISION_FLAGS,
    model_flags,
    preprocessing_flags,
    snapshot_model_flags,
)
from cnns.flags.parser import Flag, FlagParser
from cnns.flags.run import (
    BACKEND_FLAGS,
    CONFIG_FLAGS,
    LOG_FLAGS,
    RECORD_FLAGS,
    REPORT_FLAGS,
    RUN_FLAGS,
    SNAPSHOT_FLAGS,
    image_path_flags,
)
from cnns.flags.training import BATCH_FLAGS, optimizer_flags
from cnns.flags.values import COUNT, PIXELS, path
from cnns.models.layers import Switches
from cnns.places import VAL_DATA_DIR
from model_registry import MODELS
from ofrecord_util import DATA_ORDERS
from optimizer_util import NAMES, SCHEDULES, Schedule

OF_ONE_START = ("model_save_dir", "resume", "config")  # flags of training that are not recorded
SNAPSHOT_MODEL_FLAGS = snapshot_model_flags(MODELS)
COMMON_FLAGS = {
    "model": SNAPSHOT_MODEL_FLAGS,
    "devices": DEVICE_FLAGS,
    "precision and kernels": PRECISION_FLAGS,
}
# Of each script: what it does, the groups of its flags, the page on it, and the flag of values that
# stand without one.
SCRIPTS: dict[str, tuple[str, dict[str, dict[str, Flag]], str, str | None]] = {
    "train": (
        "Train a CNN with OneFlow and validate it after each epoch.",
        COMMON_FLAGS
        | {
            "flags from a file": CONFIG_FLAGS,
            "model": model_flags(MODELS),
            "CUDA only": CUDA_TRAINING_FLAGS,
            "batches": BATCH_FLAGS,
            "training data": train_data_flags(DATA_ORDERS),
            "augmentation": TRAIN_SIZE_FLAGS | PICTURE_FLAGS | MIXING_FLAGS,
            "uneven classes": CLASS_FLAGS,
            "validation data": VAL_DATA_FLAGS,
            "folders of images": FOLDER_FLAGS,
            "optimizer and schedule": optimizer_flags(MODELS, NAMES, SCHEDULES),
            "run": RUN_FLAGS,
            "log": LOG_FLAGS | RECORD_FLAGS,
        },
        "training",
        None,
    ),
    "evaluate": (
        "Score a snapshot on a validation set: every image exactly once.",
        COMMON_FLAGS
        | {
            "validation data": VAL_DATA_FLAGS
            | {
                "val_data_dir": replace(
                    VAL_DATA_FLAGS["val_data_dir"],
                    otherwise=f"that of the run that made the snapshot, else {VAL_DATA_DIR}",
                )
            },
            "folders of images": FOLDER_FLAGS,
            "snapshot": SNAPSHOT_FLAGS,
            "backend": BACKEND_FLAGS,
            "run": {
                "num_epochs": Flag(
                    "rounds over the validation set", COUNT, 1, aliases=("--num_epoch",)
                )
            },
            "log": LOG_FLAGS | REPORT_FLAGS,
        },
        "training",
        None,
    ),
    "inference": (
        "Classify images.",
        COMMON_FLAGS
        | {
            "snapshot": SNAPSHOT_FLAGS,
            "backend": BACKEND_FLAGS,
            "images": image_path_flags(
                "image files, directories of images with those below them, or - for paths on "
                "stdin; the flag's name may be left out",
                "cat.jpg",
            )
            | {
                "max_pixels": Flag(
                    "largest picture that is read, width times height", PIXELS, MAX_PIXELS
                ),
                "top_k": Flag("classes to print for each image", COUNT, 1),
                "batch_size": Flag(
                    "images that the network takes at once; the figures are the same to six digits",
                    COUNT,
                    1,
                ),
                "output": Flag(
                    "text: the path, then `probability name` lines; csv: a header, then a line for "
                    "each class; json: an object for each image, one a line",
                    default="text",
                    choices=("text", "csv", "json"),
                ),
            },
        },
        "inference",
        "image_path",
    ),
    "export": (
        "Export a snapshot to ONNX, and compare the file's answers with OneFlow's.",
        {
            "model": SNAPSHOT_MODEL_FLAGS,
            "snapshot": SNAPSHOT_FLAGS,
            "ONNX file": EXPORT_FLAGS,
            "deployment": VARIANT_FLAGS
            | {
                name: replace(flag, needs=("precision", NEEDS_DATA[name]))
                for name, flag in GATE_FLAGS.items()
            },
            "check": {
                "image_path": Flag(
                    "image files, or directories of images, to compare on, beside random ones",
                    otherwise="two images of the run's validation data, else data/cat.jpg and "
                    "data/coffee.jpg",
                    many=True,
                )
            },
        },
        "onnx",
        None,
    ),
}


def make_parser(script: str, doc: str | None = None) -> FlagParser:
    """The parser of a script, a key of SCRIPTS; `doc` is its docstring, for the help."""
    description, groups, page, rest = SCRIPTS[script]
    epilog = f"Read on: docs/{page}.md, docs/flags.md (all flags), docs/errors.md."
    return FlagParser(description, groups, rest=rest, doc=doc, epilog=epilog)


# Arguments made from flags.


def switches(args: Namespace) -> Switches:
    return Switches(**{name: getattr(args, name) for name in vars(Switches())})


def optimizer_settings(args: Namespace) -> dict[str, Any]:
    """The arguments of optimizer_util.build_optimizer but `name` and `learning_rate`."""
    same = ("layer_decay", "gradient_clipping", "momentum", "decay_rate", "epsilon")
    return {
        "weight_decay": args.wd,
        "norm_weight_decay": args.norm_wd,
        "bias_weight_decay": args.bias_wd,
        "nesterov": bool(args.nesterov),
        "trust_coefficient": args.trust_coefficient,
        **{name: getattr(args, name) for name in same},
    }


def loss_settings(args: Namespace) -> dict[str, Any]:
    """The arguments of cnns.losses.build_loss but `name` and `class_weights`."""
    return {
        "label_smoothing": args.label_smoothing,
        "target_threshold": args.bce_target_threshold,
        "sum_classes": bool(args.bce_sum),
    }


def augmentation(args: Namespace) -> Augmentation:
    return Augmentation(
        area=args.random_area,
        aspect_ratio=args.random_aspect_ratio,
        flip=args.random_flip,
        shuffle_buffer_size=args.shuffle_buffer_size,
        interpolation=args.train_interpolation or args.interpolation,
        auto_augment=args.auto_augment,
        num_ops=args.randaugment_num_ops or 0,
        magnitude=args.randaugment_magnitude or 0,
        color_jitter=args.color_jitter,
        random_erasing=args.random_erasing,
        repeats=args.repeated_augmentation,
        balanced=args.balanced_sampler,
    )


def restore_flags(args: Namespace) -> dict:
    """The arguments of cnns.checkpoint.find.restore but `switches`."""
    own = {name: getattr(args, name) for name in ("model_load_dir", "model", "num_classes")}
    return {"models": MODELS, **own, **preprocessing_flags(args)}


def folder_settings(args: Namespace) -> Settings:
    return Settings(**{name: getattr(args, name) for name in FOLDER_FLAGS})


def memory_flags(args: Namespace, *, batch: str) -> dict[str, str]:
    """What a process that ran out of memory was asked for, for `launch_script`.

    `batch` is the flag that sets the size of a batch.
    """
    given = {name: getattr(args, name) for name in ("model", "image_size", batch)}
    if given[batch] is None:
        given[batch] = BATCH_SIZE_PER_DEVICE
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    asked = " ".join(flags + ["--use_fp16"] * args.use_fp16)
    return {"asked": asked, "flag": f"--{batch}"}


def flags_of_a_job(args: Namespace, parser: FlagParser) -> dict[str, object]:
    """The flags that have to be the same on every node, by name, as JSON values.

    Paths may differ: what they lead to is compared separately.
    """
    compared = {
        name for name, flag in parser.flags.items() if flag.of != "node" and flag.parse is not path
    }
    return {f"--{name}": value for name, value in vars(args).items() if name in compared}


def recorded_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those flags of a training run that flags.yaml gives back to --config."""
    parser = make_parser("train")
    return {
        name: value
        for name, value in flags.items()
        if value is not None and parser.flags[name].of != "node" and name not in OF_ONE_START
    }


def finish_train_args(args: Namespace, *, device: str) -> list[str]:
    """Check the flags of the training script against one another, and fill in their defaults.

    Returns notices for the user. Raises UsageError.
    """
    flags = make_parser("train").flags
    return checks.finish_train_args(args, flags, models=MODELS, device=device)


# Epochs to steps.


@dataclass(frozen=True)
class Plan:
    """A run in steps. One step is one update of the weights."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    step_milestones: tuple[int, ...]  # steps from the start of the run
    exponential_steps: float  # steps per factor of the exponential schedule


def epochs_to_steps(
    *,
    num_examples: int,
    global_batch_size: int,
    num_epochs: int,
    warmup_epochs: float = 0,
    lr_step_epochs: Sequence[float] | None = None,
    lr_decay_epochs: float | None = None,
) -> Plan:
    """Turn durations in epochs into steps. An epoch ends with the step that completes the data.

    Raises UsageError where two of `lr_step_epochs` are the same step.

    >>> epochs_to_steps(num_examples=1281167, global_batch_size=256, num_epochs=90).total_steps
    450450
    """
    steps_per_epoch = math.ceil(num_examples / global_batch_size)
    total_steps = steps_per_epoch * num_epochs
    milestones = tuple(round(steps_per_epoch * epoch) for epoch in lr_step_epochs or ())
    if len(set(milestones)) < len(milestones):
        raise UsageError(
            f"--lr_step_epochs={','.join(f'{epoch:g}' for epoch in lr_step_epochs or ())}: two of "
            f"them are the same iteration, as an epoch has {steps_per_epoch}"
        )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        # At least one step is left for the schedule after it.
        warmup_steps=min(round(steps_per_epoch * warmup_epochs), total_steps - 1),
        step_milestones=milestones,
        exponential_steps=steps_per_epoch * (lr_decay_epochs or 1.0),
    )


def make_schedule(args: Namespace, plan: Plan) -> Schedule:
    """The schedule of a run, in steps."""
    return Schedule(
        args.lr_decay,
        learning_rate=scaled_rate(
            args.learning_rate, args.lr_scaling, batch_size=args.global_batch_size
        ),
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        step_milestones=plan.step_milestones,
        decay_rate=args.lr_decay_rate,
        exponential_steps=plan.exponential_steps,
        warmup_factor=args.lr_warmup_decay,
        minimum=args.lr_min,
        power=args.lr_power or 1.0,
    )
