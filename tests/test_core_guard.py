"""C23 of the hostile inputs: a guest that was given IP addresses speaks for no other."""

import ipaddress
import struct
from dataclasses import replace

import pytest

from tests.driver import APART, CRUMBLED, TOGETHER, Layout, ledger
from tests.guests import BROADCAST, MakeBridge, MakeGuest, Pair, frame, mac
from tests.rings import MODERN
from tests.segments import TCP, TSO4, UDP, Segment, checksum, wire
from tests.test_core_offload import SENDS, asks, data
from xdpnet import core

pytest_plugins = ["tests.guest_fixtures"]
pytestmark = pytest.mark.core

ICMP6 = 58
OWN4, OTHER4 = b"\x0a\x09\0\1", b"\x0a\x09\0\2"
OWN6, OTHER6 = b"\xfd" + bytes(14) + b"\1", b"\xfd" + bytes(14) + b"\2"
EUI64 = bytes.fromhex("fe80000000000000505400fffe000001")
NONE4, NONE6 = bytes(4), bytes(16)
TAGS = [b"", b"\x81\0\0\5", b"\x88\xa8\0\5\x81\0\0\6"]


@pytest.fixture
def pair(make_bridge: MakeBridge, guests: MakeGuest) -> Pair:
    bridge = make_bridge()
    a, b = guests(bridge, features=MODERN | SENDS), guests(bridge)
    bridge.set_mac(a.port, mac(1), True)
    bridge.set_mac(b.port, mac(2), False)
    bridge.guest_set_ips(a.port, [ipaddress.ip_address(each) for each in (OWN4, OWN6)])
    b.pair.fill()
    return a, b


def sends(pair: Pair, sent: bytes, passes: bool, header: bytes = bytes(12), layout: Layout = TOGETHER) -> None:
    a, b = pair
    before = a.drops(core.TX).get("policy", 0)
    a.pair.send(sent, layout, header)
    assert a.pair.wait_sent()
    got = b.pair.packets()
    assert len(got) == passes
    assert a.drops(core.TX).get("policy", 0) == before + (not passes)
    if header == bytes(12):
        assert [each.frame for each in got] == [sent] * passes
    b.pair.fill()
    into, out = ledger(a.bridge, {each.port: 1 for each in pair})
    assert into == out


def arp(sender: bytes, op: int = 1, hardware: bytes = mac(1), tags: bytes = b"", kind: int = 0x0806) -> bytes:
    body = b"\0\1\x08\0\6\4" + struct.pack(">H", op) + hardware + sender + mac(2) + OTHER4
    return BROADCAST + mac(1) + tags + struct.pack(">H", kind) + body.ljust(46, b"\0")


def ipv4(source: bytes, tags: bytes = b"", protocol: int = UDP) -> bytes:
    sent = Segment(protocol=protocol, payload=b"hello", tags=tags).frame()
    at = 14 + len(tags) + 12
    return sent[:at] + source + sent[at + 4 :]


def ipv6(source: bytes, inner: bytes, kind: int = ICMP6, tags: bytes = b"", before: bytes = b"") -> bytes:
    """With `before`, extension headers of which the first is for the destination."""
    size = len(before) + len(inner)
    head = struct.pack(">IHBB", 6 << 28, size, 60 if before else kind, 255) + source + OTHER6
    return mac(2) + mac(1) + tags + b"\x86\xdd" + head + before + inner


def nd(kind: int, target: bytes) -> bytes:
    return bytes([kind, 0, 0, 0, 0x20, 0, 0, 0]) + target + b"\2\1" + mac(1)


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
@pytest.mark.parametrize(("sender", "passes"), [(OWN4, True), (NONE4, True), (OTHER4, False), (b"\x0a\x09\0\0", False)])
@pytest.mark.parametrize("op", [1, 2])
def test_c23_arp_speaks_for_an_own_address(pair: Pair, sender: bytes, passes: bool, op: int, tags: bytes) -> None:
    sends(pair, arp(sender, op, tags=tags), passes)


def test_c23_arp_that_is_odd_says_nothing(pair: Pair) -> None:
    good = arp(OWN4)
    sends(pair, arp(OWN4, hardware=mac(2)), False)
    sends(pair, arp(OTHER4, 3, kind=0x8035), False)
    sends(pair, arp(NONE4, 3, kind=0x8035), True)
    for at in range(14, 20):
        sends(pair, good[:at] + bytes([good[at] ^ 8]) + good[at + 1 :], False)
    for size, passes in ((14, False), (41, False), (42, True)):
        sends(pair, good[:size], passes)
    # Not even a checksum of its own may be made in it.
    sends(pair, good, False, asks(14, 14))


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
@pytest.mark.parametrize("layout", [TOGETHER, APART, CRUMBLED], ids=str)
def test_c23_packets_have_an_own_source(pair: Pair, tags: bytes, layout: Layout) -> None:
    for protocol in UDP, TCP:
        for source, passes in ((OWN4, True), (NONE4, True), (OTHER4, False)):
            sends(pair, ipv4(source, tags, protocol), passes, layout=layout)
    for source, passes in ((OWN6, True), (EUI64, True), (NONE6, True), (OTHER6, False), (EUI64[:15] + b"\2", False)):
        sends(pair, ipv6(source, data(20), 59, tags), passes, layout=layout)


