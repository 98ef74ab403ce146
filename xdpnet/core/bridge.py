"""The C core, in Python's terms.

One class, `Bridge`, over the functions of `c/xdpnet.h`, and plain dataclasses for what goes in and comes out; that
header says what each of them means. The core returns negative errno values: here they become OSError that names what
was tried and on what. Only one thread, the control thread, may use a bridge.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Any, Literal

from xdpnet import _core, limits
from xdpnet.counters import Traffic, Work, XdpStatistics
from xdpnet.errors import SetupError

ffi: Any = _core.ffi
lib: Any = _core.lib

RX = 0
TX = 1

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
_ENTRY = struct.Struct("=6sHI8x")  # of struct xn_fdb_entry: MAC, VLAN, port
ANY_VLAN: int = lib.XN_ANY_VLAN  # of an address that was given
COPYBREAK = 256  # below, a loan to the kernel costs as much as the copy that it saves


def _names(enum: str, prefix: str) -> tuple[str, ...]:
    """As c/xdpnet.h has them, in their order and without the number of them, which is last."""
    *names, _ = (name for _, name in sorted(ffi.typeof(f"enum {enum}").elements.items()))
    return tuple(name.removeprefix(prefix).lower() for name in names)


DROP_NAMES = _names("xn_drop", "XN_DROP_")
BROKEN_NAMES = ("", *_names("xn_broken", "XN_BROKEN_")[1:])  # the first is XN_RING_OK


@dataclass(frozen=True, slots=True)
class Region:
    """A region of guest memory: addresses and sizes in bytes; the file descriptor stays the caller's."""

    guest_addr: int
    size: int
    user_addr: int
    offset: int
    fd: int


class Staged:
    """A region's pages, mapped before they are a guest's: whoever fills them keeps nobody waiting (c/staging.h).

    Belongs to one thread at a time. Invariant: unmapped once, by close() or by the table that takes it over.
    """

    def __init__(self, region: Region) -> None:
        """Raises OSError."""
        self.filled = False  # every page is there
        self._pages = ffi.new("struct xn_staged *")
        _check(lib.xn_staged_open(_region(region), self._pages), f"map {region.size} bytes of guest memory")

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
    """What a ring needs to start: entries, the index to start at, the frontend's addresses, eventfds (-1: none)."""

    num: int
    base: int
    desc_addr: int
    avail_addr: int
    used_addr: int
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1


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


# Memory that costs nothing until something is written into it.
_untouched = ffi.new_allocator(should_clear_after_alloc=False)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def _counted(struct: Any) -> dict[str, Any]:
    """All fields of a struct of c/xdpnet.h, by name."""
    return {name: getattr(struct, name) for name, _ in ffi.typeof(struct).item.fields}


def _region(region: Region, staged: Staged | None = None) -> Any:
    return ffi.new("struct xn_region *", _region_fields(region, staged))


def _region_fields(region: Region, staged: Staged | None) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "guest_addr": region.guest_addr,
        "size": region.size,
        "user_addr": region.user_addr,
        "offset": region.offset,
        "fd": region.fd,
    }
    if staged is not None:
        fields |= {"filled": staged.filled, "staged": staged.take()}
    return fields


def _place(word: int) -> Place:
    return Place(word >> 8, word & 0xFF)


def check_calls() -> None:
    """Whether this machine lets the core interrupt guests; SetupError says what it lacks for that."""
    result = lib.xn_check_calls()
    if result == -errno.EAGAIN:
        raise SetupError("no asynchronous I/O is left for interrupts of guests", "raise the sysctl fs.aio-max-nr")
    if result < 0:
        raise SetupError(
            f"no asynchronous I/O for interrupts of guests: {os.strerror(-result)}",
            "use a kernel with CONFIG_AIO, and a sandbox that allows io_setup and io_submit",
        )


