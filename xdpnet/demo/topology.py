"""Two network namespaces joined by a veth pair, so that nothing touches the machine's own network.

      host namespace                 far namespace
    +------------------+           +------------------+
    | xdpnet -- xdpn0 -|-- veth ---|- far0            |
    |   |              |           |  iperf3 -s       |
    |  socket          |           +------------------+
    +---|--------------+
      QEMU guest

A namespace lives as long as the process that holds it, and that dies with us: no interface outlives a crash.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from xdpnet.demo import process
from xdpnet.errors import SetupError

HOST_IF, FAR_IF = "xdpn0", "far0"
FAR_ADDRESS, HOST_ADDRESS = "10.77.0.1", "10.77.0.2"
GUEST_ADDRESSES = tuple(f"10.77.0.{10 + number}" for number in range(16))
PREFIX = 24


class CommandError(SetupError):
    """A command in a namespace failed."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace, by its file."""

    path: Path

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", f"--net={self.path}", *arguments]

    def run(self, *arguments: str, timeout: float = 60.0) -> str:
        """Run a command to its end; its output."""
        done = subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise CommandError(
                f"{' '.join(arguments)}: status {done.returncode}: {(done.stderr or done.stdout).strip()}"
            )
        return done.stdout

    def spawn(self, arguments: Sequence[str], log: Path) -> process.Process:
        return process.spawn(self.command(*arguments), log)

    def counters(self, interface: str) -> dict[str, dict[str, int]]:
        """The interface's own counters: ["rx"]["packets"] and so on."""
        (link,) = json.loads(self.run("ip", "-j", "-s", "link", "show", "dev", interface))
        counters: dict[str, dict[str, int]] = link["stats64"]
        return counters


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A new network namespace with its loopback up and no IPv6, for as long as the block runs.

    It has no name: a sleeping process holds it open.
    """
    holder = process.spawn(["unshare", "--net", "sleep", "infinity"], Path(os.devnull))
    try:
        _until_unshared(holder)
        made = Namespace(Path(f"/proc/{holder.pid}/ns/net"))
        # Frames that nobody asked for, such as router solicitations, would blur the counts.
        made.run("sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
        made.run("ip", "link", "set", "lo", "up")
        yield made
    finally:
        holder.kill()
        holder.wait()


def _until_unshared(holder: process.Process, patience: float = 20.0) -> None:
    own = os.stat("/proc/self/ns/net").st_ino
    deadline = time.monotonic() + patience
    while holder.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(f"/proc/{holder.pid}/ns/net").st_ino != own:
                return
        time.sleep(0.005)
    raise SetupError("cannot make a network namespace", "run as root, on a kernel with CONFIG_NET_NS")


@dataclass(frozen=True)
class Topology:
    host: Namespace
    far: Namespace

    def ping(self, address: str, count: int = 5) -> str:
        """Ping from the far end; busybox's, so that no package of its own is needed."""
        return self.far.run("busybox", "ping", "-c", str(count), "-W", "10", address)


@contextmanager
def topology(queues: int = 1, mtu: int = 1500) -> Iterator[Topology]:
    """Both namespaces, the veth pair between them and the addresses of its ends."""
    with ExitStack() as stack:
        host, far = stack.enter_context(namespace()), stack.enter_context(namespace())
        shape = ("mtu", str(mtu), "numrxqueues", str(queues), "numtxqueues", str(queues))
        peer = ("type", "veth", "peer", "name", FAR_IF, "netns", str(far.path))
        host.run("ip", "link", "add", HOST_IF, *shape, *peer, *shape)
        for where, interface, address in ((host, HOST_IF, HOST_ADDRESS), (far, FAR_IF, FAR_ADDRESS)):
            where.run("ip", "address", "add", f"{address}/{PREFIX}", "dev", interface)
            where.run("ip", "link", "set", interface, "up")
        yield Topology(host, far)
