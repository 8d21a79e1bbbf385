"""Flags of machines, devices and what they say to one another."""

from cnns.flags.network import PRECISION_FLAGS
from cnns.flags.parser import Flag
from cnns.flags.values import COUNT, addresses, number
from cnns.launch.job import CTRL_PORT, START_TIMEOUT

DEVICE_FLAGS = {
    "device": Flag(
        "auto takes CUDA where there is one and says which it took",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        of="start",
    ),
    "num_nodes": Flag("number of machines", COUNT, 1, of="start"),
    "node_ips": Flag(
        "addresses of the machines, joined by commas, the same on each; the first prints and saves",
        addresses,
        of="start",
    ),
    "node_rank": Flag(
        "which of --node_ips this machine is, from 0",
        number(int, 0),
        otherwise="found by its own addresses, else as the scheduler says (Slurm, Open MPI, PMI, "
        "PBS)",
        of="node",
    ),
    "gpu_num_per_node": Flag(
        "GPUs per machine, one process each; on a CPU, the number of processes",
        COUNT,
        1,
        of="start",
    ),
    "ctrl_port": Flag(
        "TCP port of the first machine to which the others connect; OneFlow takes the next one",
        number(int, 1, 65535),
        CTRL_PORT,
        of="node",
    ),
    "start_timeout": Flag(
        "seconds within which all machines have to connect",
        number(float, 0, above=True),
        START_TIMEOUT,
        of="node",
    ),
}
CUDA_TRAINING_FLAGS = {
    "gpu_image_decoder": Flag(
        "decode and crop training images on the GPU; OFRecord parts only, and a resumed run then "
        "reads from the beginning of its parts, in another order than one that never stopped",
        default=False,
        cuda=True,
    ),
    "nccl_fusion_threshold_mb": Flag(
        "fuse gradients into all-reduces of up to this many MB",
        COUNT,
        otherwise="OneFlow's default",
        cuda=True,
    ),
    "nccl_fusion_max_ops": Flag(
        "join at most so many gradients in a piece", COUNT, otherwise="OneFlow's default", cuda=True
    ),
}
CUDA_FLAGS = [name for name, f in (PRECISION_FLAGS | CUDA_TRAINING_FLAGS).items() if f.cuda]
