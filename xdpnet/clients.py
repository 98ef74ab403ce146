"""Connections of people who may be anybody: a few are served at once, the others are not even accepted.

Invariant: whatever they do, they cost one descriptor and one task for each of `places`. A client has `deadline_s`
seconds to ask, and as long again, with a second for each MiB, to take the answer. What the answer takes us is no
client's fault. Who comes while all places are taken waits in the socket's backlog, where the kernel turns away whoever
finds that full too.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from xdpnet.ration import RationedLog

RETRY_S = 1.0  # after accept() failed: out of descriptors or memory
BYTES_PER_S = 1 << 20  # who takes them slower is cut off
PIECE = 1 << 16  # more of an answer is not in the kernel's hands at once

Request = TypeVar("Request")
Admit = Callable[[socket.socket], Awaitable[bool]]  # False: it has seen to the socket itself


async def anybody(_: socket.socket) -> bool:
    """Admits everybody."""
    return True


async def serve_few(
    listening: socket.socket,
    places: int,
    deadline_s: float,
    request_bytes: int,
    read: Callable[[asyncio.StreamReader], Awaitable[Request]],
    answer: Callable[[Request], Awaitable[bytes]],
    log: RationedLog,
    admit: Admit = anybody,
) -> None:
    """Serves until it is cancelled: one request a connection, and its answer."""
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(places)

    async def exchange(sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock, limit=request_bytes)
        try:
            async with asyncio.timeout(deadline_s) as limit:
                request = await read(reader)
                limit.reschedule(None)
                said = await answer(request)
                limit.reschedule(loop.time() + deadline_s + len(said) / BYTES_PER_S)
                for at in range(0, len(said), PIECE):
                    writer.write(said[at : at + PIECE])
                    await writer.drain()
                writer.write_eof()
                await reader.read(request_bytes)  # the client's end: abort() would throw away what it has yet to read
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
