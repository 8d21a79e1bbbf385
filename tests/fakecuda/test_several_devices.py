"""Several processes, each on a device of its own, on one node and on two.

The devices compute nothing. What is looked at: which device a process touches, and that all of them
ask NCCL for the same things in the same order, for otherwise real devices would wait for ever.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fake
import jobs
import model_registry
import netns
import small
from small import ROOT

pytestmark = pytest.mark.usefixtures("device")

TRAIN = (
    "--device=cuda",
    "--image_size=32",
    "--num_classes=10",
    "--num_epochs=1",
    "--batch_size_per_device=2",
    "--num_val_examples=4",
    "--loss_print_every_n_iter=2",
)
HALF = ("--use_fp16", "--channel_last", "--fuse_bn_relu", "--fuse_bn_add_relu")
PROCESSES = 2  # per node, as many as it has devices
STEPS = 3

needs_namespaces = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not() or "-")


def start(*flags, cwd, devices=PROCESSES, prefix=(), log="log.%d", more=None):
    return subprocess.Popen(
        [*prefix, sys.executable, str(ROOT / "tests" / "train_small.py"), *TRAIN, *flags],
        cwd=cwd,
        env=fake.environment(devices=devices, log=cwd / log) | (more or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status=0, timeout=300):
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:  # its workers end with it
        process.kill()
        raise
    assert process.returncode == status, (out, errors)
    return out, errors


def check_logs(paths: list[Path], *, world_size: int) -> list[jobs.Log]:
    """The logs of all ranks. Other processes, the parents, must not have touched a device."""
    logs = [jobs.read_log(path) for path in paths]
    for path, log in zip(paths, logs, strict=True):
        assert log.faults == [], path
        if log.rank is None:
            assert log.devices == set(), f"{path}: a parent is at work on a device"
    ranks = sorted((log for log in logs if log.rank is not None), key=lambda log: log.rank)
    assert [log.rank for log in ranks] == list(range(world_size))
    for log in ranks:
        assert log.devices == {log.rank % PROCESSES}
    first = ranks[0].calls
    assert sum(map(len, first.values())) > 0
    for log in ranks[1:]:
        assert log.calls.keys() == first.keys()
        for name, calls in log.calls.items():
            assert calls == first[name], name
    return ranks


def check_gradients(log: jobs.Log, *, model: str, use_fp16: bool) -> None:
    """Each step adds up one gradient for each parameter, and the scalars that it returns.

    With --use_fp16 the gradients of convolutions and the last layer travel in half precision, as
    they were computed; scalars, the loss among them, never do.
    """
    float32, float16 = "7", "6"  # NCCL's numbers
    asked = [call.split() for calls in log.calls.values() for call in calls]
    # "allreduce COUNT type TYPE op sum"
    reduced = [(int(call[1]), call[3]) for call in asked if "reduce" in call[0]]
    assert (1, float32) in reduced and (1, float16) not in reduced
    network = (model_registry.MODELS | small.MODELS)[model].build(10)
    statistics = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
    gradients = [(n, dtype) for n, dtype in reduced if n not in (1, statistics)]
    parameters = [parameter.numel() for parameter in network.parameters()]
    assert sum(n for n, _ in gradients) == STEPS * sum(parameters)
    kernels = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    in_half = sum(n for n, dtype in gradients if dtype == float16)
    assert in_half == (STEPS * kernels if use_fp16 else 0)


def check_runs(
    runs: list[subprocess.Popen], *, cwd: Path, model: str, use_fp16: bool, world_size: int
) -> None:
    ended = [finish(run) for run in runs]
    assert "validation: epoch 0, " in ended[0][0]
    for out, errors in ended[1:]:
        assert out == errors == ""
    for log in check_logs(sorted(cwd.glob("log.*")), world_size=world_size):
        check_gradients(log, model=model, use_fp16=use_fp16)


on_networks = pytest.mark.parametrize(
    "model, use_fp16",
    [
        ("tiny", True),
        pytest.param("resnet18", True, marks=pytest.mark.slow),
        pytest.param("resnet18", False, marks=pytest.mark.slow),
    ],
)


@on_networks
def test_two_processes_on_two_devices(tmp_path, model, use_fp16):
    run = start(
        f"--model={model}",
        f"--num_examples={STEPS * 4}",
        f"--gpu_num_per_node={PROCESSES}",
        "--model_save_dir=run",
        *(HALF if use_fp16 else ()),
        cwd=tmp_path,
    )
    check_runs([run], cwd=tmp_path, model=model, use_fp16=use_fp16, world_size=PROCESSES)


@needs_namespaces
@on_networks
def test_two_nodes_of_two_devices(tmp_path, model, use_fp16):
    with netns.two_nodes() as nodes:
        runs = [
            start(
                f"--model={model}",
                "--num_nodes=2",
                "--node_ips=10.77.0.1,10.77.0.2",
                f"--num_examples={STEPS * 8}",
                f"--gpu_num_per_node={PROCESSES}",
                "--model_save_dir=run",
                *(HALF if use_fp16 else ()),
                cwd=tmp_path,
                prefix=node.command(),
            )
            for node in nodes
        ]
        check_runs(runs, cwd=tmp_path, model=model, use_fp16=use_fp16, world_size=2 * PROCESSES)


def start_ranks(*flags, cwd, devices=PROCESSES):
    """Two processes with the variables that another launcher would give them."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(*flags, cwd=cwd, devices=devices, more=common | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


