"""One network interface as a port of the bridge: its sockets, while it is attached to.

Owns, in this order: the port, the loaded program; and while attached the AF_XDP sockets, the AF_PACKET socket and the
bpf_link. The link comes last and goes first, so no frame is steered to a socket that is not there; it dies with the
process, so the host always gets its frames back. Never replaces another's program. What takes a capability is done by
privileged.py, when to attach and detach is said by watch.py. Reference: kernel Documentation/networking/af_xdp.rst.

    open() --> attach() <--> detach() --> close()
"""

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from xdpnet import core, threads
from xdpnet.bpf import loader
from xdpnet.errors import SetupError
from xdpnet.netdev import fitness, privileged
from xdpnet.netdev.fitness import (
    PLAIN_MTU,
    BusyError,
    advise,
    check_link,
    needs_frags,
    reserve_queues,
    setup_error,
    stripping,
)
from xdpnet.netdev.group import GroupSocket
from xdpnet.netdev.link import Link, find_link, require_link
from xdpnet.netdev.ownership import Addresses
from xdpnet.netdev.privileged import NotLinkedError
from xdpnet.ration import RationedLog

log = logging.getLogger(__name__)

Mode = Literal["auto", "native", "generic"]
State = Literal["up", "partial", "down", "gone"]  # drawn in watch.py

# Queues that come later do not run a native program that is attached already.
FORGETFUL = frozenset({"veth"})

MAX_MACS = 16384  # 127 guests that have been given 16 addresses and have taught 64
PATIENCE_S = 2.0  # the kernel frees queues and programs of a process that ended some 10-300 ms later
RETRY_S = 0.05
RENEW_PAUSE_S = 5.0  # between changes of guest memory that are followed: each costs a few tens of milliseconds
RENEW_RETRY_S = 0.005


