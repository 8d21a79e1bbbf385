"""env.sh and the wrappers, with a made-up package in place of OneFlow, so that nothing is loaded.

Each set-up here is a real one (venv, pip, pip check) and takes three seconds, nearly all of it pip
installing itself.
"""

import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parent.parent
WRAPPERS = ["train.sh", "evaluate.sh", "inference.sh", "test.sh"]
BASE_PYTHON = os.path.realpath(f"{sys.base_prefix}/bin/python3.10")
SAY_GREETING = ("-c", "import greeting; print(greeting.WORD)")
SAY_ONEFLOW = ("-c", "import greeting, oneflow; print(greeting.WORD, oneflow.WORD)")
OTHER_TAG = "cp310-cp310-linux_x86_64"
SETTING_UP = re.compile(r"Setting up \.venv with Python 3\.10\.\d+ from requirements\.txt .*\n")

WRAPPER = """\
set -eu
cd "$(dirname "$0")"
. ./env.sh
exec "$python" "$@"
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def write_wheel(folder, version, word, *, name="greeting", tag="py3-none-any", requires=()):
    """A package of one module, whose WORD is `word`. Returns the path of the wheel."""
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {each}" for each in requires]
    files = {
        f"{name}.py": f"WORD = {word!r}\n",
        f"{info}/METADATA": "".join(f"{line}\n" for line in metadata),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in files.items():
            wheel.writestr(member, text)
    return path


class Machine:
    """A PATH with the usual commands and no Python, an empty home, and a package index on disk."""

    def __init__(self, root):
        self.root = root
        self.bin = root / "bin"
        self.home = root / "home"
        self.wheels = root / "wheels"
        for folder in (self.bin, self.home, self.wheels):
            folder.mkdir()
        for name in ("cat", "cksum", "dirname", "mkdir", "rm", "sed", "sh", "tail"):
            (self.bin / name).symlink_to(shutil.which(name))
        write_wheel(self.wheels, "1.0", "hello")
        write_wheel(self.wheels, "2.0", "good day")
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
        }

    def checkout(self, name, requirements="greeting==1.0\n"):
        folder = self.root / name
        folder.mkdir()
        shutil.copy(ROOT / "env.sh", folder)
        self.pin(folder, requirements)
        (folder / "wrapper.sh").write_text(WRAPPER)
        return folder

    def pin(self, checkout, requirements):
        """Write requirements.txt, with the hash of each package that the index has."""
        lines = []
        for line in requirements.splitlines():
            name, version = line.split("==")
            wheels = list(self.wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
            digest = sha256(wheels[0].read_bytes() if wheels else b"").hexdigest()
            lines.append(f"{line} --hash=sha256:{digest}\n")
        (checkout / "requirements.txt").write_text("".join(lines))

    def start(self, checkout, *args, **env):
        return subprocess.Popen(
            ["sh", str(checkout / "wrapper.sh"), *(args or SAY_GREETING)],
            env={**self.env, **env},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, checkout, *args, **env):
        return finish(self.start(checkout, *args, **env))


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A machine and a finished checkout on it. Tests leave it finished, whatever they change."""
    machine = Machine(tmp_path_factory.mktemp("made"))
    checkout = machine.checkout("a check out")
    # The two faces of pyenv: a command that refuses to run, and the Python behind it.
    write_script(
        machine.bin / "python3.10", "echo 'pyenv: python3.10: command not found' >&2; exit 127"
    )
    version = machine.home / ".pyenv/versions/3.10.99/bin"
    version.mkdir(parents=True)
    (version / "python3.10").symlink_to(BASE_PYTHON)
    # What other projects leave in the environment.
    astray = machine.root / "astray"
    for module in ("greeting", "pip", "venv", "fcntl"):
        write_script(astray / f"{module}.py", "raise SystemExit('shadowed')")
    (astray / "constraints.txt").write_text("greeting==2.0\n")
    status, out, err = machine.run(
        checkout,
        PYTHONPATH=str(astray),
        PYTHONHOME=str(astray),
        VIRTUAL_ENV=str(astray),
        CONDA_PREFIX=str(astray),
        PIP_TARGET=str(astray / "target"),
        PIP_PREFIX=str(astray / "prefix"),
        PIP_USER="1",
        PIP_REQUIRE_VIRTUALENV="1",
        PIP_CONSTRAINT=str(astray / "constraints.txt"),
    )
    assert (status, out) == (0, "hello\n"), err
    assert SETTING_UP.fullmatch(err)
    return machine, checkout


