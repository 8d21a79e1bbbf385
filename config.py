"""The flags of the scripts, one record each; their checks; and the arithmetic from epochs to steps.

To add a flag, add its record to a group here and read it in the script. A script composes the
groups that it uses. Names are those of OneFlow-Benchmark's scripts. Closed choices are handed in by
the script as the keys of the table that builds the thing, so that an advertised choice always
exists.
Nothing here needs OneFlow.
"""

import argparse
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cnns.data.crops import SHUFFLE_BUFFER_SIZE, Augmentation
from cnns.data.format import MAX_CLASSES
from cnns.errors import UsageError
from cnns.flags import Flag, FlagParser, interval, number, numbers, onnx_path, path
from cnns.places import ONNX_ROOT, PUBLISHED_FOLDER, SNAPSHOT_ROOT

BATCH_SIZE_PER_DEVICE = 64
SYNTHETIC_STEPS_PER_EPOCH = 30
# What a run on synthetic data takes on a CPU, so that a first try ends in about a minute.
CPU_TRIAL = {"image_size": 64, "batch_size_per_device": 8, "num_epochs": 2}
OPSETS = (9, 21)  # lowest and highest that resnet_to_onnx.py writes
# Learning rates per 256 images of global batch. sgd: Goyal et al. (arXiv:1706.02677) scaled as in
# NVIDIA's and OneFlow's ResNet-50 v1.5; adam: its paper's 0.001; rmsprop: 0.045 at batch 1600, of
# the Inception-v3 paper (arXiv:1512.00567).
LEARNING_RATE_PER_256 = {"sgd": 0.256, "adam": 0.001, "rmsprop": 0.0072}
EPSILON = {"adam": 1e-8, "rmsprop": 1.0}
KINDS_OF_DATA = {"synthetic": "synthetic data", "arrays": "arrays", "parts": "OFRecord parts"}


