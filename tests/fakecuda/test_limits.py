"""A device without code in the wheel, or without enough memory: one line, and nothing hangs."""

import subprocess
import sys

import pytest

import fake
from small import ROOT

pytestmark = pytest.mark.usefixtures("device")

TRAIN = (
    "of_cnn_train_val.py",
    "--num_epochs=1",
    "--num_examples=4",
    "--num_val_examples=4",
    "--model=resnet18",
    "--image_size=32",
    "--batch_size_per_device=4",
)
GIB = 1024


def run(script, *flags, cwd, **device):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=cwd,
        env=fake.environment(log=cwd / "log.%d", **device),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


KNOWN_NOTICES = ("Learning rate:", "Snapshots:", "1 epoch of", "Compiling the training graph")


def error_line(done, status: int) -> str:
    """The one line of an error; notices may stand before it, and nothing of native code."""
    assert done.returncode == status, (done.stdout, done.stderr)
    *notices, line = done.stderr.splitlines()
    assert ": error: " in line
    for notice in notices:
        assert notice.startswith(KNOWN_NOTICES)
    return line


@pytest.mark.parametrize("capability, shown", [(50, "5.0"), (90, "9.0"), (120, "12.0")])
def test_a_device_that_the_wheel_has_no_code_for(capability, shown, tmp_path):
    flags = (*TRAIN, "--device=cuda")
    line = error_line(run(*flags, cwd=tmp_path, capability=capability), status=2)
    assert "--device=cuda: CUDA device 0 (Fake CUDA device" in line
    assert (
        f"has compute capability {shown}, and OneFlow 0.9.0 has code for 6.0, 6.1, 7.x and" in line
    )


def test_the_newest_device_that_works(tmp_path):
    done = run(*TRAIN, "--device=auto", cwd=tmp_path, capability=89)
    assert done.returncode == 0, done.stderr
    assert "Device: cuda (--device=auto)." in done.stderr


def test_auto_takes_the_cpu_where_the_device_cannot_be_used(tmp_path):
    """With a message instead of a run: a CPU refuses this flag."""
    done = run(*TRAIN, "--device=auto", "--channel_last", cwd=tmp_path, capability=90)
    notice, error = done.stderr.splitlines()
    assert notice.startswith("Device: cpu (--device=auto: CUDA device 0 (Fake CUDA device")
    assert notice.endswith("has code for 6.0, 6.1, 7.x and 8.x only).")
    assert done.returncode == 2 and "--channel_last needs CUDA" in error


def test_nothing_is_asked_of_a_device_that_is_another_process_s(tmp_path):
    """The parent, which checks all devices, makes no context on any."""
    run(*TRAIN, "--device=cuda", cwd=tmp_path, capability=90, devices=2)
    logs = [path.read_text() for path in tmp_path.glob("log.*")]
    assert len(logs) == 2  # parent and worker
    assert all("START devices 2" in log and "CONTEXT" not in log for log in logs)


# What runs out: a tensor outside the graph, which OneFlow ends in a thread of its own; the buffers
# with which cuDNN's algorithms are tried out, which want 1 GB; the memory of the graph.
@pytest.mark.parametrize(
    "memory_mb, flags",
    [
        pytest.param(30, (), id="eager"),
        pytest.param(GIB - 100, (), id="search"),
        pytest.param(
            GIB + 500,
            ("--batch_size_per_device=256", "--image_size=112", "--num_examples=256"),
            id="graph",
        ),
    ],
)
def test_out_of_memory_in_training(memory_mb, flags, tmp_path):
    done = run(*TRAIN, "--device=cuda", *flags, cwd=tmp_path, memory_mb=memory_mb)
    line = error_line(done, status=1)
    given = dict(flag.split("=") for flag in (*TRAIN[1:], *flags))
    asked = " ".join(
        f"{name}={given[name]}" for name in ("--model", "--image_size", "--batch_size_per_device")
    )
    memory = f"(Fake CUDA device sm_80 (computes nothing), {memory_mb / GIB:.1f} GiB)"
    assert f"CUDA device 0 {memory} does not have enough free memory for {asked}; give a" in line
    assert "give a smaller --batch_size_per_device, or --use_fp16" in line
    assert "ERROR" not in done.stdout
    assert "OOM device 0" in "".join(path.read_text() for path in tmp_path.glob("log.*"))


def test_out_of_memory_in_inference(tmp_path):
    flags = ("--model=efficientnet_lite0", "--device=cuda", "--batch_size=512")
    photos = [str(ROOT / "data" / "cat.jpg")] * 64
    done = run("of_cnn_inference.py", *flags, "--image_path", *photos, cwd=tmp_path, memory_mb=40)
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "enough free memory for --model=efficientnet_lite0 --batch_size=512; give a" in line
    assert "give a smaller --batch_size, or --use_fp16" in line


def test_fewer_devices_than_processes(tmp_path):
    done = run(*TRAIN, "--device=cuda", "--gpu_num_per_node=2", cwd=tmp_path, devices=1)
    assert "--gpu_num_per_node=2, and this machine has 1 CUDA devices" in error_line(done, status=2)
