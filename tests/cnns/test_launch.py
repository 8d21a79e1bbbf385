"""Jobs of several processes and nodes, with workers that only play a part: no OneFlow here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import cnns.launch.job as job_module
import cnns.launch.parent as parent_module
import netns
from cnns.errors import UsageError
from cnns.launch.channel import MAGIC, PROTOCOL
from cnns.launch.job import find_node_rank, is_own_address, make_job
from cnns.launch.worker import WORKER_MARK, is_worker
from small import ROOT

pytestmark = pytest.mark.long

# Shorter than the real ones where a test does not look at them.
LIMITS = {"GATHER_SECONDS": 0.6, "TERM_SECONDS": 0.4}
REAL = {name: getattr(parent_module, name) for name in LIMITS}
LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
PROMISE = 15.0  # seconds until all has ended when one process dies

PARENT = """
import json, os, sys
sys.path.insert(0, os.environ["ROOT"])
from cnns.errors import UsageError, run_main
from cnns.launch import channel, parent, worker
from cnns.launch.job import make_job

options = json.loads(sys.argv[1])
for name, value in options["limits"].items():
    (module,) = (module for module in (channel, parent, worker) if hasattr(module, name))
    setattr(module, name, value)

def facts():
    if options["error"]:
        raise UsageError(options["error"])
    return options["facts"]

def explain(local_rank, words):
    if any(options["known"] in line for line in words):
        return f"what device {local_rank} said is known"

def main():
    job = make_job(**options["job"])
    command = [sys.executable, "-S", os.environ["WORKER"], json.dumps(options["parts"])]
    sys.exit(parent.launch(command, job=job, facts=facts, explain=explain))

sys.exit(run_main(main))
"""
# Each worker notes that it lives, and then runs the lines of its part.
WORKER = r"""
import json, os, pathlib, signal, subprocess, sys, time

rank = os.environ["RANK"]
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: got.append(number))
directory = pathlib.Path(os.environ["DIRECTORY"])

def wait(seconds=60):
    end = time.monotonic() + seconds
    while not got and time.monotonic() < end:
        time.sleep(0.02)

def until_told():
    wait()
    time.sleep(0.3)  # a second signal would be seen
    print("signals", got, file=sys.stderr)
    sys.exit(128 + got[0])

def error(text, status=1):
    print(f"train.py: error: {text}", file=sys.stderr)
    sys.exit(status)

def crash(text="Check failed: something"):
    print(f"F20261124 08:00:00.123456  4711 io_event_poller.cpp:91] {text}", file=sys.stderr)
    print("*** Check failure stack trace: ***", file=sys.stderr)
    print("    @     0x7f0123456789  google::LogMessage::Fail()", file=sys.stderr)
    os.abort()

