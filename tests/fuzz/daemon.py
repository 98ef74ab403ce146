"""Target: a running daemon, by its doors: guests' sockets, the operator's socket, the metrics address.

It is another process, so nothing tells which inputs are new. What must hold is that it lives, has logged no internal
error, has no descriptor more than before, and serves another guest.
"""

import contextlib
import os
import re
import socket
import struct
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tests.fuzz.programs"]):
    from tests.fuzz.programs import PATIENCE_S, Input, fuzz, play, settled
    from tests.rig.frontend import Frontend, RingMemory
from tests.rig.daemon import daemon
from tests.rig.waiting import until

CHECK_EVERY = 16
TX, NUM = 1, 256
COMMANDS = (b'{"command": "stats"}\n', b'{"command": "none"}\n', b"{}\n", b"[]\n", b"1\n", b'"stats"\n', b"\n", b"")
LINES = (
    b"GET /metrics HTTP/1.1\r\n", b"GET /healthz HTTP/1.0\r\n", b"HEAD /metrics HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n",
    b"GET /metrics?a=b HTTP/1.1\r\n", b"GET  HTTP/1.1\r\n", b"GET /metrics HTTP/2\r\n", b"\r\n",
)  # fmt: skip
FIELDS = (
    b"Accept: text/plain\r\n",
    b"Accept-Encoding: gzip\r\n",
    b"Accept: application/openmetrics-text;q=\r\n",
    b":\r\n",
    b" a\r\n",
)


class Neighbour:
    """A guest that does as it should, and whose frames must be taken."""

    def __init__(self, path: str) -> None:
        self.memory = RingMemory()
        self.frontend = Frontend.connect(path)
        self.frontend.negotiate()
        self.frontend.set_memory(self.memory)
        self.kick, _ = self.frontend.start_ring(TX, self.memory, NUM)
        ring = self.memory.ring_addr(TX, NUM)
        self.avail, self.used = ring.avail - self.memory.user_addr, ring.used - self.memory.user_addr
        at = 0x100000
        self.memory.map[at : at + 72] = bytes(12) + bytes((255,) * 6) + bytes((2, 0, 0, 0, 0, 9)) + bytes(48)
        place = ring.desc - self.memory.user_addr
        struct.pack_into("<QIHH", self.memory.map, place, self.memory.guest_addr + at, 72, 0, 0)
        self.sent = 0

    def send(self) -> None:
        self.sent = (self.sent + 1) % 65536
        struct.pack_into("<H", self.memory.map, self.avail + 2, self.sent)
        os.eventfd_write(self.kick, 1)
        until(lambda: struct.unpack_from("<H", self.memory.map, self.used + 2)[0] == self.sent)


class Doors:
    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.victim, good = str(directory / "victim.sock"), str(directory / "good.sock")
        words = ("--guest", f"victim,socket={self.victim},queues=2,poll=true", "--guest", f"good,socket={good}")
        # The fuzzer ends this process without a word to us; its daemon goes with it.
        ends = ("setpriv", "--pdeathsig", "KILL")
        self.daemon = stack.enter_context(daemon(directory, *words, "--metrics", "127.0.0.1:0", prefix=ends)).ready()
        found = self.daemon.until(lambda: re.search(r"metrics: http://([^:]+):(\d+)/", self.daemon.log))
        self.metrics = (found[1], int(found[2]))
        self.neighbour = Neighbour(good)
        self.runs = 0
        for door in (b"\0", b"\2", b"\3"):
            self.one(door)
        self.fds = settled(self.open_fds)

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def talk(self, sock: socket.socket, data: bytes) -> bytes:
        """Says it, and returns the answer, up to the end that the daemon makes."""
        answer = b""
        with sock, contextlib.suppress(ConnectionError):
            sock.settimeout(PATIENCE_S)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(1 << 16):
                answer += part
        return answer

    def one(self, data: bytes) -> None:
        given = Input(data)
        match given.take() % 4:
            case 2:
                how = given.take()
                words = COMMANDS[how % len(COMMANDS)] if how < 200 else given.take_bytes(64)
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(self.daemon.control)
                answer = self.talk(sock, words + given.take_bytes(given.take()) * (1 + given.take() % 64))
                if answer and not answer.endswith(b"\n"):
                    raise RuntimeError(f"half an answer: {answer[-80:]!r}")
            case 3:
                how = given.take()
                text = LINES[how % len(LINES)] if how < 200 else given.take_bytes(64)
                for _ in range(given.take() % 8):
                    how = given.take()
                    text += FIELDS[how % len(FIELDS)] if how < 200 else given.take_bytes(how - 199) * 64
                answer = self.talk(socket.create_connection(self.metrics), text + b"\r\n")
                if answer and not answer.startswith(b"HTTP/1."):
                    raise RuntimeError(f"no answer: {answer[:80]!r}")
            case _:
                with Frontend.connect(self.victim) as frontend:
                    play(data[1:], frontend)

    def check(self, data: bytes) -> None:
        self.one(data)
        self.runs += 1
        if self.daemon.process.poll() is not None:
            raise RuntimeError(f"the daemon has ended with {self.daemon.process.returncode}\n{self.daemon.log[-2000:]}")
        if self.runs % CHECK_EVERY:
            return
        if re.search("internal error|Traceback", self.daemon.log):
            raise RuntimeError(f"the daemon complains\n{self.daemon.log[-2000:]}")
        until(lambda: self.open_fds() <= self.fds, PATIENCE_S)
        self.neighbour.send()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix=f"xdpnet-fuzz-{os.getpid()}-") as scratch, contextlib.ExitStack() as stack:
        doors = Doors(Path(scratch), stack)
        fuzz(doors.check)


if __name__ == "__main__":
    main()
