"""What a flag, a value or a path that is not there gets for an answer; help; versions."""

import platform
import subprocess
import sys

import pytest

import cnns
import config
from cnns.flags.parser import Parser
from cnns.hints import FOREIGN, NOT_NEEDED, nearest_path
from small import ROOT, call
from tools import make_ofrecord


def answer(script: str, *argv: str) -> str:
    """The line for a command that is wrong."""
    result = call(lambda argv: config.make_parser(script).parse_args(argv), *argv)
    assert (result.status, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("--lr=0.1", "--lr=0.1: did you mean --learning_rate (peak learning rate)?"),
        ("--epochs", "--epochs: did you mean --num_epochs (passes over the training data)?"),
        (
            "--batch_size=8",
            "did you mean --batch_size_per_device (training images that a device takes at",
        ),
        ("--batch-size", "did you mean --batch_size_per_device"),
        ("-b", "-b: did you mean --batch_size_per_device"),
        ("--img-size=64", "did you mean --image_size"),
        ("--workers=4", "--workers=4: data are read by OneFlow's own threads: leave it out"),
        ("-j", "-j: data are read by OneFlow's own threads"),
        ("--weight-decay=0", "did you mean --wd"),
        ("--learning_rat=1", "did you mean --learning_rate"),
        ("--learning", "did you mean --learning_rate"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_one(flag, hint):
    assert f"unrecognized arguments: {hint}" in answer("train", flag) or hint in answer(
        "train", flag
    )


def test_several_unknown_flags_are_all_named_and_one_like_none_gets_no_hint():
    line = answer("train", "--lr=1", "--zzz", "3", "--epochs=2")
    assert "--lr=1: did you mean" in line and "--epochs=2: did you mean" in line
    assert "; --zzz; " in line


def test_of_each_script_its_own_flag_is_named():
    assert "did you mean --val_batch_size_per_device" in answer("evaluate", "-b", "8")
    assert "did you mean --batch_size (" in answer("inference", "-b", "8")


def test_every_flag_that_a_hint_names_exists():
    known = {flag for script in config.SCRIPTS for flag in config.make_parser(script).flags}
    targets = {target for targets in FOREIGN.values() for target in targets}
    assert targets <= known | {"num_workers"}
    assert not (FOREIGN.keys() | NOT_NEEDED.keys()) & known - {"batch_size"}


def test_a_value_that_is_no_choice_gets_the_nearest_one():
    for value in ("resnet5", "ResNet50", "resnet-50"):
        assert f"invalid choice: {value!r}, did you mean 'resnet50'? (choose from" in answer(
            "train", f"--model={value}"
        )
    assert "invalid choice: 'zzz' (choose from" in answer("train", "--model=zzz")
    result = call(make_ofrecord.main, "foldr", "--input=x")
    assert result.status == 2 and "did you mean 'folder'?" in result.stderr
    result = call(make_ofrecord.main, "folder", "--inputt=x")
    assert result.status == 2 and "did you mean --input (directory of images)?" in result.stderr


def test_dashes_within_a_flag_are_underscores():
    argv = ["--learning-rate=0.5", "--num-epochs", "3", "--save-init", "--rgb-mean=1,2,3"]
    args = config.make_parser("train").parse_args(argv)
    assert (args.learning_rate, args.num_epochs, args.save_init) == (0.5, 3, True)
    assert args.rgb_mean == (1, 2, 3)
    argv = ["folder", "--input=a-b", "--output=c", "--num-parts=2", "--skip-bad"]
    args = make_ofrecord.make_parser().parse_args(argv)
    assert (str(args.input), args.num_parts, args.skip_bad) == ("a-b", 2, True)


def test_values_without_a_flag_are_those_of_the_flag_that_takes_them():
    parser = config.make_parser("inference")
    for argv in (
        ["a.jpg", "--top_k=2", "b.jpg"],
        ["--use_fp16", "a.jpg", "--top_k", "2", "b.jpg"],
        ["--image_path", "a.jpg", "--use_fp16", "True", "--top_k=2", "--", "b.jpg"],
    ):
        args = parser.parse_args(argv)
        assert (args.image_path, args.top_k) == (["a.jpg", "b.jpg"], 2)
        assert getattr(args, "use_fp16", None) in (True, None)
    assert parser.parse_args(["--", "-x.jpg"]).image_path == ["-x.jpg"]
    assert "image_path" not in parser.parse_args([])
    assert "unrecognized arguments: a.jpg" in answer("train", "a.jpg")


def test_a_path_that_differs_in_one_name_is_found(tmp_path):
    (tmp_path / "data" / "validation").mkdir(parents=True)
    (tmp_path / "data" / "validation" / "part-00000").touch()
    near = str(tmp_path / "data" / "validation")
    for wrong in ("data/validaton", "data/Validation/", "dta/validation"):
        assert nearest_path(str(tmp_path / wrong)).rstrip("/") == near
    for other in ("data/zzz", "dta/zzz", "dta/validaton", "x/y/z"):
        assert nearest_path(str(tmp_path / other)) is None
    assert nearest_path("/") is None or nearest_path("/") == "/"


@pytest.mark.parametrize("script", config.SCRIPTS)
def test_help_begins_with_three_examples_and_ends_with_where_to_read_on(script):
    names = {
        "train": "of_cnn_train_val",
        "evaluate": "of_cnn_evaluate",
        "inference": "of_cnn_inference",
        "export": "resnet_to_onnx",
    }
    module = __import__(names[script])
    result = call(lambda argv: module.parse_args(argv), "--help")
    lines = result.stdout.splitlines()
    assert result.status == 0 and lines[0] == "Examples:" and lines[4] == ""
    assert all(f"python3 {names[script]}.py" in line for line in lines[1:4])
    last = " ".join(result.stdout.split())[-120:]
    pages = [word.rstrip(",.") for word in last.split("Read on: ")[1].split() if "/" in word]
    assert len(pages) == 3 and all((ROOT / page).is_file() for page in pages)


def test_the_pages_that_the_tools_name_exist():
    for path in (ROOT / "tools").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "Read on: " in text:
            assert "doc=__doc__" in text
            pages = text.split("Read on: ")[1].split('."')[0].split(", ")
            assert all((ROOT / page).is_file() for page in pages if "/" in page)


def test_versions(capsys):
    for argv in (["--version"],):
        with pytest.raises(SystemExit, match="0"):
            Parser("A tool.").parse_args(argv)
    said = capsys.readouterr().out
    assert f" {cnns.__version__} (OneFlow 0." in said and platform.python_version() in said


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text())
# The doctor tells what is missing, and so needs nothing; peers have environments of their own.
ALONE = ("doctor.py", "torch_peer.py", "onnxruntime_peer.py", "dali_peer.py")
TOOLS = sorted(
    f"tools/{path.name}"
    for path in ROOT.glob("tools/*.py")
    if "__main__" in path.read_text() and path.name not in ALONE
)


@pytest.mark.parametrize("script", SCRIPTS + TOOLS)
def test_without_the_environment_one_line_says_what_to_activate(script):
    """-S: without what is installed; -E: nor what PYTHONPATH names."""
    done = subprocess.run(
        [sys.executable, "-E", "-S", script], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    name = script.rpartition("/")[2]
    assert done.stderr.startswith(f"{name}: error: {sys.executable} (Python ")
    assert " lacks oneflow, numpy, PIL; " in done.stderr and ".venv/bin/activate" in done.stderr
