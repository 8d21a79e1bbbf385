"""Checks and defaults that look at more than one flag."""

import os
from argparse import Namespace
from collections.abc import Mapping

from cnns.convert.cache import is_photo_folder
from cnns.distributed import choose_device
from cnns.errors import UsageError
from cnns.flags.augment import (
    TRAIN_SIZE_FLAGS,
    check_class_flags,
    check_mixing,
    check_train_sizes,
    choose_data_order,
    picture_flags_given,
)
from cnns.flags.data import AUGMENTATION_FLAGS, FOLDER_FLAGS
from cnns.flags.defaults import (
    BATCH_SIZE_PER_DEVICE,
    CPU_TRIAL,
    EPSILON,
    FINETUNE,
    KEEP_SNAPSHOTS,
    NUM_EPOCHS,
    WARMUP_EPOCHS,
    learning_rate_per_256,
    scaled_rate,
)
from cnns.flags.devices import CUDA_FLAGS
from cnns.flags.network import PRECISION_FLAGS, PREPROCESSING_FLAGS
from cnns.flags.parser import Flag, show
from cnns.launch.external import refuse_ranks
from cnns.log import notice
from cnns.models.model import Model
from cnns.resume import num_parts, num_processes


def check_precision_flags(args: Namespace, *, device: str) -> list[str]:
    """Refuse on a CPU what only CUDA can do. Returns notices for the user."""
    if device == "cuda":
        return []
    for flag in CUDA_FLAGS:
        if getattr(args, flag, None):
            raise UsageError(f"--{flag} needs CUDA, and the device is a CPU; leave it out")
    return ["--use_fp16: a CPU computes in float32."] if args.use_fp16 else []


def take_device(args: Namespace) -> str:
    """`cuda` or `cpu`, which can do what the flags ask for. Raises UsageError."""
    device = choose_device(args.device, count=args.gpu_num_per_node)
    for text in check_precision_flags(args, device=device):
        notice(text)
    return device


# Flags for what an exported file itself determines, or for how OneFlow computes.
OF_ONEFLOW = {
    **dict.fromkeys(
        ("model_load_dir", "model", "num_classes"), "the network comes from --onnx_path"
    ),
    **dict.fromkeys(
        PREPROCESSING_FLAGS,
        "the preprocessing is that of the file; give it to resnet_to_onnx.py",
    ),
    **dict.fromkeys(PRECISION_FLAGS, "it is about how OneFlow computes"),
}


def check_backend_flags(args: Namespace) -> None:
    """Refuse flags that ONNX Runtime as backend would ignore."""
    if args.backend == "oneflow":
        return
    for flag, why in OF_ONEFLOW.items():
        if getattr(args, flag) not in (None, False):
            raise UsageError(f"--{flag} contradicts --backend=onnxruntime: {why}; leave it out")
    if args.device == "cuda":
        raise UsageError(
            "--device=cuda contradicts --backend=onnxruntime, which computes on the CPU; leave it "
            "out"
        )
    refuse_ranks("--backend=onnxruntime")
    if num_processes(vars(args)) > 1:
        raise UsageError(
            "--num_nodes and --gpu_num_per_node contradict --backend=onnxruntime, which is one "
            "process; leave them out"
        )


def has_validation(args: Namespace) -> bool:
    """Whether there are data to validate on after each epoch."""
    if args.train_data_dir is None or args.val_data_dir is not None:
        return True
    return args.val_split != 0 and is_photo_folder(args.train_data_dir)


def check_folder_flags(args: Namespace, *paths: str | None) -> None:
    """Refuse flags of folders of images where there is none. What does not exist is named later."""
    given = [path for path in paths if path is not None]
    if not (given and all(map(os.path.exists, given))) or any(map(is_photo_folder, given)):
        return
    for name, flag in FOLDER_FLAGS.items():
        if getattr(args, name) != flag.default:
            raise UsageError(
                f"--{name} belongs to a folder of images, and {given[0]} is not one; leave it out"
            )


