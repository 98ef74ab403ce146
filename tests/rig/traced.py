"""Threads of other processes that are stopped for a while; ptrace(2)."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH, WALL = 0x4206, 0x4207, 17, 0x4000_0000


@contextlib.contextmanager
def stopped(tid: int) -> Iterator[None]:
    """One thread of another process; the others go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for request in PTRACE_SEIZE, PTRACE_INTERRUPT:
        if libc.ptrace(request, tid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(tid, WALL)
    try:
        yield
    finally:
        libc.ptrace(PTRACE_DETACH, tid, None, None)