class Bridge:
    """Ports joined by the core's workers. Use as a context manager, or call close()."""

    def __init__(
        self,
        workers: int = 1,
        cpus: Sequence[int] = (),
        spin_us: int = limits.SPIN_US,
        ageing_s: int = limits.AGEING_S,
        netdev_queues: int = 0,
        frames_per_queue: int = limits.FRAMES_PER_QUEUE,
        max_macs: int = limits.MACS_PER_PORT,
        zerocopy: ZeroCopy = "off",
        copybreak: int = COPYBREAK,
    ) -> None:
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"workers = {workers}: must be 1..{MAX_WORKERS}")
        config = ffi.new(
            "struct xn_bridge_config *",
            {
                "workers": workers,
                "cpus": [cpus[i % len(cpus)] if cpus else -1 for i in range(MAX_WORKERS)],
                "spin_us": spin_us,
                "ageing_s": ageing_s,
                "netdev_queues": netdev_queues,
                "frames_per_queue": frames_per_queue,
                "max_macs": max_macs,
                "zerocopy": ZEROCOPY[zerocopy],
                "copybreak": copybreak,
            },
        )
        self.workers = workers
        check_calls()
        self.zerocopy = zerocopy
        self._bridge: Any = lib.xn_bridge_new(config)
        if self._bridge == ffi.NULL:
            raise OSError(ffi.errno, f"create bridge: {os.strerror(ffi.errno)}")
        # Kept: what is read often is read by what it holds, not by what it could hold.
        self._broken = ffi.new("struct xn_broken_ring[]", 2 * MAX_PAIRS * MAX_PORTS)
        self._entries_n = MAX_GIVEN + MAX_PORTS * max_macs + MAX_STATIONS
        self._entries = _untouched("struct xn_fdb_entry[]", self._entries_n)

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers."""
        _check(lib.xn_bridge_start(self._bridge), "start workers")

    def stop(self) -> None:
        """Join the workers; idempotent."""
        _check(lib.xn_bridge_stop(self._bridge), "stop workers")

    def close(self) -> None:
        """Stop the workers and release all ports, sockets and memory; idempotent."""
        bridge, self._bridge = self._bridge, ffi.NULL
        lib.xn_bridge_free(bridge)

    @property
    def lends(self) -> bool:
        """Whether interfaces can send guests' frames from where they lie at all."""
        return bool(lib.xn_bridge_lends(self._bridge))

    @property
    def event_fd(self) -> int:
        """Readable when events() has news."""
        return int(lib.xn_bridge_event_fd(self._bridge))

    def events(self) -> int:
        """EVENT_ bits raised since the last call."""
        return int(lib.xn_bridge_events(self._bridge))

    def broken_rings(self) -> list[BrokenRing]:
        """Rings that broke since the last call."""
        n = _check(lib.xn_bridge_broken(self._bridge, self._broken), "read broken rings")
        return [BrokenRing(r.port, r.ring, BROKEN_NAMES[r.broken]) for r in self._broken[0:n]]

    @property
    def parked_ns(self) -> int:
        """How long the workers have stood still for calls of the control thread so far."""
        return int(lib.xn_bridge_parked_ns(self._bridge))

    # ---- ports ----

    def add_guest(self, pairs: int) -> int:
        """Add a guest port with `pairs` queue pairs; its port id."""
        return _check(lib.xn_port_add_guest(self._bridge, pairs), f"add guest port of {pairs} pairs")

    def add_netdev(self, queues: int) -> int:
        """Add a netdev port with `queues` queues, none open; its port id."""
        return _check(lib.xn_port_add_netdev(self._bridge, queues), f"add netdev port of {queues} queues")

    def remove_port(self, port: int) -> None:
        """Stop the port's rings, close its sockets, forget its addresses."""
        _check(lib.xn_port_remove(self._bridge, port), f"remove port {port}")

    def set_mac(self, port: int, mac: bytes, check_source: bool) -> None:
        """Give the port an address of its own; with `check_source` it may send from no other."""
        self.set_macs(port, [mac], check_source)

    def set_macs(self, port: int, macs: Sequence[bytes], check_source: bool) -> None:
        """Give the port these addresses, 1 to 16, in place of those that it had; EEXIST if one is another port's."""
        for mac in macs:
            if len(mac) != 6:
                raise ValueError(f"MAC address of {len(mac)} bytes")
        what = f"set address {', '.join(mac.hex(':') for mac in macs)} of port {port}"
        _check(lib.xn_port_set_macs(self._bridge, port, b"".join(macs), len(macs), check_source), what)

    def guest_stray(self, port: int) -> bytes | None:
        """The source of a frame that was dropped as `spoof` since the last call, if there was one."""
        mac = ffi.new("uint8_t[6]")
        found = _check(lib.xn_guest_stray(self._bridge, port, mac), f"read what port {port} may not send")
        return bytes(mac) if found else None

    def guest_set_ips(self, port: int, ips: Sequence[IPv4Address | IPv6Address]) -> None:
        """The IP addresses that the guest may use as its own; none: any."""
        out = ffi.new("struct xn_ip[]", len(ips))
        for at, ip in zip(out, ips, strict=True):
            at.version = ip.version
            at.ip = ip.packed.ljust(16, b"\0")
        _check(lib.xn_guest_set_ips(self._bridge, port, out, len(ips)), f"set IP addresses of port {port}")

    def queue_stats(self, port: int, queue: int, direction: int) -> Traffic:
        """Counters of one queue; direction RX or TX."""
        out = ffi.new("struct xn_queue_stats *")
        _check(lib.xn_queue_stats(self._bridge, port, queue, direction, out), f"read queue {queue} of port {port}")
        counted = _counted(out)
        return Traffic(**counted | {"drops": dict(zip(DROP_NAMES, counted["drops"], strict=True))})

    def time_advance(self, us: int) -> None:
        """Advance the time that time_hold() holds; when this returns, each worker has taken a turn by the new time."""
        _check(lib.xn_time_advance(self._bridge, us), f"advance time by {us} us")

    def worker_stats(self, worker: int) -> WorkerStats:
        """Counters of one worker."""
        out = ffi.new("struct xn_worker_stats *")
        _check(lib.xn_worker_stats(self._bridge, worker, out), f"read worker {worker}")
        parked = out.at == lib.XN_PARKED
        at = None if parked or out.at == lib.XN_AT_REST else _place(out.at)
        to = None if out.to == lib.XN_AT_REST else _place(out.to)
        return WorkerStats(**_counted(out) | {"at": at, "to": to}, parked=parked)

    # ---- addresses ----

    def _dump(self, stations: int) -> int:
        n = lib.xn_fdb_dump(self._bridge, self._entries, self._entries_n, stations)
        return _check(n, "read forwarding database")

    def fdb_dump(self, stations: int = MAX_STATIONS) -> list[FdbEntry]:
        """The addresses that the bridge knows now, so many stations of the wire last; expired ones are removed."""
        n = self._dump(stations)
        return [FdbEntry(bytes(e.mac), e.vlan, e.port, bool(e.is_static), e.age_s) for e in self._entries[0:n]]

    def addresses_of(self, ports: Container[int]) -> frozenset[bytes]:
        """What these ports were given and these guests have taught, on whatever VLAN; a tenth of the work."""
        return frozenset(mac for mac, _, port in self._of_guests() if port in ports)

    def taught(self) -> frozenset[tuple[int, bytes, int]]:
        """Port, MAC and VLAN of all that guests have taught."""
        return frozenset((port, mac, vlan) for mac, vlan, port in self._of_guests() if vlan != ANY_VLAN)

    def _of_guests(self) -> Iterator[tuple[bytes, int, int]]:
        found = memoryview(ffi.buffer(self._entries))[: self._dump(0) * _ENTRY.size]
        return _ENTRY.iter_unpack(found)

    def fdb_count(self) -> tuple[list[int], list[int]]:
        """How many addresses each port has that were given, and that were learned."""
        given, learned = ffi.new("uint32_t[]", MAX_PORTS), ffi.new("uint32_t[]", MAX_PORTS)
        lib.xn_fdb_count(self._bridge, given, learned)
        return list(given), list(learned)

    def fdb_changes(self) -> int:
        """How often guests have taught an address that was no guest's before."""
        return int(lib.xn_fdb_changes(self._bridge))

    def fdb_steered(self, changes: int) -> None:
        """The interfaces know of these, counted before addresses_of(): what guests send from there may go out now."""
        lib.xn_fdb_steered(self._bridge, changes)

    def fdb_flush(self, port: int) -> None:
        """Forget the addresses that were learned from a port."""
        _check(lib.xn_fdb_flush(self._bridge, port), f"flush addresses of port {port}")

    # ---- guests ----

    def guest_remember(self, port: int, mac: bytes, vlan: int) -> None:
        """What the guest taught an earlier bridge; EPERM if the address is not its to use, ENOSPC beyond its share."""
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes")
        what = f"remember {mac.hex(':')} of port {port}"
        _check(lib.xn_guest_remember(self._bridge, port, mac, vlan), what)

    def guest_stages(self, port: int, region: Region) -> bool:
        """Whether it would be lent, and is best filled before it is mapped."""
        what = f"look at region {region.guest_addr:#x}+{region.size:#x} of port {port}"
        return bool(_check(lib.xn_guest_stages(self._bridge, port, _region(region)), what))

    def guest_set_memory(
        self, port: int, regions: Sequence[Region], staged: Mapping[Region, Staged] = MappingProxyType({})
    ) -> None:
        """Replace the memory table; what is staged is taken over."""
        fields = [_region_fields(region, staged.get(region)) for region in regions]
        table = ffi.new("struct xn_region[]", fields)
        _check(
            lib.xn_guest_set_memory(self._bridge, port, table, len(regions)),
            f"map {len(regions)} memory regions of port {port}",
        )

    def guest_add_region(self, port: int, region: Region, staged: Staged | None = None) -> None:
        """Map one more region; what is staged is taken over."""
        what = f"map region {region.guest_addr:#x}+{region.size:#x} of port {port}"
        _check(lib.xn_guest_add_region(self._bridge, port, _region(region, staged)), what)

    def guest_remove_region(self, port: int, region: Region) -> None:
        """Unmap the region with this guest address, user address and size; rings in it stop."""
        what = f"unmap region {region.guest_addr:#x}+{region.size:#x} of port {port}"
        _check(lib.xn_guest_remove_region(self._bridge, port, _region(region)), what)

    def guest_leave_umem(self, port: int) -> bool:
        """Keep memory whose pages were given up and taken back out of UMEMs; whether there was such news."""
        what = f"keep memory of port {port} out of UMEMs"
        return bool(_check(lib.xn_guest_leave_umem(self._bridge, port), what))

    def guest_set_features(self, port: int, features: int) -> None:
        """Set the negotiated virtio features; EBUSY if that would change the layout of a started ring."""
        _check(lib.xn_guest_set_features(self._bridge, port, features), f"set features {features:#x} of port {port}")

    def guest_announce(self, port: int, mac: bytes) -> None:
        """Send a RARP with this source address, as if the guest had; EPERM if the address is not its to use."""
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes")
        _check(lib.xn_guest_announce(self._bridge, port, mac), f"announce {mac.hex(':')} of port {port}")

    def ring_start(self, port: int, ring: int, config: RingConfig) -> None:
        """Start a ring; EFAULT if it lies outside the memory table."""
        fields = {name: getattr(config, name) for name in RingConfig.__slots__}
        what = f"start ring {ring} of port {port}"
        _check(lib.xn_ring_start(self._bridge, port, ring, ffi.new("struct xn_ring_config *", fields)), what)

    def ring_stop(self, port: int, ring: int) -> int:
        """Stop a ring; where it can go on, as SET_VRING_BASE has it."""
        base = ffi.new("uint32_t *")
        _check(lib.xn_ring_stop(self._bridge, port, ring, base), f"stop ring {ring} of port {port}")
        return int(base[0])

    def ring_enable(self, port: int, ring: int, enabled: bool) -> None:
        """Enable or disable a ring, started or not."""
        _check(lib.xn_ring_enable(self._bridge, port, ring, enabled), f"enable ring {ring} of port {port}")

    def ring_set_call(self, port: int, ring: int, fd: int) -> None:
        """Replace the eventfd that interrupts the guest; -1: none."""
        _check(lib.xn_ring_set_call(self._bridge, port, ring, fd), f"set call fd of ring {ring} of port {port}")

    def ring_set_err(self, port: int, ring: int, fd: int) -> None:
        """Replace the eventfd that tells the frontend of a broken ring; -1: none."""
        _check(lib.xn_ring_set_err(self._bridge, port, ring, fd), f"set err fd of ring {ring} of port {port}")

    def ring_state(self, port: int, ring: int) -> RingState:
        """State and indices of a ring."""
        s = ffi.new("struct xn_ring_state *")
        _check(lib.xn_ring_state(self._bridge, port, ring, s), f"read ring {ring} of port {port}")
        return RingState(
            num=s.num,
            started=bool(s.started),
            enabled=bool(s.enabled),
            broken=BROKEN_NAMES[s.broken],
            packed=bool(s.packed),
            worker=s.worker,
            last_avail=s.last_avail,
            avail_idx=s.avail_idx,
            used_idx=s.used_idx,
            avail_event=s.avail_event,
            used_event=s.used_event,
            waiting=s.waiting,
        )

    # ---- netdevs ----

    def netdev_add_mac(self, port: int, mac: bytes) -> None:
        """An address of the host on the interface; EEXIST if it is another port's own, ENOSPC if there is no room."""
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes")
        _check(lib.xn_netdev_add_mac(self._bridge, port, mac), f"add address {mac.hex(':')} of port {port}")

    def netdev_remove_mac(self, port: int, mac: bytes) -> None:
        """Take it away again; ENOENT if the port has no such."""
        if len(mac) != 6:
            raise ValueError(f"MAC address of {len(mac)} bytes")
        _check(lib.xn_netdev_remove_mac(self._bridge, port, mac), f"remove address {mac.hex(':')} of port {port}")

    def netdev_open_queue(
        self,
        port: int,
        queue: int,
        ifindex: int,
        max_frame: int,
        zerocopy: ZeroCopy = "off",
        copies_at_once: bool = False,
        makes_csum: bool = False,
        joined: bool = False,
        copy: bool = False,
        tells: bool = False,
    ) -> None:
        """Open and bind the AF_XDP socket of a queue; EBUSY for a moment after another socket left it."""
        what = f"bind AF_XDP socket to queue {queue} of interface {ifindex}"
        policy = ZEROCOPY[zerocopy]
        flags = lib.XN_COPIES_AT_ONCE * copies_at_once | lib.XN_MAKES_CSUM * makes_csum | lib.XN_JOINED * joined
        flags |= lib.XN_COPY * copy | lib.XN_TELLS * tells
        _check(lib.xn_netdev_open_queue(self._bridge, port, queue, ifindex, max_frame, policy, flags), what)

    def netdev_prepare(self, port: int, max_frame: int, zerocopy: ZeroCopy, joined: bool = False) -> None:
        """Register the UMEM that the next sockets will have, before they are needed."""
        what = f"register UMEM of port {port}"
        _check(lib.xn_netdev_prepare(self._bridge, port, max_frame, ZEROCOPY[zerocopy], lib.XN_JOINED * joined), what)

    def netdev_is_stale(self, port: int, zerocopy: ZeroCopy) -> bool:
        """Whether the open sockets would have other guest memory if opened again, or the core had to close one."""
        what = f"compare guest memory of port {port}"
        return bool(_check(lib.xn_netdev_is_stale(self._bridge, port, ZEROCOPY[zerocopy]), what))

    def netdev_close_queue(self, port: int, queue: int) -> None:
        """Close the AF_XDP socket of a queue; no-op if it is not open."""
        _check(lib.xn_netdev_close_queue(self._bridge, port, queue), f"close queue {queue} of port {port}")

    def netdev_queue_fd(self, port: int, queue: int) -> int:
        """The AF_XDP socket of a queue; it stays the core's."""
        return _check(lib.xn_netdev_queue_fd(self._bridge, port, queue), f"socket of queue {queue} of port {port}")

    def netdev_set_group_fd(self, port: int, fd: int) -> None:
        """The AF_PACKET socket that group-addressed frames come from; -1: none."""
        _check(lib.xn_netdev_set_group_fd(self._bridge, port, fd), f"set group socket of port {port}")

    def netdev_xsk_stats(self, port: int, queue: int) -> XskStats:
        """XDP_STATISTICS of a queue, summed over the sockets that it has had."""
        s = ffi.new("struct xn_xsk_stats *")
        _check(lib.xn_netdev_xsk_stats(self._bridge, port, queue, s), f"read sockets of queue {queue} of port {port}")
        return XskStats(**_counted(s) | {"open": bool(s.open), "zerocopy": bool(s.zerocopy)})