def test_c23_what_cannot_be_seen_does_not_pass(pair: Pair) -> None:
    sends(pair, ipv4(OWN4, b"\x81\0\0\5" * 3), False)
    sends(pair, ipv4(OWN4)[:33], False)
    sends(pair, ipv6(OWN6, b"")[:53], False)
    sends(pair, ipv6(OWN6, data(20), before=bytes([60, 0]) + bytes(6) + bytes([ICMP6, 9])), False)
    nine = b"".join(bytes([60, 0]) + bytes(6) for _ in range(8)) + bytes([ICMP6, 0]) + bytes(6)
    sends(pair, ipv6(OWN6, nd(136, OWN6), before=nine), False)
    sends(pair, ipv6(OWN6, nd(136, OWN6), before=nine[8:]), True)


@pytest.mark.parametrize(
    ("kind", "target", "passes"),
    [
        (136, OWN6, True),
        (136, EUI64, True),
        (136, OTHER6, False),
        (136, NONE6, False),
        (135, OTHER6, True),
        (134, OWN6, False),
        (137, OWN6, False),
        (133, OWN6, True),
        (128, OTHER6, True),
    ],
)
@pytest.mark.parametrize("before", [b"", bytes([ICMP6, 0]) + bytes(6)], ids=["plain", "behind an extension header"])
def test_c23_neighbour_discovery_speaks_for_an_own_address(
    pair: Pair, kind: int, target: bytes, passes: bool, before: bytes
) -> None:
    sends(pair, ipv6(OWN6, nd(kind, target), before=before), passes)


def test_c23_an_advertisement_is_there_whole(pair: Pair) -> None:
    for size, passes in ((0, True), (1, False), (23, False), (24, True)):
        sends(pair, ipv6(OWN6, nd(136, OWN6)[:size]), passes)
    # Its target, and then its type, behind what is looked at.
    room = 256 - 14 - 40
    for length in (room - 24) // 8 * 8, room // 8 * 8:
        filler = bytes([ICMP6, length // 8 - 1]) + bytes(length - 2)
        sends(pair, ipv6(OWN6, nd(136, OTHER6), before=filler), False)


def test_c23_no_checksum_is_made_where_an_address_is(pair: Pair) -> None:
    """It would change what was found right."""
    four = ipv4(OWN4)
    for start, offset in ((14, 12), (14, 30), (33, 10)):
        sends(pair, four, False, asks(start, offset))
    sends(pair, four, True, asks(34, 6))
    six = ipv6(OWN6, nd(136, OWN6))
    for start, offset in ((14, 8), (54, 8), (54, 22), (53, 3)):
        sends(pair, six, False, asks(start, offset))
    sends(pair, six, True, asks(54, 2))


def test_c23_large_frames_and_checksums_pass_as_before(pair: Pair) -> None:
    a, b = pair
    whole = Segment(payload=data(3000))
    a.pair.send(whole.frame(partial=True), header=whole.header(TSO4, 1000))
    assert b.pair.frames(3) == wire(whole.cut(1000))
    forged = replace(whole, addresses=(9, 2))
    sends(pair, forged.frame(partial=True), False, forged.header(TSO4, 1000))


def test_c23_other_protocols_pass(pair: Pair) -> None:
    for size in (14, 60, 256, 257, 1514):
        sends(pair, frame(mac(2), mac(1), size), True)
    sent = frame(mac(2), mac(1), 100)
    a, b = pair
    a.pair.send(sent, header=asks(20, 10))
    assert b.pair.frames() == [sent[:30] + struct.pack(">H", checksum(sent[20:])) + sent[32:]]


def test_c23_without_addresses_anything_passes(pair: Pair) -> None:
    a, _ = pair
    sends(pair, arp(OTHER4), False)
    a.bridge.guest_set_ips(a.port, [])
    sends(pair, arp(OTHER4), True)
    sends(pair, ipv6(OTHER6, nd(134, OTHER6)), True)


def test_16_addresses_can_be_given_and_no_more(pair: Pair) -> None:
    a, _ = pair
    many = [ipaddress.ip_address(b"\x0a\1\0" + bytes([last])) for last in range(1, 18)]
    a.bridge.guest_set_ips(a.port, many[:16])
    sends(pair, arp(many[15].packed), True)
    with pytest.raises(OSError, match="Invalid argument"):
        a.bridge.guest_set_ips(a.port, many)
    with pytest.raises(OSError, match="No such file"):
        a.bridge.guest_set_ips(77, many[:1])
