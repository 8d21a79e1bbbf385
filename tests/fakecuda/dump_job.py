"""Compile training steps for CUDA and write the jobs that came out, for compute_plan.py.

    export $(python3 tests/fakecuda/fake.py)
    python3 tests/fakecuda/dump_job.py DIRECTORY CASE ...

The cases are those of tests/golden/plans.py; each becomes DIRECTORY/plan_CASE.json.gz. Needs the
environment of the tests and the device that computes nothing (see fake.py), or a real one.

A job is what OneFlow's own passes have made of a graph: forward, backward, casts, fused operators,
loss scale, schedule and updates, all as operators with attributes. It is written without what
differs from run to run or says nothing of what is computed: counters in names, and the ticks that
start and end a step.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cnns.startup  # noqa: F401, E402  (first, see there)

import heapq  # noqa: E402
import re  # noqa: E402
from collections import Counter  # noqa: E402

import oneflow.core.common.data_type_pb2 as data_types  # noqa: E402

import of_cnn_train_val  # noqa: E402
from golden import plans  # noqa: E402

# These say when a step starts and ends, and pass nothing on that is computed with.
SCHEDULING = {
    "callback_notify_conf",
    "critical_section_callback_tick_conf",
    "critical_section_wait_tick_conf",
    "device_tick_conf",
    "dst_subset_tick_conf",
    "sink_tick_conf",
    "src_subset_tick_conf",
    "tick_conf",
    "wait_and_send_ids_conf",
}
TICK_INPUT = "UserSourceOpTickInput"
DATA_TYPES = {
    "kFloat": "float32",
    "kFloat16": "float16",
    "kDouble": "float64",
    "kBool": "bool",
    "kChar": "char",
    "kInt8": "int8",
    "kInt32": "int32",
    "kInt64": "int64",
}
# What matters in the operators that have a message of their own. What is left is ticks, and how
# blobs are shared out among devices.
INPUTS_OF = {
    "identity_conf": ("in",),
    "input_conf": (),
    "learning_rate_schedule_conf": ("train_step",),
    "output_conf": ("in",),
    "variable_conf": (),
}
ATTRIBUTES_OF = {
    "identity_conf": (),
    "input_conf": (),
    "learning_rate_schedule_conf": ("learning_rate", "learning_rate_decay"),
    "output_conf": (),
    "variable_conf": ("initializer", "regularizer", "trainable"),
}
# Their inputs stand in the order of a hash table.
COMMUTATIVE = {"multi_count_not_finite"}
# Of a convolution's or batch norm's working memory cuDNN alone knows the size.
SIZES_OF_CUDNN = {"reserve_space"}
# Of the settings of a job, those that a reader of its plan may ask for.
SETTINGS = (
    "enable_auto_mixed_precision",
    "mixed_precision_data_type",
    "enable_fuse_add_to_output",
    "enable_fuse_model_update_ops",
)


def compile_job(flags: list[str]):
    """The job (a protobuf message) of the training step that these flags of the script make."""
    spec = of_cnn_train_val.make_spec(of_cnn_train_val.parse_args(flags))
    parts = of_cnn_train_val.build_run(spec, save_dir="", log=lambda line: None).parts
    parts.model.train()
    parts.graph(*next(parts.loader.batches(0, 0)))[0].numpy()
    return parts.graph._compiled_graph_proto


def without_counters(name: str) -> str:
    """`model.conv1-conv2d-2` is `model.conv1-conv2d`."""
    return re.sub(r"[-_]\d+(?=$|[-_])", "", name)


def inputs_of(operator) -> dict[str, list[str]]:
    """Names of the blobs that an operator takes, ticks aside."""
    kind = operator.WhichOneof("op_type")
    conf = getattr(operator, kind)
    if kind != "user_conf":
        return {key: [getattr(conf, key)] for key in INPUTS_OF[kind]}
    return {key: list(each.s) for key, each in conf.input.items() if key != TICK_INPUT}


def in_order(operators: list) -> list:
    """Each operator behind those whose blobs it takes, in an order that no counter decides."""
    by_name = {op.name: op for op in operators}
    sources = {
        op.name: {blob.partition("/")[0] for blobs in inputs_of(op).values() for blob in blobs}
        for op in operators
    }
    takers = {op.name: [] for op in operators}
    for name, taken in sources.items():
        for source in taken:
            takers[source].append(name)
    keys = {
        op.name: (without_counters(op.name), sorted(map(without_counters, takers[op.name])), i)
        for i, op in enumerate(operators)
    }
    waiting = {name: len(taken) for name, taken in sources.items()}
    ready = [(keys[name], name) for name, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, name = heapq.heappop(ready)
        order.append(by_name[name])
        for taker in takers[name]:
            waiting[taker] -= 1
            if waiting[taker] == 0:
                heapq.heappush(ready, (keys[taker], taker))
    assert len(order) == len(operators), "the job has a cycle"
    return order


class Names:
    """Names of operators and of what they give without counters, and still different."""

    def __init__(self, names: list[str]):
        self.known, count = {}, Counter()
        for name in names:
            plain = without_counters(name)
            count[plain] += 1
            self.known[name] = plain if count[plain] == 1 else f"{plain}#{count[plain]}"

    def operator(self, name: str) -> str:
        return self.known[name]

    def blob(self, name: str) -> str:
        operator, _, output = name.partition("/")
        return f"{self.known[operator]}/{output}"


def data_type(number: int) -> str:
    return DATA_TYPES[data_types.DataType.Name(number)]


def attribute(value):
    """A value of an operator's attribute as JSON has it."""
    kind = value.WhichOneof("value")
    content = getattr(value, kind)
    if kind == "at_data_type":
        return data_type(content)
    if kind == "at_shape":
        return list(content.dim)
    if kind in ("at_list_int32", "at_list_int64", "at_list_float", "at_list_string"):
        return list(content.val)
    assert kind in ("at_bool", "at_int32", "at_int64", "at_float", "at_double", "at_string"), kind
    return content


