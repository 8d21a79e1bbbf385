"""Write docs/flags.md, the page of all flags, from the parsers of the scripts.

python3 tools/write_flags.py > docs/flags.md
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import oneflow_setup  # noqa: F401  (before oneflow, see there)

import argparse

import config
import model_util
import optimizer_util

INTRODUCTION = """\
# Flags

<!-- Made by `python3 tools/write_flags.py > docs/flags.md`; change the texts in the parsers. -->

Every flag of the four scripts; `--help` of a script prints its own. The names are those of
OneFlow-Benchmark. A flag that belongs to another optimizer, schedule or kind of data is refused,
not ignored. A switch takes `--save_init`, `--save_init=True` and `--save_init=False`. Where the
column "default" is empty, the text says what happens without the flag.

On a CPU, synthetic data bring smaller defaults of `--image_size`, `--batch_size_per_device` and
`--num_epochs`, which the script prints.

The wrappers take these variables from the environment and pass any further flag on to their script;
a flag on the command line wins over a variable.

| variable | flag | wrapper |
|---|---|---|
| `DATA_ROOT` | `--train_data_dir=$DATA_ROOT/train` | `train.sh` |
| `DATA_ROOT` | `--val_data_dir=$DATA_ROOT/validation` | `train.sh`, `evaluate.sh` (1) |
| `NUM_EPOCH` | `--num_epochs` | `train.sh` |
| `NUM_NODES` | `--num_nodes` | `train.sh`, `evaluate.sh` |
| `NODE_IPS` | `--node_ips` | `train.sh`, `evaluate.sh` |
| `GPU_NUM_PER_NODE` | `--gpu_num_per_node` | `train.sh`, `evaluate.sh` |
| `USE_FP16` | `--use_fp16` | `train.sh`, `evaluate.sh` |
| `MODEL_LOAD_DIR` | `--model_load_dir` | `evaluate.sh`, `inference.sh` |
| `IMAGE_PATH` | `--image_path` | `inference.sh` |

(1) Without `DATA_ROOT`, `evaluate.sh` takes `data/imagenet/ofrecord`.

`train.sh` adds `--save_init --loss_print_every_n_iter=10`, and `evaluate.sh` adds `--num_epochs=3`.

In the tables, "train" is `of_cnn_train_val.py`, "evaluate" is `of_cnn_evaluate.py`, "inference" is
`of_cnn_inference.py` and "export" is `resnet_to_onnx.py`. A flag whose text or default differs
between scripts has a row for each.
"""


def make_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each script, by the word for it in the tables."""
    models = model_util.MODELS
    return {
        "train": config.train_parser(
            models=models,
            optimizers=optimizer_util.OPTIMIZERS,
            schedules=optimizer_util.SCHEDULES,
        ),
        "evaluate": config.evaluate_parser(models=models),
        "inference": config.inference_parser(models=models),
        "export": config.export_parser(models=models),
    }


def describe_default(value: object) -> str:
    """A default as it would be given on the command line; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):  # several values of one flag
        return " ".join(describe_default(each) for each in value)
    if isinstance(value, tuple):  # one value, joined by commas
        return "`" + ",".join(f"{each:g}" for each in value) + "`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def describe(action: argparse.Action) -> tuple[str, str, str]:
    """The cells flag, default and text of one flag."""
    flag, *aliases = (f"`{option}`" for option in action.option_strings if option.startswith("--"))
    if aliases:
        flag += f" (also {', '.join(aliases)})"
    text = action.help or ""
    if action.choices:
        text += "; one of " + ", ".join(f"`{choice}`" for choice in action.choices)
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):  # Markdown's own
        text = text.replace(character, escaped)
    return flag, describe_default(action.default), text


def collect(parsers: dict) -> dict[str, dict[tuple[str, str, str], list[str]]]:
    """For each title of a group, its rows and the scripts that have each, in the parsers' order."""
    groups: dict = {}
    for script, parser in parsers.items():
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.option_strings and action.dest != "help":
                    rows = groups.setdefault(group.title, {})
                    rows.setdefault(describe(action), []).append(script)
    return groups


def make_page(parsers: dict) -> str:
    lines = [INTRODUCTION]
    for title, rows in collect(parsers).items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| flag | default | scripts | what |", "|---|---|---|---|"]
        # Rows of one flag stand together, whichever script they come from.
        flags = list(dict.fromkeys(flag for flag, _, _ in rows))
        for row in sorted(rows, key=lambda row: flags.index(row[0])):
            flag, default, text = row
            lines.append(f"| {flag} | {default} | {', '.join(rows[row])} | {text} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    print(make_page(make_parsers()), end="")


if __name__ == "__main__":
    main()
