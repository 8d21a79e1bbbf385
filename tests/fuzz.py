"""What the fuzzers share: damage to a valid file, and how much of it is tried.

FUZZ_EXAMPLES=100000 sh test.sh tests/tools/test_fuzz.py    # for hours; unless given, for seconds
"""

import contextlib
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SECONDS = 5.0  # that one input may take
MEMORY_KIB = 600 << 10  # that one input may add; readers have a budget of 256 MiB
# Lengths, offsets and signs that readers get wrong.
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1]
WORDS = [
    (number % 2 ** (8 * size)).to_bytes(size, order)
    for number in NUMBERS
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
]


def fuzz(examples: int, **options) -> settings:
    """Settings of a fuzzer: the same examples each time, unless FUZZ_EXAMPLES asks for more."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )


@st.composite
def damaged(draw, *seeds: bytes) -> bytes:
    """One of the seeds with one to four of its places changed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 64))
        kind = draw(st.sampled_from(("flip", "word", "bytes", "insert", "remove", "repeat", "cut")))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "word":
            word = draw(st.sampled_from(WORDS))
            data[at : at + len(word)] = word
        elif kind == "bytes":
            new = draw(st.binary(max_size=16))
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=64))
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + 16 * size]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


@contextlib.contextmanager
def bounded(*expected: type[Exception]) -> Iterator[None]:
    """Allow these errors and no other, and neither a long wait nor much memory.

    A name in a message may hold a line feed, which `report` makes a space.
    """
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except expected as error:
        assert str(error)
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


def tar_with_checksums(data: bytes, is_header: Callable[[bytes], bool]) -> bytes:
    """The same tar with right checksums in its headers, so that damage gets past them."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if len(block) == 512 and is_header(block):
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[i] = block[:148] + b"%06o\0 " % (total & 0o777777) + block[156:]
    return b"".join(blocks)


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack("<q", len(message)) + message for message in messages)
