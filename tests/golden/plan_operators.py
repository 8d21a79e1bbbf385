"""Operators of a compiled job, computed with PyTorch on a CPU: a function for each type.

Written from what OneFlow's operators mean, and from nothing else: no function here knows a network,
a layer's name or a layout, but obeys the attributes, types and wiring of the operator it is given.
Whatever is not understood is an error: an operator of an unknown type, an attribute or an input
that its function has not looked at, a result of another type or shape than the job announces.

Rounding: an operator is computed in float32, from inputs that may be half-precision numbers, and a
result that the job holds in half precision is rounded to it once, at the end. So do tensor cores
that accumulate in float32, and cuDNN's batch norms. An operand that is an attribute is rounded to
the type of what it meets, as OneFlow does.
"""

import math

import torch
from torch.nn import functional, grad

INTEGERS = {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64}
FLOAT32_MAX = torch.finfo(torch.float32).max


class Misunderstood(Exception):
    """Something in a job that this program has no meaning for."""


class Operator:
    """One operator of a job, which its function asks for what it needs."""

    def __init__(self, spec: dict, values: dict, variables: dict, *, work: torch.dtype):
        """`values` are those of the blobs so far. `work` is what stands for float32."""
        self.spec, self.values, self.variables, self.work = spec, values, variables, work
        self.unread = {("in", key) for key in spec["in"]} | {("attr", key) for key in spec["attr"]}
        self.due = set(spec["out"])
        self.written = {}  # name of a variable -> its value after the step

    def fail(self, text: str):
        raise Misunderstood(f"{self.spec['name']} ({self.spec['type']}): {text}")

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.fail(text)

    def attr(self, key: str):
        self.expect(key in self.spec["attr"], f"no attribute {key}")
        self.unread.discard(("attr", key))
        return self.spec["attr"][key]

    def attr_is(self, key: str, *known) -> None:
        """An attribute has one of the values that this program has a meaning for."""
        value = self.attr(key)
        self.expect(value in known, f"{key} is {value}, known is only {known}")

    def no_matter(self, *attributes: str) -> None:
        """Attributes that nothing is computed with."""
        for key in attributes:
            self.attr(key)

    def has(self, key: str) -> bool:
        return key in self.spec["in"]

    def gives(self, key: str) -> bool:
        return key in self.spec["out"]

    def all(self, key: str) -> list:
        """The tensors of an input that takes several, half precision made float32."""
        self.unread.discard(("in", key))
        values = [self.values[name] for name in self.spec["in"][key]]
        return [
            value.to(self.work)
            if isinstance(value, torch.Tensor) and value.dtype == torch.float16
            else value
            for value in values
        ]

    def input(self, key: str):
        self.expect(self.has(key), f"no input {key}")
        (value,) = self.all(key)
        return value

    def input_is_half(self, key: str) -> bool:
        return self.values[self.spec["in"][key][0]].dtype == torch.float16

    def output(self, key: str, value: torch.Tensor) -> None:
        ((name, kind, shape),) = self.spec["out"][key]
        if kind == "float16":
            self.expect(value.dtype == self.work, f"{key} is {value.dtype}")
            value = value.half()
        else:
            expected = self.dtype(kind)
            self.expect(value.dtype == expected, f"{key} is {value.dtype}, and has to be {kind}")
        self.expect(list(value.shape) == shape, f"{key} is {list(value.shape)}, not {shape}")
        self.values[name] = value
        self.due.remove(key)

    def output_hidden(self, key: str, value) -> None:
        """A result that only the gradient of the same operator can read."""
        ((name, _, shape),) = self.spec["out"][key]
        self.expect(shape is None, f"{key} is {shape}")
        self.values[name] = value
        self.due.remove(key)

    def dtype(self, kind: str) -> torch.dtype:
        return self.work if kind == "float32" else INTEGERS[kind]

    def write(self, key: str, value: torch.Tensor) -> None:
        """Give the variable of an input its value for the next step."""
        (blob,) = self.spec["in"][key]
        assert key in WRITES[self.spec["type"]]  # see compute_plan.check_order
        self.expect(blob in self.variables, f"{key} is {blob}, which is not a variable")
        before = self.variables[blob]
        self.expect(value.dtype == before.dtype, f"{blob} would turn from {before.dtype}")
        self.expect(value.shape == before.shape, f"{blob} would turn from {before.shape}")
        self.written[blob] = value

    def compute(self) -> None:
        if self.spec["type"] not in FUNCTIONS:
            self.fail("an operator of unknown type")
        FUNCTIONS[self.spec["type"]](self)
        self.expect(not self.unread, f"not understood: {sorted(self.unread)}")
        self.expect(not self.due, f"not computed: {sorted(self.due)}")


