"""What other launchers say in the environment, and flags that contradict it."""

from argparse import Namespace

import pytest

from cnns.errors import UsageError
from cnns.launch import external
from cnns.launch.external import find_place, first_host, make_rank_job

POD = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0.svc", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURMD_NODENAME": "gpu08",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "838467585",
}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.fixture(autouse=True)
def _no_place(monkeypatch):
    monkeypatch.setattr(external, "place", None)


def facts(environ):
    place = find_place(environ)
    return place and (place.rank, place.world_size, place.local_rank, place.address)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        (POD, (3, 4, 0, "pod-0.svc")),
        (POD | {"LOCAL_RANK": "1"}, (3, 4, 1, "pod-0.svc")),
        (STEP, (5, 8, 1, "gpu07")),
        (STEP | {"MASTER_ADDR": "10.0.0.1"}, (5, 8, 1, "10.0.0.1")),
        # A batch script has these as well; only a step has the number of its own tasks.
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NUM_TASKS"}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (MPI, (1, 2, 1, "127.0.0.1")),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (1, 2, 1, "")),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "a"}, (1, 2, 1, "a")),
        (PMI, (2, 4, 0, "")),
        (PMI | {"MPI_LOCALNRANKS": "4"}, (2, 4, 0, "127.0.0.1")),
        # mpirun within a job of Slurm; srun --mpi=pmi2.
        (STEP | MPI, (1, 2, 1, "127.0.0.1")),
        (STEP | {"PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1, "gpu07")),
        (STEP | POD, (3, 4, 0, "pod-0.svc")),
    ],
)
def test_places(environ, expected):
    assert facts(environ) == expected


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["RANK is not set", "docs/clusters.md"]),
        (POD | {"RANK": "4"}, ["rank 4 of 4"]),
        (POD | {"RANK": "-1"}, ["RANK is '-1'"]),
        (POD | {"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'"]),
        (POD | {"MASTER_PORT": "65535"}, ["MASTER_PORT is '65535'", "from 1 to 65534"]),
        (POD | {"MASTER_PORT": "9" * 5000}, ["MASTER_PORT is '999", "...', and a whole number"]),
        (POD | {"WORLD_SIZE": "1000000000"}, ["WORLD_SIZE is '1000000000'", "from 1 to 65536"]),
        (POD | {"RANK": "9" * 5000}, ["RANK is '999"]),
        (POD | {"RANK": "\x1b[2J"}, [r"RANK is '\x1b[2J'"]),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE is not set"]),
    ],
)
def test_what_cannot_be_told(environ, words):
    with pytest.raises(UsageError) as error:
        find_place(environ)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-3,7]", "n1"),
        ("n[7,1-3]", "n7"),
        ("gpu[007-012]", "gpu007"),
        ("a-1.b,c[1-2]", "a-1.b"),
        ("r[1-2]n[3,5]-ib,x", "r1n3-ib"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_ports():
    job = make_rank_job(find_place(POD))
    assert (job.master_port, job.ctrl_port, job.port_name) == (29500, 29501, "MASTER_PORT")
    first, second = (make_rank_job(find_place(STEP | {"SLURM_JOB_ID": n})) for n in ("7", "8"))
    assert first.ctrl_port == first.master_port + 1 and first.master_port != second.master_port
    assert 20000 <= first.master_port < 30000
    assert first.master_port == make_rank_job(find_place(STEP | {"SLURM_PROCID": "0"})).master_port
    without = {name: value for name, value in POD.items() if name != "MASTER_PORT"}
    job = make_rank_job(find_place(without), ctrl_port=4000)
    assert (job.ctrl_port, job.master_port, job.port_name) == (4000, 4001, "--ctrl_port")


def test_mpi_on_several_machines_needs_an_address():
    with pytest.raises(UsageError, match="MASTER_ADDR is not.*-x MASTER_ADDR"):
        make_rank_job(find_place(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}))


def test_variables_are_hidden_from_oneflow():
    environ = POD | {"LOCAL_RANK": "0", "OTHER": "1"}
    external.take_place(environ)
    assert environ == {"OTHER": "1"} and external.place.rank == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, []),
        ({"num_nodes": 2}, []),
        ({"num_nodes": 2, "gpu_num_per_node": 2}, []),
        ({"num_nodes": 3}, ["--num_nodes=3", "rank 3 of 4 (RANK)"]),
        ({"num_nodes": 2, "gpu_num_per_node": 1}, ["--num_nodes=2 --gpu_num_per_node=1"]),
        ({"gpu_num_per_node": 8}, ["--gpu_num_per_node=8"]),
        ({"node_ips": ("a", "b")}, ["--node_ips=a,b"]),
        ({"node_rank": 1}, ["--node_rank=1"]),
        ({"ctrl_port": 1}, ["--ctrl_port=1"]),
    ],
)
def test_flags_that_contradict(flags, words):
    external.take_place(dict(POD))
    given = Namespace(**flags)
    if not words:
        external.take_numbers(given)
        assert (given.num_nodes, given.gpu_num_per_node) == (4, 1)
        return
    with pytest.raises(UsageError) as error:
        external.take_numbers(given)
    for word in words:
        assert word in str(error.value)


def test_node_ips_under_slurm_ask_for_a_parent_of_ours():
    external.take_place(dict(STEP))
    given = Namespace(num_nodes=8, gpu_num_per_node=8, node_ips=("a",) * 8)
    external.take_numbers(given)
    assert external.place is None and given.gpu_num_per_node == 8


def test_what_is_one_process():
    external.refuse_ranks("classifying")
    external.take_place(dict(POD | {"RANK": "0"}))
    with pytest.raises(UsageError, match="classifying runs in one process, and this is one of 4"):
        external.refuse_ranks("classifying")
    external.take_place(dict(POD))
    with pytest.raises(SystemExit):  # rank 0 has said it
        external.refuse_ranks("classifying")