def test_first_run_leaves_only_what_is_pinned(made):
    machine, checkout = made
    status, out, _ = machine.run(checkout, "-m", "pip", "freeze", "--all", "--exclude", "pip")
    assert status == 0
    assert {line.split("==")[0] for line in out.splitlines()} == {"greeting", "setuptools"}
    assert not (checkout / ".venv/tmp").exists()


def test_later_runs_are_silent_and_touch_nothing(made):
    machine, checkout = made
    before = {path: path.stat().st_mtime_ns for path in (checkout / ".venv").rglob("*")}
    no_pip = {"PIP_FIND_LINKS": "", "PYTHONDONTWRITEBYTECODE": "1"}
    assert machine.run(checkout, "-c", "print(1)", **no_pip) == (0, "1\n", "")
    assert machine.run(checkout, "-c", "print(1)", PYTHON=BASE_PYTHON, **no_pip) == (0, "1\n", "")
    assert before == {path: path.stat().st_mtime_ns for path in (checkout / ".venv").rglob("*")}


def test_exit_status_of_the_script_is_kept(made):
    machine, checkout = made
    assert machine.run(checkout, "-c", "raise SystemExit(43)") == (43, "", "")


def test_activating_works_too(made):
    machine, checkout = made
    command = '. .venv/bin/activate; python3 -c "import greeting, sys; print(sys.prefix)"'
    out = subprocess.run(
        ["sh", "-c", command], cwd=checkout, env=machine.env, capture_output=True, text=True
    )
    assert (out.returncode, out.stdout, out.stderr) == (0, f"{checkout}/.venv\n", "")


