"""Who takes part in a job: nodes, ranks, addresses and ports."""

import glob
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cnns.errors import RunError, UsageError

# A scheduler's number of this node, and the number of nodes (one process on each) that it counts.
SCHEDULERS = (
    ("SLURM_NODEID", "SLURM_NNODES"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PBS_NODENUM", "PBS_NUM_NODES"),
)
CTRL_PORT = 50051
START_TIMEOUT = 120.0  # seconds
LISTENING = "0A"  # in /proc/net/tcp


@dataclass(frozen=True)
class Job:
    """What a parent knows of the job from its flags. `node_ips` may be empty for one node."""

    num_nodes: int = 1
    node_rank: int = 0
    node_ips: tuple[str, ...] = ()
    processes_per_node: int = 1
    ctrl_port: int = CTRL_PORT
    start_timeout: float = START_TIMEOUT
    port_name: str = "--ctrl_port"  # what sets it

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.processes_per_node

    @property
    def ranks(self) -> range:
        """The ranks of this node's workers."""
        first = self.node_rank * self.processes_per_node
        return range(first, first + self.processes_per_node)

    @property
    def master_port(self) -> int:
        """The port that OneFlow takes on the first of several nodes."""
        return self.ctrl_port + 1

    @property
    def machine(self) -> dict:
        """What node 0 has to know of this machine, beside what has to be the same on each."""
        return {}

    def name_parent(self, node_rank: int) -> str:
        return f"the launching process of {self.name_node(node_rank)}"

    def name_node(self, node_rank: int) -> str:
        """A node as messages name it."""
        address = f" ({self.node_ips[node_rank]})" if self.node_ips else ""
        return f"node {node_rank}{address}"

    def name_rank(self, rank: int) -> str:
        return f"rank {rank} on {self.name_node(rank // self.processes_per_node)}"

    @property
    def flags(self) -> dict:
        """The flags that have to be the same on every node."""
        return {
            "--num_nodes": self.num_nodes,
            "--node_ips": ",".join(self.node_ips),
            "--gpu_num_per_node": self.processes_per_node,
        }


def make_job(
    *,
    num_nodes: int,
    node_ips: Sequence[str] | None,
    processes_per_node: int,
    ctrl_port: int,
    node_rank: int | None = None,
    start_timeout: float = START_TIMEOUT,
    environ: Mapping[str, str] = os.environ,
) -> Job:
    """The job of these flags, seen from this machine. Raises UsageError where they do not fit."""
    node_ips = tuple(node_ips or ())
    if num_nodes > 1 and not node_ips:
        raise UsageError(
            f"--num_nodes={num_nodes} needs --node_ips: the addresses of all nodes, node 0 first, "
            "joined by commas, the same on every node"
        )
    if node_ips:
        check_addresses(num_nodes, node_ips)
    if node_rank is not None and not 0 <= node_rank < num_nodes:
        raise UsageError(
            f"--node_rank={node_rank} must be at least 0 and less than --num_nodes={num_nodes}"
        )
    if node_rank is None:
        node_rank = find_node_rank(node_ips, environ) if num_nodes > 1 else 0
    return Job(num_nodes, node_rank, node_ips, processes_per_node, ctrl_port, start_timeout)


def check_addresses(num_nodes: int, node_ips: Sequence[str]) -> None:
    listed = ",".join(node_ips)
    if len(node_ips) != num_nodes:
        raise UsageError(
            f"--node_ips={listed} has {len(node_ips)} addresses and --num_nodes is {num_nodes}; "
            "they must agree"
        )
    for i, ip in enumerate(node_ips):
        if ip in node_ips[:i]:
            raise UsageError(f"--node_ips={listed} names {ip} twice; give each node its own")
        address = parse_address(ip)
        if address is None:
            continue
        if address.version != 4:  # its bootstrap server checks the peer's family, and aborts
            raise UsageError(
                f"--node_ips: {ip} is not an IPv4 address, and OneFlow 0.9.0 uses no other"
            )
        if address.is_unspecified or address.is_multicast:
            raise UsageError(f"--node_ips: {ip} is not the address of a machine")


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for a host name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def resolve(host: str) -> str:
    """The IPv4 address of an address or host name. Raises UsageError."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
        return str(found[0][4][0])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--node_ips: no IPv4 address is known for {host!r} ({why})") from None


def is_own_address(host: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((resolve(host), 0))
    except (OSError, UsageError):
        return False
    return True


def find_node_rank(node_ips: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Which node this machine is, by its own addresses, or as the scheduler says.

    Raises UsageError where that cannot be told.
    """
    own = [i for i, host in enumerate(node_ips) if is_own_address(host)]
    if len(own) == 1:
        return own[0]
    listed = ",".join(node_ips)
    if own:
        raise UsageError(
            f"--node_ips={listed}: {' and '.join(node_ips[i] for i in own)} are both addresses of "
            "this machine; say with --node_rank which node this is"
        )
    for rank_name, size_name in SCHEDULERS:
        rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
        # A scheduler that counts something else than nodes does not know which node this is.
        if size == str(len(node_ips)) and rank.isdecimal() and int(rank) < len(node_ips):
            return int(rank)
    raise UsageError(
        f"--node_ips={listed}: none of them is an address of this machine; correct the list, or "
        "say with --node_rank which node this is"
    )


def who_listens(port: int) -> str:
    """` by <program> (process <id>)` for a port in use on this machine, or nothing if unknown."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for row in map(str.split, Path(table).read_text().splitlines()[1:]):
                if row[3] == LISTENING and row[1].endswith(f":{port:04X}"):
                    sockets.add(f"socket:[{row[9]}]")
    for file in glob.iglob("/proc/[0-9]*/fd/*") if sockets else ():
        with suppress(OSError):  # the process has ended, or belongs to another user
            if os.readlink(file) in sockets:
                process = file.split("/")[2]
                name = Path(f"/proc/{process}/comm").read_text().strip()
                return f" by {name} (process {process})"
    return ""


def listen(job: Job) -> socket.socket:
    """The socket to which the other nodes connect. Raises RunError for a port in use."""
    host = job.node_ips[0]
    # On its own machine a host name may stand for 127.0.1.1.
    address = host if parse_address(host) and is_own_address(host) else ""
    try:
        sock = socket.create_server((address, job.ctrl_port))
    except OSError as error:
        raise RunError(
            f"{job.name_node(0)} cannot listen on port {job.ctrl_port}: {error.strerror}"
            f"{who_listens(job.ctrl_port)}; end that, or give every node another {job.port_name}"
        ) from None
    sock.setblocking(False)
    return sock


def reserve_port(preferred: int | None) -> socket.socket:
    """A socket bound to a TCP port that nobody uses: `preferred` if possible, else any.

    It is bound without SO_REUSEPORT, to see that the port is free, and gets that option afterwards,
    so that OneFlow's server, which sets it, can take the port, and nobody else until then.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind(("", preferred if preferred and preferred <= 65535 else 0))
    except OSError:
        sock.bind(("", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock
