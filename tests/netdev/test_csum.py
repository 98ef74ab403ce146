"""Partial checksums: a frame from a virtual interface whose TCP or UDP checksum is only the pseudo header's sum.

Frames are sent raw at the far end of a veth pair, steered to a guest, and compared with checksums computed here.
"""

import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, mac
from tests.rig.netns import Veth, Wire, needs_root, veth
from tests.rig.segments import fold
from xdpnet import core
from xdpnet.netdev.port import Netdev

pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

TCP, UDP, ICMP = 6, 17, 1
PARTIAL, RIGHT = "partial", "right"


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def l4(protocol: int, ends: bytes, payload: bytes, checksum: str, port: int = 2000) -> bytes:
    """A TCP or UDP segment; its checksum partial or right. `ends`: source and destination address."""
    size = len(payload) + (20 if protocol == TCP else 8)
    pseudo = ends + struct.pack(">IHBB", size, 0, 0, protocol)
    if protocol == TCP:
        header, at = struct.pack(">HHIIHHHH", 1000, port, 1, 2, 0x5018, 500, 0, 0), 16
    else:
        header, at = struct.pack(">HHHH", 1000, port, size, 0), 6
    value = fold(pseudo)
    if checksum == RIGHT:
        value = ~fold(pseudo + header + payload) & 0xFFFF
        if not value and protocol == UDP:
            value = 0xFFFF
    return header[:at] + struct.pack(">H", value) + header[at + 2 :] + payload


def ipv4(protocol: int, payload: bytes, fragment: int = 0, options: bytes = b"") -> bytes:
    size = 20 + len(options) + len(payload)
    words = 0x45 + len(options) // 4
    header = struct.pack(">BBHHHBBH", words, 0, size, 7, fragment, 64, protocol, 0) + V4 + options
    return header[:10] + struct.pack(">H", ~fold(header) & 0xFFFF) + header[12:] + payload


def ipv6(protocol: int, payload: bytes) -> bytes:
    return struct.pack(">IHBB", 0x6000_0000, len(payload), protocol, 64) + V6 + payload


V4 = packed("10.9.0.1") + packed("10.9.0.2")
V6 = packed("fd00::1") + packed("fd00::2")


def ethernet(kind: int, payload: bytes, tags: bytes = b"", to: bytes = mac(1)) -> bytes:
    return to + mac(50) + tags + struct.pack(">H", kind) + payload


def over(version: int, protocol: int, payload: bytes, checksum: str, **options: bytes) -> bytes:
    """An Ethernet frame of it all."""
    if version == 4:
        return ethernet(0x0800, ipv4(protocol, l4(protocol, V4, payload, checksum)), **options)
    return ethernet(0x86DD, ipv6(protocol, l4(protocol, V6, payload, checksum)), **options)


def vxlan(inner: bytes, checksum: str, ones: bool = False) -> bytes:
    """With an outer checksum of its own, or (usual) with none."""
    payload = b"\x08" + bytes(7) + inner
    segment = l4(UDP, V4, payload, checksum, port=4789)
    if not ones:
        segment = segment[:6] + b"\0\0" + segment[8:]
    return ethernet(0x0800, ipv4(UDP, segment))


@pytest.fixture(scope="module")
def pair() -> Iterator[Veth]:
    with veth() as made:
        yield made


@pytest.fixture(scope="module")
def wire(pair: Veth) -> Iterator[Wire]:
    with pair.wire() as made:
        yield made


@pytest.fixture(scope="module")
def port(pair: Veth) -> Iterator[tuple[Netdev, Driver]]:
    with core.Bridge(netdev_queues=1, frames_per_queue=256) as bridge:
        bridge.start()
        with closing(Netdev(bridge, pair.ifname)) as netdev:
            netdev.open()
            driver = Driver(bridge).start()
            driver.port.set_mac(mac(1), False)
            netdev.sync_macs([mac(1)])
            yield netdev, driver
            driver.close()


