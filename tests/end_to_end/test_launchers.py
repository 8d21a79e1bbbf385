"""Ranks that other launchers start: the same results, an end in any case, signals and resuming.

`pods` is a plain loop with the variables that a Kubernetes pod would have.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import netns
from cnns.checkpoint.snapshot import read_description
from small import ROOT, losses, validation_figures, write_sets

TRAIN_SMALL = str(ROOT / "tests" / "train_small.py")
PROMISE = 15.0  # seconds until all has ended when a rank dies
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A rank for each word of $RANKS; the status is that of the last that failed.
LOOP = """
status=0 pids=
for RANK in $RANKS; do export RANK; "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || status=$?; done
exit $status
"""
# By the names that both have where they are installed beside each other.
MPI = {
    "mpi": (
        "mpirun.openmpi",
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-np",
        "2",
    ),
    "mpich": ("mpiexec.hydra", "-np", "2"),
}
PACKAGES = {"mpi": "openmpi-bin", "mpich": "mpich"}


def mpi(*values, marks=(), kind="mpi"):
    program = MPI[kind][0]
    missing = shutil.which(program) is None
    needs = pytest.mark.skipif(missing, reason=f"needs {program} (Debian: {PACKAGES[kind]})")
    return pytest.param(kind, *values, marks=[needs, *marks])


def slow(launcher, *values):
    if launcher in MPI:
        return mpi(*values, marks=[pytest.mark.slow], kind=launcher)
    return pytest.param(launcher, *values, marks=pytest.mark.slow)


def free_port() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            with suppress(OSError, OverflowError):
                second.bind(("", port + 1))
                return port


def start(launcher, *argv, cwd, ranks="0 1", more=None, size=2, prefix=()):
    """Two ranks of a script with the tests' networks."""
    environ = {name: value for name, value in os.environ.items() if name not in OTHERS}
    command, port = [sys.executable, TRAIN_SMALL, *argv], free_port()
    if launcher == "pods":
        pod = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        environ |= pod | {"RANKS": ranks}
        command = ["sh", "-c", LOOP, "sh", *command]
    elif launcher == "oneflow":
        own = ("-m", "oneflow.distributed.launch", "--nproc_per_node=2", f"--master_port={port}")
        command[1:1] = own
    elif launcher in MPI:
        command[:0] = MPI[launcher]
        if launcher == "mpich":  # it has no number of a job, for a port of its own
            environ["MASTER_PORT"] = str(port)
    return subprocess.Popen(
        [*prefix, *command],
        cwd=cwd,
        env=environ | (more or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(run, *statuses, timeout=300):
    try:
        out, errors = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode in (statuses or (0,)), f"{out}\n{errors}"
    return out, errors


def processes(cwd: Path, *, rank: int | None = None) -> list[int]:
    """Ranks that run in a directory, and their watchers; or the process of one rank."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = (entry / "environ").read_bytes().split(b"\0")
            mine = os.readlink(entry / "cwd") == str(cwd)
            wanted = rank is None or {b"CNNS_WORKER=1", f"RANK={rank}".encode()} <= set(environ)
            if mine and wanted and b"python" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def wait_until(condition, timeout=PROMISE):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def error_lines(errors):
    return [line for line in errors.splitlines() if line.startswith("train_small.py: error: ")]


def says_killed(line, who):
    """By which signal is known as long as nobody has waited for the process."""
    ends = ("died without a word (killed, or out of memory?)", "was killed by SIGKILL")
    return any(f"{who} {end}" in line for end in ends)


def wait_for_line(run, prefix):
    line = run.stdout.readline()
    while line and not line.startswith(prefix):
        line = run.stdout.readline()
    assert line, run.stderr.read()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    parts = {"train": (13, 9, 11, 7), "validation": (5, 1, 9, 6)}
    return write_sets(tmp_path_factory.mktemp("data"), parts, num_classes=4)


def recipe(data, *, epochs=2):
    return (
        "--device=cpu",
        "--model=plain",
        f"--train_data_dir={data / 'train'}",
        f"--val_data_dir={data / 'validation'}",
        "--val_batch_size_per_device=2",
        "--batch_size_per_device=4",
        f"--num_epochs={epochs}",
        "--learning_rate=0.1",
        "--warmup_epochs=1",
        "--loss_print_every_n_iter=1",
    )


SYNTHETIC = ("--device=cpu", "--model=toy", "--image_size=32", "--num_classes=10")
SYNTHETIC += ("--batch_size_per_device=4", "--num_examples=4000", "--num_epochs=50")
SYNTHETIC += ("--loss_print_every_n_iter=1",)


@pytest.fixture(scope="module")
def own(data, tmp_path_factory):
    """stdout of the same run under a parent of ours."""
    cwd = tmp_path_factory.mktemp("own")
    out, _ = finish(start("own", *recipe(data), "--gpu_num_per_node=2", cwd=cwd))
    return out


def check_same(out, own):
    assert len(losses(own)) == 10
    np.testing.assert_allclose(losses(out), losses(own), rtol=1e-5, atol=2e-6)
    assert validation_figures(out) == validation_figures(own)


@pytest.mark.parametrize("launcher", ["pods", "oneflow", mpi(), slow("mpich")])
def test_the_same_results_as_under_a_parent_of_ours(launcher, data, own, tmp_path):
    out, errors = finish(start(launcher, *recipe(data), "--model_save_dir=run", cwd=tmp_path))
    check_same(out, own)
    assert error_lines(errors) == []
    assert errors.count("Compiling the training graph") == 1
    snapshot = "run/snapshot_epoch_1"
    flags = read_description(str(tmp_path / snapshot)).flags
    assert (flags["num_nodes"], flags["gpu_num_per_node"]) == (1, 2)
    evaluate = ("evaluate", "--device=cpu", f"--val_data_dir={data / 'validation'}")
    out, _ = finish(start(launcher, *evaluate, f"--model_load_dir={snapshot}", cwd=tmp_path))
    assert validation_figures(out) == validation_figures(own)[-1:]
    wait_until(lambda: not processes(tmp_path))


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("pods", 0),
        ("oneflow", 1),
        mpi(1),
        slow("pods", 1),
        slow("oneflow", 0),
        slow("mpi", 0),
        slow("mpich", 0),
        slow("mpich", 1),
    ],
)
def test_a_killed_rank_ends_all(launcher, rank, tmp_path):
    run = start(launcher, *SYNTHETIC, cwd=tmp_path)
    wait_for_line(run, "train:")
    (process,) = processes(tmp_path, rank=rank)
    os.kill(process, signal.SIGKILL)
    begin = time.monotonic()
    _, errors = finish(run, 9 if launcher == "mpich" else 1, 137)
    wait_until(lambda: not processes(tmp_path))
    assert time.monotonic() - begin < PROMISE
    (line,) = error_lines(errors)
    assert says_killed(line, f"rank {rank} on {socket.gethostname()}")


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("pods", signal.SIGTERM),
        slow("pods", signal.SIGHUP),
        slow("oneflow", signal.SIGHUP),
        slow("oneflow", signal.SIGINT),
        slow("mpi", signal.SIGTERM),
        slow("mpi", signal.SIGINT),
        slow("mpich", signal.SIGTERM),
        slow("mpich", signal.SIGINT),
    ],
)
def test_stopped_by_a_signal_to_one_rank_and_resumed(launcher, number, data, tmp_path):
    epochs = 10  # some seconds, so that the signal comes while it trains
    flags = (*recipe(data, epochs=epochs), "--model_save_dir=run", "--resume=auto")
    run = start(launcher, *flags, cwd=tmp_path)
    wait_for_line(run, "train: epoch 1, iter 2,")
    (process,) = processes(tmp_path, rank=1)
    os.kill(process, number)
    # oneflow.distributed.launch has a status of its own.
    out, errors = finish(run, 1 if launcher == "oneflow" else 128 + number)
    assert "Saving model to run/snapshot_last." in out
    (line,) = error_lines(errors)
    assert f"interrupted by {number.name}; resume with --resume=run/snapshot_last" in line
    stopped = read_description(str(tmp_path / "run" / "snapshot_last"))
    wait_until(lambda: not processes(tmp_path))
    out, _ = finish(start(launcher, *flags, cwd=tmp_path))
    assert out.count("validation:") == epochs - stopped.epoch - 1
    assert (tmp_path / "run" / f"snapshot_epoch_{epochs - 1}").exists()


def test_a_second_signal_ends_all_at_once(tmp_path):
    """While one rank does not go on, so that the first one cannot end the run."""
    run = start("pods", *SYNTHETIC, cwd=tmp_path)
    wait_for_line(run, "train:")
    (stopped,), (process,) = (processes(tmp_path, rank=rank) for rank in (0, 1))
    os.kill(stopped, signal.SIGSTOP)
    for _ in range(2):  # as launchers send it, to the process and to its group
        os.kill(process, signal.SIGTERM)
        time.sleep(0.2)
    time.sleep(1.5)
    assert run.poll() is None
    begin = time.monotonic()
    os.kill(process, signal.SIGTERM)
    _, errors = finish(run, 143)
    wait_until(lambda: not processes(tmp_path))
    assert time.monotonic() - begin < PROMISE
    (line,) = error_lines(errors)
    assert f"ended at once by SIGTERM on rank 1 on {socket.gethostname()}" in line


@pytest.mark.slow
@pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not() or "-")
def test_a_cut_link_ends_both_sides(tmp_path):
    """Each rank on a machine of its own; rank 0 cannot tell the other one why."""
    more = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    with netns.two_nodes() as nodes:
        runs = [
            start("pods", *SYNTHETIC, cwd=tmp_path, ranks=rank, more=more, prefix=node.command())
            for rank, node in zip("01", nodes, strict=True)
        ]
        wait_for_line(runs[0], "train:")
        nodes[1].cut()
        begin = time.monotonic()
        ended = [finish(run, 1, 137) for run in runs]
        assert time.monotonic() - begin < PROMISE
    for (_, errors), other in zip(ended, (1, 0), strict=True):
        (line,) = error_lines(errors)
        assert f"rank {other} on " in line and "not heard from for 10 s" in line


def both(*argv, cwd, other=(), ranks=("0", "1"), size=2):
    """Two ranks that are started apart, as in pods of their own; the second with other flags."""
    port = str(free_port())
    runs = [
        start("pods", *argv, *more, cwd=cwd, ranks=rank, size=size, more={"MASTER_PORT": port})
        for rank, more in zip(ranks, ((), other), strict=True)
    ]
    return [finish(run, 1, 2) for run in runs], [run.returncode for run in runs]


@pytest.mark.parametrize(
    ("other", "ranks", "words"),
    [
        ((), ("0", "1"), ["--num_epochs", "0"]),  # wrong on both
        (("--num_epochs=3",), ("0", "1"), ["--num_epochs", "0"]),  # on the first
        (("--seed=2",), ("0", "1"), ["--seed differs", "on rank 0 on", "on rank 1 on"]),
        ((), ("0", "0"), ["two processes say that they are rank 0"]),
    ],
)
def test_what_does_not_fit_is_said_once(tmp_path, other, ranks, words):
    wrong = "--num_epochs=0" if words[0] == "--num_epochs" else "--num_epochs=1"
    flags = (*SYNTHETIC[:5], wrong, "--start_timeout=20")
    ended, statuses = both(*flags, cwd=tmp_path, other=other, ranks=ranks)
    lines = [line for _, errors in ended for line in error_lines(errors)]
    if ranks == ("0", "0"):  # each is the one that speaks
        lines = sorted(set(lines))
    assert statuses == [2, 2] and len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "output").exists()


def test_a_rank_that_does_not_connect(tmp_path):
    run = start("pods", *SYNTHETIC, "--start_timeout=4", cwd=tmp_path, ranks="0")
    _, errors = finish(run, 1)
    (line,) = error_lines(errors)
    assert "rank 1 did not connect to localhost port" in line and "within 4 s" in line


def test_one_number_twice(tmp_path):
    run = start("pods", *SYNTHETIC, "--start_timeout=30", cwd=tmp_path, ranks="0 1 1", size=3)
    _, errors = finish(run, 2)
    (line,) = error_lines(errors)
    assert "two processes say that they are rank 1" in line


# Slurm: slurmctld and two slurmd on this machine.

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/ctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmctldLogFile={dir}/ctld.log
SlurmdLogFile={dir}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2
ReturnToService=2
MpiDefault=none
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=1 RealMemory=1000
PartitionName=p Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""
DAEMONS = ("munged", "slurmctld", "slurmd", "srun")


def why_no_slurm() -> str:
    missing = [name for name in DAEMONS if shutil.which(name, path="/usr/sbin:/usr/bin") is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root"


needs_slurm = pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "-")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of Slurm's commands, in which every step finds rank 0 at 127.0.0.1."""
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool.n1", "spool.n2"):
        (directory / name).mkdir()
    numbers = {"port": free_port(), "port_1": free_port(), "port_2": free_port()}
    conf = directory / "slurm.conf"
    conf.write_text(CONF.format(dir=directory, host=socket.gethostname().split(".")[0], **numbers))
    environ = {name: value for name, value in os.environ.items() if name not in OTHERS}
    environ |= {"SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1"}

    def run(*command, check=True):
        return subprocess.run(
            command, env=environ, check=check, capture_output=True, text=True, timeout=60
        ).stdout

    munge = None
    if not Path("/run/munge/munge.socket.2").exists():
        os.makedirs("/run/munge", exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        munge = Path("/run/munge/munged.pid")
        run("su", "munge", "-s", "/bin/sh", "-c", "/usr/sbin/munged --force")
    try:
        run("slurmctld", "-f", str(conf))
        for node in ("n1", "n2"):
            run("slurmd", "-f", str(conf), "-N", node)
        wait_until(lambda: "idle" in run("sinfo", "-h", "-N", "-n", "n2", check=False), 60)
        run.environ = environ
        yield run
    finally:
        run("scancel", "-u", "root", check=False)
        with suppress(AssertionError):  # what runs a job waits for slurmctld to hear of its end
            wait_until(lambda: not run("squeue", "-h", check=False).strip(), 40)
        files = [directory / "n1.pid", directory / "n2.pid", directory / "ctld.pid", munge]
        pids = [int(file.read_text()) for file in files if file and file.exists()]
        for number in (signal.SIGTERM, signal.SIGKILL):  # slurmd may miss the first
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            with suppress(AssertionError):
                wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def srun(slurm, *argv, cwd):
    command = ("srun", "-N2", "-n2", "--kill-on-bad-exit=1", sys.executable, TRAIN_SMALL, *argv)
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=slurm.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@needs_slurm
def test_srun(slurm, data, own, tmp_path):
    out, errors = finish(srun(slurm, *recipe(data), "--model_save_dir=run", cwd=tmp_path))
    check_same(out, own)
    assert error_lines(errors) == []
    evaluate = ("evaluate", "--device=cpu", f"--val_data_dir={data / 'validation'}")
    snapshot = "--model_load_dir=run/snapshot_epoch_1"
    out, _ = finish(srun(slurm, *evaluate, snapshot, cwd=tmp_path))
    assert validation_figures(out) == validation_figures(own)[-1:]
    for rank in (0, 1):
        run = srun(slurm, *SYNTHETIC, cwd=tmp_path)
        wait_for_line(run, "train:")
        (process,) = processes(tmp_path, rank=rank)
        os.kill(process, signal.SIGKILL)
        begin = time.monotonic()
        _, errors = finish(run, 1, 137)
        wait_until(lambda: not processes(tmp_path))
        assert time.monotonic() - begin < PROMISE
        (line,) = error_lines(errors)
        assert says_killed(line, f"rank {rank} on n{rank + 1}")


@pytest.mark.slow
@needs_slurm
def test_a_batch_script_with_a_parent_of_ours(slurm, data, own, tmp_path):
    """It has a rank and a number of tasks too, but is not a step."""
    command = " ".join([sys.executable, TRAIN_SMALL, *recipe(data), "--gpu_num_per_node=2"])
    slurm("sbatch", "-n2", f"--chdir={tmp_path}", "--output=out", f"--wrap={command}")
    output = tmp_path / "out"
    wait_until(lambda: output.exists() and "snapshot_epoch_1" in output.read_text(), 120)
    check_same(output.read_text(), own)


class Example:
    """Jobs of examples/slurm.sbatch with a small network, in a directory like this one."""

    def __init__(self, slurm, data, directory):
        self.slurm, self.data, self.directory = slurm, data, directory
        self.queued = None  # when it was first seen waiting
        for path in ROOT.iterdir():
            if path.suffix == ".py" or path.name in ("data", "cnns"):
                os.symlink(path, directory / path.name)
        shutil.copy(ROOT / "train.sh", directory)  # it would go where a link leads
        (directory / "env.sh").write_text(f"python={sys.executable}\n")

    def submit(self, *options, epochs=60):
        own = ("--parsable", "-n2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none")
        export = f"--export=ALL,RUN=run,DATA_ROOT={self.data},NUM_EPOCH={epochs}"
        places = (f"--chdir={self.directory}", f"--output={self.directory / 'out'}", export)
        flags = ("--model=resnet18", "--image_size=32", "--batch_size_per_device=2")
        more = ("--device=cpu", "--learning_rate=1e-5", "--loss_print_every_n_iter=1")
        script = str(ROOT / "examples" / "slurm.sbatch")
        self.job = self.slurm("sbatch", *own, *places, *options, script, *flags, *more).strip()

    def text(self):
        output = self.directory / "out"
        return output.read_text() if output.exists() else ""

    def wait_for(self, words, *, times, seconds):
        self.wait_until(lambda: self.text().count(words) >= times, seconds)

    def wait_until(self, condition, seconds):
        try:
            wait_until(condition, seconds)
        except AssertionError as error:
            queue = self.slurm("squeue", check=False)
            raise AssertionError(f"{error}:\n{self.text()[-3000:]}\n{queue}") from None

    def resumed(self, times):
        # A job that is queued again waits for two minutes, unless told otherwise. In the second in
        # which it was queued slurmd takes it for the job that was ended, and refuses it for good.
        state = self.slurm("squeue", "-h", "-j", self.job, "-o", "%T", check=False).strip()
        if state != "PENDING":
            self.queued = None
        elif self.queued is None:
            self.queued = time.monotonic()
        elif time.monotonic() - self.queued > 5:
            self.slurm("scontrol", "update", f"JobId={self.job}", "StartTime=now", check=False)
        return self.text().count("Resuming at epoch") >= times

    def cancel(self):
        self.slurm("scancel", self.job)
        command = ("squeue", "-h", "-j", self.job, "-o", "%T")
        wait_until(lambda: not self.slurm(*command, check=False).strip(), 60)


@pytest.mark.slow
@needs_slurm
def test_the_example_of_a_batch_script(slurm, data, tmp_path):
    """Preempted and queued again, stopped by a signal, cancelled; each time it goes on."""
    example = Example(slurm, data, tmp_path)
    example.submit("--time=60")
    example.wait_for("train: epoch 1,", times=3, seconds=400)
    slurm("scontrol", "requeue", example.job)  # as preemption does
    example.wait_for("interrupted by SIGTERM", times=1, seconds=100)
    example.wait_until(lambda: example.resumed(1), 400)
    slurm("scancel", "--signal=TERM", example.job)
    example.wait_for("interrupted by SIGTERM", times=2, seconds=100)
    example.wait_until(lambda: example.resumed(2), 400)
    example.cancel()
    assert example.text().count("interrupted by SIGTERM") == 3
    lines = example.text().splitlines()
    assert not any("died" in line or "Traceback" in line for line in lines)


@pytest.mark.slow
@needs_slurm
def test_a_signal_of_slurm_before_the_time_is_over(slurm, data, tmp_path):
    """Which Slurm sends up to a minute earlier than asked for, to the tasks of the step."""
    example = Example(slurm, data, tmp_path)
    example.submit("--time=3", "--signal=TERM@60", epochs=1000)
    example.wait_for("interrupted by SIGTERM", times=1, seconds=240)
    example.wait_until(lambda: example.resumed(1), 400)
    example.cancel()
    assert "DUE TO TIME LIMIT" not in example.text()
    assert not any("died" in line for line in example.text().splitlines())