(directory / f"pid.{rank}").write_text(str(os.getpid()))
(directory / f"environ.{rank}").write_text(json.dumps(dict(os.environ)))
parts = json.loads(sys.argv[1])
exec(parts.get(rank, parts.get("else", "until_told()")))
"""

needs_namespaces = pytest.mark.skipif(bool(why := netns.why_not()), reason=why)


def free_port() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Running:
    """A parent that was started, and what it wrote."""

    def __init__(self, process: subprocess.Popen, out: Path, err: Path):
        self.process, self.out, self.err = process, out, err

    def stdout(self) -> str:
        return self.out.read_text()

    def stderr(self) -> str:
        return self.err.read_text()

    def lines(self) -> list[str]:
        return self.stderr().splitlines()

    def status(self, timeout: float = PROMISE) -> int:
        return self.process.wait(timeout)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def catches(self, number: int) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (number - 1) & 1)


class Cluster:
    def __init__(self, directory: Path):
        self.directory = directory
        (directory / "parent").mkdir()
        (directory / "parent" / "train.py").write_text(PARENT)
        (directory / "worker.py").write_text(WORKER)
        self.port = free_port()
        self.parents: list[Running] = []

    def start(
        self,
        node_rank: int | None = 0,
        *,
        node_ips=LOOPBACK[:2],
        devices: int = 1,
        parts: dict | None = None,
        facts: dict | None = None,
        error: str = "",
        known: str = "never said",
        limits: dict | None = None,
        timeout: float = 20,
        prefix=(),
    ) -> Running:
        """One parent; `parts` are the lines that each rank runs."""
        options = {
            "job": {
                "num_nodes": max(1, len(node_ips)),
                "node_ips": node_ips,
                "node_rank": node_rank,
                "processes_per_node": devices,
                "ctrl_port": self.port,
                "start_timeout": timeout,
            },
            "parts": parts or {},
            "facts": facts or {},
            "error": error,
            "known": known,
            "limits": LIMITS | (limits or {}),
        }
        out, err = (self.directory / f"{len(self.parents)}.{name}" for name in ("out", "err"))
        environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environ |= {
            "ROOT": str(ROOT),
            "WORKER": str(self.directory / "worker.py"),
            "DIRECTORY": str(self.directory),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-S", str(self.directory / "parent" / "train.py")]
                + [json.dumps(options)],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
            )
        self.parents.append(Running(process, out, err))
        return self.parents[-1]

    def pair(self, **options) -> tuple[Running, Running]:
        return self.start(0, **options), self.start(1, **options)

    def worker(self, rank: int) -> int:
        """The process of a worker, once it lives."""
        path = self.directory / f"environ.{rank}"
        wait_for(lambda: path.exists() and path.stat().st_size > 0)
        return int((self.directory / f"pid.{rank}").read_text())

    def environ(self, rank: int) -> dict:
        self.worker(rank)
        return json.loads((self.directory / f"environ.{rank}").read_text())

    def processes(self) -> list[int]:
        """All processes that descend from this test's parents, by a variable that they inherit."""
        mark = f"DIRECTORY={self.directory}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def wait_for(condition, timeout: float = PROMISE) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    try:
        yield cluster
        for parent in cluster.parents:
            parent.process.wait(PROMISE)
        wait_for(lambda: not cluster.processes(), 5)
    finally:
        for process in cluster.processes():
            os.kill(process, signal.SIGKILL)


@pytest.fixture
def nodes():
    with netns.two_nodes() as nodes:
        yield nodes


def one_line(parent: Running, *words: str) -> None:
    """The parent printed one line, which says all this."""
    lines = parent.lines()
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    for word in words:
        assert word in lines[0]


# Who is who.


def job(**options):
    defaults = {"num_nodes": 2, "node_ips": LOOPBACK[:2], "processes_per_node": 4, "ctrl_port": 1}
    return make_job(**defaults | options)


def test_ranks_follow_nodes():
    second = job(node_rank=1)
    assert second.world_size == 8 and list(second.ranks) == [4, 5, 6, 7]
    assert second.name_rank(3) == "rank 3 on node 0 (127.0.0.1)"
    assert second.name_rank(4) == "rank 4 on node 1 (127.0.0.2)"
    assert job(num_nodes=1, node_ips=None).name_rank(1) == "rank 1 on node 0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"node_ips": None}, ["--num_nodes=2 needs --node_ips"]),
        ({"node_ips": ("10.0.0.1",)}, ["--node_ips=10.0.0.1 has 1 ", "--num_nodes is 2"]),
        ({"node_ips": LOOPBACK}, ["has 3 addresses"]),
        ({"node_ips": ("10.0.0.1", "10.0.0.1")}, ["names 10.0.0.1 twice"]),
        ({"node_ips": ("10.0.0.1", "::1")}, ["::1", "IPv4"]),
        ({"node_ips": ("10.0.0.1", "0.0.0.0")}, ["0.0.0.0 is not the address"]),
        ({"node_rank": 2}, ["--node_rank=2", "less than --num_nodes=2"]),
        ({}, ["127.0.0.1 and 127.0.0.2 are both addresses of this machine", "--node_rank"]),
        (
            {"node_ips": ("10.0.0.1", "10.0.0.2")},
            ["10.0.0.1,10.0.0.2: none", "--node_rank"],
        ),
        ({"node_ips": ("no.such.invalid", "10.0.0.2")}, ["no.such.invalid,10.0.0.2: none"]),
    ],
)
def test_flags_that_do_not_fit(monkeypatch, options, words):
    monkeypatch.setattr(job_module, "is_own_address", lambda host: host.startswith("127."))
    with pytest.raises(UsageError) as error:
        job(**{"environ": {}} | options)
    for word in words:
        assert word in str(error.value)


