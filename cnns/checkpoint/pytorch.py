"""Files of PyTorch as arrays by name: .safetensors, and .pth without PyTorch.

Nothing in a .pth is run or imported (see pickles.py), and nothing is read that is larger than the
file it is in.
"""

import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from cnns.checkpoint.pickles import (
    MAX_BYTES,
    Name,
    Reader,
    Refused,
    check_shape,
    excerpt,
    expect,
    find_weights,
    ordered_dict,
    whole,
)
from cnns.errors import RunError

OLD_PTH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
FLOATS = ("<f2", "<f4", "<f8")
BFLOAT16 = "bfloat16"
# A tensor may stand under two names, and half precision doubles as float32.
MAX_GROWTH = 4
MAX_ZIP_END = (1 << 16) + 200  # bytes; a comment and the records of the end
UNKNOWN_SIZE = 0xFFFFFFFF  # of a zip archive: a longer record has it


def as_float32(array: np.ndarray, kind: str) -> np.ndarray:
    """float32 of a float of any width; other numbers as they are."""
    if kind == BFLOAT16:
        array = array.astype(np.uint32) << 16
        return array.view(np.float32)
    if array.dtype.str in FLOATS:
        with np.errstate(over="ignore"):  # an infinity is found later
            return np.ascontiguousarray(array, np.float32).reshape(array.shape)
    return array


# .safetensors

SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2", "I64": "<i8"}


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        tensors = deserialize(data)
    except (SafetensorError, OverflowError) as error:
        raise RunError(f"{path} is damaged or cut off ({error})") from None
    arrays = {}
    for name, tensor in tensors:
        kind = SAFETENSORS_TYPES.get(tensor["dtype"])
        if kind is None:
            raise RunError(f"{path}: {name} is of {tensor['dtype']}, and floats are needed")
        array = np.frombuffer(tensor["data"], kind).reshape(check_shape(tensor["shape"]))
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


def make_storage(persistent_id: Any) -> Storage:
    tag, name, key, _, count, *view = expect(persistent_id, tuple)
    module, _, kind = expect(name, Name).text.rpartition(".")
    if tag != "storage" or module != "torch" or kind not in STORAGES:
        raise Refused(f"its numbers are a {excerpt(f'{module}.{kind}')}, and floats are needed")
    if any(view):
        raise Refused("its storages are views of others, a format that only very old files use")
    if not re.fullmatch("[0-9]{1,20}", expect(key, str)):
        raise Refused(f"its storage {excerpt(key)} is not named by a number")
    return Storage(key, STORAGES[kind], whole(count))


def make_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    storage = expect(storage, Storage)
    shape = check_shape(shape)
    if len(shape) != len(strides):
        raise Refused("a tensor in it has an impossible shape")
    strides = tuple(map(whole, strides))
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


def read_zip_pth(path: str) -> dict[str, np.ndarray]:
    check_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return read_archive(archive, size=os.path.getsize(path))
    except ZIP_DAMAGE as error:
        raise RunError(f"{path} is damaged or cut off ({excerpt(str(error))})") from None


ZIP_DAMAGE = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError),
    *(struct.error, IndexError),
)


def check_directory(path: str) -> None:
    """Raise Refused where the list of members is so long that reading it alone takes minutes."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - MAX_ZIP_END))
        end = file.read(MAX_ZIP_END)
    for magic, layout, place in ((b"PK\x05\x06", "<L", 12), (b"PK\x06\x06", "<Q", 40)):
        for match in re.finditer(magic, end):
            at = match.start() + place
            if at + struct.calcsize(layout) <= len(end):
                (size,) = struct.unpack_from(layout, end, at)
                if MAX_BYTES < size < UNKNOWN_SIZE or layout == "<Q" and size > MAX_BYTES:
                    raise Refused(f"its list of members has more than {MAX_BYTES} bytes")


def read_archive(archive: zipfile.ZipFile, *, size: int) -> dict[str, np.ndarray]:
    members = {member.filename: member for member in archive.infolist()}
    found = [name for name in members if re.fullmatch("[^/]+/data\\.pkl", name)]
    if len(found) != 1:
        raise Refused("it is a zip archive, but not one of torch.save")
    root = found[0].removesuffix("data.pkl")

    def member(name: str, limit: int) -> bytes:
        info = members.get(root + name)
        if info is None:
            raise Refused(f"it is cut off: {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(limit, size):
            raise Refused(f"{name} in it is compressed or too large, which torch.save does not do")
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
    if sum(math.prod(tensor.shape) for tensor in tensors.values()) * 4 > MAX_GROWTH * size:
        raise Refused("its tensors claim to be larger than the file")
    by_storage: dict[Storage, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    if sum(storage.num_bytes for storage in by_storage) > size:
        raise Refused("its tensors claim to be larger than the file")
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
            raise Refused(f"it is damaged or cut off at storage {excerpt(key)}")
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


def all_tensors(value: Any) -> Iterable[Tensor]:
    """Every tensor anywhere in a value; each container is looked into once."""
    seen, waiting = set(), [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
