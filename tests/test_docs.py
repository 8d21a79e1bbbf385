"""What the documents and the wrappers say is what the scripts take."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import config
import model_util
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
import optimizer_util
import resnet_to_onnx
from golden import learning_curves
from small import ROOT
from tools import benchmark, convert_snapshot, make_mini_imagenet, make_ofrecord, verify_ofrecord

PARSE = {
    "of_cnn_train_val.py": of_cnn_train_val.parse_args,
    "of_cnn_evaluate.py": of_cnn_evaluate.parse_args,
    "of_cnn_inference.py": of_cnn_inference.parse_args,
    "resnet_to_onnx.py": resnet_to_onnx.parse_args,
    "tools/make_ofrecord.py": make_ofrecord.make_parser().parse_args,
    "tools/verify_ofrecord.py": verify_ofrecord.parse_args,
    "tools/make_mini_imagenet.py": make_mini_imagenet.make_parser().parse_args,
    "tools/convert_snapshot.py": convert_snapshot.make_parser().parse_args,
    "tools/benchmark.py": benchmark.make_parser().parse_args,
    "tests/golden/learning_curves.py": learning_curves.make_parser().parse_args,
}
WRAPPERS = {
    "train.sh": "of_cnn_train_val.py",
    "evaluate.sh": "of_cnn_evaluate.py",
    "inference.sh": "of_cnn_inference.py",
}
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if ".venv" not in path.parts]
PARSERS = [
    config.train_parser(
        models=model_util.MODELS,
        optimizers=optimizer_util.OPTIMIZERS,
        schedules=optimizer_util.SCHEDULES,
    ),
    config.evaluate_parser(models=model_util.MODELS),
    config.inference_parser(models=model_util.MODELS),
    config.export_parser(models=model_util.MODELS),
]


def commands(text: str) -> list[list[str]]:
    """The commands of the `sh` blocks of a Markdown text, as words."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(words)
    return found


DOCUMENTED = [
    pytest.param(words, id=f"{path.name}: {' '.join(words)[:70]}")
    for path in DOCUMENTS
    for words in commands(path.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory):
    """The wrappers with a Python that only prints what it was called with."""
    root = tmp_path_factory.mktemp("wrappers")
    for name in WRAPPERS:
        (root / name).write_bytes((ROOT / name).read_bytes())
    python = root / "print_arguments"
    python.write_text(f'#!{sys.executable}\nimport sys\nprint("\\0".join(sys.argv[1:]), end="")\n')
    python.chmod(0o755)
    (root / "env.sh").write_text('python="$PWD/print_arguments"\n')
    return root


def run_wrapper(root: Path, name: str, *argv: str, env=None) -> list[str]:
    done = subprocess.run(
        ["sh", name, *argv],
        cwd=root,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")


def check(words: list[str], root: Path) -> str:
    """Parse one command with the real parser of what it runs; return what kind it was."""
    env = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        env[name] = value
    if not words:
        return "assignment"
    program, *argv = words
    argv = [re.sub(r"\$DATA_ROOT\b", "data/imagenet/ofrecord", word) for word in argv]
    if program == "sh" and argv[0] in WRAPPERS:
        script, *argv = run_wrapper(root, *argv, env=env)
    elif os.path.basename(program) == "python3" and argv[0].endswith(".py"):
        script, *argv = argv
    else:
        return "other"
    try:
        args = PARSE[script](argv)
    except SystemExit as exit_:
        assert exit_.code == 0 and argv == ["--help"], words
    else:
        if script == "of_cnn_train_val.py":  # flags that contradict one another
            config.finish_train_args(args, device="cpu")
    return "script"


@pytest.mark.parametrize("words", DOCUMENTED)
def test_commands_in_documents_parse(words, wrappers):
    check(list(words), wrappers)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_has_a_place_left_to_fill_in(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"^[A-Z]{4,}$|TODO|FIXME|\bXX+\b", text, re.MULTILINE)


def test_the_documents_hold_commands(wrappers):
    kinds = [check(words.values[0][:], wrappers) for words in DOCUMENTED]
    assert kinds.count("script") > 12
    with pytest.raises(AssertionError):
        check(["sh", "train.sh", "--no_such_flag"], wrappers)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_call_their_script_with_flags_that_parse(name, wrappers):
    env = {
        "DATA_ROOT": "a b/data",
        "NUM_EPOCH": "3",
        "MODEL_LOAD_DIR": "some where",
        "IMAGE_PATH": "my photo.jpg",
    }
    script, *argv = run_wrapper(wrappers, name, env=env)
    assert script == WRAPPERS[name]
    args = PARSE[script](argv)
    if name == "train.sh":
        assert args.train_data_dir == "a b/data/train"
        assert args.num_epochs == 3
        assert args.save_init
    elif name == "evaluate.sh":
        assert args.val_data_dir == "a b/data/validation"
    else:
        assert args.image_path == ["my photo.jpg"]
    if name != "train.sh":
        assert args.model_load_dir == "some where"
    # The user's flags come last and win.
    script, *argv = run_wrapper(wrappers, name, "--num_classes=7", env=env)
    assert PARSE[script](argv).num_classes == 7


def test_every_flag_is_in_the_readme_and_the_readme_has_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = {
        option
        for parser in PARSERS
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    } - {"--help"}
    table = set(re.findall(r"^\| `(--[\w-]+)", text, re.MULTILINE))
    aliases = {"--model_update", "--num_epoch", "--rgb-mean", "--rgb-std"}
    assert table == flags - aliases
    assert all(f"`{alias}" in text for alias in aliases)


def test_the_scripts_can_be_imported_without_effect():
    scripts = ("of_cnn_train_val", "of_cnn_evaluate", "of_cnn_inference", "resnet_to_onnx")
    code = f"import {', '.join(scripts)}, tools.benchmark"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
