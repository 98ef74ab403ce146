"""A vhost-user session as an input has it: messages in whatever order, with descriptors of every kind.

As in input.h each choice takes a byte and zero is the ordinary one: what an input is short of is a session that works.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable

import atheris

from tests.rig.frontend import ACK_AND_ALL, MODERN, DisconnectedError, Frontend, RingMemory
from xdpnet.virtq.features import LOG_ALL, VirtioFeature, mask
from xdpnet.virtq.message import (
    U64,
    Address,
    Log,
    MemoryRegion,
    MemoryTable,
    Request,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
)

PATIENCE_S = 20.0  # for what the other side has to do
MOST_MESSAGES = 40
NUM = 256
FULL_COUNTER = 2**64 - 2


def fuzz(check: Callable[[bytes], None]) -> None:
    atheris.Setup([os.environ.get("XDPNET_FUZZ_SELF", sys.argv[0]), *sys.argv[1:]], check)
    atheris.Fuzz()


def settled(count: Callable[[], int]) -> int:
    """What it counts once that has not changed for a while: descriptors are closed by others, and later."""
    seen = [count()]
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        time.sleep(0.1)
        seen.append(count())
    return seen[-1]


class Input:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int = 1) -> int:
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little")

    def take_bytes(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        self._at += size
        return part


# ---- descriptors ----


def _full_event() -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(fd, FULL_COUNTER)
    return fd


def _memfd(size: int, flags: int = 0) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | flags)
    with contextlib.suppress(OSError):
        os.ftruncate(fd, size)
    return fd


def _huge() -> int:
    try:
        return _memfd(2 << 20, os.MFD_HUGETLB)
    except OSError:
        return _memfd(2 << 20)


def _pipe(end: int) -> int:
    ends = os.pipe()
    os.close(ends[1 - end])
    return ends[end]


def _file() -> int:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), 1 << 20)
        return os.dup(file.fileno())


def _reopened(flags: int) -> int:
    fd = _memfd(1 << 20)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def _listener() -> int:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(b"")
        listening.listen()
        return os.dup(listening.fileno())


KINDS: tuple[Callable[[], int], ...] = (
    lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
    lambda: _memfd(1 << 20),
    _full_event,
    lambda: _pipe(0),
    lambda: _pipe(1),
    lambda: socket.socket(socket.AF_UNIX).detach(),
    lambda: socket.socket(socket.AF_INET).detach(),
    lambda: _epoll(),
    lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
    _file,
    lambda: _memfd(0),
    lambda: _reopened(os.O_RDONLY),
    lambda: _reopened(os.O_PATH),
    _huge,
    _listener,
    lambda: os.eventfd(1, os.EFD_SEMAPHORE | os.EFD_CLOEXEC),
    lambda: _memfd(1 << 20, os.MFD_ALLOW_SEALING),
    lambda: os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC),
    lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
)


def _epoll() -> int:
    with contextlib.closing(select.epoll()) as watching:
        return os.dup(watching.fileno())


# ---- messages ----


def _payload(given: Input, request: int, memory: RingMemory) -> bytes:
    """What a frontend would send with this request."""
    ring = given.take() % 4
    match request:
        case Request.SET_FEATURES:
            packed = MODERN | mask(VirtioFeature.VIRTIO_F_RING_PACKED)
            bits = (MODERN, packed, MODERN | LOG_ALL, packed | LOG_ALL, MODERN | (1 << given.take() % 64))
            return U64(bits[given.take() % 5]).pack()
        case Request.SET_PROTOCOL_FEATURES:
            return U64(ACK_AND_ALL ^ (1 << (given.take() % 64) if given.take() & 1 else 0)).pack()
        case Request.SET_MEM_TABLE:
            count = (1, 2, 0, 8)[given.take() % 4]
            part = memory.size // max(1, count)
            regions = [
                MemoryRegion(memory.guest_addr + i * part, part, memory.user_addr + i * part, i * part)
                for i in range(count)
            ]
            return MemoryTable(tuple(regions)).pack()
        case Request.ADD_MEM_REG | Request.REM_MEM_REG:
            return SingleRegion(memory.region()).pack()
        case Request.SET_VRING_ADDR:
            addr = memory.ring_addr(ring, NUM)
            if given.take() & 1:
                wrong = [addr.desc, addr.used, addr.avail]
                wrong[given.take() % 3] += given.take(4)
                desc, used, avail = wrong
                addr = VringAddr(ring, given.take(), desc, used, avail, given.take(2))
            elif given.take() & 1:
                addr = memory.ring_addr(ring, NUM, logged=True)
            return addr.pack()
        case Request.SET_LOG_BASE:
            return Log((memory.size >> 15, 1 << 16, given.take(4))[given.take() % 3], given.take() % 3 << 12).pack()
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
            return VringFile(ring, nofd=bool(given.take() & 1)).pack()
        case Request.SET_VRING_NUM:
            return VringState(ring, (NUM, 1, 1024, 3, 0, 32768, 65536)[given.take() % 7]).pack()
        case Request.SET_VRING_BASE | Request.SET_VRING_ENABLE | Request.GET_VRING_BASE:
            return VringState(ring, given.take(2)).pack()
        case Request.SEND_RARP:
            return Address(bytes((2, 0, 0, 0, 0, ring))).pack()
        case Request.NET_SET_MTU | Request.SET_STATUS:
            return U64(given.take(2)).pack()
        case _:
            return b""


REQUESTS = (
    Request.SET_MEM_TABLE, Request.SET_VRING_ADDR, Request.SET_VRING_KICK, Request.SET_VRING_CALL,
    Request.SET_VRING_ENABLE, Request.GET_VRING_BASE, Request.SET_VRING_NUM, Request.SET_VRING_BASE,
    Request.ADD_MEM_REG, Request.REM_MEM_REG, Request.SET_VRING_ERR, Request.SET_FEATURES,
    Request.SET_PROTOCOL_FEATURES, Request.SEND_RARP, Request.NET_SET_MTU, Request.SET_STATUS,
    Request.GET_STATUS, Request.RESET_DEVICE, Request.RESET_OWNER, Request.SET_BACKEND_REQ_FD,
    Request.GET_QUEUE_NUM, Request.GET_FEATURES, Request.GET_MAX_MEM_SLOTS, Request.SET_OWNER,
    Request.SET_LOG_BASE, Request.SET_LOG_FD,
)  # fmt: skip


def _message(given: Input, frontend: Frontend, memory: RingMemory) -> None:
    what, how = given.take(), given.take()
    request = REQUESTS[what % len(REQUESTS)] if what < 240 else given.take(4)
    body = bytearray(_payload(given, request, memory))
    fds: list[int] = []
    if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG):
        regions = struct.unpack_from("=I", body)[0] if request == Request.SET_MEM_TABLE else 1
        fds = [os.dup(memory.fd) for _ in range(min(regions, 8))]
    elif request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR) and not body[1] & 1:
        fds = [KINDS[0]()]
    elif request == Request.SET_LOG_BASE:
        fds = [os.dup(memory.fd) if how & 7 == 6 else os.memfd_create("log", os.MFD_CLOEXEC)]
        os.truncate(fds[0], max(memory.size, 1 << 17))
    elif request == Request.SET_LOG_FD:
        fds = [KINDS[0]()]
    elif request == Request.SET_BACKEND_REQ_FD:
        fds = [KINDS[5]()]
    try:
        if how & 7 == 7:  # descriptors of another kind, or number
            for fd in fds:
                os.close(fd)
            fds = []  # closed: they must not be again if there is no room for a new one
            fds += [KINDS[given.take() % len(KINDS)]() for _ in range(given.take() % 10)]
        if how >> 3 & 7 == 7 and body:
            body[given.take() % len(body)] = given.take()
        if how >> 3 & 7 == 6:
            body = body[: given.take() % (len(body) + 1)] if how & 1 else body + given.take_bytes(16)
        frontend.send(request, bytes(body), fds, need_reply=not how >> 6 & 1)
        if how >> 7 and how & 7 != 7 and request == Request.SET_VRING_KICK and fds:
            with contextlib.suppress(OSError):
                os.eventfd_write(fds[0], 1)
    finally:
        for fd in fds:
            os.close(fd)


def play(data: bytes, frontend: Frontend, patience_s: float = PATIENCE_S) -> None:
    """Speaks the session, and returns when the backend has ended it. TimeoutError: it does not."""
    given = Input(data)
    with RingMemory(seal=False) as memory:
        frontend.socket.settimeout(patience_s)
        with contextlib.suppress(DisconnectedError, ConnectionError, ValueError):
            begun = given.take()
            if not begun & 1:
                frontend.negotiate()
                if not begun & 2:
                    frontend.set_memory(memory)
                for ring in range(begun >> 2 & 3):
                    frontend.start_ring(ring % 2, memory)
            for _ in range(MOST_MESSAGES):
                if not given.left:
                    break
                _message(given, frontend, memory)
                if begun & 16:
                    os.ftruncate(memory.fd, 4096 * given.take())
            if begun & 32:
                frontend.send_bytes(given.take_bytes(given.take()))
        with contextlib.suppress(OSError):
            frontend.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + patience_s
        with contextlib.suppress(ConnectionError):
            while frontend.socket.recv(1 << 16):
                if time.monotonic() > deadline:
                    raise TimeoutError("the backend answers for ever")
