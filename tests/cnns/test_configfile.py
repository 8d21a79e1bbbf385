"""--config: flags from a run's flags.yaml, YAML of one's own, or a snapshot."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
import of_cnn_train_val
from cnns.configfile import read_config
from cnns.errors import UsageError
from fuzz import bounded, fuzz, mutated

FLAGS = config.make_parser("train").flags


def read(path, text):
    path.write_text(text)
    return read_config(str(path), FLAGS)


def test_values_are_those_of_the_command_line(tmp_path):
    text = """
        model: resnet18
        num-epochs: 30          # dashes as on the command line
        learning_rate: 1e-2     # text to YAML
        use_fp16: true
        rgb_mean: [1, 2.5, 3]
        random_area: 0.2,1
        lr_decay: step
        lr_step_epochs: [10, 20]
        seed: null
    """
    found = read(tmp_path / "a.yaml", text)
    argv = ["--model=resnet18", "--num_epochs=30", "--learning_rate=1e-2", "--use_fp16"]
    argv += [
        "--rgb_mean=1,2.5,3",
        "--random_area=0.2,1",
        "--lr_decay=step",
        "--lr_step_epochs=10,20",
    ]
    assert found == vars(config.make_parser("train").parse_args(argv))


@pytest.mark.parametrize(
    "text, words",
    [
        ("num_epoch: 3", "'num_epoch' is not a flag; did you mean num_epochs?"),
        ("num_epochs: 3\nnum_epochs: 4", "'num_epochs' stands in it twice"),
        ("flags:\n  seed: 1\n  seed: 2", "'seed' stands in it twice"),
        ("num_epochs: many", "num_epochs: 'many' is not a whole number"),
        ("num_epochs: 1.5", "num_epochs: '1.5' is not a whole number"),
        ("use_fp16: 1", "use_fp16: it is 1, and True or False is needed"),
        ("num_epochs: true", "num_epochs: it is True, and a value is needed"),
        ("model: resnet5", "must be one of"),
        ("seed: {a: 1}", "is not a value of a flag"),
        ("- 1", "has no lines `flag: value`"),
        ("", "has no lines `flag: value`"),
        ("a: [", "it is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "it is not YAML"),
        ("\0", "it is not YAML"),
        ("[" * 5000, "it is nested too deeply"),
        ("seed: &a 1\nmodel: *a", "it has an alias, '*a'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, words):
    with pytest.raises(UsageError, match="--config=") as error:
        read(tmp_path / "a.yaml", text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_large_and_special_files(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path, "/dev/zero"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_config(str(path), FLAGS)
    with pytest.raises(UsageError, match="more than 64 KiB"):
        read(tmp_path / "a.yaml", "#" * (1 << 17))


def test_many_keys_take_seconds(tmp_path):
    start = time.process_time()
    with pytest.raises(UsageError, match="is not a flag"):
        read(tmp_path / "a.yaml", "".join(f"k{i}: 1\n" for i in range(6_000)))
    with pytest.raises(UsageError, match="seed: "):
        read(tmp_path / "a.yaml", f"seed: [{'1,' * 32_000}]")
    assert time.process_time() - start < 20


def test_snapshot_gives_flags_of_the_run_only(tmp_path):
    flags = {"seed": 7, "rgb_std": [1, 2, 3], "model_save_dir": "elsewhere", "resume": "auto"}
    (tmp_path / "snapshot.json").write_text(json.dumps({"model": "x", "flags": flags}))
    for path in (tmp_path, tmp_path / "snapshot.json"):
        assert read_config(str(path), FLAGS) == {"seed": 7, "rgb_std": (1.0, 2.0, 3.0)}


def test_command_line_wins_and_what_does_not_apply_is_left_out(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 7\nmomentum: 0.5\nnum_epochs: 4\n")
    given = of_cnn_train_val.parse_args(
        [f"--config={tmp_path / 'a.yaml'}", "--optimizer=adam", "--num_epochs=2"]
    )
    args = config.make_parser("train").complete(given)
    assert (args.seed, args.num_epochs, args.momentum) == (7, 2, None)


@fuzz(200)
@given(st.text().map(str.encode) | mutated({"seed": 7, "rgb_std": [1, 2, 3], "flags": {"wd": 1}}))
def test_any_text_is_flags_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    with bounded():
        try:
            assert isinstance(read_config(str(path), FLAGS), dict)
        except UsageError as error:
            assert "\n" not in str(error) and "\x1b" not in str(error)
