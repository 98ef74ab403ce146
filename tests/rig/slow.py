"""Memory that does not answer: the first touch of each page, by this process, waits until it is let go.

userfaultfd(2).
"""

import contextlib
import ctypes
import fcntl
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.driver import Driver

PAGE = 4096
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
UFFD_API, MODE_MISSING = 0xAA, 1
USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(platform.machine())


def _userfaultfd() -> int:
    fd = int(ctypes.CDLL(None, use_errno=True).syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return fd


def _missing() -> str | None:
    if USERFAULTFD is None:
        return "the number of userfaultfd is not known for this machine"
    try:
        os.close(_userfaultfd())
    except OSError as error:
        return str(error)
    return None


userfaultfd = pytest.mark.skipif(bool(why := _missing()), reason=f"no slow memory: {why}")


def mappings(fd: int) -> list[tuple[int, int]]:
    """Where this process has a file mapped: start and size."""
    inode = os.fstat(fd).st_ino
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, _, _, device, number, *_ = line.split()
        if int(number) == inode and device == "00:01":
            start, end = (int(part, 16) for part in where.split("-"))
            found.append((start, end - start))
    return found


@contextlib.contextmanager
def slow(areas: list[tuple[int, int]]) -> Iterator[None]:
    """Pages of these areas of shared memory that nobody has touched yet."""
    fd = _userfaultfd()
    try:
        fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=3Q", UFFD_API, 0, 0)))
        for start, size in areas:
            fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack("=4Q", start, size, MODE_MISSING, 0)))
        yield
    finally:
        os.close(fd)  # whoever waits goes on


def core_memory(driver: Driver) -> list[tuple[int, int]]:
    """Where the core has this guest's memory; the test's own mapping is another."""
    own = ctypes.addressof(ctypes.c_char.from_buffer(driver.memory.map))
    return [area for area in mappings(driver.memory.fd) if area[0] != own]


def untouched(driver: Driver) -> int:
    """A page of its memory that nobody has touched."""
    return driver.memory.reserve(2 * PAGE, PAGE) + PAGE
