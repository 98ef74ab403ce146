"""Follows an interface: it goes, comes, changes its MTU, its queues or its addresses.

            comes              attach           queues come
    gone ----------> down ----------------> up ------------> partial
      ^               ^                     | ^                 |
      |               |  no carrier,        | |   sockets for   |
      |               |  detached           | +-----------------+
      |               +---------------------+---- them, or they go
      +-- goes, from each of them

gone: there is none of its name. down: it is not attached to, or has no carrier; while it is up, attaching is tried
again and again. up: each of its queues has a socket. partial: some have none. It is detached for another MTU, and where
the program was taken off or a receive filter is missing. Events only say when to look; what counts is what is found.
"""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from xdpnet.errors import SetupError
from xdpnet.netdev.fitness import BusyError
from xdpnet.netdev.link import Link, concerns
from xdpnet.netdev.port import PATIENCE_S, RETRY_S, Netdev

log = logging.getLogger(__name__)

RTMGRP_LINK = 1
NETLINK_KOBJECT_UEVENT = 15
UEVENTS = 1  # of the kernel, not those that udev passes on

BACKOFF_S = (0.1, 5.0)  # first and longest pause between attempts to attach again
SETTLE_S = 0.05  # link events come in bursts
PROBE_S = 5.0  # a link that an administrator detached makes no event, nor does a macvlan in another namespace


class Watch:
    """Of one open port, until run() is cancelled."""

    def __init__(self, netdev: Netdev, on_change: Callable[[Netdev], None]) -> None:
        """on_change is called whenever the port's state has changed."""
        self._netdev = netdev
        self._on_change = on_change
        self._name = netdev.name
        self._pause = BACKOFF_S[0]
        self._seen: Link | None = None  # when it was tried last
        self._said = ""  # of an attempt that failed
        self._quiet_until = 0.0  # what we had is not yet released

    async def run(self) -> None:
        """Detach when the interface goes, attach when it is back.

        Renamed it stays the same; one that comes back is known by its name.
        """
        with (
            self._events(socket.NETLINK_ROUTE, RTMGRP_LINK, self._drain),
            self._events(NETLINK_KOBJECT_UEVENT, UEVENTS, self._drain_uevents),
        ):
            while True:
                await self._look()

    @contextmanager
    def _events(self, family: int, group: int, drain: Callable[[socket.socket], None]) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, family) as events:
            events.bind((0, group))
            loop.add_reader(events, drain, events)
            try:
                yield
            finally:
                loop.remove_reader(events)

    def _drain(self, events: socket.socket) -> None:
        self._netdev.wake.set()
        for message in received(events):
            self._netdev.addresses.stacked |= message is None or concerns(message, self._netdev.ifindex)

    def _drain_uevents(self, events: socket.socket) -> None:
        """rtnetlink does not tell of queues."""
        ours = f"/net/{self._netdev.ifname}/queues/".encode()
        for message in received(events):
            if message is None or ours in message:
                self._netdev.wake.set()

    async def _look(self) -> None:
        netdev = self._netdev
        try:
            link = netdev.find()
        except SetupError as error:  # the question failed, which says nothing about the interface
            log.warning("%s", error)
            await asyncio.sleep(BACKOFF_S[1])
            return
        if netdev.attached and (link is None or link.index != netdev.ifindex or not netdev.alive):
            log.warning("%s: %s", self._name, "detached by somebody else" if link else "the interface is gone")
            self._detach()
        elif netdev.attached and link and link.mtu != netdev.mtu:
            log.info("%s: MTU changed from %d to %d", self._name, netdev.mtu, link.mtu)
            self._detach()
            await asyncio.sleep(RETRY_S)
            return  # the answer above still has our own program
        if link:
            await self._follow(link)
        self._seen = link
        state = netdev.state_of(link)
        if state != netdev.state:
            log.info("%s: %s", self._name, state)
            netdev.state = state
            self._on_change(netdev)
        if netdev.attached or not (link and link.up):
            await self._next_event()
        else:  # our own attempts make events too: here time alone counts
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, BACKOFF_S[1])

    def _detach(self) -> None:
        self._netdev.detach()
        self._quiet_until = time.monotonic() + PATIENCE_S

    async def _follow(self, link: Link) -> None:
        """Each step may detach."""
        netdev = self._netdev
        if netdev.attached:
            await netdev.follow_queues(link)
        if netdev.attached:
            await netdev.renew(link)
        if netdev.attached:
            netdev.follow_addresses(link)
        if not netdev.attached and link.up:
            self._attach(link)

    def _attach(self, link: Link) -> None:
        seen = self._seen
        if seen is None or (seen.index, seen.up, seen.mtu) != (link.index, link.up, link.mtu):
            self._pause = BACKOFF_S[0]
        try:
            self._netdev.attach(link)
            self._said = ""
            self._pause = BACKOFF_S[0]
        except (SetupError, OSError) as error:
            ours = isinstance(error, BusyError) and time.monotonic() < self._quiet_until  # not yet released
            if str(error) != self._said and not ours:
                log.warning("%s: not attached: %s", self._name, error)
                self._said = str(error)

    async def _next_event(self) -> None:
        wake = self._netdev.wake
        with suppress(TimeoutError):
            async with asyncio.timeout(PROBE_S):  # wait_for() of Python 3.11 can swallow a cancellation
                await wake.wait()
            await asyncio.sleep(SETTLE_S)
        wake.clear()


def received(events: socket.socket) -> Iterator[bytes | None]:
    """The messages that have come; None stands for those that were lost: all the more reason to look."""
    while True:
        try:
            yield events.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None