def test_changed_requirements_are_set_up_again_after_a_failure_too(made):
    machine, checkout = made
    machine.pin(checkout, "greeting==2.0\n")
    no_network = {"PIP_NO_INDEX": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    no_network |= {"PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}
    status, out, err = machine.run(checkout, **no_network)
    assert (status, out) == (1, "")
    assert "No matching distribution found for greeting==2.0" in err
    assert err.splitlines()[-1].startswith("env.sh: pip cannot reach the package index")
    assert not (checkout / ".venv/stamp").exists()

    status, out, err = machine.run(checkout)
    assert (status, out) == (0, "good day\n")
    assert SETTING_UP.fullmatch(err)


def starts_to_set_up(process):
    """Whether it says so. It is interrupted then, as by Ctrl-C."""
    said = process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    status, out, _ = finish(process)
    assert (status in (-signal.SIGINT, 130), out) == (bool(said), "")
    return SETTING_UP.fullmatch(said)


def test_moved_checkout_is_set_up_again(made):
    machine, checkout = made
    moved = machine.root / "moved"
    shutil.copytree(checkout, moved, symlinks=True)
    assert starts_to_set_up(machine.start(moved))
    assert not (moved / ".venv/stamp").exists()
    assert starts_to_set_up(machine.start(moved))


def test_venv_whose_python_is_gone_is_set_up_again(made):
    machine, checkout = made
    copy = machine.root / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    stamp = copy / ".venv/stamp"
    stamp.write_text(stamp.read_text().replace(str(checkout), str(copy)))
    assert machine.run(copy, "-c", "print(1)") == (0, "1\n", "")
    link = copy / ".venv/bin/python3.10"
    link.unlink()
    link.symlink_to(machine.root / "uninstalled")
    assert starts_to_set_up(machine.start(copy))


def wait_in_pip(index, process):
    """Returns when the process's pip has asked the index, which will not answer."""
    try:
        connection, _ = index.accept()
    except TimeoutError:
        process.kill()
        pytest.fail(f"pip did not come: {process.communicate()}")
    return connection


def test_set_up_goes_on_in_the_process_that_waits_when_the_first_is_killed(machine):
    checkout = machine.checkout("checkout")
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        first = machine.start(checkout, PYTHON=BASE_PYTHON, PIP_NO_INDEX="", PIP_INDEX_URL=url)
        with wait_in_pip(index, first):
            second = machine.start(checkout, PYTHON=BASE_PYTHON)
            first_line = second.stderr.readline()
            assert not (checkout / ".venv/stamp").exists()
            os.killpg(first.pid, signal.SIGKILL)
            first.communicate(timeout=60)
    status, out, err = finish(second)
    assert first_line == "Waiting for another process that sets up .venv ...\n"
    assert (status, out) == (0, "hello\n")
    assert SETTING_UP.fullmatch(err)


def test_two_at_once_set_up_once(machine):
    checkout = machine.checkout("checkout")
    # A uv that has no Python 3.10 until it is told to install it.
    got, uv = machine.root / "got", machine.bin / "uv"
    (machine.bin / "touch").symlink_to(shutil.which("touch"))
    write_script(
        uv,
        f"""case "$*" in
        'python find 3.10') [ -f {got} ] && echo {BASE_PYTHON} ;;
        'python install 3.10') touch {got} ;;
        *) exit 9 ;;
        esac""",
    )
    results = [finish(process) for process in [machine.start(checkout) for _ in range(2)]]
    assert [(status, out) for status, out, _ in results] == [(0, "hello\n")] * 2
    said = "".join(err for _, _, err in results)
    assert len(SETTING_UP.findall(said)) == 1
    assert "Getting Python 3.10 with uv ...\n" in said


@pytest.mark.parametrize(
    "said, cause",
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("OSError: [Errno 122] Disk quota exceeded", "the disk is full"),
        ("ReadTimeoutError: (host='h', port=443): Read timed out.", "pip cannot reach"),
        ("No matching distribution found for oneflow==0.9.0", "the package index lacks"),
        ("a requires b, which is not installed.", "setting up .venv failed"),
    ],
)
def test_cause_of_a_failure_comes_last(said, cause):
    functions, found, _ = (ROOT / "env.sh").read_text().partition("\nbase=\n")
    assert found
    command = ["sh", "-c", functions + '\nexplain "$1"', "sh", f"much\nbefore\n{said}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *shown, last = run.stderr.splitlines()
    assert (run.returncode, run.stdout, shown[-1]) == (1, "", said)
    assert last.startswith(f"env.sh: {cause}")


def test_venv_that_cannot_be_made_is_explained(machine):
    checkout = machine.checkout("checkout")
    (checkout / ".venv").write_text("a file is in the way")
    status, out, err = machine.run(checkout, PYTHON=BASE_PYTHON)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("env.sh: setting up .venv failed")


def test_no_python_is_one_line_and_status_2(machine):
    write_script(
        machine.bin / "python3.10", "echo 'pyenv: python3.10: command not found' >&2; exit 127"
    )
    checkout = machine.checkout("checkout")
    status, out, err = machine.run(checkout)
    assert (status, out, err.count("\n")) == (2, "", 1)
    for way in ("apt-get install", "pyenv install", "uv python install", "PYTHON"):
        assert way in err
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    "script, found",
    [
        (None, "no Python that runs"),
        ("echo CPython 3.12.1; [ $1 = -c ]", "CPython 3.12.1"),
        ("exit 127", "no Python that runs"),
    ],
)
def test_wrong_python_variable_is_one_line_and_status_2(made, script, found):
    machine, checkout = made
    wrong = machine.root / "some python"
    wrong.unlink(missing_ok=True)
    if script:
        write_script(wrong, script)
    # Even though the checkout is set up: what the caller asked for is not there.
    status, out, err = machine.run(checkout, PYTHON=str(wrong))
    assert (status, out) == (2, "")
    assert err == (
        f"env.sh: PYTHON={wrong} is {found}, CPython 3.10 is needed: "
        "correct PYTHON, or unset it to have one looked for\n"
    )


def test_python_without_ensurepip_is_one_line_and_status_2(machine):
    # Debian's python3.10 without python3.10-venv, as the question in env.sh sees it.
    write_script(machine.bin / "python3.10", "exit 3")
    status, out, err = machine.run(machine.checkout("checkout"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "apt-get install python3.10-venv" in err


def test_another_oneflow_stays_until_a_set_up_without_it(machine):
    write_wheel(machine.wheels, "0.9.0", "pinned", name="oneflow")
    write_wheel(machine.wheels, "8.5", "", name="nvidia_cudnn_cu11")
    write_wheel(machine.wheels, "8.9", "", name="nvidia_cudnn_cu12")
    # What the other OneFlow does not suit is said, and does not end the set-up.
    write_wheel(machine.wheels, "0.6", "", name="converter", requires=["oneflow<1"])
    downloads = machine.root / "down loads"
    downloads.mkdir()
    wheel = write_wheel(
        downloads,
        "1.0.0+cu122",
        "other",
        name="oneflow",
        tag=OTHER_TAG,
        requires=["nvidia-cudnn-cu12", "greeting>=1.0"],
    )
    pinned = "greeting==1.0\nnvidia-cudnn-cu11==8.5\noneflow==0.9.0\n"
    checkout = machine.checkout("checkout", f"converter==0.6\n{pinned}")
    notice = f"OneFlow is the one of {wheel}, with which this toolkit was not tested.\n"

    status, out, err = machine.run(
        checkout,
        *SAY_ONEFLOW,
        PYTHON=BASE_PYTHON,
        ONEFLOW_WHEEL=f"../{downloads.name}/{wheel.name}",
    )
    # The newer greeting of the index stays out: what is pinned stays as it is.
    assert (status, out) == (0, "hello other\n"), err
    setting_up, check, last = err.splitlines(keepends=True)
    assert SETTING_UP.fullmatch(setting_up)
    assert str(wheel) in setting_up
    assert check.startswith("pip check says of this OneFlow: converter 0.6 has requirement oneflow")
    assert last == notice
    _, out, _ = machine.run(checkout, "-m", "pip", "freeze")
    assert [line for line in out.splitlines() if "cudnn" in line] == ["nvidia_cudnn_cu12==8.9"]

    wheel_gone = wheel.rename(machine.root / wheel.name)
    assert machine.run(checkout, *SAY_ONEFLOW) == (0, "hello other\n", notice)
    wheel_gone.rename(wheel)
    status, out, err = machine.run(checkout, "-c", "print(1)", ONEFLOW_WHEEL=str(wheel))
    assert (status, out, err) == (0, "1\n", notice)

    machine.pin(checkout, pinned)
    status, out, err = machine.run(checkout, *SAY_ONEFLOW, PYTHON=BASE_PYTHON)
    assert (status, out) == (0, "hello pinned\n"), err
    again, setting_up = err.splitlines(keepends=True)
    assert again.startswith("OneFlow will be the one of requirements.txt again")
    assert SETTING_UP.fullmatch(setting_up)
    assert str(wheel) not in setting_up
    # What is named is asked for, though .venv is whole.
    assert starts_to_set_up(
        machine.start(checkout, PYTHON=BASE_PYTHON, ONEFLOW_WHEEL=str(wheel)),
    )


def test_a_package_that_differs_from_its_hash_is_not_installed(machine):
    checkout = machine.checkout("checkout")
    write_wheel(machine.wheels, "1.0", "something else")
    status, out, err = machine.run(checkout, PYTHON=BASE_PYTHON)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        "env.sh: a package differs from the one that requirements.txt was tested with (its hash, "
        "in the lines above): see which index it came from"
    )
    assert not (checkout / ".venv/stamp").exists()


def test_oneflow_that_needs_other_versions_than_are_pinned_is_explained(machine):
    wheel = write_wheel(
        machine.root, "1.0.0", "other", name="oneflow", tag=OTHER_TAG, requires=["greeting>=2"]
    )
    checkout = machine.checkout("checkout", "greeting==1.0\noneflow==0.9.0\n")
    status, out, err = machine.run(checkout, PYTHON=BASE_PYTHON, ONEFLOW_WHEEL=str(wheel))
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        "env.sh: the OneFlow of ONEFLOW_WHEEL needs other versions than requirements.txt pins: "
        "change them there"
    )
    assert not (checkout / ".venv/stamp").exists()


@pytest.mark.parametrize(
    "name, said",
    [
        (f"oneflow-1.0.0-{OTHER_TAG}.whl", "there is no such file"),
        ("oneflow-1.0.0-cp311-cp311-manylinux_2_17_x86_64.whl", "is for another Python or machine"),
        ("oneflow-1.0.0-cp310-cp310-macosx_11_0_arm64.whl", "is for another Python or machine"),
        (f"oneflow-1.0.0%2Bcu122-{OTHER_TAG}.whl", "rename the file with +"),
        ("greeting-1.0-py3-none-any.whl", "is not the path of a OneFlow wheel"),
        ("oneflow==1.0.0", "is not the path of a OneFlow wheel"),
        (f"oneflow-1.0.1-{OTHER_TAG}.whl", "is not a whole wheel"),
    ],
)
def test_wrong_oneflow_wheel_is_one_line_and_deletes_nothing(made, name, said):
    machine, checkout = made
    cut_off = write_wheel(machine.root, "1.0.1", "other", name="oneflow", tag=OTHER_TAG)
    cut_off.write_bytes(cut_off.read_bytes()[:-10])
    stamp = (checkout / ".venv/stamp").read_text()
    status, out, err = machine.run(checkout, ONEFLOW_WHEEL=str(machine.root / name))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("env.sh: ") and "ONEFLOW_WHEEL" in err and said in err
    assert (checkout / ".venv/stamp").read_text() == stamp
    assert machine.run(checkout, "-c", "import greeting") == (0, "", "")


@pytest.mark.parametrize("name", ["env.sh", *WRAPPERS])
@pytest.mark.parametrize("shell", ["sh", "dash", "bash --posix"])
def test_shells_parse(shell, name):
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"no {shell} here")
    subprocess.run([*shell.split(), "-n", ROOT / name], check=True)


