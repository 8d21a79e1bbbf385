"""What a flag, a value or a path that does not exist was probably meant to be."""

import difflib
import os
from collections.abc import Collection, Iterable

MIN_PREFIX = 3  # letters of a flag that was cut short
MAX_NAMES = 10_000  # of a directory, that are compared with one that is not there

# Flags of timm, torchvision, Ultralytics and MMPretrain, and those here that come nearest. They are
# hints, not aliases, as few mean exactly the same: their batch size is that of all devices in one
# tool and of each in another.
BATCH_SIZE = ("batch_size_per_device", "batch_size", "val_batch_size_per_device")
FOREIGN = {
    "aa": ("auto_augment",),
    "amp": ("use_fp16",),
    "arch": ("model",),
    "aug_repeats": ("repeated_augmentation",),
    "b": BATCH_SIZE,
    "batch": BATCH_SIZE,
    "batch_size": BATCH_SIZE,
    "bce_loss": ("loss",),
    "bias_weight_decay": ("bias_wd",),
    "channels_last": ("channel_last",),
    "checkpoint": ("model_load_dir",),
    "class_weight": ("class_weights",),
    "clip_grad": ("gradient_clipping",),
    "clip_grad_norm": ("gradient_clipping",),
    "cutmix": ("cutmix_alpha",),
    "data": ("train_data_dir", "val_data_dir"),
    "data_dir": ("train_data_dir", "val_data_dir"),
    "data_path": ("train_data_dir", "val_data_dir"),
    "drop_path": ("stochastic_depth",),
    "epochs": ("num_epochs",),
    "fp16": ("use_fp16",),
    "gpus": ("gpu_num_per_node",),
    "grad_accum_steps": ("accumulate_steps",),
    "img_size": ("image_size",),
    "imgsz": ("image_size",),
    "initial_checkpoint": ("model_load_dir",),
    "input_size": ("image_size",),
    "j": ("num_workers",),
    "log_interval": ("loss_print_every_n_iter",),
    "lr": ("learning_rate",),
    "lr0": ("learning_rate",),
    "lr_scheduler": ("lr_decay",),
    "min_lr": ("lr_min",),
    "mixup": ("mixup_alpha",),
    "model_ema_decay": ("ema_decay",),
    "model_ema_steps": ("ema_steps",),
    "norm_weight_decay": ("norm_wd",),
    "nproc_per_node": ("gpu_num_per_node",),
    "opt": ("optimizer",),
    "output_dir": ("model_save_dir",),
    "pretrained": ("finetune", "model_load_dir"),
    "print_freq": ("loss_print_every_n_iter",),
    "project": ("model_save_dir",),
    "ra_magnitude": ("randaugment_magnitude",),
    "ra_reps": ("repeated_augmentation",),
    "random_erase": ("random_erasing",),
    "ratio": ("random_aspect_ratio",),
    "reprob": ("random_erasing",),
    "save_dir": ("model_save_dir",),
    "scale": ("random_area",),
    "sched": ("lr_decay",),
    "smoothing": ("label_smoothing",),
    "source": ("image_path",),
    "topk": ("top_k",),
    "train_crop_size": ("train_image_size",),
    "val_crop_size": ("image_size",),
    "val_resize_size": ("resize_shorter",),
    "weight_decay": ("wd",),
    "weights": ("model_load_dir",),
    "work_dir": ("model_save_dir",),
    "workers": ("num_workers",),
}
# Those that have none here.
NOT_NEEDED = {
    "workers": "data are read by OneFlow's own threads: leave it out",
    "j": "data are read by OneFlow's own threads: leave it out",
    "pin_mem": "data are read by OneFlow's own threads: leave it out",
    "dist_url": "see --node_ips and --ctrl_port",
    "sync_bn": "batch norms are those of each device",
}


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of `known` that is spelled most like `word`, whatever the case of its letters."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def nearest_flag(word: str, known: Collection[str]) -> str | None:
    """The flag that another tool's, a mistyped or a cut one stands for; without dashes in front."""
    for name in FOREIGN.get(word, ()):
        if name in known:
            return name
    longer = [name for name in known if len(word) >= MIN_PREFIX and name.startswith(word)]
    return min(longer, key=len) if longer else nearest(word, known)


def nearest_path(path: str) -> str | None:
    """A path that exists and differs from `path`, which does not, in the spelling of one name."""
    rest: list[str] = []
    parent, name = os.path.split(path.rstrip(os.sep))
    while name and not os.path.isdir(parent or "."):
        rest.insert(0, name)
        parent, name = os.path.split(parent)
    try:
        with os.scandir(parent or ".") as entries:
            names = [entry.name for _, entry in zip(range(MAX_NAMES), entries, strict=False)]
    except OSError:
        return None
    found = nearest(name, names, cutoff=0.7)
    near = os.path.join(parent, found, *rest) if found else ""
    return near if os.path.exists(near) else None


def path_hint(path: str | os.PathLike, otherwise: str = "check the path") -> str:
    """What to do about a path where there is nothing: `otherwise` where there is none like it."""
    near = nearest_path(os.fspath(path))
    return f"did you mean {near}?" if near else otherwise
