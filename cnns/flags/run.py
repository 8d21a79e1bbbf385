"""Flags of a run, of what it writes down, and of what a script reads and writes."""

import os

from cnns.flags.defaults import CPU_TRIAL, FINETUNE, KEEP_SNAPSHOTS, NUM_EPOCHS
from cnns.flags.parser import Flag
from cnns.flags.values import COUNT, boolean, count_or_all, names, number, onnx_path, path
from cnns.places import ONNX_ROOT, PUBLISHED_FOLDER, SNAPSHOT_ROOT

BEST_METRICS = ("top_1", "top_k", "loss", "ema_top_1", "ema_top_k", "ema_loss")
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
    "freeze": Flag(
        "parts of the network that are not trained, joined by commas, by their names in snapshots "
        "(conv1,bn1,layer1); backbone: all but the last layer; their batch norms keep their "
        "statistics",
        names,
        otherwise="none",
        metavar="NAME[,NAME...]",
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
    "best_metric": Flag(
        "figure of the validation by which `best` is chosen; those of ema are of the average of "
        "--ema_decay",
        str.lower,
        "top_1",
        choices=BEST_METRICS,
    ),
    "early_stop_epochs": Flag(
        "end the run after so many epochs that were no better than the best one",
        COUNT,
        otherwise="never",
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
    "report": Flag(
        "at the end, write into the directory of the run: report/, the curves, and evaluation/, "
        "what the best snapshot gets wrong, as of_cnn_evaluate.py --report does",
        boolean,
        otherwise="on with --finetune and for a folder of images, else off",
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


def image_path_flags(text: str, *names: str) -> dict[str, Flag]:
    default = [os.path.join("data", name) for name in names]
    return {"image_path": Flag(text, default=default, otherwise=" ".join(default), many=True)}
