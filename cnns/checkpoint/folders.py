"""Folders of OneFlow as arrays by name: of flow.save, and with a folder for each variable.

Nothing in them is run or imported (see pickles.py), and no path in them leaves its folder.
"""

import math
import os
import re

import numpy as np
from google.protobuf import text_format
from oneflow.core.framework.variable_meta_info_pb2 import VariableMetaInfo

from cnns.checkpoint.pickles import (
    MAX_BYTES,
    Reader,
    Refused,
    Stub,
    check_shape,
    excerpt,
    expect,
    find_weights,
    ordered_dict,
)
from cnns.checkpoint.pytorch import as_float32
from cnns.inputs import is_within

PICKLE_NAME = "pickled_data"  # of flow.save
DATA, META = "out", "meta"  # files of a variable
MAX_META_BYTES = 1 << 16
# What an optimizer or a schedule keeps beside the weights.
OF_TRAINING = re.compile("System-.*|.*-(momentum|m|v|mean_square|mean_gradient)")
META_TYPES = {"kFloat": "<f4", "kDouble": "<f8", "kFloat16": "<f2", "kInt64": "<i8"}
FLOW_SAVE = Reader(
    calls={"collections.OrderedDict": ordered_dict},
    classes=frozenset({"oneflow.Tensor", "oneflow.nn.Parameter"}),
)


def read_flow_save(path: str) -> dict[str, np.ndarray]:
    with open(os.path.join(path, PICKLE_NAME), "rb") as file:
        value, _ = FLOW_SAVE.read(file.read(MAX_BYTES))
    content = expect(value, dict)
    if content.get("protocol_version") != 1:
        raise Refused("it is of an unknown version of flow.save")
    arrays, by_folder = {}, {}
    for name, stub in find_weights(content.get("data"), Stub).items():
        folder = stub.state.get("path")
        if not isinstance(folder, str) or not re.fullmatch("(global_)?tensor_[0-9]+", folder):
            place = excerpt(folder) if isinstance(folder, str) else "nothing that is a path"
            raise Refused(f"{excerpt(name)} in it lies at {place}")
        if folder not in by_folder:  # two names may share a tensor
            by_folder[folder], has_shape = read_variable(path, folder)
            if not has_shape:
                raise Refused(f"{folder}/{META} in it is missing")
        if not OF_TRAINING.fullmatch(name):
            arrays[name] = by_folder[folder]
    return arrays


def read_variable(path: str, folder: str) -> tuple[np.ndarray, bool]:
    """`out` of a variable's folder, and whether `meta` gave its shape; else it is (N,) float32."""
    data_path, meta_path = (os.path.join(path, folder, name) for name in (DATA, META))
    if not os.path.isfile(data_path):
        raise Refused(f"{data_path} is missing")
    if not (is_within(data_path, path) and is_within(meta_path, path)):
        raise Refused(f"{data_path} is a link that leads out of it")
    size = os.path.getsize(data_path)
    if not os.path.isfile(meta_path):
        if size % 4:
            raise Refused(f"{data_path} has {size} bytes, which is not a multiple of 4")
        return np.fromfile(data_path, "<f4"), False
    shape, kind = read_meta(meta_path)
    count = math.prod(shape)
    if size != count * np.dtype(kind).itemsize:
        raise Refused(f"{data_path} has {size} bytes, and its meta says {shape} of {kind}")
    array = np.fromfile(data_path, kind).reshape(shape)
    return as_float32(array, kind), True


def read_meta(path: str) -> tuple[tuple[int, ...], str]:
    message = VariableMetaInfo()
    try:
        with open(path, encoding="utf-8") as file:
            text_format.Parse(file.read(MAX_META_BYTES), message)
    except (text_format.ParseError, UnicodeDecodeError):
        raise Refused(f"{path} is damaged") from None
    field_type = type(message).DESCRIPTOR.fields_by_name["data_type"].enum_type
    kind = field_type.values_by_number[message.data_type].name
    if kind not in META_TYPES:
        raise Refused(f"{path} says {kind}, and floats are needed")
    return check_shape(message.shape.dim), META_TYPES[kind]


def has_variables(path: str) -> bool:
    with os.scandir(path) as entries:
        return any(os.path.isfile(os.path.join(entry.path, DATA)) for entry in entries)


def read_variables(path: str) -> tuple[dict[str, np.ndarray], bool]:
    """The variables in a folder of folders, and whether their shapes are known."""
    arrays, with_shape = {}, set()
    for name in sorted(os.listdir(path)):
        folder = os.path.join(path, name)
        if os.path.isfile(os.path.join(folder, DATA)) and not OF_TRAINING.fullmatch(name):
            arrays[name], has_shape = read_variable(path, name)
            with_shape.add(has_shape)
    if len(with_shape) > 1:
        raise Refused("some of its variables have a meta file, and some do not")
    return arrays, with_shape != {False}