def time_hold() -> None:
    """Hold the core's time, of all bridges, where it is now. For tests."""
    _check(lib.xn_time_hold(), "hold time")


def time_release() -> None:
    """Let the core's time run again; idempotent."""
    lib.xn_time_release()


def bpf_map_update(map_fd: int, key: bytes, value: bytes) -> None:
    """Set an element of a BPF map; key and value as long as the map has them (per-CPU: rounded to 8, times CPUs)."""
    _check(lib.xn_bpf_map_update(map_fd, key, value), f"update BPF map {map_fd}")


def bpf_map_delete(map_fd: int, key: bytes) -> None:
    """Delete an element of a BPF map."""
    _check(lib.xn_bpf_map_delete(map_fd, key), f"delete from BPF map {map_fd}")


def bpf_map_lookup(map_fd: int, key: bytes, value_size: int) -> bytes:
    """An element of a BPF map, `value_size` bytes (per-CPU maps: of all possible CPUs)."""
    value = ffi.new("uint8_t[]", value_size)
    _check(lib.xn_bpf_map_lookup(map_fd, key, value), f"look up in BPF map {map_fd}")
    return bytes(value)


def bpf_xdp_load_frags(instructions: bytes, terms: bytes) -> int:
    """Load an XDP program, under a license, for frames in several buffers; its fd."""
    loaded = lib.xn_bpf_xdp_load_frags(instructions, len(instructions) // 8, terms)
    return _check(loaded, "load XDP program for frames in several buffers")


def bpf_xdp_link(prog_fd: int, ifindex: int, flags: int) -> int:
    """Attach an XDP program by a bpf_link; the link's fd, upon whose close the program is detached."""
    return _check(lib.xn_bpf_xdp_link(prog_fd, ifindex, flags), f"attach XDP program to interface {ifindex}")


def bpf_link_ifindex(link_fd: int) -> int:
    """The interface a link is attached to; 0 when it is gone."""
    return _check(lib.xn_bpf_link_ifindex(link_fd), f"read BPF link {link_fd}")
