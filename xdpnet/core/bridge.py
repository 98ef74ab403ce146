"""The bridge of the C core: ports joined by its workers.

The core returns negative errno values: they become OSError that names what was tried and on what. Only one thread, the
control thread, may use a bridge.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Container, Iterator, Sequence
from typing import Any

from xdpnet import limits
from xdpnet.core.binding import (
    ANY_VLAN,
    BROKEN_NAMES,
    COPYBREAK,
    MAX_GIVEN,
    MAX_PAIRS,
    MAX_PORTS,
    MAX_STATIONS,
    MAX_WORKERS,
    ZEROCOPY,
    ZeroCopy,
    check,
    ffi,
    fields_of,
    lib,
)
from xdpnet.core.ports import Guest, Netdev
from xdpnet.core.records import BrokenRing, FdbEntry, WorkerStats, place_of, traffic_of
from xdpnet.counters import Traffic
from xdpnet.errors import SetupError

_ENTRY = struct.Struct("=6sHI8x")  # of struct xn_fdb_entry: MAC, VLAN, port
# Memory that costs nothing until something is written into it.
_untouched = ffi.new_allocator(should_clear_after_alloc=False)


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
        self.pointer: Any = lib.xn_bridge_new(config)  # NULL once it is closed
        if self.pointer == ffi.NULL:
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
        check(lib.xn_bridge_start(self.pointer), "start workers")

    def stop(self) -> None:
        """Join the workers; idempotent."""
        check(lib.xn_bridge_stop(self.pointer), "stop workers")

    def close(self) -> None:
        """Stop the workers and release all ports, sockets and memory; idempotent."""
        bridge, self.pointer = self.pointer, ffi.NULL
        lib.xn_bridge_free(bridge)

    def tune(self, spin_us: int, ageing_s: int) -> None:
        """Two values of __init__() that may change while the workers run."""
        check(lib.xn_bridge_tune(self.pointer, spin_us, ageing_s), "tune bridge")

    def gone(self) -> tuple[Traffic, Traffic]:
        """What was counted on ports that were removed: sums of where frames came into the bridge, and left it."""
        return self._gone(lib.XN_IN), self._gone(lib.XN_OUT)

    def _gone(self, way: int) -> Traffic:
        out = ffi.new("struct xn_queue_stats *")
        lib.xn_bridge_gone(self.pointer, way, out)
        return traffic_of(out)

    @property
    def lends(self) -> bool:
        """Whether interfaces can send guests' frames from where they lie at all."""
        return bool(lib.xn_bridge_lends(self.pointer))

    @property
    def event_fd(self) -> int:
        """Readable when events() has news."""
        return int(lib.xn_bridge_event_fd(self.pointer))

    def events(self) -> int:
        """EVENT_ bits raised since the last call."""
        return int(lib.xn_bridge_events(self.pointer))

    def broken_rings(self) -> list[BrokenRing]:
        """Rings that broke since the last call."""
        n = check(lib.xn_bridge_broken(self.pointer, self._broken), "read broken rings")
        return [BrokenRing(r.port, r.ring, BROKEN_NAMES[r.broken]) for r in self._broken[0:n]]

    @property
    def parked_ns(self) -> int:
        """How long the workers have stood still for calls of the control thread so far."""
        return int(lib.xn_bridge_parked_ns(self.pointer))

    # ---- ports ----

    def add_guest(self, pairs: int, name: str = "") -> Guest:
        """Add a guest port with `pairs` queue pairs."""
        number = check(lib.xn_port_add_guest(self.pointer, pairs), f"add guest port of {pairs} pairs")
        return Guest(self, number, name)

    def add_netdev(self, queues: int, name: str = "") -> Netdev:
        """Add a netdev port with `queues` queues, none open."""
        number = check(lib.xn_port_add_netdev(self.pointer, queues), f"add netdev port of {queues} queues")
        return Netdev(self, number, name)

    def time_advance(self, us: int) -> None:
        """Advance the time that time_hold() holds; when this returns, each worker has taken a turn by the new time."""
        check(lib.xn_time_advance(self.pointer, us), f"advance time by {us} us")

    def worker_stats(self, worker: int) -> WorkerStats:
        """Counters of one worker."""
        out = ffi.new("struct xn_worker_stats *")
        check(lib.xn_worker_stats(self.pointer, worker, out), f"read worker {worker}")
        parked = out.at == lib.XN_PARKED
        at = None if parked or out.at == lib.XN_AT_REST else place_of(out.at)
        to = None if out.to == lib.XN_AT_REST else place_of(out.to)
        return WorkerStats(**fields_of(out) | {"at": at, "to": to}, parked=parked)

    # ---- addresses ----

    def _dump(self, stations: int) -> int:
        n = lib.xn_fdb_dump(self.pointer, self._entries, self._entries_n, stations)
        return check(n, "read forwarding database")

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
        lib.xn_fdb_count(self.pointer, given, learned)
        return list(given), list(learned)

    def fdb_changes(self) -> int:
        """How often guests have taught an address that was no guest's before."""
        return int(lib.xn_fdb_changes(self.pointer))

    def fdb_steered(self, changes: int) -> None:
        """The interfaces know of these, counted before addresses_of(): what guests send from there may go out now."""
        lib.xn_fdb_steered(self.pointer, changes)


# ---- netdevs ----


def time_hold() -> None:
    """Hold the core's time, of all bridges, where it is now. For tests."""
    check(lib.xn_time_hold(), "hold time")


def time_release() -> None:
    """Let the core's time run again; idempotent."""
    lib.xn_time_release()