def rgb_std(text: str) -> tuple[float, float, float]:
    values = numbers(3)(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 in each channel")
    return values


def addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def optimizer_name(text: str) -> str:
    """The 2020 page still says --model_update=momentum for what is now --optimizer=sgd."""
    return {"momentum": "sgd"}.get(text.lower(), text.lower())


# Groups of flags.

IN_TRAINING = "as in the snapshot to start from, else the network's own"
PREPROCESSING_FLAGS = (
    Flag(
        "image_size",
        "height and width of the network's input, pixels",
        number(int, 8),
        otherwise=IN_TRAINING,
    ),
    Flag(
        "resize_shorter",
        "validation and inference: pixels of the shorter side before the centre crop",
        number(int, 8),
        otherwise="256 per 224 pixels of --image_size",
    ),
    Flag(
        "rgb_mean",
        "subtracted from each channel, 0 to 255",
        numbers(3),
        otherwise=IN_TRAINING,
        aliases=("--rgb-mean",),
    ),
    Flag(
        "rgb_std",
        "divides each channel after that",
        rgb_std,
        otherwise=IN_TRAINING,
        aliases=("--rgb-std",),
    ),
)
MODEL_FLAGS = (
    Flag("model", "network", otherwise="that of the snapshot to start from, else resnet50"),
    Flag(
        "num_classes",
        "length of the logits",
        number(int, 1, MAX_CLASSES),
        otherwise="as in the snapshot to start from, else as in the manifest of the training data, "
        "else 1000",
    ),
    *PREPROCESSING_FLAGS,
)
# The same for the scripts that start from a snapshot.
SNAPSHOT_MODEL_FLAGS = tuple(
    flag
    if flag.name == "resize_shorter"
    else replace(
        flag, otherwise="that of the snapshot" if flag.name == "model" else "as in the snapshot"
    )
    for flag in MODEL_FLAGS
)
DEVICE_FLAGS = (
    Flag(
        "device",
        "auto takes CUDA where there is one and says which it took",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        of="start",
    ),
    Flag("num_nodes", "number of machines", number(int, 1), 1, of="start"),
    Flag(
        "node_ips",
        "addresses of the machines, joined by commas, the same on each; the first prints and saves",
        addresses,
        of="start",
    ),
    Flag(
        "node_rank",
        "which of --node_ips this machine is, from 0",
        number(int, 0),
        otherwise="found by its own addresses, else as the scheduler says (Slurm, Open MPI, PMI, "
        "PBS)",
        of="node",
    ),
    Flag(
        "gpu_num_per_node",
        "devices per machine, each with a process of its own; processes on a CPU",
        number(int, 1),
        1,
        of="start",
    ),
    Flag(
        "ctrl_port",
        "TCP port of the first machine to which the others connect; OneFlow takes the next one",
        number(int, 1, 65535),
        50051,
        of="node",
    ),
    Flag(
        "start_timeout",
        "seconds within which all machines have to connect",
        number(float, 0, above=True),
        120.0,
        of="node",
    ),
)
PRECISION_FLAGS = (
    Flag(
        "use_fp16",
        "compute in half precision where that is safe (automatic mixed precision), with dynamic "
        "loss scaling; loss, weights and snapshots stay float32; a CPU computes in float32",
        default=False,
        switch=True,
    ),
    # OneFlow's convolutions and batch norms for a CPU are wrong in that layout.
    Flag(
        "channel_last",
        "compute with activations (N, H, W, C)",
        default=False,
        switch=True,
        cuda=True,
    ),
    Flag("pad_output", "give images a fourth channel, of zeros", default=False, switch=True),
    Flag(
        "fuse_bn_relu", "batch norm and ReLU in one kernel", default=False, switch=True, cuda=True
    ),
    Flag(
        "fuse_bn_add_relu",
        "batch norm, sum and ReLU in one kernel",
        default=False,
        switch=True,
        cuda=True,
    ),
)
CUDA_TRAINING_FLAGS = (
    Flag(
        "gpu_image_decoder",
        "decode and crop training images on the GPU; OFRecord parts only, and a resumed run then "
        "reads from the beginning of its parts, in another order than one that never stopped",
        default=False,
        switch=True,
        cuda=True,
    ),
    Flag(
        "nccl_fusion_threshold_mb",
        "send gradients in pieces of at least so many MB",
        number(int, 1),
        otherwise="OneFlow's default",
        cuda=True,
    ),
    Flag(
        "nccl_fusion_max_ops",
        "join at most so many gradients in a piece",
        number(int, 1),
        otherwise="OneFlow's default",
        cuda=True,
    ),
)
CUDA_FLAGS = tuple(flag.name for flag in (*PRECISION_FLAGS, *CUDA_TRAINING_FLAGS) if flag.cuda)
BATCH_FLAGS = (
    Flag(
        "batch_size_per_device",
        "training images per device and step",
        number(int, 1),
        otherwise=f"{BATCH_SIZE_PER_DEVICE}, and {CPU_TRIAL['batch_size_per_device']} for "
        "synthetic data on a CPU",
    ),
)
AUGMENTATION_FLAGS = (
    Flag(
        "random_area",
        "random crop: share of the image's area",
        interval(0, 1),
        Augmentation.area,
        metavar="MIN,MAX",
    ),
    Flag(
        "random_aspect_ratio",
        "random crop: width over height",
        interval(0),
        Augmentation.aspect_ratio,
        metavar="MIN,MAX",
    ),
    Flag("random_flip", "probability of a mirror image", number(float, 0, 1), Augmentation.flip),
)
SHUFFLE_FLAG = Flag(
    "shuffle_buffer_size",
    "records among which OneFlow's OFRecord reader draws the next one; 1: each image of a device's "
    "share once per epoch",
    number(int, 1),
    otherwise=f"{SHUFFLE_BUFFER_SIZE}, at most a 50th of that share",
)
TRAIN_DATA_FLAGS = (
    Flag(
        "train_data_dir",
        "directory of OFRecord parts, or an .npz file with images (N, H, W, 3) uint8 and labels "
        "(N,); without it the data are synthetic",
        path,
    ),
    Flag("train_data_part_num", "read the first so many parts", number(int, 1), otherwise="all"),
    Flag(
        "num_examples",
        "training images per epoch, drawn from all there are",
        number(int, 1),
        otherwise="all",
    ),
    *AUGMENTATION_FLAGS,
    SHUFFLE_FLAG,
)
VAL_DATA_FLAGS = (
    Flag(
        "val_data_dir", "directory of OFRecord parts, or an .npz file with images and labels", path
    ),
    Flag("val_data_part_num", "read the first so many parts", number(int, 1), otherwise="all"),
    Flag("num_val_examples", "score the first so many images", number(int, 1), otherwise="all"),
    Flag(
        "val_batch_size_per_device",
        "validation images per device and step; the figures do not depend on it",
        number(int, 1),
        50,
    ),
    Flag("top_k", "k of the second accuracy that is printed", number(int, 1), 5),
)
OPTIMIZER_FLAGS = (
    Flag(
        "optimizer",
        "adam decays weights decoupled from the gradient; --model_update=momentum is sgd",
        optimizer_name,
        "sgd",
        aliases=("--model_update",),
        fixed=True,
    ),
    Flag(
        "learning_rate",
        "peak learning rate",
        number(float, 0),
        otherwise=", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATE_PER_256.items())
        + ", per 256 images of global batch; sgd for alexnet and vgg: 0.01",
    ),
    Flag(
        "wd",
        "weight decay of convolution and fc weights and of the fc bias, none on batch norms",
        number(float, 0),
        1 / 32768,
        otherwise="1/32768",
    ),
    Flag("momentum", "momentum", number(float, 0, 1), 0.875, needs=("optimizer", ("sgd",))),
    Flag(
        "decay_rate",
        "decay of the mean square",
        number(float, 0, 1),
        0.9,
        needs=("optimizer", ("rmsprop",)),
    ),
    Flag(
        "epsilon",
        "added to the denominator of the update",
        number(float, 0),
        otherwise=" and ".join(f"{value:g} for {name}" for name, value in EPSILON.items()),
        needs=("optimizer", tuple(EPSILON)),
    ),
    Flag(
        "gradient_clipping",
        "largest global norm of the gradients, before weight decay is added; 0: no limit",
        number(float, 0),
        0.0,
    ),
    Flag("label_smoothing", "label smoothing factor", number(float, 0, 1), 0.1),
    Flag(
        "warmup_epochs",
        "epochs of linear warm-up from 0",
        number(float, 0),
        otherwise="5, but at most half of the run",
    ),
    Flag("lr_decay", "schedule after the warm-up", str.lower, "cosine"),
    Flag(
        "lr_step_epochs",
        "epochs after which the rate is divided by 10",
        numbers(None, low=0),
        (30.0, 60.0, 80.0),
        needs=("lr_decay", ("step",)),
    ),
    Flag(
        "lr_decay_rate",
        "factor per --lr_decay_epochs",
        number(float, 0, 1, above=True),
        0.94,
        needs=("lr_decay", ("exponential",)),
    ),
    Flag(
        "lr_decay_epochs",
        "epochs per --lr_decay_rate",
        number(float, 0, above=True),
        2.0,
        needs=("lr_decay", ("exponential",)),
    ),
)
NUM_EPOCHS_ALIASES = ("--num_epoch",)
RUN_FLAGS = (
    Flag(
        "num_epochs",
        "passes over the training data",
        number(int, 1),
        otherwise=f"90, and {CPU_TRIAL['num_epochs']} for synthetic data on a CPU",
        aliases=NUM_EPOCHS_ALIASES,
    ),
    Flag(
        "model_load_dir",
        "weights to start from: a snapshot, or weights from elsewhere (.safetensors, .pth, a "
        "folder of OneFlow)",
        path,
        otherwise="random ones",
        of="start",
    ),
    Flag(
        "finetune",
        "take all of --model_load_dir, or of the weights that were installed for --model, but the "
        "last layer, which starts from random weights and may have another number of classes",
        default=False,
        switch=True,
        of="start",
    ),
    Flag(
        "resume",
        "resume as if the run had never stopped: from a snapshot, from the newest whole one in a "
        "directory, or, with auto, from the newest in --model_save_dir, and from the start where "
        "there is none; flags that are not given are those of the run",
        path,
        metavar="DIR|auto",
        of="start",
    ),
    Flag(
        "model_save_dir",
        "where snapshots go; nothing there is overwritten but last and best",
        path,
        otherwise="where the resumed run's are, else ./output/snapshots/model_save-<date and time>",
        of="start",
    ),
    Flag(
        "save_epoch_interval",
        "epochs between snapshots; the last epoch is always saved",
        number(int, 1),
        1,
    ),
    Flag(
        "save_every_n_iter",
        "also save `last` every so many iterations of an epoch",
        number(int, 1),
        otherwise="never",
    ),
    Flag(
        "save_init", "save the initial model as well; train.sh gives it", default=False, switch=True
    ),
    Flag(
        "save_last", "keep the newest snapshot under the name `last` too", default=True, switch=True
    ),
    Flag(
        "keep_snapshots",
        "keep the newest so many snapshots of epochs and remove older ones; best, last and "
        "initial_model always stay",
        number(int, 1),
        otherwise="nothing is removed",
    ),
    Flag("loss_print_every_n_iter", "iterations between lines", number(int, 1), 10),
    Flag(
        "seed",
        "of initial weights, the order of the data, crops and flips",
        number(int, 0, 2**31 - 1),
        0,
        fixed=True,
    ),
)
LOG_FLAGS = (Flag("log_dir", "also append every line to <script>.log in this directory", path),)
SNAPSHOT_FLAGS = (
    Flag(
        "model_load_dir",
        "snapshot to read, or weights from elsewhere (.safetensors, .pth, a folder of OneFlow)",
        path,
        otherwise=f"the published folder {PUBLISHED_FOLDER} where that exists, else the newest "
        f"snapshot under {SNAPSHOT_ROOT}, of --model if that is given, else the weights that were "
        "installed for it",
        of="start",
    ),
)
BACKEND_FLAGS = (
    Flag(
        "backend",
        "what computes: OneFlow from a snapshot, or ONNX Runtime, on the CPU, from a file of "
        "resnet_to_onnx.py, whose classes and preprocessing hold",
        default="oneflow",
        choices=("oneflow", "onnxruntime"),
    ),
    Flag(
        "onnx_path",
        "file to read",
        onnx_path,
        otherwise=f"the newest in {ONNX_ROOT}",
        needs=("backend", ("onnxruntime",)),
    ),
)
EXPORT_FLAGS = (
    Flag(
        "onnx_path",
        "file to write; one that is there is replaced once the new one has been proved equal",
        onnx_path,
        otherwise=f"{ONNX_ROOT}/<name of the snapshot>.onnx",
    ),
    Flag(
        "opset",
        f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[1]}",
        number(int, *OPSETS),
        12,
    ),
    Flag(
        "external_data",
        "put the weights into a second file, <onnx_path>.data, which has to stay beside it",
        default=False,
        switch=True,
    ),
    Flag(
        "check_only", "export nothing; compare the file that is there", default=False, switch=True
    ),
)


