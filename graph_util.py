"""The `nn.Graph`s that train, evaluate and predict, and the one function that evaluates."""

import ctypes
import io
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import numpy as np
import oneflow as flow
from oneflow import nn

from checkpoint_util import local
from config import RunError, UsageError
from interrupt_util import Interrupted, Interrupts
from layer_util import Dropout
from metric_util import Counts, limit_run_ahead, notice
from ofrecord_util import own_rows, to_device, to_global

# Of dynamic loss scaling. The first gradient of a backward pass is the scale itself, in the loss's
# float32; half precision begins at the logits' gradients, the scale times at most 1 / batch size.
LOSS_SCALE = {
    "init_scale": 2.0**16,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
}


# Major compute capabilities that the wheel of each OneFlow has machine code for. 0.9.0 has code for
# 6.0, 6.1, 7.0, 7.5, 8.0 and 8.6, and code for x.y runs on x.z with z >= y; it has no PTX, from
# which a driver could make code for others. Another OneFlow is not judged.
CAPABILITIES = {"0.9.0": (6, 7, 8)}
CAPABILITY_ATTRIBUTES = (75, 76)  # major and minor, in CUDA's driver


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
    takes memory there, and goes on with the last of them as the current one.
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
        devices.append(CudaDevice(name.value.decode(), *capability, size.value))
    return devices


def unusable_device(count: int) -> str | None:
    """What is wrong with the first of `count` CUDA devices that OneFlow has no code for, if any."""
    capabilities = CAPABILITIES.get(flow.__version__)
    for number, device in enumerate(cuda_devices()[:count] if capabilities else ()):
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
    """What the last words of a process say, where it is known what they mean, in one line.

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


def hits(logits, label, top_k: int):
    """Whether each label is the first, or among the first `top_k`, of its logits.

    Equal logits rank by class number, and a NaN is beaten by nothing and beats nothing, so that a
    network that gives the same for every class is not counted as right.

    Args:
        logits: (N, C) float.
        label: (N,) int32, 0 to C - 1.

    Returns:
        Two (N,) int32 tensors of 0 and 1.
    """
    num_classes = logits.shape[1]
    own = flow.gather(logits, 1, label.to(dtype=flow.int64).unsqueeze(1))  # (N, 1)
    number = flow.arange(
        num_classes, dtype=flow.int32, placement=logits.placement, sbp=flow.sbp.broadcast
    ).unsqueeze(0)  # (1, C)
    equal_later = flow.logical_and(own == logits, number >= label.unsqueeze(1))
    beaten = flow.logical_or(own > logits, equal_later).to(dtype=flow.int32).sum(dim=1)
    rank = num_classes - beaten
    return (rank < 1).to(dtype=flow.int32), (rank < top_k).to(dtype=flow.int32)


def in_range(label, logits):
    """1 where a label (N,) is a class of the logits (N, C), else 0, int32."""
    return flow.logical_and(label >= 0, label < logits.shape[1]).to(dtype=flow.int32)


def in_float32(logits):
    """Logits (N, C), for what must not be computed in half precision under --use_fp16.

    OneFlow's mixed precision would take the loss, too, in half precision: its sum over a batch then
    overflows from some 9,000 images on, and the scale of the loss at 2^16. Without mixed precision
    this changes nothing.
    """
    return flow._C.amp_black_identity(logits)


def count_hits(logits, label, counted, *, top_k: int) -> tuple:
    """Top-1 hits, top-k hits and labels outside the classes, over rows whose `counted` is 1."""
    valid = in_range(label, logits)
    top_1, hit_k = hits(logits, label * valid, top_k)
    return (top_1 * counted).sum(), (hit_k * counted).sum(), ((1 - valid) * counted).sum()


def everywhere(*scalars) -> tuple:
    """What a graph returns, so that every process can read it without asking the others."""
    *scalars, stop = scalars
    if stop is not None:
        scalars.append(stop.sum())
    return tuple(scalar.to_global(sbp=flow.sbp.broadcast) for scalar in scalars)


class CompiledGraph(nn.Graph):
    """What the graphs share: a compilation that fails raises, and prints nothing before that."""

    def __call__(self, *batch, **more):
        if self.is_compiled:
            return super().__call__(*batch, **more)
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            output = super().__call__(*batch, **more)
        sys.stderr.write(printed.getvalue())
        return output


class TrainGraph(CompiledGraph):
    """One call is one step: load, forward, backward, update, all on the device.

    A network with dropout needs the `masks` of the step; see `DropoutMasks`.

    Returns four scalars that stay there, over the batches of all devices: mean loss (that of an
    auxiliary classifier is in it, times the network's `auxiliary_weight`), top-1 hits,
    top-k hits, and the number of labels outside the network's classes (which are trained as class 0
    for one step: the caller must look at the count and stop). A fifth is the sum of `stop`, where
    that is given; see `Agreement`.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        optimizer,
        schedule=None,
        *,
        label_smoothing: float,
        top_k: int,
        use_fp16: bool = False,
        num_nodes: int = 1,
    ):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.allow_fuse_model_update_ops(True)
        # As OneFlow's own ResNet-50: trying out cuDNN's algorithms pays on one node only.
        self.config.enable_cudnn_conv_heuristic_search_algo(num_nodes > 1)
        if use_fp16:
            self.config.enable_amp(True)
            self.set_grad_scaler(flow.amp.GradScaler(**LOSS_SCALE))
        self.model = model
        self.loader = loader
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.auxiliary_weight = getattr(model, "auxiliary_weight", 0.0)
        self.dropouts = dropouts(model)
        self.top_k = top_k
        if schedule is None:
            self.add_optimizer(optimizer)
        else:
            self.add_optimizer(optimizer, lr_sch=schedule)

    def build(self, *batch, masks=(), stop=None):
        image, label = self.loader(*batch)  # (N, 3, H, W) float32, (N,) int32
        for layer, mask in zip(self.dropouts, masks, strict=True):
            layer.mask = mask
        logits, auxiliary = self.model(image), None  # (N, C)
        if isinstance(logits, tuple | list):  # a network with a second classifier in training
            logits, auxiliary = logits
        logits = in_float32(logits)
        # The loss kernel aborts the process on a label it has no logit for.
        valid = in_range(label, logits)
        label = label * valid
        loss = self.cross_entropy(logits, label)  # ()
        if auxiliary is not None:
            auxiliary_loss = self.cross_entropy(in_float32(auxiliary), label)
            loss = loss + self.auxiliary_weight * auxiliary_loss
        loss.backward()
        top_1, top_k = hits(logits, label, self.top_k)
        return everywhere(loss, top_1.sum(), top_k.sum(), (1 - valid).sum(), stop)


