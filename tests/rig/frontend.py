"""A scripted vhost-user frontend: speaks the protocol over a real socket, rightly or, if told so, wrongly.

Blocking, with a time limit on every answer, so a test reads as a dialogue. RingMemory is a guest's RAM with room for
rings at known places. Nothing here checks what the backend says; that is the tests' affair.
"""

import array
import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tests.rig.rings import GuestMemory, Span
from tests.rig.waiting import PATIENCE_S
from xdpnet.virtq.features import ProtocolFeature, VirtioFeature, mask
from xdpnet.virtq.message import (
    FLAG_NEED_REPLY,
    HEADER_SIZE,
    U64,
    VERSION,
    Header,
    Log,
    MemoryRegion,
    MemoryTable,
    Nothing,
    Payload,
    Request,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
)

MODERN = mask(VirtioFeature.VIRTIO_F_VERSION_1, VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES)
ACK_AND_ALL = mask(
    ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_NET_MTU,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS,
)


class DisconnectedError(ConnectionError):
    """The backend closed the connection."""


class RingMemory(GuestMemory):
    """Guest RAM in one region, on a sealed memfd; ring number i lies at ring_at(i), RING_SPACE bytes of it."""

    RING_SPACE = 0x10000

    def __init__(
        self,
        size: int = 1 << 21,
        guest_addr: int = 0,
        user_addr: int = 0x7F00_0000_0000,
        seal: bool = True,
        prealloc: bool = False,
    ) -> None:
        super().__init__((Span(guest_addr, size, user_addr, 0),), prealloc=prealloc)
        self.guest_addr = guest_addr
        self.user_addr = user_addr
        if seal:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)

    def region(self) -> MemoryRegion:
        return MemoryRegion(self.guest_addr, self.size, self.user_addr, 0)

    def ring_at(self, index: int) -> int:
        """The ring's place in the frontend's addresses."""
        return self.user_addr + index * self.RING_SPACE

    def ring_addr(self, index: int, num: int, logged: bool = False) -> VringAddr:
        """A split ring of this size in the ring's place; logged where it lies."""
        desc = self.ring_at(index)
        avail = desc + 16 * num
        used = (avail + 6 + 2 * num + 3) & ~3
        log = used - self.user_addr + self.guest_addr if logged else 0
        return VringAddr(index=index, flags=int(logged), desc=desc, used=used, avail=avail, log=log)

    def set_indices(self, index: int, num: int, value: int) -> None:
        """The ring as a driver and a device leave it that have nothing in flight: available and used stand at value."""
        addr = self.ring_addr(index, num)
        for part in (addr.avail, addr.used):
            struct.pack_into("<H", self.map, part - self.user_addr + 2, value)