def image_path_flag(names: list[str], text: str) -> Flag:
    default = [os.path.join("data", name) for name in names]
    return Flag("image_path", text, default=default, otherwise=" ".join(default), many=True)


def with_choices(flags: Iterable[Flag], **choices: Iterable[str]) -> tuple[Flag, ...]:
    """The flags, those named with the choices given here."""
    return tuple(
        replace(flag, choices=tuple(sorted(choices[flag.name]))) if flag.name in choices else flag
        for flag in flags
    )


# One parser per script.


def train_parser(
    *, models: Iterable[str], optimizers: Iterable[str], schedules: Iterable[str]
) -> FlagParser:
    return FlagParser(
        "Train a CNN with OneFlow and validate it after each epoch.",
        {
            "model": with_choices(MODEL_FLAGS, model=models),
            "devices": DEVICE_FLAGS,
            "precision and kernels": PRECISION_FLAGS,
            "CUDA only": CUDA_TRAINING_FLAGS,
            "batches": BATCH_FLAGS,
            "training data": TRAIN_DATA_FLAGS,
            "validation data": VAL_DATA_FLAGS,
            "optimizer and schedule": with_choices(
                OPTIMIZER_FLAGS, optimizer=optimizers, lr_decay=schedules
            ),
            "run": RUN_FLAGS,
            "log": LOG_FLAGS,
        },
    )


