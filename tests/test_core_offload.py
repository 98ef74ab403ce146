"""Checksums and segmentation: what a guest asks for in its virtio_net_hdr, and what the receiver gets instead.

Two guests on a bridge. What the second has not negotiated the core must have done; every frame is compared with the
reference in packets.py, checksums included. hostile inputs: group C.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.driver import Driver, Layout, ledger
from tests.driver import Packet as Received
from tests.guests import MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.packets import (
    ACK,
    CWR,
    DESTINATION,
    ECE,
    FIN,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    HOP_BY_HOP,
    NEEDS_CSUM,
    ONE_TAG,
    PSH,
    TCP,
    TWO_TAGS,
    UDP,
    URG,
    Packet,
    fold,
)
from tests.rings import LEGACY, MIB, MODERN, RING_PACKED, Span
from xdpnet import core
from xdpnet.virtq.features import VirtioFeature, mask

pytest_plugins = ["tests.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

F = VirtioFeature
CSUM, GUEST_CSUM = mask(F.VIRTIO_NET_F_CSUM), mask(F.VIRTIO_NET_F_GUEST_CSUM)
SENDS = CSUM | mask(
    F.VIRTIO_NET_F_HOST_TSO4, F.VIRTIO_NET_F_HOST_TSO6, F.VIRTIO_NET_F_HOST_ECN, F.VIRTIO_NET_F_HOST_UFO,
    F.VIRTIO_NET_F_HOST_USO,
)  # fmt: skip
TAKES = GUEST_CSUM | mask(
    F.VIRTIO_NET_F_GUEST_TSO4, F.VIRTIO_NET_F_GUEST_TSO6, F.VIRTIO_NET_F_GUEST_ECN, F.VIRTIO_NET_F_GUEST_UFO,
    F.VIRTIO_NET_F_GUEST_USO4, F.VIRTIO_NET_F_GUEST_USO6,
)  # fmt: skip
RAM = (Span(0x4000_0000, 64 * MIB, 0x7F12_0000_0000, 0),)
KINDS = {
    "tso4": Packet(4, TCP, b""),
    "tso6": Packet(6, TCP, b""),
    "ecn": Packet(4, TCP, b"", flags=ACK | CWR),
    "uso4": Packet(4, UDP, b""),
    "uso6": Packet(6, UDP, b""),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge()


def noise(size: int) -> bytes:
    return bytes(i * 37 + i // 256 & 0xFF for i in range(size))


def two(bridge: core.Bridge, guests: MakeGuest, takes: int = 0, sends: int = SENDS) -> tuple[Driver, Driver]:
    """One that asks for everything and one that takes what is said; they know each other."""
    a = guests(bridge, features=MODERN | sends, spans=RAM)
    b = guests(bridge, features=MODERN | takes, spans=RAM, num=512)
    for number, driver in enumerate((a, b), 1):
        bridge.set_mac(driver.port, mac(number), True)
    b.pair.post(500, 4096)
    return a, b


def fields(got: Received) -> tuple[int, ...]:
    """flags, gso_type, hdr_len, gso_size, csum_start, csum_offset"""
    return struct.unpack("<BBHHHH", got.header[:10])


def finished(a: Driver, b: Driver, count: int) -> list[Received]:
    got = b.pair.receive(count)
    assert a.pair.wait_sent()
    got += b.pair.packets()
    assert ledger(a.bridge, {a.port: 1, b.port: 1})[0] == ledger(a.bridge, {a.port: 1, b.port: 1})[1]
    return got


def still_works(a: Driver, b: Driver) -> None:
    a.pair.send(frame(mac(2), mac(1), mark=b"after"))
    assert b.pair.frames() == [frame(mac(2), mac(1), mark=b"after")]


# ---- what the receiver takes ----


@each_kind
@pytest.mark.parametrize("size", [1, 1447, 1448, 1449, 20_000, 65_000])
def test_a_large_frame_passes_whole_to_a_guest_that_takes_it(
    bridge: core.Bridge, guests: MakeGuest, kind: Packet, size: int
) -> None:
    a, b = two(bridge, guests, TAKES)
    sent = replace(kind, payload=noise(size))
    a.pair.send(sent.frame(partial=True), header=sent.header(1448))
    (got,) = finished(a, b, 1)
    assert got.frame == sent.frame(partial=True)
    assert fields(got) == (NEEDS_CSUM, sent.gso_type, sent.headers, 1448, sent.l4, sent.csum_offset)
    assert got.num_buffers == len(got.lengths)
    assert (a.stats(core.TX).cut, a.stats(core.TX).csum_partial) == (0, 1)


@each_kind
@pytest.mark.parametrize("size", [1, 1447, 1448, 1449, 20_000, 65_000])
def test_a_large_frame_is_cut_for_a_guest_that_takes_none(
    bridge: core.Bridge, guests: MakeGuest, kind: Packet, size: int
) -> None:
    a, b = two(bridge, guests)
    sent = replace(kind, payload=noise(size))
    wanted = [each.frame() for each in sent.segments(1448)]
    a.pair.send(sent.frame(partial=True), header=sent.header(1448))
    got = finished(a, b, len(wanted))
    assert [each.frame for each in got] == wanted
    assert {each.header[:10] for each in got} == {bytes(10)}
    assert (a.stats(core.TX).cut, a.stats(core.TX).segments) == (1, len(wanted) - 1)


@each_kind
def test_it_is_cut_and_its_checksums_stay_partial_for_a_guest_that_takes_only_those(
    bridge: core.Bridge, guests: MakeGuest, kind: Packet
) -> None:
    a, b = two(bridge, guests, GUEST_CSUM)
    sent = replace(kind, payload=noise(5000))
    wanted = sent.segments(1448)
    a.pair.send(sent.frame(partial=True), header=sent.header(1448))
    got = finished(a, b, len(wanted))
    assert [each.frame for each in got] == [each.frame(partial=True) for each in wanted]
    assert {fields(each) for each in got} == {(NEEDS_CSUM, 0, 0, 0, sent.l4, sent.csum_offset)}


def test_ecn_alone_that_was_not_negotiated_is_a_reason_to_cut(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests, TAKES & ~mask(F.VIRTIO_NET_F_GUEST_ECN))
    sent = replace(KINDS["ecn"], payload=noise(3000))
    a.pair.send(sent.frame(partial=True), header=sent.header(1448))
    got = finished(a, b, 3)
    assert [each.frame for each in got] == [each.frame(partial=True) for each in sent.segments(1448)]


@pytest.mark.parametrize("takes", [0, GUEST_CSUM], ids=["completed", "passed on"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("size", [0, 1, 17, 18, 1000, 1459])
def test_a_partial_checksum_alone(
    bridge: core.Bridge, guests: MakeGuest, takes: int, version: int, protocol: int, size: int
) -> None:
    a, b = two(bridge, guests, takes)
    sent = Packet(version, protocol, noise(size))
    a.pair.send(sent.frame(partial=True), header=sent.header())
    (got,) = finished(a, b, 1)
    assert got.frame == sent.frame(partial=bool(takes))
    assert fields(got) == ((NEEDS_CSUM, 0, 0, 0, sent.l4, sent.csum_offset) if takes else (0,) * 6)
    assert (a.stats(core.TX).csum_completed, a.stats(core.TX).csum_partial) == ((0, 1) if takes else (1, 0))


@pytest.mark.parametrize("size", [1, 8, 1400, 1471, 1472, 1473, 30_000])
def test_a_large_datagram_of_an_old_guest_becomes_fragments(bridge: core.Bridge, guests: MakeGuest, size: int) -> None:
    a, b = two(bridge, guests)
    sent = Packet(4, UDP, noise(size), fragment=0)
    wanted = sent.fragments(1480)
    a.pair.send(sent.frame(partial=True), header=sent.header(1480, GSO_UDP))
    got = finished(a, b, len(wanted))
    assert [each.frame for each in got] == wanted


def test_of_ipv6_too_with_a_header_of_their_own(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests)
    sent = Packet(6, UDP, noise(4000))
    a.pair.send(sent.frame(partial=True), header=sent.header(1448, GSO_UDP))
    got = [each.frame for each in finished(a, b, 3)]
    assert b"".join(each[62:] for each in got) == sent.frame()[54:]
    headers = [struct.unpack(">BBHI", each[54:62]) for each in got]
    assert [(kind, place) for kind, _, place, _ in headers] == [(UDP, 1), (UDP, 1448 | 1), (UDP, 2896)]
    assert len({ident for *_, ident in headers}) == 1
    for each in got:
        assert (each[20], struct.unpack(">H", each[18:20])[0]) == (44, len(each) - 54)


def test_a_burst_of_large_and_small_frames_stays_in_order(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests)
    wanted = []
    for number in range(20):
        sent = Packet(4, TCP, noise(100 + 700 * (number % 7)), seq=number << 16)
        a.pair.queue(sent.frame(partial=True), header=sent.header(1000))
        wanted += [each.frame() for each in sent.segments(1000)]
        plain = frame(mac(2), mac(1), mark=bytes([number]))
        a.pair.queue(plain)
        wanted.append(plain)
    a.pair.tx.kick()
    assert [each.frame for each in finished(a, b, len(wanted))] == wanted


def test_what_is_flooded_is_changed_for_each_as_it_needs(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests, TAKES)
    c = guests(bridge, features=MODERN, spans=RAM)
    c.pair.fill()
    sent = Packet(4, TCP, noise(3000), to=b"\xff" * 6)
    a.pair.send(sent.frame(partial=True), header=sent.header(1448))
    assert [each.frame for each in c.pair.receive(3)] == [each.frame() for each in sent.segments(1448)]
    assert [each.frame for each in b.pair.receive(1)] == [sent.frame(partial=True)]


@pytest.mark.parametrize("at", range(1, 100, 3))
def test_headers_may_be_split_over_descriptors_anywhere(bridge: core.Bridge, guests: MakeGuest, at: int) -> None:
    a, b = two(bridge, guests)
    sent = Packet(4, TCP, noise(3000), options=bytes(range(12)))
    layout = Layout("cut in two places", lambda _: [at, 7])
    a.pair.send(sent.frame(partial=True), layout, sent.header(1448))
    assert [each.frame for each in finished(a, b, 3)] == [each.frame() for each in sent.segments(1448)]


# ---- what is refused: group C ----

T4, T6, U4 = (replace(KINDS[name], payload=noise(3000)) for name in ("tso4", "tso6", "uso4"))


def edited(packet: Packet, at: int, value: bytes) -> bytes:
    """The frame with other bytes at a place behind the Ethernet header."""
    whole = packet.frame(partial=True)
    return whole[: 14 + at] + value + whole[14 + at + len(value) :]


def hdr(packet: Packet, **changes: int) -> bytes:
    names = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset", "num_buffers")
    values = dict(zip(names, struct.unpack("<BBHHHHH", packet.header(1448)), strict=True)) | changes
    return struct.pack("<BBHHHHH", *(values[name] for name in names))


FRAME4 = T4.frame(partial=True)
REFUSED = {
    "C1 a type that there is not": (hdr(T4, gso_type=2), FRAME4, "gso_type"),
    "C1 another": (hdr(T4, gso_type=6), FRAME4, "gso_type"),
    "C1 the last": (hdr(T4, gso_type=0x1F), FRAME4, "gso_type"),
    "C1 ECN alone": (hdr(T4, gso_type=GSO_ECN), FRAME4, "gso_type"),
    "C1 ECN of a datagram": (hdr(U4, gso_type=GSO_UDP_L4 | GSO_ECN), U4.frame(partial=True), "gso_type"),
    "C2 no size": (hdr(T4, gso_size=0), FRAME4, "gso_size"),
    "C2 of one byte": (hdr(T4, gso_size=1), FRAME4, "gso_size"),
    "C2 of seven bytes": (hdr(T4, gso_size=7), FRAME4, "gso_size"),
    "C3 without a checksum": (hdr(T4, flags=0), FRAME4, "gso_csum"),
    "C4 TCP over IPv4 that is IPv6": (hdr(T6, gso_type=GSO_TCPV4), T6.frame(partial=True), "gso_proto"),
    "C4 TCP over IPv6 that is IPv4": (hdr(T4, gso_type=GSO_TCPV6), FRAME4, "gso_proto"),
    "C4 TCP that is UDP": (hdr(U4, gso_type=GSO_TCPV4), U4.frame(partial=True), "gso_proto"),
    "C4 UDP that is TCP": (hdr(T4, gso_type=GSO_UDP_L4), FRAME4, "gso_proto"),
    "C4 TCP that is no IP": (hdr(T4), FRAME4[:12] + b"\x08\x06" + FRAME4[14:], "gso_proto"),
    "C6 the checksum of nothing": (hdr(T4, csum_start=len(FRAME4)), FRAME4, "csum"),
    "C6 of another place than TCP's": (hdr(T4, csum_start=36), FRAME4, "csum"),
    "C6 into another place": (hdr(T4, csum_offset=6), FRAME4, "csum"),
    "C15 an IP header of 16 bytes": (hdr(T4), edited(T4, 0, b"\x44"), "l3"),
    "C15 of 60 bytes, so that TCP is elsewhere": (hdr(T4), edited(T4, 0, b"\x4f"), "csum"),
    "C15 version 6 in IPv4": (hdr(T4), edited(T4, 0, b"\x65"), "l3"),
    "C15 a total length of nothing": (hdr(T4), edited(T4, 2, b"\0\0"), "l3"),
    "C15 less than the header": (hdr(T4), edited(T4, 2, b"\0\x13"), "l3"),
    "C15 one byte less than there is": (hdr(T4), edited(T4, 2, struct.pack(">H", 3039)), "l3"),
    "C15 one byte more": (hdr(T4), edited(T4, 2, struct.pack(">H", 3041)), "l3"),
    "C16 a TCP header of 16 bytes": (hdr(T4), edited(T4, 32, b"\x40"), "l4"),
    "C17 a UDP length of nothing": (hdr(U4), edited(U4, 24, b"\0\0"), "l4"),
    "C17 of seven": (hdr(U4), edited(U4, 24, b"\0\x07"), "l4"),
    "C17 one byte less than there is": (hdr(U4), edited(U4, 24, struct.pack(">H", 3007)), "l4"),
    "C17 one byte more": (hdr(U4), edited(U4, 24, struct.pack(">H", 3009)), "l4"),
    "C18 an extension header to behind the end": (
        hdr(T6),
        edited(replace(T6, extensions=[(HOP_BY_HOP, bytes(6))]), 41, b"\xff"),
        "ipv6_ext",
    ),
    "C18 nine of them": (
        (nine := replace(T6, extensions=[(DESTINATION, bytes(6))] * 9)).header(1448),
        nine.frame(partial=True),
        "ipv6_ext",
    ),
    "C19 a first fragment": (hdr(T4), replace(T4, fragment=0x2000).frame(partial=True), "fragment"),
    "C19 a last fragment": (hdr(T4), replace(T4, fragment=1).frame(partial=True), "fragment"),
    "C20 three tags": (
        (tagged := replace(T4, tags=ONE_TAG * 3)).header(1448),
        tagged.frame(partial=True),
        "vlan",
    ),
}


@pytest.mark.parametrize(("header", "sent", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_header_that_makes_no_sense_drops_its_frame_alone(
    bridge: core.Bridge, guests: MakeGuest, header: bytes, sent: bytes, reason: str
) -> None:
    a, b = two(bridge, guests)
    a.pair.send(sent, header=header)
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {reason: 1}
    still_works(a, b)
    assert not b.pair.packets()


@pytest.mark.parametrize("missing", ["HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO", "HOST_UFO"])
def test_a_kind_that_was_not_negotiated_is_refused(bridge: core.Bridge, guests: MakeGuest, missing: str) -> None:
    a, b = two(bridge, guests, sends=SENDS & ~mask(F[f"VIRTIO_NET_F_{missing}"]))
    kind = {"HOST_TSO4": T4, "HOST_TSO6": T6, "HOST_ECN": replace(T4, flags=ACK | CWR)}.get(missing, U4)
    gso_type = GSO_UDP if missing == "HOST_UFO" else None
    a.pair.send(kind.frame(partial=True), header=kind.header(1448, gso_type))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {"gso_type": 1}
    still_works(a, b)


@pytest.mark.parametrize(
    ("size", "payload", "reason"),
    [(8, 8 * 128, None), (8, 8 * 128 + 1, "gso_size"), (512, 512 * 127 + 1, None), (511, 511 * 128 + 1, "gso_size")],
)
def test_a_frame_may_become_128_frames_and_no_more(
    bridge: core.Bridge, guests: MakeGuest, size: int, payload: int, reason: str | None
) -> None:
    a, b = two(bridge, guests)
    sent = replace(T4, payload=noise(payload))
    a.pair.send(sent.frame(partial=True), header=sent.header(size))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == ({reason: 1} if reason else {})
    if not reason:
        assert [each.frame for each in finished(a, b, 128)] == [each.frame() for each in sent.segments(size)]


def test_a_size_beyond_the_payload_is_one_segment(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests)
    a.pair.send(T4.frame(partial=True), header=T4.header(0xFFFF))
    assert [each.frame for each in finished(a, b, 1)] == [T4.frame()]


@pytest.mark.parametrize("hdr_len", [0, 1, 30, 60, 4000, 0xFFFF])
def test_c5_the_length_of_headers_is_our_own_to_find(bridge: core.Bridge, guests: MakeGuest, hdr_len: int) -> None:
    a, b = two(bridge, guests)
    a.pair.send(FRAME4, header=hdr(T4, hdr_len=hdr_len))
    assert [each.frame for each in finished(a, b, 3)] == [each.frame() for each in T4.segments(1448)]


@pytest.mark.parametrize("flags", [NEEDS_CSUM | 0x02, NEEDS_CSUM | 0xF8])
def test_c9_c11_what_means_nothing_is_ignored(bridge: core.Bridge, guests: MakeGuest, flags: int) -> None:
    a, b = two(bridge, guests)
    a.pair.send(FRAME4, header=hdr(T4, flags=flags, num_buffers=77))
    got = finished(a, b, 3)
    assert [each.frame for each in got] == [each.frame() for each in T4.segments(1448)]
    assert {each.num_buffers for each in got} == {1}


def test_c10_checksum_fields_without_their_flag_are_ignored(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests, TAKES)
    a.pair.send(frame(mac(2), mac(1)), header=struct.pack("<BBHHHHH", 0, 0, 9, 9, 0xFFFF, 0xFFFF, 9))
    (got,) = finished(a, b, 1)
    assert (got.frame, got.header[:10]) == (frame(mac(2), mac(1)), bytes(10))


@pytest.mark.parametrize(
    ("size", "start", "offset", "legal"),
    [
        (64, 14, 0, True), (64, 13, 0, False), (64, 62, 0, True), (64, 63, 0, False), (64, 14, 48, True),
        (64, 14, 49, False), (64, 0xFFFF, 0, False), (64, 14, 0xFFFF, False), (64, 40, 1, True),
        (1500, 254, 0, True), (1500, 255, 0, False), (1500, 0xFFFF, 0xFFFF, False),
    ],
)  # fmt: skip
def test_c6_c7_c8_any_sum_within_the_first_256_bytes_is_made(
    bridge: core.Bridge, guests: MakeGuest, size: int, start: int, offset: int, legal: bool
) -> None:
    a, b = two(bridge, guests)
    sent = frame(mac(2), mac(1), size)
    a.pair.send(sent, header=struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, start, offset, 0))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == ({} if legal else {"csum": 1})
    if legal:
        at = start + offset
        wanted = sent[:at] + struct.pack(">H", ~fold(sent[start:]) & 0xFFFF or 0xFFFF) + sent[at + 2 :]
        assert b.pair.frames() == [wanted]
    still_works(a, b)


@pytest.mark.parametrize(("start", "legal"), [(17, False), (18, True)])
def test_c7_no_sum_is_made_within_a_tag(bridge: core.Bridge, guests: MakeGuest, start: int, legal: bool) -> None:
    a, b = two(bridge, guests)
    a.pair.send(frame(mac(2), mac(1), vlan=5), header=struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, start, 4, 0))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == ({} if legal else {"csum": 1})
    assert len(b.pair.frames() if legal else b.pair.packets()) == legal


def test_c8_sctp_has_no_sum_of_this_kind(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = two(bridge, guests)
    sent = Packet(4, 132, noise(100))
    a.pair.send(sent.frame(partial=True), header=struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 34, 8, 0))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {"csum": 1}
    still_works(a, b)


def test_c33_a_guest_without_mergeable_buffers_gets_a_whole_header(bridge: core.Bridge, guests: MakeGuest) -> None:
    a = guests(bridge, features=MODERN | SENDS, spans=RAM)
    b = guests(bridge, features=LEGACY | GUEST_CSUM, spans=RAM)
    for number, driver in enumerate((a, b), 1):
        bridge.set_mac(driver.port, mac(number), True)
    for _ in range(4):
        addr = b.memory.take(4096)
        b.memory.write(addr, b"\xee" * 4096)
        b.pair.post_at(addr, 4096)
    sent = Packet(4, UDP, noise(100))
    a.pair.send(sent.frame(partial=True), header=sent.header())
    a.pair.send(frame(mac(2), mac(1)))
    one, other = b.pair.receive(2)
    assert (one.header, one.frame) == (sent.header(length=10), sent.frame(partial=True))
    assert (other.header, other.frame) == (bytes(10), frame(mac(2), mac(1)))


def test_c24_many_small_segments_do_not_keep_a_neighbour_waiting(bridge: core.Bridge, guests: MakeGuest) -> None:
    """A turn takes no more of a guest than some hundreds of frames: the others' come in between."""
    a, b = two(bridge, guests)
    c = guests(bridge, features=MODERN, spans=RAM)
    bomb = replace(T4, payload=noise(8 * 128))
    bridge.stop()
    for _ in range(60):
        a.pair.queue(bomb.frame(partial=True), header=bomb.header(8))
    a.pair.tx.kick()
    c.pair.send(frame(mac(2), mac(7), mark=b"neighbour"))
    bridge.start()
    got = [each.frame for each in b.pair.receive(500)]
    assert got.index(frame(mac(2), mac(7), mark=b"neighbour")) <= 4 * 64 + 128


