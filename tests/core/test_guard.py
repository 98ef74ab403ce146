"""C23 of the hostile inputs: a guest that was given IP addresses speaks for no other, and in nothing but IP."""

import ipaddress
import struct
from dataclasses import replace

import pytest

from tests.rig import needs
from tests.rig.driver import APART, CRUMBLED, TOGETHER, Layout, ledger
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, Pair, frame, mac
from tests.rig.netns import Wire, command, needs_root, packet_socket, veth
from tests.rig.offloads import SENDS, asks, data
from tests.rig.rings import MODERN
from tests.rig.segments import TCP, TSO4, UDP, Segment, wire
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
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
    a.port.set_mac(mac(1), True)
    b.port.set_mac(mac(2), False)
    a.port.set_ips([ipaddress.ip_address(each) for each in (OWN4, OWN6)])
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


def arp(
    sender: bytes,
    op: int = 1,
    hardware: bytes = mac(1),
    tags: bytes = b"",
    kind: int = 0x0806,
    target: bytes = OTHER4,
) -> bytes:
    body = b"\0\1\x08\0\6\4" + struct.pack(">H", op) + hardware + sender + mac(2) + target
    return BROADCAST + mac(1) + tags + struct.pack(">H", kind) + body.ljust(46, b"\0")


def ipv4(
    source: bytes,
    tags: bytes = b"",
    protocol: int = UDP,
    ports: tuple[int, int] = (1000, 2000),
    fragment: int = 0x4000,
    payload: bytes = b"hello",
) -> bytes:
    sent = Segment(protocol=protocol, payload=payload, tags=tags, ports=ports, fragment=fragment).frame()
    at = 14 + len(tags) + 12
    return sent[:at] + source + sent[at + 4 :]


def bare4(source: bytes, protocol: int, inner: bytes, fragment: int = 0) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(inner), 1, fragment, 64, protocol, 0) + source + OTHER4
    return mac(2) + mac(1) + b"\x08\0" + head + inner


def ipv6(source: bytes, inner: bytes, kind: int = ICMP6, tags: bytes = b"", before: bytes = b"") -> bytes:
    """With `before`, extension headers of which the first is for the destination."""
    size = len(before) + len(inner)
    head = struct.pack(">IHBB", 6 << 28, size, 60 if before else kind, 255) + source + OTHER6
    return mac(2) + mac(1) + tags + b"\x86\xdd" + head + before + inner


def nd(kind: int, target: bytes) -> bytes:
    return bytes([kind, 0, 0, 0, 0x20, 0, 0, 0]) + target + b"\2\1" + mac(1)


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
@pytest.mark.parametrize(
    ("sender", "passes"), [(OWN4, True), (NONE4, False), (OTHER4, False), (b"\x0a\x09\0\0", False)]
)
@pytest.mark.parametrize("op", [1, 2])
def test_c23_arp_speaks_for_an_own_address(pair: Pair, sender: bytes, passes: bool, op: int, tags: bytes) -> None:
    sends(pair, arp(sender, op, tags=tags), passes)