HARD = "a b'c\"d\ne$(touch run)`touch run`*;&|\\n"  # nothing of it is for the shell


@pytest.mark.parametrize(
    "wrapper, env, expected",
    [
        (
            "train.sh",
            {},
            ["of_cnn_train_val.py", "--save_init", "--loss_print_every_n_iter=10"],
        ),
        (
            "train.sh",
            {"NUM_EPOCH": "3", "DATA_ROOT": HARD},
            [
                "of_cnn_train_val.py",
                "--save_init",
                "--loss_print_every_n_iter=10",
                "--num_epoch=3",
                f"--train_data_dir={HARD}/train",
                f"--val_data_dir={HARD}/validation",
            ],
        ),
        (
            "evaluate.sh",
            {},
            [
                "of_cnn_evaluate.py",
            ],
        ),
        (
            "evaluate.sh",
            {"MODEL_LOAD_DIR": HARD, "DATA_ROOT": HARD},
            [
                "of_cnn_evaluate.py",
                f"--model_load_dir={HARD}",
                f"--val_data_dir={HARD}/validation",
            ],
        ),
        ("inference.sh", {}, ["of_cnn_inference.py"]),
        (
            "inference.sh",
            {"MODEL_LOAD_DIR": HARD, "IMAGE_PATH": HARD},
            ["of_cnn_inference.py", f"--model_load_dir={HARD}", f"--image_path={HARD}"],
        ),
        ("test.sh", {}, ["-m", "pytest"]),
    ],
)
def test_wrapper_passes_on_flags_and_exit_status(tmp_path, wrapper, env, expected):
    checkout = tmp_path / "check out"
    checkout.mkdir()
    (tmp_path / "elsewhere" / "check out").mkdir(parents=True)
    shutil.copy(ROOT / wrapper, checkout)
    (checkout / "env.sh").write_text("python=$PWD/python\n")
    write_script(checkout / "python", """printf '%s\\0' "$PWD" "$@"; exit 43""")
    more = ["--flag=a b", "*"]
    run = subprocess.run(
        ["sh", f"check out/{wrapper}", *more],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "CDPATH": str(tmp_path / "elsewhere"), **env},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split("\0") == [str(checkout), *expected, *more, ""]
    assert not (checkout / "run").exists()
    assert (run.returncode, run.stderr) == (43, "")


