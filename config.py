"""Flags of the scripts, their checks, and the arithmetic from epochs to steps.

One parser per script, composed of small groups. Names are those of OneFlow-Benchmark's scripts.
Closed choices are handed in by the script as the keys of the table that builds the thing, so that
an advertised choice always exists. Nothing here needs OneFlow.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

BATCH_SIZE_PER_DEVICE = 64
MAX_CLASSES = 1_000_000  # more is a slip of the keyboard, or a label that is none
SYNTHETIC_STEPS_PER_EPOCH = 30
# What a run on synthetic data takes on a CPU, so that a first try ends in about a minute.
CPU_TRIAL = {"image_size": 64, "batch_size_per_device": 8, "num_epochs": 2}
# A snapshot is looked for here unless --model_load_dir names one.
SNAPSHOT_ROOT = os.path.join("output", "snapshots")
# The original page's pretrained model; taken where it lies in the working directory.
PUBLISHED_FOLDER = "resnet_v15_of_best_model_val_top1_77318"
# An exported file goes here, and is looked for here, unless --onnx_path names one.
ONNX_ROOT = os.path.join("onnx", "model")
OPSETS = (9, 21)  # lowest and highest that resnet_to_onnx.py writes
# Learning rates per 256 images of global batch. sgd: Goyal et al. (arXiv:1706.02677) scaled as in
# NVIDIA's and OneFlow's ResNet-50 v1.5; adam: its paper's 0.001; rmsprop: 0.045 at batch 1600, of
# the Inception-v3 paper (arXiv:1512.00567).
LEARNING_RATE_PER_256 = {"sgd": 0.256, "adam": 0.001, "rmsprop": 0.0072}
# Flags that some kinds of data ignore, with their defaults.
DATA_DEFAULTS = {
    "random_area": (0.08, 1.0),
    "random_aspect_ratio": (3 / 4, 4 / 3),
    "random_flip": 0.5,
    "shuffle_buffer_size": None,
    "val_batch_size_per_device": 50,
    "gpu_image_decoder": False,
}
SHUFFLE_BUFFER_SIZE = 1024  # records; less for small data, see ofrecord_util
EPSILON = {"adam": 1e-8, "rmsprop": 1.0}


# Flags that belong to some choices of another flag.
BELONGING_FLAGS = {
    "momentum": ("optimizer", ("sgd",)),
    "decay_rate": ("optimizer", ("rmsprop",)),
    "epsilon": ("optimizer", tuple(EPSILON)),
    "lr_step_epochs": ("lr_decay", ("step",)),
    "lr_decay_rate": ("lr_decay", ("exponential",)),
    "lr_decay_epochs": ("lr_decay", ("exponential",)),
}


class UsageError(Exception):
    """Wrong usage, found before anything is loaded: one line, exit status 2."""

    exit_status = 2


class RunError(Exception):
    """A run that failed, or data that are broken: one line, exit status 1."""

    exit_status = 1


def run_main(
    main: Callable[[], int | None], leave: Callable[[int], int] = lambda status: status
) -> int:
    """Call `main` and return the exit status; what the user or the system did becomes one line.

    Args:
        main: returns an exit status, or None for 0.
        leave: called with the status of a failure while all that `main` had made still exists. A
            worker of a job must not wait for the end of that: see launch_util.leave.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except (UsageError, RunError, KeyboardInterrupt, MemoryError, OSError) as error:
        return leave(explain(error))
    return status


def explain(error: BaseException) -> int:
    """Report what ended a run, and return the exit status."""
    if isinstance(error, UsageError | RunError):
        report(error)
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        report("interrupted")
        return 130
    if isinstance(error, MemoryError):
        report(f"out of memory: {error}")
    elif isinstance(error, BrokenPipeError):  # `| head`: whoever read our lines has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
    else:
        report(f"{error.strerror}: {error.filename}" if error.filename else error)
    return 1