# ---- anything that makes sense, against the reference ----

options = st.sampled_from([b"", bytes(range(4)), b"\x01\x01\x08\x0a" + bytes(range(8)), bytes(range(40))])
extensions = st.lists(st.sampled_from([(HOP_BY_HOP, bytes(6)), (DESTINATION, bytes(range(14)))]), max_size=3)
packets = st.builds(
    Packet,
    st.sampled_from([4, 6]),
    st.sampled_from([TCP, TCP, UDP]),
    st.integers(1, 9000).map(noise),
    tags=st.sampled_from([b"", ONE_TAG, TWO_TAGS]),
    tos=st.integers(0, 255),
    ident=st.sampled_from([0, 7, 0xFFFE, 0xFFFF]),
    ttl=st.integers(1, 255),
    fragment=st.sampled_from([0, 0x4000]),
    extensions=extensions,
    seq=st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFF00, 0xFFFFFFFF]),
    flags=st.sets(st.sampled_from([FIN, PSH, URG, ECE, CWR])).map(lambda bits: sum(bits) | ACK),
    window=st.integers(0, 0xFFFF),
    options=options,
)
asked = st.tuples(packets, st.integers(100, 9000), st.lists(st.integers(0, 200), max_size=4))


@settings(max_examples=60, deadline=None)
@given(st.lists(asked, min_size=1, max_size=6), st.sampled_from([0, GUEST_CSUM]), st.sampled_from([0, RING_PACKED]))
def test_any_packet_is_cut_as_the_reference_cuts_it(
    played: Sequence[tuple[Packet, int, list[int]]], takes: int, layout: int
) -> None:
    with core.Bridge(workers=1, spin_us=20) as bridge:
        a = Driver(bridge, MODERN | SENDS | layout, spans=RAM)
        b = Driver(bridge, MODERN | takes | layout, num=1024, spans=RAM)
        try:
            bridge.start()
            for number, driver in enumerate((a.start(), b.start()), 1):
                bridge.set_mac(driver.port, mac(number), True)
            b.pair.post(1000, 10_000)
            wanted = []
            for packet, size, cuts in played:
                if packet.version == 4:
                    packet = replace(packet, extensions=())
                least = -(-len(packet.payload) // 128)
                size = max(size, least, 8)
                whole = packet.frame(partial=True)
                fit = [cut for at, cut in enumerate(cuts) if sum(cuts[: at + 1]) < 12 + len(whole)]
                fit = fit if sum(fit) < 12 + len(whole) else []
                a.pair.queue(whole, Layout("drawn", lambda _, fit=fit: fit), packet.header(size))
                wanted += [each.frame(partial=bool(takes)) for each in packet.segments(size)]
            a.pair.tx.kick()
            got = b.pair.receive(len(wanted))
            assert [each.frame for each in got] == wanted
            assert a.drops(core.TX) == {}
        finally:
            a.close()
            b.close()
