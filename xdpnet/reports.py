"""What the core reports through its event descriptor, and what is done about it.

    FDB      a guest's address came or went: steer these addresses to us, and these only
    BROKEN   a ring was latched broken: say so, once for each time and not too often
    MEMORY   a guest's memory was taken away under us: end that connection, for its rings cannot go on
    SOCKET   a socket of an interface failed: have its watch look at it now
    UMEM     guests' memory came or went, or a socket is stuck with some: have the interfaces see if they have all of it

Reference: c/xdpnet.h, enum xn_event.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from xdpnet import core
from xdpnet.ration import RateLimit

SETTLE_S = 0.01  # a flood of new addresses costs a hundred updates a second, not a million
LOG_PAUSE_S = 5.0  # between two lines about the same ring

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
        guests: Mapping[int, tuple[str, int]],
        netdevs: Mapping[str, Steering],
        end_connection: Callable[[int], None],
    ) -> None:
        """guests: port -> name and number of queue pairs."""
        self._bridge = bridge
        self._guests = guests
        self._netdevs = netdevs
        self._end_connection = end_connection
        self._loop = asyncio.get_running_loop()
        self._limit = RateLimit(LOG_PAUSE_S)
        self._breaks: dict[tuple[int, int], int] = {}
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
            for netdev in self._netdevs.values():
                netdev.memory_changed()

    # ---- addresses ----

    def _addresses_changed(self) -> None:
        """At once when it was quiet, for the answer to a guest's first frame is on its way; else after SETTLE_S."""
        if self._settling:
            self._changed_again = True
            return
        self.sync_addresses()
        self._changed_again = False
        self._settling = self._loop.call_later(SETTLE_S, self._settled)

    def _settled(self) -> None:
        self._settling = None
        if self._changed_again:
            self._addresses_changed()

    def sync_addresses(self) -> None:
        """Every interface steers the guests' addresses, static and learned, and forgets those that aged."""
        if not self._netdevs:
            return
        macs = frozenset(
            entry.mac for entry in self._bridge.fdb_dump() if entry.port in self._guests and not entry.mac[0] & 1
        )
        for name, netdev in self._netdevs.items():
            try:
                netdev.sync_macs(macs)
            except OSError as error:
                suffix = self._limit.allow((name, "macs"))
                if suffix is not None:
                    log.warning("interface %s: steer %d addresses: %s%s", name, len(macs), error, suffix)

    # ---- broken rings ----

    def _rings_broke(self) -> None:
        for port, (name, pairs) in self._guests.items():
            lost_memory = False
            for ring in range(2 * pairs):
                pair, direction = divmod(ring, 2)
                breaks = self._bridge.queue_stats(port, pair, direction).breaks
                if breaks == self._breaks.get((port, ring), 0):
                    continue
                self._breaks[port, ring] = breaks
                reason = self._bridge.ring_state(port, ring).broken
                lost_memory |= reason == "memory"
                self._say_broken(name, pair, direction, reason)
            if lost_memory:
                suffix = self._limit.allow((name, "memory"))
                if suffix is not None:
                    log.warning("guest %s: its memory was taken away; ending the connection%s", name, suffix)
                self._end_connection(port)

    def _say_broken(self, name: str, pair: int, direction: int, reason: str) -> None:
        suffix = self._limit.allow((name, pair, direction))
        if suffix is not None:
            way = "rx" if direction == core.RX else "tx"
            what = f"broke: {reason}" if reason else "broke and was reset"
            log.warning("guest %s: %s ring %d %s; a reset of its driver revives it%s", name, way, pair, what, suffix)
