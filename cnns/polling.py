"""Lets OneFlow's scheduler sleep while a graph runs on a CPU.

Its thread (source: `VirtualMachine::ScheduleLoop`, v0.9.0) asks without a pause whether the run is
over, and calls `sched_yield` in between, which gives the processor up only to come straight back:
one core of each process, taken from those that compute. None of OneFlow's settings makes it wait,
and with a lower priority (nice, SCHED_IDLE) it gets no processor, for up to seconds, where other
programs keep all cores busy, just when the next step is to be started.

So the library's pointer to `sched_yield`, which the dynamic linker put into its table, is pointed
at a function that sleeps instead as long as a budget lasts. A graph that is started gives it the
time that its run may take. Outside of runs nothing changes: operations that are computed at once
would be ten times as slow if the scheduler slept between them. The function cannot be one of
Python's, which would need the interpreter's lock, so it is eleven machine instructions in a page of
their own. The pointer is replaced only if it is what it should be, and where anything is different
from what is expected here (another processor, a system that allows no such page, another build),
all stays as OneFlow has it. Nothing of this happens before a graph runs on a CPU.
"""

import ctypes
import functools
import itertools
import os
import platform
import re
import struct
import sys
import time
from collections import deque

SLEEP_MICROSECONDS = 250
SHORTEST_RUN = 0.02  # seconds; shorter ones are not worth it
LONGEST_RUN = 10.0  # seconds, for which the scheduler sleeps at most
LIBRARY = "liboneflow-"
# Set by those who want OneFlow's own way; its default is 1, and 0 spins without sched_yield.
SWITCH = "ONEFLOW_VM_ENABLE_SCHEDULE_YIELD"

# x86-64, with no use of the stack. The page after it begins with the duration, 16 bytes, and the
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

PAGE_BYTES = 4096
READ, WRITE, EXECUTE = 1, 2, 4
PRIVATE_ANONYMOUS = 0x22
FAILED = ctypes.c_void_p(-1).value


def read_maps() -> str:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return file.read()


def writable_data(maps: str, library: str) -> list[tuple[int, int]]:
    """Where a library's writable data lies in the memory of this process: (address, length)."""
    pattern = re.compile(r"^(\w+)-(\w+) rw-p \S+ \S+ \S+ +(\S.*)$", re.MULTILINE)
    return [
        (int(start, 16), int(end, 16) - int(start, 16))
        for start, end, path in pattern.findall(maps)
        if os.path.basename(path).startswith(library)
    ]


def find_pointers(areas: list[tuple[int, int]], target: int) -> list[int]:
    """The addresses of the aligned pointers to `target` in these areas of memory."""
    wanted, found = struct.pack("<Q", target), []
    for address, length in areas:
        content, at = ctypes.string_at(address, length), -1
        while (at := content.find(wanted, at + 1)) >= 0:
            if (address + at) % 8 == 0:
                found.append(address + at)
    return found


class Sleep:
    """A function that sleeps as often as `budget` says, and yields otherwise.

    Its pages stay until the process ends. Raises OSError where the system allows none that is
    executed, as SELinux may.
    """

    def __init__(self, libc: ctypes.CDLL, microseconds: int):
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        pages = libc.mmap(None, 2 * PAGE_BYTES, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0)
        if pages == FAILED:
            raise OSError("no memory for a function")
        ctypes.memmove(pages, CODE, len(CODE))
        duration = struct.pack("<qq", *divmod(microseconds * 1000, 1_000_000_000))
        ctypes.memmove(pages + PAGE_BYTES, duration, len(duration))
        if libc.mprotect(pages, PAGE_BYTES, READ | EXECUTE) != 0:
            raise OSError("memory that is executed is not allowed")
        self.address = pages
        self.budget = ctypes.c_int32.from_address(pages + PAGE_BYTES + len(duration))


@functools.cache
def install(library: str = LIBRARY) -> Sleep | None:
    """Replace the pointers of the library that is loaded; None where that is not possible."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or SWITCH in os.environ:
        return None
    libc = ctypes.CDLL(None)
    sched_yield = ctypes.cast(libc.sched_yield, ctypes.c_void_p).value
    try:
        pointers = find_pointers(writable_data(read_maps(), library), sched_yield or 0)
        if not pointers:
            return None
        sleep = Sleep(libc, SLEEP_MICROSECONDS)
    except OSError:
        return None
    for pointer in pointers:
        ctypes.c_uint64.from_address(pointer).value = sleep.address
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
