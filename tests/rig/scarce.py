"""A life of a bridge, again and again, each time with another of its requests to the system failing.

python -m tests.rig.scarce INTERFACE [LIMIT]: with native/scarcity.c preloaded, a line for each life: the request that
failed and what came of it; with a limit, as `as=N` (MiB beyond what there is) or `memlock=N` (KiB), one life under it.
A life that leaves something behind, or ends otherwise than well or with an error of the core, ends the program.
"""

import ctypes
import os
import re
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Self

from tests.rig.descriptors import open_files
from tests.rig.driver import QueuePair, ledger
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.rings import MIB, MODERN, GuestMemory, Span
from tests.rig.waiting import eventually, once_free
from xdpnet import core
from xdpnet.errors import SetupError

WIRE = mac(9)
MORE = Span(0x8000_0000, MIB, 0x7F13_0000_0000, 0)
ENOUGH = 1000  # requests that no life makes


class Guest:
    """What the driver has: it is there before the bridge, and outlives it."""

    def __init__(self) -> None:
        self.memory = GuestMemory(prealloc=True)  # whole: it is lent
        self.pair = QueuePair(self.memory, MODERN, num=64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pair.close()
        self.memory.close()


def live(guests: tuple[Guest, Guest], ifname: str, group_fd: int) -> None:
    """All that a daemon asks of the core, in its order. Frames arrive, and every one is accounted for."""
    options = {"workers": 2, "netdev_queues": 1, "frames_per_queue": 256}
    with core.Bridge(zerocopy="on", **options) as bridge:  # type: ignore[arg-type]
        wire = bridge.add_netdev(1)
        wire.set_mac(WIRE, False)
        ports = []
        for number in range(2):
            ports.append(bridge.add_guest(1))
            ports[-1].set_mac(mac(number), number == 0)
        open_queue(wire, ifname)
        wire.set_group_fd(group_fd)
        bridge.start()
        ports[0].set_ips([IPv4Address("10.0.0.1")])
        ports[0].set_ips([])  # what it sends below is no IP
        for port, guest in zip(ports, guests, strict=True):
            port.set_memory(guest.memory.regions())
            port.set_features(MODERN)
            for index, ring in enumerate((guest.pair.rx, guest.pair.tx)):
                port.ring_enable(index, True)
                port.ring_start(index, ring.config())
            port.announce(mac(ports.index(port)))
            guest.pair.fill()
        wire.close_queue(0)
        open_queue(wire, ifname)
        one, two = guests
        one.pair.send(frame(mac(1), mac(0), 600))
        one.pair.send(frame(BROADCAST, mac(0), 600))
        two.pair.send(frame(WIRE, mac(1), 600))
        wanted = [frame(mac(1), mac(0), 600), frame(BROADCAST, mac(0), 600)]
        if not one.pair.wait_sent() or not two.pair.wait_sent():
            raise AssertionError("frames are not taken")
        got: list[bytes] = []
        if not eventually(lambda: arrived(two.pair, got) == wanted):
            raise AssertionError("frames between guests are lost")
        for port in ports:
            port.add_region(core.Region(*region(MORE), guests[0].memory.fd))
            port.remove_region(core.Region(*region(MORE), guests[0].memory.fd))
            port.ring_set_call(0, guests[0].pair.rx.call_fd)
            port.ring_set_err(0, -1)
        wire.xsk_stats(0)
        if not eventually(lambda: balanced(bridge, wire, ports)):
            raise AssertionError("frames are not accounted for")
        for port in ports:
            for index in range(2):
                port.ring_stop(index)
        wire.set_group_fd(-1)
        ports[0].remove()
        bridge.stop()


def arrived(pair: QueuePair, got: list[bytes]) -> list[bytes]:
    """So far, without announcements."""
    got += [packet.frame for packet in pair.packets() if packet.frame[12:14] == b"\x88\xb5"]
    return got


def region(span: Span) -> tuple[int, int, int, int]:
    return span.guest_addr, span.size, span.user_addr, span.offset


def balanced(bridge: core.Bridge, wire: core.Netdev, ports: list[core.Guest]) -> bool:
    into, out = ledger(bridge, dict.fromkeys(ports, 1))
    rx, tx = (wire.queue_stats(0, direction) for direction in (core.RX, core.TX))
    into += rx.packets + rx.copies
    return into == out + tx.packets + sum(rx.drops.values()) + sum(tx.drops.values())


def open_queue(wire: core.Netdev, ifname: str) -> None:
    once_free(lambda: wire.open_queue(0, socket.if_nametoindex(ifname), 1518, "on"))


def left() -> tuple[list[str], list[str]]:
    """Descriptors, and mappings of guests' memory and of sockets."""
    maps = re.findall(r"(?:/memfd:|anon_inode|socket:).*", Path("/proc/self/maps").read_text())
    return sorted(open_files().values()), sorted(maps)


@contextmanager
def nothing_left() -> Iterator[None]:
    before = left()
    yield
    if (after := left()) != before:
        raise AssertionError(f"left behind: {before} became {after}")


def outcome(ifname: str, group_fd: int, limit: str = "") -> str:
    """`well`, or the core's error."""
    with Guest() as one, Guest() as two, nothing_left():
        if limit:
            set_limit(limit)
        try:
            live((one, two), ifname, group_fd)
        except (OSError, MemoryError, SetupError) as error:
            return f"{type(error).__name__}: {error}"
        return "well"


def set_limit(text: str) -> None:
    kind, _, number = text.partition("=")
    if kind == "as":
        (pages,) = (int(word) for word in Path("/proc/self/statm").read_text().split()[:1])
        most = pages * os.sysconf("SC_PAGE_SIZE") + int(number) * MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    else:
        most = int(number) << 10
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))


def main() -> None:
    ifname, limits = sys.argv[1], sys.argv[2:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as group:
        outcome(ifname, group.fileno())  # what is loaded once is loaded now
        if limits:
            print(outcome(ifname, group.fileno(), limits[0]), flush=True)
            return
        scarcity = ctypes.CDLL(None)
        address = int(core.ffi.cast("uintptr_t", core.ffi.addressof(core.lib, "xn_bridge_new")))
        if scarcity.scarcity_watch(ctypes.c_void_p(address)):
            raise AssertionError("the core is not where it should be")
        held = None
        for n in range(1, ENOUGH):
            scarcity.scarcity_arm(n)
            print(n, end=" ", flush=True)
            came = outcome(ifname, group.fileno())
            made = scarcity.scarcity_made()
            scarcity.scarcity_arm(0)
            print(came, flush=True)
            now = scarcity.scarcity_held()
            if now != (held := now if held is None else held):
                raise AssertionError(f"the core holds {now} blocks of memory, {held} before")
            if made < n:
                if came != "well":
                    raise AssertionError("the last life, in which nothing failed, did not end well")
                return
        raise AssertionError("no end of it")


if __name__ == "__main__":
    main()