def test_node_rank(monkeypatch):
    own = ("10.0.0.2", "node2")
    monkeypatch.setattr(job_module, "is_own_address", lambda host: host in own)
    assert find_node_rank(("10.0.0.1", "10.0.0.2"), environ={}) == 1
    assert find_node_rank(("node2", "node3"), environ={}) == 0
    assert job(node_ips=("10.0.0.1", "10.0.0.2"), node_rank=0).node_rank == 0
    elsewhere = ("10.0.0.3", "10.0.0.4")
    slurm = {"SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    assert find_node_rank(elsewhere, environ=slurm) == 1
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert find_node_rank(elsewhere, environ=mpi) == 1
    # One process for each of 8 devices: that is not the number of a node.
    with pytest.raises(UsageError):
        find_node_rank(elsewhere, environ=mpi | {"OMPI_COMM_WORLD_SIZE": "8"})
    # An address of this machine says more than a scheduler.
    assert find_node_rank(("10.0.0.2", "10.0.0.3"), environ=slurm) == 0


def test_own_addresses():
    assert is_own_address("127.0.0.1") and is_own_address("localhost")
    assert not is_own_address("no.such.invalid")


def test_one_node_needs_no_address():
    assert job(num_nodes=1, node_ips=None).node_rank == 0


@needs_namespaces
def test_each_namespace_knows_its_own_address(nodes):
    ips = [node.address for node in nodes]
    code = f"from cnns.launch.job import find_node_rank; print(find_node_rank({ips}, environ={{}}))"
    for i, node in enumerate(nodes):
        command = node.command(sys.executable, "-c", code)
        assert subprocess.check_output(command, cwd=ROOT, text=True) == f"{i}\n"


# Jobs that go well.


def test_one_node(cluster):
    parent = cluster.start(
        None, node_ips=(), devices=2, parts={"else": "print('out', rank); print('err', rank)"}
    )
    assert parent.status() == 0
    assert parent.stdout() == "out 0\nerr 0\n" and parent.stderr() == ""
    first, second = cluster.environ(0), cluster.environ(1)
    assert first["MASTER_ADDR"] == second["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert (first["RANK"], first["LOCAL_RANK"]) == ("0", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")
    assert int(first["OMP_NUM_THREADS"]) >= 1
    assert is_worker(second) and not is_worker({"RANK": "1"})


def test_the_first_node_alone_has_output(cluster):
    lines = "print('out', rank); print('err', rank, file=sys.stderr); wait(int(rank) / 2)"
    facts = {"flags": {"--seed": 1}, "classes": ["a", "b"]}
    nodes = cluster.pair(devices=2, parts={"else": lines}, facts=facts)
    assert [node.status() for node in nodes] == [0, 0]
    assert [node.stdout() for node in nodes] == ["out 0\n", ""]
    assert [node.stderr() for node in nodes] == ["err 0\n", ""]
    for rank in range(4):
        environ = cluster.environ(rank)
        assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert environ["MASTER_PORT"] == str(cluster.port + 1)
        assert (environ["RANK"], environ["LOCAL_RANK"]) == (str(rank), str(rank % 2))


def test_lines_arrive_while_the_job_runs(cluster):
    parts = {"0": "print('out'); print('err', file=sys.stderr); until_told()"}
    parent = cluster.start(None, node_ips=(), parts=parts)
    wait_for(lambda: (parent.stdout(), parent.stderr()) == ("out\n", "err\n"))
    parent.signal(signal.SIGTERM)
    assert parent.status() == 143


def test_what_looks_like_a_crash_and_is_none_is_shown(cluster):
    parts = {"0": "print('Traceback (most recent call last):', file=sys.stderr); wait(1)"}
    parent = cluster.start(None, node_ips=(), parts=parts, limits={"HOLD_SECONDS": 0.2})
    wait_for(lambda: parent.lines() == ["Traceback (most recent call last):"])
    assert parent.process.poll() is None
    assert parent.status() == 0 and len(parent.lines()) == 1


def test_a_taken_master_port(cluster):
    with socket.socket() as taken:
        taken.bind(("", cluster.port + 1))
        nodes = cluster.pair(parts={"else": "pass"})
        assert [node.status() for node in nodes] == [0, 0]
    assert cluster.environ(0)["MASTER_PORT"] == cluster.environ(1)["MASTER_PORT"]
    assert cluster.environ(0)["MASTER_PORT"] != str(cluster.port + 1)


def test_three_nodes_in_any_order(cluster):
    options = {"node_ips": LOOPBACK, "parts": {"else": "wait(0.3)"}}
    nodes = [cluster.start(rank, **options) for rank in (2, 1, 0)]
    assert [node.status() for node in nodes] == [0, 0, 0]


def test_a_paused_terminal_stops_nobody(cluster):
    """The parent's stderr is a pipe that nobody reads, and full; signs of life go on."""
    lines = "".join(f"line {i:0100d}\n" for i in range(3000))
    (cluster.directory / "lines").write_text(lines)
    parts = {"0": "sys.stderr.write((directory / 'lines').read_text()); wait(2)", "1": "wait(2)"}
    limits = {"SILENCE_SECONDS": 1.5, "BEAT_SECONDS": 0.1}
    # The shell's pipe is read two seconds late.
    late = ("sh", "-c", '"$@" 2>&1 >/dev/null | { sleep 2; cat >&2; }', "sh")
    nodes = (
        cluster.start(0, parts=parts, limits=limits, prefix=late),
        cluster.start(1, parts=parts, limits=limits),
    )
    assert [node.status() for node in nodes] == [0, 0]
    assert nodes[0].stderr() == lines and nodes[1].stderr() == ""


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143, "raise"])
@pytest.mark.parametrize("mark", [{}, {WORKER_MARK: "1", "RANK": "0"}])
def test_a_failed_worker_leaves_without_oneflows_end(status, mark):
    end = "raise KeyError(1)" if status == "raise" else f"sys.exit(worker.leave({status}))"
    code = "import atexit, sys; from cnns.launch import worker; atexit.register(print, 'end'); "
    code += f"worker.prepare_worker(); {end}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | mark,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (1 if status == "raise" else status)
    assert ("KeyError" in done.stderr) == (status == "raise")
    assert bool(done.stdout) != bool(mark and status != 0)


