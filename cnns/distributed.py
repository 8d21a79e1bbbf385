"""Devices and processes: which device, what is placed where, what processes agree on."""

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import oneflow as flow
from oneflow import nn

from cnns.errors import UsageError
from cnns.interrupts import Interrupted, Interrupts
from cnns.launch import external
from cnns.launch.external import RankJob, make_rank_job
from cnns.launch.job import Job
from cnns.launch.parent import launch
from cnns.launch.watcher import launch_rank
from cnns.launch.worker import command
from cnns.log import notice

# Major compute capabilities that the wheel of each OneFlow has machine code for. 0.9.0 has code for
# 6.0, 6.1, 7.0, 7.5, 8.0 and 8.6, and code for x.y runs on x.z with z >= y; it has no PTX, from
# which a driver could make code for others. Another OneFlow is not judged.
CAPABILITIES = {"0.9.0": (6, 7, 8)}
CAPABILITY_ATTRIBUTES = (75, 76)  # major and minor, in CUDA's driver
SIGNAL_SECONDS = 2.0  # for a signal of one process to reach the others


def choose_device(name: str, *, count: int = 1) -> str:
    """`cuda` or `cpu` for the flag --device; `auto` takes CUDA where it can be used and says so.

    Raises UsageError where CUDA is asked for and there is none, fewer devices than `count`, or one
    that the installed OneFlow has no code for.
    """
    available = flow.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(
            "--device=cuda: no CUDA device can be used here (is there an NVIDIA GPU, and its "
            "driver, 450.80.02 or newer?); give --device=cpu to run on the CPU"
        )
    unusable = unusable_device(count) if available and name != "cpu" else None
    if name == "cuda" and unusable:
        raise UsageError(f"--device=cuda: {unusable}; give --device=cpu to run on the CPU")
    if name == "auto":
        name = "cuda" if available and not unusable else "cpu"
        notice(f"Device: {name} (--device=auto{f': {unusable}' if unusable else ''}).")
    if name == "cuda" and flow.cuda.device_count() < count:
        raise UsageError(
            f"--gpu_num_per_node={count}, and this machine has {flow.cuda.device_count()} CUDA "
            "devices; give at most that"
        )
    return name


@dataclass(frozen=True)
class CudaDevice:
    name: str
    major: int  # of its compute capability
    minor: int
    memory_bytes: int


