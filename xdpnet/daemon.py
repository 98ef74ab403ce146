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
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from xdpnet import cgroup, core, descriptors, journal
from xdpnet.addresses import AddressBook
from xdpnet.config import Config, GuestConfig, NetdevConfig, to_toml
from xdpnet.control import systemd
from xdpnet.control.changes import Changes, LostError
from xdpnet.control.orders import Orders
from xdpnet.control.plan import AnyStep, BridgeStep, GuestStep, NetdevStep
from xdpnet.control.server import ControlServer, directory_of
from xdpnet.control.watchdog import Watchdog
from xdpnet.errors import SetupError, XdpnetError
from xdpnet.metrics import take
from xdpnet.metrics.snapshot import Guest, Snapshot
from xdpnet.mtu import MtuWatch
from xdpnet.origin import Origin
from xdpnet.ports import GuestPort, NetdevPort, access_of, spelt
from xdpnet.reports import Reports
from xdpnet.sockets import check_free
from xdpnet.stalls import StallWatch
from xdpnet.virtq import features

if TYPE_CHECKING:
    from xdpnet.metrics.endpoint import MetricsEndpoint
    from xdpnet.netdev.port import Netdev

END_S = 2.8  # promised are three seconds; an orderly end takes some tens of milliseconds
TICK_S = 2.0  # ageing of addresses has seconds as its unit

log = logging.getLogger(__name__)


async def run(config: Config, origin: Origin) -> None:
    """Serves until it is told to end (orders.py). A new configuration that cannot be served is no reason to end."""
    orders = Orders(origin.read, vet, origin.locate)
    before: Config | None = None
    with orders.by_signals():
        while True:
            orders.serve()
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
            config, before = orders.following, daemon.changes.running if daemon.was_ready else None


def vet(config: Config) -> None:
    """What can be told without ending anything; SetupError names all that this machine has not, a line each."""
    if faults := faults_of(config):
        raise SetupError("\n".join(faults))


def faults_of(config: Config) -> list[str]:
    looks: list[Callable[[], object]] = [partial(_require_cpus, config.cpus)]
    looks += [partial(access_of, guest) for guest in config.guests]
    looks += [partial(_require_queues, netdev) for netdev in config.netdevs]
    return [fault for look in looks if (fault := _fault_of(look))]


def _fault_of(look: Callable[[], object]) -> str:
    try:
        look()
    except (XdpnetError, OSError) as error:
        return str(error)
    return ""


