"""System calls of a live daemon that fail, or are interrupted: it goes on, and afterwards everything is as before.

strace attaches to the daemon and answers some calls in the kernel's place (`-e inject`). Meanwhile a frontend comes and
goes, two neighbours talk, frames go to the wire, somebody asks for statistics. Whatever of that fails, fails cleanly.
For short reads see virtq/test_connection.py: requests come byte by byte there. Only threads that are ours are tried:
pyroute2 has one for each question, and keeps descriptors if it cannot watch them.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.rig import frontend, needs
from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.descriptors import open_files
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.netns import Veth, needs_root, veth
from tests.rig.remote import RefusedError, RemoteGuest
from tests.rig.rings import MODERN
from tests.rig.waiting import eventually, until, until_equal
from xdpnet.errors import ControlError
from xdpnet.virtq.message import Request, VringState

pytestmark = [needs_root, pytest.mark.net, needs.program("strace", "strace")]

PATIENCE_S = 1.5
WORKER, CONTROL = "worker", "control thread"
FAILURES = [
    ("epoll_wait", "EINTR", "1+2", CONTROL),
    ("epoll_wait", "EINTR", "1+2", WORKER),
    ("sendto", "ENOBUFS", "1+2", WORKER),
    ("sendto", "EAGAIN", "1+2", WORKER),
    ("sendto", "EBUSY", "1+3", WORKER),
    ("sendto", "EIO", "1+3", WORKER),
    ("recvmmsg", "EINTR", "1+2", WORKER),
    ("recvmmsg", "ENOBUFS", "1+2", WORKER),
    ("recvmsg", "EINTR", "1+2", CONTROL),
    ("recvmsg", "EAGAIN", "1+2", CONTROL),
    ("recvmsg", "EIO", "3+4", CONTROL),
    ("recvmsg", "ENOBUFS", "5+4", CONTROL),
    ("sendto", "EINTR", "1+2", CONTROL),
    ("sendto", "EPIPE", "2+5", CONTROL),
    ("accept4", "EINTR", "1+2", CONTROL),
    ("accept4", "ECONNABORTED", "1+2", CONTROL),
    ("accept4", "EMFILE", "1+2", CONTROL),
    ("accept4", "EIO", "1+2", CONTROL),
    ("mmap", "ENOMEM", "1+2", CONTROL),
    ("fcntl", "EMFILE", "2+3", CONTROL),
    ("epoll_ctl", "ENOSPC", "1+3", CONTROL),
    ("epoll_ctl", "ENOMEM", "2+3", CONTROL),
    ("bpf", "ENOMEM", "1+2", CONTROL),
    ("bpf", "EPERM", "1", CONTROL),
    ("getsockopt", "EIO", "1+2", CONTROL),
    ("getsockopt", "ENOBUFS", "2+3", CONTROL),
    ("readlink", "EIO", "1+3", CONTROL),
    ("fstatfs", "EIO", "1+2", CONTROL),
    ("madvise", "ENOMEM", "1+2", CONTROL),
]

# Calls that ask about a descriptor which is there cannot fail: if one does, the connection ends with a traceback.
UNFORESEEN = ("readlink", "fstatfs", "fcntl")


@dataclass
class Scene:
    """A daemon, an interface, two guests that talk, and the socket of one that comes and goes."""

    daemon: Daemon
    wire: Veth
    one: RemoteGuest
    two: RemoteGuest
    path: Path
    usual: list[str] = field(default_factory=list)  # descriptors, while nobody is on a visit

    @property
    def pid(self) -> int:
        return self.daemon.process.pid

    def worker(self) -> int:
        return self.daemon.snapshot().workers[0].tid

    def descriptors(self) -> list[str]:
        """Kinds of them: which sockets the interface has may have changed."""
        links = open_files(self.pid).values()
        return sorted(link.partition(":[")[0] if link.startswith("socket") else link for link in links)

    def internal_errors(self) -> int:
        port = self.daemon.port("visitor")
        assert port.guest is not None
        return port.guest.errors.get("internal", 0)

    def settled(self) -> list[str]:
        """Once they no longer change."""
        seen, before = self.descriptors(), [""]
        while seen != before:
            time.sleep(0.3)
            seen, before = self.descriptors(), seen
        return seen

    def neighbours_talk(self) -> None:
        for sender, taker, numbers in ((self.one, self.two, (1, 2)), (self.two, self.one, (2, 1))):
            taker.pair.packets()
            taker.pair.fill()
            sent = frame(mac(numbers[1]), mac(numbers[0]), mark=os.urandom(8))
            sender.pair.send(sent)
            assert sent in until_received(taker, sent)
            assert sender.pair.wait_sent()

    def visit(self, number: int) -> None:
        """A frontend comes, its guest sends to everybody, and both are gone."""
        with RemoteGuest(self.path, MODERN) as visitor:
            visitor.start()
            visitor.pair.fill()
            visitor.pair.send(frame(BROADCAST, mac(number)))
            visitor.pair.wait_sent(PATIENCE_S)
            visitor.frontend.ask(Request.GET_VRING_BASE, VringState(1, 0))


def until_received(taker: RemoteGuest, wanted: bytes) -> list[bytes]:
    got: list[bytes] = []

    def look() -> bool:
        got.extend(packet.frame for packet in taker.pair.packets())
        return wanted in got

    eventually(look)
    return got


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("scene")
    with ExitStack() as stack:
        wire = stack.enter_context(veth())
        guests = [guest(directory, f"g{n}", f",mac={mac(n).hex(':')}") for n in (1, 2)]
        words = [word for each in (*guests, guest(directory, "visitor")) for word in ("--guest", each)]
        running = stack.enter_context(daemon(directory, *words, "--netdev", wire.ifname))
        running.ready()
        one, two = (stack.enter_context(RemoteGuest(directory / f"g{n}.sock", MODERN)).start() for n in (1, 2))
        made = Scene(running, wire, one, two, directory / "visitor.sock")
        made.visit(3)
        made.neighbours_talk()
        made.usual = made.settled()
        yield made
        assert running.end() == 0


@contextmanager
def failing(scene: Scene, log: Path, call: str, error: str, when: str, thread: str) -> Iterator[None]:
    """Calls that `when` chooses fail, for as long as the block runs; strace(1) has the syntax."""
    who = ["-p", str(scene.worker() if thread == WORKER else scene.pid)]
    command = ["strace", *who, "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.stderr.read()


@pytest.mark.parametrize(("call", "error", "when", "thread"), FAILURES, ids=lambda word: word)
def test_d26_a_call_that_fails_ends_no_more_than_its_connection(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: str, when: str, thread: str
) -> None:
    monkeypatch.setattr(frontend, "PATIENCE_S", PATIENCE_S)
    log, internal = tmp_path / "calls", scene.internal_errors()
    with failing(scene, log, call, error, when, thread):
        for number in range(3):
            with contextlib.suppress(OSError, RefusedError, ControlError):
                scene.visit(10 + number)
            with contextlib.suppress(OSError, ControlError):
                scene.daemon.snapshot()
            scene.one.pair.send(frame(BROADCAST, mac(1)))
            with contextlib.suppress(OSError), scene.wire.wire() as far:
                far.send(frame(BROADCAST, scene.wire.peer_mac))
    assert "(INJECTED)" in log.read_text()
    assert scene.daemon.process.poll() is None, scene.daemon.log
    monkeypatch.undo()
    # A socket that could not be accepted from is looked at again after a while.
    until(lambda: works(scene))
    scene.neighbours_talk()
    until_equal(scene.descriptors, scene.usual)
    assert call in UNFORESEEN or scene.internal_errors() == internal
    scene.daemon.until(lambda: scene.daemon.snapshot().totals.rest == 0, "balance")
    assert scene.daemon.snapshot().totals.frames_in


def works(scene: Scene) -> bool:
    try:
        scene.visit(3)
    except (OSError, RefusedError):
        return False
    return True
