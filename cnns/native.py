"""Replaces functions that OneFlow's library calls, where nothing that OneFlow offers helps.

Who needs it says why: `cnns.runorder` and `cnns.polling`. A library calls a function of another
file, and of its own interface, by way of a pointer in a table that the dynamic linker fills. The
pointers to a function are looked for in the library's writable data and led elsewhere: to a few
machine instructions for x86-64, since a function of Python's would need the interpreter's lock. The
functions themselves stay as they are. Where anything is different from what is expected (another
processor, another build, a system that allows no such memory), nothing is changed.
"""

import ctypes
import os
import platform
import re
import struct

LIBRARY = re.compile(r".*/liboneflow-?\w*\.so")
# A line of /proc/self/maps: an area of memory, what it allows, and the file that is there.
AREA = re.compile(r"^(\w+)-(\w+) (\S+) [^/\n]*(.*)$", re.MULTILINE)
PAGE_BYTES = 4096
READ, WRITE, EXECUTE = 1, 2, 4
PRIVATE_ANONYMOUS = 0x22
FAILED = ctypes.c_void_p(-1).value


def read_maps() -> str:
    """The areas of this process's memory; empty where the system does not tell."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def loaded_library() -> ctypes.CDLL | None:
    """OneFlow's library, if it is loaded and its code is for this processor."""
    paths = {path for *_, path in AREA.findall(read_maps()) if LIBRARY.fullmatch(path)}
    if platform.machine() != "x86_64" or len(paths) != 1:
        return None
    return ctypes.CDLL(paths.pop(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)


def address_of(library: ctypes.CDLL, function: str) -> int | None:
    """Where a function is that `library` has or uses."""
    try:
        return ctypes.cast(library[function], ctypes.c_void_p).value
    except AttributeError:
        return None


def writable_data(maps: str) -> list[tuple[int, int]]:
    """Where the library's writable data lies: (address, length)."""
    return [
        (int(start, 16), int(end, 16) - int(start, 16))
        for start, end, allowed, path in AREA.findall(maps)
        if allowed == "rw-p" and LIBRARY.fullmatch(path)
    ]


def find_pointers(areas: list[tuple[int, int]], target: int) -> list[ctypes.c_uint64]:
    """The aligned pointers to `target` in these areas of memory."""
    wanted, found = struct.pack("<Q", target), []
    for address, length in areas:
        content, at = ctypes.string_at(address, length), -1
        while (at := content.find(wanted, at + 1)) >= 0:
            if (address + at) % 8 == 0:
                found.append(ctypes.c_uint64.from_address(address + at))
    return found


def pointers_to(target: int) -> list[ctypes.c_uint64]:
    """The pointers through which the library calls the function at this address."""
    return find_pointers(writable_data(read_maps()), target)


def make_function(code: bytes, data: bytes = b"") -> tuple[int, int]:
    """A page with `code`, and behind it one with `data` that can be written to; their addresses.

    They stay until the process ends. Raises OSError where the system allows no memory that is
    executed, as SELinux may.
    """
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages = libc.mmap(None, 2 * PAGE_BYTES, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0)
    if pages == FAILED:
        raise OSError("there is no memory for a function")
    ctypes.memmove(pages, code, len(code))
    ctypes.memmove(pages + PAGE_BYTES, data, len(data))
    if libc.mprotect(pages, PAGE_BYTES, READ | EXECUTE) != 0:
        raise OSError("memory that is executed is not allowed")
    return pages, pages + PAGE_BYTES