FUNCTIONS = {}
# type -> inputs that are variables, and get a new value
WRITES = {
    "assign": ("ref",),
    "assign_if_not": ("ref",),
    "cudnn_fused_normalization_add_relu": ("moving_mean", "moving_variance"),
    "dynamic_loss_scale_schedule": ("loss_scale", "good_step_counter"),
    "momentum_update": ("model", "momentum"),
    "normalization": ("moving_mean", "moving_variance"),
    "normalization_add_relu": ("moving_mean", "moving_variance"),
}


def computes(*types: str):
    def register(function):
        for each in types:
            FUNCTIONS[each] = function
        return function

    return register


# Layouts.


def channels_first(x: torch.Tensor, data_format: str) -> torch.Tensor:
    """(N, H, W, C) to (N, C, H, W) where the format says so; for (O, H, W, I) the same."""
    return {"channels_first": x, "channels_last": x.movedim(-1, 1)}[data_format]


def as_format(x: torch.Tensor, data_format: str) -> torch.Tensor:
    return {"channels_first": x, "channels_last": x.movedim(1, -1)}[data_format]


# Convolutions.


def convolution(op: Operator) -> tuple[str, dict]:
    """The attributes that a convolution and its two gradients share."""
    settings = {
        "stride": op.attr("strides"),
        "padding": op.attr("padding_before"),
        "dilation": op.attr("dilation_rate"),
        "groups": op.attr("groups"),
    }
    return op.attr("data_format"), settings


@computes("conv2d")
def conv2d(op):
    layout, settings = convolution(op)
    weight = channels_first(op.input("weight"), layout)
    op.attr_is("filters", weight.shape[0])
    op.attr_is("kernel_size", list(weight.shape[2:]))
    y = functional.conv2d(channels_first(op.input("in"), layout), weight, **settings)
    op.output("out", as_format(y, layout))


@computes("conv_data_grad")
def conv_data_grad(op):
    layout, settings = convolution(op)
    weight = channels_first(op.input("filter"), layout)
    op.attr_is("kernel_size", list(weight.shape[2:]))
    op.attr_is("num_spatial_dims", 2)
    shape = channels_first(op.input("x_like"), layout).shape
    dx = grad.conv2d_input(shape, weight, channels_first(op.input("dy"), layout), **settings)
    op.output("dx", as_format(dx, layout))


