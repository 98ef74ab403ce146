"""Frames that the kernel has joined, or not cut yet, as generic XDP and the AF_PACKET socket hand them over.

Nobody may get another datagram than was sent.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netdev.test_csum import PARTIAL, TCP, over
from tests.netdev.test_large_frames import GUEST, TSO, guest_on, jumbo, told
from tests.rig.guests import MakeBridge, MakeGuest
from tests.rig.netns import Veth, command, needs_root, remove, veth
from tests.rig.rings import MODERN
from tests.rig.segments import CWR, ECN, TSO4, TSO6
from tests.rig.waiting import eventually
from xdpnet import core
from xdpnet.netdev.port import Mode, Netdev
from xdpnet.virtq.features import VirtioFeature, mask

__all__ = ["told"]  # a fixture

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

FLAGS = 13  # of a TCP header
TAKES = {
    "nothing": 0,
    "large": TSO,
    "large with ecn": TSO | mask(VirtioFeature.VIRTIO_NET_F_GUEST_ECN),
}


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=2, frames_per_queue=256)


def send(pair: Veth, whole: bytes, kind: int, l4: int, size: int = 1400, interface: str = "") -> None:
    """One frame that stands for many, from the far end, or what is there."""

    def inside() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.setsockopt(263, 15, 1)  # PACKET_VNET_HDR
            raw.bind((interface or pair.peer, 3))
            raw.send(struct.pack("=BBHHHH", 1, kind, l4 + 20, size, l4, 16) + whole)

    pair.namespace.call(inside)


@pytest.mark.parametrize("takes", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("reduced", [False, True], ids=["plain", "cwr"])
@pytest.mark.parametrize("version", [4, 6])
def test_c30_joined_tcp_is_one_frame_for_who_takes_that_and_many_for_others(
    bridge: core.Bridge,
    guests: MakeGuest,
    told: bool,
    version: int,
    reduced: bool,
    takes: int,
) -> None:
    l4, kind = (34, TSO4) if version == 4 else (54, TSO6)
    kind |= ECN * reduced
    payload = os.urandom(20000)
    whole = bytearray(over(version, TCP, payload, PARTIAL, to=GUEST))
    whole[l4 + FLAGS] |= CWR * reduced
    size = 1400 if told else 1500 - (l4 - 14) - 20
    with jumbo(bridge, 1500, mode="generic") as (pair, _):
        guest = guest_on(bridge, guests, MODERN | takes)
        send(pair, bytes(whole), kind, l4)
        is_whole = takes and (not reduced or takes != TSO)
        got = guest.pair.receive(1 if is_whole else -(-len(payload) // size))
    assert b"".join(packet.frame[l4 + 20 :] for packet in got) == payload
    # The mark is the first segment's alone (RFC 3168, 6.1.2).
    assert [bool(packet.frame[l4 + FLAGS] & CWR) for packet in got] == [reduced] + [False] * (len(got) - 1)
    if is_whole:
        assert got[0].header[:10] == struct.pack("<BBHHHH", 1, kind, l4 + 20, size, l4, 16)


USO = mask(
    VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,
    VirtioFeature.VIRTIO_NET_F_GUEST_USO4,
    VirtioFeature.VIRTIO_NET_F_GUEST_USO6,
)
UDP_SEGMENT = 103


def send_datagrams(pair: Veth, to: str, payload: bytes, size: int) -> None:
    """As programs do that send many at once: one call, and the kernel cuts as late as it can."""

    def inside() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, size)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(pair.address))
            sender.sendto(payload, (to, 2000))

    pair.namespace.call(inside)


# Sizes of all, and of each: some are together no longer than a frame, and the last may be shorter.
DATAGRAMS = [(1000, 500), (800, 100), (900, 500), (1400, 1399), (4000, 500), (12_000, 1472), (16, 8)]


@pytest.mark.parametrize("takes", [0, USO], ids=["nothing", "large"])
@pytest.mark.parametrize(("total", "size"), DATAGRAMS)
@pytest.mark.parametrize("to", ["10.99.0.2", "239.99.0.1"], ids=["unicast", "multicast"])
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_datagrams_sent_in_one_call_arrive_one_by_one(
    bridge: core.Bridge, guests: MakeGuest, mode: Mode, to: str, total: int, size: int, takes: int
) -> None:
    payload = os.urandom(total)
    wanted = [payload[at : at + size] for at in range(0, total, size)]
    with jumbo(bridge, 1500, mode=mode) as (pair, _):
        address = ":".join(f"{byte:02x}" for byte in GUEST)
        pair.namespace.run("ip", "neigh", "add", "10.99.0.2", "lladdr", address, "dev", pair.peer)
        pair.namespace.run("ip", "route", "add", "239.0.0.0/8", "dev", pair.peer)
        guest = guest_on(bridge, guests, MODERN | takes)
        send_datagrams(pair, to, payload, size)
        got: list[bytes] = []
        while len(got) < len(wanted):
            for packet in guest.pair.receive(1):
                kind, joined = packet.header[1], int.from_bytes(packet.header[4:6], "little")
                assert kind in ((0, 5) if takes else (0,))
                data = packet.frame[42:]
                got += [data[at : at + joined] for at in range(0, len(data), joined)] if kind else [data]
    assert got == wanted


@contextlib.contextmanager
def above(pair: Veth, kind: str) -> Iterator[str]:
    """An interface that `auto` leaves to generic mode, with the far end's frames; what the far end sends them by."""
    name = f"xdpn{os.getpid()}v992"
    ours = "10.99.0.254"
    if kind == "vxlan":
        command("ip", "address", "add", f"{ours}/24", "dev", pair.ifname)
    words = {
        "bridge": "type bridge",
        "macvlan": f"link {pair.ifname} type macvlan mode passthru",
        "vxlan": f"type vxlan id 7 local {ours} remote {pair.address} dstport 4789",
    }
    command("ip", "link", "add", name, *words[kind].split())
    try:
        far = pair.peer
        if kind == "bridge":
            command("ip", "link", "set", pair.ifname, "master", name)
        if kind == "vxlan":
            far = "tunnel"
            tunnel = f"type vxlan id 7 local {pair.address} remote {ours} dstport 4789"
            pair.namespace.run("ip", "link", "add", far, *tunnel.split())
            pair.namespace.run("ip", "address", "add", "10.98.0.1/24", "dev", far)
            pair.namespace.run("ip", "link", "set", far, "up")
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        command("ip", "link", "set", name, "up")
        yield name
    finally:
        remove(name)