def test_two_ranks_of_another_launcher(tmp_path):
    flags = ("--model=tiny", f"--num_examples={STEPS * 4}", "--model_save_dir=run", *HALF)
    runs = start_ranks(*flags, cwd=tmp_path)
    check_runs(runs, cwd=tmp_path, model="tiny", use_fp16=True, world_size=2)


def test_fewer_devices_than_ranks(tmp_path):
    ended = [finish(run, 2, 60) for run in start_ranks("--model=toy", cwd=tmp_path, devices=1)]
    (line,) = (line for _, errors in ended for line in errors.splitlines() if "error:" in line)
    assert "may use 1 CUDA devices, and 2 ranks run there" in line


def test_fewer_devices_than_processes(tmp_path):
    run = start(
        "--model=toy", "--gpu_num_per_node=2", "--model_save_dir=run", cwd=tmp_path, devices=1
    )
    _, errors = finish(run, 2, timeout=60)
    (line,) = errors.splitlines()
    assert "--gpu_num_per_node=2" in line and "1 CUDA device" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_two_nodes_that_are_one_machine(tmp_path, devices):
    """OneFlow takes two addresses of one machine for one node, and waits or crashes."""
    flags = ("--model=toy", "--num_nodes=2", "--node_ips=127.0.0.1,127.0.0.2")
    runs = [
        start(*flags, f"--node_rank={i}", f"--model_save_dir=run{i}", cwd=tmp_path, devices=devices)
        for i in range(2)
    ]
    for run in runs:
        _, errors = finish(run, 2, timeout=60)
        lines = [line for line in errors.splitlines() if "error:" in line]
        assert len(lines) == 1 and "one machine" in lines[0], errors
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    ("flags", "num_examples"),
    [
        (("--optimizer=lamb", "--gradient_clipping=1", *HALF), 12),
        (("--optimizer=lars", "--learning_rate=1", "--accumulate_steps=2"), 24),
        (("--layer_decay=0.9", "--stochastic_depth=0.2", "--ema_decay=0.9", "--use_fp16"), 12),
    ],
    ids=["lamb", "lars", "layers"],
)
def test_updates_of_a_second_graph_on_two_devices(flags, num_examples, tmp_path):
    """Also where a run is resumed: then both graphs have buffers to start from."""
    common = (f"--gpu_num_per_node={PROCESSES}", "--model_save_dir=run")
    first = (f"--num_examples={num_examples}", "--model=tiny", *flags)
    for log, own in (
        ("log", first),
        ("again", ("--resume=run/snapshot_epoch_0", "--num_epochs=2")),
    ):
        finish(start(*common, *own, cwd=tmp_path, log=f"{log}.%d"))
        check_logs(sorted(tmp_path.glob(f"{log}.*")), world_size=PROCESSES)
    assert (tmp_path / "run" / "snapshot_epoch_1").is_dir()
