"""One daemon: startup and shutdown in order, and nothing else.

Owns every part; each is released in the reverse order of its start, by one exit stack, also when a later step fails.
Invariant: no worker runs once a guest's memory is unmapped or an interface's sockets are closed under it; whatever
happens after SIGTERM, the process is gone within END_S.
"""

import asyncio
import faulthandler
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from xdpnet import cgroup, core, descriptors
from xdpnet.addresses import AddressBook
from xdpnet.config import Config, GuestConfig, NetdevConfig
from xdpnet.control import systemd
from xdpnet.control.orders import Orders
from xdpnet.control.server import ControlServer, directory_of
from xdpnet.control.watchdog import Watchdog
from xdpnet.errors import SetupError, XdpnetError
from xdpnet.metrics import take
from xdpnet.metrics.snapshot import Guest, Snapshot
from xdpnet.mtu import MtuWatch
from xdpnet.ports import GuestPort, NetdevPort, access_of, spelt
from xdpnet.reports import Reports
from xdpnet.stalls import StallWatch
from xdpnet.virtq import features

if TYPE_CHECKING:
    from xdpnet.netdev.port import Netdev

END_S = 2.8  # promised are three seconds; an orderly end takes some tens of milliseconds
TICK_S = 2.0  # ageing of addresses has seconds as its unit

log = logging.getLogger(__name__)


async def run(config: Config, reread: Callable[[], Config]) -> None:
    """Serves until it is told to end (orders.py). A new configuration that cannot be served is no reason to end."""
    orders = Orders(reread, vet)
    before: Config | None = None
    with orders.by_signals():
        while True:
            orders.serve(config)
            daemon = Daemon(config, orders)
            try:
                await daemon.run()
            except (XdpnetError, OSError) as error:
                if before is None or daemon.was_ready:
                    raise
                log.error("%s", error)
                log.error("going on with the configuration as it was")
                orders.following = orders.following or before
            if orders.following is None or orders.ending:
                return
            config, before = orders.following, config if daemon.was_ready else None


def vet(config: Config) -> None:
    """What can be told without ending anything; SetupError names what this machine has not."""
    _require_cpus(config.cpus)
    for guest in config.guests:
        access_of(guest)
    if config.netdevs:
        from xdpnet.netdev import fitness, link

        for wanted in config.netdevs:
            fitness.reserve_queues(link.require_link(wanted.interface), wanted.queues or 0)


