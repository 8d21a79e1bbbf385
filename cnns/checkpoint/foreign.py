"""Weights that others wrote: found out by their first bytes, and read as arrays by name.

    .safetensors                    of PyTorch, with torchvision's or timm's names
    .pth, .pt                       of PyTorch's torch.save, in its zip format and in the one before
    a folder with `pickled_data`    of OneFlow's flow.save
    a folder of folders with `out`  of OneFlow in 2020, and of flow.save of a graph

Nothing in these files is run or imported (see pickles.py), no path in them leaves its folder,
and nothing is read that is larger than the file it is in.
"""

import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from google.protobuf import text_format
from oneflow.core.framework.variable_meta_info_pb2 import VariableMetaInfo
from safetensors import SafetensorError, deserialize

from cnns.checkpoint.pickles import (
    MAX_BYTES,
    Name,
    Reader,
    Refused,
    Stub,
    expect,
    ordered_dict,
    printable,
)
from cnns.errors import RunError, UsageError
from cnns.models.model import Models

PICKLE_NAME = "pickled_data"  # of flow.save
LEGACY_DATA, LEGACY_META = "out", "meta"
ZIP_MAGIC = b"PK\x03\x04"
OLD_PTH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
FLOATS = ("<f2", "<f4", "<f8")
BFLOAT16 = "bfloat16"
# A tensor may stand under two names, and half precision doubles as float32.
MAX_GROWTH = 4
MAX_META_BYTES = 1 << 16
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
LAYOUTS = ("OIHW", "OHWI")
# What an optimizer or a schedule keeps beside the weights.
OF_TRAINING = re.compile("System-.*|.*-(momentum|m|v|mean_square|mean_gradient)")


@dataclass
class Foreign:
    """Weights of others, named as in torchvision where the names were known."""

    kind: str  # what the file is, for the user
    arrays: dict[str, np.ndarray]
    flat: bool = False  # shapes are not known: arrays are (N,)
    from_2020: bool = False  # layouts may be (O, H, W, I), and the stem may have a fourth channel
    layout: str | None = None  # OIHW or OHWI, where the user says so
    notices: list[str] = field(default_factory=list)


def read(path: str, *, layout: str | None = None) -> Foreign:
    """Read the weights in the file or folder `path`, whatever their format.

    Args:
        layout: of the convolutions of a 2020 folder that does not tell, OIHW or OHWI.

    Raises RunError where it is damaged, of no known format, or more than data.
    """
    try:
        foreign = read_folder(path) if os.path.isdir(path) else read_file(path)
    except Refused as error:
        way = "flow.save" if os.path.isdir(path) else "torch.save"
        raise RunError(
            f"{path} is refused: {error}; a file that holds nothing but weights is written by "
            f"{way}(model.state_dict(), PATH)"
        ) from None
    except OSError as error:
        raise RunError(f"cannot read {error.filename or path}: {error.strerror}") from None
    foreign.layout = layout
    foreign.arrays = {
        name: array
        for name, array in strip(foreign.arrays).items()
        if not name.endswith("num_batches_tracked")
    }
    if not foreign.from_2020:
        foreign.arrays = from_timm(foreign.arrays)
    for name, array in foreign.arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise RunError(f"{path}: {printable(name)} is not finite; nothing can be done with it")
    if not foreign.arrays:
        raise RunError(f"{path} holds no weights")
    return foreign


def read_folder(path: str) -> Foreign:
    if os.path.isfile(os.path.join(path, PICKLE_NAME)):
        return read_flow_save(path)
    if is_legacy_folder(path):
        return read_legacy(path)
    raise RunError(
        f"{path} is not a snapshot, or only part of one: it holds no snapshot.json, and no weights "
        "in another known format either"
    )


def read_file(path: str) -> Foreign:
    with open(path, "rb") as file:
        start = file.read(len(OLD_PTH_MAGIC))
    size = os.path.getsize(path)
    if start.startswith(ZIP_MAGIC):
        return Foreign("a file of PyTorch", read_zip_pth(path))
    if start == OLD_PTH_MAGIC:
        return Foreign("a file of PyTorch before 1.6", read_old_pth(path))
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return Foreign("a safetensors file", read_safetensors(path))
    if path.endswith(".safetensors"):
        raise RunError(f"{path} is damaged or cut off: its header is none of safetensors")
    if start[:1] == b"\x80":
        raise RunError(
            f"{path} is a pickle, and no file of PyTorch; in PyTorch, convert it by "
            "torch.save(model.state_dict(), PATH)"
        )
    raise RunError(
        f"{path} is of no known format; a snapshot, .safetensors, .pth or a folder of OneFlow is "
        "needed"
    )


