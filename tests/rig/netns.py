"""Veth pairs into network namespaces of our own, for tests.

      this namespace                 namespace xdpn<pid>n<k>
    +----------------+             +-------------------------+
    |  xdpn<pid>v<k> |-------------| eth0   (frames, stack)  |
    +----------------+    veth     +-------------------------+

Everything is removed at the end of the `with`, and at the latest by the next run: names carry the process id, and what
belongs to none that lives is swept away. IPv6 is off, so that nothing but a test makes frames.
"""

import functools
import itertools
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyroute2.netns
import pytest

from tests.rig.waiting import PATIENCE_S
from xdpnet.demo import topology

T = TypeVar("T")

PREFIX = "xdpn"
RUN = Path("/run/netns")
ETH_P_ALL = 3
PACKET_IGNORE_OUTGOING = 23
_numbers = itertools.count()

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes interfaces and network namespaces")


def command(*words: str) -> str:
    """Run to its end; what it says on failure is in the exception."""
    result = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    if result.returncode:
        raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def call_in(namespace: Path, function: Callable[[], T]) -> T:
    """Call it in a thread that is in the namespace; sockets opened there stay there."""

    def inside() -> T:
        pyroute2.netns.setns(str(namespace))
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(inside).result()


@dataclass(frozen=True)
class Named(topology.Namespace):
    """A network namespace that `ip` knows by a name."""

    @property
    def name(self) -> str:
        return self.path.name

    def popen(self, *words: str) -> "subprocess.Popen[str]":
        """The caller ends it."""
        return subprocess.Popen(self.command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def call(self, function: Callable[[], T]) -> T:
        return call_in(self.path, function)


@dataclass(frozen=True)
class Veth:
    """A pair: ifname is here, with no address; peer is in the namespace, with address and prefix length 24."""

    ifname: str
    mac: bytes
    namespace: Named
    peer: str
    peer_mac: bytes
    address: str

    def wire(self) -> "Wire":
        """Frames as they are, at the far end."""
        return Wire(self.namespace.call(lambda: packet_socket(self.peer)))


class Wire:
    """Sends and receives whole Ethernet frames."""

    def __init__(self, raw: socket.socket) -> None:
        self._socket = raw

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def receive(self, wanted: Callable[[bytes], bool] = lambda _: True, timeout: float = PATIENCE_S) -> bytes | None:
        """The next wanted frame, or None."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                frame = self._socket.recv(65536)
            except TimeoutError:
                return None
            if wanted(frame):
                return frame
        return None

    def receive_all(self) -> list[bytes]:
        """What comes, until nothing has for a moment."""
        frames: list[bytes] = []
        while (frame := self.receive(timeout=0.1 if frames else PATIENCE_S)) is not None:
            frames.append(frame)
        return frames

    def count(self, wanted: Callable[[bytes], bool], expected: int, timeout: float = PATIENCE_S) -> int:
        """How many wanted frames come, until the expected number has, and a moment longer for surplus ones."""
        seen = 0
        while seen < expected and self.receive(wanted, timeout) is not None:
            seen += 1
        while self.receive(wanted, 0.1) is not None:
            seen += 1
        return seen


class Held:
    """The far end forwards to a link that lets next to nothing through, until release()."""

    def __init__(self, pair: Veth) -> None:
        self._run = pair.namespace.run
        self._run("ip", "link", "add", "hold0", "type", "veth", "peer", "name", "hold1")
        self._run("ip", "link", "add", "hold", "type", "bridge")
        for name in "eth0", "hold0":
            self._run("ip", "link", "set", name, "master", "hold")
        for name in "hold0", "hold1", "hold":
            self._run("ip", "link", "set", name, "up")
        # The burst lets one frame of full size through.
        shape = ("tbf", "rate", "8bit", "burst", "1600", "limit", "10mb")
        self._run("tc", "qdisc", "replace", "dev", "hold0", "root", *shape)

    def release(self) -> None:
        self._run("tc", "qdisc", "del", "dev", "hold0", "root")


def packet_socket(ifname: str) -> socket.socket:
    """Every frame that an interface of this namespace receives."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setsockopt(263, PACKET_IGNORE_OUTGOING, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    raw.bind((ifname, ETH_P_ALL))
    return raw


@contextmanager
def namespace() -> Iterator[Named]:
    sweep()
    made = Named(RUN / f"{PREFIX}{os.getpid()}n{next(_numbers)}")
    command("ip", "netns", "add", made.name)
    try:
        made.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        command("ip", "-n", made.name, "link", "set", "lo", "up")
        yield made
    finally:
        command("ip", "netns", "del", made.name)


@contextmanager
def veth(queues: int = 1, mtu: int = 1500, address: str = "10.99.0.1") -> Iterator[Veth]:
    """A pair, both ends up, with so many queues each way."""
    with ExitStack() as undo:
        space = undo.enter_context(namespace())
        ifname = f"{PREFIX}{os.getpid()}v{next(_numbers)}"
        undo.callback(remove, ifname)
        add_veth(ifname, space, queues, mtu)
        command("ip", "-n", space.name, "address", "add", f"{address}/24", "dev", "eth0")
        yield Veth(ifname, mac_of(ifname), space, "eth0", space.call(functools.partial(mac_of, "eth0")), address)


def add_veth(ifname: str, space: Named, queues: int = 1, mtu: int = 1500) -> None:
    """Also to make one again after it was deleted."""
    sizes = ("numrxqueues", str(queues), "numtxqueues", str(queues), "mtu", str(mtu))
    command("ip", "link", "add", ifname, *sizes, "type", "veth", "peer", "eth0", *sizes, "netns", space.name)
    Path(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6").write_text("1")
    command("ip", "link", "set", ifname, "up")
    command("ip", "-n", space.name, "link", "set", "eth0", "up")


def remove(ifname: str) -> None:
    """An interface that a test may have removed itself."""
    if ifname in (name for _, name in socket.if_nameindex()):
        command("ip", "link", "del", ifname)


def mac_of(ifname: str) -> bytes:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.bind((ifname, 0))
        return bytes(raw.getsockname()[4])


def sweep() -> None:
    """Remove what runs that died left behind."""
    for name in (name for _, name in socket.if_nameindex()):
        if _orphan(name):
            remove(name)
    for line in command("ip", "netns", "list").splitlines():
        if _orphan(line.split()[0]):
            command("ip", "netns", "del", line.split()[0])


def _orphan(name: str) -> bool:
    found = re.fullmatch(rf"{PREFIX}(\d+)[nv]\d+", name)
    return found is not None and not Path("/proc", found[1]).exists()
