"""Makes OneFlow queue a run of a graph before it starts the run, and not after.

OneFlow 0.9.0 (`LaunchLazyJobInstructionPolicy::Compute`) waits until no other graph runs, starts
the run, and then puts the graph into a queue, from which the end of the run takes it out. A run
that is over before it is in the queue takes from an empty one: memory fault, double free or hang.
All it needs is a thread that loses its core between two statements, and nothing that can be called
from outside comes between them; docs/oneflow-notes.md tells more.

Both calls go through the table in which the dynamic linker keeps the addresses of functions. There
the wait is replaced by a few instructions that wait and then queue, and the queueing behind the
start by a return. The functions themselves stay as they are.
"""

import ctypes
import functools
import mmap
import os
import platform
import re

import numpy as np

from cnns.log import notice

WAIT = "WaitUntilQueueEmptyIfFrontNNGraphNotEquals"
QUEUE = "EnqueueNNGraph"
# A line of /proc/self/maps: an area of memory, what it allows, and the file that is there.
AREA = re.compile(r"^(\w+)-(\w+) (\S+) [^/\n]*(.*)$", re.MULTILINE)
LIBRARY = re.compile(r".*/liboneflow-?\w*\.so")

# From <dlfcn.h> and <elf.h>.
RTLD_DI_LINKMAP = 2
DT_NULL, DT_PLTRELSZ, DT_PLTGOT = 0, 2, 3
RESERVED_SLOTS, RELOCATION_BYTES = 3, 24


class Tag(ctypes.Structure):
    """An entry of a library's dynamic section."""

    _fields_ = (("kind", ctypes.c_int64), ("value", ctypes.c_uint64))


class LinkMap(ctypes.Structure):
    """The beginning of what the dynamic linker notes of a library."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("tags", ctypes.POINTER(Tag)),
    )


@functools.cache
def queue_before_start() -> bool:
    """Correct the order, once, before the first run of a graph; say so where that is impossible."""
    corrected = exchange()
    if not corrected:
        notice(
            "OneFlow's order of starting and queueing a run could not be corrected on this system; "
            "networks whose steps take few milliseconds may crash."
        )
    return corrected


def exchange() -> bool:
    library = loaded_library()
    if library is None or platform.machine() != "x86_64":
        return False
    places = {name: slots_of(library, method(name)) for name in (WAIT, QUEUE)}
    if any(len(slots) != 1 for slots in places.values()):
        return False
    (wait,), (queue,) = places[WAIT], places[QUEUE]
    code = executable(wait_and_queue(wait.value, queue.value))
    if code is None or not (is_writable(wait) and is_writable(queue)):
        return False
    wait.value, queue.value = code + len(RETURN), code
    return True


def method(name: str) -> str:
    """The symbol of a method of `LazyJobStreamPolicy` that takes a graph."""
    argument = "ERKSt10shared_ptrINS_9NNGraphIfEE"
    return f"_ZN7oneflow2vm19LazyJobStreamPolicy{len(name)}{name}{argument}"


def areas() -> list[tuple[str, ...]]:
    """(start, end, what is allowed, file) of each area of this process's memory."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            return AREA.findall(file.read())
    except OSError:
        return []


def loaded_library() -> ctypes.CDLL | None:
    for *_, path in areas():
        if LIBRARY.fullmatch(path):
            return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    return None


def is_writable(slot: ctypes.c_uint64) -> bool:
    """Whether the dynamic linker has not made its table read-only, as it can."""
    address = ctypes.addressof(slot)
    return any(
        int(start, 16) <= address < int(end, 16) and "w" in allowed
        for start, end, allowed, _ in areas()
    )


def slots_of(library: ctypes.CDLL, function: str) -> list[ctypes.c_uint64]:
    """Where the library looks up this function's address in order to call it."""
    try:
        address = ctypes.cast(library[function], ctypes.c_void_p).value
    except AttributeError:
        return []
    record = ctypes.POINTER(LinkMap)()
    handle = ctypes.c_void_p(library._handle)
    dlinfo = ctypes.CDLL(None).dlinfo
    if dlinfo(handle, ctypes.c_int(RTLD_DI_LINKMAP), ctypes.byref(record)) != 0:
        return []
    values: dict[int, int] = {}
    for tag in record.contents.tags:
        if tag.kind == DT_NULL:
            break
        values[tag.kind] = tag.value
    table = values[DT_PLTGOT]
    count = RESERVED_SLOTS + values[DT_PLTRELSZ] // RELOCATION_BYTES
    slots = (ctypes.c_uint64 * count).from_address(table)
    found = np.flatnonzero(np.ctypeslib.as_array(slots) == address)
    return [ctypes.c_uint64.from_address(table + 8 * int(i)) for i in found]


RETURN = b"\xc3"


def wait_and_queue(wait: int, queue: int) -> bytes:
    """x86-64: a return by itself, and behind it `wait(this, graph); queue(this, graph);`."""
    return b"".join(
        (
            RETURN,
            b"\x57\x56",  # push rdi, rsi
            b"\x48\x83\xec\x08",  # sub rsp, 8: the stack is aligned to 16 bytes at calls
            b"\x48\xb8" + wait.to_bytes(8, "little"),  # mov rax, wait
            b"\xff\xd0",  # call rax
            b"\x48\x83\xc4\x08",  # add rsp, 8
            b"\x5e\x5f",  # pop rsi, rdi
            b"\x48\xb8" + queue.to_bytes(8, "little"),  # mov rax, queue
            b"\xff\xe0",  # jmp rax
        )
    )


def executable(code: bytes) -> int | None:
    """The address of a copy that can be run, kept for as long as the process lives.

    None where the system allows no such memory.
    """
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    size = ctypes.c_size_t(len(code))
    address = libc.mmap(None, size, protection, flags, -1, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        return None
    ctypes.memmove(address, code, len(code))
    return address