@computes("conv_filter_grad")
def conv_filter_grad(op):
    layout, settings = convolution(op)
    op.attr_is("num_spatial_dims", 2)
    x, dy = channels_first(op.input("x"), layout), channels_first(op.input("dy"), layout)
    shape = (dy.shape[1], x.shape[1] // settings["groups"], *op.attr("kernel_size"))
    op.output("filter_diff", as_format(grad.conv2d_weight(x, shape, dy, **settings), layout))


# Batch norms.


def along(vector: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """A vector of channels, so that it meets the axis of the channels."""
    return vector.view([-1 if i == axis else 1 for i in range(ndim)])


def others(axis: int, ndim: int) -> list[int]:
    return [i for i in range(ndim) if i != axis]


def normalize(op: Operator) -> torch.Tensor:
    """By the batch's own mean and biased variance, which the running ones move towards."""
    x, axis = op.input("x"), op.attr("axis")
    dims = others(axis, x.ndim)
    count = x.numel() // x.shape[axis]
    mean, variance = x.mean(dim=dims), x.var(dim=dims, correction=0)
    inverse = torch.rsqrt(variance + op.attr("epsilon"))
    kept = op.attr("momentum")
    unbiased = variance * (count / (count - 1))
    for key, new in (("moving_mean", mean), ("moving_variance", unbiased)):
        op.write(key, kept * op.input(key) + (1.0 - kept) * new)
    op.output("mean", mean)
    op.output("inv_variance", inverse)
    scale, beta = op.input("gamma") * inverse, op.input("beta")
    return (x - along(mean, axis, x.ndim)) * along(scale, axis, x.ndim) + along(beta, axis, x.ndim)


@computes("normalization")
def normalization(op):
    op.attr_is("training", True)
    y = normalize(op)
    if op.has("_add_to_output"):
        y = y + op.input("_add_to_output")
    op.output("y", y)


@computes("normalization_add_relu", "cudnn_fused_normalization_add_relu")
def normalization_add_relu(op):
    if op.spec["type"] == "normalization_add_relu":
        op.attr_is("training", True)
    y = normalize(op)
    if op.has("addend"):
        y = y + op.input("addend")
    op.output("y", functional.relu(y))
    op.output_hidden("reserve_space", y > 0)


def normalize_grad(op: Operator, dy: torch.Tensor) -> None:
    x, axis, ndim = op.input("x"), op.attr("axis"), dy.ndim
    op.no_matter("epsilon")  # it is in inv_variance
    dims, count = others(axis, ndim), x.numel() // x.shape[axis]
    mean, inverse, gamma = op.input("mean"), op.input("inv_variance"), op.input("gamma")
    normalized = (x - along(mean, axis, ndim)) * along(inverse, axis, ndim)
    gamma_diff, beta_diff = (dy * normalized).sum(dim=dims), dy.sum(dim=dims)
    op.output("gamma_diff", gamma_diff)
    op.output("beta_diff", beta_diff)
    by_mean = along(beta_diff / count, axis, ndim)
    by_variance = normalized * along(gamma_diff / count, axis, ndim)
    op.output("dx", along(gamma * inverse, axis, ndim) * (dy - by_mean - by_variance))


@computes("normalization_grad")
def normalization_grad(op):
    normalize_grad(op, op.input("dy"))


@computes("normalization_add_relu_grad", "cudnn_fused_normalization_add_relu_grad")
def normalization_add_relu_grad(op):
    positive, y = op.input("reserve_space"), op.input("y")
    # A y that is too small for half precision is 0; cuDNN may look at either.
    op.expect(not ((y > 0) & ~positive).any(), "the reserved mask belongs to another y")
    dy = op.input("dy") * positive
    op.input("beta")
    normalize_grad(op, dy)
    if op.gives("addend_diff"):
        op.output("addend_diff", dy)


# Pooling.


def max_pool(op: Operator, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) of max_pool_2d or tf_max_pool_2d."""
    op.attr_is("ceil_mode", False)
    if op.spec["type"].startswith("tf_"):
        op.attr_is("padding", "customized")
        window, stride = op.attr("pool_size"), op.attr("strides")
        (top, left), (bottom, right) = op.attr("padding_before"), op.attr("padding_after")
    else:
        op.attr_is("dilation", [1, 1])
        op.no_matter("return_indices")
        window, stride = op.attr("kernel_size"), op.attr("stride")
        top, left = bottom, right = op.attr("padding")
    padded = functional.pad(x, (left, right, top, bottom), value=-math.inf)
    return functional.max_pool2d(padded, window, stride)


@computes("max_pool_2d", "tf_max_pool_2d")
def max_pool_2d(op):
    layout = op.attr("data_format")
    y = as_format(max_pool(op, channels_first(op.input("x"), layout)), layout)
    op.output("y", y)
    if op.gives("indice"):
        op.output("indice", torch.zeros(y.shape, dtype=torch.int64))  # the gradient recomputes them


@computes("max_pool_2d_grad", "tf_max_pool_2d_grad")
def max_pool_2d_grad(op):
    layout = op.attr("data_format")
    x = channels_first(op.input("x"), layout).detach().requires_grad_()
    with torch.enable_grad():
        y = max_pool(op, x)
    if op.has("indice"):
        op.input("indice")
    else:
        op.expect(torch.equal(as_format(y, layout), op.input("y")), "y is not that of this x")
    (dx,) = torch.autograd.grad(y, x, channels_first(op.input("dy"), layout))
    op.output("dx", as_format(dx, layout))


# Element by element, and shapes.


@computes("relu")
def relu(op):
    op.output("y", functional.relu(op.input("x")))


@computes("relu_grad")
def relu_grad(op):
    op.output("dx", op.input("dy") * (op.input("y") > 0))


BINARY = {
    "broadcast_add": torch.add,
    "broadcast_div": torch.div,
    "broadcast_equal": torch.eq,
    "broadcast_greater": torch.gt,
    "broadcast_greater_equal": torch.ge,
    "broadcast_logical_and": torch.logical_and,
    "broadcast_logical_or": torch.logical_or,
    "broadcast_mul": torch.mul,
}


@computes(*BINARY)
def binary(op):
    op.output("z", BINARY[op.spec["type"]](op.input("x"), op.input("y")))


@computes("broadcast_div_grad")
def broadcast_div_grad(op):
    """Of x / y for y; the sum goes over what y was repeated along."""
    y, dz = op.input("y"), op.input("dz")
    op.output("dy", (-(op.input("z") / y) * dz).sum_to_size(y.shape))


def operand(op: Operator, key: str | None = None):
    """The number among an operator's attributes, in the type of the input that it meets."""
    kinds = [k for k in ("bool", "int", "float") if f"has_{k}_operand" in op.spec["attr"]]
    has = [kind for kind in kinds if op.attr(f"has_{kind}_operand")]
    values = {kind: op.attr(f"{kind}_operand") for kind in kinds}
    op.expect(len(has) == 1, f"operands {has}")
    value = values[has[0]]
    if op.input_is_half(key):
        return torch.tensor(value).half().item()
    if op.input(key).dtype == torch.float32:
        return torch.tensor(value, dtype=torch.float32).item()
    return value


SCALAR = {
    "scalar_add": torch.add,
    "scalar_logical_equal": torch.eq,
    "scalar_logical_greater_equal": torch.ge,
    "scalar_logical_less": torch.lt,
    "scalar_mul": torch.mul,
}


@computes(*SCALAR)
def scalar(op):
    op.output("out", SCALAR[op.spec["type"]](op.input("in"), operand(op, "in")))


@computes("scalar_mul_by_tensor")
def scalar_mul_by_tensor(op):
    factor = op.input("scalar")
    op.expect(factor.numel() == 1, f"scalar is {list(factor.shape)}")
    op.output("y", op.input("x") * factor.reshape(()))


@computes("add_n")
def add_n(op):
    op.output("out", sum(op.all("in")[1:], op.all("in")[0]))


@computes("negative")
def negative(op):
    op.output("y", -op.input("x"))


@computes("reciprocal")
def reciprocal(op):
    op.output("y", 1 / op.input("x"))


@computes("cast")
def cast(op):
    op.attr_is("pin_memory", False)
    kind = op.attr("dtype")
    # The announced type rounds to half precision.
    op.output("out", op.input("in").to(op.work if kind == "float16" else op.dtype(kind)))
    op.expect(op.spec["out"]["out"][0][1] == kind, f"gives something else than {kind}")


@computes("identity")
def identity(op):
    op.output("out", op.input("in"))


@computes("transpose")
def transpose(op):
    op.output("output", op.input("input").permute(op.attr("perm")))


@computes("reshape")
def reshape(op):
    op.output("out", op.input("in").reshape(op.attr("shape")))


@computes("expand_dims")
def expand_dims(op):
    op.output("out", op.input("in").unsqueeze(op.attr("axis")))


@computes("pad")
def pad(op):
    x, before, after = op.input("x"), op.attr("padding_before"), op.attr("padding_after")
    op.no_matter("padding", "integral_constant_value")  # `padding` is the two others once more
    widths = [
        width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair
    ]
    op.output("y", functional.pad(x, widths, value=op.attr("floating_constant_value")))


@computes("broadcast_like")
def broadcast_like(op):
    x, like = op.input("x"), op.input("like")
    if x.ndim < like.ndim:
        for axis in sorted(op.attr("broadcast_axes")):
            x = x.unsqueeze(axis)
    op.no_matter("broadcast_axes")
    op.output("y", x.expand(like.shape))


@computes("ones_like")
def ones_like(op):
    op.output("out", torch.ones_like(op.input("like")))


@computes("zero_like")
def zero_like(op):
    op.output("out", torch.zeros_like(op.input("like")))


@computes("arange")
def arange(op):
    op.attr_is("dtype", "int32", "int64")
    op.no_matter("float_start", "float_limit", "float_delta", "nd_sbp")
    bounds = (op.attr(f"integer_{name}") for name in ("start", "limit", "delta"))
    op.output("out", torch.arange(*bounds, dtype=op.dtype(op.attr("dtype"))))


@computes("dim_gather")
def dim_gather(op):
    op.output("output", torch.gather(op.input("input"), op.attr("dim"), op.input("index")))


@computes("where")
def where(op):
    op.output("out", torch.where(op.input("condition"), op.input("x"), op.input("y")))


@computes("masked_fill")
def masked_fill(op):
    op.output("out", op.input("x").masked_fill(op.input("mask"), operand(op, "x")))


# Sums, products, the loss.


@computes("matmul")
def matmul(op):
    a, b = op.input("a"), op.input("b")
    a = a.mT if op.attr("transpose_a") else a
    b = b.mT if op.attr("transpose_b") else b
    op.output("out", op.attr("alpha") * (a @ b))


@computes("reduce_sum")
def reduce_sum(op):
    x = op.input("input_tensor")
    op.output("output_tensor", x.sum(dim=op.attr("axis"), keepdim=op.attr("keepdims")))


@computes("reduce_sum_like")
def reduce_sum_like(op):
    x, like, axes = op.input("x"), op.input("like"), op.attr("axis")
    op.output("y", (x.sum(dim=axes) if axes else x).reshape(like.shape))


@computes("log_softmax")
def log_softmax(op):
    op.output("prob", functional.log_softmax(op.input("in"), dim=-1))


@computes("log_softmax_grad")
def log_softmax_grad(op):
    dy, logarithm = op.input("dy"), op.input("prob")
    op.output("dx", dy - logarithm.exp() * dy.sum(dim=-1, keepdim=True))


@computes("nll")
def nll(op):
    x, target = op.input("input"), op.input("target").long()
    counted = target != op.attr("ignore_index")
    picked = torch.gather(x, 1, (target * counted).unsqueeze(1)).squeeze(1)
    op.output("output", -picked * counted)
    op.output("out_weight", counted.to(x.dtype))


@computes("nll_grad")
def nll_grad(op):
    x, target, dy = op.input("input"), op.input("target").long(), op.input("out_grad")
    counted = target != op.attr("ignore_index")
    places = (target * counted).unsqueeze(1)
    op.output("in_grad", torch.zeros_like(x).scatter(1, places, -(dy * counted).unsqueeze(1)))


# The loss scale, the schedule, the updates.


@computes("multi_count_not_finite")
def multi_count_not_finite(op):
    count = sum(int((~torch.isfinite(x)).sum()) for x in op.all("x"))
    op.output("y", torch.tensor([count]))


@computes("dynamic_loss_scale_schedule")
def dynamic_loss_scale_schedule(op):
    scale, good = op.input("loss_scale").item(), op.input("good_step_counter").item() + 1
    factor, period = op.attr("multiplier"), op.attr("increment_period")
    if op.input("count_not_finite").item() > 0:
        scale, good = max(scale / factor, 1.0), 0
    elif good >= period:
        scale, good = min(scale * factor, FLOAT32_MAX), 0
    op.write("loss_scale", torch.tensor([scale], dtype=op.work))
    op.write("good_step_counter", torch.tensor([good]))


@computes("assign")
def assign(op):
    op.input("ref")
    op.write("ref", op.input("value"))


@computes("assign_if_not")
def assign_if_not(op):
    ref, value = op.input("ref"), op.input("value")
    op.write("ref", ref if op.input("condition").item() else value)


def decayed(op: Operator, conf: dict, rate: float, step: int) -> float:
    """A learning rate after a schedule, which may be made of others."""
    ((kind, settings),) = conf.items()
    if kind == "sequential_scheduler_conf":
        reached = 0
        for milestone, rescales in zip(
            settings["milestones"], settings["interval_rescaling"], strict=True
        ):
            if step < milestone:
                break
            op.expect(bool(rescales), "a part of a schedule that counts from the start of the run")
            reached += 1
        start = settings["milestones"][reached - 1] if reached else 0
        return decayed(op, settings["schedulers"][reached], rate, step - start)
    if kind == "linear_lr_conf":
        total, start, end = (settings[k] for k in ("total_iters", "start_factor", "end_factor"))
        return rate * (start + (end - start) * min(step / total, 1))
    if kind == "cosine_conf":
        alpha, done = settings["alpha"], min(step / settings["decay_batches"], 1)
        return rate * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * done)) + alpha)
    op.fail(f"a schedule of unknown type: {kind}")


@computes("learning_rate_schedule")
def learning_rate_schedule(op):
    step, rate = op.input("train_step").item(), op.attr("learning_rate")
    rate = decayed(op, op.attr("learning_rate_decay"), rate, step)
    op.output("out", torch.tensor([rate], dtype=op.work))


@computes("momentum_update")
def momentum_update(op):
    op.attr_is("learning_rate_val", 0.0)  # in place of the input
    op.attr_is("l1", 0.0)
    op.attr_is("nesterov", False)
    op.attr_is("maximize", False)
    model, momentum = op.input("model"), op.input("momentum")
    scale = op.attr("scale")
    if op.has("scale_by_tensor"):
        scale = scale * op.input("scale_by_tensor").item()
    gradient = scale * op.input("model_diff") + op.attr("l2") * model
    rate = op.input("learning_rate").item() * op.attr("learning_rate_scale")
    direction = op.attr("beta") * momentum + (1 - op.attr("dampening")) * gradient
    updated = model - rate * direction - rate * op.attr("weight_decay") * model
    if op.has("skip_if") and op.input("skip_if").item() != 0:
        updated, direction = model, momentum
    op.write("model", updated)
    op.write("momentum", direction)