# Tensors.


def as_float32(array: np.ndarray, kind: str) -> np.ndarray:
    """float32 of a float of any width; other numbers as they are."""
    if kind == BFLOAT16:
        array = array.astype(np.uint32) << 16
        return array.view(np.float32)
    if array.dtype.str in FLOATS:
        with np.errstate(over="ignore"):  # an infinity is found later
            return np.ascontiguousarray(array, np.float32).reshape(array.shape)
    return array


def check_growth(num_numbers: int, size: int) -> None:
    if num_numbers * 4 > MAX_GROWTH * size:
        raise Refused("its tensors claim to be larger than the file")


# .safetensors

SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2", "I64": "<i8"}


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        tensors = deserialize(data)
    except SafetensorError as error:
        raise RunError(f"{path} is damaged or cut off ({error})") from None
    arrays = {}
    for name, tensor in tensors:
        kind = SAFETENSORS_TYPES.get(tensor["dtype"])
        if kind is None:
            raise RunError(f"{path}: {name} is of {tensor['dtype']}, and floats are needed")
        array = np.frombuffer(tensor["data"], kind).reshape(tensor["shape"])
        arrays[name] = as_float32(array, BFLOAT16 if tensor["dtype"] == "BF16" else kind)
    return arrays


# .pth

STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "<u1",
}


@dataclass(frozen=True)
class Storage:
    key: str
    kind: str  # of STORAGES
    count: int  # numbers

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.kind == BFLOAT16 else self.kind)

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Tensor:
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    def array(self, data: bytes) -> np.ndarray:
        """The tensor in the bytes of its storage."""
        numbers = np.frombuffer(data, self.storage.dtype)
        strides = [stride * numbers.itemsize for stride in self.strides]
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, numbers.dtype)
        return np.lib.stride_tricks.as_strided(
            numbers[self.offset :], self.shape, strides, writeable=False
        )


def whole(value) -> int:
    if type(value) is not int or value < 0:
        raise Refused("a size in it is not a whole number")
    return value


def make_storage(persistent_id) -> Storage:
    tag, name, key, _, count, *view = expect(persistent_id, tuple)
    module, _, kind = expect(name, Name).text.rpartition(".")
    if tag != "storage" or module != "torch" or kind not in STORAGES:
        raise Refused(f"its numbers are a {printable(f'{module}.{kind}')}, and floats are needed")
    if any(view):
        raise Refused("its storages are views of others, as only very old files have them")
    if not re.fullmatch("[0-9]{1,20}", expect(key, str)):
        raise Refused(f"its storage {printable(key)} has no number for a name")
    return Storage(key, STORAGES[kind], whole(count))


def make_tensor(storage, offset, shape, strides, *_) -> Tensor:
    storage = expect(storage, Storage)
    shape, strides = tuple(map(whole, shape)), tuple(map(whole, strides))
    if len(shape) != len(strides) or len(shape) > 8:
        raise Refused("a tensor in it has an impossible shape")
    last = whole(offset) + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count and last >= storage.count or count > storage.count:
        raise Refused("a tensor in it reaches beyond its storage")
    return Tensor(storage, offset, shape, strides)


PYTORCH = Reader(
    calls={
        "collections.OrderedDict": ordered_dict,
        "torch._utils._rebuild_tensor_v2": make_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    },
    persistent=make_storage,
)


def find_weights(value, kind: type, *, depth: int = 3) -> dict:
    """The dict of tensors in what a file holds: the whole, or what is below `state_dict`."""
    if not isinstance(value, dict) or depth == 0:
        raise Refused("it holds no dict of tensors")
    if value and all(isinstance(item, kind) for item in value.values()):
        if not all(isinstance(name, str) for name in value):
            raise Refused("its tensors have no names")
        return value
    for wrapper in WRAPPERS:
        if isinstance(value.get(wrapper), dict):
            return find_weights(value[wrapper], kind, depth=depth - 1)
    for name, item in value.items():
        if not isinstance(item, kind):
            raise Refused(f"{printable(str(name))} in it is not a tensor")
    raise Refused("it holds no tensors")


def read_zip_pth(path: str) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            return read_archive(archive, size=os.path.getsize(path))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise RunError(f"{path} is damaged or cut off ({printable(str(error))})") from None
    except struct.error:
        raise RunError(f"{path} is damaged or cut off") from None


