"""Partial checksums behind headers that the bridge does not look at: tunnels, labels, tags.

Frames are made field by field, each header by a function of its own, once with the innermost checksum partial and once
with it right: whatever the kernel puts around it (lco_csum) is the same in both. RFC 2516, 2784, 2890, 3032, 3931,
7348, 8086 and 8926; 3GPP TS 29.281.
"""

# ruff: noqa: ARG005  # of what a tunnel may need, most need less

import random
import struct
from collections.abc import Callable

import pytest

from tests.netdev.test_csum import (
    ICMP,
    PARTIAL,
    RIGHT,
    TCP,
    UDP,
    V4,
    V6,
    each_ip,
    ethernet,
    ipv4,
    ipv6,
    l4,
    over,
    pair,
    port,
    through,
    wire,
)
from tests.rig.driver import Driver
from tests.rig.netns import Wire, needs_root
from tests.rig.segments import checksum, fold
from xdpnet.netdev.port import Netdev

pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

__all__ = ["pair", "port", "wire"]  # fixtures

IPV4, IPV6, TEB, MPLS, PPPOE, NSH, HSR = 0x0800, 0x86DD, 0x6558, 0x8847, 0x8864, 0x894F, 0x892F
SCTP, GRE, L2TP, ETHERNET, MPLS_IN_IP, IPIP, IP6 = 132, 47, 115, 143, 137, 4, 41

Around = Callable[[int, bytes, bytes], bytes]  # version of IP, packet, the same with a right checksum: a frame


def outer4(protocol: int, payload: bytes) -> bytes:
    return ethernet(IPV4, ipv4(protocol, payload))


def outer6(protocol: int, payload: bytes) -> bytes:
    return ethernet(IPV6, ipv6(protocol, payload))


def type_of(version: int) -> int:
    return IPV4 if version == 4 else IPV6


def framed(version: int, packet: bytes) -> bytes:
    return ethernet(type_of(version), packet)


def in_udp(to: int, payload: bytes, right: bytes | None, outer: int = 4) -> bytes:
    """The datagram's sum is as if what it carries were complete, or there is none."""
    ends = V4 if outer == 4 else V6
    head = struct.pack(">HHHH", 1000, to, 8 + len(payload), 0)
    if right is not None:
        pseudo = ends + struct.pack(">IHBB", 8 + len(payload), 0, 0, UDP)
        head = head[:6] + struct.pack(">H", checksum(pseudo + head + right))
    return (outer4 if outer == 4 else outer6)(UDP, head + payload)


def gre(kind: int, flags: int, payload: bytes, right: bytes) -> bytes:
    head = struct.pack(">HH", flags, kind)
    tail = bytes(range(4)) * (bool(flags & 0x2000) + bool(flags & 0x1000))
    if flags & 0x8000:
        head += struct.pack(">HH", checksum(head + bytes(4) + tail + right), 0)
    return head + tail + payload


def vxlan(flags: int = 0x08, last: int = 0) -> bytes:
    return struct.pack(">IBBBB", flags << 24 | last, 0, 0, 7, 0)


