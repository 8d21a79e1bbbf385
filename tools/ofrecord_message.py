"""The OFRecord message, written and read without OneFlow.

The protocol buffer is

    message BytesList { repeated bytes value = 1; }
    message FloatList { repeated float value = 1 [packed = true]; }
    message Int32List { repeated int32 value = 1 [packed = true]; }
    message Feature { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2;
        DoubleList double_list = 3; Int32List int32_list = 4; Int64List int64_list = 5; } }
    message OFRecord { map<string, Feature> feature = 1; }

`encode` gives the bytes that protobuf's deterministic serialisation gives; a test compares the two.
OneFlow ships the message class too, but importing it loads 1 GB of native libraries, which a
process that only packs bytes has no use for.
"""

import functools
import struct
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
# Field number in `Feature` -> name, and the struct format of a fixed-size value.
KINDS = {
    1: ("bytes", None),
    2: ("float", "f"),
    3: ("double", "d"),
    4: ("int32", None),
    5: ("int64", None),
}


class MessageError(Exception):
    """Bytes that are no OFRecord; the message is the reason."""


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | BYTES,)) + _varint(len(value)) + value


def _feature(name: str, value) -> bytes:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if values and all(isinstance(v, (bytes, str)) for v in values):
        values = [v.encode() if isinstance(v, str) else v for v in values]
        return _field(1, b"".join(_field(1, v) for v in values))
    if values and all(isinstance(v, int) for v in values):
        for v in values:
            if not -(2**31) <= v < 2**31:
                raise ValueError(f"feature {name}: {v} is not an int32")
        # A negative number is ten bytes, as if it had 64 bits.
        return _field(4, _field(1, b"".join(_varint(v & 0xFFFFFFFFFFFFFFFF) for v in values)))
    if values and all(isinstance(v, (int, float)) for v in values):
        return _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)))
    raise TypeError(f"feature {name}: {value!r} is neither bytes, str, int nor float")


def _entry(name: str, value) -> bytes:
    return _field(1, _field(1, name.encode()) + _field(2, _feature(name, value)))


# Names and numbers recur in a data set; 1.0, 1 and True are not the same.
_recurring_entry = functools.lru_cache(maxsize=10_000, typed=True)(_entry)


def _head_of_bytes(name: str, size: int) -> bytes:
    """All that stands before the one value of a bytes feature in its entry; nothing is behind."""
    key, head, length = _field(1, name.encode()), b"", size
    for number in (1, 1, 2):
        head = bytes((number << 3 | BYTES,)) + _varint(length) + head
        length = size + len(head)
    return bytes((1 << 3 | BYTES,)) + _varint(len(key) + length) + key + head


def encode(features: dict[str, Any]) -> bytes:
    """The serialised OFRecord with `features`, in the order of their names.

    A value is bytes, str (stored as UTF-8), int (int32) or float (float32), or a list of one kind.
    Raises TypeError for other kinds and ValueError for integers outside int32.
    """
    pieces = []
    for name in sorted(features, key=str.encode):
        value = features[name]
        if type(value) is bytes:  # an image is copied once, by the join
            pieces += (_head_of_bytes(name, len(value)), value)
        elif isinstance(value, (str, int)):
            pieces.append(_recurring_entry(name, value))
        else:
            pieces.append(_entry(name, value))
    return b"".join(pieces)


def _read_varint(data, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise MessageError(f"a number at byte {at} of the message is too long")
    raise MessageError("the message ends within a number")


def _read_fields(data, at: int, end: int):
    """(field number, wire type, start, end of its value) of each field of a message."""
    while at < end:
        begin = at
        key, at = _read_varint(data, at, end)
        number, wire = key >> 3, key & 7
        if wire == BYTES:
            length, at = _read_varint(data, at, end)
        elif wire == VARINT:
            length = _read_varint(data, at, end)[1] - at
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise MessageError(f"byte {begin} of the message begins no field")
        if length > end - at:
            raise MessageError(f"the field at byte {begin} of the message is longer than it may be")
        yield number, wire, at, at + length
        at += length


def _expect(number: int, wire: int, start: int, *, numbers, wires=(BYTES,)) -> None:
    if number not in numbers or wire not in wires:
        raise MessageError(f"byte {start} of the message belongs to a field that OFRecord has not")


def _read_numbers(data, kind: int, wire: int, start: int, end: int) -> list:
    name, form = KINDS[kind]
    if form:
        size = struct.calcsize(form)
        if (end - start) % size:
            raise MessageError(f"the {name} list at byte {start} of the message is cut off")
        return list(struct.unpack(f"<{(end - start) // size}{form}", data[start:end]))
    values = []
    while start < end:
        value, start = _read_varint(data, start, end)
        values.append(value - 2**64 if value >= 2**63 else value)
    return values


def _read_list(data, kind: int, start: int, end: int) -> list:
    values = []
    for number, wire, a, b in _read_fields(data, start, end):
        if kind == 1:
            _expect(number, wire, a, numbers=(1,))
            values.append(data[a:b])
        else:
            single = {"f": FIXED32, "d": FIXED64, None: VARINT}[KINDS[kind][1]]
            _expect(number, wire, a, numbers=(1,), wires=(BYTES, single))
            values += _read_numbers(data, kind, wire, a, b)
    return values


def decode(data: bytes) -> dict[str, tuple[str, list]]:
    """The features of a serialised OFRecord: name -> (kind, values).

    `kind` is bytes, float, double, int32 or int64. Stricter than protobuf, which skips fields that
    it does not know: data of this kind has none, so one is a fault.
    Raises MessageError.
    """
    features = {}
    for number, wire, start, end in _read_fields(data, 0, len(data)):
        _expect(number, wire, start, numbers=(1,))
        key, feature = b"", ("", [])
        for number, wire, a, b in _read_fields(data, start, end):
            _expect(number, wire, a, numbers=(1, 2))
            if number == 1:
                key = data[a:b]
                continue
            for kind, wire, c, d in _read_fields(data, a, b):
                _expect(kind, wire, c, numbers=KINDS)
                feature = KINDS[kind][0], _read_list(data, kind, c, d)
        try:
            features[key.decode()] = feature
        except UnicodeDecodeError:
            raise MessageError(f"a name at byte {start} of the message is not UTF-8") from None
    return features