def report(error: object) -> None:
    """Print `error` as the one line `<script>: error: <what>` on stderr."""
    line = " ".join(str(error).split())
    print(f"{os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any; other help texts say what happens without the flag."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviations whose errors are one line, exit status 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message: str):
        self.exit(2, f"{os.path.basename(self.prog)}: error: {message} (--help lists the flags)\n")


# Types of flags.


def boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False") from None


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable:
    """The argparse type of an int or float of at least `low` (more, if `above`) up to `high`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} must be finite")
        if not (low < value if above else low <= value) or not value <= high:
            upper = "" if high == math.inf else f" and at most {high:g}"
            lower = f"{'above' if above else 'at least'} {low:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {lower}{upper}")
        return value

    return parse


def numbers(count: int | None, kind: type = float, *, low: float = -math.inf) -> Callable:
    """The argparse type of a comma-separated list of `count` numbers (any count if None)."""

    def parse(text: str) -> tuple:
        parse_one = number(kind, low)
        values = tuple(parse_one(part.strip()) for part in text.split(","))
        if count is not None and len(values) != count:
            raise argparse.ArgumentTypeError(f"{text!r} must be {count} numbers joined by commas")
        return values

    return parse


def rgb_std(text: str) -> tuple[float, float, float]:
    values = numbers(3)(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 in each channel")
    return values


def interval(low: float, high: float = math.inf) -> Callable:
    """The argparse type of `a,b` with low < a <= b <= high."""

    def parse(text: str) -> tuple[float, float]:
        a, b = numbers(2)(text)
        if not low < a <= b <= high:
            bound = "" if high == math.inf else f" <= {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a,b with {low:g} < a <= b{bound}")
        return a, b

    return parse


def path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path is needed, and there is none")
    return text


def addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def optimizer_name(text: str) -> str:
    """The 2020 page still says --model_update=momentum for what is now --optimizer=sgd."""
    return {"momentum": "sgd"}.get(text.lower(), text.lower())


def onnx_path(text: str) -> str:
    if not text.endswith(".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .onnx")
    return text


# Groups of flags.


def add_model_flags(parser: Parser, models: Iterable[str], *, from_snapshot: bool) -> None:
    group = parser.add_argument_group("model")
    default = "as in the snapshot" + ("" if from_snapshot else ", else the model's own")
    group.add_argument(
        "--model",
        choices=sorted(models),
        help="network; unless given, that of the snapshot"
        + ("" if from_snapshot else ", or resnet50 without --model_load_dir"),
    )
    group.add_argument(
        "--num_classes",
        type=number(int, 1, MAX_CLASSES),
        help="length of the logits; unless given, as in the snapshot"
        + ("" if from_snapshot else ", else as in the manifest of the training data, else 1000"),
    )
    group.add_argument(
        "--image_size",
        type=number(int, 8),
        help=f"height and width of the network's input, pixels; unless given, {default}",
    )
    group.add_argument(
        "--resize_shorter",
        type=number(int, 8),
        help="validation and inference: pixels of the shorter side before the centre crop; unless "
        "given, 256 per 224 pixels of --image_size",
    )
    group.add_argument(
        "--rgb_mean",
        "--rgb-mean",
        type=numbers(3),
        help=f"subtracted from each channel, 0 to 255; unless given, {default}",
    )
    group.add_argument(
        "--rgb_std",
        "--rgb-std",
        type=rgb_std,
        help=f"divides each channel after that; unless given, {default}",
    )


def add_device_flags(parser: Parser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto takes CUDA where there is one and says which it took",
    )
    group.add_argument("--num_nodes", type=number(int, 1), default=1, help="number of machines")
    group.add_argument(
        "--node_ips",
        type=addresses,
        help="addresses of the machines, joined by commas, the same on each; the first prints",
    )
    group.add_argument(
        "--node_rank",
        type=number(int, 0),
        help="which of --node_ips this machine is, from 0; unless given, by its own addresses, "
        "else as the scheduler says (Slurm, Open MPI, PMI, PBS)",
    )
    group.add_argument(
        "--gpu_num_per_node",
        type=number(int, 1),
        default=1,
        help="devices per machine, each with a process of its own; processes on a CPU",
    )
    group.add_argument(
        "--ctrl_port",
        type=number(int, 1, 65535),
        default=50051,
        help="TCP port of the first machine on which the others come; OneFlow takes the next one",
    )
    group.add_argument(
        "--start_timeout",
        type=number(float, 0, above=True),
        default=120.0,
        help="seconds within which all machines have to come",
    )


def add_precision_flags(parser: Parser) -> None:
    group = parser.add_argument_group("precision and kernels")
    add_switch(
        group,
        "--use_fp16",
        "compute in half precision where that is safe (automatic mixed precision), with dynamic "
        "loss scaling; weights and snapshots stay float32; a CPU computes in float32",
    )
    add_switch(group, "--channel_last", "CUDA only: compute with activations (N, H, W, C)")
    add_switch(group, "--pad_output", "give images a fourth channel, of zeros")
    add_switch(group, "--fuse_bn_relu", "CUDA only: batch norm and ReLU in one kernel")
    add_switch(group, "--fuse_bn_add_relu", "CUDA only: batch norm, sum and ReLU in one kernel")


def add_cuda_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("CUDA only")
    add_switch(
        group,
        "--gpu_image_decoder",
        "decode and crop training images on the GPU; OFRecord parts only, and a resumed run then "
        "reads from the beginning of its parts, in another order than one that never stopped",
    )
    group.add_argument(
        "--nccl_fusion_threshold_mb",
        type=number(int, 1),
        help="send gradients in pieces of at least so many MB; unless given, OneFlow's own",
    )
    group.add_argument(
        "--nccl_fusion_max_ops",
        type=number(int, 1),
        help="join at most so many gradients in a piece; unless given, OneFlow's own",
    )


def add_batch_flags(parser: Parser) -> None:
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--batch_size_per_device",
        type=number(int, 1),
        help=f"training images per device and step; unless given, {BATCH_SIZE_PER_DEVICE}",
    )


def add_train_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("training data")
    group.add_argument(
        "--train_data_dir",
        type=path,
        help="directory of OFRecord parts, or an .npz file with images (N, H, W, 3) uint8 and "
        "labels (N,); without it the data are synthetic",
    )
    group.add_argument(
        "--train_data_part_num",
        type=number(int, 1),
        help="read the first so many parts; unless given, all",
    )
    group.add_argument(
        "--num_examples",
        type=number(int, 1),
        help="training images per epoch; unless given, all",
    )
    group.add_argument(
        "--random_area",
        type=interval(0, 1),
        default=DATA_DEFAULTS["random_area"],
        metavar="MIN,MAX",
        help="random crop: share of the image's area",
    )
    group.add_argument(
        "--random_aspect_ratio",
        type=interval(0),
        default=DATA_DEFAULTS["random_aspect_ratio"],
        metavar="MIN,MAX",
        help="random crop: width over height",
    )
    group.add_argument(
        "--random_flip",
        type=number(float, 0, 1),
        default=DATA_DEFAULTS["random_flip"],
        help="probability of a mirror image",
    )
    group.add_argument(
        "--shuffle_buffer_size",
        type=number(int, 1),
        help="records among which OneFlow's OFRecord reader draws the next one; 1: each image of "
        f"a device's share once per epoch; unless given, {SHUFFLE_BUFFER_SIZE}, at most a 50th of "
        "that share",
    )


def add_val_data_flags(parser: Parser) -> None:
    group = parser.add_argument_group("validation data")
    group.add_argument(
        "--val_data_dir",
        type=path,
        help="directory of OFRecord parts, or an .npz file with images and labels",
    )
    group.add_argument(
        "--val_data_part_num",
        type=number(int, 1),
        help="read the first so many parts; unless given, all",
    )
    group.add_argument(
        "--num_val_examples",
        type=number(int, 1),
        help="score the first so many images; unless given, all",
    )
    group.add_argument(
        "--val_batch_size_per_device",
        type=number(int, 1),
        default=DATA_DEFAULTS["val_batch_size_per_device"],
        help="validation images per device and step; the figures do not depend on it",
    )
    group.add_argument(
        "--top_k", type=number(int, 1), default=5, help="k of the second accuracy that is printed"
    )


def add_optimizer_flags(
    parser: Parser, optimizers: Iterable[str], schedules: Iterable[str]
) -> None:
    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument(
        "--optimizer",
        "--model_update",
        type=optimizer_name,
        choices=sorted(optimizers),
        default="sgd",
        help="adam decays weights decoupled from the gradient; --model_update=momentum is sgd",
    )
    group.add_argument(
        "--learning_rate",
        type=number(float, 0),
        help="peak learning rate; unless given, "
        + ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATE_PER_256.items())
        + ", per 256 images of global batch; sgd for alexnet and vgg: 0.01",
    )
    group.add_argument(
        "--wd",
        type=number(float, 0),
        default=1 / 32768,
        help="weight decay of convolution and fc weights and of the fc bias",
    )
    group.add_argument("--momentum", type=number(float, 0, 1), help="sgd only; unless given, 0.875")
    group.add_argument(
        "--decay_rate",
        type=number(float, 0, 1),
        help="rmsprop only: decay of the mean square; unless given, 0.9",
    )
    group.add_argument(
        "--epsilon",
        type=number(float, 0),
        help="adam and rmsprop only; unless given, "
        + " and ".join(f"{value:g} for {name}" for name, value in EPSILON.items()),
    )
    group.add_argument(
        "--gradient_clipping",
        type=number(float, 0),
        default=0.0,
        help="largest global norm of the gradients; 0: no limit",
    )
    group.add_argument(
        "--label_smoothing", type=number(float, 0, 1), default=0.1, help="label smoothing factor"
    )
    group.add_argument(
        "--warmup_epochs",
        type=number(float, 0),
        help="epochs of linear warm-up from 0; unless given, 5, but at most half of the run",
    )
    group.add_argument(
        "--lr_decay",
        type=str.lower,
        choices=sorted(schedules),
        default="cosine",
        help="schedule after the warm-up",
    )
    group.add_argument(
        "--lr_step_epochs",
        type=numbers(None, low=0),
        help="step only: epochs after which the rate is divided by 10; unless given, 30,60,80",
    )
    group.add_argument(
        "--lr_decay_rate",
        type=number(float, 0, 1, above=True),
        help="exponential only: factor per --lr_decay_epochs; unless given, 0.94",
    )
    group.add_argument(
        "--lr_decay_epochs",
        type=number(float, 0, above=True),
        help="exponential only: epochs per --lr_decay_rate; unless given, 2",
    )


def add_training_flags(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--num_epochs",
        "--num_epoch",
        type=number(int, 1),
        help=f"passes over the training data; unless given, 90, and "
        f"{CPU_TRIAL['num_epochs']} for synthetic data on a CPU",
    )
    group.add_argument(
        "--model_load_dir",
        type=path,
        help="weights to start from: a snapshot, or those of others (.safetensors, .pth, a folder "
        "of OneFlow); unless given, random ones",
    )
    add_switch(
        group,
        "--finetune",
        "take all of --model_load_dir, or of the weights that were installed for --model, but the "
        "last layer, which starts from random weights and may have another number of classes",
    )
    group.add_argument(
        "--resume",
        type=path,
        metavar="DIR|auto",
        help="go on as if the run had never stopped: from a snapshot, from the newest whole one in "
        "a directory, or, with auto, from the newest in --model_save_dir, and from the start where "
        "there is none; flags that are not given are those of the run",
    )
    group.add_argument(
        "--model_save_dir",
        type=path,
        help="where snapshots go; unless given, where the resumed run's are, else "
        "./output/snapshots/model_save-<date and time>",
    )
    group.add_argument(
        "--save_epoch_interval",
        type=number(int, 1),
        default=1,
        help="epochs between snapshots; the last epoch is always saved",
    )
    group.add_argument(
        "--save_every_n_iter",
        type=number(int, 1),
        help="also save `last` every so many iterations of an epoch; unless given, never",
    )
    add_switch(group, "--save_init", "save the initial model as well")
    add_switch(group, "--save_last", "keep the newest snapshot under the name `last` too", True)
    group.add_argument(
        "--keep_snapshots",
        type=number(int, 1),
        help="keep the newest so many snapshots of epochs and remove older ones; best, last and "
        "initial_model always stay; unless given, nothing is removed",
    )
    group.add_argument(
        "--loss_print_every_n_iter",
        type=number(int, 1),
        default=10,
        help="iterations between lines",
    )
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="random seed")


def add_log_flags(parser: Parser) -> None:
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log_dir", type=path, help="also append every line to <script>.log in this directory"
    )


def add_snapshot_flags(parser: Parser) -> None:
    group = parser.add_argument_group("snapshot")
    group.add_argument(
        "--model_load_dir",
        type=path,
        help="snapshot to read, or weights of others (.safetensors, .pth, a folder of OneFlow); "
        f"unless given, the published folder {PUBLISHED_FOLDER} where that exists, else the newest "
        f"snapshot under {SNAPSHOT_ROOT}, of --model if that is given, else the weights that were "
        "installed for it",
    )


def add_export_flags(parser: Parser) -> None:
    group = parser.add_argument_group("ONNX file")
    group.add_argument(
        "--onnx_path",
        type=onnx_path,
        help="file to write; one that is there is replaced once the new one has been proved equal; "
        f"unless given, {ONNX_ROOT}/<name of the snapshot>.onnx",
    )
    group.add_argument(
        "--opset", type=number(int, *OPSETS), default=12, help="version of ONNX's operators"
    )
    add_switch(
        group,
        "--external_data",
        "put the weights into a second file, <onnx_path>.data, which has to stay beside it",
    )
    add_switch(group, "--check_only", "export nothing; compare the file that is there")


def add_backend_flags(parser: Parser) -> None:
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=("oneflow", "onnxruntime"),
        default="oneflow",
        help="what computes: OneFlow from a snapshot, or ONNX Runtime, on the CPU, from a file of "
        "resnet_to_onnx.py, whose classes and preprocessing hold",
    )
    group.add_argument(
        "--onnx_path",
        type=onnx_path,
        help=f"onnxruntime only: file to read; unless given, the newest in {ONNX_ROOT}",
    )


def add_switch(group, name: str, text: str, default: bool = False) -> None:
    """A boolean flag: `--name`, `--name=True` or `--name=False`."""
    group.add_argument(
        name, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=text
    )


# One parser per script.


def train_parser(
    *, models: Iterable[str], optimizers: Iterable[str], schedules: Iterable[str]
) -> Parser:
    parser = Parser("Train a CNN with OneFlow and validate it after each epoch.")
    add_model_flags(parser, models, from_snapshot=False)
    add_device_flags(parser)
    add_precision_flags(parser)
    add_cuda_training_flags(parser)
    add_batch_flags(parser)
    add_train_data_flags(parser)
    add_val_data_flags(parser)
    add_optimizer_flags(parser, optimizers, schedules)
    add_training_flags(parser)
    add_log_flags(parser)
    return parser


def evaluate_parser(*, models: Iterable[str]) -> Parser:
    parser = Parser("Score a snapshot on a validation set: every image exactly once.")
    add_model_flags(parser, models, from_snapshot=True)
    add_device_flags(parser)
    add_precision_flags(parser)
    add_val_data_flags(parser)
    add_snapshot_flags(parser)
    add_backend_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--num_epochs",
        "--num_epoch",
        type=number(int, 1),
        default=1,
        help="rounds over the validation set",
    )
    add_log_flags(parser)
    return parser


def inference_parser(*, models: Iterable[str]) -> Parser:
    parser = Parser("Classify images.")
    add_model_flags(parser, models, from_snapshot=True)
    add_device_flags(parser)
    add_precision_flags(parser)
    add_snapshot_flags(parser)
    add_backend_flags(parser)
    group = parser.add_argument_group("images")
    add_image_path(
        group, ["cat.jpg"], "image files, directories of images, or - for paths on stdin"
    )
    group.add_argument(
        "--top_k", type=number(int, 1), default=1, help="classes to print for each image"
    )
    group.add_argument(
        "--batch_size",
        type=number(int, 1),
        default=1,
        help="images that the network takes at once; the figures are the same to six digits",
    )
    group.add_argument(
        "--output",
        choices=("text", "csv", "json"),
        default="text",
        help="text: the path, then `probability name` lines; csv: a header, then a line for each "
        "class; json: an object for each image, one a line",
    )
    return parser


def export_parser(*, models: Iterable[str]) -> Parser:
    parser = Parser("Export a snapshot to ONNX, and prove the file equal to it.")
    add_model_flags(parser, models, from_snapshot=True)
    add_snapshot_flags(parser)
    add_export_flags(parser)
    group = parser.add_argument_group("check")
    add_image_path(
        group,
        ["cat.jpg", "coffee.jpg"],
        "image files, or directories of images, on which to compare, beside random ones",
    )
    return parser


def add_image_path(group, names: list[str], text: str) -> None:
    default = [os.path.join("data", name) for name in names]
    group.add_argument("--image_path", nargs="+", default=default, help=text)


def switch_flags(args: argparse.Namespace) -> dict[str, bool]:
    """The fields of layer_util.Switches."""
    names = ("channel_last", "pad_output", "fuse_bn_relu", "fuse_bn_add_relu")
    return {name: getattr(args, name) for name in names}


def preprocessing_flags(args: argparse.Namespace) -> dict:
    """The fields of image_util.Preprocessing; None where a flag was not given."""
    names = ("image_size", "resize_shorter", "rgb_mean", "rgb_std")
    return {name: getattr(args, name) for name in names}


# Checks and defaults that look at more than one flag.


def num_processes(args: argparse.Namespace) -> int:
    """One for each device of the job."""
    return args.num_nodes * args.gpu_num_per_node


def job_flags(args: argparse.Namespace) -> dict:
    """The arguments of launch_util.make_job."""
    return {
        "num_nodes": args.num_nodes,
        "node_ips": args.node_ips,
        "processes_per_node": args.gpu_num_per_node,
        "ctrl_port": args.ctrl_port,
        "node_rank": args.node_rank,
        "start_timeout": args.start_timeout,
    }


def memory_flags(args: argparse.Namespace, *, batch: str) -> dict[str, str]:
    """The arguments `asked` and `flag` of graph_util.explain_crash; `batch` sets a batch's size."""
    given = {name: getattr(args, name) for name in ("model", "image_size", batch)}
    if given[batch] is None:
        given[batch] = BATCH_SIZE_PER_DEVICE
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return {"asked": " ".join(flags + ["--use_fp16"] * args.use_fp16), "flag": f"--{batch}"}


