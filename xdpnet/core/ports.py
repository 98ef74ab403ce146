"""Handles of a bridge's ports. Errors name whose port it is."""

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Any, Protocol, Self

from xdpnet.core.binding import BROKEN_NAMES, DROP_NAMES, ZEROCOPY, ZeroCopy, check, ffi, fields_of, lib
from xdpnet.core.records import (
    GuestFaults,
    Offence,
    Region,
    RingConfig,
    RingState,
    Staged,
    XskStats,
    region_fields,
    region_of,
    traffic_of,
)
from xdpnet.counters import Traffic


class Owner(Protocol):
    """The bridge: struct xn_bridge *, NULL once it is closed."""

    @property
    def pointer(self) -> Any: ...


class Port(int):
    """Of any kind. It is a number, too: the one by which the core's reports mean it."""

    KIND = "port"
    name: str  # of whoever has it; may be empty
    _owner: Owner

    def __new__(cls, owner: Owner, number: int, name: str = "") -> Self:
        port = super().__new__(cls, number)
        port._owner, port.name = owner, name
        return port

    @property
    def label(self) -> str:
        """Whose it is, in errors."""
        return f"{self.KIND} {self.name}" if self.name else f"port {int(self)}"

    def _call(self, what: str, function: Any, *arguments: Any) -> int:
        """One of c/xdpnet.h that takes a port; `what` it is to do, for the error."""
        return check(function(self._owner.pointer, self, *arguments), what)

    def remove(self) -> None:
        """Stop the port's rings, close its sockets, forget its addresses."""
        self._call(f"remove {self.label}", lib.xn_port_remove)

    def set_mac(self, mac: bytes, check_source: bool) -> None:
        """Give the port an address of its own; with `check_source` it may send from no other."""
        self.set_macs([mac], check_source)

    def set_macs(self, macs: Sequence[bytes], check_source: bool) -> None:
        """Give the port these addresses, at most 16, in place of those that it had; EEXIST if one is another port's."""
        for mac in macs:
            _require_mac(mac)
        what = f"set address {', '.join(mac.hex(':') for mac in macs)} of {self.label}"
        self._call(what, lib.xn_port_set_macs, b"".join(macs), len(macs), check_source)

    def queue_stats(self, queue: int, direction: int) -> Traffic:
        """Counters of one queue; direction RX or TX."""
        out = ffi.new("struct xn_queue_stats *")
        self._call(f"read queue {queue} of {self.label}", lib.xn_queue_stats, queue, direction, out)
        return traffic_of(out)

    def cycles(self) -> int:
        """TSC cycles that the workers have spent on the port, which is what it pays for in their order of service."""
        spent = ffi.new("uint64_t *")
        self._call(f"read account of {self.label}", lib.xn_port_cycles, spent)
        return int(spent[0])

    def flush(self) -> None:
        """Forget the addresses that were learned from a port."""
        self._call(f"flush addresses of {self.label}", lib.xn_fdb_flush)


