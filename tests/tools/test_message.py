"""OFRecord messages without OneFlow's class: the same bytes, and the same values back."""

import cnns.startup  # noqa: F401

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oneflow.core.record.record_pb2 import OFRecord

from tools.ofrecord_message import MessageError, decode, encode

INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT = st.floats(width=32, allow_nan=False)
VALUES = st.one_of(
    st.binary(max_size=300),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    INT32,
    FLOAT,
    st.booleans(),
    st.lists(st.binary(max_size=20), min_size=1, max_size=4),
    st.lists(INT32, min_size=1, max_size=9),
    st.lists(FLOAT, min_size=1, max_size=9),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FEATURES = st.dictionaries(NAMES, VALUES, max_size=6)


def by_protobuf(features: dict) -> OFRecord:
    record = OFRecord()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        feature = record.feature[name]
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif all(isinstance(v, int) for v in values):
            feature.int32_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return record


@settings(max_examples=300, deadline=None)
@given(FEATURES)
def test_encoding_is_protobufs(features):
    assert encode(features) == by_protobuf(features).SerializeToString(deterministic=True)


def test_long_values_are_protobufs():
    for size in (0, 1, 100, 127, 128, 16_383, 16_384, 200_000, 2_097_151, 2_097_152):
        features = {"encoded": bytes(size), "class/label": 999}
        assert encode(features) == by_protobuf(features).SerializeToString(deterministic=True)


@settings(max_examples=200, deadline=None)
@given(FEATURES)
def test_decoding_gives_the_values_back(features):
    message = by_protobuf(features)
    found = decode(message.SerializeToString())
    assert set(found) == set(features)
    for name, (kind, values) in found.items():
        assert values == list(getattr(message.feature[name], f"{kind}_list").value)


def test_decoding_other_kinds_and_unpacked_numbers():
    record = OFRecord()
    record.feature["a"].int64_list.value.extend([-1, 2**63 - 1])
    record.feature["b"].double_list.value.extend([0.5])
    record.feature["c"].SetInParent()
    found = decode(record.SerializeToString())
    assert found["a"] == ("int64", [-1, 2**63 - 1])
    assert found["b"] == ("double", [0.5]) and found["c"] == ("", [])
    # Protobuf readers take lists of numbers that are not packed, too.
    lists = b"\x08\x07\x08\x09"
    feature = b"\x22" + bytes([len(lists)]) + lists
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    message = b"\x0a" + bytes([len(entry)]) + entry
    assert list(OFRecord.FromString(message).feature["x"].int32_list.value) == [7, 9]
    assert decode(message)["x"] == ("int32", [7, 9])
    single = b"\x0d" + struct.pack("<f", 0.25)
    feature = b"\x12" + bytes([len(single)]) + single
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    assert decode(b"\x0a" + bytes([len(entry)]) + entry)["x"] == ("float", [0.25])


@settings(max_examples=400, deadline=None)
@given(FEATURES, st.data())
def test_damaged_messages_give_an_error_or_values(features, data):
    """Never anything else, and nothing that protobuf would refuse."""
    message = bytearray(encode(features))
    if message:
        i = data.draw(st.integers(0, len(message) - 1))
        message[i] ^= 1 << data.draw(st.integers(0, 7))
        message = message[: data.draw(st.integers(0, len(message)))]
    try:
        decode(bytes(message))
    except MessageError as error:
        assert "\n" not in str(error)
    else:
        OFRecord.FromString(bytes(message))


def test_kinds_that_are_refused():
    for value in (None, [], ["a", 1], {"a": 1}, np.int64(3)):
        with pytest.raises(TypeError, match="feature height: .* is neither"):
            encode({"height": value})
    for value in (2**31, -(2**31) - 1, [0, 2**40]):
        with pytest.raises(ValueError, match="is not an int32"):
            encode({"height": value})