def _require_queues(wanted: NetdevConfig) -> int:
    # They bring bcc and pyroute2, which guests among themselves do not need.
    from xdpnet.netdev import fitness, link

    return fitness.reserve_queues(link.require_link(wanted.interface), wanted.queues or 0)


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
        self._metrics: MetricsEndpoint | None = None
        self.changes = Changes(config, self)

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            # 1. Room for all descriptors that guests may need; a word on that for their memory.
            self.served()

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
                commands = {"stats": lambda: self.snapshot().to_json(), "show": lambda: to_toml(self.changes.running)}
                control = ControlServer(self.config.control, commands | journal.COMMANDS, self._orders.by_socket())
                await control.start()
                stack.push_async_callback(control.stop)
            stack.callback(self._set_metrics, None)
            self._set_metrics(self.config.metrics)

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
            self._orders.ready(self.changes)
            await self._orders.given.wait()
            self._orders.not_ready()

            # 10. The end: everything above, backwards.
            if not self._orders.following:
                systemd.notify("STOPPING=1")
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
        config = self.changes.running
        guests = sum(guest.max_memory or config.max_memory for guest in config.guests)
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
        queues = sum(_require_queues(wanted) for wanted in config.netdevs)
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
        self._note_check(port)
        return port

    def _note_check(self, port: GuestPort) -> None:
        if port.config.checks_source:
            self._checked.add(port.device.port)
        else:
            self._checked.discard(port.device.port)

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

    def _set_metrics(self, address: tuple[str, int] | None) -> None:
        """The new one first: it may be refused."""
        before = self._metrics
        self._metrics = self._open_metrics(address) if address else None
        if before:
            before.close()

    def _open_metrics(self, address: tuple[str, int]) -> "MetricsEndpoint":
        from xdpnet.metrics.endpoint import MetricsEndpoint

        async def current() -> Snapshot:
            return self.snapshot()

        endpoint = MetricsEndpoint(address, current, lambda: self._watch_workers.stalls)
        log.info("metrics: %s", endpoint.url)
        return endpoint

    # ---- the steps of a change (control/changes.py) ----

    def faults(self, after: Config, steps: Sequence[AnyStep], interrupt: bool) -> list[str]:
        found = faults_of(after)
        for step in steps:
            if isinstance(step, GuestStep) and step.after:
                found += self._faults_of_guest(step, step.after, interrupt)
            elif isinstance(step, NetdevStep) and step.after:
                found.append(_fault_of(partial(self._require_fit, step.after)))
        return [fault for fault in dict.fromkeys(found) if fault]

    def _faults_of_guest(self, step: GuestStep, guest: GuestConfig, interrupt: bool) -> Iterator[str]:
        port = self.guests.get(guest.name)
        if step.rejoins and port and port.socket.connected and not interrupt:
            yield (
                f"guest {guest.name}: {', '.join(step.rejoins)}: its driver has negotiated by what it was told; "
                "end its frontend before, or let it connect anew: --interrupt"
            )
        ours = {each.config.socket for each in self.guests.values() if not each.config.client}
        if guest.socket is not None and not guest.client and guest.socket not in ours:
            with suppress(SetupError):  # said already
                uid = access_of(guest).uid
                if fault := _fault_of(partial(check_free, guest.socket, uid)):
                    yield f"guest {guest.name}: {fault}"

    def _require_fit(self, wanted: NetdevConfig) -> None:
        from xdpnet.netdev import fitness, link

        found = link.find_link(wanted.interface)
        if found is None:
            return  # said already
        ours = any(netdev.ifindex == found.index for netdev in self._interfaces.values())
        fitness.check_link(replace(found, xdp_id=0) if ours else found)

    async def carry_out(self, step: AnyStep) -> None:
        if isinstance(step, BridgeStep):
            if step.after:
                self._change_bridge(step.after)
        elif isinstance(step, NetdevStep):
            await self._change_netdev(step)
        elif step.before and step.after:
            await self._change_guest(step, step.after)
        elif step.after:
            await self._begin_guest(step.after)
        elif step.before:
            await self._end_guest(step.before.name)

    def served(self) -> None:
        descriptors.reserve(descriptors.needed(self.changes.running))
        self._advise()

    def _change_bridge(self, config: Config) -> None:
        try:
            self._pin(config)
            if config.metrics != self.config.metrics:
                self._set_metrics(config.metrics)
        except (XdpnetError, OSError):
            self._pin(self.config)
            raise
        self.bridge.tune(config.spin_us, config.ageing_s)
        for port in self.guests.values():
            port.limit_memory(config.max_memory)
        self.config = config

    def _pin(self, config: Config) -> None:
        """A CPU for each worker, or for all of them what this process may use."""
        for worker in range(config.worker_count):
            cpus = {config.cpus[worker]} if config.cpus else os.sched_getaffinity(0)
            os.sched_setaffinity(self.bridge.worker_stats(worker).tid, cpus)

    async def _begin_guest(self, guest: GuestConfig) -> None:
        port = self._open_guest(guest)
        try:
            await port.serve()
        except BaseException:
            self._close_guest(port)
            raise

    async def _end_guest(self, name: str) -> None:
        port = self.guests[name]
        await port.leave()
        self._close_guest(port)

    async def _change_guest(self, step: GuestStep, guest: GuestConfig) -> None:
        port = self.guests[guest.name]
        if not step.rejoins:
            await port.change(guest)
            self._note_check(port)
            return
        taught = [(mac, vlan) for number, mac, vlan in self.bridge.taught() if number == port.device.port]
        await self._end_guest(guest.name)
        try:
            await _instead(partial(self._begin_guest, guest), partial(self._begin_guest, port.config))
        finally:
            for mac, vlan in taught if guest.name in self.guests else ():
                with suppress(OSError):  # not the guest's to use any more
                    self.guests[guest.name].device.port.remember(mac, vlan)

    async def _change_netdev(self, step: NetdevStep) -> None:
        if step.before:
            port = self.netdevs[step.before.interface]
            await port.unwatch()
            self._close_netdev(port)
        if step.before and step.after:
            await _instead(partial(self._begin_netdev, step.after), partial(self._begin_netdev, step.before))
        elif step.after:
            await self._begin_netdev(step.after)

    async def _begin_netdev(self, wanted: NetdevConfig) -> None:
        port = await self._open_netdev(wanted)
        port.watch()
        self.reports.sync_addresses()
        if wanted.zerocopy != "off" and not port.netdev.port.lends:
            log.info(
                "interface %s: it came after the start, with frames of its own: guests' are copied there, "
                "until the daemon starts anew", wanted.interface,
            )  # fmt: skip

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
                for guest in self.guests.values():
                    guest.socket.standing.say()
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
        if all(guest.socket.ended.is_set() for guest in guests):  # none has come meanwhile
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


async def _instead(begin: Callable[[], Awaitable[None]], again: Callable[[], Awaitable[None]]) -> None:
    """The one or, if it is refused, the other, which was there before."""
    try:
        await begin()
    except (XdpnetError, OSError) as error:
        try:
            await again()
        except (XdpnetError, OSError) as worse:
            raise LostError(f"{error}; what was there before: {worse}") from error
        raise


def _describe(port: GuestPort) -> Guest:
    config = port.config
    return Guest(
        socket=config.socket or "",
        client=config.client,
        connected=port.socket.connected,
        mac=spelt(config.macs),
        mtu=port.device.told_mtu,
        state=port.socket.standing.state(),
        features=tuple(features.names(port.device.features)),
        **asdict(port.socket.counters),
    )


def _require_cpus(cpus: Collection[int]) -> None:
    usable = os.sched_getaffinity(0)
    if absent := sorted(set(cpus) - usable):
        raise SetupError(f"cpus: {_list(absent)} not usable here", f"choose of {_list(sorted(usable))}")


def _list(cpus: Sequence[int]) -> str:
    return "CPU " + ", ".join(str(cpu) for cpu in cpus)