def through(port: tuple[Netdev, Driver], wire: Wire, sent: bytes) -> tuple[bytes, int]:
    """What the guest gets, and how many checksums were completed."""
    netdev, driver = port
    stats = netdev.port.queue_stats
    before = stats(0, core.RX).csum_completed
    driver.pair.packets()
    driver.pair.fill()
    wire.send(sent)
    (got,) = driver.pair.frames()
    return got, stats(0, core.RX).csum_completed - before


each_ip = pytest.mark.parametrize("version", [4, 6])
each_protocol = pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])


@each_ip
@each_protocol
@pytest.mark.parametrize("size", [0, 1, 2, 3, 31, 32, 33, 63, 100, 1001, 1400])
def test_a_partial_checksum_is_completed(
    port: tuple[Netdev, Driver], wire: Wire, version: int, protocol: int, size: int
) -> None:
    payload = bytes(i * 37 & 0xFF for i in range(size))
    sent, wanted = (over(version, protocol, payload, which) for which in (PARTIAL, RIGHT))
    assert through(port, wire, sent) == (wanted, 1)


@each_ip
@each_protocol
def test_a_right_checksum_stays(port: tuple[Netdev, Driver], wire: Wire, version: int, protocol: int) -> None:
    sent = over(version, protocol, b"payload", RIGHT)
    assert through(port, wire, sent) == (sent, 0)


@each_protocol
def test_c29_a_wrong_checksum_stays_wrong(port: tuple[Netdev, Driver], wire: Wire, protocol: int) -> None:
    at = 14 + 20 + (16 if protocol == TCP else 6)
    sent = bytearray(over(4, protocol, b"payload", RIGHT))
    sent[at] ^= 0x55
    assert through(port, wire, bytes(sent)) == (bytes(sent), 0)


@each_ip
@pytest.mark.parametrize("tags", [b"\x81\0\0\5", b"\x88\xa8\0\6\x81\0\0\5"], ids=["one tag", "two tags"])
def test_behind_vlan_tags(port: tuple[Netdev, Driver], wire: Wire, version: int, tags: bytes) -> None:
    sent, wanted = (over(version, TCP, b"tagged", which, tags=tags) for which in (PARTIAL, RIGHT))
    assert through(port, wire, sent) == (wanted, 1)


@each_ip
@each_protocol
def test_inside_vxlan(port: tuple[Netdev, Driver], wire: Wire, version: int, protocol: int) -> None:
    sent, wanted = (vxlan(over(version, protocol, b"inner", which), RIGHT) for which in (PARTIAL, RIGHT))
    assert through(port, wire, sent) == (wanted, 1)


def test_inside_vxlan_both_checksums(port: tuple[Netdev, Driver], wire: Wire) -> None:
    inner, done = (over(4, TCP, b"inner", which) for which in (PARTIAL, RIGHT))
    assert through(port, wire, vxlan(inner, PARTIAL, ones=True)) == (vxlan(done, RIGHT, ones=True), 1)


def test_ip_options_are_skipped_and_padding_behind_the_packet_is_in_no_sum_and_cut_off(
    port: tuple[Netdev, Driver], wire: Wire
) -> None:
    sent, wanted = (
        ethernet(0x0800, ipv4(TCP, l4(TCP, V4, b"odd", which), options=bytes(8))) for which in (PARTIAL, RIGHT)
    )
    assert through(port, wire, sent + b"\xee" * 9) == (wanted, 1)


def test_a_udp_datagram_without_checksum_stays_without(port: tuple[Netdev, Driver], wire: Wire) -> None:
    segment = l4(UDP, V4, b"no sum", RIGHT)
    sent = ethernet(0x0800, ipv4(UDP, segment[:6] + b"\0\0" + segment[8:]))
    assert through(port, wire, sent) == (sent, 0)


def test_a_udp_checksum_that_comes_to_zero_is_sent_as_ones(port: tuple[Netdev, Driver], wire: Wire) -> None:
    for filler in range(0x10000):
        wanted = over(4, UDP, struct.pack(">H", filler), RIGHT)
        if wanted[40:42] == b"\xff\xff":
            break
    sent = over(4, UDP, struct.pack(">H", filler), PARTIAL)
    assert through(port, wire, sent) == (wanted, 1)


