"""A guest's vhost-user socket: waits for its frontend, serves one at a time, and waits again when it has gone.

Three ways to meet: listening on a path, connecting to a path (the frontend listens; retried until it is there), or a
socket inherited as a descriptor, connected or listening. Who may connect is decided by owner, group and permissions of
the socket; if it has a user, he and root are the only ones who are served, whichever way we meet. Who came, and what
became of it, is standing.py's affair.

A second frontend never disturbs one that has handed over its memory. One that has not, for HANDSHAKE_S, may be waiting
for its guest to boot, or keep the place from its owner: it stays until another one comes, and then makes room.

Invariant: between two frontends the device is bare: no ring runs, nothing is mapped, every descriptor of the old one is
closed, or about to be.

Reference: QEMU docs/interop/vhost-user.rst, "Backend program conventions"; xdpnet.sockets for who gets a path.
"""

import asyncio
import contextlib
import os
import select
import socket
import time

from xdpnet.closer import MAX_PENDING, Closer
from xdpnet.errors import SetupError, SocketPathError
from xdpnet.sockets import Access, ListeningSocket, check_path, listen_unix, peer_of
from xdpnet.virtq.connection import Connection
from xdpnet.virtq.counters import Counters
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.message import FramingError
from xdpnet.virtq.session import Session
from xdpnet.virtq.standing import Standing

RETRY_FIRST_S, RETRY_MAX_S = 0.05, 0.5  # of a client whose server is not there
HANDSHAKE_S = 5.0  # QEMU whose guest runs needs milliseconds
ACCEPT_PAUSE_S = 1.0  # when there is no descriptor left to accept with, or too many of the guest's are not closed