class Daemon:
    """The parts of a running daemon."""

    def __init__(self, config: Config, orders: Orders | None = None) -> None:
        self.config = config
        self.was_ready = False
        self.guests: dict[str, GuestPort] = {}
        self.netdevs: dict[str, NetdevPort] = {}
        # The same, as others look at them.
        self._names: dict[core.Guest, str] = {}
        self._checked: set[core.Guest] = set()  # whose source addresses are
        self._interfaces: dict[str, Netdev] = {}
        self._addresses: AddressBook | None = None
        self._started = time.monotonic()
        self._watchdog: Watchdog | None = None
        self._orders = orders or Orders()

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            # 1. Room for all descriptors that guests may need; a word on that for their memory.
            descriptors.reserve(descriptors.needed(self.config))
            self._advise()

            # 2. The bridge: its arena and forwarding table; no worker runs yet.
            self.bridge = self._make_bridge()
            stack.callback(self.bridge.close)
            self._advise_zerocopy()

            # 3. The interfaces: sockets bound, XDP attached. A port for each guest.
            stack.callback(self._close_ports)
            for wanted in self.config.netdevs:
                await self._open_netdev(wanted)
            for guest in self.config.guests:
                self._open_guest(guest)
            if self.config.control:
                self._addresses = AddressBook(f"{self.config.control}.addresses")
                self._addresses.restore(self.bridge, {name: port for port, name in self._names.items()})

            # 4. The workers.
            self.bridge.start()
            stack.callback(self.bridge.stop)
            self._watch_workers = StallWatch(self.bridge, self._describe)
            self._watch_workers.start()
            stack.callback(self._watch_workers.close)
            if period_s := systemd.watchdog_s():
                self._watchdog = Watchdog(period_s, lambda: self._watch_workers.stalls)

            # 5. What the core reports; what becomes of the interfaces.
            self.reports = Reports(self.bridge, self._names, self._interfaces, self._end_connection, self._checked)
            stack.callback(self.reports.close)
            self.reports.sync_addresses()
            self._mtus = MtuWatch()
            self._look_at_mtus()
            await stack.enter_async_context(self._tasks())
            stack.push_async_callback(self._unwatch)
            for netdev in self.netdevs.values():
                netdev.watch()

            # 6. The control socket's directory, where guests' sockets may be too.
            if self.config.control:
                stack.enter_context(directory_of(self.config.control))
                stack.callback(self._keep_addresses, last=True)

            # 7. The guests: from here on frontends are served.
            stack.push_async_callback(self._leave)
            for port in self.guests.values():
                await port.serve()

            # 8. The control socket and the metrics.
            if self.config.control:
                control = ControlServer(self.config.control, {"stats": lambda: self.snapshot().to_json()})
                await control.start()
                stack.push_async_callback(control.stop)
            if self.config.metrics:
                stack.callback(self._open_metrics(self.config.metrics))

            # 9. Ready, until we are told to end.
            systemd.notify("READY=1")
            if self._watchdog:
                self._watchdog.start()
                stack.callback(self._watchdog.close)
            log.info(
                "ready: guests %d, interfaces %d, workers %d",
                len(self.guests), len(self.netdevs), self.config.worker_count,
            )  # fmt: skip
            self.was_ready = True
            await self._orders.given.wait()

            # 10. The end: everything above, backwards.
            systemd.notify(systemd.reloading() if self._orders.following else "STOPPING=1")
            faulthandler.dump_traceback_later(END_S, exit=True)
        faulthandler.cancel_dump_traceback_later()
        log.info("stopped")

    def snapshot(self) -> Snapshot:
        """What the table, the JSON and the metrics are made of."""
        guests = [
            take.GuestSource(name, port.device.port, port.config.queues, _describe(port))
            for name, port in self.guests.items()
        ]
        return take.take(
            self.bridge, self.config.worker_count, guests, self._interfaces, self._started, self._watch_workers.stalls
        )

    # ---- the steps ----

    def _advise(self) -> None:
        """What works, but not as somebody may expect."""
        limit = cgroup.memory_limit()
        guests = sum(guest.max_memory or self.config.max_memory for guest in self.config.guests)
        if limit is not None and limit < guests:
            log.warning(
                "%d MiB of memory are what this process may have (MemoryMax), and max_memory of all guests is %d MiB: "
                "a frontend can have it killed; set max_memory to what guests have, or raise the limit",
                limit >> 20, guests >> 20,
            )  # fmt: skip

    def _advise_zerocopy(self) -> None:
        if self.config.zerocopy == "on" and not self.bridge.lends:
            log.warning(
                "zerocopy=on: frames are copied all the same, for it takes userfaultfd(2) to notice that a guest's "
                "memory moves; a kernel with CONFIG_USERFAULTFD, and SystemCallFilter=userfaultfd in the unit"
            )

    def _make_bridge(self) -> core.Bridge:
        config = self.config
        _require_cpus(config.cpus)
        queues = 0
        if config.netdevs:
            # They bring bcc and pyroute2, which guests among themselves do not need.
            from xdpnet.netdev import fitness, link

            queues = sum(fitness.reserve_queues(link.require_link(w.interface), w.queues or 0) for w in config.netdevs)
        try:
            return core.Bridge(
                workers=config.worker_count,
                cpus=config.cpus,
                spin_us=config.spin_us,
                ageing_s=config.ageing_s,
                netdev_queues=queues,
                frames_per_queue=config.frames_per_queue,
                max_macs=config.max_macs,
                zerocopy=config.zerocopy,
            )
        except OSError as error:
            needed = queues * config.frames_per_queue * core.FRAME_SIZE >> 20
            raise SetupError(f"bridge: {error.strerror}", f"{needed} MiB are needed for frames") from error

    # ---- ports, which come and go ----

    async def _open_netdev(self, wanted: NetdevConfig) -> NetdevPort:
        port = NetdevPort(self.bridge, wanted)
        await port.open()
        self.netdevs[wanted.interface], self._interfaces[wanted.interface] = port, port.netdev
        return port

    def _close_netdev(self, port: NetdevPort) -> None:
        del self.netdevs[port.config.interface], self._interfaces[port.config.interface]
        port.close()

    def _open_guest(self, guest: GuestConfig) -> GuestPort:
        port = GuestPort(self.bridge, guest, self.config.max_memory)
        port.open()
        self.guests[guest.name] = port
        self._names[port.device.port] = guest.name
        if guest.checks_source:
            self._checked.add(port.device.port)
        return port

    def _close_guest(self, port: GuestPort) -> None:
        del self.guests[port.config.name], self._names[port.device.port]
        self._checked.discard(port.device.port)
        port.close()

    async def _leave(self) -> None:
        for port in reversed(self.guests.values()):
            await port.leave()

    async def _unwatch(self) -> None:
        for netdev in self.netdevs.values():
            await netdev.unwatch()

    def _close_ports(self) -> None:
        for guest in [*self.guests.values()]:
            self._close_guest(guest)
        for netdev in [*self.netdevs.values()]:
            self._close_netdev(netdev)

    def _open_metrics(self, address: tuple[str, int]) -> Callable[[], None]:
        from xdpnet.metrics.endpoint import MetricsEndpoint

        async def current() -> Snapshot:
            return self.snapshot()

        endpoint = MetricsEndpoint(address, current, lambda: self._watch_workers.stalls)
        log.info("metrics: %s", endpoint.url)
        return endpoint.close

    # ---- what goes on meanwhile ----

    @asynccontextmanager
    async def _tasks(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._watch_inherited())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tick(self) -> None:
        """Addresses age without an event; the service manager wants to hear that this loop turns."""
        watchdog = systemd.watchdog_s()
        while True:
            await asyncio.sleep(min(TICK_S, watchdog / 3) if watchdog else TICK_S)
            if self._watchdog:
                self._watchdog.beat()
            try:
                self.reports.sync_addresses()
                self.reports.say_strays()
                self._look_at_mtus()
                self._keep_addresses()
            except Exception:  # the next tick may do better; without ticks the service manager would end us
                log.exception("addresses not synchronized")

    def _look_at_mtus(self) -> None:
        self._mtus.look((guest.device for guest in self.guests.values()), self._interfaces)

    def _keep_addresses(self, last: bool = False) -> None:
        if self._addresses:
            self._addresses.keep(self.bridge, {name: port.device.port for name, port in self.guests.items()}, last)

    async def _watch_inherited(self) -> None:
        """A process that serves inherited connections only has nothing left to do once they are over."""
        guests = self.guests.values()
        if all(guest.config.fd is not None for guest in guests):
            await asyncio.gather(*(guest.socket.ended.wait() for guest in guests))
            log.info("every inherited connection is over: stopping")
            self._orders.end()

    def _describe(self, place: core.Place) -> str:
        """For any thread: ports may come and go meanwhile."""
        for port in [*self.guests.values()]:
            if port.device.port == place.port:
                return f"guest {port.config.name}'s {'tx' if place.queue % 2 else 'rx'} ring {place.queue // 2}"
        for netdev in [*self._interfaces.values()]:
            if netdev.has(place.port):
                group = place.queue == netdev.room
                return f"interface {netdev.name}'s {'group socket' if group else f'queue {place.queue}'}"
        return f"port {place.port}"

    def _end_connection(self, port: int) -> None:
        for guest in self.guests.values():
            if guest.device.port == port:
                guest.socket.disconnect()


def _describe(port: GuestPort) -> Guest:
    config = port.config
    return Guest(
        socket=config.socket or "",
        client=config.client,
        connected=port.socket.connected,
        mac=spelt(config.macs),
        mtu=port.device.told_mtu,
        lacks_memory=port.device.lacks_memory,
        features=tuple(features.names(port.device.features)),
        **asdict(port.socket.counters),
    )


def _require_cpus(cpus: Collection[int]) -> None:
    usable = os.sched_getaffinity(0)
    if absent := sorted(set(cpus) - usable):
        raise SetupError(f"cpus: {_list(absent)} not usable here", f"choose of {_list(sorted(usable))}")


def _list(cpus: Sequence[int]) -> str:
    return "CPU " + ", ".join(str(cpu) for cpu in cpus)
