"""Pointers of OneFlow's library to functions, and functions in their place."""

import ctypes
import platform

import pytest

from cnns import native


def test_pointers_are_found_where_they_are_aligned():
    memory = ctypes.create_string_buffer(64)
    start = ctypes.addressof(memory)
    target = 0x7F00DEADBEEF
    aligned = -(-start // 8) * 8 + 8
    ctypes.c_uint64.from_address(aligned).value = target
    ctypes.memmove(aligned + 17, target.to_bytes(8, "little"), 8)
    found = native.find_pointers([(start, 64)], target)
    assert [ctypes.addressof(pointer) for pointer in found] == [aligned]
    found[0].value = 1
    assert native.find_pointers([(start, 64)], target) == []


def test_only_writable_data_of_the_library_is_looked_at():
    maps = """\
7f0000000000-7f0000001000 r--p 00000000 08:01 5      /somewhere/liboneflow-1.so
7f0000002000-7f0000005000 rw-p 00001000 08:01 5      /some where/liboneflow-1.so
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
7f0000006000-7f0000007000 rw-p 00001000 08:01 5      /liboneflow-/libother.so
"""
    assert native.writable_data(maps) == [(0x7F0000002000, 0x3000)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the code is for x86-64")
def test_a_function_is_called_and_its_data_can_be_written_to():
    code = bytes.fromhex("8b05fa0f0000c3")  # mov eax, [rip + 4090]: the next page; ret
    address, data = native.make_function(code, (41).to_bytes(4, "little"))
    call = ctypes.CFUNCTYPE(ctypes.c_int)(address)
    assert call() == 41
    ctypes.c_int32.from_address(data).value = 42
    assert call() == 42


def test_where_no_memory_may_be_executed_it_says_so(monkeypatch):
    class SELinux:
        """A system that allows none."""

        mmap = ctypes.CDLL(None).mmap
        mprotect = type("Refusal", (), {"__call__": lambda *_: -1})()

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SELinux)
    with pytest.raises(OSError, match="not allowed"):
        native.make_function(b"")


def test_without_the_library_there_is_nothing_to_change(monkeypatch):
    monkeypatch.setattr(native, "read_maps", lambda: "")
    assert native.loaded_library() is None
    assert native.pointers_to(1) == []