def check_data_flags(args: Namespace, flags: Mapping[str, Flag]) -> None:
    """Refuse flags that the chosen kind of data would ignore."""

    def refuse(why: str, *names: str) -> None:
        for name in names:
            if getattr(args, name) != flags[name].default:
                raise UsageError(f"--{name} {why}; leave it out")

    of_reader = ("shuffle_buffer_size", "gpu_image_decoder")
    of_parts = ("data_order", *of_reader)
    if is_photo_folder(args.train_data_dir):
        refuse("has no effect on a folder of images", "train_data_part_num")
    check_folder_flags(args, args.train_data_dir, args.val_data_dir)
    if args.train_data_dir is None:
        of_files = ("train_data_part_num", "val_data_dir", "val_data_part_num", *FOLDER_FLAGS)
        refuse("needs --train_data_dir, and without it data are synthetic", *of_files)
        ignored = (*AUGMENTATION_FLAGS, *TRAIN_SIZE_FLAGS, "class_weights")
        ignored += (*picture_flags_given(args, flags), *of_parts, "val_batch_size_per_device")
        refuse("has no effect on synthetic data", *ignored)
        if args.report:
            raise UsageError("--report has no effect on synthetic data; leave it out")
        return
    if args.train_data_dir.endswith(".npz"):
        refuse("has no effect on an .npz file, which is shuffled as a whole", *of_parts)
    if args.data_order == "global":
        refuse("contradicts --data_order=global: it belongs to OneFlow's reader", *of_reader)
    if not has_validation(args):
        of_validation = ("val_data_part_num", "num_val_examples", "val_batch_size_per_device")
        refuse("needs --val_data_dir", *of_validation, "best_metric", "early_stop_epochs")


