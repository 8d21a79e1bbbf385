"""OneFlow's scheduler sleeps where it would spin: what is replaced, and what is left alone."""

import cnns.startup  # noqa: F401  (first, see there)

import ast
import ctypes
import os
import platform
import subprocess
import sys
import time

import pytest

from cnns import polling
from small import ROOT

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or polling.SWITCH in os.environ, reason="left as it is here"
)

LIBC = ctypes.CDLL(None)


def sched_yield() -> int:
    return ctypes.cast(LIBC.sched_yield, ctypes.c_void_p).value or 0


def test_a_call_sleeps_while_the_budget_lasts():
    sleep = polling.Sleep(LIBC, 30_000)
    call = ctypes.CFUNCTYPE(ctypes.c_int)(sleep.address)

    def seconds(calls: int) -> float:
        start = time.monotonic()
        assert [call() for _ in range(calls)] == [0] * calls
        return time.monotonic() - start

    quick = min(seconds(1) for _ in range(20))
    assert quick < 0.03
    sleep.budget.value = 2
    assert seconds(3) >= 0.06
    assert sleep.budget.value == 0
    assert min(seconds(1) for _ in range(20)) < 0.03
    sleep.budget.value = -1
    assert min(seconds(1) for _ in range(20)) < 0.03
    assert sleep.budget.value == -1


def test_pointers_are_found_where_they_are_aligned():
    memory = ctypes.create_string_buffer(64)
    start = ctypes.addressof(memory)
    target = 0x7F00DEADBEEF
    aligned = -(-start // 8) * 8 + 8
    ctypes.c_uint64.from_address(aligned).value = target
    ctypes.memmove(aligned + 17, target.to_bytes(8, "little"), 8)
    assert polling.find_pointers([(start, 64)], target) == [aligned]
    assert polling.find_pointers([(start, 64)], target + 1) == []


def test_only_writable_data_of_the_library_is_looked_at():
    maps = """\
7f0000000000-7f0000001000 r--p 00000000 08:01 5      /somewhere/liboneflow-1.so
7f0000002000-7f0000005000 rw-p 00001000 08:01 5      /some where/liboneflow-1.so
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
7f0000006000-7f0000007000 rw-p 00001000 08:01 5      /liboneflow-/libother.so
"""
    found = polling.writable_data(maps, polling.LIBRARY)
    assert found == [(0x7F0000002000, 0x3000)]


CODE = """
import sys
sys.path.insert(0, "tests/cnns")
from test_polling import *
import oneflow as flow
from cnns.graphs import QuietGraph

def left_in_library():
    areas = polling.writable_data(polling.read_maps(), polling.LIBRARY)
    assert areas
    return len(polling.find_pointers(areas, sched_yield()))

class Products(QuietGraph):
    def build(self, x):
        for _ in range(8):
            x = flow.matmul(x, x)
        return x

x = flow.zeros(640, 640, placement=flow.placement("cpu", [0]), sbp=flow.sbp.broadcast)
graph = Products()
"""


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE + code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_is_changed_only_where_a_graph_runs_on_a_cpu():
    code = """
(x + 1).numpy()
graph(x).numpy()
print(left_in_library())
graph(x).numpy()
print(left_in_library())
"""
    assert run(code) == "1\n0\n"
    assert run(code, **{polling.SWITCH: "1"}) == "1\n1\n"


def test_the_scheduler_sleeps_while_a_graph_runs():
    """Its thread gives the processor up by sleeping, and is hardly ever taken off it."""
    code = """
def switches(thread):
    with open(f"/proc/self/task/{thread}/status") as file:
        lines = dict(line.split(":") for line in file)
    return [int(lines[kind + "voluntary_ctxt_switches"]) for kind in ("", "non")]

(x + 1).numpy()
waiting = [thread for thread in os.listdir("/proc/self/task") if int(thread) != os.getpid()]
for _ in range(3):
    graph(x).numpy()
before = {thread: switches(thread) for thread in waiting}
for _ in range(12):
    graph(x).numpy()
after = {thread: switches(thread) for thread in waiting}
print(max((after[t][0] - before[t][0], after[t][1] - before[t][1]) for t in waiting))
"""
    slept, preempted = ast.literal_eval(run(code))
    assert slept > 12 * 20  # each run takes 30 ms and more
    assert preempted < slept / 4
    slept, preempted = ast.literal_eval(run(code, **{polling.SWITCH: "1"}))
    assert preempted > slept


def test_runs_that_follow_each_other_closely_are_short(monkeypatch):
    sleep = polling.Sleep(LIBC, 1)
    clock = iter([0.0, 0.01, 1.01, 3.01, 3.26, 103.26, 203.26, 303.26])
    monkeypatch.setattr(polling, "install", lambda: sleep)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    runs, budgets = polling.Runs(), []
    for _ in range(8):
        runs.start()
        budgets.append(sleep.budget.value * polling.SLEEP_MICROSECONDS / 1e6)
    assert budgets == [0, 0, 0, 0, 0.25, 0.25, 0.25, polling.LONGEST_RUN]


class Refusal:
    """A system, such as one with SELinux, that allows no memory that is executed."""

    def __init__(self):
        self.mmap, self.sched_yield = LIBC.mmap, LIBC.sched_yield
        self.mprotect = lambda *_: -1


def test_where_no_such_function_is_allowed_all_stays(monkeypatch):
    with pytest.raises(OSError, match="not allowed"):
        polling.Sleep(Refusal(), 1)
    monkeypatch.setattr(polling, "find_pointers", lambda *_: [0])  # not to be written to
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Refusal())
    polling.install.cache_clear()
    assert polling.install() is None
    polling.Runs().start()
    polling.install.cache_clear()