class Guest(Port):
    """The port of a vhost-user device."""

    KIND = "guest"

    def stray(self) -> bytes | None:
        """The source of a frame that was dropped as `spoof` since the last call, if there was one."""
        mac = ffi.new("uint8_t[6]")
        found = self._call(f"read what {self.label} may not send", lib.xn_guest_stray, mac)
        return bytes(mac) if found else None

    def offence(self, drop: str) -> Offence | None:
        """The last frame that was dropped as that, "spoof" or "policy"."""
        out = ffi.new("struct xn_offence *")
        what = f"read what {self.label} was not let send"
        if not self._call(what, lib.xn_guest_offence, DROP_NAMES.index(drop), out):
            return None
        raw, version = bytes(out.ip.ip), out.ip.version
        ip = IPv4Address(raw[:4]) if version == 4 else IPv6Address(raw) if version == 6 else None
        return Offence(bytes(out.src), bytes(out.dst), out.type, ip, out.age_ms / 1e3)

    def faults(self) -> GuestFaults:
        """What keeps the guest from its frames; reads nothing of its memory."""
        found = ffi.new("struct xn_guest_faults *")
        self._call(f"read faults of {self.label}", lib.xn_guest_faults, found)
        broken = BROKEN_NAMES[found.broken]
        return GuestFaults(broken, found.broken_ring, found.starved_ring, found.starved_us / 1e6)

    def set_ips(self, ips: Sequence[IPv4Address | IPv6Address]) -> None:
        """The IP addresses that the guest may use as its own; none: any."""
        out = ffi.new("struct xn_ip[]", len(ips))
        for at, ip in zip(out, ips, strict=True):
            at.version = ip.version
            at.ip = ip.packed.ljust(16, b"\0")
        self._call(f"set IP addresses of {self.label}", lib.xn_guest_set_ips, out, len(ips))

    def remember(self, mac: bytes, vlan: int) -> None:
        """What the guest taught an earlier bridge; EPERM if the address is not its to use, ENOSPC beyond its share."""
        _require_mac(mac)
        self._call(f"remember {mac.hex(':')} of {self.label}", lib.xn_guest_remember, mac, vlan)

    def stages(self, region: Region) -> bool:
        """Whether it would be lent, and is best filled before it is mapped."""
        what = f"look at region {region.guest_addr:#x}+{region.size:#x} of {self.label}"
        return bool(self._call(what, lib.xn_guest_stages, region_of(region)))

    def set_memory(self, regions: Sequence[Region], staged: Mapping[Region, Staged] = MappingProxyType({})) -> None:
        """Replace the memory table; what is staged is taken over."""
        fields = [region_fields(region, staged.get(region)) for region in regions]
        table = ffi.new("struct xn_region[]", fields)
        self._call(f"map {len(regions)} memory regions of {self.label}", lib.xn_guest_set_memory, table, len(regions))

    def add_region(self, region: Region, staged: Staged | None = None) -> None:
        """Map one more region; what is staged is taken over."""
        what = f"map region {region.guest_addr:#x}+{region.size:#x} of {self.label}"
        self._call(what, lib.xn_guest_add_region, region_of(region, staged))

    def remove_region(self, region: Region) -> None:
        """Unmap the region with this guest address, user address and size; rings in it stop."""
        what = f"unmap region {region.guest_addr:#x}+{region.size:#x} of {self.label}"
        self._call(what, lib.xn_guest_remove_region, region_of(region))

    def leave_umem(self) -> bool:
        """Keep memory whose pages were given up and taken back out of UMEMs; whether there was such news."""
        return bool(self._call(f"keep memory of {self.label} out of UMEMs", lib.xn_guest_leave_umem))

    def set_features(self, features: int) -> None:
        """Set the negotiated virtio features; EBUSY if that would change the layout of a started ring."""
        self._call(f"set features {features:#x} of {self.label}", lib.xn_guest_set_features, features)

    def set_log(self, fd: int, offset: int = 0, size: int = 0) -> None:
        """Replace the dirty log, so many bytes of a file; -1: none. ENOSPC: memory, or a logged ring, is beyond it."""
        self._call(f"map the dirty log of {self.label}", lib.xn_guest_set_log, fd, offset, size)

    def set_log_fd(self, fd: int) -> None:
        """Replace the eventfd that tells of something in the log; -1: none."""
        self._call(f"set log fd of {self.label}", lib.xn_guest_set_log_fd, fd)

    def announce(self, mac: bytes) -> None:
        """Send a RARP with this source address, as if the guest had; EPERM if the address is not its to use."""
        _require_mac(mac)
        self._call(f"announce {mac.hex(':')} of {self.label}", lib.xn_guest_announce, mac)

    def ring_start(self, ring: int, config: RingConfig) -> None:
        """Start a ring; EFAULT if it lies outside the memory table."""
        fields = {name: getattr(config, name) for name in RingConfig.__slots__}
        what = f"start ring {ring} of {self.label}"
        self._call(what, lib.xn_ring_start, ring, ffi.new("struct xn_ring_config *", fields))

    def ring_stop(self, ring: int) -> int:
        """Stop a ring; where it can go on, as SET_VRING_BASE has it."""
        base = ffi.new("uint32_t *")
        self._call(f"stop ring {ring} of {self.label}", lib.xn_ring_stop, ring, base)
        return int(base[0])

    def ring_enable(self, ring: int, enabled: bool) -> None:
        """Enable or disable a ring, started or not."""
        self._call(f"enable ring {ring} of {self.label}", lib.xn_ring_enable, ring, enabled)

    def ring_set_log(self, ring: int, logs: bool, log_addr: int) -> None:
        """Have a started ring log what is written into it, or no more; ENOSPC if the log has no bit for it."""
        self._call(f"log ring {ring} of {self.label}", lib.xn_ring_set_log, ring, logs, log_addr)

    def ring_set_call(self, ring: int, fd: int) -> None:
        """Replace the eventfd that interrupts the guest; -1: none."""
        self._call(f"set call fd of ring {ring} of {self.label}", lib.xn_ring_set_call, ring, fd)

    def ring_set_err(self, ring: int, fd: int) -> None:
        """Replace the eventfd that tells the frontend of a broken ring; -1: none."""
        self._call(f"set err fd of ring {ring} of {self.label}", lib.xn_ring_set_err, ring, fd)

    def ring_state(self, ring: int) -> RingState:
        """State and indices of a ring."""
        s = ffi.new("struct xn_ring_state *")
        self._call(f"read ring {ring} of {self.label}", lib.xn_ring_state, ring, s)
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


