"""The flags of the scripts, one record each; their checks; and the arithmetic from epochs to steps.

To add a flag, add its record to a group here and read it in the script. A script composes the
groups that it uses. Names are those of OneFlow-Benchmark's scripts. Closed choices are the keys of
the table that builds the thing, so that an advertised choice always exists.
"""

import argparse
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cnns.convert.cache import VAL_SPLIT, Settings, is_photo_folder
from cnns.data.crops import SHUFFLE_BUFFER_SIZE, Augmentation
from cnns.data.format import MAX_CLASSES
from cnns.data.images import MAX_PIXELS
from cnns.distributed import choose_device
from cnns.errors import UsageError
from cnns.flags import Flag, FlagParser, interval, number, numbers, onnx_path, path, show
from cnns.launch.external import refuse_ranks
from cnns.launch.job import CTRL_PORT, START_TIMEOUT
from cnns.log import notice
from cnns.models.layers import Switches
from cnns.places import CACHE_ROOT, ONNX_ROOT, PUBLISHED_FOLDER, SNAPSHOT_ROOT, VAL_DATA_DIR
from cnns.resume import num_processes
from model_registry import MODELS
from ofrecord_util import DATA_ORDERS
from optimizer_util import OPTIMIZERS, SCHEDULES

BATCH_SIZE_PER_DEVICE = 64
NUM_EPOCHS = 90
WARMUP_EPOCHS = 5
SYNTHETIC_STEPS_PER_EPOCH = 30
# What a run on synthetic data takes on a CPU, so that a first try ends in about a minute.
CPU_TRIAL = {"image_size": 64, "batch_size_per_device": 8, "num_epochs": 2}
OPSETS = (9, 21)  # lowest and highest that resnet_to_onnx.py writes
# Learning rates per 256 images of global batch. sgd: Goyal et al. (arXiv:1706.02677) scaled as in
# NVIDIA's and OneFlow's ResNet-50 v1.5; adam: its paper's 0.001; rmsprop: 0.045 at batch 1600, of
# the Inception-v3 paper (arXiv:1512.00567).
LEARNING_RATE_PER_256 = {"sgd": 0.256, "adam": 0.001, "rmsprop": 0.0072}
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
EPSILON = {"adam": 1e-8, "rmsprop": 1.0}
COUNT, PIXELS = number(int, 1), number(int, 1, 2**32)


def rgb_std(text: str) -> tuple[float, ...]:
    values = numbers(3)(text)
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 in each channel")
    return values


def addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def count_or_all(text: str) -> int:
    return 0 if text == "all" else number(int, 0)(text)


def optimizer_name(text: str) -> str:
    """The 2020 page still says --model_update=momentum for what is now --optimizer=sgd."""
    return {"momentum": "sgd"}.get(text.lower(), text.lower())


def describe_learning_rates() -> str:
    text = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATE_PER_256.items())
    text += ", per 256 images of global batch"
    networks: dict[tuple[str, float], list[str]] = {}
    for model, entry in sorted(MODELS.items()):
        for own in entry.learning_rates.items():
            networks.setdefault(own, []).append(model)
    for (optimizer, rate), names in networks.items():
        text += f"; {optimizer} for {' and '.join(names)}: {rate:g}"
    tuned = ", ".join(f"{rate:g} for {name}" for name, rate in FINETUNE_RATE_PER_256.items())
    return f"{text}; with --finetune {tuned}"


# Groups of flags, by name.