class GuestSocket:
    """Brings frontends to a device: `path` to listen on or, as a client, to connect to; or an inherited `fd`."""

    def __init__(
        self,
        device: GuestDevice,
        path: str | None,
        client: bool = False,
        fd: int | None = None,
        access: Access = Access(),  # noqa: B008
    ) -> None:
        if (path is None) == (fd is None):
            raise ValueError("a guest's socket is a path or a descriptor")
        self.device = device
        self.path = path
        self.counters = Counters()
        self.standing = Standing(device)
        self.ended = asyncio.Event()  # an inherited connection is over: there will be no other
        self._client = client
        self._turned_away = Closer()  # not the device's: these must not be counted against the frontend that is served
        self._fd = fd
        self._access = access
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._handshake_until = 0.0  # until then another frontend cannot have its place
        self._listening: ListeningSocket | None = None
        self._acceptor: socket.socket | None = None
        self._connector: asyncio.Task[None] | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._free = asyncio.Event()  # no frontend is connected
        self._free.set()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def start(self) -> None:
        """Listens, begins to connect, or serves the inherited socket. Raises SocketPathError or SetupError."""
        if self._fd is not None:
            self._inherit(self._fd)
        elif self.path is not None and self._client:
            check_path(self.path)
            self._connector = asyncio.create_task(self._connect(self.path))
        elif self.path is not None:
            self._listening = listen_unix(self.path, self._access)
            self._listen(self._listening.socket)

    async def stop(self) -> None:
        """Ends the connection and gives the path back; idempotent."""
        await self._part()
        self.disconnect()
        self.standing.close()

    async def move(self, path: str, client: bool, access: Access) -> None:
        """Meets frontends there, and these, from now on. Raises as start(), and goes on as before.

        The one that is connected stays, unless it would not be let in any more.
        """
        before = self.path, self._client, self._access
        await self._part()
        self.path, self._client, self._access = path, client, access
        try:
            await self.start()
        except SocketPathError:
            self.path, self._client, self._access = before
            await self.start()
            raise
        if self._connection is not None and not self._may_speak(self._connection.socket):
            self.disconnect()

    async def _part(self) -> None:
        """Nobody else is met."""
        if self._connector is not None:
            self._connector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._connector
            self._connector = None
        if self._pause is not None:
            self._pause.cancel()
        if self._acceptor is not None:
            asyncio.get_running_loop().remove_reader(self._acceptor)
            # Its queue may hold connections, and theirs descriptors. An inherited one others may go on listening on.
            if self._listening is not None:
                self._listening.close(self._turned_away.close)
            else:
                self._turned_away.close(self._acceptor.detach())
            self._acceptor = self._listening = None

    def disconnect(self) -> None:
        """Ends the present connection, if there is one; the next frontend is welcome."""
        if self._connection is not None:
            self._connection.close()

    # ---- the three ways ----

    def _listen(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._acceptor = sock
        asyncio.get_running_loop().add_reader(sock, self._accept)

    def _inherit(self, fd: int) -> None:
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise SetupError(f"descriptor {fd}: {error.strerror}", "pass a UNIX stream socket") from error
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.close()
            raise SetupError(f"descriptor {fd}: not a UNIX stream socket")
        os.set_inheritable(fd, False)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._listen(sock)
        elif self._may_speak(sock):
            self._serve(sock)
        else:
            self._turn_away(sock)
            raise SetupError(f"descriptor {fd}: the other end is not of user {self._access.uid}, nor of root")

    async def _connect(self, path: str) -> None:
        """Connects, and connects again whenever the frontend has gone."""
        delay = RETRY_FIRST_S
        complaint = ""
        while True:
            await self._free.wait()
            while self.device.closer.full:
                await asyncio.sleep(RETRY_MAX_S)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(path)  # of a UNIX socket either done at once or refused
            except OSError as error:
                sock.close()
                if str(error) != complaint:
                    complaint = str(error)
                    self.device.log.info("waiting for a frontend on %s: %s", path, error.strerror)
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_MAX_S)
                continue
            if not self._may_speak(sock):
                self._turn_away(sock)
                await asyncio.sleep(RETRY_MAX_S)
                continue
            complaint, delay = "", RETRY_FIRST_S
            self._serve(sock)
            await self._free.wait()
            await asyncio.sleep(max(delay, self.device.allowance.wait_s(), self.standing.held_s()))

    # ---- frontends ----

    def _accept(self) -> None:
        if self._acceptor is None:
            return
        if wait_s := max(self.device.allowance.wait_s(), self.device.door.wait_s(), self.standing.held_s()):
            self._pause_accepting(self._acceptor, min(wait_s, ACCEPT_PAUSE_S))
            return
        with self.device.door.charged():
            self._accept_one(self._acceptor)

    def _accept_one(self, acceptor: socket.socket) -> None:
        if self.device.closer.full or self._turned_away.full:
            self.device.log.warning("no frontend is accepted: %d descriptors of others are not closed yet", MAX_PENDING)
            self.counters.refused["closing"] += 1
            self._pause_accepting(acceptor, ACCEPT_PAUSE_S)
            return
        try:
            sock, _ = acceptor.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors or memory
            self.device.log.warning("cannot accept a frontend: %s", error)
            self.counters.refused["resources"] += 1
            self._pause_accepting(acceptor, ACCEPT_PAUSE_S)
            return
        if not self._may_speak(sock):
            self._turn_away(sock)
            return
        if self._connection is not None and _hung_up(self._connection.socket):
            # It has gone and we have not read its end yet; its successor need not suffer for that.
            self._connection.close()
        if self._connection is not None and self._has_no_memory and time.monotonic() > self._handshake_until:
            self._connection.fail(FramingError("timeout", f"no memory for {HANDSHAKE_S:g} s, and another wants in"))
        if self._connection is not None:
            self.counters.refused["busy"] += 1
            self.device.log.warning("%s refused: another frontend is connected", peer_of(sock))
            self._turn_away(sock)
            return
        self._serve(sock)

    @property
    def _has_no_memory(self) -> bool:
        """Its frontend, of any, has not handed any over."""
        return not self.device.memory and not (self._session and self._session.filling)

    def _may_speak(self, sock: socket.socket) -> bool:
        try:
            peer = peer_of(sock)
        except OSError as error:
            self.device.log.warning("cannot tell who connects: %s", error)
            self.counters.refused["resources"] += 1
            return False
        if self._access.uid in (-1, peer.uid) or peer.uid == 0:
            return True
        self.counters.refused["peer"] += 1
        self.device.log.warning("%s refused: only user %d and root are served", peer, self._access.uid)
        return False

    def _pause_accepting(self, acceptor: socket.socket, pause_s: float) -> None:
        """It stays readable: without a pause we would spin on it."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(acceptor)
        self._pause = loop.call_later(pause_s, self._listen, acceptor)

    def _turn_away(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        self._turned_away.close(sock.detach())

    def _serve(self, sock: socket.socket) -> None:
        try:
            peer = peer_of(sock)
            self._handshake_until = time.monotonic() + HANDSHAKE_S
            self._session = session = Session(self.device, self.counters)
            self._connection = Connection(sock, session, self.counters, self._on_close)
        except OSError as error:  # out of memory, or of what may be watched
            self.device.log.warning("cannot serve a frontend: %s", error)
            self.counters.refused["resources"] += 1
            self._turn_away(sock)
            self._end_if_inherited()
            return
        self.device.log.debug("frontend connected: %s", peer)
        self.counters.connects += 1
        self.standing.came(peer, session)
        self._free.clear()

    def _on_close(self) -> None:
        self.device.log.debug("frontend disconnected")
        if self._connection is not None:
            self.standing.went(self._connection.left, self._connection.fault)
        self._connection = self._session = None
        self._free.set()
        self._end_if_inherited()

    def _end_if_inherited(self) -> None:
        if self._fd is not None and self._acceptor is None:
            self.ended.set()


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)  # POLLHUP is always reported
    return any(event & select.POLLHUP for _, event in poll.poll(0))