def test_workers_wait_until_rank_0_listens():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        environ = {WORKER_MARK: "1", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        environ["MASTER_PORT"] = str(server.getsockname()[1])
        code = "from cnns.launch import worker; worker.prepare_worker()"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | environ) as process:
            time.sleep(0.5)
            assert process.poll() is None
            server.listen()
            assert process.wait(PROMISE) == 0


# Nodes that do not come together.


def test_a_node_that_does_not_come(cluster):
    options = {"node_ips": LOOPBACK, "timeout": 1.5}
    nodes = cluster.start(0, **options), cluster.start(1, **options)
    assert [node.status() for node in nodes] == [1, 1]
    for node in nodes:
        one_line(
            node, f"node 2 (127.0.0.3) did not connect to 127.0.0.1 port {cluster.port} within"
        )


def test_node_0_does_not_come(cluster):
    node = cluster.start(1, timeout=1)
    assert node.status() == 1
    one_line(node, "node 0 (127.0.0.1)", f"port {cluster.port}", "1 s", "Connection refused")


def test_a_port_in_use(cluster):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", cluster.port))
        taken.listen()
        node = cluster.start(0)
        assert node.status() == 1
        one_line(node, f"port {cluster.port}", "in use", f"process {os.getpid()}", "--ctrl_port")
        # And what listens there speaks another language.
        node = cluster.start(1, timeout=1, limits={"HELLO_SECONDS": 0.3, "BEAT_SECONDS": 0.1})
        assert node.status() == 1
        one_line(node, "node 0 (127.0.0.1) did not answer", "does not answer")


def hello(**fields) -> bytes:
    words = {"kind": "hello", "magic": MAGIC, "protocol": PROTOCOL}
    return json.dumps(words | fields).encode() + b"\n"


