"""A Linux guest in QEMU: how long a TCP ping-pong takes, what an idle guest costs, how soon a restarted daemon serves.

The guest runs on CPU 1, the backend's worker on CPU 0. Where sockperf's server at the far end runs changes much, and
the kernel's choice is another one each time: so there is a row for it, and one for either CPU.
sockperf gives half of the round trip. "tap" is QEMU's own virtio device on a tap that is bridged to the veth pair.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.lab import BACKEND_CPU, BACKENDS, CLIENT_CPU, MAC, WARM_UP_S, Contender, Lab, Row, Served, Values
from tests.native import compile_program
from tests.rig.waiting import until
from xdpnet.demo import await_listener, initramfs, process, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest

ADDRESS = topology.GUEST_ADDRESSES[0]
PORT = 11111
IDLE_S = 10.0
MIB = 1 << 20
TAP = "xdpntap"


@dataclass
class PinnedGuest(Guest):
    """On the clients' CPU, entering a namespace first, with more of a command line."""

    enter: Sequence[str] = ()
    more: Sequence[str] = ()

    def command(self) -> list[str]:
        return [*self.enter, "taskset", "-c", str(CLIENT_CPU), *super().command(), *self.more]


@contextmanager
def linux_guest(
    lab: Lab,
    net: topology.Topology,
    cards: Sequence[Card],
    number: int = 0,
    enter: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Iterator[Guest]:
    """Up, with an address, and reachable from the far end."""
    kernel = initramfs.find_kernel()
    programs = (*initramfs.PROGRAMS, "sockperf", str(compile_program("datagrams", lab.directory)))
    initrd = initramfs.build(kernel, lab.directory / "initramfs", programs)
    guest = PinnedGuest(lab.directory, kernel, initrd, cards, name=f"xdpn-bench{number}", enter=enter, more=more)
    address = topology.GUEST_ADDRESSES[number]
    with closing(guest.start()):
        guest.configure(address, topology.PREFIX)
        until(lambda: answers(net, address))
        yield guest


def answers(net: topology.Topology, address: str = ADDRESS) -> bool:
    try:
        net.far.run("busybox", "ping", "-c", "1", "-W", "1", address)
    except topology.CommandError:
        return False
    return True


@contextmanager
def served_guest(
    lab: Lab, contender: Contender, complete_checksums: bool = True
) -> Iterator[tuple[topology.Topology, Served, Guest]]:
    """With complete checksums from the far end, for DPDK passes partial ones on as they are."""
    with topology.topology() as net:
        if complete_checksums:
            net.far.run("ethtool", "-K", topology.FAR_IF, "tx", "off")
        with (
            contender(net, lab, [MAC], True) as served,
            linux_guest(lab, net, [Card(served.sockets[0], MAC)]) as guest,
        ):
            yield net, served, guest


@contextmanager
def taps(lab: Lab, macs: Sequence[str]) -> Iterator[tuple[topology.Topology, list[Guest]]]:
    """A guest for each address, each on a tap, and all on a bridge of the kernel with the veth pair."""
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        net.host.run("ip", "link", "add", "bridge", "type", "bridge")
        guests = []
        for number in range(len(macs)):
            net.host.run("ip", "tuntap", "add", f"{TAP}{number}", "mode", "tap")
        for interface in (*(f"{TAP}{number}" for number in range(len(macs))), topology.HOST_IF):
            net.host.run("ip", "link", "set", interface, "up", "master", "bridge")
        net.host.run("ip", "link", "set", "bridge", "up")
        for number, mac in enumerate(macs):
            tap = f"tap,id=tap,ifname={TAP}{number},script=no,downscript=no,vhost=off"
            card = ["-netdev", tap, "-device", f"virtio-net-pci,netdev=tap,mac={mac},romfile=,vectors=0"]
            guests.append(stack.enter_context(linux_guest(lab, net, [], number, net.host.command(), card)))
        yield net, guests


def ping_pong(lab: Lab, net: topology.Topology, guest: Guest, cpus: str) -> Values:
    serve = ["taskset", "-c", cpus, "sockperf", "server", "--tcp", "-i", topology.FAR_ADDRESS, "-p", str(PORT)]
    server = net.far.spawn(serve, lab.directory / "sockperf.log")
    try:
        await_listener(net.far, PORT)
        seconds = max(1, round(lab.seconds))
        said = guest.check(f"sockperf ping-pong --tcp -i {topology.FAR_ADDRESS} -p {PORT} -t {seconds}")
    finally:
        process.end(server)
    percentiles = {int(p): float(us) for p, us in re.findall(r"percentile (\d+)\.000\s*=\s*([\d.]+)", said)}
    return {"p50": percentiles[50], "p99": percentiles[99]}


def ping_pong_served(contender: Contender, cpus: str) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with served_guest(lab, contender) as (net, served, guest):
            before, started = process.cpu_seconds(served.pid), time.monotonic()
            values = ping_pong(lab, net, guest, cpus)
            used = process.cpu_seconds(served.pid) - before
            return values | {"cpu": used / (time.monotonic() - started) * 100}

    return measure


def ping_pong_tap(cpus: str) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with taps(lab, [MAC]) as (net, (guest,)):
            net.far.run("ethtool", "-K", topology.FAR_IF, "tx", "off")
            return ping_pong(lab, net, guest, cpus)

    return measure


def idle_cpu(contender: Contender) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with served_guest(lab, contender) as (_, served, _):
            time.sleep(WARM_UP_S)
            before = process.cpu_seconds(served.pid)
            time.sleep(IDLE_S)
            return {"cpu": (process.cpu_seconds(served.pid) - before) / IDLE_S * 100}

    return measure


def resident(lab: Lab) -> Values:
    with served_guest(lab, BACKENDS["xdpnet"]) as (_, served, _):
        return {"memory": process.resident_bytes(served.pid) / MIB}


def restart(lab: Lab) -> Values:
    """From the start of a daemon, its predecessor killed, to the guest's first answer."""
    with topology.topology() as net:
        socket = lab.directory / "guest.socket"
        arguments = ["--netdev", topology.HOST_IF, "--guest", f"guest,socket={socket},mac={MAC},client=true"]
        backend = Backend(net.host, lab.directory, arguments).start()
        try:
            with linux_guest(lab, net, [Card(Path(socket), MAC, server=True)]):
                backend.kill()
                started = time.monotonic()
                backend.start()
                return {"time": until(lambda: answers(net)) - started}
        finally:
            backend.stop()


ROWS = [
    *(
        Row(
            f"ping-pong{suffix}",
            f"sockperf TCP ping-pong of a Linux guest, server {place}",
            {"p50": "us, median", "p99": "us, 99th percentile", "cpu": "% of a core, backend"},
            {name: ping_pong_served(contender, cpus) for name, contender in BACKENDS.items()}
            | {"tap": ping_pong_tap(cpus)},
        )
        for suffix, place, cpus in (
            ("", "anywhere", f"{BACKEND_CPU},{CLIENT_CPU}"),
            ("-beside-backend", "beside the backend", str(BACKEND_CPU)),
            ("-beside-guest", "beside the guest", str(CLIENT_CPU)),
        )
    ),
    Row(
        "idle-cpu",
        "backend of an idle Linux guest",
        {"cpu": "% of a core"},
        {name: idle_cpu(contender) for name, contender in BACKENDS.items()},
    ),
    Row(
        "resident",
        "resident memory with a Linux guest, without the guest's own",
        {"memory": "MiB"},
        {"xdpnet": resident},
    ),
    Row("restart", "kill -9 and restart to the guest's first answer", {"time": "s"}, {"xdpnet": restart}),
]
