"""What the core reports through its event descriptor, and what is done about it.

    FDB      a guest's address came or went: steer these addresses to us, and these only
    BROKEN   rings were latched broken: say so, not too often for each guest
    MEMORY   a guest's memory was taken away under us: end that connection, for its rings cannot go on
    SOCKET   a socket of an interface failed: have its watch look at it now
    UMEM     guests' memory came, went or moved, or a socket is stuck with some: a guest whose memory moved is copied,
             and the interfaces see if they have all of the others'

Reference: c/xdpnet.h, enum xn_event.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol

from xdpnet import core
from xdpnet.ration import RateLimit

SETTLE_S = 0.01  # a flood of new addresses costs a hundred updates a second, not a million ...
SHARE = 0.05  # ... and this part of the thread's time, however many addresses there are
LOG_PAUSE_S = 5.0  # between two lines about the rings of a guest
STRAY_PAUSE_S = 3600.0  # and between two that say what one is to do whose frames are dropped as `spoof`

log = logging.getLogger(__name__)


class Steering(Protocol):
    """What is needed of an interface."""

    def sync_macs(self, macs: frozenset[bytes]) -> None: ...
    def poke(self) -> None: ...
    def memory_changed(self) -> None: ...


class Reports:
    """Reads the core's events on the control thread's loop."""

    def __init__(
        self,
        bridge: core.Bridge,
        guests: Mapping[core.Guest, str],
        netdevs: Mapping[str, Steering],
        end_connection: Callable[[int], None],
        checked: Container[int] = (),
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        """guests: with their names; checked: those whose source addresses are; spent: seconds of processor time.

        What is in these is looked up as it is needed: ports come and go.
        """
        self._bridge = bridge
        self._guests = guests
        self._netdevs = netdevs
        self._end_connection = end_connection
        self._loop = asyncio.get_running_loop()
        self._spent = spent
        self._checked = checked
        self._limit = RateLimit(LOG_PAUSE_S)
        self._strays = RateLimit(STRAY_PAUSE_S)
        self._settling: asyncio.TimerHandle | None = None
        self._changed_again = False
        self._loop.add_reader(bridge.event_fd, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._bridge.event_fd)
        if self._settling:
            self._settling.cancel()

    def _read(self) -> None:
        events = self._bridge.events()
        if events & core.EVENT_FDB:
            self._addresses_changed()
        if events & (core.EVENT_BROKEN | core.EVENT_MEMORY):
            self._rings_broke()
        if events & core.EVENT_SOCKET:
            for netdev in self._netdevs.values():
                netdev.poke()
        if events & core.EVENT_UMEM:
            self._memory_moved()
            for netdev in self._netdevs.values():
                netdev.memory_changed()

    # ---- addresses ----

    def _addresses_changed(self) -> None:
        """At once when it was quiet, for a guest's first frame waits for it; else after a while."""
        if self._settling:
            self._changed_again = True
            return
        start = self._spent()
        self.sync_addresses()
        self._changed_again = False
        pause = max(SETTLE_S, (self._spent() - start) / SHARE)
        self._settling = self._loop.call_later(pause, self._settled)

    def _settled(self) -> None:
        self._settling = None
        if self._changed_again:
            self._addresses_changed()

    def sync_addresses(self) -> None:
        """Every interface steers the guests' addresses, static and learned, and forgets those that aged."""
        if not self._netdevs:
            return
        changes = self._bridge.fdb_changes()
        macs = self._bridge.addresses_of(self._guests)
        for name, netdev in self._netdevs.items():
            try:
                netdev.sync_macs(macs)
            except OSError as error:
                suffix = self._limit.allow((name, "macs"))
                if suffix is not None:
                    log.warning("interface %s: steer %d addresses: %s%s", name, len(macs), error, suffix)
        self._bridge.fdb_steered(changes)

    def say_strays(self) -> None:
        """The remedy for frames that were dropped for their source address; asked for now and then."""
        for port, name in self._guests.items():
            mac = port.stray()
            suffix = self._strays.allow(name) if mac is not None else None
            if mac is not None and suffix is not None:
                log.warning("guest %s: %s%s", name, self._stray(port, mac), suffix)

    def _stray(self, port: int, mac: bytes) -> str:
        what = f"frames from {mac.hex(':')} are dropped (spoof): "
        if mac[0] & 1 or not any(mac):
            return what + "that is no station's address; see to its driver"
        if port in self._checked:
            return what + (
                "it is not its mac; if it is a bridge for other stations, name them too (mac=MAC+MAC) "
                "or set check_source=false"
            )
        return what + "that is another guest's mac, or the host's address on an interface; give it one of its own"

    # ---- guests' memory ----

    def _memory_moved(self) -> None:
        for port, name in self._guests.items():
            try:
                moved = port.leave_umem()
            except OSError as error:  # copied it is all the same
                log.debug("guest %s: %s", name, error)
                continue
            suffix = self._limit.allow((name, "moved")) if moved else None
            if suffix is not None:
                log.warning(
                    "guest %s: some of its memory was given up and taken back (a balloon, free page reporting, "
                    "virtio-mem), which zero copy cannot follow: its frames are copied from now on%s", name, suffix,
                )  # fmt: skip

    # ---- broken rings ----

    def _rings_broke(self) -> None:
        broken: dict[int, list[core.BrokenRing]] = {}
        for ring in self._bridge.broken_rings():
            broken.setdefault(ring.port, []).append(ring)
        names: dict[int, str] = dict(self._guests.items())
        for port, rings in broken.items():
            name = names[port]
            self._say_broken(name, rings)
            if any(ring.reason == "memory" for ring in rings):
                suffix = self._limit.allow((name, "memory"))
                if suffix is not None:
                    log.warning("guest %s: its memory was taken away; ending the connection%s", name, suffix)
                self._end_connection(port)

    def _say_broken(self, name: str, rings: Sequence[core.BrokenRing]) -> None:
        suffix = self._limit.allow((name, "rings"))
        if suffix is None:
            return
        pair, direction = divmod(rings[0].ring, 2)
        way = "rx" if direction == core.RX else "tx"
        what = f"broke: {rings[0].reason}" if rings[0].reason else "broke and was reset"
        others = f", and {len(rings) - 1} of its other rings" if len(rings) > 1 else ""
        log.warning(
            "guest %s: %s ring %d %s%s; a reset of its driver revives it%s", name, way, pair, what, others, suffix
        )