def test_strangers_do_no_harm(cluster):
    garbage = (
        b"",
        b"\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(600),  # TLS
        b"[]\n",
        b"{}\n",
        b"[" * 0x4000 + b"\n",
        b"[" * 0x200000,
        b'{"kind":"hello"}\n',
        hello(node_rank="x"),
        hello(node_rank=float("inf")),
        hello(node_rank=1),
    )
    first = cluster.start(0, parts={"else": "wait(0.2)"})
    wait_for(lambda: not can_bind(cluster.port))
    with ExitStack() as strangers:
        for words in garbage:
            sock = socket.create_connection(("127.0.0.1", cluster.port))
            strangers.enter_context(sock).sendall(words)
        second = cluster.start(1, parts={"else": "wait(0.2)"})
        assert first.status() == second.status() == 0
    assert first.stderr() == second.stderr() == ""


def can_bind(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_two_nodes_of_one_rank(cluster):
    limits = {"TELL_SECONDS": 0.5}
    nodes = [cluster.start(rank, node_ips=LOOPBACK, limits=limits) for rank in (0, 1, 1)]
    assert [node.status() for node in nodes] == [2, 2, 2]
    for node in nodes:
        one_line(node, "two nodes say that they are node 1", "--node_rank")


def test_a_second_job_on_the_same_port_is_refused(cluster):
    nodes = cluster.pair()
    cluster.worker(1)
    late = cluster.start(1)
    assert late.status() == 1
    one_line(late, "already running on node 0 (127.0.0.1)")
    nodes[0].signal(signal.SIGTERM)
    assert [node.status() for node in nodes] == [143, 143]


def test_another_version(cluster):
    node = cluster.start(0, limits={"TELL_SECONDS": 0.5})
    wait_for(lambda: not can_bind(cluster.port))
    with socket.create_connection(("127.0.0.1", cluster.port)) as sock:
        sock.sendall(hello(protocol=99))
        answer = b""
        while b"another version" not in answer:
            answer += sock.recv(4096) or pytest.fail("no answer")
    assert node.status() == 2
    one_line(node, "127.0.0.1 runs another version")


def test_other_flags(cluster):
    nodes = cluster.start(0, devices=2), cluster.start(1, devices=1)
    assert [node.status() for node in nodes] == [2, 2]
    for node in nodes:
        one_line(node, "--gpu_num_per_node differs: 2 on node 0 (127.0.0.1), 1 on ")


def test_other_facts(cluster):
    facts = {"versions": {"oneflow": "0.9.0"}, "data": {"examples": 50}}
    nodes = (
        cluster.start(0, facts=facts),
        cluster.start(1, facts=facts | {"data": {"examples": 51}}),
    )
    assert [node.status() for node in nodes] == [2, 2]
    for node in nodes:
        one_line(node, "data examples differs: 50 on node 0 (127.0.0.1), 51 on node 1 (127.0.0.2)")


def test_two_nodes_of_one_address(cluster):
    """Both connect from 127.0.0.1: OneFlow would wait for devices that are not there."""
    nodes = [cluster.start(rank, facts={"device": "cuda"}) for rank in range(2)]
    assert [node.status() for node in nodes] == [2, 2]
    for node in nodes:
        one_line(node, "node 0 (127.0.0.1) and node 1 (127.0.0.2) both have the address 127.0.0.1")


@pytest.mark.parametrize("where", [0, 1])
def test_a_node_that_cannot(cluster, where):
    error = "--train_data_dir: there is no directory x"
    nodes = [cluster.start(rank, error=error if rank == where else "") for rank in range(2)]
    assert [node.status() for node in nodes] == [2, 2]
    for node in nodes:
        one_line(node, f"error: node {where} ({LOOPBACK[where]}): {error}")


def test_one_node_that_cannot(cluster):
    parent = cluster.start(None, node_ips=(), devices=2, error="--seed is bad")
    assert parent.status() == 2 and parent.lines() == ["train.py: error: --seed is bad"]


# Jobs in which a worker dies.


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_that_is_killed(cluster, rank):
    """The others abort as OneFlow's do, and rank 0 among them writes a native stack."""
    parts = {
        str(other): "while not (directory / 'dead').exists(): time.sleep(0.05)\n"
        "time.sleep(0.3); print('lost', file=sys.stderr); crash()"
        for other in range(4)
    }
    parts[str(rank)] = "subprocess.Popen(['sleep', '60']); wait()"  # which ends with it
    nodes = cluster.pair(devices=2, parts=parts)
    for other in range(4):
        cluster.worker(other)
    os.kill(cluster.worker(rank), signal.SIGKILL)
    (cluster.directory / "dead").touch()
    assert [node.status() for node in nodes] == [1, 1]
    at = rank // 2
    for node in nodes:
        one_line(node, f"error: rank {rank} on node {at} ({LOOPBACK[at]}) was killed by SIGKILL (")


@pytest.mark.parametrize(("rank", "status"), [(0, 1), (1, 2)])
def test_a_worker_that_says_why(cluster, rank, status):
    parts = {str(rank): f"error('the loss is nan', {status})", str(1 - rank): "wait(0.3); crash()"}
    nodes = cluster.pair(parts=parts)
    assert [node.status() for node in nodes] == [status, status]
    for node in nodes:
        one_line(node, f"rank {rank} on node {rank} ({LOOPBACK[rank]}): the loss is nan; all")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_raises(cluster, rank):
    nodes = cluster.pair(parts={str(rank): "raise KeyError('x')"})
    assert [node.status() for node in nodes] == [1, 1]
    for node in nodes:
        assert (
            f"rank {rank} on node {rank} ({LOOPBACK[rank]}) failed: KeyError: 'x'"
            in (node.lines()[0])
        )
    assert "    Traceback (most recent call last):" in nodes[0].lines()
    assert len(nodes[1].lines()) == 1


@pytest.mark.parametrize("rank", [0, 3])
def test_a_worker_whose_last_words_are_known(cluster, rank):
    lines = "crash('Check failed: cudaMalloc(&p, n) : out of memory (2)')"
    nodes = cluster.pair(devices=2, parts={str(rank): lines}, known="out of memory")
    assert [node.status() for node in nodes] == [1, 1]
    said = f"rank {rank} on node {rank // 2} ({LOOPBACK[rank // 2]}): what device {rank % 2} said"
    for node in nodes:
        one_line(node, said)


def test_a_job_of_one_process_speaks_for_itself(cluster):
    """No checks before it, what it says itself, and what is known of its crash, without a rank."""
    for lines, status, said in (
        ("error('no such file', 2)", 2, ["train.py: error: no such file"]),
        (
            "print('train.py: error: a', file=sys.stderr); sys.stderr.write('b'); sys.exit(1)",
            1,
            ["train.py: error: a", "b"],
        ),
        (
            "crash('cudaMalloc : out of memory (2)')",
            1,
            ["train.py: error: what device 0 said is known"],
        ),
        (
            "crash()",
            1,
            ["train.py: error: the process was killed by SIGABRT: Check failed: something"],
        ),
        ("1 / 0", 1, ["Traceback (most recent call last):"]),
    ):
        node = cluster.start(
            0, node_ips=(), parts={"0": lines}, error="not asked", known="out of memory"
        )
        assert node.status() == status
        assert node.lines()[: len(said)] == said
        if "crash()" not in lines and "1 / 0" not in lines:
            assert len(node.lines()) == len(said)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_aborts(cluster, rank):
    nodes = cluster.pair(parts={str(rank): "print('fine', file=sys.stderr); crash()"})
    assert [node.status() for node in nodes] == [1, 1]
    said = [line for line in nodes[0].lines() if line != "fine"][0]
    for line in (said, nodes[1].lines()[0]):
        assert f"rank {rank} on node {rank} ({LOOPBACK[rank]}) was killed by SIGABRT" in line
        assert "Check failed: something" in line
    assert any("0x7f0123456789" in line for line in nodes[0].lines()[1:])


def test_workers_that_ignore_sigterm_and_have_children(cluster):
    child = "subprocess.Popen(['sleep', '60']); "
    deaf = child + "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    nodes = cluster.pair(devices=2, parts={"else": deaf, "2": child + "wait(1); error('full')"})
    assert [node.status() for node in nodes] == [1, 1]
    for node in nodes:
        one_line(node, "rank 2 on node 1 (127.0.0.2): full")


def test_a_command_that_does_not_exist(tmp_path):
    command = [str(tmp_path / "none")]
    code = (
        "import sys; from cnns.launch.job import Job; from cnns.launch.parent import launch; "
        f"sys.exit(launch({command}, job=Job(processes_per_node=2), facts=dict))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr.splitlines()[0]


# Jobs in which a parent or the network dies.


@pytest.mark.parametrize("victim", [0, 1])
def test_a_parent_that_is_killed(cluster, victim):
    deaf = "subprocess.Popen(['sleep', '60'])\n"
    deaf += "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    nodes = cluster.pair(devices=2, parts={"else": deaf})
    for rank in range(4):
        cluster.worker(rank)
    nodes[victim].process.kill()
    assert nodes[1 - victim].status() == 1
    one_line(nodes[1 - victim], f"node {victim} ({LOOPBACK[victim]}) is gone")


def test_a_third_node_hears_of_a_second_one(cluster):
    nodes = [cluster.start(rank, node_ips=LOOPBACK) for rank in range(3)]
    for rank in range(3):
        cluster.worker(rank)
    nodes[1].process.kill()
    assert [nodes[0].status(), nodes[2].status()] == [1, 1]
    for node in nodes[0], nodes[2]:
        one_line(node, "node 1 (127.0.0.2) is gone")


def test_a_parent_that_stands_still(cluster):
    nodes = cluster.pair(limits={"SILENCE_SECONDS": 1.5})
    cluster.worker(0), cluster.worker(1)
    nodes[1].signal(signal.SIGSTOP)
    assert nodes[0].status() == 1
    one_line(nodes[0], "node 1 (127.0.0.2) was not heard from for 1.5 s")
    nodes[1].signal(signal.SIGCONT)
    assert nodes[1].status() == 1
    one_line(nodes[1], "node 0 (127.0.0.1) is gone")


@needs_namespaces
def test_a_cable_that_is_cut(cluster, nodes):
    """Nobody is told, so that only silence can end this; with the real limits."""
    ips = [node.address for node in nodes]
    parents = [
        cluster.start(None, node_ips=ips, prefix=node.command(), limits=REAL) for node in nodes
    ]
    cluster.worker(0), cluster.worker(1)
    nodes[1].cut()
    assert [parent.status() for parent in parents] == [1, 1]
    one_line(parents[0], "node 1 (10.77.0.2) was not heard from for 10 s")
    one_line(parents[1], "node 0 (10.77.0.1) was not heard from for 10 s")


@needs_namespaces
@pytest.mark.parametrize("rank", [0, 3])
def test_two_machines(cluster, nodes, rank):
    ips = [node.address for node in nodes]
    parents = [
        cluster.start(None, node_ips=ips, prefix=node.command(), devices=2) for node in nodes
    ]
    for other in range(4):
        cluster.worker(other)
    assert cluster.environ(3)["MASTER_ADDR"] == "10.77.0.1"
    os.kill(cluster.worker(rank), signal.SIGKILL)
    assert [parent.status() for parent in parents] == [1, 1]
    at = f"node {rank // 2} (10.77.0.{rank // 2 + 1})"
    for parent in parents:
        assert f"rank {rank} on {at} was killed by SIGKILL" in parent.lines()[0]


# Signals.


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGINT, 0), (signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 0)],
)
def test_a_signal_reaches_every_worker_once(cluster, number, where):
    nodes = cluster.pair(devices=2)
    for rank in range(4):
        cluster.worker(rank)
    nodes[where].signal(number)
    assert [node.status() for node in nodes] == [128 + number] * 2
    assert nodes[0].lines() == [f"signals [{int(number)}]"] and nodes[1].lines() == []