@pytest.mark.parametrize(
    "held, train, val",
    [
        (["cat/1.jpg", "dog/2.jpg"], "photos", "photos"),
        (["train/cat/1.jpg", "val/cat/2.jpg"], "photos", "photos"),
        (["train/cat/1.jpg", "validation/cat/2.jpg"], "photos/train", "photos/validation"),
        (["part-00000"], "photos/train", "photos/validation"),  # the error says what to do
    ],
)
def test_wrappers_take_a_folder_that_is_not_split(tmp_path, held, train, val):
    for name in ("train.sh", "evaluate.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "env.sh").write_text("python=$PWD/python\n")
    write_script(tmp_path / "python", """printf '%s\\n' "$@" | grep _data_dir""")
    for name in held:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()

    def given(wrapper):
        env = {"PATH": os.environ["PATH"], "DATA_ROOT": "photos"}
        command = ["sh", str(tmp_path / wrapper)]
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.split()

    found = given("train.sh")
    assert found[0] == f"--train_data_dir={train}"
    assert found[1:] == ([] if train == val else [f"--val_data_dir={val}"])
    assert given("evaluate.sh") == [f"--val_data_dir={val}"]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="only .venv is made by env.sh")
def test_what_is_installed_is_what_requirements_txt_pins():
    def key(name, version):
        return re.sub(r"[-_.]+", "-", name).lower(), version

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [line.split(" ") for line in lines if line and not line.startswith("#")]
    assert all(hashes for _, *hashes in pinned)
    pinned = [key(*name.split("==")) for name, *_ in pinned]
    installed = [
        key(dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions()
    ]
    assert sorted(pinned) == sorted(found for found in installed if found[0] != "pip")
