"""What goes into the core and comes out of it; c/xdpnet.h says what each field means."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from xdpnet.core.binding import DROP_NAMES, check, ffi, fields_of, lib
from xdpnet.counters import Traffic, Work, XdpStatistics


@dataclass(frozen=True, slots=True)
class Region:
    """A region of guest memory: addresses and sizes in bytes; the file descriptor stays the caller's.

    left_out: it is known, so that what lies there is handed back, and is not mapped; its descriptor is not looked at.
    """

    guest_addr: int
    size: int
    user_addr: int
    offset: int
    fd: int
    left_out: bool = False


class Staged:
    """A region's pages, mapped before they are a guest's: whoever fills them keeps nobody waiting (c/memory/staging.h).

    Belongs to one thread at a time. Invariant: unmapped once, by close() or by the table that takes it over.
    """

    def __init__(self, region: Region) -> None:
        """Raises OSError."""
        self.filled = False  # every page is there
        self._pages = ffi.new("struct xn_staged *")
        check(lib.xn_staged_open(region_of(region), self._pages), f"map {region.size} bytes of guest memory")

    @property
    def length(self) -> int:
        """Bytes; 0 once it is gone."""
        return int(self._pages.length)

    def fill(self, start: int, length: int) -> bool:
        """Whether all of its pages in this part could be had."""
        return not lib.xn_staged_fill(self._pages, start, length)

    def take(self) -> dict[str, int]:
        """For whoever takes it over."""
        taken = {"base": int(self._pages.base), "length": self.length, "huge": int(self._pages.huge)}
        self._pages.base = self._pages.length = 0
        return taken

    def close(self) -> None:
        """Unmaps it; more than once does no harm."""
        if self.length:
            lib.xn_staged_close(self._pages)
            self.take()


@dataclass(frozen=True, slots=True)
class RingConfig:
    """What a ring needs to start: entries, the index to start at, the frontend's addresses, eventfds (-1: none).

    logs: what is written into its used ring goes into the dirty log, as if that lay at the guest address log_addr.
    """

    num: int
    base: int
    desc_addr: int
    avail_addr: int
    used_addr: int
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1
    logs: bool = False
    log_addr: int = 0


@dataclass(frozen=True, slots=True)
class RingState:
    """State of a guest's ring; `broken` is the reason, or an empty string."""

    num: int
    started: bool
    enabled: bool
    broken: str
    packed: bool
    worker: int
    last_avail: int
    avail_idx: int
    used_idx: int
    avail_event: int
    used_event: int
    waiting: int


@dataclass(frozen=True, slots=True)
class BrokenRing:
    """A ring that was latched broken; `reason` is empty if it was started anew meanwhile."""

    port: int
    ring: int
    reason: str


@dataclass(frozen=True, slots=True)
class GuestFaults:
    """What keeps a guest from its frames: a ring latched broken, and one that has had no buffer for them for so long.

    Rings are numbered as vhost-user does; broken is the reason, or an empty string.
    """

    broken: str
    broken_ring: int
    starved_ring: int
    starved_s: float


@dataclass(frozen=True, slots=True)
class Offence:
    """The last frame of a guest that was dropped for what it claims to be; type: its EtherType.

    ip: the address that it speaks for; None: none that the core understands, or looked for.
    """

    source: bytes
    destination: bytes
    type: int
    ip: IPv4Address | IPv6Address | None
    age_s: float


@dataclass(frozen=True, slots=True)
class XskStats(XdpStatistics):
    """And where the frames of the open socket are."""

    frames_free: int
    frames_fill: int
    frames_tx: int
    in_flight: int
    umem: int
    open: bool
    zerocopy: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A port, and a ring of a guest's or a queue of an interface's; its group socket is behind the queues."""

    port: int
    queue: int


@dataclass(frozen=True, slots=True)
class WorkerStats(Work):
    """And where it is (None: asleep, or parked) and delivers to; `cpu` is -1 when it is not pinned.

    parked: it stands still for the control thread, or does not run. Asleep it ends a turn ten times a second.
    """

    cpu: int
    tid: int
    at: Place | None
    to: Place | None
    parked: bool


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """An address the bridge knows; `vlan` ANY_VLAN (static entries) stands for every VLAN."""

    mac: bytes
    vlan: int
    port: int
    is_static: bool
    age_s: int


def region_of(region: Region, staged: Staged | None = None) -> Any:
    return ffi.new("struct xn_region *", region_fields(region, staged))


def region_fields(region: Region, staged: Staged | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "guest_addr": region.guest_addr,
        "size": region.size,
        "user_addr": region.user_addr,
        "offset": region.offset,
        "fd": region.fd,
        "left_out": region.left_out,
    }
    if staged is not None:
        fields |= {"filled": staged.filled, "staged": staged.take()}
    return fields


def place_of(word: int) -> Place:
    return Place(word >> 8, word & 0xFF)


def traffic_of(out: Any) -> Traffic:
    """Of struct xn_queue_stats."""
    counted = fields_of(out)
    return Traffic(**counted | {"drops": dict(zip(DROP_NAMES, counted["drops"], strict=True))})
