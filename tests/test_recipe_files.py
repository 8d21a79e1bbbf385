"""recipes/*.yaml: each value is that of its source, and the training script takes the file."""

import math
import re
import shlex

import pytest

import config
import of_cnn_train_val
from cnns.configfile import read_config
from cnns.flags.defaults import FINETUNE, FINETUNE_RATE_PER_256
from cnns.flags.parser import FlagParser
from small import ROOT, write_parts

PARSER: FlagParser = config.make_parser("train")
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
CROP = {"random_area": (0.08, 1.0), "random_aspect_ratio": (3 / 4, 4 / 3), "random_flip": 0.5}
# What their page and code say, see docs/recipe.md#alignment.
ORIGINAL = {
    "model": "resnet50",
    "image_size": 224,
    "resize_shorter": 256,
    "rgb_mean": (123.68, 116.779, 103.939),
    "rgb_std": (58.393, 57.12, 57.375),
    **CROP,
    "num_epochs": 90,
    "optimizer": "sgd",
    "momentum": 0.875,
    "learning_rate": 0.256,
    "lr_scaling": "linear",
    "lr_decay": "cosine",
    "lr_min": 0.0,
    "warmup_epochs": 5.0,
    "wd": 1 / 32768,
    "norm_wd": 0.0,
    "label_smoothing": 0.1,
}
# The flags of torchvision's command for ResNet50_Weights.IMAGENET1K_V2, on 8 GPUs.
TORCHVISION = shlex.split(
    "--model=resnet50 --batch-size=128 --lr=0.5 --lr-scheduler=cosineannealinglr "
    "--lr-warmup-epochs=5 --lr-warmup-method=linear --auto-augment=ta_wide --epochs=600 "
    "--random-erase=0.1 --weight-decay=0.00002 --norm-weight-decay=0.0 --label-smoothing=0.1 "
    "--mixup-alpha=0.2 --cutmix-alpha=1.0 --train-crop-size=176 --model-ema=True "
    "--val-resize-size=232 --ra-sampler=True --ra-reps=4"
)
# What torchvision's train.py and presets.py take where the command gives nothing.
TORCHVISION_DEFAULTS = {
    "opt": "sgd",
    "momentum": "0.9",
    "lr-warmup-decay": "0.01",
    "lr-min": "0.0",
    "val-crop-size": "224",
    "interpolation": "bilinear",
    "model-ema-decay": "0.99998",
    "model-ema-steps": "32",
}
# Their flag, ours, and what ours is of theirs.
SAME_FLAGS = {
    "model": ("model", str),
    "opt": ("optimizer", str),
    "momentum": ("momentum", float),
    "batch-size": ("global_batch_size", lambda text: 8 * int(text)),
    "lr": ("learning_rate", float),
    "lr-scheduler": ("lr_decay", {"cosineannealinglr": "cosine"}.get),
    "lr-min": ("lr_min", float),
    "lr-warmup-epochs": ("warmup_epochs", float),
    "lr-warmup-decay": ("lr_warmup_decay", float),
    "auto-augment": ("auto_augment", {"ta_wide": "trivialaugment_wide"}.get),
    "epochs": ("num_epochs", int),
    "random-erase": ("random_erasing", float),
    "weight-decay": ("wd", float),
    "norm-weight-decay": ("norm_wd", float),
    "label-smoothing": ("label_smoothing", float),
    "mixup-alpha": ("mixup_alpha", float),
    "cutmix-alpha": ("cutmix_alpha", float),
    "train-crop-size": ("train_image_size", int),
    "val-crop-size": ("image_size", int),
    "val-resize-size": ("resize_shorter", int),
    "interpolation": ("interpolation", str),
    "ra-reps": ("repeated_augmentation", int),
    "model-ema-decay": ("ema_decay", float),
    "model-ema-steps": ("ema_steps", int),
}
# Linear is the only warm-up here, and ours are on where their numbers are given.
WITHOUT_A_TWIN = {"lr-warmup-method", "model-ema", "ra-sampler"}
# The table of hyperparameters of "ResNet strikes back" (arXiv:2110.00476), for A1, A2 and A3; the
# same, but for A3's size of training images, stand in mmpretrain's configs/resnet/*-rsb-a*.py.
STRIKES_BACK = {
    "Train Res": (224, 224, 160),
    "Test Res": (224, 224, 224),
    "Epochs": (600, 300, 100),
    "Batch size": (2048, 2048, 2048),
    "Optimizer": ("LAMB", "LAMB", "LAMB"),
    "LR": (5e-3, 5e-3, 8e-3),
    "LR decay": ("cosine", "cosine", "cosine"),
    "Weight decay": (0.01, 0.02, 0.02),
    "Warmup epochs": (5, 5, 5),
    "Label smoothing": (0.1, None, None),
    "Stoch. Depth": (0.05, 0.05, None),
    "Repeated Aug": (True, True, False),
    "Rand Augment": ("7/0.5", "7/0.5", "6/0.5"),
    "Mixup alpha": (0.2, 0.1, 0.1),
    "Cutmix alpha": (1.0, 1.0, 1.0),
    "Test crop ratio": (0.95, 0.95, 0.95),
    "CE loss": (False, False, False),
    "BCE loss": (True, True, True),
}
# What the paper leaves to timm: train.py and optim/lamb.py at d9abfa48 of 2021-10-01, its day; the
# configurations of resnet50.a1_in1k to a3_in1k in timm 1.0.31; the three repeats are RASampler's.
TIMM = {
    "warmup-lr": 1e-4,
    "min-lr": 1e-6,
    "train-interpolation": "random",
    "interpolation": "bicubic",
    "eps": 1e-6,
    "max_grad_norm": 1.0,
    "aug-repeats": 3,
    "bce-target-thresh": 0.2,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def read(name: str) -> dict:
    return read_config(str(ROOT / "recipes" / f"{name}.yaml"), PARSER.flags)


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, float):
            assert math.isclose(found[key], value, rel_tol=1e-12), key
        elif isinstance(value, tuple):
            assert all(map(math.isclose, found[key], value)) and len(found[key]) == len(value), key
        else:
            assert found[key] == value, key