def flags_of_a_job(args: argparse.Namespace) -> dict:
    """The flags that have to be the same on every node, by name, as JSON knows them."""
    return {f"--{name}": value for name, value in vars(args).items() if name not in OF_ONE_NODE}


CUDA_FLAGS = (
    "channel_last",  # OneFlow's convolutions and batch norms for a CPU are wrong in that layout
    "fuse_bn_relu",
    "fuse_bn_add_relu",
    "gpu_image_decoder",
    "nccl_fusion_threshold_mb",
    "nccl_fusion_max_ops",
)


def check_precision_flags(args: argparse.Namespace, *, device: str) -> list[str]:
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
        ("image_size", "resize_shorter", "rgb_mean", "rgb_std"),
        "the preprocessing is that of the file; give it to resnet_to_onnx.py",
    ),
    **dict.fromkeys(
        ("use_fp16", "channel_last", "pad_output", "fuse_bn_relu", "fuse_bn_add_relu"),
        "it is about how OneFlow computes",
    ),
}


def check_backend_flags(args: argparse.Namespace) -> None:
    """Refuse flags that the chosen backend would ignore."""
    if args.backend == "oneflow":
        if args.onnx_path is not None:
            raise UsageError("--onnx_path needs --backend=onnxruntime; add that, or leave it out")
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


