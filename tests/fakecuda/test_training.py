"""Every network, precision and layout trains, goes on, evaluates and classifies on CUDA.

The device computes nothing, so no figure means anything here. What is looked at: it ran to the end,
every kernel was there, and what was compiled, for which device and in which precision.
"""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import fake
import jobs
import model_registry
import small
from cnns.models.layers import Dropout

pytestmark = pytest.mark.usefixtures("device")

NUM_CLASSES = 4
BATCH_SIZE = 2
FUSED_NHWC = ("--channel_last", "--fuse_bn_relu", "--fuse_bn_add_relu")
VARIANTS = {
    "plain": (),
    "channel_last": ("--channel_last",),
    "fused": ("--fuse_bn_relu", "--fuse_bn_add_relu"),
    "fused_channel_last": FUSED_NHWC,
    "padded": ("--pad_output",),
    "all": (*FUSED_NHWC, "--pad_output"),
}
# The networks of the project, and a small one that has all switches as well.
NETWORKS = model_registry.MODELS | {"tiny": small.TINY}
QUICK = [("tiny", False, "plain"), ("tiny", True, "all")]
LINE = re.compile(  # as small.LINE, whatever the figures
    r"(?:train|validation): epoch (\d+), iter (\d+),(?: loss: \S+,)? top_1: \S+, top_k: \S+, "
    r"samples/s: \S+"
)


def variants(model: str) -> dict[str, tuple[str, ...]]:
    """The combinations of switches that a network offers."""
    offered = {f"--{name}" for name in NETWORKS[model].switches}
    return {name: flags for name, flags in VARIANTS.items() if offered.issuperset(flags)}


