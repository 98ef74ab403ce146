"""Between a vhost-user frontend and a backend that offers it more than it should see: hides features on the way."""

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from xdpnet.virtq.message import HEADER_SIZE, Request

MOST_FDS = 64


def read(end: socket.socket) -> tuple[bytes, list[int]]:
    """The next message with its descriptors; ConnectionError at the end of the stream."""
    head, fds, _, _ = socket.recv_fds(end, HEADER_SIZE, MOST_FDS, socket.MSG_WAITALL)
    if len(head) < HEADER_SIZE:
        raise ConnectionError
    size = struct.unpack_from("<I", head, 8)[0]
    body = end.recv(size, socket.MSG_WAITALL) if size else b""
    if len(body) < size:
        raise ConnectionError
    return head + body, fds


def without(hidden: int, message: bytes) -> bytes:
    """An answer of the backend."""
    if int.from_bytes(message[:4], "little") != Request.GET_FEATURES:
        return message
    (bits,) = struct.unpack_from("<Q", message, HEADER_SIZE)
    return message[:HEADER_SIZE] + struct.pack("<Q", bits & ~hidden)


def pass_on(frontend: socket.socket, backend: socket.socket, hidden: int) -> None:
    """Until either end closes."""
    with contextlib.suppress(ConnectionError):
        while True:
            readable, _, _ = select.select([frontend, backend], [], [])
            for end in readable:
                message, fds = read(end)
                if end is frontend:
                    socket.send_fds(backend, [message], fds)
                else:
                    socket.send_fds(frontend, [without(hidden, message)], fds)
                for fd in fds:
                    os.close(fd)


@contextlib.contextmanager
def relay(path: Path, target: Path, hidden: int) -> Iterator[None]:
    """Listens on `path` for one frontend and connects it to the backend that listens on `target`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            with contextlib.suppress(OSError):
                frontend, _ = listener.accept()
                with frontend, socket.socket(socket.AF_UNIX) as backend:
                    backend.connect(str(target))
                    pass_on(frontend, backend, hidden)

        thread = threading.Thread(target=serve, name="relay", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)  # its frontend has gone
