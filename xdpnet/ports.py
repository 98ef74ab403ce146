"""The ports of a running daemon, which come and go while it serves: a guest and its socket, an interface and its watch.

Each is begun and ended in two halves, for at start and end of a daemon all ports have the first before any has the
second: a guest that is served already must not find another's address free.

    GuestPort    open(): port, addresses, device          serve() <--> leave(): its socket     close()
    NetdevPort   open(): port, program, sockets, link     watch() <--> unwatch()               close()

Invariant: what open() or serve() refuses leaves nothing behind. All calls from the control thread.
"""

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import stat
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from xdpnet import core
from xdpnet.config import GuestConfig, NetdevConfig
from xdpnet.errors import SetupError, SocketPathError
from xdpnet.sockets import Access, barred_by
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.server import GuestSocket

if TYPE_CHECKING:
    from xdpnet.netdev.port import Netdev

REWATCH_S = 5.0

log = logging.getLogger(__name__)


class GuestPort:
    """A guest, as it is configured."""

    def __init__(self, bridge: core.Bridge, config: GuestConfig, max_memory: int) -> None:
        """max_memory: of a guest that has none of its own."""
        self.config = config
        self.device: GuestDevice
        self.socket: GuestSocket
        self._bridge = bridge
        self._max_memory = max_memory
        self._opened = ExitStack()

    def open(self) -> None:
        guest = self.config
        if guest.fd is not None and not _is_socket(guest.fd):
            raise SetupError(f"guest {guest.name}: descriptor {guest.fd} is not an open socket", "pass one with --fd")
        access = access_of(guest)
        with ExitStack() as undo:
            port = self._bridge.add_guest(guest.queues, guest.name)
            undo.callback(port.remove)
            self.device = GuestDevice(
                self._bridge, guest.name, port, guest.queues, guest.mtu, guest.poll, guest_offloads=guest.guest_offloads
            )
            self._give_addresses(guest)
            self.limit_memory(self._max_memory)
            self.socket = GuestSocket(self.device, guest.socket, guest.client, guest.fd, access)
            self._opened = undo.pop_all()

    def _give_addresses(self, guest: GuestConfig) -> None:
        port = self.device.port
        try:
            port.set_macs(guest.macs, guest.checks_source)
        except OSError as error:
            raise SetupError(
                f"guest {guest.name}: mac {spelt(guest.macs)}: {error.strerror}",
                "choose an address that no interface of this daemon has",
            ) from error
        port.set_ips(guest.ips)

    def limit_memory(self, most: int) -> None:
        """most: of a guest that has no such of its own. What a frontend has handed over stays."""
        self._max_memory = most
        self.device.max_memory = self.config.max_memory or most

    async def change(self, guest: GuestConfig) -> None:
        """All or nothing: whatever takes no new connection. The one that is there stays, if it may."""
        before = self.config
        self._give_addresses(guest)
        try:
            if guest.socket is not None and _meets(guest) != _meets(before):
                await self.socket.move(guest.socket, guest.client, access_of(guest))
        except (SetupError, SocketPathError):
            self._give_addresses(before)
            raise
        self.config = guest
        self.device.poll = guest.poll
        self.limit_memory(self._max_memory)
        _advise_way(guest)

    async def serve(self) -> None:
        """From here on frontends are."""
        await self.socket.start()
        _advise_way(self.config)

    async def leave(self) -> None:
        """Idempotent."""
        await self.socket.stop()

    def close(self) -> None:
        """Idempotent."""
        self._opened.close()


class NetdevPort:
    """An interface, as it is configured."""

    def __init__(self, bridge: core.Bridge, config: NetdevConfig) -> None:
        from xdpnet.netdev.port import Netdev  # brings bcc and pyroute2, which guests among themselves do not need

        self.config = config
        self.netdev = Netdev(bridge, config.interface, config.queues, config.mode, config.zerocopy)
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self.netdev.join()

    def watch(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def unwatch(self) -> None:
        """Idempotent."""
        task, self._watching = self._watching, None
        if task:
            task.cancel()
            await asyncio.wait([task])

    def close(self) -> None:
        """Idempotent."""
        self.netdev.close()

    async def _watch(self) -> None:
        from xdpnet.netdev.watch import Watch

        while True:
            try:
                await Watch(self.netdev, _say_state).run()
            except Exception:  # whatever an interface does to us, guests and the other interfaces go on
                log.exception("interface %s: watch failed; again in %g s", self.netdev.name, REWATCH_S)
            await asyncio.sleep(REWATCH_S)


def _say_state(netdev: "Netdev") -> None:
    log.info("interface %s is %s", netdev.name, netdev.state)


def spelt(macs: Iterable[bytes]) -> str:
    """As a flag has them."""
    return "+".join(mac.hex(":") for mac in macs)


def _meets(guest: GuestConfig) -> tuple[object, ...]:
    """Where, and whom."""
    return guest.socket, guest.client, guest.user, guest.group, guest.mode


def access_of(guest: GuestConfig) -> Access:
    """Who may use the guest's socket; one that has a user is his alone, if nothing else is said."""
    user, group = guest.user, guest.group
    try:
        uid = pwd.getpwnam(user).pw_uid if isinstance(user, str) else -1 if user is None else user
    except KeyError as error:
        raise _unknown(guest, f'user = "{user}"') from error
    try:
        gid = grp.getgrnam(group).gr_gid if isinstance(group, str) else -1 if group is None else group
    except KeyError as error:
        raise _unknown(guest, f'group = "{group}"') from error
    mode = guest.mode if guest.mode is not None else 0o660 if guest.user is None else 0o600
    return Access(uid, gid, mode)


def _unknown(guest: GuestConfig, what: str) -> SetupError:
    return SetupError(f"guest {guest.name}: {what}: there is none", "name one of this machine, or a number")


def _advise_way(guest: GuestConfig) -> None:
    """Whom a socket is given to has to get there."""
    if guest.socket is None or guest.client:
        return
    with contextlib.suppress(OSError):
        if directory := barred_by(guest.socket, access_of(guest)):
            log.warning(
                "guest %s: its socket is for %s, who may not pass %s; chmod o+x %s, which shows nobody what is in it "
                "(RuntimeDirectoryMode=0751 in the unit), or another path",
                guest.name, " and ".join(f"{key} {value}" for key, value in _named(guest)), directory, directory,
            )  # fmt: skip


def _named(guest: GuestConfig) -> list[tuple[str, str | int]]:
    return [(key, value) for key, value in (("user", guest.user), ("group", guest.group)) if value is not None]


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