def check_optimizer_flags(args: argparse.Namespace) -> None:
    """Refuse a flag that the chosen optimizer or schedule would ignore, else fill in its default.

    Flags that do not belong to them stay None.
    """
    defaults = {
        "momentum": 0.875,
        "decay_rate": 0.9,
        "epsilon": EPSILON.get(args.optimizer),
        "lr_step_epochs": (30, 60, 80),
        "lr_decay_rate": 0.94,
        "lr_decay_epochs": 2.0,
    }
    for flag, (chooser, choices) in BELONGING_FLAGS.items():
        value, chosen = getattr(args, flag), getattr(args, chooser)
        if chosen in choices:
            setattr(args, flag, defaults[flag] if value is None else value)
        elif value is not None:
            raise UsageError(
                f"--{flag} has no effect with --{chooser}={chosen}; it belongs to "
                f"{' and '.join(f'--{chooser}={choice}' for choice in choices)}"
            )
    steps = args.lr_step_epochs or ()
    if list(steps) != sorted(set(steps)):
        raise UsageError(f"--lr_step_epochs={args.lr_step_epochs} must rise from left to right")


def check_data_flags(args: argparse.Namespace) -> None:
    """Refuse flags that the chosen kind of data would ignore."""

    def refuse(flags: Iterable[str], why: str) -> None:
        for flag in flags:
            if getattr(args, flag) != DATA_DEFAULTS.get(flag):
                raise UsageError(f"--{flag} {why}; leave it out")

    if args.train_data_dir is None:
        of_parts = ("train_data_part_num", "val_data_dir", "val_data_part_num")
        refuse(of_parts, "needs --train_data_dir, and without it data are synthetic")
        refuse(DATA_DEFAULTS, "has no effect on synthetic data")
        return
    if args.train_data_dir.endswith(".npz"):
        refuse(("shuffle_buffer_size",), "has no effect on an .npz file, shuffled as a whole")
        refuse(("gpu_image_decoder",), "has no effect on an .npz file")
    if args.val_data_dir is None:
        of_validation = ("val_data_part_num", "num_val_examples", "val_batch_size_per_device")
        refuse(of_validation, "needs --val_data_dir")