@pytest.mark.parametrize("where", [0, 1])
def test_a_lost_connection_on_one_node(cluster, where):
    """The other was started by nohup, and its workers ignore SIGHUP: they get SIGTERM."""
    nodes = [cluster.start(rank, prefix=() if rank == where else ("nohup",)) for rank in range(2)]
    cluster.worker(0), cluster.worker(1)
    nodes[1 - where].signal(signal.SIGHUP)
    time.sleep(0.3)
    assert [node.process.poll() for node in nodes] == [None, None]
    nodes[where].signal(signal.SIGHUP)
    assert [node.status() for node in nodes] == [129, 129]
    got = signal.SIGHUP if where == 0 else signal.SIGTERM
    assert nodes[0].lines()[-1] == f"signals [{int(got)}]"


def test_ctrl_c_in_a_terminal(cluster):
    """It goes to the whole process group of the parent, in which no worker is."""
    parent = cluster.start(None, node_ips=(), devices=2, prefix=("setsid",))
    cluster.worker(0), cluster.worker(1)
    os.killpg(parent.process.pid, signal.SIGINT)
    assert parent.status() == 130
    assert parent.lines() == ["signals [2]"]


def test_a_signal_to_all_parents(cluster):
    """As a scheduler sends it, and twice in a moment as `timeout` does."""
    nodes = cluster.pair()
    for rank in range(2):
        cluster.worker(rank)
    for node in (*nodes, *nodes):
        node.signal(signal.SIGTERM)
    assert [node.status() for node in nodes] == [143, 143]
    assert nodes[0].lines() == ["signals [15]"]


