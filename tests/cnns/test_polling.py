"""OneFlow's scheduler sleeps where it would spin: what is replaced, and what is left alone."""

import cnns.startup  # noqa: F401  (first, see there)

import ctypes
import os
import platform
import subprocess
import sys
import time

import pytest

from cnns import polling
from small import ROOT, write_parts

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or polling.SWITCH in os.environ, reason="left as it is here"
)

LIBC = ctypes.CDLL(None)


def sched_yield() -> int:
    return ctypes.cast(LIBC.sched_yield, ctypes.c_void_p).value or 0


def test_calls_in_a_row_sleep_until_there_is_work():
    sleep = polling.Sleep(30_000, calls=3, cycles=2**63)
    call = ctypes.CFUNCTYPE(ctypes.c_int)(sleep.address)

    def slept() -> bool:
        start = time.monotonic()
        assert call() == 0
        return time.monotonic() - start >= 0.03

    first = [slept() for _ in range(6)]
    assert first[3:] == [True] * 3 and sum(first) < 6
    assert sleep.state.calls_left == 0
    sleep.state.work_cycles = 0  # as if all time between two calls were work
    slept()
    assert sleep.state.calls_left == 2
    sleep.state.work_cycles = 2**63
    slept(), slept()
    assert sleep.state.calls_left == 0
    assert slept()


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
print(left_in_library())
graph(x).numpy()
print(left_in_library())
"""
    assert run(code) == "1\n0\n"
    assert run(code, **{polling.SWITCH: "1"}) == "1\n1\n"


def test_the_scheduler_needs_hardly_any_processor_while_a_graph_runs():
    """Some 0.9 of a core without the change, where a core is idle."""
    code = """
def seconds(thread):
    with open(f"/proc/self/task/{thread}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9

(x + 1).numpy()
waiting = [thread for thread in os.listdir("/proc/self/task") if int(thread) != os.getpid()]
for _ in range(3):
    graph(x).numpy()
before, start = {thread: seconds(thread) for thread in waiting}, time.perf_counter()
for _ in range(12):
    graph(x).numpy()
wall = time.perf_counter() - start
print(max(seconds(thread) - before[thread] for thread in waiting) / wall)
"""
    assert float(run(code)) < 0.3


def test_operations_that_follow_each_other_are_not_slowed_down():
    """If the scheduler slept between them, each would take a quarter of a millisecond and more."""
    code = """
graph(x).numpy()
small = flow.zeros(4, 4)
calls = polling.sleep_instead_of_polling().state
left, seconds = [], []
for _ in range(20):
    time.sleep(0.01)
    start = time.perf_counter()
    for _ in range(200):
        small = small + 1
        left.append(calls.calls_left)
    small.numpy()
    seconds.append((time.perf_counter() - start) / 200)
print(min(left) >= 0, max(left) <= polling.CALLS_BEFORE_SLEEP, min(seconds))
"""
    within, bounded, seconds = run(code).split()
    assert (within, bounded) == ("True", "True")
    assert float(seconds) < polling.SLEEP_MICROSECONDS * 1e-6


def test_where_no_such_function_is_allowed_all_stays(monkeypatch):
    pointer = ctypes.c_uint64(1)

    def refuse(code, data):
        raise OSError("memory that is executed is not allowed")

    monkeypatch.setattr(polling, "pointers_to", lambda address: [pointer])
    monkeypatch.setattr(polling, "make_function", refuse)
    polling.sleep_instead_of_polling.cache_clear()
    assert polling.sleep_instead_of_polling() is None and pointer.value == 1
    polling.sleep_instead_of_polling.cache_clear()


def test_it_sleeps_where_parts_are_read_for_a_cpu(tmp_path):
    """Also where ONNX Runtime computes and no graph ever runs."""
    write_parts(tmp_path / "parts", [[0, 1]])
    code = f"""
import model_registry, ofrecord_util
from cnns.data.datasets import open_val_dataset

print(left_in_library())
ofrecord_util.val_loader(
    open_val_dataset({str(tmp_path / "parts")!r}),
    batch_size=2,
    preprocessing=model_registry.MODELS["resnet50"].preprocessing(image_size=32),
    device="cpu",
)
print(left_in_library())
"""
    assert run(code) == "1\n0\n"
