"""The bytes of vhost-user: header, payloads, and nothing of their order or meaning.

Every unpack() refuses a wrong size, version or reserved bit, so whoever holds one of these objects holds a well-formed
message. A ProtocolError refuses one request, a FramingError ends the connection: after it the stream makes no sense.

Reference: QEMU docs/interop/vhost-user.rst, "Message Specification"; the numbers are in the machine's byte order.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

from xdpnet.errors import XdpnetError

# Why a message was refused or a connection closed; also the label of the error counter.
Reason = Literal[
    "timeout",
    "size",
    "request",
    "flags",
    "fds",
    "state",
    "features",
    "vring_num",
    "index",
    "ring_addr",
    "vring_base",
    "mem",
    "mem_size",
    "mem_fd",
    "mem_limit",
    "log",
    "event_fd",
    "mtu",
    "rarp",
    "status",
    "unsupported",
    "send_stall",
    "internal",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class ProtocolError(XdpnetError):
    """A request that we refuse; the state is as before it."""

    def __init__(self, reason: Reason, text: str) -> None:
        self.reason: Reason = reason
        super().__init__(text)


class FramingError(ProtocolError):
    """The stream itself is broken: the connection must end."""


class Request(IntEnum):
    """Every message that the specification lets a frontend send."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


REQUESTS = frozenset(map(int, Request))

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
MAX_PAYLOAD = 4096  # ours; far above every payload of the specification
MAX_TABLE_REGIONS = 8  # of SET_MEM_TABLE
SCM_MAX_FD = 253  # what one sendmsg() may bring; include/net/scm.h
MAX_FDS = 64  # ours, with one message; no request takes more than eight


@dataclass(frozen=True, slots=True)
class Header:
    """request, flags, size."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")
    request: int
    flags: int
    size: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """A request's header."""
        header = cls(*cls.LAYOUT.unpack(data))
        if header.flags & VERSION_MASK != VERSION:
            raise FramingError("flags", f"version {header.flags & VERSION_MASK}, expected {VERSION}")
        if header.flags & ~(VERSION_MASK | FLAG_NEED_REPLY):
            raise FramingError("flags", f"flags {header.flags:#x} on a request")
        if header.size > MAX_PAYLOAD:
            raise FramingError("size", f"payload of {header.size} bytes, at most {MAX_PAYLOAD} are possible")
        return header

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.request, self.flags, self.size)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)


HEADER_SIZE = Header.LAYOUT.size


@dataclass(frozen=True, slots=True)
class Message:
    """One request: its header and the payload, as yet unread."""

    header: Header
    payload: bytes

    @property
    def name(self) -> str:
        return request_name(self.header.request)


class Payload(Protocol):
    """What can be put behind a header."""

    def pack(self) -> bytes: ...


def request_name(number: int) -> str:
    """The request's name in the specification, or its bare number."""
    return Request(number).name if number in REQUESTS else f"request {number}"


def reply(request: int, payload: Payload) -> bytes:
    """A whole reply, as it goes onto the socket."""
    body = payload.pack()
    return Header(request, VERSION | FLAG_REPLY, len(body)).pack() + body


def _exactly(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    if len(data) != layout.size:
        raise FramingError("size", f"payload of {len(data)} bytes, expected {layout.size}")
    return layout.unpack(data)


@dataclass(frozen=True, slots=True)
class Nothing:
    """No payload at all."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if data:
            raise FramingError("size", f"payload of {len(data)} bytes, expected none")
        return cls()

    def pack(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class U64:
    """A single 64-bit integer."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=Q")
    value: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_exactly(cls.LAYOUT, data))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.value)


@dataclass(frozen=True, slots=True)
class Address:
    """The u64 of SEND_RARP: a MAC address in its first six bytes; the others say nothing."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=6s2x")
    mac: bytes

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_exactly(cls.LAYOUT, data))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.mac)


@dataclass(frozen=True, slots=True)
class VringState:
    """A vring state description."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    index: int
    num: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_exactly(cls.LAYOUT, data))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.index, self.num)