def test_c23_arp_that_is_odd_says_nothing(pair: Pair) -> None:
    good = arp(OWN4)
    sends(pair, arp(OWN4, hardware=mac(2)), False)
    for op, passes in ((0, False), (1, True), (2, True), (3, False), (8, False), (9, False), (257, False)):
        sends(pair, arp(OWN4, op), passes)
    for at in range(14, 20):
        sends(pair, good[:at] + bytes([good[at] ^ 8]) + good[at + 1 :], False)
    for size, passes in ((14, False), (41, False), (42, True)):
        sends(pair, good[:size], passes)
    # Not even a checksum of its own may be made in it.
    sends(pair, good, False, asks(14, 14))


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
def test_17_who_probes_for_an_address_probes_for_its_own(pair: Pair, tags: bytes) -> None:
    """Whoever has an address that another probes for takes it for lost: RFC 5227, 2.1.1; RFC 4862, 5.4.3."""
    for op, target, passes in ((1, OWN4, True), (1, OTHER4, False), (1, NONE4, False), (2, OWN4, False)):
        sends(pair, arp(NONE4, op, tags=tags, target=target), passes)
    for target, passes in ((OWN6, True), (EUI64, True), (OTHER6, False), (NONE6, False)):
        sends(pair, ipv6(NONE6, nd(135, target), tags=tags), passes)
    # Asking for another's address as oneself takes nothing from anybody.
    sends(pair, arp(OWN4, target=OTHER4, tags=tags), True)
    sends(pair, ipv6(OWN6, nd(135, OTHER6), tags=tags), True)
    for size, passes in ((0, False), (1, False), (23, False), (24, True)):
        sends(pair, ipv6(NONE6, nd(135, OWN6)[:size], tags=tags), passes)


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
@pytest.mark.parametrize("layout", [TOGETHER, APART, CRUMBLED], ids=str)
def test_c23_packets_have_an_own_source(pair: Pair, tags: bytes, layout: Layout) -> None:
    for protocol in UDP, TCP:
        for source, passes in ((OWN4, True), (NONE4, False), (OTHER4, False)):
            sends(pair, ipv4(source, tags, protocol), passes, layout=layout)
    for source, passes in ((OWN6, True), (EUI64, True), (NONE6, False), (OTHER6, False), (EUI64[:15] + b"\2", False)):
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


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
def test_17_a_station_without_an_address_asks_for_one_and_says_no_more(pair: Pair, tags: bytes) -> None:
    for ports, passes in (((68, 67), True), ((67, 67), False), ((68, 68), False), ((68, 66), False), ((69, 67), False)):
        sends(pair, ipv4(NONE4, tags, ports=ports), passes)
    sends(pair, ipv4(NONE4, tags, TCP, (68, 67)), False)
    for more in 0x2000, 1:
        sends(pair, ipv4(NONE4, tags, ports=(68, 67), fragment=more, payload=bytes(8)), False)
    for protocol in 0, 1, 2, 50:
        sends(pair, bare4(NONE4, protocol, data(20)), False)
    for size, passes in ((0, False), (3, False), (4, True)):
        sends(pair, bare4(NONE4, UDP, struct.pack(">HH", 68, 67)[:size]), passes)
    alert = bytes([ICMP6, 0, 5, 2, 0, 0, 1, 0])
    for kind in range(128, 158):
        sends(pair, ipv6(NONE6, nd(kind, OWN6), tags=tags), kind in (131, 132, 133, 135, 143))
    sends(pair, ipv6(NONE6, nd(143, OWN6), tags=tags, before=alert), True)
    for kind in TCP, UDP, 59:
        sends(pair, ipv6(NONE6, struct.pack(">HHHH", 546, 547, 8, 0) + bytes(16), kind, tags), False)
    sends(pair, ipv6(NONE6, bytes([ICMP6]) + bytes(7) + nd(135, OWN6), 44, tags), False)


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
def test_17_no_guest_answers_for_dhcp(pair: Pair, tags: bytes) -> None:
    """Clients take an answer from whatever port it comes."""
    for ports, passes in (
        ((68, 67), True),
        ((66, 69), True),
        ((67, 69), False),
        ((1000, 68), False),
        ((67, 68), False),
        ((67, 67), False),
        ((546, 547), True),
        ((547, 546), True),
    ):
        sends(pair, ipv4(OWN4, tags, ports=ports), passes)
        sends(pair, ipv4(OWN4, tags, TCP, ports), True)
    for ports, passes in (
        ((546, 547), True),
        ((545, 548), True),
        ((547, 548), False),
        ((1000, 546), False),
        ((547, 546), False),
        ((67, 68), True),
    ):
        sends(pair, ipv6(EUI64, struct.pack(">HHHH", *ports, 12, 0) + b"\2abc", UDP, tags), passes)
    # Nor may a checksum make the ports what they were not.
    for offset, passes in ((0, False), (2, False), (3, False), (4, True), (6, True)):
        sends(pair, ipv4(OWN4, tags), passes, asks(34 + len(tags), offset))