class Frontend:
    """One connection to a backend. Owns its socket and the eventfds that it made."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        self.socket = sock
        self.events: list[int] = []

    @classmethod
    def connect(cls, path: str, patience_s: float = PATIENCE_S) -> Self:
        """To a listening backend, waited for."""
        deadline = time.monotonic() + patience_s
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
            except OSError:
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return cls(sock)

    @classmethod
    def accept(cls, path: str) -> Self:
        """As the listening side: waits until a backend in client mode comes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(PATIENCE_S)
            listener.bind(path)
            try:
                listener.listen(1)
                sock, _ = listener.accept()
            finally:
                os.unlink(path)
        return cls(sock)

    def close(self) -> None:
        self.socket.close()
        while self.events:
            os.close(self.events.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- bytes ----

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Anything at all, in one sendmsg."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], ancillary)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except ConnectionError as error:
            raise DisconnectedError from error

    def send(
        self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = (), need_reply: bool = False
    ) -> None:
        body = payload if isinstance(payload, bytes) else payload.pack()
        flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0)
        self.send_bytes(Header(request, flags, len(body)).pack() + body, fds)

    def receive(self) -> tuple[int, bytes]:
        """The next reply: request and payload."""
        request, flags, size = struct.unpack("=III", self._exactly(HEADER_SIZE))
        if flags != VERSION | 4:
            raise ValueError(f"a reply with flags {flags:#x}")
        return request, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(size - len(data))
            except ConnectionError as error:
                raise DisconnectedError from error
            if not piece:
                raise DisconnectedError
            data += piece
        return data

    def is_disconnected(self) -> bool:
        """True if the backend closes the connection without another word; waits for it."""
        with contextlib.suppress(ConnectionError):
            return self.socket.recv(1) == b""
        return True

    # ---- dialogues ----

    def ask(self, request: int, payload: Payload | bytes = b"") -> bytes:
        """A request with a reply of its own."""
        self.send(request, payload)
        answered, body = self.receive()
        if answered != request:
            raise ValueError(f"asked {request}, was answered {answered}")
        return body

    def ask_u64(self, request: int) -> int:
        return U64.unpack(self.ask(request)).value

    def tell(self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()) -> int:
        """A request with need_reply: the backend's verdict, zero for success."""
        self.send(request, payload, fds, need_reply=True)
        answered, body = self.receive()
        if answered != request:
            raise ValueError(f"told {request}, was answered {answered}")
        return U64.unpack(body).value

    def negotiate(self, bits: int = MODERN, protocol: int = ACK_AND_ALL) -> None:
        """Features as QEMU does it: protocol features first, the driver's later."""
        self.send(Request.SET_OWNER)
        self.ask_u64(Request.GET_FEATURES)
        self.ask_u64(Request.GET_PROTOCOL_FEATURES)
        self.send(Request.SET_PROTOCOL_FEATURES, U64(protocol))
        self.send(Request.SET_FEATURES, U64(bits))

    def set_memory(self, *memories: RingMemory) -> int:
        table = MemoryTable(tuple(memory.region() for memory in memories))
        return self.tell(Request.SET_MEM_TABLE, table, [memory.fd for memory in memories])

    def add_memory(self, memory: RingMemory) -> int:
        return self.tell(Request.ADD_MEM_REG, SingleRegion(memory.region()), [memory.fd])

    def remove_memory(self, memory: RingMemory) -> int:
        return self.tell(Request.REM_MEM_REG, SingleRegion(memory.region()))

    def set_log(self, fd: int, size: int, offset: int = 0) -> int:
        """With a verdict: it is answered in any case."""
        return self.tell(Request.SET_LOG_BASE, Log(size, offset), [fd])

    def event(self) -> int:
        """A new eventfd, closed with the frontend."""
        self.events.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.events[-1]

    def set_event(self, request: int, index: int, fd: int | None) -> int:
        return self.tell(request, VringFile(index, nofd=fd is None), [] if fd is None else [fd])

    def start_ring(self, index: int, memory: RingMemory, num: int = 256, base: int = 0) -> tuple[int, int]:
        """Starts and enables a ring, empty at this index; its kick and call eventfds."""
        memory.set_indices(index, num, base)
        kick, call = self.event(), self.event()
        steps = (
            self.tell(Request.SET_VRING_NUM, VringState(index, num)),
            self.tell(Request.SET_VRING_BASE, VringState(index, base)),
            self.tell(Request.SET_VRING_ADDR, memory.ring_addr(index, num)),
            self.set_event(Request.SET_VRING_CALL, index, call),
            self.set_event(Request.SET_VRING_KICK, index, kick),
            self.tell(Request.SET_VRING_ENABLE, VringState(index, 1)),
        )
        if any(steps):
            raise ValueError(f"ring {index} did not start: {steps}")
        return kick, call

    def stop_ring(self, index: int) -> int:
        """Stops a ring; the index at which to go on."""
        return VringState.unpack(self.ask(Request.GET_VRING_BASE, VringState(index, 0))).num


NOTHING = Nothing()