def finish_train_args(
    args: argparse.Namespace, *, device: str, trial: dict | None = None
) -> list[str]:
    """Fill in the defaults of the training script that depend on the device and the data.

    Args:
        trial: what replaces parts of CPU_TRIAL.

    Returns notices for the user. Raises UsageError where flags contradict one another.
    """
    notices = check_precision_flags(args, device=device)
    check_optimizer_flags(args)
    check_data_flags(args)
    synthetic = args.train_data_dir is None
    if not synthetic and args.val_data_dir is None:
        notices.append("No --val_data_dir: training without validation.")
    if synthetic and device == "cpu":
        taken = {
            flag: value
            for flag, value in (CPU_TRIAL | (trial or {})).items()
            if getattr(args, flag) is None
        }
        for flag, value in taken.items():
            setattr(args, flag, value)
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
    elif args.warmup_epochs >= args.num_epochs:
        raise UsageError(
            f"--warmup_epochs={args.warmup_epochs:g} must be less than --num_epochs="
            f"{args.num_epochs}: the learning rate would never reach its peak"
        )
    if args.lr_decay == "step" and args.lr_step_epochs[0] < args.warmup_epochs:
        raise UsageError(
            f"--lr_step_epochs={args.lr_step_epochs[0]:g},... falls within --warmup_epochs="
            f"{args.warmup_epochs:g}; steps must come after the warm-up"
        )
    if args.lr_decay == "step" and args.lr_step_epochs[0] >= args.num_epochs:
        notices.append(
            f"The learning rate never drops: --lr_step_epochs begins at {args.lr_step_epochs[0]:g} "
            f"and there are {args.num_epochs} epochs."
        )
    return notices