IN_TRAINING = "as in the snapshot to start from, else the network's own"
PREPROCESSING_FLAGS = {
    "image_size": Flag(
        "height and width of the network's input, pixels", number(int, 8), otherwise=IN_TRAINING
    ),
    "resize_shorter": Flag(
        "validation and inference: pixels of the shorter side before the centre crop",
        number(int, 8),
        otherwise="256 per 224 pixels of --image_size",
    ),
    "rgb_mean": Flag(
        "subtracted from each channel, 0 to 255",
        numbers(3),
        otherwise=IN_TRAINING,
        aliases=("--rgb-mean",),
    ),
    "rgb_std": Flag(
        "divides each channel after that", rgb_std, otherwise=IN_TRAINING, aliases=("--rgb-std",)
    ),
}
MODEL_FLAGS = {
    "model": Flag(
        "network", choices=MODELS, otherwise="that of the snapshot to start from, else resnet50"
    ),
    "num_classes": Flag(
        "number of classes",
        number(int, 1, MAX_CLASSES),
        otherwise="as in the snapshot to start from, else as in the manifest of the training data, "
        "else 1000",
    ),
    **PREPROCESSING_FLAGS,
}
# The same for the scripts that read a snapshot.
SNAPSHOT_MODEL_FLAGS = {
    name: replace(flag, otherwise=flag.otherwise.partition(" to start from")[0])
    for name, flag in MODEL_FLAGS.items()
}
DEVICE_FLAGS = {
    "device": Flag(
        "auto takes CUDA where there is one and says which it took",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        of="start",
    ),
    "num_nodes": Flag("number of machines", COUNT, 1, of="start"),
    "node_ips": Flag(
        "addresses of the machines, joined by commas, the same on each; the first prints and saves",
        addresses,
        of="start",
    ),
    "node_rank": Flag(
        "which of --node_ips this machine is, from 0",
        number(int, 0),
        otherwise="found by its own addresses, else as the scheduler says (Slurm, Open MPI, PMI, "
        "PBS)",
        of="node",
    ),
    "gpu_num_per_node": Flag(
        "GPUs per machine, one process each; on a CPU, the number of processes",
        COUNT,
        1,
        of="start",
    ),
    "ctrl_port": Flag(
        "TCP port of the first machine to which the others connect; OneFlow takes the next one",
        number(int, 1, 65535),
        CTRL_PORT,
        of="node",
    ),
    "start_timeout": Flag(
        "seconds within which all machines have to connect",
        number(float, 0, above=True),
        START_TIMEOUT,
        of="node",
    ),
}
PRECISION_FLAGS = {
    "use_fp16": Flag(
        "compute in half precision where that is safe (automatic mixed precision), with dynamic "
        "loss scaling; loss, weights and snapshots stay float32; a CPU computes in float32",
        default=False,
    ),
    # OneFlow's convolutions and batch norms for a CPU are wrong in that layout.
    "channel_last": Flag("compute with activations (N, H, W, C)", default=False, cuda=True),
    "pad_output": Flag("give images a fourth channel, of zeros", default=False),
    "fuse_bn_relu": Flag("batch norm and ReLU in one kernel", default=False, cuda=True),
    "fuse_bn_add_relu": Flag("batch norm, sum and ReLU in one kernel", default=False, cuda=True),
}
CUDA_TRAINING_FLAGS = {
    "gpu_image_decoder": Flag(
        "decode and crop training images on the GPU; OFRecord parts only, and a resumed run then "
        "reads from the beginning of its parts, in another order than one that never stopped",
        default=False,
        cuda=True,
    ),
    "nccl_fusion_threshold_mb": Flag(
        "fuse gradients into all-reduces of up to this many MB",
        COUNT,
        otherwise="OneFlow's default",
        cuda=True,
    ),
    "nccl_fusion_max_ops": Flag(
        "join at most so many gradients in a piece", COUNT, otherwise="OneFlow's default", cuda=True
    ),
}
CUDA_FLAGS = [name for name, f in (PRECISION_FLAGS | CUDA_TRAINING_FLAGS).items() if f.cuda]
BATCH_FLAGS = {
    "batch_size_per_device": Flag(
        "training images per device and step",
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
        otherwise="--batch_size_per_device times the number of devices",
    ),
}
AUGMENTATION_FLAGS = {
    "random_area": Flag(
        "random crop: share of the image's area",
        interval(0, 1),
        Augmentation.area,
        metavar="MIN,MAX",
    ),
    "random_aspect_ratio": Flag(
        "random crop: width over height", interval(0), Augmentation.aspect_ratio, metavar="MIN,MAX"
    ),
    "random_flip": Flag("probability of a mirror image", number(float, 0, 1), Augmentation.flip),
}
TRAIN_DATA_FLAGS = {
    "train_data_dir": Flag(
        "directory of OFRecord parts, an .npz file with images (N, H, W, 3) uint8 and labels (N,), "
        "or a folder with one folder of images per class, or with train/ and validation/ of such; "
        "without it the data are synthetic",
        path,
    ),
    "train_data_part_num": Flag("read the first so many parts", COUNT, otherwise="all"),
    "num_examples": Flag(
        "training images per epoch, drawn from all there are", COUNT, otherwise="all"
    ),
    **AUGMENTATION_FLAGS,
    "data_order": Flag(
        "OFRecord parts: native is OneFlow's reader with its buffer, where each device has parts "
        "of its own; global is an order over all records that depends on --seed and the epoch "
        "alone, by an index that is kept beside each part",
        default="native",
        choices=DATA_ORDERS,
        fixed=True,
    ),
    "shuffle_buffer_size": Flag(
        "size in records of the buffer from which OneFlow's OFRecord reader draws; 1: no shuffling "
        "within a part, and each image of a device's share once per epoch",
        COUNT,
        otherwise=f"{SHUFFLE_BUFFER_SIZE}, at most a 50th of that share",
    ),
}
VAL_DATA_FLAGS = {
    "val_data_dir": Flag(
        "directory of OFRecord parts, an .npz file with images and labels, or a folder with one "
        "folder of images per class",
        path,
    ),
    "val_data_part_num": Flag("read the first so many parts", COUNT, otherwise="all"),
    "num_val_examples": Flag("score the first so many images", COUNT, otherwise="all"),
    "val_batch_size_per_device": Flag(
        "validation images per device and step; the figures do not depend on it", COUNT, 50
    ),
    "top_k": Flag(
        "k of the second accuracy that is printed, at most the number of classes less one", COUNT, 5
    ),
}
# Of folders with one folder of images per class.
FOLDER_FLAGS = {
    "val_split": Flag(
        "share of each class of a folder of images that is for validation, drawn by content; equal "
        "files stay on one side; 0: none, and in evaluation 1: all",
        number(float, 0, 1),
        otherwise=f"{VAL_SPLIT:g} where training has no folder for validation, and in evaluation "
        "what the run kept",
    ),
    "cache_dir": Flag(
        "where a folder of images is converted to OFRecord parts, once for each state of it",
        path,
        CACHE_ROOT,
    ),
    "skip_bad": Flag(
        "leave bad images of a folder out, and list them in the manifest", default=False
    ),
    "follow_links": Flag(
        "read what links lead to outside of a folder of images",
        default=False,
        otherwise="they are refused",
    ),
}
OPTIMIZER_FLAGS = {
    "optimizer": Flag(
        "adam decays weights decoupled from the gradient; --model_update=momentum is sgd",
        optimizer_name,
        "sgd",
        choices=OPTIMIZERS,
        aliases=("--model_update",),
        fixed=True,
    ),
    "learning_rate": Flag(
        "peak learning rate", number(float, 0), otherwise=describe_learning_rates()
    ),
    "wd": Flag(
        "weight decay of every parameter except those of batch norms",
        number(float, 0),
        1 / 32768,
        otherwise="1/32768",
    ),
    "momentum": Flag("momentum", number(float, 0, 1), 0.875, needs=("optimizer", ("sgd",))),
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
    "label_smoothing": Flag("label smoothing factor", number(float, 0, 1), 0.1),
    "warmup_epochs": Flag(
        "epochs of linear warm-up from 0",
        number(float, 0),
        otherwise=f"{WARMUP_EPOCHS}, {FINETUNE['warmup_epochs']:g} with --finetune, but at most "
        "half of the run",
    ),
    "lr_decay": Flag("schedule after the warm-up", str.lower, "cosine", choices=SCHEDULES),
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
RUN_FLAGS = {
    "num_epochs": Flag(
        "passes over the training data",
        COUNT,
        otherwise=f"{NUM_EPOCHS}, {FINETUNE['num_epochs']} with --finetune, and "
        f"{CPU_TRIAL['num_epochs']} for synthetic data on a CPU",
        aliases=("--num_epoch",),
    ),
    "model_load_dir": Flag(
        "weights to start from: a snapshot, or the directory of a run, whose best is taken, else "
        "its last, or weights from elsewhere (.safetensors, .pth, a folder of OneFlow)",
        path,
        otherwise="random ones",
        of="start",
    ),
    "finetune": Flag(
        "take all of --model_load_dir, or of the weights that were installed for --model, but the "
        "last layer, which starts from random weights and may have another number of classes; "
        "shorter than a run from scratch, see the flags' defaults",
        default=False,
        of="start",
    ),
    "resume": Flag(
        "resume as if the run had never stopped: from a snapshot, from the newest intact one in a "
        "directory, or, with auto, from the newest in --model_save_dir, and from the start where "
        "there is none; flags that are not given are those of the run",
        path,
        metavar="DIR|auto",
        of="start",
    ),
    "model_save_dir": Flag(
        "where snapshots go; nothing there is overwritten but last and best",
        path,
        otherwise=f"where the resumed run's are, else ./{SNAPSHOT_ROOT}/model_save-<date and time>",
        of="start",
    ),
    "save_epoch_interval": Flag(
        "epochs between snapshots; the last epoch is always saved", COUNT, 1
    ),
    "save_every_n_iter": Flag(
        "also save `last` every so many iterations of an epoch", COUNT, otherwise="never"
    ),
    "save_init": Flag("save the initial model as well; train.sh gives it", default=False),
    "save_last": Flag("keep the newest snapshot under the name `last` too", default=True),
    "keep_snapshots": Flag(
        "keep the newest so many snapshots of epochs and remove older ones; best, last and "
        "initial_model always stay; all, or 0: remove none",
        count_or_all,
        otherwise=f"{KEEP_SNAPSHOTS}, and {FINETUNE['keep_snapshots']} with --finetune",
        metavar="COUNT|all",
    ),
    "loss_print_every_n_iter": Flag("iterations between lines", COUNT, 10),
    "seed": Flag(
        "of initial weights, the order of the data, crops and flips",
        number(int, 0, 2**31 - 1),
        0,
        fixed=True,
    ),
}
LOG_FLAGS = {
    "log_dir": Flag("also append every line to <script>.log in this directory", path),
}
RECORD_FLAGS = {
    "tensorboard": Flag(
        "also write the figures of metrics.jsonl for TensorBoard, to tensorboard/ in the directory "
        "of the run",
        default=False,
    ),
}
REPORT_FLAGS = {
    "report": Flag(
        "write what the network gets wrong to this directory: figures of each class, confusion "
        "matrix, calibration, all predictions, the most confident mistakes; of the first round",
        path,
        metavar="DIR",
    ),
}
CONFIG_FLAGS = {
    "config": Flag(
        "take flags from this file: the flags.yaml of a run, YAML with lines `flag: value`, or a "
        "snapshot; flags of the command line win",
        path,
        of="start",
    ),
}
SNAPSHOT_FLAGS = {
    "model_load_dir": Flag(
        "snapshot to read, or the directory of a run, whose best is read, else its last, or "
        "weights from elsewhere (.safetensors, .pth, a folder of OneFlow)",
        path,
        otherwise=f"the published folder {PUBLISHED_FOLDER} where that exists, else the best of "
        f"the newest run under {SNAPSHOT_ROOT}, of --model if that is given, else the weights that "
        "were installed for it",
        of="start",
    ),
}
BACKEND_FLAGS = {
    "backend": Flag(
        "what computes: OneFlow from a snapshot, or ONNX Runtime, on the CPU, from a file of "
        "resnet_to_onnx.py, whose classes and preprocessing hold",
        default="oneflow",
        choices=("oneflow", "onnxruntime"),
    ),
    "onnx_path": Flag(
        "file to read",
        onnx_path,
        otherwise=f"the newest in {ONNX_ROOT}",
        needs=("backend", ("onnxruntime",)),
    ),
}
EXPORT_FLAGS = {
    "onnx_path": Flag(
        "file to write; an existing one is replaced after the new one has passed the comparison",
        onnx_path,
        otherwise=f"{ONNX_ROOT}/<name of the snapshot>.onnx",
    ),
    "opset": Flag(
        f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[1]}", number(int, *OPSETS), 12
    ),
    "external_data": Flag(
        "put the weights into a second file, <onnx_path>.data, which has to stay beside it",
        default=False,
    ),
    "check_only": Flag("export nothing; compare the file that is there", default=False),
}


