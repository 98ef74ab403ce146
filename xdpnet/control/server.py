"""The control socket: the running daemon's answers to `xdpnet stats`, and to orders that change it.

A UNIX stream socket; one JSON line {"command": "stats"} is asked, one JSON line answered, then the connection ends.
What an order says more is in the same object (orders.py).
Only root and the daemon's own user may connect, and are answered, whatever has become of the permissions of the path. A
client has DEADLINE_S seconds to ask, some more for a long answer (clients.py), and may be one of CLIENTS; nobody can
make the daemon wait.

Reference: unix(7), SO_PEERCRED.
"""

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

from xdpnet.clients import serve_few
from xdpnet.closer import Closer
from xdpnet.errors import SocketPathError
from xdpnet.ration import RationedLog
from xdpnet.sockets import Access, ListeningSocket, listen_unix, peer_of

CLIENTS = 16
DEADLINE_S = 2.0
REQUEST_BYTES = 1 << 18  # a configuration of as many guests as there may be, each with all that it can be given

log = RationedLog(logging.getLogger(__name__), "control")  # clients provoke it

Commands = dict[str, Callable[[], Any]]
Orders = Mapping[str, Callable[[dict[str, Any]], Awaitable[Any]]]


@contextmanager
def directory_of(path: str) -> Iterator[None]:
    """Makes the socket's directory, for owner and group, if it is not there; takes it away again when it is empty."""
    directory = os.path.dirname(path) or "."
    try:
        os.mkdir(directory, 0o750)
    except FileExistsError:
        yield  # with the permissions that its maker chose
        return
    except OSError as error:
        reason = f"directory {directory}: {error.strerror}"
        raise SocketPathError(path, reason, "name another path with --control") from error
    try:
        yield
    finally:
        with suppress(OSError):  # somebody else uses it by now
            os.rmdir(directory)


class ControlServer:
    """Answers each command with what its function returns: bytes of JSON, or what can be made such.

    An order's function gets all that was asked, and may take its time: others are answered meanwhile.
    """

    def __init__(self, path: str, commands: Commands, orders: Orders = MappingProxyType({})) -> None:
        self._path = path
        self._commands = commands
        self._orders = orders
        self._closer = Closer()
        self._listening: ListeningSocket | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._listening = listen_unix(self._path, Access(mode=0o600))
        limits = CLIENTS, DEADLINE_S, REQUEST_BYTES
        serving = serve_few(self._listening.socket, *limits, self._read, self._answer, log, self._admit)
        self._serving = asyncio.create_task(serving)

    async def stop(self) -> None:
        if self._serving:
            self._serving.cancel()
            await asyncio.wait([self._serving])
        if self._listening:
            self._listening.close(self._closer.close)

    async def _admit(self, sock: socket.socket) -> bool:
        """Nothing is read of a stranger: there may be descriptors in it, and they would be closed on this thread."""
        uid = None  # of whom the kernel does not tell
        with suppress(OSError):
            uid = peer_of(sock).uid
        if uid in (0, os.geteuid()):
            return True
        with suppress(OSError):
            sock.send(_line({"error": f"user {uid} may not ask; run as root or as user {os.geteuid()}"}))
            sock.shutdown(socket.SHUT_RDWR)
        self._closer.close(sock.detach())
        while self._closer.full:
            await asyncio.sleep(DEADLINE_S)
        return False

    async def _read(self, reader: asyncio.StreamReader) -> bytes | None:
        """The line that is asked; None: it is too long, empty: it was not ended."""
        try:
            return await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            return None
        except asyncio.IncompleteReadError:
            return b""

    async def _answer(self, request: bytes | None) -> bytes:
        if request is None:
            return _line({"error": f"request of more than {REQUEST_BYTES} bytes"})
        try:
            asked = json.loads(request)
            name = asked["command"]
            order = self._orders.get(name)
            command = None if order else self._commands[name]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join([*self._commands, *self._orders])
            return _line({"error": f'not a request; ask {{"command": NAME}} with {known}'})
        if order:
            return _line(await order(asked))
        return _line(command() if command else None)


def _line(answer: Any) -> bytes:
    """Bytes are JSON already."""
    return (answer if isinstance(answer, bytes) else json.dumps(answer).encode()) + b"\n"
