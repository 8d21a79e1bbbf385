"""OFRecord messages: OneFlow's own class is read and told of, whatever the bytes are."""

import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
from oneflow.core.record import record_pb2

from cnns.data.format import OFRecord, decode_record, encode_record

FEATURES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.one_of(st.binary(max_size=300), st.text(max_size=20).map(str.encode), st.integers(0, 99)),
    max_size=6,
)


def test_the_class_that_is_loaded_beside_oneflow_is_oneflows():
    record = record_pb2.OFRecord()
    record.feature["encoded"].bytes_list.value.append(b"x")
    record.feature["class/label"].int32_list.value.append(3)
    assert encode_record(b"x", 3) == record.SerializeToString(deterministic=True)
    assert OFRecord.DESCRIPTOR.full_name == record.DESCRIPTOR.full_name
    assert decode_record(encode_record(b"x", 3)).feature["class/label"].int32_list.value == [3]


@settings(max_examples=400, deadline=None)
@given(FEATURES, st.data())
def test_damaged_messages_give_an_error_or_a_record(features, data):
    """Never anything else, and nothing that protobuf would refuse; no warning is printed."""
    message = bytearray(encode_record(b"jpeg", 7, **features))
    i = data.draw(st.integers(0, len(message) - 1))
    message[i] ^= 1 << data.draw(st.integers(0, 7))
    message = bytes(message[: data.draw(st.integers(0, len(message)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            record = decode_record(message)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert record == OFRecord.FromString(message)