def test_17_fragments_hide_no_header(pair: Pair) -> None:
    """The first has the ports, and the others cannot change them; nobody's address is in none."""
    answer, request = struct.pack(">HHHH", 67, 68, 16, 0), struct.pack(">HHHH", 68, 67, 16, 0)
    for inner, fragment, passes in (
        (request, 0x2000, True),
        (answer, 0x2000, False),
        (answer, 0x2001, True),
        (answer, 0x0001, True),
        (request[:4], 0x2000, True),
        (request[:3], 0x2000, False),
        (b"", 0x2000, True),
    ):
        sends(pair, bare4(OWN4, UDP, inner, fragment), passes)
        sends(pair, bare4(OTHER4, UDP, inner, fragment), False)
    answer, request = struct.pack(">HHHH", 547, 546, 16, 0), struct.pack(">HHHH", 546, 547, 16, 0)
    pad = bytes([UDP, 0, 1, 4, 0, 0, 0, 0])
    for kind, inner, offset, passes in (
        (UDP, request, 0, True),
        (UDP, answer, 0, False),
        (UDP, answer, 8, True),
        (60, pad + request, 0, False),
        (60, pad + request, 8, True),
        (0, pad + request, 0, False),
        (43, pad + request, 0, False),
        (44, pad + request, 0, False),
        (59, pad + request, 0, True),
        (ICMP6, nd(136, OWN6), 0, True),
        (ICMP6, nd(136, OTHER6), 0, False),
        (ICMP6, nd(134, OWN6), 0, False),
        (ICMP6, nd(128, OTHER6), 0, True),
    ):
        for more in 0, 1:
            part = struct.pack(">BBHI", kind, 0, offset | more, 7) + inner
            sends(pair, ipv6(OWN6, part, 44), passes)
            sends(pair, ipv6(OTHER6, part, 44), False)


@pytest.mark.parametrize("tags", TAGS, ids=bytes.hex)
def test_17_a_guest_with_ips_speaks_ip_only(pair: Pair, tags: bytes) -> None:
    """Whatever else there is may have IP in it."""
    inner = ipv4(OWN4)[14:]
    snap = struct.pack(">H", len(inner) + 8) + b"\xaa\xaa\3" + bytes(3)
    for wrapped in (
        snap + b"\x08\0",
        snap[:-3] + b"\0\0\xf8\x08\0",
        b"\0\x40\x06\x06\3",  # 802.2 has a number for IP, too
        b"\x88\x47\0\1\1\x40",
        b"\x88\x48\0\1\1\x40",
        b"\x91\0\0\5\x08\0",
        b"\x92\0\0\5\x08\0",
        b"\x93\0\0\5\x08\0",
        b"\x88\x63\x11\0\0\1\0\x20\0\x21",
        b"\x88\x64\x11\0\0\1\0\x20\0\x21",
        b"\x88\xe7\0\0\0\1" + mac(2) + mac(1) + b"\x08\0",
        b"\x65\x58" + mac(2) + mac(1) + b"\x08\0",
        b"\x80\x35",
        b"\0\0",
        b"\xff\xff",
        b"\x07\xff",
        b"\x08\1",
        b"\x86\xdc",
    ):
        sends(pair, mac(2) + mac(1) + tags + wrapped + inner, False)
        sends(pair, mac(2) + mac(1) + tags + b"\x08\0" + inner, True)
    for size in (14, 60, 256, 257, 1514):
        sends(pair, frame(mac(2), mac(1), size), False)
    sends(pair, frame(mac(2), mac(1), 100), False, asks(20, 10))


def test_17_tunnels_have_an_own_source_and_what_they_like_inside(pair: Pair) -> None:
    """IP in IP, GRE, IPv6 in IPv4: whose end takes that from an address takes it from the guest."""
    for protocol, inner in (
        (4, ipv4(OTHER4)[14:]),
        (47, b"\0\0\x08\0" + ipv4(OTHER4)[14:]),
        (41, bytes(40)),
        (2, bytes(8)),
    ):
        sends(pair, bare4(OWN4, protocol, inner), True)
        sends(pair, bare4(OTHER4, protocol, inner), False)
    for kind in 4, 41, 47, 50, 51:
        sends(pair, ipv6(OWN6, data(40), kind), True)
        sends(pair, ipv6(OTHER6, data(40), kind), False)