def test_the_original():
    same(read("resnet50_original"), ORIGINAL)


def test_the_original_is_the_default():
    args = PARSER.complete(of_cnn_train_val.parse_args(["--train_data_dir=x"]))
    for name, value in ORIGINAL.items():
        default = getattr(args, name)
        if default is not None and name != "lr_scaling":
            same({name: default}, {name: value})


def test_torchvision():
    theirs = TORCHVISION_DEFAULTS | dict(word[2:].split("=") for word in TORCHVISION)
    assert theirs.keys() == SAME_FLAGS.keys() | WITHOUT_A_TWIN
    expected = {name: kind(theirs[key]) for key, (name, kind) in SAME_FLAGS.items()}
    expected |= CROP | {"best_metric": "ema_top_1"}
    expected["rgb_mean"] = tuple(255 * value for value in (0.485, 0.456, 0.406))
    expected["rgb_std"] = tuple(255 * value for value in (0.229, 0.224, 0.225))
    same(read("resnet50_torchvision_v2"), expected)


@pytest.mark.parametrize("number", range(3))
def test_strikes_back(number):
    paper = {row: values[number] for row, values in STRIKES_BACK.items()}
    magnitude, std = paper["Rand Augment"].split("/")
    expected = CROP | {
        "model": "resnet50",
        "image_size": paper["Test Res"],
        "resize_shorter": math.floor(paper["Test Res"] / paper["Test crop ratio"]),  # as timm
        "interpolation": TIMM["interpolation"],
        "train_interpolation": TIMM["train-interpolation"],
        "rgb_mean": tuple(255 * value for value in TIMM["mean"]),
        "rgb_std": tuple(255 * value for value in TIMM["std"]),
        "auto_augment": f"rand-m{magnitude}-mstd{std}-inc1",
        "mixup_alpha": paper["Mixup alpha"],
        "cutmix_alpha": paper["Cutmix alpha"],
        "global_batch_size": paper["Batch size"],
        "num_epochs": paper["Epochs"],
        "optimizer": paper["Optimizer"].lower(),
        "epsilon": TIMM["eps"],
        "gradient_clipping": TIMM["max_grad_norm"],
        "learning_rate": paper["LR"],
        "lr_decay": paper["LR decay"],
        "lr_min": TIMM["min-lr"],
        "warmup_epochs": float(paper["Warmup epochs"]),
        "lr_warmup_decay": TIMM["warmup-lr"] / paper["LR"],
        "wd": paper["Weight decay"],
        "norm_wd": 0.0,  # timm decays neither
        "bias_wd": 0.0,
        "loss": {(False, True): "bce"}[paper["CE loss"], paper["BCE loss"]],
        "bce_target_threshold": TIMM["bce-target-thresh"],
        "label_smoothing": paper["Label smoothing"] or 0.0,
    }
    if paper["Train Res"] != paper["Test Res"]:
        expected["train_image_size"] = paper["Train Res"]
    if paper["Repeated Aug"]:
        expected["repeated_augmentation"] = TIMM["aug-repeats"]
    if paper["Stoch. Depth"]:
        expected["stochastic_depth"] = paper["Stoch. Depth"]
    same(read(f"resnet50_a{number + 1}"), expected)


