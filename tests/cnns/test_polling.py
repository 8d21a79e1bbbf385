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
    sleep = polling.Sleep(30_000)
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


CODE = """
import sys
sys.path.insert(0, "tests/cnns")
from test_polling import *
import oneflow as flow
from cnns.graphs import QuietGraph
from cnns.native import pointers_to

def left_in_library():
    return len(pointers_to(sched_yield()))

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
    sleep = polling.Sleep(1)
    clock = iter([0.0, 0.01, 1.01, 3.01, 3.26, 103.26, 203.26, 303.26])
    monkeypatch.setattr(polling, "install", lambda: sleep)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    runs, budgets = polling.Runs(), []
    for _ in range(8):
        runs.start()
        budgets.append(sleep.budget.value * polling.SLEEP_MICROSECONDS / 1e6)
    assert budgets == [0, 0, 0, 0, 0.25, 0.25, 0.25, polling.LONGEST_RUN]


def test_where_no_such_function_is_allowed_all_stays(monkeypatch):
    pointer = ctypes.c_uint64(1)

    def refuse(code, data):
        raise OSError("memory that is executed is not allowed")

    monkeypatch.setattr(polling, "pointers_to", lambda address: [pointer])
    monkeypatch.setattr(polling, "make_function", refuse)
    polling.install.cache_clear()
    assert polling.install() is None and pointer.value == 1
    polling.Runs().start()
    polling.install.cache_clear()
