"""A guest that is moved to another host and back, while it talks.

    far (nc, ping) -- bridge -- far0 === here0 -- xdpnet "here"  -- QEMU  --+
                        |                                                  | a UNIX socket
                        `------ far1 === there0 -- xdpnet "there" -- QEMU --+

Two daemons and two QEMUs on one machine: what is moved is what would be between two.
"""

import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.rig import needs, newer
from tests.rig.netns import call_in
from tests.rig.qmp import Qmp
from tests.rig.waiting import PATIENCE_S, until
from xdpnet.demo import initramfs, process, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest, Qemu, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(600)]

MAC = "52:54:00:78:66:0e"
ADDRESS = topology.GUEST_ADDRESSES[0]
HOSTS = ("here", "there")


@dataclass
class Stage:
    directory: Path
    far: topology.Namespace
    backends: dict[str, Backend]
    stack: ExitStack
    kernel: initramfs.Kernel
    qemu: Qemu
    packed: bool
    guest: Guest = field(init=False)  # where it runs now
    qmp: Qmp = field(init=False)
    moves: int = 0

    def boot(self) -> None:
        initrd = initramfs.build(self.kernel, self.directory / "initramfs")
        self.accel = best_accelerator(self.kernel, initrd, self.directory)
        self.guest, self.qmp = self._start("here")
        self.backends["here"].await_guest("guest")
        self.guest.configure(ADDRESS, topology.PREFIX)

    def _start(self, host: str, incoming: str = "") -> tuple[Guest, Qmp]:
        name = f"xdpn-{host}-{self.moves}"
        monitor = self.directory / f"{name}.qmp"
        card = Card(self.directory / f"{host}.socket", MAC, packed=self.packed)
        options = ["-qmp", f"unix:{monitor},server=on,wait=off"]
        initrd = self.directory / "initramfs"
        guest = Guest(
            self.directory, self.kernel, initrd, [card], self.accel, name=name, qemu=self.qemu, options=options
        )
        guest.incoming = incoming
        self.stack.enter_context(closing(guest.start()))
        return guest, self.stack.enter_context(Qmp(monitor))

    def move(self, host: str) -> None:
        """To there, live."""
        self.moves += 1
        channel = f"unix:{self.directory}/channel{self.moves}"
        guest, qmp = self._start(host, channel)
        self.qmp.run("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=1000)
        self.qmp.run("migrate", uri=channel)
        ended: dict[str, object] = {}

        def has_ended() -> bool:
            ended.update(self.qmp.run("query-migrate"))
            return ended["status"] in ("completed", "failed", "cancelled")

        until(has_ended, 4 * PATIENCE_S)
        assert ended["status"] == "completed", ended
        until(lambda: qmp.run("query-status")["status"] == "running")
        # The shell, too, goes on where it was.
        guest._next_id = self.guest._next_id
        self.guest.close()
        self.guest, self.qmp = guest, qmp

    def listen(self, port: int) -> socket.socket:
        listener = call_in(self.far.path, lambda: socket.create_server((topology.FAR_ADDRESS, port)))
        listener.settimeout(PATIENCE_S)
        return self.stack.enter_context(listener)


@pytest.fixture(params=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "packed")


@pytest.fixture(params=["debian", pytest.param("newer", marks=needs.newer_guest)])
def qemu(request: pytest.FixtureRequest) -> tuple[Qemu, initramfs.Kernel]:
    if request.param == "newer":
        return newer.qemu(), newer.kernel()
    return Qemu(), initramfs.find_kernel()


@pytest.fixture
def stage(tmp_path: Path, packed: bool, qemu: tuple[Qemu, initramfs.Kernel]) -> Iterator[Stage]:
    with ExitStack() as stack:
        far = stack.enter_context(topology.namespace())
        far.run("ip", "link", "add", "br0", "type", "bridge")
        far.run("ip", "address", "add", f"{topology.FAR_ADDRESS}/{topology.PREFIX}", "dev", "br0")
        backends: dict[str, Backend] = {}
        for number, name in enumerate(HOSTS):
            host = stack.enter_context(topology.namespace())
            peer = ("type", "veth", "peer", "name", f"far{number}", "netns", str(far.path))
            host.run("ip", "link", "add", f"{name}0", *peer)
            host.run("ip", "link", "set", f"{name}0", "up")
            far.run("ip", "link", "set", f"far{number}", "master", "br0")
            far.run("ip", "link", "set", f"far{number}", "up")
            words = ["--netdev", f"{name}0", "--guest", f"guest,socket={tmp_path}/{name}.socket"]
            backends[name] = Backend(host, tmp_path, words, name).start()
            stack.callback(backends[name].stop)
        far.run("ip", "link", "set", "br0", "up")
        made = Stage(tmp_path, far, backends, stack, qemu[1], qemu[0], packed)
        made.boot()
        yield made


class Download:
    """A stream into the guest, until it is told to end; the guest adds it up."""

    def __init__(self, stage: Stage, port: int) -> None:
        self._stage = stage
        self._sum = hashlib.md5(usedforsecurity=False)
        self._end = threading.Event()
        self.sent = 0
        listener = stage.listen(port)
        stage.guest.check(
            f"(nc {topology.FAR_ADDRESS} {port} </dev/null | md5sum >/tmp/sum; touch /tmp/ended) >/dev/null 2>&1 &"
        )
        self._connection = listener.accept()[0]
        self._connection.settimeout(4 * PATIENCE_S)
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        dice = random.Random(1)
        with self._connection, suppress(OSError):
            while not self._end.is_set():
                data = dice.randbytes(20000)
                self._connection.sendall(data)
                self._sum.update(data)
                self.sent += len(data)

    def is_right(self) -> bool:
        self._end.set()
        self._thread.join()
        self._stage.guest.check("for i in $(seq 600); do [ -e /tmp/ended ] && break; sleep 0.1; done", timeout=120)
        return self._stage.guest.check("cat /tmp/sum").split()[0] == self._sum.hexdigest()


class Upload:
    """Numbers from the guest, one after another."""

    def __init__(self, stage: Stage, port: int) -> None:
        listener = stage.listen(port)
        stage.guest.check(f"(seq 1 100000000 | nc {topology.FAR_ADDRESS} {port}) >/dev/null 2>&1 &")
        connection = stage.stack.enter_context(listener.accept()[0])
        connection.settimeout(4 * PATIENCE_S)
        self._lines = stage.stack.enter_context(connection.makefile("r"))
        self._next = 1

    def goes_on(self, lines: int) -> bool:
        """So many more are as they should be."""
        for line in self._lines:
            if int(line) != self._next:
                return False
            self._next += 1
            lines -= 1
            if not lines:
                return True
        return False


def test_a_guest_that_is_moved_there_and_back_goes_on_talking(stage: Stage) -> None:
    """Of what it receives and sends no byte is lost or another, and it answers from where it is."""
    log = stage.directory / "ping.log"
    ping = stage.far.spawn(["busybox", "ping", ADDRESS], log)
    stage.stack.callback(process.end, ping)

    def answers() -> int:
        return log.read_text().count("bytes from")

    until(answers)
    download, upload = Download(stage, 7000), Upload(stage, 7001)
    assert upload.goes_on(10000)
    for host in "there", "here":
        sent = download.sent
        until(lambda sent=sent: download.sent > sent + (1 << 20))  # type: ignore[misc]
        stage.move(host)
        before, sent = answers(), download.sent
        assert upload.goes_on(200000)
        until(lambda before=before: answers() > before)  # type: ignore[misc]
        until(lambda sent=sent: download.sent > sent + (1 << 22))  # type: ignore[misc]
    assert download.is_right()
    assert "DUP!" not in log.read_text()
    for backend in stage.backends.values():
        counted = [guest.errors for port in backend.snapshot().ports if (guest := port.guest)]
        assert not any(number for errors in counted for number in errors.values())