class Netdev:
    """A netdev port. All calls from the control thread."""

    def __init__(
        self,
        bridge: core.Bridge,
        ifname: str,
        queues: int | None = None,
        mode: Mode = "auto",
        zerocopy: core.ZeroCopy = "auto",
    ) -> None:
        self.name = ifname  # as configured, maybe an alternative one
        self.ifname = ifname  # its own, now
        self._index = 0  # of the interface that we have had: it stays ours when it is renamed
        self._log = RationedLog(log, ifname, about="interface")  # for what guests can provoke
        self._port: core.Netdev | None = None
        self.room = 0  # sockets that there may be, whatever becomes of the interface
        self.queues = 0  # of the interface, from the first, those that have a socket while attached
        self.queues_had = 0  # the most that these have been
        self.mode = ""  # as obtained: "native" or "generic"
        self.zerocopy = zerocopy  # the policy; what became of it is in the counters
        self.ifindex = 0
        self.state: State = "gone"
        self._bridge = bridge
        self._wanted_queues = queues or 0  # 0: all that the interface has
        self._rx_queues = 0  # that the interface has, as found last
        self._said_of_queues = ""
        self._copies = False  # the driver has no zero copy, as was found
        self._closed_at = 0.0  # a socket, by ourselves: the kernel frees its queue a moment later
        self._wanted_mode = mode
        self._native_refused = 0, 0  # index and MTU of the interface then
        self._program: loader.Program | None = None
        self._group: GroupSocket | None = None
        self._group_lost = 0  # of its predecessors
        self._link_fd = -1
        self._mtu = 0
        self.addresses = Addresses(ifname)
        self._stopped_stripping: dict[str, bool] = {}  # features of _stripper that close() turns on again
        self._stripper = 0  # ifindex
        self._attached = ExitStack()
        self.wake = asyncio.Event()  # for whoever watches: look at the interface now
        self._renewal: asyncio.TimerHandle | None = None
        self._renew_due = False
        self._renewed_at = -RENEW_PAUSE_S

    @property
    def port(self) -> core.Netdev:
        """SetupError while it is not open."""
        if self._port is None:
            raise SetupError(f"interface {self.name}: not open")
        return self._port

    def has(self, number: int) -> bool:
        """Whether its port is the one that the core means; for any thread."""
        return self._port == number

    # ---- opening and closing ----

    def open(self) -> None:
        """All or nothing; SetupError names what is missing and the remedy."""
        with self._opening(self._load()) as try_attach:
            while not try_attach():
                time.sleep(RETRY_S)

    async def join(self) -> None:
        """As open(), beside others: who wait neither for the compiler nor for what another process has yet to free."""
        loading = threads.ask(self._load)
        try:
            async with asyncio.timeout(loader.TIMEOUT_S + PATIENCE_S):
                program = await asyncio.shield(asyncio.wrap_future(loading))
        except (TimeoutError, asyncio.CancelledError):
            loading.add_done_callback(_discard)
            raise
        with self._opening(program) as try_attach:
            while not try_attach():
                await asyncio.sleep(RETRY_S)

    def _load(self) -> loader.Program:
        """For any thread."""
        return privileged.load(reserve_queues(require_link(self.name), self._wanted_queues), MAX_MACS)

    @contextmanager
    def _opening(self, program: loader.Program) -> Iterator[Callable[[], bool]]:
        """For whoever tries to attach until that is done."""
        with ExitStack() as undo:
            undo.callback(self.close)
            self._program = program
            # 1. The interface and its queues.
            link = require_link(self.name)
            self.room = reserve_queues(link, self._wanted_queues)
            # 2. The port and the program; both outlive the interface.
            self._port = self._bridge.add_netdev(self.room, self.name)
            self.addresses.open(self.port, self._program)
            # 3. The sockets and the link.
            deadline = time.monotonic() + PATIENCE_S
            yield lambda: self._try_attach(deadline)
            undo.pop_all()
        self.state = self.state_of(link)
        for advice in advise(link, self.mode, stripping(link.name), self._tells()):
            log.warning("%s", advice)

    def _try_attach(self, deadline: float) -> bool:
        """False: others have what it takes, who may just be ending."""
        try:
            self.attach(require_link(self.name))
        except OSError as error:
            raise setup_error(f"interface {self.name}", error) from error
        except BusyError:
            if time.monotonic() > deadline:
                raise
            return False
        return True

    def close(self) -> None:
        """Idempotent; the port is gone afterwards."""
        if self._renewal:
            self._renewal.cancel()
            self._renewal = None
        self.detach()
        self._strip_again()
        if self._program:
            self._program.close()
            self._program = None
        self.addresses.close()
        if self._port is not None:
            self._port.remove()
            self._port = None

    @property
    def attached(self) -> bool:
        return self._link_fd >= 0

    def attach(self, link: Link) -> None:
        """All or nothing; BusyError if others have what it takes, SetupError, OSError."""
        program = self._program
        if program is None:
            raise SetupError(f"interface {self.name}: not open")
        # 1. Is it fit, and free?
        check_link(link)
        if link.mtu > PLAIN_MTU and program.frags_fd < 0:
            raise needs_frags(link)
        self._stop_stripping(link)
        modes: list[Mode] = ["native", "generic"] if self._wanted_mode == "auto" else [self._wanted_mode]
        if self._native_refused == (link.index, link.mtu):
            modes.remove("native")
        while True:
            mode = modes.pop(0)
            try:
                return self._attach_in(mode, link, program)
            except NotLinkedError as failure:
                if not modes:
                    raise
                log.warning("%s; falling back to generic mode, which is slower", failure.message)
                self._native_refused = link.index, link.mtu

    def _attach_in(self, mode: Mode, link: Link, program: loader.Program) -> None:
        with ExitStack() as undo:
            # 2. An AF_XDP socket a queue, known to the program. The first asks the driver for zero copy.
            self._copies = False
            undo.callback(self._close_queues, range(self.room))
            self.queues = min(link.rx_queues, self.room)
            for queue in range(self.queues):
                self._open_queue(link, queue, mode)
            # 3. The AF_PACKET socket for group-addressed frames, and the receive filters.
            group = privileged.open_group(link)
            undo.callback(group.close)
            self.addresses.attach(link, group)
            undo.callback(self.addresses.detach)
            self.port.set_group_fd(group.fileno())
            undo.callback(self.port.set_group_fd, -1)
            # 4. From here on frames flow.
            self._link_fd = privileged.attach(program, link, mode, self._tells())
            undo.callback(self._unlink)
            self._attached = undo.pop_all()
        self._group, self.mode = group, mode
        self._index, self.ifname = link.index, link.name
        self.ifindex, self._mtu, self._rx_queues = link.index, link.mtu, link.rx_queues
        self.queues_had = max(self.queues_had, self.queues)
        log.info("%s: attached, %s XDP, queues: %d, ifindex %d", self.name, mode, self.queues, link.index)
        self._say_of_queues(self._advise_queues(link))

    def _unlink(self) -> None:
        link_fd, self._link_fd = self._link_fd, -1
        if link_fd >= 0:
            os.close(link_fd)

    def detach(self) -> None:
        """The host gets all frames, the sockets are gone; idempotent."""
        self._group_lost = self.group_lost
        self._group = None
        self.ifindex = 0
        self._attached.close()

    def _stop_stripping(self, link: Link) -> None:
        """VLAN tags stay in received frames until close(), while the interface lives. Before there are sockets: some
        drivers restart for it."""
        if link.index != self._stripper:
            self._stripper, self._stopped_stripping = link.index, {}
        if link.kind in fitness.STRIPPED_BY_PEER:
            return
        on = stripping(link.name)
        if on:
            try:
                privileged.set_features(link.name, dict.fromkeys(on, False))
            except OSError as error:
                log.debug("%s: %s", self.name, error)  # advise() names what is left
        stopped = [name for name in on if name not in stripping(link.name)]
        if stopped:
            log.info("%s: VLAN tags stay in received frames until the end: %s off", self.name, ", ".join(stopped))
            self._stopped_stripping |= dict.fromkeys(stopped, True)

    def _strip_again(self) -> None:
        wanted, self._stopped_stripping = self._stopped_stripping, {}
        if not wanted:
            return
        try:
            privileged.set_features(socket.if_indextoname(self._stripper), wanted)  # it may have another name now
        except OSError as error:
            log.warning("%s: %s not turned on again: %s", self.name, ", ".join(wanted), error)

    def _open_queue(self, link: Link, queue: int, mode: str) -> None:
        tells = mode == "generic" and self._tells()
        failure = privileged.open_queue(self.port, queue, link, mode, self.zerocopy, copy=self._copies, tells=tells)
        if failure:
            log.warning("%s with guest memory; frames are copied", failure)
        self._copies = not self.port.xsk_stats(queue).zerocopy
        if self._program:
            socket_fd = self.port.queue_fd(queue)
            core.bpf_map_update(self._program.xsks_fd, struct.pack("=I", queue), struct.pack("=I", socket_fd))

    def _tells(self) -> bool:
        """Whether, in generic mode, the program says what is several frames in one."""
        return self._program is not None and self._program.tells_fd >= 0

    async def renew(self, link: Link) -> None:
        """If it is due, close and open the sockets, which then have guest memory as it is now; the link stays."""
        due, self._renew_due = self._renew_due, False  # before: it may be due again while that goes on
        if not due or not self.port.is_stale(self.zerocopy):
            return
        try:
            # What can be done before comes first, while there are sockets; then each queue is without one for a moment.
            privileged.prepare(self.port, link, self.mode, self.zerocopy)
        except OSError as error:
            log.debug("%s: %s", self.name, error)  # said by whoever needs it
        try:
            for queue in range(self.queues):
                await asyncio.sleep(0)  # others' turn
                self._close_queues([queue])
                await self._reopen_queue(link, queue)
            self._log.info("sockets renewed: guest memory has changed, or one had lost frames")
        except (SetupError, OSError) as error:
            self._log.warning("sockets not renewed: %s", error)
            self.detach()
        self._renewed_at = time.monotonic()

    def _close_queues(self, queues: Iterable[int]) -> None:
        for queue in queues:
            self.port.close_queue(queue)
        self._closed_at = time.monotonic()

    async def _reopen_queue(self, link: Link, queue: int) -> None:
        deadline = self._closed_at + PATIENCE_S
        while True:
            try:
                return self._open_queue(link, queue, self.mode)
            except BusyError:  # by what we closed
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(RENEW_RETRY_S)

    async def follow_queues(self, link: Link) -> None:
        """Sockets for queues that have come, none for those that have gone; the others stay."""
        outgrown = link.rx_queues > self._rx_queues and link.kind in FORGETFUL and self.mode == "native"
        if link.rx_queues != self._rx_queues:
            log.info("%s: receive queues changed from %d to %d", self.name, self._rx_queues, link.rx_queues)
            self._rx_queues = link.rx_queues
        wanted = min(link.rx_queues, self.room)
        if wanted < self.queues:
            self._close_queues(range(wanted, self.queues))
            self.queues = wanted
        said = self._advise_queues(link)
        try:
            while self.queues < wanted:
                await self._reopen_queue(link, self.queues)
                self.queues += 1
                self.queues_had = max(self.queues_had, self.queues)
                said = self._advise_queues(link)
        except (SetupError, OSError) as error:  # tried again at the next look
            said = f"{error}; until then guests' frames on {self.unserved} queues go to the host"
        self._say_of_queues(said)
        if outgrown:
            await self._relink(link)

    async def _relink(self, link: Link) -> None:
        """The program anew; until it is back, a moment later, guests' frames from the wire go to the host."""
        self._unlink()
        deadline = time.monotonic() + PATIENCE_S
        while self._program and not self.attached:
            try:
                self._link_fd = privileged.attach(self._program, link, self.mode, self._tells())
            except (SetupError, OSError) as error:
                if not isinstance(error, BusyError) or time.monotonic() > deadline:  # busy with ours, for a moment
                    log.warning("%s: %s", self.name, error)
                    self.detach()
                    return
                await asyncio.sleep(RENEW_RETRY_S)

    def _advise_queues(self, link: Link) -> str:
        """What is not as somebody may expect, with the remedy; empty: nothing."""
        name, queues, sockets = link.name, link.rx_queues, self.queues
        if queues > sockets:
            more = f", or queues={queues} and a restart" if queues <= core.MAX_NETDEV_QUEUES else ""
            return (
                f"interface {name}: {queues} receive queues and {sockets} AF_XDP sockets, guests' frames on the other "
                f"queues go to the host; ethtool -L {name} combined {sockets} (veth: rx {sockets}), "
                f"or ethtool -X {name} equal {sockets}{more}"
            )
        if queues < self._wanted_queues:
            return (
                f"interface {name}: {self._wanted_queues} queues asked for, it has {queues}, and that many sockets; "
                f"ethtool -L {name} combined {self._wanted_queues} (veth: rx {self._wanted_queues})"
            )
        return ""

    def _say_of_queues(self, said: str) -> None:
        if said and said != self._said_of_queues:
            log.warning("%s", said)
        self._said_of_queues = said

    # ---- addresses and counters ----

    def sync_macs(self, macs: Iterable[bytes]) -> None:
        """Steer exactly these unicast addresses to the guests; remembered while the interface is away."""
        self.addresses.sync(macs)

    def verdicts(self) -> dict[str, int]:
        """What the program did with frames, by verdict; never runs backwards while the port lives."""
        if self._program is None:
            return dict.fromkeys(loader.VERDICTS, 0)
        cpus = possible_cpus()
        totals = {}
        for key, name in enumerate(loader.VERDICTS):
            value = core.bpf_map_lookup(self._program.verdicts_fd, struct.pack("=I", key), 8 * cpus)
            totals[name] = sum(struct.unpack(f"={cpus}Q", value))
        return totals

    @property
    def group_lost(self) -> int:
        """Group-addressed frames that found the AF_PACKET socket full; never runs backwards while the port lives."""
        return self._group_lost + (self._group.lost() if self._group else 0)

    @property
    def mtu(self) -> int:
        """Of the interface; 0 while it is away."""
        return self._mtu if self.attached else 0

    @property
    def unserved(self) -> int:
        """Queues of the interface that have no socket while others have: guests' frames on them go to the host."""
        return max(0, self._rx_queues - self.queues) if self.attached else 0

    @property
    def alive(self) -> bool:
        """Attached to an interface that is still there, in this network namespace."""
        return self.attached and core.bpf_link_ifindex(self._link_fd) == self.ifindex

    # ---- what its watch looks at, and has done ----

    def poke(self) -> None:
        """Have the interface looked at now, as after a socket error."""
        self.wake.set()

    def memory_changed(self) -> None:
        """Have the sockets renewed, with guest memory as it is now: at once, but not again and again."""
        if self._renewal or not self.port.is_stale(self.zerocopy):
            return
        pause = max(0.0, self._renewed_at + RENEW_PAUSE_S - time.monotonic())
        self._renewal = asyncio.get_running_loop().call_later(pause, self._renewal_is_due)

    def _renewal_is_due(self) -> None:
        self._renewal = None
        self._renew_due = True
        self.wake.set()

    def find(self) -> Link | None:
        """The interface that we had, whatever its name is now; once that is gone, the one with the name."""
        link = None
        if self._index and (not self.attached or self.alive):  # else another may have the index
            link = find_link(self._index)
            if link is None:
                self._index = 0
        link = link or find_link(self.name)
        if link and link.name != self.ifname:
            log.info("%s: the interface is called %s now", self.name, link.name)
            self.ifname = link.name
        return link

    def state_of(self, link: Link | None) -> State:
        if link is None:
            return "gone"
        if not self.attached or not link.running:
            return "down"
        return "partial" if self.unserved else "up"

    def follow_addresses(self, link: Link) -> None:
        """The host's on the interface may be others now."""
        try:
            self.addresses.follow(link)
        except SetupError as error:  # the question failed, as where the interface goes: those that were found stay
            log.warning("%s", error)
        except OSError as error:
            log.warning("%s: receive filters: %s", self.name, error)  # one may be missing: from the start again
            self.detach()


def _discard(loading: Future[loader.Program]) -> None:
    """What nobody waits for any more."""
    if not loading.exception():
        loading.result().close()


def possible_cpus() -> int:
    """A per-CPU map has a value for each of these."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().replace("-", ",").rsplit(",", 1)[-1]
    return int(last) + 1