# Flags that belong to one start of a run: a later start does not inherit them.
OF_ONE_START = (
    "resume",
    "model_load_dir",
    "finetune",
    "model_save_dir",
    "device",
    "num_nodes",
    "node_ips",
    "gpu_num_per_node",
    "ctrl_port",
    "node_rank",
    "start_timeout",
)
# Flags that may differ between the nodes of a job: what they stand for is compared by itself.
OF_ONE_NODE = (
    "node_rank",
    "log_dir",
    "resume",
    "model_load_dir",
    "model_save_dir",
    "train_data_dir",
    "val_data_dir",
    "start_timeout",
    "ctrl_port",
)
# What a run cannot change on its way: the optimizer's buffers, and the order of the data.
OF_THE_WHOLE_RUN = ("optimizer", "seed")


def parse_resumed(
    parser: Parser, argv: Sequence[str] | None, flags: dict, *, device: str
) -> argparse.Namespace:
    """Parse a command line that goes on with a run: what is not given is as in its `flags`.

    `flags` came back from JSON. Those of another schedule than the one that is asked for now are
    left out, and on a CPU those that need CUDA.
    """
    inherited = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flags.items()
        if name not in OF_ONE_START and not (device == "cpu" and name in CUDA_FLAGS)
    }
    parser.set_defaults(**inherited)
    args = parser.parse_args(argv)
    parser.set_defaults(
        **{
            name: None
            for name, (chooser, _) in BELONGING_FLAGS.items()
            if getattr(args, chooser) != flags.get(chooser)
        }
    )
    return parser.parse_args(argv)


