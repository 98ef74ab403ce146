"""A descriptor whose close() waits, for as long as the test wants: a TCP socket with unsent data and SO_LINGER."""

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

LINGER_S = 600  # longer than any test


@contextlib.contextmanager
def lingering() -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """The socket, to be sent and closed, and what ends the wait of whoever closes it last."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        peer, _ = server.accept()
        with contextlib.suppress(BlockingIOError):
            sock.setblocking(False)
            while True:
                sock.send(bytes(65536))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
        with peer:
            yield sock, peer.close  # with data unread: a reset, after which there is nothing to linger for
