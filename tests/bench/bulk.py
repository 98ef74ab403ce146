"""Linux guests in QEMU: how much TCP carries, to the far end of a veth pair, from it, and between two guests.

Guests run on CPU 1 under emulation, the worker on CPU 0. What the far end sends has partial checksums, as veth
has them, but for DPDK, which passes them on as they are. "tap" is QEMU's own virtio device on taps of a kernel bridge.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from tests.bench.lab import BACKENDS, GENERIC, MAC, PEER_MAC, Contender, Lab, Row, Values
from tests.bench.latency import linux_guest, taps
from tests.rig.netns import call_in
from xdpnet.demo import await_listener, iperf_client, process, topology
from xdpnet.demo.guest import Card, Guest

UNITS = {"rate": "Gb/s", "retransmits": "segments sent again", "cpu": "% of a core per Gb/s, backend"}
SECONDS = 4
DATAGRAMS, DATAGRAM_BYTES, DISCARD = 800, 100, 9
MACS = (MAC, PEER_MAC)

# Guests with the backend's process id, if it is a process of its own.
Scene = Callable[[Lab, int], AbstractContextManager[tuple[topology.Topology, list[Guest], int | None]]]


def served(contender: Contender, complete_checksums: bool = False) -> Scene:
    @contextmanager
    def scene(lab: Lab, guests: int) -> Iterator[tuple[topology.Topology, list[Guest], int | None]]:
        with ExitStack() as stack:
            net = stack.enter_context(topology.topology())
            if complete_checksums:
                net.far.run("ethtool", "-K", topology.FAR_IF, "tx", "off")
            backend = stack.enter_context(contender(net, lab, MACS[:guests], True))
            made = [
                stack.enter_context(linux_guest(lab, net, [Card(path, mac)], number))
                for number, (path, mac) in enumerate(zip(backend.sockets, MACS, strict=False))
            ]
            yield net, made, backend.pid

    return scene


@contextmanager
def tapped(lab: Lab, guests: int) -> Iterator[tuple[topology.Topology, list[Guest], int | None]]:
    with taps(lab, MACS[:guests]) as (net, made):
        yield net, made, None


def client(guest: Guest, server: str, flags: str, pid: int | None) -> Values:
    before, started = process.cpu_seconds(pid) if pid else 0.0, time.monotonic()
    end = iperf_client(guest, server, f"-t {SECONDS} {flags}", SECONDS)
    values = {"rate": end["sum_received"]["bits_per_second"] / 1e9, "retransmits": end["sum_sent"]["retransmits"]}
    if pid:
        used = (process.cpu_seconds(pid) - before) / (time.monotonic() - started) * 100
        values["cpu"] = used / values["rate"]
    return values


def with_far_end(scene: Scene, reverse: bool, streams: int = 1) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with scene(lab, 1) as (net, (guest,), pid):
            server = net.far.spawn(["iperf3", "-s", "-1", "-B", topology.FAR_ADDRESS], lab.directory / "iperf3.log")
            try:
                await_listener(net.far, 5201)
                flags = f"-P {streams} {'-R' if reverse else ''}"
                return client(guest, topology.FAR_ADDRESS, flags, pid)
            finally:
                process.end(server)

    return measure


def between_guests(scene: Scene) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with scene(lab, 2) as (_, (one, two), pid):
            two.check("iperf3 -s -D")
            time.sleep(1)
            return client(one, topology.GUEST_ADDRESSES[1], "", pid)

    return measure


def arrived(guest: Guest) -> int:
    """Datagrams so far, to ports where nobody listens."""
    return int(guest.check("awk '/^Udp:/ && ++n == 2 {print $3}' /proc/net/snmp"))  # NoPorts


def burst(scene: Scene) -> Callable[[Lab], Values]:
    """Datagrams that the far end sends as fast as it can."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(DATAGRAMS):
                with suppress(ConnectionRefusedError):
                    sender.sendto(bytes(DATAGRAM_BYTES), (topology.GUEST_ADDRESSES[0], DISCARD))

    def measure(lab: Lab) -> Values:
        with scene(lab, 1) as (net, (guest,), _):
            before = arrived(guest)
            call_in(net.far.path, send)
            time.sleep(1)
            return {"received": arrived(guest) - before}

    return measure


def burst_between_guests(scene: Scene) -> Callable[[Lab], Values]:
    """Datagrams that a guest sends as fast as it can; both have the one CPU."""

    def measure(lab: Lab) -> Values:
        with scene(lab, 2) as (_, (one, two), _):
            address = topology.GUEST_ADDRESSES[1]
            one.check(f"ping -c 1 -W 5 {address}")
            before = arrived(two)
            one.check(f"datagrams send ::ffff:{address} {DISCARD} 0 $(yes {DATAGRAM_BYTES} | head -n {DATAGRAMS})")
            time.sleep(1)
            return {"received": arrived(two) - before}

    return measure


SCENES: dict[str, Scene] = {
    "xdpnet": served(BACKENDS["xdpnet"]),
    "DPDK": served(BACKENDS["DPDK"], complete_checksums=True),
    "tap": tapped,
}
# It sees what the far end's TCP has not cut yet.
GENERIC_SCENES = {name: served(contender) for name, contender in GENERIC.items()}

ROWS = [
    Row(
        "tcp-guest-to-host",
        "TCP of a Linux guest to the far end",
        UNITS,
        {name: with_far_end(scene, reverse=False) for name, scene in SCENES.items()},
    ),
    Row(
        "tcp-host-to-guest",
        "TCP from the far end to a Linux guest",
        UNITS,
        {name: with_far_end(scene, reverse=True) for name, scene in (SCENES | GENERIC_SCENES).items()},
    ),
    Row(
        "tcp-guest-to-guest",
        "TCP between two Linux guests",
        UNITS,
        {name: between_guests(SCENES[name]) for name in ("xdpnet", "tap")},
    ),
    *(
        Row(
            f"tcp-{way}-{streams}",
            f"{streams} flows of TCP {title}",
            UNITS,
            {name: with_far_end(SCENES[name], way == "host-to-guest", streams) for name in ("xdpnet", "tap")},
        )
        for way, title in (
            ("host-to-guest", "from the far end to a Linux guest"),
            ("guest-to-host", "of a Linux guest to the far end"),
        )
        for streams in (16, 32, 128)
    ),
    Row(
        "burst",
        f"{DATAGRAMS} datagrams at once to a Linux guest with a ring of 256",
        {"received": "datagrams"},
        {name: burst(SCENES[name]) for name in ("xdpnet", "tap")},
    ),
    Row(
        "burst-guest-to-guest",
        f"{DATAGRAMS} datagrams at once of a Linux guest to another",
        {"received": "datagrams"},
        {name: burst_between_guests(SCENES[name]) for name in ("xdpnet", "tap")},
    ),
]