def compare_flags(args: argparse.Namespace, flags: dict, *, path: str) -> list[str]:
    """Refuse flags that contradict the run that left `flags` in the snapshot `path`.

    Returns a notice for each other flag that differs, since it holds from here on. Raises
    UsageError.
    """
    notices = []
    kinds = [data_kind(each) for each in (args.train_data_dir, flags.get("train_data_dir"))]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"--train_data_dir: {path} is of a run on {kinds[1]}, and this would be {kinds[0]}; "
            f"start a new run from the weights with --model_load_dir={path}"
        )
    for name, value in flags.items():
        was = tuple(value) if isinstance(value, list) else value
        now = getattr(args, name, was)
        if name in OF_ONE_START or now == was:
            continue
        if name in OF_THE_WHOLE_RUN:
            raise UsageError(
                f"--{name}={now}, but {path} is of a run with {was}; leave it out, or start a new "
                f"run from the weights with --model_load_dir={path}"
            )
        if now is not None:  # else it belonged to another schedule
            before = "not set" if was is None else was
            notices.append(f"--{name}={now} from here on; it was {before}.")
    return notices


def data_kind(train_data_dir: str | None) -> str:
    if train_data_dir is None:
        return "synthetic data"
    return "arrays" if train_data_dir.endswith(".npz") else "OFRecord parts"


def default_resize_shorter(image_size: int) -> int:
    """256 for 224 pixels, the ratio of the recipe, and in proportion for other sizes."""
    return round(image_size * 256 / 224)


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
            f"--lr_step_epochs={','.join(f'{epoch:g}' for epoch in lr_step_epochs)}: two of them "
            f"are the same iteration, as an epoch has {steps_per_epoch}"
        )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        # At least one step is left for the schedule after it.
        warmup_steps=min(round(steps_per_epoch * warmup_epochs), total_steps - 1),
        step_milestones=milestones,
        exponential_steps=steps_per_epoch * (lr_decay_epochs or 1.0),
    )