class Netdev(Port):
    """The port of a network interface."""

    KIND = "interface"

    def add_mac(self, mac: bytes) -> None:
        """An address of the host on the interface; EEXIST if it is another port's own, ENOSPC if there is no room."""
        _require_mac(mac)
        self._call(f"add address {mac.hex(':')} of {self.label}", lib.xn_netdev_add_mac, mac)

    def remove_mac(self, mac: bytes) -> None:
        """Take it away again; ENOENT if the port has no such."""
        _require_mac(mac)
        self._call(f"remove address {mac.hex(':')} of {self.label}", lib.xn_netdev_remove_mac, mac)

    def open_queue(
        self,
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
        self._call(what, lib.xn_netdev_open_queue, queue, ifindex, max_frame, policy, flags)

    def prepare(self, max_frame: int, zerocopy: ZeroCopy, joined: bool = False) -> None:
        """Register the UMEM that the next sockets will have, before they are needed."""
        what = f"register UMEM of {self.label}"
        self._call(what, lib.xn_netdev_prepare, max_frame, ZEROCOPY[zerocopy], lib.XN_JOINED * joined)

    @property
    def lends(self) -> bool:
        """Whether its sockets can have guests' memory: not on a port that came when the arena had no room left."""
        return bool(self._call(f"look at {self.label}", lib.xn_netdev_lends))

    def is_stale(self, zerocopy: ZeroCopy) -> bool:
        """Whether the open sockets would have other guest memory if opened again, or the core had to close one."""
        return bool(self._call(f"compare guest memory of {self.label}", lib.xn_netdev_is_stale, ZEROCOPY[zerocopy]))

    def close_queue(self, queue: int) -> None:
        """Close the AF_XDP socket of a queue; no-op if it is not open."""
        self._call(f"close queue {queue} of {self.label}", lib.xn_netdev_close_queue, queue)

    def queue_fd(self, queue: int) -> int:
        """The AF_XDP socket of a queue; it stays the core's."""
        return self._call(f"socket of queue {queue} of {self.label}", lib.xn_netdev_queue_fd, queue)

    def set_group_fd(self, fd: int) -> None:
        """The AF_PACKET socket that group-addressed frames come from; -1: none."""
        self._call(f"set group socket of {self.label}", lib.xn_netdev_set_group_fd, fd)

    def xsk_stats(self, queue: int) -> XskStats:
        """XDP_STATISTICS of a queue, summed over the sockets that it has had."""
        s = ffi.new("struct xn_xsk_stats *")
        self._call(f"read sockets of queue {queue} of {self.label}", lib.xn_netdev_xsk_stats, queue, s)
        return XskStats(**fields_of(s) | {"open": bool(s.open), "zerocopy": bool(s.zerocopy)})


def _require_mac(mac: bytes) -> None:
    if len(mac) != 6:
        raise ValueError(f"MAC address of {len(mac)} bytes")