def cuda_devices() -> list[CudaDevice]:
    """What the driver says of the CUDA devices that this process may use.

    OneFlow can be asked too, but then makes a context on each device that it is asked about, which
    takes memory there, and the last of them stays the current one.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    devices = []
    for ordinal in range(count.value):
        driver.cuDeviceGetName(name, len(name), ordinal)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), ordinal)
        capability = []
        for attribute in CAPABILITY_ATTRIBUTES:
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, ordinal)
            capability.append(value.value)
        major, minor = capability
        devices.append(CudaDevice(name.value.decode(), major, minor, size.value))
    return devices


def unusable_device(count: int) -> str | None:
    """What is wrong with the first of `count` CUDA devices that OneFlow has no code for, if any."""
    capabilities = CAPABILITIES.get(flow.__version__)
    if capabilities is None:
        return None
    for number, device in enumerate(cuda_devices()[:count]):
        if device.major not in capabilities:
            return (
                f"CUDA device {number} ({device.name}) has compute capability "
                f"{device.major}.{device.minor}, and OneFlow {flow.__version__} has code for 6.0, "
                "6.1, 7.x and 8.x only"
            )
    return None


def takes_cuda(name: str) -> bool:
    """Whether the flag --device leads to CUDA, or to an error about it."""
    if name == "auto":
        return flow.cuda.is_available() and unusable_device(1) is None
    return name == "cuda"


OUT_OF_MEMORY = "out of memory"  # in OneFlow's words, and CUDA's


def explain_crash(local_rank: int, words: Sequence[str], *, asked: str, flag: str) -> str | None:
    """The cause of a crash in one line, where the end of stderr tells it, else None.

    Args:
        local_rank: the process's number on its machine, which is that of its device.
        words: the end of what it wrote to stderr.
        asked: the flags that decide how much memory is needed.
        flag: the one that sets the size of a batch.
    """
    devices = cuda_devices()
    if not any(OUT_OF_MEMORY in line for line in words) or local_rank >= len(devices):
        return None
    device = devices[local_rank]
    return (
        f"CUDA device {local_rank} ({device.name}, {device.memory_bytes / 2**30:.1f} GiB) does not "
        f"have enough free memory for {asked}; give a smaller {flag}, or --use_fp16, and check "
        "whether another program uses the device (nvidia-smi)"
    )


def launch_script(
    script: str,
    argv: list[str] | None,
    *,
    job: Job,
    memory: dict[str, str],
    facts: Callable[[], dict] = dict,
    stdin: int | None = subprocess.DEVNULL,
) -> int:
    """Run a script once per device, as cnns.launch.parent.launch does, or as the rank that another
    launcher has made of this process.

    Args:
        argv: as the script's `main` got it.
        memory: `asked` and `flag` of `explain_crash`.
    """
    explain = partial(explain_crash, asked=memory["asked"], flag=memory["flag"])
    if isinstance(job, RankJob):
        known = explain(job.local_rank, [OUT_OF_MEMORY]) or ""
        job = replace(job, devices=flow.cuda.device_count())
        launch_rank(command(script, argv), job=job, facts=facts, known=known)
    return launch(command(script, argv), job=job, facts=facts, explain=explain, stdin=stdin)


@contextmanager
def share_usage_errors() -> Iterator[None]:
    """Where another launcher has started this process, end on a UsageError with all other ranks,
    and print it once.
    """
    try:
        yield
    except UsageError as error:
        place = external.place
        if place is None:
            raise
        if not place.address:  # on no rank
            if place.rank == 0:
                raise
            raise SystemExit(error.exit_status) from None
        launch_rank((), job=make_rank_job(place), error=error)


def place(model: nn.Module, device: str) -> nn.Module:
    """Move a model to every device of the job, the same weights on each."""
    return model.to_global(flow.env.all_device_placement(device), flow.sbp.broadcast)


def set_communication(
    *,
    use_fp16: bool,
    nccl_fusion_threshold_mb: int | None = None,
    nccl_fusion_max_ops: int | None = None,
) -> None:
    """How gradients travel between CUDA devices; None leaves a setting to OneFlow.

    In half precision with several devices the one buffer for all gradients is switched off, as in
    OneFlow's own ResNet-50.
    """
    if nccl_fusion_threshold_mb is not None:
        flow.boxing.nccl.set_fusion_threshold_mbytes(nccl_fusion_threshold_mb)
    if nccl_fusion_max_ops is not None:
        flow.boxing.nccl.set_fusion_max_ops_num(nccl_fusion_max_ops)
    if use_fp16 and flow.env.get_world_size() > 1:
        flow.boxing.nccl.enable_use_buffer_to_fuse_all_reduce(False)


def broadcast_outputs(*scalars: flow.Tensor, stop: flow.Tensor | None) -> tuple[flow.Tensor, ...]:
    """Outputs of a graph on every process, so that reading them needs no communication."""
    if stop is not None:
        scalars = (*scalars, stop.sum())
    return tuple(scalar.to_global(sbp=flow.sbp.broadcast) for scalar in scalars)


def wait_for_all() -> None:
    """Return when every process of the job has got here."""
    flow.comm.barrier()


class Agreement:
    """Lets all processes stop after the same step, whichever of them a signal reaches.

    Each hands its vote to the step as `stop`, and the step returns their sum. One process alone
    stops at once.
    """

    def __init__(self, interrupts: Interrupts, device: str, *, parts: int = 1):
        """`parts` is how many the batch of a step is divided into, each with a vote."""
        self.interrupts, self.parts = interrupts, parts
        self.alone = flow.env.get_world_size() == 1
        self.placement = flow.env.all_device_placement(device)

    def vote(self) -> dict[str, flow.Tensor]:
        """Arguments for the call of a graph."""
        if self.alone:
            return {}
        stop = self.interrupts.received is not None
        vote = flow.tensor(np.full(self.parts, stop, np.int32))
        return {"stop": to_global(vote, self.placement)}

    def check(self, done: tuple | None) -> None:
        """Raise Interrupted where the processes had agreed in a step that is `done`.

        Args:
            done: what the step returned; None: none that is known to be done.
        """
        if self.alone:
            self.interrupts.check()
        elif done is not None and done[-1].numpy().any():
            # Who has started this process passes on what another one got, perhaps later than that.
            end = time.monotonic() + SIGNAL_SECONDS
            while self.interrupts.received is None and time.monotonic() < end:
                time.sleep(0.01)
            raise Interrupted(self.interrupts.received or signal.SIGTERM)


def average_statistics(model: nn.Module) -> None:
    """Give the batch norms of all processes the mean of their running statistics.

    Each device normalises and gathers statistics over its own share of a batch.
    """
    num_ranks = flow.env.get_world_size()
    statistics = [b for name, b in model.named_buffers() if "running_" in name]
    if num_ranks == 1 or not statistics:
        return
    placement = statistics[0].placement
    own = flow.cat([each.to_local().flatten() for each in statistics])
    total = own.to_global(placement, flow.sbp.partial_sum).to_global(sbp=flow.sbp.broadcast)
    mean, start = total.to_local() / num_ranks, 0
    for each in statistics:
        end = start + each.numel()
        value = mean[start:end].reshape(each.shape)
        each.data.copy_(value.to_global(placement, flow.sbp.broadcast))
        start = end


def own_rows(batch_size: int) -> slice:
    """The rows of a global batch that are this process's."""
    rows = batch_size // flow.env.get_world_size()
    return slice(rows * flow.env.get_rank(), rows * (flow.env.get_rank() + 1))


def on_all_devices(array: np.ndarray, placement: flow.placement) -> flow.Tensor:
    """An array that every process holds, as a global tensor that is whole on each device.

    All are of one shape, which is not checked, as in `to_global`.
    """
    return flow.tensor(array).to_global(placement, flow.sbp.broadcast, check_meta=False)


def to_device(batch: np.ndarray, placement: flow.placement) -> flow.Tensor:
    """An array that every process holds, as a global tensor split over the devices."""
    return to_global(flow.tensor(batch[own_rows(len(batch))]), placement)


def to_global(rows: flow.Tensor, placement: flow.placement) -> flow.Tensor:
    """The tensors of all processes, concatenated, as one global tensor on their devices.

    All are of one shape, which is not checked: that would take a round of messages each time.
    """
    return rows.to_global(placement, flow.sbp.split(0), check_meta=False)
