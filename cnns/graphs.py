"""The `nn.Graph`s that train, evaluate and predict."""

import gc
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import nn
from oneflow.nn.optimizer.lr_scheduler import LRScheduler

from cnns.checkpoint.snapshot import local, state_tensors
from cnns.checkpoint.training import STEP
from cnns.distributed import broadcast_outputs, own_rows, to_device, to_global
from cnns.ema import blend
from cnns.losses import main_label
from cnns.models.layers import Masked
from cnns.models.products import convolutions_as_products
from cnns.polling import sleep_instead_of_polling
from cnns.runorder import queue_before_start
from cnns.update import Update

# Of dynamic loss scaling. 2^16 is more than float16 holds (65504), but the first float16 value of a
# backward pass is the logits' gradient, which is at most the scale / batch size.
LOSS_SCALE = {
    "init_scale": 2.0**16,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
}


def hits(logits: flow.Tensor, label: flow.Tensor, top_k: int) -> tuple[flow.Tensor, flow.Tensor]:
    """Whether each label is the first, or among the first `top_k`, of its logits.

    Of equal logits the lower class ranks first, so that a network that gives the same for every
    class is not counted as right. A label whose logit is NaN ranks last, and any other NaN ranks
    above the label.

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
    below = flow.logical_or(own > logits, equal_later).to(dtype=flow.int32).sum(dim=1)
    rank = num_classes - below
    return (rank < 1).to(dtype=flow.int32), (rank < top_k).to(dtype=flow.int32)


def in_range(label: flow.Tensor, logits: flow.Tensor) -> flow.Tensor:
    """1 where a label (N,) is a class of the logits (N, C), else 0, int32."""
    return flow.logical_and(label >= 0, label < logits.shape[1]).to(dtype=flow.int32)


def in_float32(logits: flow.Tensor) -> flow.Tensor:
    """Logits (N, C), for what must not be computed in half precision under --use_fp16.

    OneFlow's mixed precision would take the loss, too, in half precision: its sum over a batch then
    overflows from some 9,000 images on, and the scale of the loss at 2^16. Without mixed precision
    this changes nothing.
    """
    return flow._C.amp_black_identity(logits)


NUM_SCORES = 4  # that `score` gives


def limit_top_k(top_k: int, num_classes: int) -> int:
    """k of the second accuracy: less than all classes, with which every answer would be right."""
    return min(top_k, max(1, num_classes - 1))


def score(
    logits: flow.Tensor, label: flow.Tensor, row_mask: flow.Tensor, *, top_k: int
) -> tuple[flow.Tensor, flow.Tensor, flow.Tensor, flow.Tensor]:
    """Top-1 hits, top-k hits, labels outside the classes and cross-entropy, without smoothing.

    Four scalars, sums over the rows whose `row_mask` is 1; the first three are int32, the last
    float32.
    """
    valid = in_range(label, logits)
    label = label * valid
    top_1, hit_k = hits(logits, label, top_k)
    loss = nn.functional.cross_entropy(in_float32(logits), label, reduction="none")  # (N,)
    loss = flow.masked_fill(loss, row_mask == 0, 0.0)  # a padded row may be infinite
    return (
        (top_1 * row_mask).sum(),
        (hit_k * row_mask).sum(),
        ((1 - valid) * row_mask).sum(),
        loss.sum(),
    )


class QuietGraph(nn.Graph):
    """Holds back what OneFlow prints while it compiles, and drops it where that raises.

    From the first on a CPU on, OneFlow's scheduler sleeps where it would poll, see `cnns.polling`.

    OneFlow 0.9.0 starts a run of a graph before it queues it, and a run that is over by then
    corrupts memory; that is corrected before the first run, see `cnns.runorder`.
    """

    def __init__(self) -> None:
        super().__init__()
        queue_before_start()

    def __call__(self, *batch: flow.Tensor, **more: Any) -> Any:
        if not self.is_compiled:
            return self.compile_quietly(super().__call__, *batch, **more)
        return super().__call__(*batch, **more)

    def allocate(self, *batch: flow.Tensor, **more: Any) -> None:
        """Compile, which takes the memory of a run on the devices, and run nothing."""
        self.compile_quietly(self._compile, *batch, **more)

    def compile_quietly(
        self, compile_: Callable[..., Any], *batch: flow.Tensor, **more: Any
    ) -> Any:
        printed, on_cpu = io.StringIO(), is_on_cpu(batch)
        if on_cpu:
            sleep_instead_of_polling()
        with (
            redirect_stdout(printed),
            redirect_stderr(printed),
            convolutions_as_products(on_cpu),
            no_collection(),
        ):
            output = compile_(*batch, **more)
        sys.stderr.write(printed.getvalue())
        return output


@contextmanager
def no_collection() -> Iterator[None]:
    """Python collects no garbage: a run that dies while a graph compiles may take OneFlow 0.9.0's
    list of that graph's variables with it, see docs/oneflow-notes.md."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class LogitsGraph(nn.Graph):
    """Images (N, 3, H, W) float32 to logits (N, C) float32, as they are exported: convolutions stay
    what they are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        queue_before_start()
        self.model = model

    def build(self, image):
        return self.model(image)

    def __call__(self, *batch: flow.Tensor) -> flow.Tensor:
        with no_collection():
            return super().__call__(*batch)


def is_on_cpu(batch: Sequence[flow.Tensor]) -> bool:
    return bool(batch) and batch[0].placement.type == "cpu"


class UpdateGraph(QuietGraph):
    """What `Update` does in a step: of a learning rate (1,) float32 it returns the updates made."""

    def __init__(self, update: Update, state: Mapping[str, flow.Tensor]):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.model, self.update = update.model, update
        self.held = update.hold(state)

    def build(self, rate: flow.Tensor) -> flow.Tensor:
        return self.update.build(self.model, self.held, rate)


class TrainGraph(QuietGraph):
    """One call is one step: load, forward, backward, update, all on the device.

    The loader gives images and labels, and where it mixes images, what `cnns.losses` says as well;
    `loss` is one of those. A network with dropout needs the `masks` of the step; see
    `DropoutMasks`. With an `average` of the network it needs the `share` that is due; see
    `cnns.ema.Average`.

    Returns four scalars that stay there, over the batches of all devices: mean loss (that of an
    auxiliary classifier is in it, times the network's `auxiliary_weight`), top-1 hits,
    top-k hits, and the number of labels outside the network's classes (which are trained as class 0
    for one step: the caller must look at the count and stop). A fifth is the sum of `stop`, where
    that is given; see `Agreement`.

    Where the optimizer leaves the update to `cnns.update.Update`, a second graph makes it.

    With `accumulate_steps` the rows of every input are divided into so many parts, which go through
    the network one after the other; then there is one update with the mean of their gradients. Each
    output has a value for each part.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        optimizer: flow.optim.Optimizer,
        schedule: LRScheduler | None = None,
        *,
        loss: nn.Module,
        top_k: int,
        average: nn.Module | None = None,
        accumulate_steps: int = 1,
        use_fp16: bool = False,
        num_nodes: int = 1,
    ):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.allow_fuse_model_update_ops(True)
        # As OneFlow's own ResNet-50: trying out cuDNN's algorithms pays on one node only.
        self.config.enable_cudnn_conv_heuristic_search_algo(num_nodes > 1)
        self.accumulate_steps = accumulate_steps
        if accumulate_steps > 1:
            self.config.set_gradient_accumulation_steps(accumulate_steps)
            # With it OneFlow 0.9.0 aborts on CUDA at a batch norm: its running statistics reach it
            # by an operator that repeats them for each part.
            self.config.proto.enable_inplace = False
        if use_fp16:
            self.config.enable_amp(True)
            self.set_grad_scaler(flow.amp.GradScaler(**LOSS_SCALE))
        self.model = model
        self.loader = loader
        self.cross_entropy = loss
        self.auxiliary_weight = getattr(model, "auxiliary_weight", 0.0)
        self.dropouts = dropouts(model)
        self.top_k = top_k
        self.averaged_names = [] if average is None else [*state_tensors(average)]
        if average is not None:
            self.average = average
        self.update: Update | None = getattr(optimizer, "update", None)
        if self.update is not None:
            self.update.skips = use_fp16
        self.add_optimizer(optimizer, lr_sch=schedule)

    def __call__(self, *batch: flow.Tensor, **more: Any) -> Any:
        output = QuietGraph.__call__(self, *batch, **more)
        if self.update is not None:
            if self.update.graph is None:
                self.update.graph = UpdateGraph(self.update, QuietGraph.state_dict(self))
            self.update()
        return output

    def state_dict(self, destination: Any = None) -> Any:
        """As nn.Graph; the buffers are those of the update."""
        found = QuietGraph.state_dict(self, destination)
        if self.update is None or not self.update.keeps_gradients:
            return found
        kept = {name: v for name, v in found.items() if not name.startswith("model.")}
        # Before the first step they are those that were loaded.
        return kept | dict(self.update.variables or self.update.loaded)

    def load_state_dict(self, state: Any, strict: bool = True) -> None:
        if self.update is not None:
            buffers = {name: v for name, v in state.items() if name.startswith("model.")}
            self.update.take(buffers, count=int(local(state[STEP]).numpy().item()))
            if self.update.keeps_gradients:
                state = {name: v for name, v in state.items() if name not in buffers}
        QuietGraph.load_state_dict(self, state, strict)

    @property
    def loss_scale(self) -> float | None:
        """Of half precision; reading it waits for the step that runs."""
        for name, value in self.state_dict().items():
            if name.endswith("-LossScale"):
                return float(value.numpy().item())
        return None

    def build(
        self,
        *batch: flow.Tensor,
        masks: Sequence[flow.Tensor] = (),
        share: flow.Tensor | None = None,
        stop: flow.Tensor | None = None,
    ) -> tuple[flow.Tensor, ...]:
        # (N, 3, H, W) float32, (N,) int32; mixed: (N,) int32, (N,) float32
        image, label, *mixed = self.loader(*batch)
        for layer, mask in zip(self.dropouts, masks, strict=True):
            layer.mask = mask
        logits, auxiliary = self.model(image), None  # (N, C)
        if isinstance(logits, tuple | list):  # a network with a second classifier in training
            logits, auxiliary = logits
        logits = in_float32(logits)
        # The loss kernel aborts the process on a label it has no logit for.
        valid = in_range(label, logits)
        label = label * valid
        loss = self.cross_entropy(logits, label, *mixed)  # ()
        if auxiliary is not None:
            auxiliary_loss = self.cross_entropy(in_float32(auxiliary), label, *mixed)
            loss = loss + self.auxiliary_weight * auxiliary_loss
        loss.backward()
        if share is not None:
            blend(self.average, self.model, self.averaged_names, share)
        top_1, top_k = hits(logits, main_label(label, tuple(mixed)), self.top_k)
        return broadcast_outputs(loss, top_1.sum(), top_k.sum(), (1 - valid).sum(), stop=stop)


