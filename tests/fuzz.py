"""What the fuzzers share: damage to a valid file, and how long it is tried.

sh test.sh --fuzz=30               # every fuzzer for 30 minutes, with other examples each time
sh test.sh --fuzz=30 -k test_tar   # one of them

Minutes are of the processor, so that they mean the same on a busy machine.
"""

import contextlib
import copy
import json
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS_BETWEEN_LINES = 300.0  # of the processor
SECONDS = 5.0  # of the processor, that one input may take
ALARM_SECONDS = 60  # after which it is stopped
# That one input may add: a picture of 200 million pixels, twice; other readers have 256 MiB.
MEMORY_KIB = 1300 << 10
# Lengths, offsets and signs that readers get wrong.
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1]
WORDS = [
    (number % 2 ** (8 * size)).to_bytes(size, order)
    for number in NUMBERS
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
]


def fuzz(examples: int) -> Callable:
    """Make a test of hypothesis a fuzzer: so many examples, the same each time, but with --fuzz."""
    bounded_run = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.fuzz(bounded_run(test))


def processor_seconds() -> float:
    """Of this process, all its threads, and its children that have ended."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


class Fuzzing:
    """A plugin of pytest: runs each fuzzer for so many minutes, and says how much it tried."""

    def __init__(self, minutes: float, plugins: pytest.PytestPluginManager):
        self.seconds, self.plugins = 60 * minutes, plugins

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool:
        test, count, start = pyfuncitem.obj, 0, processor_seconds()
        inner = test.hypothesis.inner_test

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            inner(*args, **kwargs)

        test.hypothesis.inner_test = counted
        # In rounds: hypothesis remembers what it has tried, and each round forgets it.
        test._hypothesis_internal_use_settings = settings(
            test._hypothesis_internal_use_settings, derandomize=False, max_examples=1000
        )
        arguments = pyfuncitem._fixtureinfo.argnames
        said = start

        def tried() -> str:
            return f"{count:,} in {(processor_seconds() - start) / 60:.1f} minutes"

        try:
            while processor_seconds() - start < self.seconds:
                test(**{name: pyfuncitem.funcargs[name] for name in arguments})
                if processor_seconds() - said >= SECONDS_BETWEEN_LINES:
                    said = processor_seconds()
                    self.say(f"{pyfuncitem.nodeid}: {tried()}")
        finally:
            pyfuncitem.user_properties.append(("fuzz", tried()))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tried = dict(report.user_properties).get("fuzz")
        if report.when == "call" and tried is not None:
            self.say(f"{report.nodeid}: {tried}, {report.outcome}")

    def say(self, line: str) -> None:
        terminal = self.plugins.get_plugin("terminalreporter")  # not in the workers of xdist
        if terminal is not None:
            with self.plugins.get_plugin("capturemanager").global_and_fixture_disabled():
                terminal.write_line(f"\n{line}", flush=True)


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


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-2, -1, 0, 1, 3, 6, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["", "auto", "\ud800", "\x1b[31m", "/etc/passwd", "1e999", "nan", "a\nb"]),
)
KEYS = st.text(max_size=8)
JSON = st.recursive(
    JSON_VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def places(value, at=()):
    """Every place in a JSON value, as the keys and indices that lead there."""
    yield at
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*at, key))


@st.composite
def mutated(draw, seed):
    """JSON with up to three places replaced, removed or added; as bytes, some of them changed."""
    content = copy.deepcopy(seed)
    for _ in range(draw(st.integers(0, 3))):
        *way, last = ("content", *draw(st.sampled_from(list(places(content)))))
        root = holder = {"content": content}
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "add" and isinstance(holder[last], dict):
            holder[last][draw(KEYS)] = draw(JSON)
        elif kind == "remove" and way:
            del holder[last]
        else:
            holder[last] = draw(JSON)
        content = root["content"]
    data = bytearray(json.dumps(content).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        i = draw(st.integers(0, max(0, len(data) - 1)))
        data[i : i + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


def overdue(*_: object) -> None:
    raise AssertionError(f"not over after {ALARM_SECONDS} s")


@contextlib.contextmanager
def bounded(*expected: type[Exception]) -> Iterator[None]:
    """Allow these errors and no other, and neither a long wait nor much memory.

    A name in a message may hold a line feed, which `report` makes a space.
    """
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, overdue)
    signal.alarm(ALARM_SECONDS)
    try:
        yield
    except expected as error:
        assert str(error)
    finally:
        signal.alarm(0)
    assert time.process_time() - start < SECONDS
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
