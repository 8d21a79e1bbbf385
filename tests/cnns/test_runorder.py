"""OneFlow queues a run of a graph before it starts it."""

import ctypes
import os
import subprocess
import sys

import pytest

from cnns import runorder
from cnns.native import address_of, loaded_library, pointers_to
from cnns.runorder import QUEUE, WAIT, method, queue_before_start
from small import ROOT
from test_launch import free_port

# A thread that loses its core between the start of a run and what follows it, 20 ms each time.
LATE = """
import ctypes, os, sys, time
import cnns.startup
import oneflow as flow
from cnns.native import address_of, loaded_library, pointers_to
from cnns.runorder import QUEUE, method, queue_before_start

class Sum(flow.nn.Graph):
    def build(self, x):
        return x.sum()

(slot,) = pointers_to(address_of(loaded_library(), method(QUEUE)))
if sys.argv[1] == "corrected":
    assert queue_before_start()
call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
follows, calls = call(slot.value), []

@call
def late(policy, graph):
    calls.append(time.sleep(0.02))
    follows(policy, graph)

slot.value = ctypes.cast(late, ctypes.c_void_p).value
graphs = [Sum(), Sum()]
ones = flow.ones(2, 3, placement=flow.placement("cpu", [0]), sbp=flow.sbp.broadcast)
for i in range(100):
    assert graphs[i // 5 % 2](ones).numpy() == 6
print(len(calls) > 90, flush=True)
os._exit(0)
"""


def run_late(which: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LATE, which]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_thread_that_is_late_corrupts_nothing():
    done = run_late("corrected")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.long
def test_without_the_correction_it_does():
    """So the test above holds because of the correction, and this OneFlow still needs it."""
    assert run_late("as it is").returncode < 0


def test_what_calls_the_two_functions_is_led_elsewhere_once():
    assert queue_before_start() and queue_before_start()
    for name in (WAIT, QUEUE):
        assert pointers_to(address_of(loaded_library(), method(name))) == []


def refuse(code):
    raise OSError("memory that is executed is not allowed")


@pytest.mark.parametrize(
    "name, value",
    [
        ("loaded_library", lambda: None),
        ("address_of", lambda library, function: None),
        ("make_function", refuse),
        ("pointers_to", lambda address: []),
    ],
)
def test_where_it_cannot_be_corrected_all_stays_as_it_is(monkeypatch, capsys, name, value):
    pointers = [ctypes.c_uint64(1), ctypes.c_uint64(2)]
    found = iter([[pointer] for pointer in pointers])
    monkeypatch.setattr(runorder, "pointers_to", lambda address: next(found))
    monkeypatch.setattr(runorder, name, value)
    assert not queue_before_start.__wrapped__()
    assert [pointer.value for pointer in pointers] == [1, 2]
    said = capsys.readouterr().err
    assert "could not be corrected" in said and said.count("\n") == 1


# Steps of well below a millisecond, of two graphs by turns, for as long as rank 0 says.
SHORT_RUNS = """
import os, sys, time
import oneflow as flow
from oneflow import nn
from cnns.graphs import QuietGraph

class Train(QuietGraph):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.add_optimizer(flow.optim.SGD(model.parameters(), lr=1e-3))

    def build(self, x):
        loss = self.model(x).sum()
        loss.backward()
        return loss

class Predict(QuietGraph):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def build(self, x):
        return self.model(x)

placement = flow.env.all_device_placement("cpu")
model = nn.Linear(4, 3).to_global(placement=placement, sbp=flow.sbp.broadcast)
ones = flow.ones(2, 4, placement=placement, sbp=flow.sbp.split(0))
train, predict = Train(model), Predict(model)
end, steps, left = time.monotonic() + float(sys.argv[1]), 0, True
while left:
    train(ones)
    for _ in range(50):
        predict(ones).to_local().numpy()
    steps += 51
    left = flow.tensor([int(time.monotonic() < end)])
    left = left.to_global(placement=placement, sbp=flow.sbp.broadcast).to_local().item()
flow.comm.barrier()
print(steps, flush=True)
flow.comm.barrier()
os._exit(0)
"""


def run_short(seconds: float, num_processes: int) -> list[int]:
    """Steps that each process made in so many seconds beside two busy processes."""
    port = str(free_port())
    command = [sys.executable, "-c", SHORT_RUNS, str(seconds)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        ended = [process.communicate(timeout=300 + 3 * seconds) for process in ranks]
        assert [process.returncode for process in ranks] == [0] * num_processes, ended
        return [int(out) for out, _ in ended]
    finally:
        for process in (*busy, *ranks):
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_short_runs_for_minutes_on_a_busy_machine(num_processes):
    """Without the correction a run of 15 s ends with a memory fault in one case of seven."""
    assert min(run_short(180, num_processes)) > 100
