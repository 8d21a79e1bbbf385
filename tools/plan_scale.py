"""Estimate time per step and epoch of ResNet-50 on 1 to 1,024 devices, and print tables.

python3 tools/plan_scale.py                                    # 8 devices a node, 100 Gb Ethernet
python3 tools/plan_scale.py --rate=2470 --batch_size_per_device=256 --use_fp16 --nic_gigabits=25
python3 tools/plan_scale.py --cores_per_node=64 --images_per_core=698
python3 tools/plan_scale.py --check                            # against published figures

A model and not a measurement. --check prints how far it is off where others have measured.
"""

import math
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cnns.environment  # noqa: F401  (first, see there)

from cnns.errors import UsageError, run_main
from cnns.flags.parser import Parser, add_switch
from cnns.flags.values import number

NUM_EXAMPLES = 1_281_167  # ImageNet's training images
PARAMETERS = 25_557_032  # of ResNet-50, gradients to add up
KERNELS = 25_502_912  # those of them whose gradients travel in half precision with --use_fp16
STATISTICS = 53_120  # running means and variances, float32
FUSION_BYTES = 16 << 20  # OneFlow 0.9.0's default for a group of gradients (resource.proto)
# Each product of the forward pass has two of its size in the backward pass, for the gradients of
# its input and of its weight.
BACKWARD_SHARE = 2 / 3
# NVLink in one direction, peak: 300 GB/s of an A100, 150 GB/s of a V100 (NVIDIA's data sheets).
NVLINK = {"a100": 300e9, "v100": 150e9}  # bytes/s
LINK_SECONDS = 5e-6  # assumed: one message within a machine
NIC_SECONDS = 20e-6  # assumed: one between machines
IMAGES_PER_CORE = 698  # docs/containers.md
DEVICES = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, in machines that are alike."""

    rate: float  # images/s of one device alone, measured
    batch_size: int  # of each device
    half: bool  # with --use_fp16
    per_node: int
    link: float  # bytes/s within a machine, in one direction
    nic: float  # bytes/s between machines, in one direction, of a machine
    loader: float = math.inf  # images/s that the processors of a machine prepare


def gradient_bytes(*, half: bool) -> int:
    """What a step adds up over the devices: gradients, and batch norms' statistics.

    Batch norms normalise each device's own images, so nothing else of theirs travels.
    """
    saved = 2 * KERNELS if half else 0
    return 4 * (PARAMETERS + STATISTICS) - saved


def ring_seconds(num_bytes: float, ranks: int, rate: float) -> float:
    """Of an all-reduce around a ring: each rank sends 2 (ranks - 1) pieces of 1/ranks of it.

    Patarasuk and Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002.
    """
    return 2 * (ranks - 1) / ranks * num_bytes / rate


def all_reduce_seconds(num_bytes: float, cluster: Cluster, devices: int) -> float:
    """Within each machine, then between them.

    Messages between machines follow a tree, so their number grows with its depth (NCCL since 2.4).
    """
    local = min(devices, cluster.per_node)
    nodes = math.ceil(devices / local)
    within = ring_seconds(num_bytes, local, cluster.link) + 2 * (local - 1) * LINK_SECONDS
    between = ring_seconds(num_bytes, nodes, cluster.nic) + 2 * math.log2(nodes) * NIC_SECONDS
    return within + between


def step_seconds(cluster: Cluster, devices: int) -> float:
    """Of a training step on so many devices.

    Gradients travel in groups, beside the backward pass that makes the next ones; the last group is
    there only when it has ended. Where the loader is slower than that, it sets the pace.
    """
    compute = cluster.batch_size / cluster.rate
    num_bytes = gradient_bytes(half=cluster.half)
    groups = math.ceil(num_bytes / FUSION_BYTES)
    group = all_reduce_seconds(num_bytes / groups, cluster, devices)
    late = max(0.0, (groups - 1) * group - BACKWARD_SHARE * compute) + group
    local = min(devices, cluster.per_node)
    return max(compute + late, local * cluster.batch_size / cluster.loader)


def throughput(cluster: Cluster, devices: int) -> float:
    """images/s of all devices."""
    return devices * cluster.batch_size / step_seconds(cluster, devices)


def epoch_seconds(cluster: Cluster, devices: int) -> float:
    """0 where a batch has more images than there are."""
    steps = NUM_EXAMPLES // (devices * cluster.batch_size)  # whole batches, as training takes them
    return steps * step_seconds(cluster, devices)


@dataclass(frozen=True)
class Published:
    """images/s that others measured, by the number of devices; that of one is what is given."""

    what: str
    batch_size: int
    half: bool
    link: float
    rates: dict[int, float]


# DLPerf, OneFlow 0.2, machines of 8 V100 with 100 Gb InfiniBand:
# github.com/Oneflow-Inc/DLPerf, OneFlow/ConvNets/resnet50_oneflow_v0.2_report_1009.md.
# NVIDIA, PyTorch 21.03: github.com/NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/
# resnet50v1.5/README.md, which does not name the batches; 256 and 128 are assumed.
PUBLISHED = (
    Published(
        "DLPerf, V100, float32",
        128,
        False,
        NVLINK["v100"],
        {1: 397.64, 8: 3130.34, 16: 6260.30, 32: 12411.97},
    ),
    Published(
        "DLPerf, V100, half",
        256,
        True,
        NVLINK["v100"],
        {1: 1472.72, 8: 10629.32, 16: 17920.40, 32: 33141.02},
    ),
    Published("NVIDIA, V100, float32", 128, False, NVLINK["v100"], {1: 367, 8: 2855}),
    Published("NVIDIA, V100, half", 256, True, NVLINK["v100"], {1: 1200, 8: 8322}),
    Published("NVIDIA, A100, TF32", 256, False, NVLINK["a100"], {1: 938, 8: 7248}),
    Published("NVIDIA, A100, half", 256, True, NVLINK["a100"], {1: 2470, 8: 16621}),
)
PUBLISHED_NIC = 12.5e9  # bytes/s: DLPerf's 100 Gb/s


def check_published() -> list[tuple[str, int, float, float]]:
    """What was measured, devices, images/s of theirs and of the model, for each but one device."""
    rows = []
    for each in PUBLISHED:
        cluster = Cluster(each.rates[1], each.batch_size, each.half, 8, each.link, PUBLISHED_NIC)
        for devices, rate in each.rates.items():
            if devices > 1:
                rows.append((each.what, devices, rate, throughput(cluster, devices)))
    return rows


def print_check() -> None:
    print("| published figure | devices | theirs, images/s | model | model off by |")
    print("|---|---:|---:|---:|---:|")
    for what, devices, theirs, model in check_published():
        print(f"| {what} | {devices} | {theirs:,.0f} | {model:,.0f} | {model / theirs - 1:+.1%} |")


def print_plan(cluster: Cluster) -> None:
    print("| devices | step, ms | of it waiting | images/s | of ideal | epoch, s |")
    print("|---:|---:|---:|---:|---:|---:|")
    compute = cluster.batch_size / cluster.rate
    for devices in DEVICES:
        step, rate = step_seconds(cluster, devices), throughput(cluster, devices)
        epoch = epoch_seconds(cluster, devices)
        print(
            f"| {devices:,} | {1000 * step:.1f} | {1000 * (step - compute):.1f} | {rate:,.0f} | "
            f"{rate / devices / cluster.rate:.1%} | {f'{epoch:,.1f}' if epoch else '-'} |"
        )


def make_parser() -> Parser:
    parser = Parser(
        "Estimate time per step and epoch of ResNet-50 on ImageNet on 1 to 1,024 devices, from the "
        "rate of one: computing, the all-reduce of gradients beside the backward pass, the loader. "
        "Prints a table. A model, not a measurement.",
        doc=__doc__,
        epilog="Read on: docs/scale.md.",
    )
    positive = number(float, 0, above=True)
    parser.add_argument(
        "--rate", type=positive, default=397.64, help="images/s of one device, as measured"
    )
    parser.add_argument(
        "--batch_size_per_device", type=number(int, 1), default=128, help="images in a step"
    )
    add_switch(parser, "--use_fp16", "gradients travel in half precision")
    parser.add_argument(
        "--gpu_num_per_node", type=number(int, 1), default=8, help="devices of a machine"
    )
    parser.add_argument(
        "--link", choices=sorted(NVLINK), default="v100", help="NVLink of this device"
    )
    parser.add_argument(
        "--nic_gigabits", type=positive, default=100, help="network of a machine, Gb/s"
    )
    parser.add_argument(
        "--cores_per_node",
        type=number(int, 1),
        help="processor cores of a machine for the loader; unless given, it is never too slow",
    )
    parser.add_argument(
        "--images_per_core",
        type=positive,
        help=f"images/s that a core prepares, {IMAGES_PER_CORE} unless given",
    )
    add_switch(parser, "--check", "print how far the model is off published figures, and end")
    return parser


def make_cluster(args: Namespace) -> Cluster:
    """Raises UsageError for a rate of cores without their number."""
    cores = args.cores_per_node
    if args.images_per_core is not None and cores is None:
        raise UsageError("--images_per_core needs --cores_per_node; give both")
    return Cluster(
        rate=args.rate,
        batch_size=args.batch_size_per_device,
        half=args.use_fp16,
        per_node=args.gpu_num_per_node,
        link=NVLINK[args.link],
        nic=args.nic_gigabits * 1e9 / 8,
        loader=math.inf if cores is None else cores * (args.images_per_core or IMAGES_PER_CORE),
    )


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.check:
        if len(sys.argv[1:] if argv is None else argv) > 1:
            raise UsageError("--check takes no other flag")
        print_check()
    else:
        print_plan(make_cluster(args))


if __name__ == "__main__":
    sys.exit(run_main(main))
