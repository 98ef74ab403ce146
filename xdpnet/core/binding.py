"""What c/xdpnet.h says, as Python has it: its limits, enumerations and names, and errors as OSError."""

import os
from functools import cache
from typing import Any, Literal

from xdpnet import _core

ffi: Any = _core.ffi
lib: Any = _core.lib

RX: int = lib.XN_RX
TX: int = lib.XN_TX

MAX_PORTS: int = lib.XN_MAX_PORTS
MAX_PAIRS: int = lib.XN_MAX_PAIRS
MAX_NETDEV_QUEUES: int = lib.XN_MAX_NETDEV_QUEUES
MAX_WORKERS: int = lib.XN_MAX_WORKERS
MAX_REGIONS: int = lib.XN_MAX_REGIONS
MAX_IPS: int = lib.XN_MAX_IPS
MAX_OWN_MACS: int = lib.XN_MAX_OWN_MACS
MAX_MACS: int = lib.XN_MAX_MACS
MAX_GIVEN: int = lib.XN_MAX_GIVEN
MAX_STATIONS: int = lib.XN_MAX_STATIONS
MAX_RING: int = lib.XN_MAX_RING
MIN_FRAMES: int = lib.XN_MIN_FRAMES
MAX_FRAMES: int = lib.XN_MAX_FRAMES
FRAME_SIZE: int = lib.XN_FRAME_SIZE
MAX_PLAIN_FRAME: int = lib.XN_MAX_PLAIN_FRAME
MAX_MTU: int = lib.XN_MAX_MTU

EVENT_FDB: int = lib.XN_EVENT_FDB
EVENT_BROKEN: int = lib.XN_EVENT_BROKEN
EVENT_MEMORY: int = lib.XN_EVENT_MEMORY
EVENT_SOCKET: int = lib.XN_EVENT_SOCKET
EVENT_UMEM: int = lib.XN_EVENT_UMEM

ZeroCopy = Literal["off", "auto", "on"]
ZEROCOPY: dict[ZeroCopy, int] = {
    "off": lib.XN_ZEROCOPY_OFF,
    "auto": lib.XN_ZEROCOPY_AUTO,
    "on": lib.XN_ZEROCOPY_ON,
}
ANY_VLAN: int = lib.XN_ANY_VLAN  # of an address that was given
COPYBREAK = 256  # below, a loan to the kernel costs as much as the copy that it saves


def _names(enum: str, prefix: str) -> tuple[str, ...]:
    """As c/xdpnet.h has them, in their order and without the number of them, which is last."""
    *names, _ = (name for _, name in sorted(ffi.typeof(f"enum {enum}").elements.items()))
    return tuple(name.removeprefix(prefix).lower() for name in names)


DROP_NAMES = _names("xn_drop", "XN_DROP_")
BROKEN_NAMES = ("", *_names("xn_broken", "XN_BROKEN_")[1:])  # the first is XN_RING_OK


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def fields_of(struct: Any) -> dict[str, Any]:
    """All fields of a struct of c/xdpnet.h, by name."""
    return {name: getattr(struct, name) for name in _fields(ffi.typeof(struct))}


@cache
def _fields(pointer: Any) -> tuple[str, ...]:
    return tuple(name for name, _ in pointer.item.fields)