def read_archive(archive: zipfile.ZipFile, *, size: int) -> dict[str, np.ndarray]:
    members = {member.filename: member for member in archive.infolist()}
    found = [name for name in members if re.fullmatch("[^/]+/data\\.pkl", name)]
    if len(found) != 1:
        raise Refused("it is a zip archive, but none of torch.save")
    root = found[0].removesuffix("data.pkl")

    def member(name: str, limit: int) -> bytes:
        info = members.get(root + name)
        if info is None:
            raise Refused(f"it is cut off: {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(limit, size):
            raise Refused(f"{name} in it is compressed or too large, as torch.save makes none")
        return archive.read(info)

    if root + "byteorder" in members and member("byteorder", 100) != b"little":
        raise Refused("its numbers are big-endian")
    value, _ = PYTORCH.read(member("data.pkl", MAX_BYTES))
    tensors = find_weights(value, Tensor)

    def data_of(storage: Storage) -> bytes:
        data = member(f"data/{storage.key}", size)
        if len(data) != storage.num_bytes:
            raise Refused(
                f"storage {storage.key} in it has {len(data)} bytes and should have "
                f"{storage.num_bytes}"
            )
        return data

    return read_tensors(tensors, data_of, size=size)


def read_tensors(
    tensors: dict[str, Tensor], data_of: Callable[[Storage], bytes], *, size: int
) -> dict[str, np.ndarray]:
    check_growth(sum(math.prod(tensor.shape) for tensor in tensors.values()), size)
    by_storage = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    arrays = {}
    for storage, names in by_storage.items():
        data = data_of(storage)
        for name in names:
            arrays[name] = as_float32(tensors[name].array(data), storage.kind)
    return {name: arrays[name] for name in tensors}


def read_old_pth(path: str) -> dict[str, np.ndarray]:
    """The format that torch.save wrote before 1.6: pickles in a row, then the storages."""
    with open(path, "rb") as file:
        data = file.read()
    plain = Reader(calls={})
    version, at = plain.read(data, len(OLD_PTH_MAGIC))
    system, at = plain.read(data, at)
    if version != 1001 or not expect(system, dict).get("little_endian"):
        raise Refused("it is of an unknown version, or big-endian")
    value, at = PYTORCH.read(data, at)
    tensors = find_weights(value, Tensor)
    keys, at = plain.read(data, at)
    places = {}
    known = {tensor.storage.key: tensor.storage for tensor in all_tensors(value)}
    for key in expect(keys, list):
        storage = known.get(expect(key, str))
        if storage is None or at + 8 > len(data):
            raise Refused(f"it is damaged or cut off at storage {printable(key)}")
        (count,) = struct.unpack_from("<q", data, at)
        if count != storage.count or at + 8 + storage.num_bytes > len(data):
            raise Refused(f"storage {key} in it is damaged or cut off")
        places[key] = at + 8
        at += 8 + storage.num_bytes

    def data_of(storage: Storage) -> bytes:
        if storage.key not in places or storage != known[storage.key]:
            raise Refused(f"storage {storage.key} in it is missing")
        start = places[storage.key]
        return data[start : start + storage.num_bytes]

    return read_tensors(tensors, data_of, size=len(data))


def all_tensors(value) -> Iterable[Tensor]:
    """Every tensor anywhere in a value; each container is looked into once."""
    seen, waiting = set(), [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item


# Folders of OneFlow.

META_TYPES = {"kFloat": "<f4", "kDouble": "<f8", "kFloat16": "<f2", "kInt64": "<i8"}
FLOW_SAVE = Reader(
    calls={"collections.OrderedDict": ordered_dict},
    classes=frozenset({"oneflow.Tensor", "oneflow.nn.Parameter"}),
)


def read_flow_save(path: str) -> Foreign:
    with open(os.path.join(path, PICKLE_NAME), "rb") as file:
        value, _ = FLOW_SAVE.read(file.read(MAX_BYTES))
    content = expect(value, dict)
    if content.get("protocol_version") != 1:
        raise Refused("it is of an unknown version of flow.save")
    arrays = {}
    for name, stub in find_weights(content.get("data"), Stub).items():
        folder = stub.state.get("path")
        if not isinstance(folder, str) or not re.fullmatch("(global_)?tensor_[0-9]+", folder):
            place = printable(folder) if isinstance(folder, str) else "nothing that is a path"
            raise Refused(f"{printable(name)} in it lies at {place}")
        array, has_shape = read_variable(os.path.join(path, folder))
        if not has_shape:
            raise Refused(f"{folder}/{LEGACY_META} in it is missing")
        if not OF_TRAINING.fullmatch(name):
            arrays[name] = array
    return Foreign("a folder of flow.save", arrays)


def is_legacy_folder(path: str) -> bool:
    with os.scandir(path) as entries:
        return any(os.path.isfile(os.path.join(entry.path, LEGACY_DATA)) for entry in entries)


def read_variable(folder: str) -> tuple[np.ndarray, bool]:
    """`out` of a variable's folder, and whether `meta` gave its shape; else it is (N,) float32."""
    data_path, meta_path = os.path.join(folder, LEGACY_DATA), os.path.join(folder, LEGACY_META)
    if not os.path.isfile(data_path):
        raise Refused(f"{data_path} is missing")
    size = os.path.getsize(data_path)
    if not os.path.isfile(meta_path):
        if size % 4:
            raise Refused(f"{data_path} has {size} bytes, which are no float32 numbers")
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
    return tuple(map(whole, message.shape.dim)), META_TYPES[kind]


def read_legacy(path: str) -> Foreign:
    arrays, with_shape = {}, set()
    for name in sorted(os.listdir(path)):
        folder = os.path.join(path, name)
        if not os.path.isfile(os.path.join(folder, LEGACY_DATA)) or OF_TRAINING.fullmatch(name):
            continue
        array, has_shape = read_variable(folder)
        arrays[name] = array
        with_shape.add(has_shape)
    if len(with_shape) > 1:
        raise Refused("some of its variables have a meta file, and some have none")
    if not any(name.startswith("Resnet-") for name in arrays):
        return Foreign("a folder of OneFlow", arrays, flat=with_shape == {False})
    renamed = {}
    for name, array in arrays.items():
        if not name.startswith("Resnet-"):  # no variable of the network
            continue
        ours = from_2020_name(name)
        if ours in renamed:
            raise Refused(f"two of its variables are {ours}")
        renamed[ours] = array
    return Foreign("a OneFlow folder of 2020", renamed, flat=with_shape == {False}, from_2020=True)


BATCH_NORM_2020 = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
NAME_2020 = re.compile(
    "Resnet-(?P<layer>conv1|fc1001|res(?P<stage>[2-5])_(?P<block>[0-9]+)_branch(?P<branch>1|2[abc]))"
    "(?P<bn>_bn(_add)?(_relu)?)?-(?P<what>[a-z_]+)"
)


def from_2020_name(name: str) -> str:
    """`layer1.0.bn3.weight` of `Resnet-res2_0_branch2c_bn_add_relu-gamma`; others unchanged."""
    match = NAME_2020.fullmatch(name)
    if match is None:
        return name
    layer, what, bn = match["layer"], match["what"], match["bn"] is not None
    if bn != (what in BATCH_NORM_2020):
        return name
    what = BATCH_NORM_2020.get(what, what)
    if layer == "fc1001":
        return f"fc.{what}"
    if layer == "conv1":
        return f"{'bn1' if bn else 'conv1'}.{what}"
    block = f"layer{int(match['stage']) - 1}.{match['block']}"
    if match["branch"] == "1":
        return f"{block}.downsample.{int(bn)}.{what}"
    return f"{block}.{'bn' if bn else 'conv'}{'abc'.index(match['branch'][1]) + 1}.{what}"


# Names.


def strip(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without a prefix that all names share, as wrappers put before them."""
    for prefix in PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return strip({name.removeprefix(prefix): array for name, array in arrays.items()})
    return arrays


def from_timm(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's names as torchvision's, where the two differ: VGG and MobileNetV2.

    Its ResNet, ResNeXt and Inception-v3 have torchvision's names.
    """
    if "pre_logits.fc1.weight" in arrays:
        rename = timm_vgg
    elif "conv_stem.weight" in arrays and "blocks.6.0.bn3.weight" in arrays:
        rename = timm_mobilenetv2
    else:
        return arrays
    result = {rename(name): array for name, array in arrays.items()}
    for name in ("classifier.0.weight", "classifier.3.weight"):  # there convolutions
        if name in result and result[name].ndim == 4:
            result[name] = result[name].reshape(len(result[name]), -1)
    return result if len(result) == len(arrays) else arrays


def timm_vgg(name: str) -> str:
    for theirs, ours in (("pre_logits.fc1.", 0), ("pre_logits.fc2.", 3), ("head.fc.", 6)):
        name = name.replace(theirs, f"classifier.{ours}.")
    return name


MOBILENETV2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)  # blocks of each stage
MOBILENETV2_ENDS = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.18.0",
    "bn2": "features.18.1",
    "classifier": "classifier.1",
}
MOBILENETV2_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
MOBILENETV2_BLOCK = {
    **{"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1"},
    **{"conv_pwl": "2", "bn3": "3"},
}


def timm_mobilenetv2(name: str) -> str:
    layer, _, what = name.rpartition(".")
    match = re.fullmatch(r"blocks\.([0-6])\.([0-9])\.(\w+)", layer)
    if match is None:
        return f"{MOBILENETV2_ENDS[layer]}.{what}" if layer in MOBILENETV2_ENDS else name
    stage, block = int(match[1]), int(match[2])
    parts = MOBILENETV2_FIRST if stage == 0 else MOBILENETV2_BLOCK
    if match[3] not in parts:
        return name
    number = 1 + sum(MOBILENETV2_DEPTHS[:stage]) + block
    return f"features.{number}.conv.{parts[match[3]]}.{what}"


# Which network it is, and whether it fits.

AUXILIARY = "AuxLogits"  # Inception's second head


def guess_model(foreign: Foreign, models: Models, *, path: str) -> str:
    """The network that names and shapes tell of. Raises UsageError where they do not."""
    if foreign.from_2020:
        return "resnet50"
    for model, entry in models.items():
        if entry.signature is None:
            continue
        name, shape = entry.signature
        array = foreign.arrays.get(name)
        if array is not None and (
            array.shape == shape or (foreign.flat and array.size == math.prod(shape))
        ):
            return model
    raise UsageError(
        f"{path} is {foreign.kind}, and its names tell of no network here; name it with --model"
    )


def is_last(name: str, last_layer: str) -> bool:
    """Whether the parameter `name` has a row for each class."""
    return name.rpartition(".")[0] in (last_layer, f"{AUXILIARY}.fc")


def is_auxiliary(name: str) -> bool:
    """Whether a parameter is of a head that only training uses, which others may leave out."""
    return name.startswith(f"{AUXILIARY}.")


def count_classes(foreign: Foreign, last_layer: str, *, path: str) -> int:
    """Rows of the last layer. Raises UsageError where there is none."""
    array = foreign.arrays.get(f"{last_layer}.{'bias' if foreign.flat else 'weight'}")
    if array is None or not array.size:
        raise UsageError(
            f"{path} is {foreign.kind}, and it has no last layer ({last_layer}) to tell the number "
            "of classes"
        )
    return len(array)


def fit(foreign: Foreign, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays in the layout of snapshots, as far as they fit `shapes`; others as they are.

    A folder of 2020 may hold convolutions as (O, H, W, I), which their shapes tell. Without `meta`
    there are no shapes and both layouts have the same size: then it is (O, I, H, W) unless
    `foreign.layout` says otherwise, and a notice says so. A fourth input channel of the stem, which
    only ever saw zeros, is cut off.
    """
    if not (foreign.flat or foreign.from_2020):
        return foreign.arrays
    layout, by_shape = foreign.layout, False
    if not foreign.flat:
        layout, by_shape = layout_of(foreign.arrays, shapes), True
    if layout is None:
        layout = LAYOUTS[0]
        foreign.notices.append(
            "No meta files: the convolutions are taken as (O, I, H, W). If they are (O, H, W, I), "
            "of a run with --channel_last: tools/convert_snapshot.py SRC DST --layout=OHWI."
        )
    arrays = {}
    for name, array in foreign.arrays.items():
        shape = shapes.get(name)
        if shape is not None:
            array = fit_one(array, shape, layout=layout, by_shape=by_shape)
        arrays[name] = array
    return arrays


def layout_of(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> str:
    """OIHW or OHWI, as the shapes of all convolutions tell together."""
    votes = set()
    for name, array in arrays.items():
        shape = shapes.get(name, ())
        if array.ndim == len(shape) == 4:
            o, i, h, w = shape
            channels = {i, 4} if i == 3 else {i}
            found = {"OIHW"} if array.shape in {(o, c, h, w) for c in channels} else set()
            if array.shape in {(o, h, w, c) for c in channels}:
                found.add("OHWI")
            if len(found) == 1:
                votes |= found
    return votes.pop() if len(votes) == 1 else "OIHW"  # what differs is reported as a wrong shape


def fit_one(
    array: np.ndarray, shape: tuple[int, ...], *, layout: str, by_shape: bool
) -> np.ndarray:
    if len(shape) != 4:
        return array.reshape(shape) if not by_shape and array.size == math.prod(shape) else array
    o, i, h, w = shape
    channels = i
    if i == 3 and array.size == o * 4 * h * w:
        channels = 4
    stored = (o, channels, h, w) if layout == "OIHW" else (o, h, w, channels)
    if not by_shape and array.size == math.prod(stored):
        array = array.reshape(stored)
    if array.shape != stored:
        return array
    if layout == "OHWI":
        array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array[:, :i])