def image_path_flags(text: str, *names: str) -> dict[str, Flag]:
    default = [os.path.join("data", name) for name in names]
    return {"image_path": Flag(text, default=default, otherwise=" ".join(default), many=True)}


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
            "model": MODEL_FLAGS,
            "CUDA only": CUDA_TRAINING_FLAGS,
            "batches": BATCH_FLAGS,
            "training data": TRAIN_DATA_FLAGS,
            "validation data": VAL_DATA_FLAGS,
            "folders of images": FOLDER_FLAGS,
            "optimizer and schedule": OPTIMIZER_FLAGS,
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
            "check": image_path_flags(
                "image files, or directories of images, to compare on, beside random ones",
                "cat.jpg",
                "coffee.jpg",
            ),
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


def preprocessing_flags(args: Namespace) -> dict:
    """The fields of cnns.data.images.Preprocessing that flags set; None where one was not given."""
    return {name: getattr(args, name) for name in PREPROCESSING_FLAGS}


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


# Checks and defaults that look at more than one flag.


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
    if not all(map(os.path.exists, given)) or any(map(is_photo_folder, given)):
        return
    for name, flag in FOLDER_FLAGS.items():
        if getattr(args, name) != flag.default:
            raise UsageError(
                f"--{name} belongs to a folder of images, and {given[0]} is not one; leave it out"
            )