def gist(sent: bytes) -> tuple[object, ...]:
    """What a frame of a station that comes up is: its kind, who says so, and for neighbour discovery what about."""
    if sent[12:14] == b"\x08\0" and sent[23] == UDP:
        return "dhcp", sent[26:30] == NONE4, *struct.unpack(">HH", sent[34:38])
    if sent[12:14] != b"\x86\xdd":
        return (sent[12:14],)
    at = 54 + (8 + 8 * sent[55] if sent[20] == 0 else 0)
    return sent[at], sent[22:38] == NONE6, sent[at + 8 : at + 24] if sent[at] == 135 else b""


@needs_root
@needs.program("busybox", "busybox")
def test_17_what_linux_says_while_it_takes_its_own_addresses_passes(pair: Pair) -> None:
    """A real stack comes up with the guest's MAC and addresses; the guest sends each of its frames."""
    missing = {("dhcp", True, 68, 67), (135, True, EUI64), (135, True, OWN6), (133, False, b""), (143, True, b"")}
    with veth() as link, Wire(packet_socket(link.ifname)) as seen:
        ip = ("ip", "-n", link.namespace.name)
        command(*ip, "address", "flush", "dev", "eth0")
        command(*ip, "link", "set", "eth0", "down", "address", mac(1).hex(":"))
        link.namespace.run("sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0", "net.ipv6.conf.eth0.addr_gen_mode=0")
        command(*ip, "link", "set", "eth0", "up")
        command(*ip, "address", "add", f"{ipaddress.ip_address(OWN6)}/64", "dev", "eth0")
        client = link.namespace.popen("busybox", "udhcpc", "-i", "eth0", "-f", "-t", "9", "-T", "1", "-s", "/bin/true")
        try:
            while missing:
                sent = seen.receive(timeout=20)
                assert sent is not None, missing
                missing.discard(gist(sent))
                sends(pair, sent, True)
        finally:
            client.kill()
            client.communicate()


def test_c23_without_addresses_anything_passes(pair: Pair) -> None:
    a, _ = pair
    sends(pair, arp(OTHER4), False)
    a.port.set_ips([])
    sends(pair, arp(OTHER4), True)
    sends(pair, ipv6(OTHER6, nd(134, OTHER6)), True)


def test_16_addresses_can_be_given_and_no_more(pair: Pair) -> None:
    a, _ = pair
    many = [ipaddress.ip_address(b"\x0a\1\0" + bytes([last])) for last in range(1, 18)]
    a.port.set_ips(many[:16])
    sends(pair, arp(many[15].packed), True)
    with pytest.raises(OSError, match="Invalid argument"):
        a.port.set_ips(many)
    with pytest.raises(OSError, match="No such file"):
        core.Guest(a.bridge, 77).set_ips(many[:1])


@pytest.mark.parametrize(
    ("sent", "ip"),
    [
        (arp(OTHER4), OTHER4),
        (arp(NONE4, target=OTHER4), OTHER4),
        (ipv4(OTHER4), OTHER4),
        (ipv4(OTHER4, TAGS[2]), OTHER4),
        (ipv4(OWN4, ports=(67, 2000)), OWN4),
        (ipv6(OTHER6, bytes(8), UDP), OTHER6),
        (frame(BROADCAST, mac(1)), b""),
    ],
    ids=["arp", "arp probe", "ipv4", "ipv4 tagged", "dhcp", "ipv6", "not IP"],
)
def test_whom_a_guest_spoke_for_when_it_was_stopped_is_kept(pair: Pair, sent: bytes, ip: bytes) -> None:
    sends(pair, sent, False)
    last = pair[0].port.offence("policy")
    assert last is not None
    assert (last.source, last.ip.packed if last.ip else b"") == (mac(1), ip)
    sends(pair, ipv4(OWN4), True)
    assert pair[0].port.offence("policy").source == mac(1)  # type: ignore[union-attr]