@dataclass(frozen=True, slots=True)
class VringAddr:
    """A vring address description; addresses are the frontend's own."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")
    FLAG_LOG: ClassVar[int] = 1
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        addr = cls(*_exactly(cls.LAYOUT, data))
        if addr.flags & ~cls.FLAG_LOG:
            raise ProtocolError("ring_addr", f"ring {addr.index}: unknown address flags {addr.flags:#x}")
        return addr

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @property
    def place(self) -> tuple[int, int, int]:
        return self.desc, self.used, self.avail

    @property
    def logged(self) -> bool:
        """What is written into the used ring is to be logged, as if that lay at the guest address `log`."""
        return bool(self.flags & self.FLAG_LOG)


@dataclass(frozen=True, slots=True)
class Log:
    """A log description: where in its file the dirty log lies, in bytes."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQ")
    size: int
    offset: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_exactly(cls.LAYOUT, data))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.size, self.offset)


@dataclass(frozen=True, slots=True)
class VringFile:
    """The u64 of SET_VRING_KICK, CALL and ERR: ring index, and whether a descriptor comes with it."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=Q")
    INDEX_MASK: ClassVar[int] = 0xFF
    FLAG_NOFD: ClassVar[int] = 0x100
    index: int
    nofd: bool

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        (value,) = _exactly(cls.LAYOUT, data)
        if value & ~(cls.INDEX_MASK | cls.FLAG_NOFD):
            raise ProtocolError("index", f"ring index {value:#x} has reserved bits set")
        return cls(value & cls.INDEX_MASK, bool(value & cls.FLAG_NOFD))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.index | (self.FLAG_NOFD if self.nofd else 0))


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A region, as the memory table has it."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQQQ")
    guest_addr: int
    size: int
    user_addr: int
    offset: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.guest_addr, self.size, self.user_addr, self.offset)


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """A memory regions description."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    regions: tuple[MemoryRegion, ...]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) < cls.LAYOUT.size:
            raise FramingError("size", f"memory table of {len(data)} bytes")
        count, _ = cls.LAYOUT.unpack_from(data)
        if not 1 <= count <= MAX_TABLE_REGIONS:
            raise ProtocolError("mem", f"memory table of {count} regions, possible are 1 to {MAX_TABLE_REGIONS}")
        size = cls.LAYOUT.size + count * MemoryRegion.LAYOUT.size
        # Some frontends always send a whole array: of eight places, or of as many as they have (user-mode Linux: two).
        most = cls.LAYOUT.size + MAX_TABLE_REGIONS * MemoryRegion.LAYOUT.size
        if not size <= len(data) <= most or (len(data) - size) % MemoryRegion.LAYOUT.size:
            raise FramingError("size", f"memory table of {count} regions in {len(data)} bytes, expected {size}")
        places = range(cls.LAYOUT.size, size, MemoryRegion.LAYOUT.size)
        return cls(tuple(MemoryRegion(*MemoryRegion.LAYOUT.unpack_from(data, place)) for place in places))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)


@dataclass(frozen=True, slots=True)
class SingleRegion:
    """A single memory region description, of ADD_MEM_REG and REM_MEM_REG."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQQQQ")
    region: MemoryRegion

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        _, *fields = _exactly(cls.LAYOUT, data)
        return cls(MemoryRegion(*fields))

    def pack(self) -> bytes:
        region = self.region
        return self.LAYOUT.pack(0, region.guest_addr, region.size, region.user_addr, region.offset)


def _check_abi() -> None:
    sizes = (
        (Header.LAYOUT, 12),
        (U64.LAYOUT, 8),
        (Address.LAYOUT, 8),
        (VringState.LAYOUT, 8),
        (VringAddr.LAYOUT, 40),
        (Log.LAYOUT, 16),
        (VringFile.LAYOUT, 8),
        (MemoryTable.LAYOUT, 8),
        (MemoryRegion.LAYOUT, 32),
        (SingleRegion.LAYOUT, 40),
    )
    for layout, size in sizes:
        if layout.size != size:
            raise ImportError(f"layout {layout.format} packs to {layout.size} bytes, the specification says {size}")


_check_abi()