def check_data_flags(args: Namespace) -> None:
    """Refuse flags that the chosen kind of data would ignore."""
    records = CUDA_TRAINING_FLAGS | TRAIN_DATA_FLAGS | VAL_DATA_FLAGS | FOLDER_FLAGS

    def refuse(why: str, *names: str) -> None:
        for name in names:
            if getattr(args, name) != records[name].default:
                raise UsageError(f"--{name} {why}; leave it out")

    of_reader = ("shuffle_buffer_size", "gpu_image_decoder")
    of_parts = ("data_order", *of_reader)
    if is_photo_folder(args.train_data_dir):
        refuse("has no effect on a folder of images", "train_data_part_num")
    check_folder_flags(args, args.train_data_dir, args.val_data_dir)
    if args.train_data_dir is None:
        of_files = ("train_data_part_num", "val_data_dir", "val_data_part_num", *FOLDER_FLAGS)
        refuse("needs --train_data_dir, and without it data are synthetic", *of_files)
        ignored = (*AUGMENTATION_FLAGS, *of_parts, "val_batch_size_per_device")
        refuse("has no effect on synthetic data", *ignored)
        return
    if args.train_data_dir.endswith(".npz"):
        refuse("has no effect on an .npz file, which is shuffled as a whole", *of_parts)
    if args.data_order == "global":
        refuse("contradicts --data_order=global: it belongs to OneFlow's reader", *of_reader)
    if not has_validation(args):
        of_validation = ("val_data_part_num", "num_val_examples", "val_batch_size_per_device")
        refuse("needs --val_data_dir", *of_validation)


