"""Connections of people who may be anybody: a few are served at once, the others are not even accepted.

Invariant: whatever they do, they cost one descriptor and one task for each of `places`, each for `deadline_s` seconds;
who comes while all are taken waits in the socket's backlog, where the kernel turns away whoever finds that full too.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable

from xdpnet.ration import RationedLog

RETRY_S = 1.0  # after accept() failed: out of descriptors or memory

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Admit = Callable[[socket.socket], Awaitable[bool]]  # False: it has seen to the socket itself


async def anybody(_: socket.socket) -> bool:
    """Admits everybody."""
    return True


async def serve_few(
    listening: socket.socket,
    places: int,
    deadline_s: float,
    request_bytes: int,
    serve: Serve,
    log: RationedLog,
    admit: Admit = anybody,
) -> None:
    """Serves until it is cancelled. The connection ends when `serve` returns, or is late."""
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(places)

    async def exchange(sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock, limit=request_bytes)
        try:
            async with asyncio.timeout(deadline_s):
                await serve(reader, writer)
        finally:
            writer.transport.abort()

    async def client(sock: socket.socket) -> None:
        try:
            if await admit(sock):
                await exchange(sock)
        except (OSError, TimeoutError) as error:
            log.debug("a client went away: %s", error)
        except Exception:  # the others are served on
            log.exception("internal error, a client is disconnected")
        finally:
            free.release()

    async with asyncio.TaskGroup() as clients:
        while True:
            await free.acquire()
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("cannot accept a client: %s", error)
                free.release()
                await asyncio.sleep(RETRY_S)
                continue
            clients.create_task(client(sock))
