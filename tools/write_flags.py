"""Write docs/flags.md, the page of all flags, from the parsers of the scripts.

python3 tools/write_flags.py > docs/flags.md
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.startup  # noqa: F401  (before oneflow, see there)

import config
from cnns.flags import Flag, FlagParser

INTRODUCTION = """\
# Flags

<!-- Made by `python3 tools/write_flags.py > docs/flags.md`; change the texts in the parsers. -->

Every flag of the four scripts; `--help` of a script prints its own. The names are those of
OneFlow-Benchmark. A flag that belongs to another optimizer, schedule or kind of data is refused,
not ignored. A switch takes `--save_init`, `--save_init=True` and `--save_init=False`.

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


def make_parsers() -> dict[str, FlagParser]:
    """The parser of each script, by the word for it in the tables."""
    return {script: config.make_parser(script) for script in config.SCRIPTS}


def describe(name: str, flag: Flag) -> tuple[str, str, str]:
    """The cells flag, default and text of one flag."""
    name = f"`--{name}`"
    if flag.aliases:
        name += f" (also {', '.join(f'`{alias}`' for alias in flag.aliases)})"
    text = flag.whole_text
    if flag.choices:
        text += "; one of " + ", ".join(f"`{choice}`" for choice in sorted(flag.choices))
    default = flag.unless_given
    if default and not (flag.otherwise or flag.is_switch):
        default = f"`{default}`"
    return name, escape(default), escape(text)


def escape(text: str) -> str:
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):  # Markdown's own
        text = text.replace(character, escaped)
    return text


def collect(parsers: dict[str, FlagParser]) -> dict[str, dict[tuple[str, str, str], list[str]]]:
    """For each title of a group, its rows and the scripts that have each, in the parsers' order."""
    groups: dict = {}
    for script, parser in parsers.items():
        for title, flags in parser.groups.items():
            for name, flag in flags.items():
                groups.setdefault(title, {}).setdefault(describe(name, flag), []).append(script)
    return groups


def make_page(parsers: dict) -> str:
    lines = [INTRODUCTION]
    for title, rows in collect(parsers).items():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += ["| flag | unless given | scripts | what |", "|---|---|---|---|"]
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