@pytest.mark.parametrize("fragment", [0x2000, 0x2001, 0x0001, 0x1FFF])
@each_protocol
def test_fragments_are_left_alone(port: tuple[Netdev, Driver], wire: Wire, protocol: int, fragment: int) -> None:
    sent = ethernet(0x0800, ipv4(protocol, l4(protocol, V4, b"part of it", PARTIAL), fragment))
    assert through(port, wire, sent) == (sent, 0)


def test_dont_fragment_is_no_fragment(port: tuple[Netdev, Driver], wire: Wire) -> None:
    sent, wanted = (ethernet(0x0800, ipv4(TCP, l4(TCP, V4, b"x", which), 0x4000)) for which in (PARTIAL, RIGHT))
    assert through(port, wire, sent) == (wanted, 1)


@pytest.mark.parametrize("which", range(8))
def test_headers_that_lie_about_lengths_are_left_alone(port: tuple[Netdev, Driver], wire: Wire, which: int) -> None:
    tcp = over(4, TCP, b"payload", PARTIAL)
    six = over(6, TCP, b"payload", PARTIAL)
    sent = [
        tcp[:14] + b"\x44" + tcp[15:],  # a header of 16 bytes
        tcp[:14] + b"\x65" + tcp[15:],  # version 6 as IPv4
        tcp[:16] + b"\x00\x13" + tcp[18:],  # shorter than its header
        tcp[:16] + b"\xff\xff" + tcp[18:],  # longer than the frame
        tcp[:14] + b"\x4f" + tcp[15:],  # options to the end
        six[:18] + b"\xff\xff" + six[20:],
        six[:14] + b"\x40" + six[15:],
        ethernet(0x0800, ipv4(TCP, b"\x12" * 19)),
    ][which]
    assert through(port, wire, sent) == (sent, 0)


@pytest.mark.parametrize("size", range(14, 60, 3))
@each_ip
def test_truncated_frames_are_left_alone(port: tuple[Netdev, Driver], wire: Wire, version: int, size: int) -> None:
    sent = over(version, TCP, b"payload", PARTIAL)[:size]
    got, completed = through(port, wire, sent)
    assert (got[: len(sent)], completed) == (sent, 0)


def test_another_protocol_is_left_alone(port: tuple[Netdev, Driver], wire: Wire) -> None:
    sent = ethernet(0x0800, ipv4(ICMP, b"\x08\0\0\0" + bytes(28)))
    assert through(port, wire, sent) == (sent, 0)


def told(pair: Veth, sent: bytes, start: int) -> None:
    """From the far end: the kernel knows that the checksum of UDP at `start` is partial, and so does who asks it."""

    def inside() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.setsockopt(263, 15, 1)  # PACKET_VNET_HDR
            raw.bind((pair.peer, 3))
            raw.send(struct.pack("=BBHHHH", 1, 0, 0, 0, start, 6) + sent)

    pair.namespace.call(inside)


@each_ip
@pytest.mark.parametrize("tags", [b"", b"\x81\0\0\5"], ids=["no tag", "a tag"])
def test_group_addressed_frames_as_well(pair: Veth, port: tuple[Netdev, Driver], version: int, tags: bytes) -> None:
    """They come by another way, through an AF_PACKET socket, which is told."""
    netdev, driver = port
    before = netdev.port.queue_stats(0, core.RX).csum_completed
    sent, wanted = (over(version, UDP, b"to all", which, to=BROADCAST, tags=tags) for which in (PARTIAL, RIGHT))
    driver.pair.fill()
    told(pair, sent, len(sent) - 14)
    assert driver.pair.frames() == [wanted]
    assert netdev.port.queue_stats(0, core.RX).csum_completed == before + 1


def test_a_group_addressed_frame_that_only_looks_partial_is_left_alone(port: tuple[Netdev, Driver], wire: Wire) -> None:
    sent = over(4, UDP, b"to all", PARTIAL, to=BROADCAST)
    assert through(port, wire, sent) == (sent, 0)
