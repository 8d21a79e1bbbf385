"""What other launchers say in the environment of a process: its rank, and where rank 0 is.

Nothing here needs OneFlow.
"""

import os
import re
import socket
import zlib
from argparse import Namespace
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from cnns.errors import UsageError
from cnns.launch.job import CTRL_PORT, START_TIMEOUT, Job, make_job

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NODES_MARK = "CNNS_NODES"  # nodes and processes on each, as the ranks have found them
MAX_PROCESSES = 1 << 16
# Ports derived from a job's number: below those that systems give to outgoing connections.
FIRST_PORT, NUM_PORT_PAIRS = 20000, 5000


@dataclass(frozen=True)
class Place:
    """What is told of this process. A `world_size` of 1 is not told."""

    source: str  # of the rank, as messages name it
    rank: int
    world_size: int
    local_rank: int
    address: str  # of rank 0; "": not told
    master_port: int | None  # that OneFlow is to take; None: not told
    host: str  # of this process, as messages name it


@dataclass(frozen=True)
class RankJob(Job):
    """A job whose ranks were started by others: each is a node with one process."""

    place: Place | None = None
    devices: int = 0  # CUDA devices that this process may use
    oneflow_port: int = 0
    hosts: dict[int, str] = field(default_factory=dict)  # of the ranks that have connected

    @property
    def master_port(self) -> int:
        return self.oneflow_port

    @property
    def local_rank(self) -> int:
        assert self.place is not None
        return self.place.local_rank

    @property
    def machine(self) -> dict:
        assert self.place is not None
        return {"host": self.place.host, "devices": self.devices}

    @property
    def flags(self) -> dict:
        return {"the number of ranks": self.num_nodes}

    def name_parent(self, node_rank: int) -> str:
        return self.name_node(node_rank)

    def name_node(self, node_rank: int) -> str:
        host = self.hosts.get(node_rank) or (self.node_ips[0] if node_rank == 0 else "")
        return f"rank {node_rank} on {host}" if host else f"rank {node_rank}"

    def name_rank(self, rank: int) -> str:
        return self.name_node(rank)


# What the environment says.


def number(environ: Mapping[str, str], name: str, low: int = 0, high: int = MAX_PROCESSES) -> int:
    """The value of a variable. Raises UsageError."""
    text = environ.get(name, "")
    digits = len(str(high))  # more of them, of which Python reads some thousands, are too many
    if not text.isdecimal() or len(text) > digits or not low <= int(text) <= high:
        needed = f"a whole number from {low} to {high}"
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        what = f"{shown!a}, and {needed} is needed" if text else "not set"
        raise UsageError(f"the environment variable {name} is {what}; see docs/clusters.md")
    return int(text)


def find_place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands among those of a launcher; None: it was started by itself.

    The launcher that is nearest to the process counts: variables that were set for it alone, then
    MPI, which Slurm may have started in turn. Raises UsageError.
    """
    found = None
    if environ.get("WORLD_SIZE", "1") not in ("", "1"):
        local = number(environ, "LOCAL_RANK") if environ.get("LOCAL_RANK") else 0
        found = "RANK", number(environ, "RANK"), number(environ, "WORLD_SIZE", 1), local, ""
    elif "OMPI_COMM_WORLD_RANK" in environ:
        found = from_mpi(environ, "OMPI_COMM_WORLD_", "LOCAL_RANK", "LOCAL_SIZE")
    elif "PMI_RANK" in environ and not is_slurm_step(environ):
        found = from_mpi(environ, "PMI_", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif is_slurm_step(environ):
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        found = (
            "SLURM_PROCID",
            number(environ, "SLURM_PROCID"),
            number(environ, "SLURM_STEP_NUM_TASKS", 1),
            number(environ, "SLURM_LOCALID"),
            first_host(nodes),
        )
    if found is None or found[2] == 1:
        return None
    source, rank, world_size, local_rank, address = found
    if rank >= world_size:
        raise UsageError(
            f"the environment says that this is rank {rank} of {world_size}; ranks count from 0"
        )
    address = environ.get("MASTER_ADDR") or address
    return Place(
        source=source,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        address=address,
        master_port=find_port(environ),
        host=environ.get("SLURMD_NODENAME") or socket.gethostname(),
    )


def is_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process. A batch script has a rank and a number of tasks too,
    but not the one of a step.
    """
    return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ


def from_mpi(
    environ: Mapping[str, str], prefix: str, local_rank: str, local_size: str
) -> tuple[str, int, int, int, str]:
    local_rank, local_size = (
        name if name.startswith("MPI_") else prefix + name for name in (local_rank, local_size)
    )
    size = number(environ, f"{prefix}SIZE", 1)
    local = number(environ, local_rank) if local_rank in environ else 0
    address = "127.0.0.1" if environ.get(local_size) == str(size) else ""
    return f"{prefix}RANK", number(environ, f"{prefix}RANK"), size, local, address