@pytest.mark.parametrize("takes", [0, USO], ids=["nothing", "large"])
@pytest.mark.parametrize("kind", ["bridge", "macvlan", "vxlan"])
def test_48_datagrams_sent_in_one_call_arrive_one_by_one_where_auto_ends_in_generic_mode(
    bridge: core.Bridge, guests: MakeGuest, kind: str, takes: int
) -> None:
    payload, size = os.urandom(4000), 500
    wanted = [payload[at : at + size] for at in range(0, len(payload), size)]
    to, by = ("10.98.0.2", "tunnel") if kind == "vxlan" else ("10.99.0.2", "eth0")
    with veth() as pair, above(pair, kind) as name, contextlib.closing(Netdev(bridge, name)) as port:
        port.open()
        assert port.mode == "generic"
        port.sync_macs([GUEST])
        pair.namespace.run("ip", "neigh", "add", to, "lladdr", GUEST.hex(":"), "dev", by)
        guest = guest_on(bridge, guests, MODERN | takes)
        send_datagrams(pair, to, payload, size)
        got: list[bytes] = []
        large = False
        while len(got) < len(wanted):
            for packet in guest.pair.receive(1):
                joined, data = int.from_bytes(packet.header[4:6], "little"), packet.frame[42:]
                got += [data[at : at + joined] for at in range(0, len(data), joined)] if joined else [data]
                large |= joined > 0
    assert got == wanted
    assert large is bool(takes)


def test_shorter_ones_than_can_be_cut_are_dropped_and_counted(bridge: core.Bridge, guests: MakeGuest) -> None:
    """A guest's could become thousands of frames (vnet_judge); the kernel's are few enough, and there is one rule."""
    with jumbo(bridge, 1500, mode="generic") as (pair, port):
        address = ":".join(f"{byte:02x}" for byte in GUEST)
        pair.namespace.run("ip", "neigh", "add", "10.99.0.2", "lladdr", address, "dev", pair.peer)
        guest_on(bridge, guests)
        send_datagrams(pair, "10.99.0.2", bytes(14), 7)
        assert eventually(lambda: port.port.queue_stats(0, core.RX).drops["gso_size"] == 1)


def test_segments_of_tcp_that_are_together_no_longer_than_a_frame_are_cut_as_they_were(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    payload = os.urandom(1000)
    with jumbo(bridge, 1500, mode="generic") as (pair, _):
        guest = guest_on(bridge, guests)
        send(pair, over(4, TCP, payload, PARTIAL, to=GUEST), TSO4, 34, size=300)
        got = guest.pair.receive(4)
    assert [packet.frame[54:] for packet in got] == [payload[at : at + 300] for at in range(0, 1000, 300)]


def test_more_segments_of_tcp_than_can_be_cut_become_longer_ones(bridge: core.Bridge, guests: MakeGuest) -> None:
    payload = os.urandom(129 * 100)
    with jumbo(bridge, 1500, mode="generic") as (pair, _):
        guest = guest_on(bridge, guests)
        send(pair, over(4, TCP, payload, PARTIAL, to=GUEST), TSO4, 34, size=100)
        got = guest.pair.receive(-(-len(payload) // 1460))
    assert b"".join(packet.frame[54:] for packet in got) == payload


@pytest.mark.parametrize("size", [300, 1000])
def test_what_is_joined_in_a_tunnel_is_dropped_and_counted(bridge: core.Bridge, guests: MakeGuest, size: int) -> None:
    with jumbo(bridge, 1500, mode="generic") as (pair, port):
        address = ":".join(f"{byte:02x}" for byte in GUEST)
        guest_on(bridge, guests)
        tunnel = f"type vxlan id 7 local {pair.address} remote 10.99.0.2 dstport 8472 udpcsum"
        pair.namespace.run("ip", "link", "add", "tunnel", *tunnel.split())
        pair.namespace.run("ip", "link", "set", "tunnel", "up")
        pair.namespace.run("ip", "neigh", "add", "10.99.0.2", "lladdr", address, "dev", pair.peer)
        send(pair, over(4, TCP, bytes(3 * size), PARTIAL), TSO4, 34, size, interface="tunnel")
        assert eventually(lambda: sum(port.port.queue_stats(0, core.RX).drops.values()) == 1)
        assert port.port.queue_stats(0, core.RX).drops["oversize"] == 1
