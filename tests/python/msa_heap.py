"""What is allocated in this process, exactly, so that a leak of a few bytes per call shows."""

import ctypes
import gc
import sys

import pytest


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]


def heap_bytes():
    """Bytes in use that malloc gave out; Python's own small objects are python_blocks()."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library has no mallinfo2()")
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def growth(action, times):
    """(bytes of the C heap, Python's blocks) that `times` calls leave behind, after a warm-up."""
    for _ in range(times // 10):
        action()
    gc.collect()
    before = heap_bytes(), sys.getallocatedblocks()
    for _ in range(times):
        action()
    gc.collect()
    return heap_bytes() - before[0], sys.getallocatedblocks() - before[1]