def dropouts(model: nn.Module) -> list[Dropout]:
    return [module for module in model.modules() if isinstance(module, Dropout)]


class DropoutMasks:
    """The masks of a network's dropout layers, a function of seed, step, layer and row.

    So they are the same for any number of devices, and in a run that goes on. They are cut from the
    stream of a counter-based generator, 16 bits each, which also is the resolution of the rate.
    """

    def __init__(self, model: nn.Module, *, seed: int, batch_size: int, device: str):
        """`batch_size` is the global one."""
        self.layers = dropouts(model)
        self.seed, self.rows = seed, own_rows(batch_size)
        self.placement = flow.env.all_device_placement(device)

    def at(self, step: int) -> dict:
        """Arguments for the call of a graph. Steps count from 0."""
        if not self.layers:
            return {}
        masks = [self.draw(step, number, layer) for number, layer in enumerate(self.layers)]
        return {"masks": tuple(to_global(flow.tensor(m), self.placement) for m in masks)}

    def draw(self, step: int, number: int, layer: Dropout) -> np.ndarray:
        """This process's rows (n, features) of the mask of one layer."""
        blocks = -(-layer.features // 16)  # of 4 x 64 bits, for each row
        counter = [self.rows.start * blocks, 0, number, step]
        generator = np.random.Philox(key=self.seed, counter=counter)
        count = self.rows.stop - self.rows.start
        drawn = generator.random_raw(count * blocks * 4).view(np.uint16).reshape(count, -1)
        kept = drawn[:, : layer.features] >= round(layer.rate * 2**16)
        return kept * np.float32(1 / (1 - layer.rate))


class EvalGraph(CompiledGraph):
    """Top-1 hits, top-k hits and labels outside the classes, over the rows whose `counted` is 1.

    Three int32 scalars, over all devices, and the sum of `stop` where that is given. The graph
    shares its model with a training graph and follows its updates.
    """

    def __init__(self, model: nn.Module, loader: nn.Module, *, top_k: int, use_fp16: bool = False):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.enable_amp(use_fp16)
        self.model = model
        self.loader = loader
        self.top_k = top_k

    def build(self, counted, *batch, stop=None):
        image, label = self.loader(*batch)  # (N, 3, H, W) float32, (N,) int32
        logits = self.model(image)  # (N, C)
        return everywhere(*count_hits(logits, label, counted, top_k=self.top_k), stop)


class PredictGraph(CompiledGraph):
    """Images (N, 3, H, W) float32 to probabilities (N, C) float32."""

    def __init__(self, model: nn.Module, *, use_fp16: bool = False):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.enable_amp(use_fp16)
        # Trying out cuDNN's algorithms takes a second and 1 GB, which few predictions pay back.
        self.config.enable_cudnn_conv_heuristic_search_algo(True)
        self.model = model

    def build(self, image):
        return flow.softmax(in_float32(self.model(image)), dim=1)


class Predictor:
    """Arrays of images to arrays of probabilities.

    Compiles for a batch larger than those it has had; a smaller one is filled up.
    """

    def __init__(self, model: nn.Module, *, device: str, use_fp16: bool = False):
        self.model = model.eval()
        self.use_fp16 = use_fp16
        self.placement = flow.env.all_device_placement(device)
        self.graphs: dict[int, PredictGraph] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) float32, normalised, to (N, C) float32."""
        count = len(images)
        size = min((size for size in self.graphs if size >= count), default=count)
        if size not in self.graphs:
            self.graphs[size] = PredictGraph(self.model, use_fp16=self.use_fp16)
        images = np.concatenate([images, np.zeros((size - count, *images.shape[1:]), np.float32)])
        return local(self.graphs[size](to_device(images, self.placement))).numpy()[:count]


def wait_for_all() -> None:
    """Return when every process of the job has got here."""
    flow.comm.barrier()


class Agreement:
    """Lets all processes stop after the same step, whenever a signal reaches which of them.

    Each hands its vote to the step as `stop`, and the step returns their sum. One process alone
    stops at once.
    """

    def __init__(self, interrupts: Interrupts, device: str):
        self.interrupts = interrupts
        self.alone = flow.env.get_world_size() == 1
        self.placement = flow.env.all_device_placement(device)

    def vote(self) -> dict:
        """Arguments for the call of a graph."""
        if self.alone:
            return {}
        wish = self.interrupts.received is not None
        return {"stop": to_global(flow.tensor(np.array([wish], np.int32)), self.placement)}

    def check(self, done: tuple | None) -> None:
        """Raise Interrupted where the processes had agreed in a step that is `done`.

        Args:
            done: what the step returned; None: none that is known to be done.
        """
        if self.alone:
            self.interrupts.check()
        elif done is not None and done[-1].numpy() > 0:
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


class Evaluator:
    """Scores a model on a validation set, each example exactly once a round.

    The loader's batches are all of one size, and say which of their rows count.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        *,
        num_examples: int,
        top_k: int,
        use_fp16: bool = False,
    ):
        self.model = model
        self.graph = EvalGraph(model, loader, top_k=top_k, use_fp16=use_fp16)
        self.loader = loader
        self.num_examples = num_examples

    def round(self, agreement: "Agreement | None" = None) -> tuple[Counts, float]:
        """Counts over `num_examples` samples, and the seconds it took (without compilation).

        Leaves the model in evaluation mode. Raises RunError where a label is outside the classes,
        and Interrupted where the processes agree to stop.
        """
        if self.model is not None:
            self.model.eval()
        start = time.perf_counter()
        outputs = []
        for batch in self.loader.batches():
            compiled = self.graph.is_compiled
            outputs.append(self.graph(*batch, **(agreement.vote() if agreement else {})))
            done = limit_run_ahead(outputs)
            if not compiled:
                start = time.perf_counter()
            if agreement:
                agreement.check(done)
        totals = np.array([[value.numpy() for value in output[:3]] for output in outputs])
        seconds = time.perf_counter() - start
        top_1, top_k, bad_labels = totals.sum(axis=0).tolist()
        if bad_labels:
            raise RunError(
                f"the validation data have {bad_labels} labels outside the network's classes; they "
                "are of another data set than the network"
            )
        return Counts(top_1, top_k, self.num_examples), seconds


class ArrayGraph:
    """As EvalGraph, for a network that is a function of arrays: images to logits (N, C)."""

    is_compiled = True

    def __init__(
        self, network: Callable[[np.ndarray], np.ndarray], loader: nn.Module, *, top_k: int
    ):
        self.network = network
        self.loader = loader
        self.top_k = top_k

    def __call__(self, counted, *batch) -> tuple:
        image, label = self.loader(*batch)
        logits = to_device(self.network(local(image).numpy()), label.placement)
        return count_hits(logits, label, counted, top_k=self.top_k)


class ArrayEvaluator(Evaluator):
    """The same for a network that is a function of arrays, in one process on the CPU."""

    def __init__(
        self,
        network: Callable[[np.ndarray], np.ndarray],
        loader: nn.Module,
        *,
        num_examples: int,
        top_k: int,
    ):
        self.model = None
        self.graph = ArrayGraph(network, loader, top_k=top_k)
        self.loader = loader
        self.num_examples = num_examples