def find_port(environ: Mapping[str, str]) -> int | None:
    """The port for OneFlow: as it is told, else derived from the number of the job."""
    if environ.get("MASTER_PORT"):
        return number(environ, "MASTER_PORT", 1, 65534)  # the next one is taken as well
    for names in (("OMPI_MCA_ess_base_jobid",), ("SLURM_JOB_ID", "SLURM_STEP_ID")):
        job = [environ.get(name, "") for name in names]
        if all(job):
            return FIRST_PORT + 2 * (zlib.crc32(".".join(job).encode()) % NUM_PORT_PAIRS)
    return None


def first_host(nodes: str) -> str:
    """The first host of Slurm's list of nodes: `n[01-03,7],m` begins with `n01`."""
    hosts = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    parts = re.split(r"\[([^\]]*)\]", hosts[0] if hosts else "")
    firsts = [re.split("[,-]", part)[0] if i % 2 else part for i, part in enumerate(parts)]
    return "".join(firsts)


# What this process takes of it.

place: Place | None = None  # of this process, as `take_place` found it


def take_place(environ: MutableMapping[str, str] = os.environ) -> None:
    """Note the place of this process, and hide it from OneFlow, which would wait for the others
    while it is imported: before that they compare what they are about to do. Raises UsageError.
    """
    global place
    place = find_place(environ)
    for name in VARIABLES:
        environ.pop(name, None)


def nodes() -> tuple[int, int] | None:
    """In a rank that runs: the number of nodes, and of processes on each; None elsewhere."""
    words = os.environ.get(NODES_MARK, "").split("x")
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def take_numbers(given: Namespace) -> None:
    """Put the numbers of nodes and processes that are told in the place of the flags.

    With --node_ips under MPI or Slurm, the script starts its processes itself, from one process on
    each node. Raises UsageError where flags contradict what is told.
    """
    global place
    found = nodes()
    if place is not None and place.source != "RANK" and "node_ips" in given:
        place = None
    if place is not None:
        check_flags(place, vars(given))
        found = place.world_size, 1  # until the ranks know better
    if found is not None:
        given.num_nodes, given.gpu_num_per_node = found


def check_flags(place: Place, given: Mapping[str, object]) -> None:
    """Refuse flags that contradict what the environment says. Raises UsageError."""
    size = place.world_size
    told = f"the environment says that this is rank {place.rank} of {size} ({place.source})"
    num_nodes, each = given.get("num_nodes"), given.get("gpu_num_per_node")
    fits = any(
        size % n == 0 and num_nodes in (None, n) and each in (None, size // n)
        for n in range(1, size + 1)
    )
    names = [n for n in ("num_nodes", "gpu_num_per_node") if n in given] if not fits else []
    names += [n for n in ("node_ips", "node_rank") if n in given]
    names += [n for n in ("ctrl_port",) if n in given and place.master_port is not None]
    if names:
        flags = " ".join(f"--{n}={show(given[n])}" for n in names)
        raise UsageError(f"{flags}: {told}, where rank 0 is and which port is used; leave it out")


def show(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def refuse_ranks(what: str) -> None:
    """For what is one process: raise UsageError where a launcher has started several."""
    if place is not None:
        if place.rank > 0:  # once is enough
            raise SystemExit(UsageError.exit_status)
        raise UsageError(
            f"{what} runs in one process, and this is one of {place.world_size} ({place.source} in "
            "the environment); start it once"
        )


def make_rank_job(
    place: Place, *, ctrl_port: int = CTRL_PORT, start_timeout: float = START_TIMEOUT
) -> RankJob:
    """The job of this rank. Raises UsageError where nobody has said where rank 0 is."""
    if not place.address:
        raise UsageError(
            f"{place.source} is set, and MASTER_ADDR is not, which has to be the address of rank 0 "
            "(mpirun on several machines: -x MASTER_ADDR=<first host>)"
        )
    port = place.master_port
    return RankJob(
        num_nodes=place.world_size,
        node_rank=place.rank,
        node_ips=(place.address,),
        ctrl_port=ctrl_port if port is None else port + 1,
        start_timeout=start_timeout,
        port_name="--ctrl_port" if port is None else "MASTER_PORT",
        place=place,
        oneflow_port=ctrl_port + 1 if port is None else port,
        hosts={place.rank: place.host},
    )


def find_job(args: Namespace) -> Job:
    """The job of the flags, or the one that another launcher has started. Raises UsageError."""
    if place is not None:
        return make_rank_job(place, ctrl_port=args.ctrl_port, start_timeout=args.start_timeout)
    return make_job(
        num_nodes=args.num_nodes,
        node_ips=args.node_ips,
        processes_per_node=args.gpu_num_per_node,
        ctrl_port=args.ctrl_port,
        node_rank=args.node_rank,
        start_timeout=args.start_timeout,
    )