def evaluate_parser(*, models: Iterable[str]) -> FlagParser:
    return FlagParser(
        "Score a snapshot on a validation set: every image exactly once.",
        {
            "model": with_choices(SNAPSHOT_MODEL_FLAGS, model=models),
            "devices": DEVICE_FLAGS,
            "precision and kernels": PRECISION_FLAGS,
            "validation data": VAL_DATA_FLAGS,
            "snapshot": SNAPSHOT_FLAGS,
            "backend": BACKEND_FLAGS,
            "run": (
                Flag(
                    "num_epochs",
                    "rounds over the validation set",
                    number(int, 1),
                    1,
                    aliases=NUM_EPOCHS_ALIASES,
                ),
            ),
            "log": LOG_FLAGS,
        },
    )


def inference_parser(*, models: Iterable[str]) -> FlagParser:
    return FlagParser(
        "Classify images.",
        {
            "model": with_choices(SNAPSHOT_MODEL_FLAGS, model=models),
            "devices": DEVICE_FLAGS,
            "precision and kernels": PRECISION_FLAGS,
            "snapshot": SNAPSHOT_FLAGS,
            "backend": BACKEND_FLAGS,
            "images": (
                image_path_flag(
                    ["cat.jpg"], "image files, directories of images, or - for paths on stdin"
                ),
                Flag("top_k", "classes to print for each image", number(int, 1), 1),
                Flag(
                    "batch_size",
                    "images that the network takes at once; the figures are the same to six digits",
                    number(int, 1),
                    1,
                ),
                Flag(
                    "output",
                    "text: the path, then `probability name` lines; csv: a header, then a line for "
                    "each class; json: an object for each image, one a line",
                    default="text",
                    choices=("text", "csv", "json"),
                ),
            ),
        },
    )


def export_parser(*, models: Iterable[str]) -> FlagParser:
    return FlagParser(
        "Export a snapshot to ONNX, and prove the file equal to it.",
        {
            "model": with_choices(SNAPSHOT_MODEL_FLAGS, model=models),
            "snapshot": SNAPSHOT_FLAGS,
            "ONNX file": EXPORT_FLAGS,
            "check": (
                image_path_flag(
                    ["cat.jpg", "coffee.jpg"],
                    "image files, or directories of images, to compare on, beside random ones",
                ),
            ),
        },
    )


# What the scripts hand on.


def switch_flags(args: Namespace) -> dict[str, bool]:
    """The fields of cnns.models.layers.Switches."""
    names = ("channel_last", "pad_output", "fuse_bn_relu", "fuse_bn_add_relu")
    return {name: getattr(args, name) for name in names}


def preprocessing_flags(args: Namespace) -> dict:
    """The fields of cnns.data.images.Preprocessing that flags set; None where one was not given."""
    return {flag.name: getattr(args, flag.name) for flag in PREPROCESSING_FLAGS}


def num_processes(args: Namespace) -> int:
    """One for each device of the job."""
    return args.num_nodes * args.gpu_num_per_node


def job_flags(args: Namespace) -> dict:
    """The arguments of cnns.launch.job.make_job."""
    return {
        "num_nodes": args.num_nodes,
        "node_ips": args.node_ips,
        "processes_per_node": args.gpu_num_per_node,
        "ctrl_port": args.ctrl_port,
        "node_rank": args.node_rank,
        "start_timeout": args.start_timeout,
    }


def memory_flags(args: Namespace, *, batch: str) -> dict[str, str]:
    """The arguments `asked` and `flag` of explain_crash; `batch` sets the size of a batch."""
    given = {name: getattr(args, name) for name in ("model", "image_size", batch)}
    if given[batch] is None:
        given[batch] = BATCH_SIZE_PER_DEVICE
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return {"asked": " ".join(flags + ["--use_fp16"] * args.use_fp16), "flag": f"--{batch}"}


# Flags that may differ between the nodes of a job, beside those of a node: what they stand for is
# compared by itself.
COMPARED_OTHERWISE = (
    "log_dir",
    "resume",
    "model_load_dir",
    "model_save_dir",
    "train_data_dir",
    "val_data_dir",
)


def flags_of_a_job(args: Namespace, parser: FlagParser) -> dict:
    """The flags that have to be the same on every node, by name, as JSON knows them."""
    return {
        f"--{name}": value
        for name, value in vars(args).items()
        if parser.flags[name].of != "node" and name not in COMPARED_OTHERWISE
    }


# Checks and defaults that look at more than one flag.


def check_precision_flags(args: Namespace, *, device: str) -> list[str]:
    """Refuse on a CPU what only CUDA can do. Returns notices for the user."""
    if device == "cuda":
        return []
    for flag in CUDA_FLAGS:
        if getattr(args, flag, None):
            raise UsageError(f"--{flag} needs CUDA, and the device is a CPU; leave it out")
    return ["--use_fp16: a CPU computes in float32."] if args.use_fp16 else []