def take_batch_size(args: Namespace) -> None:
    """Divide --global_batch_size among the processes, and on each into the parts of
    --accumulate_steps. Raises UsageError where it cannot be.
    """
    whole, ranks, parts = args.global_batch_size, num_processes(vars(args)), num_parts(vars(args))
    if whole is None:
        return
    if whole % ranks:
        raise UsageError(
            f"--global_batch_size={whole} cannot be divided among {ranks} processes; their number "
            "must be a divisor of it"
        )
    if whole % parts:
        raise UsageError(
            f"--global_batch_size={whole}, {whole // ranks} for each of {ranks} processes, cannot "
            f"be divided by --accumulate_steps={args.accumulate_steps}; give a divisor of "
            f"{whole // ranks}"
        )
    if args.batch_size_per_device not in (None, whole // parts):
        steps = f" in {args.accumulate_steps} steps" if args.accumulate_steps > 1 else ""
        raise UsageError(
            f"--batch_size_per_device={args.batch_size_per_device} contradicts "
            f"--global_batch_size={whole}, which is {whole // parts} for each of {ranks} "
            f"processes{steps}; leave one of them out"
        )
    args.batch_size_per_device = whole // parts


def check_recipe_flags(args: Namespace, flags: Mapping[str, Flag]) -> None:
    """Raise UsageError where items of recipes contradict one another."""
    if args.accumulate_steps > 1 and args.use_fp16:
        raise UsageError(
            "--accumulate_steps contradicts --use_fp16: OneFlow 0.9.0 cannot compile batch norms "
            "with both; leave one of them out"
        )
    if args.accumulate_steps > 1 and args.gpu_image_decoder:
        raise UsageError(
            "--gpu_image_decoder reads inside the graph, once for each of --accumulate_steps; "
            "leave one of them out"
        )
    if args.stochastic_depth and args.fuse_bn_add_relu:
        raise UsageError(
            "--stochastic_depth contradicts --fuse_bn_add_relu: it comes between batch norm and "
            "sum; leave one of them out"
        )
    if not args.ema_decay and args.ema_steps != flags["ema_steps"].default:
        raise UsageError("--ema_steps needs --ema_decay; leave it out, or give both")
    if args.best_metric.startswith("ema") and not args.ema_decay:
        raise UsageError(f"--best_metric={args.best_metric} needs --ema_decay; give both")


def finish_train_args(
    args: Namespace, flags: Mapping[str, Flag], *, models: Mapping[str, Model], device: str
) -> list[str]:
    """Fill in the defaults of the training script that depend on the device and the data.

    `flags` are the records of all its flags, by name. Returns notices for the user. Raises
    UsageError where flags contradict one another.
    """
    notices = check_precision_flags(args, device=device)
    check_class_flags(args)
    check_train_sizes(args, flags)
    notices += choose_data_order(args, flags)
    check_data_flags(args, flags)
    take_batch_size(args)
    check_recipe_flags(args, flags)
    if args.epsilon is None:
        args.epsilon = EPSILON.get(args.optimizer)
    if args.train_data_dir is None and device == "cpu":
        trial = CPU_TRIAL | (dict(models[args.model].trial) if args.model else {})
        taken = {flag: value for flag, value in trial.items() if getattr(args, flag) is None}
        vars(args).update(taken)
        if taken:
            notices.append(
                "Synthetic data on a CPU: a small trial with "
                + " ".join(f"--{flag}={value}" for flag, value in taken.items())
                + "; give these flags to choose otherwise."
            )
    elif not has_validation(args):
        notices.append("No --val_data_dir: training without validation.")
    if args.finetune:
        epochs = args.num_epochs or FINETUNE["num_epochs"]
        chosen = FINETUNE | {"warmup_epochs": min(FINETUNE["warmup_epochs"], epochs / 2)}
        taken = {flag: value for flag, value in chosen.items() if getattr(args, flag) is None}
        vars(args).update(taken)
        if taken:
            notices.append(
                "Fine-tuning: "
                + " ".join(f"--{flag}={show(value)}" for flag, value in taken.items())
                + "; give these flags to choose otherwise."
            )
    if args.batch_size_per_device is None and (not args.finetune or args.train_data_dir is None):
        args.batch_size_per_device = BATCH_SIZE_PER_DEVICE
    if args.batch_size_per_device is not None:  # else a share of data that are not open yet
        args.global_batch_size = args.batch_size_per_device * num_parts(vars(args))
    check_mixing(args)
    if args.num_epochs is None:
        args.num_epochs = NUM_EPOCHS
    if args.keep_snapshots is None:
        args.keep_snapshots = KEEP_SNAPSHOTS
    if args.report is None:
        args.report = is_photo_folder(args.train_data_dir) or (
            args.finetune and args.train_data_dir is not None
        )
    if args.warmup_epochs is None:
        args.warmup_epochs = min(WARMUP_EPOCHS, args.num_epochs // 2)
    check_schedule_flags(args)
    check_optimizer_flags(args)
    if args.lr_decay == "step" and args.lr_step_epochs[0] >= args.num_epochs:
        notices.append(
            f"The learning rate never drops: --lr_step_epochs begins at {args.lr_step_epochs[0]:g} "
            f"and there are {args.num_epochs} epochs."
        )
    return notices


def check_schedule_flags(args: Namespace) -> None:
    """Raise UsageError where warm-up, steps and epochs contradict one another."""
    if args.warmup_epochs >= args.num_epochs:
        raise UsageError(
            f"--warmup_epochs={args.warmup_epochs:g} must be less than --num_epochs="
            f"{args.num_epochs}: the learning rate would never reach its peak"
        )
    steps = args.lr_step_epochs or ()
    if list(steps) != sorted(set(steps)):
        raise UsageError(f"--lr_step_epochs={args.lr_step_epochs} must rise from left to right")
    if steps and steps[0] < args.warmup_epochs:
        raise UsageError(
            f"--lr_step_epochs={steps[0]:g},... falls within --warmup_epochs="
            f"{args.warmup_epochs:g}; steps must come after the warm-up"
        )


def take_learning_rate(args: Namespace, model: Model) -> list[str]:
    """Fill in --learning_rate. Returns notices for the user. Raises UsageError."""
    images, notices = args.global_batch_size, []
    if args.learning_rate is None:
        rate = learning_rate_per_256(model, args.optimizer, finetune=args.finetune)
        args.learning_rate = rate if args.lr_scaling != "none" else rate * images / 256
        if args.lr_scaling == "none":
            notices.append(f"Learning rate: {args.learning_rate:g} ({rate:g} per 256 images).")
    peak = scaled_rate(args.learning_rate, args.lr_scaling, batch_size=images)
    if args.lr_scaling != "none":
        notices.append(
            f"Learning rate: {peak:g} ({args.learning_rate:g} per 256 images, --lr_scaling="
            f"{args.lr_scaling})."
        )
    if (args.lr_min or 0.0) > peak:
        raise UsageError(f"--lr_min={args.lr_min:g} is above the peak learning rate, {peak:g}")
    return notices


def check_optimizer_flags(args: Namespace) -> None:
    """Raise UsageError where flags of the optimizer contradict one another."""
    if args.nesterov and not args.momentum:
        raise UsageError("--nesterov contradicts --momentum=0; leave one of them out")
    if args.optimizer == "adam":
        for flag in ("norm_wd", "bias_wd"):
            if getattr(args, flag) not in (None, 0.0, args.wd):
                raise UsageError(
                    f"--{flag}={getattr(args, flag):g}: with adam each kind of parameter decays by "
                    f"--wd, {args.wd:g}, or not at all; give 0 or {args.wd:g}"
                )
