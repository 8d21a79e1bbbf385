"""Lets OneFlow's scheduler sleep while a graph runs on a CPU.

Its thread (source: `VirtualMachine::ScheduleLoop`, v0.9.0) asks without a pause whether the run is
over, and calls `sched_yield` in between, which gives the processor up only to come straight back:
one core of each process, taken from those that compute. None of OneFlow's settings makes it wait,
and with a lower priority (nice, SCHED_IDLE) it gets no processor, for up to seconds, where other
programs keep all cores busy, just when the next step is to be started.

So the library's pointer to `sched_yield` is led to a function (cnns.native) that sleeps instead as
long as a budget lasts. A graph that is started gives it the time that its run may take. Outside of
runs nothing changes: operations that are computed at once would be ten times as slow if the
scheduler slept between them. Nothing of this happens before a graph runs on a CPU.
"""

import ctypes
import functools
import itertools
import os
import struct
import time
from collections import deque

from cnns.native import address_of, loaded_library, make_function, pointers_to

SLEEP_MICROSECONDS = 250
SHORTEST_RUN = 0.02  # seconds; shorter ones are not worth it
LONGEST_RUN = 10.0  # seconds, for which the scheduler sleeps at most
# Set by those who want OneFlow's own way; its default is 1, and 0 spins without sched_yield.
SWITCH = "ONEFLOW_VM_ENABLE_SCHEDULE_YIELD"

# x86-64, with no use of the stack. The page behind it begins with the duration, 16 bytes, and the
# budget, an int32: the number of calls that are still to sleep.
CODE = bytes.fromhex(
    "f30f1efa"  # endbr64, for processors that check where a jump lands
    "488d3df50f0000"  # lea rdi, [rip + 4085]: the next page
    "31f6"  # xor esi, esi
    "b818000000"  # mov eax, 24: sched_yield()
    "837f1000"  # cmp dword ptr [rdi + 16], 0
    "7e08"  # jle to the system call
    "ff4f10"  # dec dword ptr [rdi + 16]
    "b823000000"  # mov eax, 35: nanosleep(rdi, NULL)
    "0f05"  # syscall
    "31c0"  # xor eax, eax
    "c3"  # ret
)


class Sleep:
    """A function that sleeps as often as `budget` says, and yields otherwise.

    Raises OSError where the system does not allow it.
    """

    def __init__(self, microseconds: int):
        duration = struct.pack("<qq", *divmod(microseconds * 1000, 1_000_000_000))
        self.address, data = make_function(CODE, duration)
        self.budget = ctypes.c_int32.from_address(data + len(duration))


@functools.cache
def install() -> Sleep | None:
    """Replace the pointers of the library that is loaded; None where that is not possible."""
    library = loaded_library()
    address = address_of(library, "sched_yield") if library is not None else None
    if address is None or SWITCH in os.environ:
        return None
    pointers = pointers_to(address)
    if not pointers:
        return None
    try:
        sleep = Sleep(SLEEP_MICROSECONDS)
    except OSError:
        return None
    for pointer in pointers:
        pointer.value = sleep.address
    return sleep


class Runs:
    """Lets the scheduler sleep while a graph runs: as long as from one start to the next."""

    def __init__(self) -> None:
        self.starts: deque[float] = deque(maxlen=4)

    def start(self) -> None:
        """A run has just been started on a CPU."""
        self.starts.append(time.monotonic())
        sleep = install()
        if sleep is None:
            return
        seconds = min((b - a for a, b in itertools.pairwise(self.starts)), default=0.0)
        seconds = min(seconds, LONGEST_RUN) if seconds >= SHORTEST_RUN else 0.0
        sleep.budget.value = round(seconds * 1e6 / SLEEP_MICROSECONDS)
