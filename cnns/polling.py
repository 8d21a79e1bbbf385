"""Lets OneFlow's scheduler sleep while there is nothing for it to do.

Its thread (source: `VirtualMachine::ScheduleLoop`, v0.9.0) asks without a pause whether an
instruction, or the run of a graph, is over, and calls `sched_yield` in between, which gives the
processor up only to come straight back: one core of each process, taken from those that compute.
None of OneFlow's settings makes it wait, and with a lower priority (nice, SCHED_IDLE) it gets no
processor, for up to seconds, where other programs keep all cores busy, just when the next step is
to be started.

So the library's pointer to `sched_yield` is led to a function (cnns.native) that sleeps instead,
but only after many calls in a row: operations that are computed at once follow each other within
microseconds, and would be ten times as slow if the scheduler slept between them. Work shows in the
time between two calls, which are much closer where the thread only asks. Nothing of this happens
before a graph runs, or parts are read, for a CPU.
"""

import ctypes
import functools
import os

from cnns.native import address_of, loaded_library, make_function, pointers_to

SLEEP_MICROSECONDS = 250
CALLS_BEFORE_SLEEP = 1000  # some 0.5 ms
# Between two calls, of the processor's time stamp counter (2 to 4 in a nanosecond). Asking takes
# some 500, and handling an instruction many thousands.
WORK_CYCLES = 10_000
# Set by those who want OneFlow's own way; its default is 1, and 0 spins without sched_yield.
SWITCH = "ONEFLOW_VM_ENABLE_SCHEDULE_YIELD"

# x86-64, with no use of the stack. The page behind it begins with a `State`.
CODE = bytes.fromhex(
    "f30f1efa"  # endbr64, for processors that check where a jump lands
    "488d3df50f0000"  # lea rdi, [rip + 4085]: the next page
    "0f31"  # rdtsc
    "48c1e220"  # shl rdx, 32
    "4809d0"  # or rax, rdx
    "482b4710"  # sub rax, [rdi + 16]: since the call before
    "483b4718"  # cmp rax, [rdi + 24]
    "7606"  # jbe over the next two
    "8b4f24"  # mov ecx, [rdi + 36]
    "894f20"  # mov [rdi + 32], ecx: there was work
    "b818000000"  # mov eax, 24: sched_yield()
    "837f2000"  # cmp dword ptr [rdi + 32], 0
    "7e05"  # jle to the sleep
    "ff4f20"  # dec dword ptr [rdi + 32]
    "eb07"  # jmp to the system call
    "b823000000"  # mov eax, 35: nanosleep(rdi, NULL)
    "31f6"  # xor esi, esi
    "0f05"  # syscall
    "0f31"  # rdtsc
    "48c1e220"  # shl rdx, 32
    "4809d0"  # or rax, rdx
    "48894710"  # mov [rdi + 16], rax
    "31c0"  # xor eax, eax
    "c3"  # ret
)


class State(ctypes.Structure):
    """What the function reads and writes."""

    _fields_ = (
        ("seconds", ctypes.c_int64),  # these two: how long it sleeps
        ("nanoseconds", ctypes.c_int64),
        ("last", ctypes.c_uint64),  # time stamp of the end of the call before
        ("work_cycles", ctypes.c_uint64),
        ("calls_left", ctypes.c_int32),  # until it sleeps
        ("calls_before_sleep", ctypes.c_int32),
    )


class Sleep:
    """A function that yields so many times after work, and then sleeps.

    Raises OSError where the system does not allow it.
    """

    def __init__(self, microseconds: int, *, calls: int, cycles: int):
        seconds, rest = divmod(microseconds, 1_000_000)
        state = State(seconds, rest * 1000, 0, cycles, calls, calls)
        self.address, data = make_function(CODE, bytes(state))
        self.state = State.from_address(data)


@functools.cache
def sleep_instead_of_polling() -> Sleep | None:
    """Replace the pointers of the library that is loaded; None where that is not possible."""
    library = loaded_library()
    address = address_of(library, "sched_yield") if library is not None else None
    if address is None or SWITCH in os.environ:
        return None
    pointers = pointers_to(address)
    if not pointers:
        return None
    try:
        sleep = Sleep(SLEEP_MICROSECONDS, calls=CALLS_BEFORE_SLEEP, cycles=WORK_CYCLES)
    except OSError:
        return None
    for pointer in pointers:
        pointer.value = sleep.address
    return sleep
