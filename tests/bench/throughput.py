"""Frames per second: DPDK's virtio-user as the guest, every ring layout, and the wire's own limit.

Rows ending in "-unordered" do without VIRTIO_F_IN_ORDER, "-packed" have packed rings; the others are split, in order.
"""

import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from tests.bench.lab import (
    BACKEND_CPU,
    BACKENDS,
    CLIENT_CPU,
    MAC,
    PEER_MAC,
    ZEROCOPY,
    Contender,
    Lab,
    Row,
    Values,
    rate,
    reflector,
)
from tests.rig.dpdk import SEGMENT, Pmd, frames
from xdpnet.demo import process, topology

RAW = Path(__file__).with_name("rawtx.c")
UNITS = {"rate": "M/s", "cycles": "cycles/packet"}
LAYOUTS = {"": ("split, in order", ""), "-unordered": ("split", ",in_order=0"), "-packed": ("packed", ",packed_vq=1")}
SETTLE_S = 1.0  # before frames that bounce: what is lost while a backend opens its sockets anew is lost for good
SIZES = (64, 256, 512, 1500, 4000, 9000)


def card(number: int, path: Path, mac: str, layout: str = "") -> str:
    return f"net_virtio_user{number},path={path},queues=1,queue_size=1024,mac={mac}{layout}"


def bursts(length: int) -> str:
    """How many bursts of 32 frames fill most of a receive ring, for they bounce for ever if none is lost."""
    return "8" if length <= SEGMENT else "4"


def check_length(client: Pmd, length: int) -> None:
    """The client did as it was told."""
    stats = client.stats()
    if round(stats.tx_bytes / max(1, stats.tx_packets)) != length:  # the two are not read at once
        raise ChildProcessError(f"frames of {stats.tx_bytes / max(1, stats.tx_packets):g} bytes, not {length}")


def guest_to_veth(contender: Contender, length: int) -> Callable[[Lab], Values]:
    """From a guest to the far end of a veth pair."""

    def measure(lab: Lab) -> Values:
        options = ["--forward-mode=txonly", *frames(length)]
        with (
            topology.topology() as net,
            contender(net, lab, [MAC], True) as served,
            Pmd(
                "client", lab.directory, [card(0, served.sockets[0], MAC)], options, cpu=CLIENT_CPU, huge=lab.huge
            ) as client,
        ):
            client.await_link()
            client.command("start")
            values = rate(lambda: net.far.counters(topology.FAR_IF)["rx"]["packets"], lab, served)
            check_length(client, length)
            return values

    return measure


def raw(length: int, back: bool = False) -> Callable[[Lab], Values]:
    """The limit: one AF_XDP socket that sends the same frames from aligned memory, and no guest; or sends back what the
    reflector sends back.
    """

    def measure(lab: Lab) -> Values:
        program = lab.directory / "rawtx"
        subprocess.run(["gcc", "-O2", "-o", str(program), str(RAW)], check=True)
        with topology.topology() as net, reflector(net, lab) if back else nullcontext():
            command = ["taskset", "-c", str(BACKEND_CPU), str(program), topology.HOST_IF, str(length)]
            sender = net.host.spawn([*command, *(["back"] if back else [])], lab.directory / "rawtx.log")
            try:
                return rate(lambda: net.far.counters(topology.FAR_IF)["rx"]["packets"], lab)
            finally:
                process.end(sender)

    return measure


def veth_and_back(contender: Contender, length: int) -> Callable[[Lab], Values]:
    """From a guest to the far end, reflected there, back to the guest, which sends it again."""

    def measure(lab: Lab) -> Values:
        # A bridge delivers by address: so the far end swaps the two, and the guest sets them anew ("mac").
        options = ["--forward-mode=mac", f"--eth-peer=0,{PEER_MAC}", *frames(length)]
        with (
            topology.topology() as net,
            reflector(net, lab),
            contender(net, lab, [MAC], True) as served,
            Pmd(
                "client", lab.directory, [card(0, served.sockets[0], MAC)], options, cpu=CLIENT_CPU, huge=lab.huge
            ) as client,
        ):
            client.await_link()
            time.sleep(SETTLE_S)
            client.command(f"start tx_first {bursts(length)}")
            values = rate(lambda: client.stats().rx_packets, lab, served)
            check_length(client, length)
            return values

    return measure


def guest_to_guest(contender: Contender, length: int, layout: str = "") -> Callable[[Lab], Values]:
    """Each way between two ports of one guest, bounced for ever."""

    def measure(lab: Lab) -> Values:
        options = ["--forward-mode=io", f"--eth-peer=0,{PEER_MAC}", f"--eth-peer=1,{MAC}", *frames(length)]
        with topology.topology() as net, contender(net, lab, [MAC, PEER_MAC], False) as served:
            cards = [
                card(number, path, mac, layout)
                for number, (path, mac) in enumerate(zip(served.sockets, (MAC, PEER_MAC), strict=True))
            ]
            with Pmd("client", lab.directory, cards, options, cpu=CLIENT_CPU, huge=lab.huge) as client:
                client.await_link(0)
                client.await_link(1)
                client.command(f"start tx_first {bursts(length)}")
                # Both ways, for a frame that was lost at the start is missing in one of them for good.
                both = rate(lambda: client.stats(0).rx_packets + client.stats(1).rx_packets, lab, served)
                check_length(client, length)
                return both | {"rate": both["rate"] / 2}

    return measure


ROWS = [
    *(
        Row(
            f"guest-to-veth-{length}",
            f"guest to veth, {length} B",
            UNITS,
            {name: guest_to_veth(contender, length) for name, contender in (BACKENDS | ZEROCOPY).items()}
            | {"raw AF_XDP": raw(length)},
        )
        for length in (64, 1500)
    ),
    *(
        Row(
            f"veth-and-back-{length}",
            f"through veth and back, {length} B",
            UNITS,
            {name: veth_and_back(contender, length) for name, contender in (BACKENDS | ZEROCOPY).items()}
            | {"raw AF_XDP": raw(length, back=True)},
        )
        for length in (64, 1500)
    ),
    *(
        Row(
            f"guest-to-guest-{length}{suffix}",
            f"guest to guest each way, {length} B, {title}",
            UNITS,
            {name: guest_to_guest(contender, length, layout) for name, contender in BACKENDS.items()},
        )
        for suffix, (title, layout) in LAYOUTS.items()
        for length in SIZES
    ),
]