def take_batch_size(args: Namespace) -> None:
    """Divide --global_batch_size among the processes. Raises UsageError where it cannot be."""
    whole, ranks = args.global_batch_size, num_processes(vars(args))
    if whole is None:
        return
    if whole % ranks:
        raise UsageError(
            f"--global_batch_size={whole} cannot be divided among {ranks} processes; their number "
            "must be a divisor of it"
        )
    if args.batch_size_per_device not in (None, whole // ranks):
        raise UsageError(
            f"--batch_size_per_device={args.batch_size_per_device} contradicts "
            f"--global_batch_size={whole}, which is {whole // ranks} for each of {ranks} "
            "processes; leave one of them out"
        )
    args.batch_size_per_device = whole // ranks


def finish_train_args(args: Namespace, *, device: str) -> list[str]:
    """Fill in the defaults of the training script that depend on the device and the data.

    Returns notices for the user. Raises UsageError where flags contradict one another.
    """
    notices = check_precision_flags(args, device=device)
    check_data_flags(args)
    take_batch_size(args)
    if args.epsilon is None:
        args.epsilon = EPSILON.get(args.optimizer)
    if args.train_data_dir is None and device == "cpu":
        trial = CPU_TRIAL | (dict(MODELS[args.model].trial) if args.model else {})
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
        args.global_batch_size = args.batch_size_per_device * num_processes(vars(args))
    if args.num_epochs is None:
        args.num_epochs = NUM_EPOCHS
    if args.keep_snapshots is None:
        args.keep_snapshots = KEEP_SNAPSHOTS
    if args.warmup_epochs is None:
        args.warmup_epochs = min(WARMUP_EPOCHS, args.num_epochs // 2)
    check_schedule_flags(args)
    if args.lr_decay == "step" and args.lr_step_epochs[0] >= args.num_epochs:
        notices.append(
            f"The learning rate never drops: --lr_step_epochs begins at {args.lr_step_epochs[0]:g} "
            f"and there are {args.num_epochs} epochs."
        )
    return notices


def finetune_batch_size(num_examples: int, num_processes: int) -> int:
    """Images per device and step that --finetune takes: so that small data have some steps."""
    share = num_examples // num_processes
    size = FINETUNE_BATCH_SIZE
    while size > FINETUNE_MIN_BATCH_SIZE and share < size * FINETUNE_STEPS:
        size //= 2
    return max(1, min(size, share))


def learning_rate_per_256(model: str, optimizer: str, *, finetune: bool) -> float:
    """The peak learning rate unless one is given, per 256 images of global batch."""
    own = MODELS[model].learning_rates.get(optimizer)
    rate = (FINETUNE_RATE_PER_256 if finetune else LEARNING_RATE_PER_256)[optimizer]
    return rate if own is None else min(own, rate) if finetune else own


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