def dropouts(model: nn.Module) -> list[Masked]:
    """The layers with masks, of dropout and of stochastic depth."""
    return [module for module in model.modules() if isinstance(module, Masked)]


class DropoutMasks:
    """The masks of a network's dropout layers, a function of seed, step, layer and row.

    So they are the same for any number of devices, and in a resumed run. They are cut from the
    stream of a counter-based generator, 16 bits each, which also is the resolution of the rate.
    """

    def __init__(self, model: nn.Module, *, seed: int, batch_size: int, device: str):
        """`batch_size` is the global one."""
        self.layers = dropouts(model)
        self.seed, self.rows = seed, own_rows(batch_size)
        self.placement = flow.env.all_device_placement(device)

    def at(self, step: int) -> dict[str, tuple[flow.Tensor, ...]]:
        """Arguments for the call of a graph. Steps count from 0."""
        if not self.layers:
            return {}
        masks = [self.draw(step, number, layer) for number, layer in enumerate(self.layers)]
        return {"masks": tuple(to_global(flow.tensor(m), self.placement) for m in masks)}

    def draw(self, step: int, number: int, layer: Masked) -> np.ndarray:
        """This process's rows (n, features) of the mask of one layer."""
        blocks = -(-layer.features // 16)  # of 4 x 64 bits, for each row
        counter = [self.rows.start * blocks, 0, number, step]
        generator = np.random.Philox(key=self.seed, counter=counter)
        count = self.rows.stop - self.rows.start
        drawn = generator.random_raw(count * blocks * 4).view(np.uint16).reshape(count, -1)
        kept = drawn[:, : layer.features] >= round(layer.rate * 2**16)
        return kept * np.float32(1 / (1 - layer.rate))


class EvalGraph(QuietGraph):
    """What `score` gives, over all devices, and the sum of `stop` where that is given.

    With `gives_logits` these (N, C) float32 stand before it, each device's rows on that device.
    The graph shares its model with a training graph and follows its updates.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: nn.Module,
        *,
        top_k: int,
        use_fp16: bool = False,
        gives_logits: bool = False,
    ):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.enable_amp(use_fp16)
        self.model = model
        self.loader = loader
        self.top_k = top_k
        self.gives_logits = gives_logits

    def build(
        self, row_mask: flow.Tensor, *batch: flow.Tensor, stop: flow.Tensor | None = None
    ) -> tuple[flow.Tensor, ...]:
        image, label = self.loader(*batch)  # (N, 3, H, W) float32, (N,) int32
        logits = self.model(image)  # (N, C)
        scalars = score(logits, label, row_mask, top_k=self.top_k)
        outputs = broadcast_outputs(*scalars, stop=stop)
        if not self.gives_logits:
            return outputs
        logits = in_float32(logits).to_global(sbp=flow.sbp.split(0))
        return *outputs[:NUM_SCORES], logits, *outputs[NUM_SCORES:]


class PredictGraph(QuietGraph):
    """Images (N, 3, H, W) float32 to probabilities (N, C) float32."""

    def __init__(self, model: nn.Module, *, use_fp16: bool = False):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)
        self.config.enable_amp(use_fp16)
        # Trying out cuDNN's algorithms takes a second and 1 GB, too much for a few predictions.
        self.config.enable_cudnn_conv_heuristic_search_algo(True)
        self.model = model

    def build(self, image: flow.Tensor) -> flow.Tensor:
        return flow.softmax(in_float32(self.model(image)), dim=1)


class Predictor:
    """Arrays of images to arrays of probabilities.

    Compiles for a batch larger than those before it; a smaller one is padded.
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