MATRIX = [
    pytest.param(
        model,
        use_fp16,
        variant,
        marks=() if (model, use_fp16, variant) in QUICK else pytest.mark.slow,
        id=f"{model}-{'fp16' if use_fp16 else 'float32'}-{variant}",
    )
    for model in NETWORKS
    for use_fp16 in (False, True)
    for variant in variants(model)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    small.write_sets(root, {"validation": (5,)}, num_classes=NUM_CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return root


@pytest.mark.parametrize("model, use_fp16, variant", MATRIX)
def test_train_resume_evaluate_classify(model, use_fp16, variant, data, tmp_path):
    computing = (*variants(model)[variant], *(("--use_fp16",) if use_fp16 else ()))
    image_size = max(32, NETWORKS[model].min_image_size)
    common = ("--device=cuda", *computing)
    session = jobs.Session(
        (
            "train",
            *common,
            f"--model={model}",
            f"--num_classes={NUM_CLASSES}",
            f"--image_size={image_size}",
            f"--batch_size_per_device={BATCH_SIZE}",
            f"--num_examples={2 * BATCH_SIZE}",
            f"--num_val_examples={BATCH_SIZE}",
            "--num_epochs=1",
            "--loss_print_every_n_iter=1",
            "--model_save_dir=run",
        ),
        ("train", "--device=cuda", "--resume=run/snapshot_epoch_0", "--num_epochs=2")
        + ("--model_save_dir=run",),
        (
            "evaluate",
            *common,
            "--model_load_dir=run/snapshot_epoch_1",
            f"--val_data_dir={data / 'validation'}",
            f"--val_batch_size_per_device={BATCH_SIZE}",
        ),
        (
            "inference",
            *common,
            "--model_load_dir=run/snapshot_epoch_1",
            f"--image_path={data / 'image.png'}",
        ),
        env=fake.environment(log=tmp_path / "device.log"),
        cwd=tmp_path,
    )
    first, resumed, evaluated, classified = done = session.finish()
    for each in done:
        assert each.status in (0, None), each.stderr
    assert jobs.read_log(tmp_path / "device.log").faults == []

    for epoch, each in enumerate((first, resumed)):
        steps = [m.groups() for m in map(LINE.fullmatch, each.stdout.splitlines()) if m]
        assert steps == [(f"{epoch}", "1"), (f"{epoch}", "2"), (f"{epoch}", "1")]
        assert f"Saving model to run/snapshot_epoch_{epoch}.\n" in each.stdout
        assert each.jobs.keys() == {"TrainGraph", "EvalGraph"}
    assert "Restoring model from run/snapshot_epoch_0.\n" in resumed.stdout
    assert LINE.fullmatch(evaluated.stdout.splitlines()[-1])
    assert classified.stdout.splitlines()[0] == str(data / "image.png")
    assert len(classified.stdout.splitlines()) == 2

    check_devices(first.jobs["TrainGraph"], schedule=True, use_fp16=use_fp16)
    check_devices(resumed.jobs["TrainGraph"], schedule=True, use_fp16=use_fp16)
    for graph in (first.jobs["EvalGraph"], evaluated.jobs["EvalGraph"]):
        check_devices(graph, schedule=False, use_fp16=use_fp16)
    check_devices(classified.jobs["PredictGraph"], schedule=False, use_fp16=use_fp16)
    for each in done:
        for graph, operators in each.jobs.items():
            check_precision(operators, use_fp16=use_fp16)
            check_loss(
                operators,
                heads=HEADS.get(graph, 0) + (graph == "TrainGraph" and model == "inceptionv3"),
            )
    # Resuming compiles the same.
    assert kinds(resumed.jobs["TrainGraph"]) == kinds(first.jobs["TrainGraph"])


def kinds(operators: list[jobs.Operator]) -> Counter:
    return Counter((op.kind, op.device, *sorted(op.dtypes)) for op in operators)


# What happens on the host in a step: when a step begins and ends, ...
TICKS = re.compile(r"(\w+_)?tick|wait_and_send_ids|callback_notify")
# ... the number of the step, from which the learning rate follows, ...
SCHEDULE = Counter(["variable", "identity", "scalar_add", "learning_rate_schedule"])
# ... and in half precision the loss scale, its inverse, and the steps since it last changed.
LOSS_SCALE = Counter(
    ["variable"] * 2 + ["identity"] * 2 + ["dynamic_loss_scale_schedule", "reciprocal"]
)


def check_devices(
    operators: list[jobs.Operator], *, schedule: bool, use_fp16: bool, more: dict | None = None
) -> None:
    """Only scalars are computed on the host: those of the schedules, and `more`, by kinds."""
    assert {op.device for op in operators} == {"cuda", "cpu"}
    host = [op for op in operators if op.device == "cpu" and not TICKS.fullmatch(op.kind)]
    expected = Counter(more or {})
    if schedule:
        expected += SCHEDULE + Counter(["assign_if_not" if use_fp16 else "assign"])
        expected += LOSS_SCALE if use_fp16 else Counter()
    assert Counter(op.kind for op in host) == expected
    assert all(blob.num_elements == 1 for op in host for blob in op.inputs + op.outputs)


def check_precision(operators: list[jobs.Operator], *, use_fp16: bool) -> None:
    """Weights and what the optimizer keeps are float32; products are of the precision asked for."""
    kept = {blob.dtype for op in operators if op.kind == "variable" for blob in op.outputs}
    assert kept <= {"float32", "int64"}  # int64 are counters of steps
    products = [op for op in operators if re.match(r"conv2d|conv_\w+_grad|\w*matmul", op.kind)]
    assert products
    for op in products:
        assert op.dtypes == {"float16" if use_fp16 else "float32"}, op
    if not use_fp16:
        assert not any("float16" in op.dtypes for op in operators)


LOSS = ("log_softmax", "log_softmax_grad", "nll", "nll_grad", "broadcast_div", "softmax")
LOSS += ("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits_grad")
# Reductions that give half precision, by their names; all others are float32. Within its kernel
# OneFlow adds up in float32, so what half precision costs is one rounding of the sum.
HALF_REDUCTIONS = {
    # Means of activations after a ReLU, up to 7 x 7 of them, and gradients of convolutions' biases.
    "reduce_sum": r"model[-.].*",
    # Gradients of biases of linear layers before the last.
    "reduce_sum_like": r"model\..*",
}


HEADS = {"TrainGraph": 1, "EvalGraph": 1}  # losses over logits


def check_loss(operators: list[jobs.Operator], *, heads: int) -> None:
    """Everything from the logits on is float32, with its sums over the batch."""
    assert sum(op.kind == "log_softmax" for op in operators) == heads
    for op in operators:
        if op.kind in LOSS or "cross_entropy" in op.name and op.kind != "cast":
            assert "float16" not in op.dtypes, op
        if op.kind.startswith("reduce_") and "float16" in op.dtypes:
            assert re.fullmatch(HALF_REDUCTIONS.get(op.kind, ""), op.name), op


def test_grouped_convolutions_refuse_channel_last(tmp_path):
    session = jobs.Session(
        ("train", "--device=cuda", "--model=resnext50", "--channel_last", "--model_save_dir=run"),
        env=fake.environment(),
        cwd=tmp_path,
    )
    (done,) = session.finish()
    assert done.status == 2
    (line,) = done.stderr.splitlines()
    assert "--channel_last" in line and "resnext50" in line
    assert done.jobs == {} and not (tmp_path / "run").exists()


# Settings of the optimizer, on the small networks of the tests.

UPDATES = {"sgd": "momentum_update", "adam": "adam_update", "rmsprop": "rmsprop_update"}
SCHEDULES = ("cosine", "step", "polynomial", "exponential", "none")
SETTINGS = {
    **{optimizer: ("--model=toy", f"--optimizer={optimizer}") for optimizer in UPDATES},
    "sgd without momentum": ("--model=toy", "--momentum=0"),
    "adam, clipped, half": ("--model=toy", "--optimizer=adam", "--use_fp16")
    + ("--gradient_clipping=1",),
    "clipped": ("--model=toy", "--gradient_clipping=1"),
    **{schedule: ("--model=toy", f"--lr_decay={schedule}") for schedule in SCHEDULES},
    "bce": ("--model=toy", "--loss=bce", "--bce_target_threshold=0.2"),
    "bce, summed, half": ("--model=toy", "--loss=bce", "--bce_sum", "--use_fp16"),
    "ema": ("--model=toy", "--ema_decay=0.9", "--ema_steps=1"),
    "ema, half": ("--model=tiny", "--ema_decay=0.9", "--use_fp16", "--channel_last"),
    "accumulating": ("--model=toy", "--accumulate_steps=2", "--ema_decay=0.9"),
    "accumulating, fused": ("--model=tiny", "--accumulate_steps=2", "--gradient_clipping=1")
    + FUSED_NHWC,
    "nesterov": ("--model=toy", "--nesterov", "--norm_wd=0.1", "--bias_wd=0", "--lr_min=0.001"),
    "frozen, half": ("--model=tiny", "--freeze=conv1,bn1,layer1", "--use_fp16") + FUSED_NHWC,
    "lars": ("--model=toy", "--optimizer=lars", "--learning_rate=1"),
    "lamb, half": ("--model=tiny", "--optimizer=lamb", "--use_fp16", "--gradient_clipping=1")
    + FUSED_NHWC,
    "layered": ("--model=toy", "--layer_decay=0.5", "--gradient_clipping=1", "--nesterov"),
    "layered, half": ("--model=toy", "--layer_decay=0.5", "--optimizer=adam", "--use_fp16"),
    "depth, half": ("--model=tiny", "--stochastic_depth=0.5", "--use_fp16", "--channel_last"),
    "dropping": ("--model=dropping",),
    "dropping, half": ("--model=dropping", "--use_fp16"),
}
STEPS = 2


def compile_all(settings: dict[str, tuple[str, ...]], directory) -> tuple[dict, jobs.Log]:
    """The training jobs of settings, and the log of the device."""
    session = jobs.Session(
        *(
            (
                "train",
                "--device=cuda",
                "--num_classes=10",
                f"--batch_size_per_device={BATCH_SIZE}",
                f"--num_examples={STEPS * BATCH_SIZE}",
                f"--num_val_examples={BATCH_SIZE}",
                "--num_epochs=1",
                f"--model_save_dir={i}",
                *flags,
            )
            for i, flags in enumerate(settings.values())
        ),
        env=fake.environment(log=directory / "device.log"),
        cwd=directory,
    )
    done = dict(zip(settings, session.finish(), strict=True))
    log = jobs.read_log(directory / "device.log")
    assert log.faults == []
    for name, each in done.items():
        assert each.status in (0, None), (name, each.stderr)
    return {name: each.jobs for name, each in done.items()}, log


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    settings = {name: flags for name, flags in SETTINGS.items() if "--model=tiny" not in flags}
    return compile_all(settings, tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def compiled(toys, tmp_path_factory):
    """The training jobs of SETTINGS."""
    settings = {name: flags for name, flags in SETTINGS.items() if "--model=tiny" in flags}
    return toys[0] | compile_all(settings, tmp_path_factory.mktemp("tinies"))[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_optimizers_and_schedules_compile(compiled, name):
    operators = compiled[name]["TrainGraph"]
    flags = " ".join(SETTINGS[name])
    found = Counter(op.kind for op in operators)
    optimizer = "adam" if "adam" in flags else "rmsprop" if "rmsprop" in flags else "sgd"
    update = "sgd_update" if "--momentum=0" in flags else UPDATES[optimizer]
    composed = "UpdateGraph" in compiled[name]
    assert composed == bool(re.search("lars|lamb|layer_decay", flags))
    if composed:  # gradients are kept as momenta, and for lamb adam's means
        optimizer = "adam" if "lamb" in flags else "sgd"
        update = UPDATES[optimizer]
    frozen = r"(?!conv1|bn1|layer1)" if "freeze" in flags else ""
    trained = rf"model\.{frozen}.*(weight|bias)"
    parameters = sum(bool(re.fullmatch(trained, op.name)) for op in operators)
    # The average changes by SGD's operator, in float32: parameters and statistics.
    averages = "ema_decay" in flags and "accumulate" not in flags
    blends = [op for op in operators if op.kind == "sgd_update" and averages]
    assert all(op.dtypes == {"float32"} for op in blends)
    statistics = sum(bool(re.fullmatch(r"average\..*running_\w+", op.name)) for op in operators)
    assert (len(blends) == parameters + statistics > 0) == averages
    assert {kind: n for kind, n in found.items() if kind.endswith("_update")} == {
        update: parameters
    } | ({"sgd_update": len(blends)} if blends else {})
    # Adam keeps the corrections of its means' bias as scalars; those are computed on the host.
    more = {"adam_bias_correction_factor": 2} if optimizer == "adam" else {}
    check_devices(operators, schedule=True, use_fp16="--use_fp16" in flags, more=more)
    check_precision(operators, use_fp16="--use_fp16" in flags)
    check_loss(operators, heads=0 if "bce" in flags else 1 + ("dropping" in flags))
    assert found["binary_cross_entropy_with_logits"] == ("bce" in flags)
    # The norm over all gradients at once.
    assert found["multi_reduce_sum_pow_abs"] == ("--gradient_clipping" in flags)


@pytest.mark.parametrize("name", ["lars", "lamb, half", "layered", "layered, half"])
def test_composed_updates_compile(compiled, name):
    """In float32, on the device, with an operator for each weight, one for the count, and in half
    precision one that remembers by what to know that a step was skipped."""
    operators, flags = compiled[name]["UpdateGraph"], " ".join(SETTINGS[name])
    variables = [op.name for op in operators if op.kind == "variable"]
    weights = sum(re.fullmatch(r"model\..*(weight|bias)", each) is not None for each in variables)
    kind = "sgd" if "lamb" in flags else "adam" if "adam" in flags else "momentum"
    expected = Counter({f"{kind}_update": weights}) + Counter(sgd_update=1 + ("fp16" in flags))
    found = Counter(op.kind for op in operators if op.kind.endswith("_update"))
    assert weights > 4 and found == expected
    host = [op for op in operators if op.device == "cpu" and not TICKS.fullmatch(op.kind)]
    assert host == []
    assert not any("float16" in op.dtypes for op in operators)


def test_dropout_masks_reach_the_device(toys):
    """A mask for each layer, step and run, and each is multiplied with."""
    operators = toys[0]["dropping"]["TrainGraph"]
    masks = [op.name for op in operators if op.kind == "input"][2:]  # behind image and label
    layers = [m for m in small.Dropping().modules() if isinstance(m, Dropout)]
    assert len(masks) == len(layers) == 2
    products = [op for op in operators if op.kind == "broadcast_mul" and "model" in op.name]
    for mask in masks:
        assert any(blob.name.startswith(mask) for op in products for blob in op.inputs), mask
    runs = sum("dropping" in name for name in SETTINGS)
    size = BATCH_SIZE * layers[0].features * 4
    assert toys[1].copied("HD")[size] == runs * STEPS * len(layers)