def geneve(kind: int, options: bytes = b"") -> bytes:
    return struct.pack(">BBHI", len(options) // 4, 0, kind, 5 << 8) + options


def gtp(payload: bytes, extra: bytes = b"") -> bytes:
    return struct.pack(">BBHI", 0x34 if extra else 0x30, 255, len(extra) + len(payload), 9) + extra + payload


def label(number: int, last: bool) -> bytes:
    return struct.pack(">I", number << 12 | last << 8 | 64)


def pppoe(version: int, packet: bytes) -> bytes:
    return struct.pack(">HHHH", 0x1100, 3, 2 + len(packet), 0x21 if version == 4 else 0x57) + packet


def udp_tunnel(to: int, header: Callable[[int, bytes], bytes], outer: int = 4, summed: bool = False) -> Around:
    def around(version: int, packet: bytes, right: bytes) -> bytes:
        return in_udp(to, header(version, packet), header(version, right) if summed else None, outer)

    return around


TUNNELS: dict[str, Around] = {
    **{
        f"vxlan {to}{' summed' * summed} over ip{outer}": udp_tunnel(
            to, lambda version, packet: vxlan() + framed(version, packet), outer, summed
        )
        for to in (4789, 8472, 4790, 12345)
        for summed in (False, True)
        for outer in (4, 6)
    },
    "vxlan with a group policy": udp_tunnel(4789, lambda version, packet: vxlan(0x88, 5) + framed(version, packet)),
    "vxlan-gpe with ip": udp_tunnel(
        4790, lambda version, packet: vxlan(0x0C, 1 if version == 4 else 2) + packet, summed=True
    ),
    "vxlan-gpe with nsh": udp_tunnel(
        4790,
        lambda version, packet: vxlan(0x0C, 4) + b"\0\6\1" + bytes([1 if version == 4 else 2]) + bytes(20) + packet,
    ),
    "vxlan with tags inside": udp_tunnel(
        8472, lambda version, packet: vxlan() + ethernet(type_of(version), packet, tags=b"\x81\0\0\5" * 3)
    ),
    "geneve": udp_tunnel(6081, lambda version, packet: geneve(TEB) + framed(version, packet)),
    "geneve summed with options": udp_tunnel(
        6081, lambda version, packet: geneve(TEB, b"option.." * 3) + framed(version, packet), 6, True
    ),
    "geneve with ip": udp_tunnel(6081, lambda version, packet: geneve(type_of(version)) + packet, 4, True),
    "gtp-u": udp_tunnel(2152, lambda version, packet: gtp(packet)),
    "gtp-u with extensions": udp_tunnel(
        2152, lambda version, packet: gtp(packet, b"\0\1\0\x85" + b"\1\0\0\x40" + b"\1\0\0\0")
    ),
    "fou": udp_tunnel(5555, lambda version, packet: packet, summed=True),
    "gue": udp_tunnel(6080, lambda version, packet: bytes([0, IPIP if version == 4 else IP6, 0, 0]) + packet, 4, True),
    "gre over udp": udp_tunnel(4754, lambda version, packet: gre(type_of(version), 0x2000, packet, packet), 6, True),
    "mpls over udp": udp_tunnel(6635, lambda version, packet: label(16, False) + label(17, True) + packet, 4, True),
    "l2tp over udp": udp_tunnel(1701, lambda version, packet: b"\0\3\0\0\0\0\0\7" + framed(version, packet), 4, True),
    "l2tp with a cookie": lambda version, packet, right: outer4(
        L2TP, b"\0\0\0\7" + bytes(12) + framed(version, packet)
    ),
    "gre": lambda version, packet, right: outer4(GRE, gre(type_of(version), 0, packet, right)),
    "gre with all fields": lambda version, packet, right: outer6(GRE, gre(type_of(version), 0xB000, packet, right)),
    "gretap": lambda version, packet, right: outer4(
        GRE, gre(TEB, 0xA000, framed(version, packet), framed(version, right))
    ),
    "erspan": lambda version, packet, right: outer4(GRE, gre(0x88BE, 0x1000, bytes(8) + framed(version, packet), b"")),
    "erspan 3": lambda version, packet, right: outer4(
        GRE, gre(0x22EB, 0x1000, bytes(11) + b"\1" + bytes(8) + framed(version, packet), b"")
    ),
    "mpls over gre": lambda version, packet, right: outer4(GRE, gre(MPLS, 0, label(16, True) + packet, b"")),
    "ip in ipv4": lambda version, packet, right: outer4(IPIP if version == 4 else IP6, packet),
    "ip in ipv6": lambda version, packet, right: outer6(IPIP if version == 4 else IP6, packet),
    "ethernet in ipv6": lambda version, packet, right: outer6(ETHERNET, framed(version, packet)),
    "mpls in ip": lambda version, packet, right: outer4(MPLS_IN_IP, label(16, True) + packet),
    "segment routing": lambda version, packet, right: outer6(
        43, bytes([IPIP if version == 4 else IP6, 2, 4, 0, 0, 0, 0, 0]) + V6[16:] + packet
    ),
    "mpls": lambda version, packet, right: ethernet(MPLS, label(16, False) + label(17, True) + packet),
    "mpls with ethernet": lambda version, packet, right: ethernet(MPLS, label(17, True) + framed(version, packet)),
    "mpls with a control word": lambda version, packet, right: ethernet(
        MPLS, label(17, True) + bytes(4) + framed(version, packet)
    ),
    "pppoe": lambda version, packet, right: ethernet(PPPOE, pppoe(version, packet)),
    "pppoe in a vlan": lambda version, packet, right: ethernet(PPPOE, pppoe(version, packet), tags=b"\x81\0\0\5"),
    "three tags": lambda version, packet, right: ethernet(type_of(version), packet, tags=b"\x88\xa8\0\1" * 3),
    "old tags": lambda version, packet, right: ethernet(type_of(version), packet, tags=b"\x91\0\0\1\x92\0\0\2"),
    "nsh": lambda version, packet, right: ethernet(
        NSH, b"\0\2\2" + bytes([1 if version == 4 else 2]) + bytes(4) + packet
    ),
    "hsr": lambda version, packet, right: ethernet(HSR, bytes(4) + struct.pack(">H", type_of(version)) + packet),
    "vxlan in ip in gre": lambda version, packet, right: outer4(
        GRE,
        gre(IPV4, 0x8000, *(in_udp(8472, vxlan() + framed(version, each), None)[14:] for each in (packet, right))),
    ),
    "ip in ip in vxlan, all summed": lambda version, packet, right: in_udp(
        8472,
        vxlan() + outer4(IPIP if version == 4 else IP6, packet),
        vxlan() + outer4(IPIP if version == 4 else IP6, right),
    ),
}

each_tunnel = pytest.mark.parametrize("around", TUNNELS.values(), ids=TUNNELS)


def packets(version: int, protocol: int, payload: bytes = b"what is in it") -> tuple[bytes, bytes]:
    """An IP packet with a partial checksum, and with a right one."""
    made = (over(version, protocol, payload, which)[14:] for which in (PARTIAL, RIGHT))
    return next(made), next(made)


@each_ip
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
@each_tunnel
def test_a_partial_checksum_in_a_tunnel_is_completed(
    port: tuple[Netdev, Driver], wire: Wire, around: Around, protocol: int, version: int
) -> None:
    for size in 0, 1, 700, 1200:
        partial, right = packets(version, protocol, bytes(i * 37 & 0xFF for i in range(size)))
        assert through(port, wire, around(version, partial, right)) == (around(version, right, right), 1)


@each_ip
@each_tunnel
def test_what_is_complete_in_a_tunnel_stays(
    port: tuple[Netdev, Driver], wire: Wire, around: Around, version: int
) -> None:
    """Right, wrong, or none there is."""
    _, right = packets(version, UDP)
    at = 26 if version == 4 else 46
    for packet in right, right[:at] + b"\x12\x34" + right[at + 2 :], right[:at] + b"\0\0" + right[at + 2 :]:
        sent = around(version, packet, right)
        assert through(port, wire, sent) == (sent, 0)


@each_tunnel
def test_what_is_no_tcp_and_no_udp_stays(port: tuple[Netdev, Driver], wire: Wire, around: Around) -> None:
    ping = ipv4(ICMP, b"\x08\0\xf7\xff" + bytes(28))
    sent = around(4, ping, ping)
    assert through(port, wire, sent) == (sent, 0)


SUMMED = [name for name in TUNNELS if "summed" in name or name in ("fou", "gue", "gre with all fields", "gretap")]


@pytest.mark.parametrize("name", SUMMED)
def test_an_outer_checksum_that_holds_as_it_is_says_that_the_inner_one_is_data(
    port: tuple[Netdev, Driver], wire: Wire, name: str
) -> None:
    """Somebody sends a captured packet: it looks partial, and to complete it would make the datagram wrong."""
    partial, _ = packets(4, TCP)
    sent = TUNNELS[name](4, partial, partial)
    assert through(port, wire, sent) == (sent, 0)


@pytest.mark.parametrize("to", [4789, 8472, 4790, 5000])
def test_a_datagram_that_is_partial_itself_is_one_of_a_tunnel_only_at_a_tunnels_port(
    port: tuple[Netdev, Driver], wire: Wire, to: int
) -> None:
    """A socket's datagram is completed by itself; the kernel leaves both to others only where it is to be cut."""
    partial, right = packets(4, TCP)
    sent = ethernet(IPV4, ipv4(UDP, l4(UDP, V4, vxlan() + framed(4, partial), PARTIAL, port=to)))
    inner = partial if to == 5000 else right
    wanted = ethernet(IPV4, ipv4(UDP, l4(UDP, V4, vxlan() + framed(4, inner), RIGHT, port=to)))
    assert through(port, wire, sent) == (wanted, 1)


def test_a_checksum_of_gre_that_is_left_to_the_interface_is_made(port: tuple[Netdev, Driver], wire: Wire) -> None:
    ping = ipv4(ICMP, b"\x08\0\xf7\xff" + bytes(28))
    wanted = outer4(GRE, gre(IPV4, 0x8000, ping, ping))
    assert through(port, wire, wanted[:38] + b"\0\0" + wanted[40:]) == (wanted, 1)


@pytest.mark.parametrize("padding", [b"\0" * 6, b"\xee" * 6], ids=["zeroes", "not zeroes"])
def test_what_pads_an_inner_frame_is_in_no_sum(port: tuple[Netdev, Driver], wire: Wire, padding: bytes) -> None:
    partial, right = packets(4, TCP, b"")
    sent, wanted = (in_udp(8472, vxlan() + framed(4, packet) + padding, None) for packet in (partial, right))
    assert through(port, wire, sent) == (wanted, 0)


@pytest.mark.parametrize("behind", [b"\0" * 40, b"more"], ids=["a long one", "no ethernet"])
def test_an_inner_packet_that_ends_elsewhere_is_none(port: tuple[Netdev, Driver], wire: Wire, behind: bytes) -> None:
    partial, _ = packets(4, TCP)
    sent = in_udp(8472, vxlan() + framed(4, partial) + behind * 10, None)
    assert through(port, wire, sent) == (sent, 0)
    sent = outer4(IPIP, partial + behind)
    assert through(port, wire, sent) == (sent, 0)


def test_an_inner_packet_whose_own_header_is_wrong_is_none(port: tuple[Netdev, Driver], wire: Wire) -> None:
    partial, _ = packets(4, TCP)
    sent = in_udp(8472, vxlan() + framed(4, partial[:8] + b"\x11" + partial[9:]), None)
    assert through(port, wire, sent) == (sent, 0)


def test_a_remote_checksum_is_left_to_the_remote(port: tuple[Netdev, Driver], wire: Wire) -> None:
    """VXLAN's RCO and GUE's flags: the receiver of the tunnel completes it."""
    partial, _ = packets(4, TCP)
    for sent in (
        in_udp(4789, struct.pack(">II", 0x0820_0000, 7 << 8) + framed(4, partial), None),
        in_udp(6080, bytes([1, IPIP, 0, 1]) + bytes(4) + partial, None),
    ):
        assert through(port, wire, sent) == (sent, 0)


@pytest.mark.parametrize("fragment", [0x2000, 0x0001])
def test_fragments_of_a_tunnel_are_left_alone(port: tuple[Netdev, Driver], wire: Wire, fragment: int) -> None:
    partial, _ = packets(4, TCP)
    sent = ethernet(IPV4, ipv4(IPIP, partial, fragment))
    assert through(port, wire, sent) == (sent, 0)


def nested(depth: int) -> tuple[bytes, bytes]:
    made = []
    for packet in packets(4, TCP):
        for _ in range(depth):
            packet = ipv4(IPIP, packet)
        made.append(ethernet(IPV4, packet))
    return made[0], made[1]


@pytest.mark.parametrize("depth", [3, 4])
def test_four_packets_one_in_the_other_are_looked_at(port: tuple[Netdev, Driver], wire: Wire, depth: int) -> None:
    sent, wanted = nested(depth)
    assert through(port, wire, sent) == ((wanted, 1) if depth == 3 else (sent, 0))


def test_headers_that_are_cut_off_anywhere_are_left_alone(port: tuple[Netdev, Driver], wire: Wire) -> None:
    rng = random.Random(1)
    for around in TUNNELS.values():
        partial, right = packets(6, UDP)
        whole = around(6, partial, right)
        for size in rng.sample(range(60, len(whole) - 1), 8):
            assert through(port, wire, whole[:size]) == (whole[:size], 0)


def test_labels_that_may_be_read_in_two_ways_at_each_turn_are_not_all_read(
    port: tuple[Netdev, Driver], wire: Wire
) -> None:
    """A pseudowire with a control word, or without one and with a tag: both end at the next label."""
    turn = label(17, True) + bytes(12) + b"\x81\0\0\5\x88\x47"
    sent = ethernet(MPLS, turn * 60)
    assert through(port, wire, sent) == (sent, 0)


def crc32c(data: bytes) -> int:
    """Bit by bit, RFC 9260, appendix A."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return ~crc & 0xFFFFFFFF


@each_ip
@pytest.mark.parametrize("size", [0, 4, 1000])
def test_sctps_checksum_that_is_left_to_the_interface_is_made(
    port: tuple[Netdev, Driver], wire: Wire, version: int, size: int
) -> None:
    assert crc32c(b"123456789") == 0xE3069283
    packet = struct.pack(">HHII", 1, 2, 3, 0) + bytes(i & 0xFF for i in range(size))
    done = packet[:8] + struct.pack("<I", crc32c(packet)) + packet[12:]
    outer = outer4 if version == 4 else outer6
    assert through(port, wire, outer(SCTP, packet) + b"\xee" * 9 * (size < 40)) == (
        outer(SCTP, done) + b"\xee" * 9 * (size < 40),
        0,
    )
    assert through(port, wire, outer(SCTP, done)) == (outer(SCTP, done), 0)
    assert fold(b"") == 0


def test_a_piece_of_sctp_is_left_alone(port: tuple[Netdev, Driver], wire: Wire) -> None:
    for sent in (
        ethernet(IPV4, ipv4(SCTP, bytes(40), 0x2000)),
        ethernet(IPV4, ipv4(SCTP, bytes(8))) + bytes(20),
    ):
        assert through(port, wire, sent) == (sent, 0)