def test_finetune():
    expected = FINETUNE | {
        "model": "efficientnet_lite0",
        "finetune": True,
        "optimizer": "sgd",
        "momentum": PARSER.flags["momentum"].default,
        "learning_rate": FINETUNE_RATE_PER_256["sgd"],
        "lr_scaling": "linear",
        "lr_decay": "cosine",
        "balanced_sampler": True,
    }
    same(read("finetune_uneven"), expected)


def test_fashion_mnist():
    """The command of docs/recipe.md#learning-curves; the rest is the original's."""
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    command = re.search(
        r"^python3 of_cnn_train_val.py --model=resnet18 .*?seed=0$", page, re.M | re.S
    )
    words = shlex.split(command[0].replace("\\\n", " "))[2:]
    given = vars(of_cnn_train_val.parse_args(words))
    of_a_run = ("train_data_dir", "val_data_dir", "model_save_dir", "log_dir", "seed")
    expected = {name: value for name, value in given.items() if name not in of_a_run}
    shared = ("random_aspect_ratio", "random_flip", "optimizer", "momentum", "learning_rate")
    shared += ("lr_scaling", "lr_decay", "wd", "label_smoothing")
    same(read("fashion_mnist_cpu"), {name: ORIGINAL[name] for name in shared} | expected)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_training_script_takes_it(path, tmp_path, monkeypatch):
    """With data, to the point where the network would be built, and the command in the file."""
    monkeypatch.chdir(ROOT)  # where the command is given
    data = write_parts(tmp_path / "data" / "train", [[0, 1] * 1040], num_classes=2)
    flags = ["--device=cpu", f"--train_data_dir={data}", f"--val_data_dir={data}"]
    has_batch = any("batch_size" in name for name in read(path.stem))
    flags += ["--global_batch_size=1024"] * (not has_batch)
    flags += ["--num_classes=2"]
    spec = of_cnn_train_val.make_spec(of_cnn_train_val.parse_args([f"--config={path}", *flags]))
    for name, value in read(path.stem).items():
        assert spec.flags[name] == value, name
    command = re.search(r"python3 of_cnn_train_val.py ((?:[^\\\n]|\\\n#)*)", path.read_text())[1]
    words = shlex.split(command.replace("\\\n#", " "))
    given = of_cnn_train_val.parse_args(words)
    assert given.config == f"recipes/{path.name}"


def test_every_file_is_compared_and_says_whose_figures_it_has():
    assert {path.stem for path in FILES} == {
        *("resnet50_a1", "resnet50_a2", "resnet50_a3"),
        *("resnet50_original", "resnet50_torchvision_v2", "finetune_uneven", "fashion_mnist_cpu"),
    }
    for path in FILES:
        comment = path.read_text().partition("\nmodel:")[0]
        assert re.search(
            "their figures?|our figure|(?i:no published figure)", comment.replace("\n# ", " ")
        )