# Flags that say what a file for ONNX Runtime says itself, or how OneFlow computes.
OF_ONEFLOW = {
    "model_load_dir": "the network comes from --onnx_path",
    **dict.fromkeys(("model", "num_classes"), "the network comes from --onnx_path"),
    **dict.fromkeys(
        (flag.name for flag in PREPROCESSING_FLAGS),
        "the preprocessing is that of the file; give it to resnet_to_onnx.py",
    ),
    **dict.fromkeys((flag.name for flag in PRECISION_FLAGS), "it is about how OneFlow computes"),
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
    if num_processes(args) > 1:
        raise UsageError(
            "--num_nodes and --gpu_num_per_node contradict --backend=onnxruntime, which is one "
            "process; leave them out"
        )


def data_kind(train_data_dir: str | None) -> str:
    """A key of KINDS_OF_DATA."""
    if train_data_dir is None:
        return "synthetic"
    return "arrays" if train_data_dir.endswith(".npz") else "parts"


def check_data_flags(args: Namespace) -> None:
    """Refuse flags that the chosen kind of data would ignore."""

    def refuse(flags: Iterable[Flag], why: str) -> None:
        for flag in flags:
            if getattr(args, flag.name) != flag.default:
                raise UsageError(f"--{flag.name} {why}; leave it out")

    def named(*names: str) -> list[Flag]:
        return [flag for flag in (*TRAIN_DATA_FLAGS, *VAL_DATA_FLAGS) if flag.name in names]

    of_parts = (SHUFFLE_FLAG, *CUDA_TRAINING_FLAGS[:1])
    kind = data_kind(args.train_data_dir)
    if kind == "synthetic":
        refuse(
            named("train_data_part_num", "val_data_dir", "val_data_part_num"),
            "needs --train_data_dir, and without it data are synthetic",
        )
        refuse(
            (*AUGMENTATION_FLAGS, *of_parts, *named("val_batch_size_per_device")),
            "has no effect on synthetic data",
        )
        return
    if kind == "arrays":
        refuse(of_parts, "has no effect on an .npz file, which is shuffled as a whole")
    if args.val_data_dir is None:
        refuse(
            named("val_data_part_num", "num_val_examples", "val_batch_size_per_device"),
            "needs --val_data_dir",
        )


def finish_train_args(
    args: Namespace, *, device: str, trial: Mapping[str, int] | None = None
) -> list[str]:
    """Fill in the defaults of the training script that depend on the device and the data.

    Args:
        trial: what replaces parts of CPU_TRIAL.

    Returns notices for the user. Raises UsageError where flags contradict one another.
    """
    notices = check_precision_flags(args, device=device)
    check_data_flags(args)
    if args.epsilon is None:
        args.epsilon = EPSILON.get(args.optimizer)
    synthetic = args.train_data_dir is None
    if not synthetic and args.val_data_dir is None:
        notices.append("No --val_data_dir: training without validation.")
    if synthetic and device == "cpu":
        taken = {
            flag: value
            for flag, value in (CPU_TRIAL | dict(trial or {})).items()
            if getattr(args, flag) is None
        }
        vars(args).update(taken)
        if taken:
            notices.append(
                "Synthetic data on a CPU: a small trial with "
                + " ".join(f"--{flag}={value}" for flag, value in taken.items())
                + "; give these flags to choose otherwise."
            )
    if args.batch_size_per_device is None:
        args.batch_size_per_device = BATCH_SIZE_PER_DEVICE
    if args.num_epochs is None:
        args.num_epochs = 90
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, args.num_epochs // 2)
    check_schedule_flags(args)
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


# Resuming.


def inherited_flags(flags: Mapping[str, object], parser: FlagParser, *, device: str) -> dict:
    """Of the flags that a snapshot holds, those that hold on where a run is resumed.

    They came from JSON. On a CPU those that need CUDA are left out.
    """
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flags.items()
        if name in parser.flags
        and parser.flags[name].of == "run"
        and not (device == "cpu" and name in CUDA_FLAGS)
    }


def compare_flags(
    args: Namespace, flags: Mapping[str, object], parser: FlagParser, *, path: str
) -> list[str]:
    """Refuse flags that contradict the run that left `flags` in the snapshot `path`.

    Returns a notice for each other flag that differs, since it holds from here on. Raises
    UsageError.
    """
    notices = []
    kinds = [
        KINDS_OF_DATA[data_kind(each)]
        for each in (args.train_data_dir, flags.get("train_data_dir"))
    ]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"--train_data_dir: {path} is of a run on {kinds[1]}, and this would be {kinds[0]}; "
            f"start a new run from the weights with --model_load_dir={path}"
        )
    for name, value in flags.items():
        was = tuple(value) if isinstance(value, list) else value
        now = getattr(args, name, was)
        if name not in parser.flags or parser.flags[name].of != "run" or now == was:
            continue
        if parser.flags[name].fixed:
            raise UsageError(
                f"--{name}={now}, but {path} is of a run with {was}; leave it out, or start a new "
                f"run from the weights with --model_load_dir={path}"
            )
        came_with_choice = was is None and now == parser.flags[name].default
        if now is not None and not came_with_choice:  # None: it belonged to another schedule
            before = "not set" if was is None else was
            notices.append(f"--{name}={now} from here on; it was {before}.")
    return notices


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