def plain(value):
    """A protobuf message, or a part of one, as dictionaries and lists."""
    if hasattr(value, "ListFields"):
        return {field.name: plain(content) for field, content in value.ListFields()}
    if hasattr(value, "append"):
        return [plain(each) for each in value]
    return value


def describe(operator, names: Names, blobs: dict) -> dict:
    """One operator of a job."""
    kind = operator.WhichOneof("op_type")
    conf = getattr(operator, kind)
    if kind == "user_conf":
        sort = sorted if conf.op_type_name in COMMUTATIVE else list
        outputs = {key: list(each.s) for key, each in conf.output.items()}
        attributes = {key: attribute(each) for key, each in conf.attr.items()}
        kind = conf.op_type_name
    else:
        # Operators of OneFlow's first years: each has a message of its own.
        sort = list
        outputs = {"out": [f"{operator.name}/{conf.out}"]}
        parts = plain(conf)
        attributes = {key: parts[key] for key in ATTRIBUTES_OF[kind] if key in parts}
        kind = kind.removesuffix("_conf")
    return {
        "name": names.operator(operator.name),
        "type": kind,
        "device": operator.device_tag,
        "in": {
            key: sort([names.blob(each) for each in taken])
            for key, taken in inputs_of(operator).items()
        },
        "out": {
            key: [[names.blob(each), *describe_blob(blobs[each], key)] for each in outs]
            for key, outs in outputs.items()
        },
        "attr": attributes,
        "after": sorted(
            names.operator(name) for name in operator.ctrl_in_op_name if name in names.known
        ),
    }


def describe_blob(description, key: str) -> list:
    """Type and shape."""
    shape = None if key in SIZES_OF_CUDNN else list(description.shape.dim)
    return [data_type(description.data_type), shape]


def describe_job(job) -> dict:
    """The plan, as golden/plans.py stores and compares it."""
    operators = in_order([op for op in job.net.op if op.WhichOneof("op_type") not in SCHEDULING])
    names = Names([op.name for op in operators])
    blobs = dict(job.helper.lbn2logical_blob_desc)
    conf = job.job_conf
    settings = {name: getattr(conf, name) for name in SETTINGS if conf.HasField(name)}
    if "mixed_precision_data_type" in settings:
        settings["mixed_precision_data_type"] = data_type(settings["mixed_precision_data_type"])
    settings["loss"] = [names.blob(name) for name in conf.train_conf.loss_lbn]
    return {
        "settings": settings,
        "operators": [describe(op, names, blobs) for op in operators],
    }


def main() -> None:
    directory, *cases = sys.argv[1:]
    for case in cases:
        plan = describe_job(compile_job(plans.flags(case)))
        plans.write(plan, plans.path(case, Path(directory)))


if __name__ == "__main__":
    main()