@pytest.mark.parametrize("where", [0, 1])
def test_a_second_signal(cluster, where):
    parts = {"else": "wait(); (directory / f'asked.{rank}').touch(); time.sleep(60)"}
    nodes = cluster.pair(parts=parts, limits={"SAME_SIGNAL_SECONDS": 0.2})
    for rank in range(2):
        cluster.worker(rank)
    nodes[where].signal(signal.SIGINT)
    for rank in range(2):
        wait_for(lambda rank=rank: (cluster.directory / f"asked.{rank}").exists())
    time.sleep(0.3)
    assert [node.process.poll() for node in nodes] == [None, None]
    nodes[where].signal(signal.SIGINT)
    assert [node.status(5) for node in nodes] == [130, 130]
    for node in nodes:
        one_line(node, f"ended at once by SIGINT on node {where}")


def test_workers_that_do_not_end_after_a_signal(cluster):
    parent = cluster.start(
        None, node_ips=(), parts={"0": "wait(); time.sleep(60)"}, limits={"STOP_SECONDS": 0.5}
    )
    cluster.worker(0)
    parent.signal(signal.SIGTERM)
    assert parent.status() == 143
    one_line(parent, "did not end after SIGTERM")


def test_a_worker_that_fails_after_a_signal(cluster):
    nodes = cluster.pair(parts={"1": "wait(); error('the disk is full')"})
    cluster.worker(0), cluster.worker(1)
    nodes[0].signal(signal.SIGTERM)
    assert [node.status() for node in nodes] == [1, 1]
    assert "rank 1 on node 1 (127.0.0.2): the disk is full" in nodes[1].lines()[0]


def test_aborts_after_a_signal_are_its_effect(cluster):
    nodes = cluster.pair(parts={"0": "wait(); time.sleep(0.3); crash()", "1": "until_told()"})
    cluster.worker(0), cluster.worker(1)
    nodes[0].signal(signal.SIGINT)
    assert [node.status() for node in nodes] == [130, 130]
    assert nodes[0].lines() == nodes[1].lines() == []


@pytest.mark.parametrize("where", [0, 1])
def test_a_signal_while_nodes_come_together(cluster, where):
    nodes = [cluster.start(rank, node_ips=LOOPBACK) for rank in range(2)]
    wait_for(lambda: connections(cluster.port) >= 1)
    nodes[where].signal(signal.SIGINT)
    assert [node.status() for node in nodes] == [130, 130]
    for node in nodes:
        one_line(node, "interrupted")


def connections(port: int) -> int:
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    established = [row.split()[1:3] for row in rows if row.split()[3] == "01"]
    return sum(int(local.rpartition(":")[2], 16) == port for local, _ in established)


def test_a_signal_before_node_0_is_there(cluster):
    node = cluster.start(1)
    wait_for(lambda: node.catches(signal.SIGTERM))
    node.signal(signal.SIGTERM)
    assert node.status() == 143
