"""Checksums and segmentation that guests ask for: what is refused and why, what passes whole, what is cut and how.

The frames that come out are compared with those of rig/segments.py, byte for byte. C1 and so on are rows of the list
of hostile inputs.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rig.driver import TOGETHER, Driver, Layout, ledger
from tests.rig.guests import BROADCAST, MakeGuest, Pair, both_layouts, frame, mac
from tests.rig.offloads import (
    CSUM,
    GUEST,
    GUEST_CSUM,
    HOST,
    SENDS,
    TAKES,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    asks,
    data,
    kind_of,
    summed,
)
from tests.rig.rings import MODERN, RING_PACKED, VERSION_1, Span
from tests.rig.segments import (
    ACK,
    CWR,
    ECE,
    ECN,
    FIN,
    PSH,
    SYN,
    TCP,
    TSO4,
    TSO6,
    UDP,
    UFO,
    URG,
    USO,
    Segment,
    wire,
)
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

Link = Callable[..., Pair]


each_kind = pytest.mark.parametrize("whole", [TCP4, TCP6, UDP4, UDP6], ids=["tso4", "tso6", "uso4", "uso6"])


@pytest.fixture
def link(bridge: core.Bridge, guests: MakeGuest) -> Link:
    """Makes two guests that know each other: one that may ask for everything, one that takes `takes`."""

    def make(takes: int = 0, sends: int = SENDS, features: int = MODERN) -> Pair:
        a, b = guests(bridge, features=MODERN | sends), guests(bridge, features=features | takes)
        a.port.set_mac(mac(1), False)
        b.port.set_mac(mac(2), False)
        if features == MODERN:
            b.pair.fill()
        else:
            b.pair.post(8, 1 << 17)
        return a, b

    return make


def still_works(a: Driver, b: Driver) -> None:
    """A good frame passes, and every frame so far is in one counter."""
    sent = replace(TCP4, payload=b"after")
    a.pair.send(sent.frame())
    assert b.pair.frames() == [sent.frame()]
    into, out = ledger(a.bridge, {a.port: 1, b.port: 1})
    assert into == out


def refused(pair: Pair, header: bytes, sent: bytes, reason: str) -> None:
    a, b = pair
    before = a.drops(core.TX).get(reason, 0)
    others = sum(a.drops(core.TX).values()) - before
    a.pair.send(sent, header=header)
    assert a.pair.wait_sent()
    drops = a.drops(core.TX)
    assert (drops.get(reason, 0), sum(drops.values())) == (before + 1, others + before + 1), drops
    still_works(a, b)


def passes(pair: Pair, header: bytes, sent: bytes, wanted: Sequence[bytes], layout: Layout = TOGETHER) -> None:
    a, b = pair
    drops = a.drops(core.TX)
    b.pair.fill()
    a.pair.send(sent, layout, header)
    assert a.pair.wait_sent()
    assert b.pair.frames(len(wanted)) == list(wanted)
    assert a.drops(core.TX) == drops
    still_works(a, b)


# ---- C1 to C12: the header ----


@pytest.mark.parametrize("gso_type", [2, *range(6, 32), 0x20, 0x21, 0x40, 0x41, 0x61, 0x60, ECN, ECN | UFO, ECN | USO])
def test_c1_c12_a_gso_type_that_is_none_is_refused(link: Link, gso_type: int) -> None:
    refused(link(), TCP4.header(gso_type, 1000), TCP4.frame(partial=True), "gso_type")


@each_kind
def test_c1_a_gso_type_that_was_not_negotiated_is_refused(link: Link, whole: Segment) -> None:
    kind = kind_of(whole)
    pair = link(sends=SENDS & ~HOST[kind])
    refused(pair, whole.header(kind, 1000), whole.frame(partial=True), "gso_type")


def test_c1_ecn_that_was_not_negotiated_is_refused(link: Link) -> None:
    refused(link(sends=SENDS & ~HOST[ECN]), TCP4.header(TSO4 | ECN, 1000), TCP4.frame(partial=True), "gso_type")


def test_c1_ufo_that_was_not_negotiated_is_refused(link: Link) -> None:
    refused(link(sends=SENDS & ~HOST[UFO]), UDP4.header(UFO, 1000), UDP4.frame(partial=True), "gso_type")


def test_segmentation_without_the_checksum_feature_is_refused(link: Link) -> None:
    refused(link(sends=SENDS & ~CSUM), TCP4.header(TSO4, 1000), TCP4.frame(partial=True), "gso_type")


@pytest.mark.parametrize("size", [0, 1, 7])
@each_kind
def test_c2_segments_of_less_than_8_bytes_are_refused(link: Link, whole: Segment, size: int) -> None:
    whole = replace(whole, payload=data(100))
    refused(link(), whole.header(kind_of(whole), size), whole.frame(partial=True), "gso_size")


@each_kind
def test_c2_segments_of_8_bytes_pass(link: Link, whole: Segment) -> None:
    whole = replace(whole, payload=data(100))
    passes(link(), whole.header(kind_of(whole), 8), whole.frame(partial=True), wire(whole.cut(8)))


@each_kind
def test_c2_128_segments_pass_and_one_more_is_refused(link: Link, whole: Segment) -> None:
    pair = link()
    legal, illegal = (replace(whole, payload=data(size)) for size in (128 * 100, 128 * 100 + 1))
    passes(pair, legal.header(kind_of(whole), 100), legal.frame(partial=True), wire(legal.cut(100)))
    refused(pair, illegal.header(kind_of(whole), 100), illegal.frame(partial=True), "gso_size")


@pytest.mark.parametrize("takes", [0, TAKES], ids=["cut", "whole"])
@pytest.mark.parametrize("size", [3000, 3001, 0xFFFF])
@each_kind
def test_c2_what_fits_into_one_segment_is_a_frame_like_others(
    link: Link, whole: Segment, size: int, takes: int
) -> None:
    a, b = link(takes)
    a.pair.send(whole.frame(partial=True), header=whole.header(kind_of(whole), size))
    (packet,) = b.pair.receive()
    if takes:
        assert packet.frame == whole.frame(partial=True)
        assert packet.header == whole.header()[:10] + struct.pack("<H", packet.num_buffers)
    else:
        assert packet.frame == whole.frame()
    assert a.stats(core.TX).cut == 0
    still_works(a, b)


@each_kind
def test_c2_segmentation_of_no_payload_is_one_frame(link: Link, whole: Segment) -> None:
    empty = replace(whole, payload=b"")
    passes(link(), empty.header(kind_of(whole), 1000), empty.frame(partial=True), [empty.frame()])


@each_kind
def test_c3_segmentation_without_needs_csum_is_refused(link: Link, whole: Segment) -> None:
    header = b"\x00" + whole.header(kind_of(whole), 1000)[1:]
    refused(link(), header, whole.frame(), "gso_csum")


@pytest.mark.parametrize(
    ("kind", "whole"),
    [(TSO4, TCP6), (TSO4, UDP4), (TSO6, TCP4), (TSO6, UDP6), (USO, TCP4), (USO, TCP6), (UFO, TCP4), (UFO, TCP6)],
)
def test_c4_a_type_of_another_protocol_than_the_frame_s_is_refused(link: Link, kind: int, whole: Segment) -> None:
    refused(link(), whole.header(kind, 1000), whole.frame(partial=True), "gso_proto")


@pytest.mark.parametrize("kind", [TSO4, TSO6, USO, UFO])
@pytest.mark.parametrize("ethertype", [0, 0x0806, 0x8847, 0x88CC, 0x8808, 0x05DC, 0xFFFF], ids=hex)
def test_c4_c21_segmentation_of_what_is_not_ip_is_refused(link: Link, kind: int, ethertype: int) -> None:
    sent = mac(2) + mac(1) + struct.pack(">H", ethertype) + data(2000)
    refused(link(), TCP4.header(kind, 1000), sent, "gso_proto")


@pytest.mark.parametrize("hdr_len", [0, 1, 13, 53, 55, 0xFFFF])
@pytest.mark.parametrize("takes", [0, TAKES], ids=["cut", "whole"])
def test_c5_hdr_len_is_ignored(link: Link, hdr_len: int, takes: int) -> None:
    a, b = link(takes)
    a.pair.send(TCP4.frame(partial=True), header=TCP4.header(TSO4, 1000, hdr_len))
    packets = b.pair.receive(1 if takes else 3)
    assert [packet.frame for packet in packets] == ([TCP4.frame(partial=True)] if takes else wire(TCP4.cut(1000)))
    if takes:
        assert packets[0].header[2:4] == struct.pack("<H", TCP4.headers)
    still_works(a, b)


@pytest.mark.parametrize("size", [60, 255, 256])
def test_c6_a_checksum_at_the_very_end_passes_and_one_byte_further_is_refused(link: Link, size: int) -> None:
    pair = link()
    sent = frame(mac(2), mac(1), size)
    passes(pair, asks(size - 2, 0), sent, [summed(sent, size - 2, 0)])
    passes(pair, asks(size - 7, 5), sent, [summed(sent, size - 7, 5)])
    for start, offset in ((size - 1, 0), (size, 0), (size - 2, 1), (size + 1, 0), (0xFFFF, 0xFFFF), (20, 0xFFFF)):
        refused(pair, asks(start, offset), sent, "csum")


def test_c6_a_checksum_within_the_first_256_bytes_of_a_longer_frame(link: Link) -> None:
    pair = link()
    sent = frame(mac(2), mac(1), 1000)
    passes(pair, asks(254, 0), sent, [summed(sent, 254, 0)])
    refused(pair, asks(255, 0), sent, "csum")


def test_c7_a_checksum_behind_the_ethernet_header_passes_and_in_it_is_refused(link: Link) -> None:
    pair = link()
    sent = frame(mac(2), mac(1), 101)
    for start, offset in ((14, 0), (14, 1), (15, 2), (17, 3), (33, 16)):
        passes(pair, asks(start, offset), sent, [summed(sent, start, offset)])
    for start in (0, 6, 12, 13):
        refused(pair, asks(start, 40), sent, "csum")


@pytest.mark.parametrize("tags", [1, 2, 3])
def test_c7_a_checksum_in_the_tags_that_decided_where_a_frame_goes_is_refused(link: Link, tags: int) -> None:
    pair = link()
    sent = mac(2) + mac(1) + b"\x81\0\0\5" * tags + b"\x88\xb5" + data(80)
    start = 14 + 4 * min(tags, 2)
    refused(pair, asks(start - 1, 0), sent, "csum")
    refused(pair, asks(14, 20), sent, "csum")
    passes(pair, asks(start, 0), sent, [summed(sent, start, 0)])


@pytest.mark.parametrize("protocol", [1, 2, 33, 47, 58, 200])
@pytest.mark.parametrize("version", [4, 6])
def test_c8_a_checksum_of_another_protocol_is_made(link: Link, protocol: int, version: int) -> None:
    sent = replace(TCP4, version=version, protocol=protocol).ip(data(77))
    start = 14 + (20 if version == 4 else 40)
    passes(link(), asks(start, 2), sent, [summed(sent, start, 2)])


@pytest.mark.parametrize("version", [4, 6])
def test_c8_sctp_s_checksum_is_another_and_refused(link: Link, version: int) -> None:
    sent = replace(TCP4, version=version, protocol=132).ip(data(77))
    refused(link(), asks(14 + (20 if version == 4 else 40), 8), sent, "csum")


@pytest.mark.parametrize("flags", [0x02, 0x04, 0xFE])
def test_c9_flags_without_a_meaning_are_ignored(link: Link, flags: int) -> None:
    pair = link()
    passes(pair, bytes([flags]) + bytes(11), TCP4.frame(), [TCP4.frame()])
    header = TCP4.header(TSO4, 1000)
    passes(pair, bytes([header[0] | flags]) + header[1:], TCP4.frame(partial=True), wire(TCP4.cut(1000)))


@pytest.mark.parametrize("takes", [0, TAKES])
def test_c10_c11_fields_that_nothing_is_asked_with_are_ignored(link: Link, takes: int) -> None:
    a, b = link(takes)
    a.pair.send(TCP4.frame(), header=b"\0\0" + b"\xff" * 10)
    (packet,) = b.pair.receive()
    assert (packet.frame, packet.header) == (TCP4.frame(), bytes(10) + struct.pack("<H", packet.num_buffers))


def test_c11_num_buffers_is_ignored(link: Link) -> None:
    passes(link(), TCP4.header(TSO4, 1000)[:10] + b"\xff\xff", TCP4.frame(partial=True), wire(TCP4.cut(1000)))


@pytest.mark.parametrize("size", [0, 1, 13])
def test_c13_a_runt_that_asks_for_something_is_refused(link: Link, size: int) -> None:
    refused(link(), asks(14, 0), frame(mac(2), mac(1), size), "runt" if size else "short")


def test_c14_the_longest_ip_packet_is_cut_and_a_longer_frame_is_refused(link: Link) -> None:
    a, b = link()
    whole = replace(TCP4, payload=data(65535 - 40), tags=b"\x88\xa8\0\5\x81\0\0\6")
    a.pair.send(whole.frame(partial=True), header=whole.header(TSO4, 1448))
    wanted = wire(whole.cut(1448))
    assert b.pair.frames(len(wanted)) == wanted
    refused((a, b), whole.header(TSO4, 1448), whole.frame(partial=True) + b"x", "oversize")


# ---- C15 to C21: the frame ----


def put(sent: bytes, at: int, value: bytes) -> bytes:
    return sent[:at] + value + sent[at + len(value) :]


def raw_or_refused(pair: Pair, whole: Segment, sent: bytes, reason: str) -> None:
    """Nothing is asked for: nobody looks. Something is: then it is refused."""
    passes(pair, bytes(12), sent, [sent])
    refused(pair, whole.header(kind_of(whole), 1000), sent, reason)


@pytest.mark.parametrize(
    ("at", "value"),
    [(14, bytes([0x40 | words])) for words in range(5)]  # IHL too small
    + [(14, b"\x65"), (14, b"\x05"), (14, b"\xf5")]  # not IPv4
    + [(16, struct.pack(">H", size)) for size in (0, 19, 3039, 3041, 0xFFFF)],
)
def test_c15_an_ipv4_header_that_lies_is_refused_where_it_matters(link: Link, at: int, value: bytes) -> None:
    raw_or_refused(link(), TCP4, put(TCP4.frame(partial=True), at, value), "l3")


@pytest.mark.parametrize(
    ("at", "value"), [(18, struct.pack(">H", size)) for size in (3019, 3021, 0xFFFF)] + [(14, b"\x40")]
)
def test_c15_an_ipv6_header_that_lies_is_refused_where_it_matters(link: Link, at: int, value: bytes) -> None:
    raw_or_refused(link(), TCP6, put(TCP6.frame(partial=True), at, value), "l3")


@pytest.mark.parametrize("whole", [TCP4, TCP6], ids=["v4", "v6"])
def test_c15_bytes_behind_the_packet_are_refused_where_they_matter(link: Link, whole: Segment) -> None:
    raw_or_refused(link(), whole, whole.frame(partial=True) + b"x", "l3")


@pytest.mark.parametrize("words", range(5))
@pytest.mark.parametrize("whole", [TCP4, TCP6], ids=["v4", "v6"])
def test_c16_a_tcp_header_of_less_than_20_bytes_is_refused_where_it_matters(
    link: Link, whole: Segment, words: int
) -> None:
    raw_or_refused(link(), whole, put(whole.frame(partial=True), whole.l4 + 12, bytes([words << 4])), "l4")


@pytest.mark.parametrize("size", [0, 1, 19, 20, 39])
def test_c16_a_tcp_header_longer_than_the_packet_is_refused(link: Link, size: int) -> None:
    whole = replace(TCP4, payload=b"")
    sent = put(whole.ip(whole.transport(True)[:size].ljust(size, b"\0")), 34 + 12, b"\xa0"[: max(0, size - 12)])
    raw_or_refused(link(), TCP4, sent, "l4")


@pytest.mark.parametrize("length", [0, 7, 9, 3007, 3009, 0xFFFF])
@pytest.mark.parametrize("kind", [USO, UFO])
@pytest.mark.parametrize("whole", [UDP4, UDP6], ids=["v4", "v6"])
def test_c17_a_udp_length_that_lies_is_refused_where_it_matters(
    link: Link, whole: Segment, kind: int, length: int
) -> None:
    pair = link()
    sent = put(whole.frame(partial=True), whole.l4 + 4, struct.pack(">H", length))
    passes(pair, bytes(12), sent, [sent])
    refused(pair, whole.header(kind, 1000), sent, "l4")


def extension(size: int, kind: int = 0) -> tuple[int, bytes]:
    """An extension header of so many bytes: hop-by-hop (0), routing (43) or destination options (60)."""
    return kind, bytes([size // 8 - 1]) + bytes([1, size - 4]) + bytes(size - 4)


@pytest.mark.parametrize("whole", [TCP6, UDP6], ids=["tcp", "udp"])
def test_c18_8_extension_headers_pass_and_9_are_refused(link: Link, whole: Segment) -> None:
    pair = link()
    legal, illegal = (replace(whole, extensions=(extension(8, 60),) * count) for count in (8, 9))
    passes(pair, legal.header(kind_of(whole), 1000), legal.frame(partial=True), wire(legal.cut(1000)))
    raw_or_refused(pair, illegal, illegal.frame(partial=True), "ipv6_ext")
    many = replace(whole, extensions=(extension(8, 60),) * 200)
    raw_or_refused(pair, many, many.frame(partial=True), "ipv6_ext")


def test_c18_headers_of_256_bytes_pass_and_of_more_are_refused(link: Link) -> None:
    pair = link()
    room = 256 - 14 - 40 - 20  # 182
    legal = replace(TCP6, extensions=(extension(room // 8 * 8, 60),), options=b"\1" * 4)
    assert legal.headers == 254
    passes(pair, legal.header(TSO6, 1000), legal.frame(partial=True), wire(legal.cut(1000)))
    illegal = replace(legal, options=b"\1" * 8)
    raw_or_refused(pair, illegal, illegal.frame(partial=True), "l4")
    illegal = replace(legal, extensions=(extension(208, 60),))
    raw_or_refused(pair, illegal, illegal.frame(partial=True), "ipv6_ext")


@pytest.mark.parametrize("kind", [50, 51, 59, 135, 254], ids=["esp", "ah", "none", "mobility", "unknown"])
def test_c18_what_is_behind_a_header_of_another_kind_is_not_looked_at(link: Link, kind: int) -> None:
    sent = replace(TCP6, extensions=(extension(16, kind),)).frame(partial=True)
    raw_or_refused(link(), TCP6, sent, "gso_proto")


def test_c18_a_jumbogram_is_refused(link: Link) -> None:
    jumbo = (0, bytes([0, 0xC2, 4]) + struct.pack(">I", 3028))
    sent = put(replace(TCP6, extensions=(jumbo,)).frame(partial=True), 18, b"\0\0")
    raw_or_refused(link(), TCP6, sent, "ipv6_ext")


@pytest.mark.parametrize("size", range(54, 98))
def test_c18_an_extension_header_or_what_is_behind_it_is_cut_off(link: Link, size: int) -> None:
    """14 and 40 bytes of Ethernet and IPv6, 24 of an extension header, 20 of TCP."""
    whole = replace(TCP6, extensions=(extension(24),), payload=b"")
    sent = put(whole.frame(partial=True)[:size], 18, struct.pack(">H", size - 54))
    raw_or_refused(link(), whole, sent, "ipv6_ext" if size < 78 else "l4")


def test_c18_ufo_behind_extension_headers_is_refused(link: Link) -> None:
    whole = replace(UDP6, extensions=(extension(8),))
    refused(link(), whole.header(UFO, 1000), whole.frame(partial=True), "ipv6_ext")


@pytest.mark.parametrize("fragment", [0x2000, 0x2001, 0x0001, 0x1FFF])
@pytest.mark.parametrize("whole", [TCP4, UDP4], ids=["tcp", "udp"])
def test_c19_ipv4_fragments_are_refused_with_segmentation(link: Link, whole: Segment, fragment: int) -> None:
    raw_or_refused(link(), whole, replace(whole, fragment=fragment).frame(partial=True), "fragment")


@pytest.mark.parametrize("offset", [0, 1, 8, 0xFFF8])
def test_c19_ipv6_fragments_are_refused_with_segmentation(link: Link, offset: int) -> None:
    whole = replace(TCP6, extensions=((44, struct.pack(">BHI", 0, offset, 7)),))
    raw_or_refused(link(), whole, whole.frame(partial=True), "fragment")


def test_c19_a_fragment_s_checksum_alone_is_made(link: Link) -> None:
    sent = replace(UDP4, fragment=0x2000).frame(partial=True)
    passes(link(), asks(34, 6), sent, [summed(sent, 34, 6)])


@pytest.mark.parametrize("tag", [b"\x81\0\0\0", b"\x81\0\x0f\xff", b"\x88\xa8\0\5"], ids=["0", "4095", "service"])
@each_kind
def test_c20_2_tags_pass_and_3_are_refused(link: Link, whole: Segment, tag: bytes) -> None:
    pair = link()
    for count in (1, 2):
        legal = replace(whole, tags=tag * count)
        passes(pair, legal.header(kind_of(whole), 1000), legal.frame(partial=True), wire(legal.cut(1000)))
    for count in (3, 64):
        illegal = replace(whole, tags=tag * count)
        raw_or_refused(pair, illegal, illegal.frame(partial=True), "vlan")


@pytest.mark.parametrize("size", [14, 15, 17])
def test_c20_a_tag_that_is_cut_off(link: Link, size: int) -> None:
    sent = replace(TCP4, tags=b"\x81\0\0\5").frame()[:size]
    raw_or_refused(link(), TCP4, sent, "vlan")


@pytest.mark.parametrize("ethertype", [0, 100, 0x05DC, 0x0806, 0x6558, 0x8847, 0x8864, 0x88CC, 0xFFFF], ids=hex)
def test_c21_frames_of_other_kinds_pass_with_a_checksum_too(link: Link, ethertype: int) -> None:
    pair = link()
    sent = mac(2) + mac(1) + struct.pack(">H", ethertype) + data(100)
    passes(pair, bytes(12), sent, [sent])
    passes(pair, asks(20, 10), sent, [summed(sent, 20, 10)])


# ---- C25: what the segments are ----


FLAGS = [ACK, ACK | PSH, ACK | FIN, ACK | PSH | FIN | CWR | ECE, SYN, ACK | URG, ACK | CWR, 0, 0xFF]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("ecn", [0, ECN])
@pytest.mark.parametrize("whole", [TCP4, TCP6], ids=["v4", "v6"])
def test_c25_flags_are_the_first_s_or_the_last_s(link: Link, whole: Segment, flags: int, ecn: int) -> None:
    whole = replace(whole, flags=flags, urgent=9)
    passes(link(), whole.header(kind_of(whole) | ecn, 1000), whole.frame(partial=True), wire(whole.cut(1000)))


@pytest.mark.parametrize("back", [0, 1, 500, 1000, 2999])
def test_c25_sequence_and_identification_wrap(link: Link, back: int) -> None:
    whole = replace(TCP4, seq=0xFFFFFFFF - back, ident=0xFFFF - back % 3)
    passes(link(), whole.header(TSO4, 1000), whole.frame(partial=True), wire(whole.cut(1000)))


@pytest.mark.parametrize("size", [8, 15, 1000, 1007])
def test_a_datagram_becomes_fragments(link: Link, size: int) -> None:
    """Of a multiple of 8 bytes each, whatever was asked for."""
    pair = link(GUEST_CSUM)
    four = replace(UDP4, payload=data(min(3000, 120 * 8)) if size < 100 else UDP4.payload)
    passes(pair, four.header(UFO, size), four.frame(partial=True), four.fragments(size // 8 * 8))
    six = replace(four, version=6)
    a, b = pair
    a.pair.send(six.frame(partial=True), header=six.header(UFO, size))
    assert a.pair.wait_sent()
    got = b.pair.frames(len(six.fragments(size // 8 * 8)))
    (ident,) = struct.unpack(">I", got[0][58:62])
    assert got == six.fragments(size // 8 * 8, ident)
    assert (a.stats(core.TX).csum_completed, a.stats(core.TX).csum_partial) == (2, 0)


@each_kind
def test_c16_headers_that_are_spread_over_descriptors_at_any_byte(link: Link, whole: Segment) -> None:
    pair = link()
    if whole.protocol == TCP:
        whole = replace(whole, options=b"\1\1\x08\x0a" + bytes(8))
    header, sent, wanted = whole.header(kind_of(whole), 1000), whole.frame(partial=True), wire(whole.cut(1000))
    for at in range(1, 12 + whole.headers + 2):
        passes(pair, header, sent, wanted, Layout("in two", lambda _, n=at: [n]))  # type: ignore[misc]
    passes(pair, header, sent, wanted, Layout("each byte", lambda hdr: [1] * (hdr + whole.headers + 30)))
    passes(pair, header, sent, wanted, Layout("empties", lambda hdr: [0, 5, 0, hdr, 0, 90, 0, 1, 0, 0]))


def test_a_frame_of_1024_pieces_is_cut(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, features=MODERN | SENDS, num=2048), guests(bridge)
    b.pair.fill()
    whole = replace(TCP4, to=BROADCAST)
    layout = Layout("many", lambda hdr: [hdr, *[1] * 1022])
    for size in (2000, 1000, 30):
        a.pair.send(whole.frame(partial=True), layout, whole.header(TSO4, size))
        assert a.pair.wait_sent()
        wanted = wire(whole.cut(size))
        assert b.pair.frames(len(wanted)) == wanted


# ---- C33, C34: what the receiver gets ----


@pytest.mark.parametrize(
    ("whole", "kind"),
    [(TCP4, TSO4), (TCP4, TSO4 | ECN), (TCP6, TSO6), (UDP4, USO), (UDP6, USO), (UDP4, UFO), (UDP6, UFO)],
)
@pytest.mark.parametrize("features", [MODERN, VERSION_1], ids=["mergeable", "big buffers"])
def test_c33_a_receiver_that_takes_it_gets_the_frame_whole(
    link: Link, whole: Segment, kind: int, features: int
) -> None:
    a, b = link(TAKES, features=features)
    a.pair.send(whole.frame(partial=True), header=whole.header(kind, 1000, hdr_len=3)[:10] + b"\xee\xee")
    (packet,) = b.pair.receive()
    assert packet.frame == whole.frame(partial=True)
    assert packet.header == whole.header(kind, 1000)[:10] + struct.pack("<H", len(packet.lengths))
    assert len(packet.lengths) == (2 if features == MODERN else 1)
    stats = a.stats(core.TX)
    assert (stats.cut, stats.segments, stats.csum_completed, stats.csum_partial) == (0, 0, 0, 1)
    still_works(a, b)


@each_kind
@pytest.mark.parametrize("takes", [0, GUEST_CSUM], ids=["nothing", "checksums"])
def test_c34_a_receiver_that_does_not_take_it_gets_segments(link: Link, whole: Segment, takes: int) -> None:
    a, b = link(takes)
    a.pair.send(whole.frame(partial=True), header=whole.header(kind_of(whole), 1000))
    packets = b.pair.receive(3)
    parts = whole.cut(1000)
    assert [packet.frame for packet in packets] == [part.frame(partial=bool(takes)) for part in parts]
    assert [packet.header[:10] for packet in packets] == [parts[0].header()[:10] if takes else bytes(10)] * 3
    stats = a.stats(core.TX)
    assert (stats.packets, stats.cut, stats.segments) == (1, 1, 2)
    assert (stats.csum_completed, stats.csum_partial) == ((0, 3) if takes else (3, 0))
    still_works(a, b)


@pytest.mark.parametrize(("without", "kind", "whole"), [(TSO4, TSO4, TCP4), (ECN, TSO4 | ECN, TCP4), (UFO, UFO, UDP4)])
def test_c34_one_feature_less_is_enough(link: Link, without: int, kind: int, whole: Segment) -> None:
    a, b = link(TAKES & ~GUEST[without])
    a.pair.send(whole.frame(partial=True), header=whole.header(kind, 1000))
    wanted = whole.fragments(1000) if kind == UFO else [part.frame(partial=True) for part in whole.cut(1000)]
    assert b.pair.frames(len(wanted)) == wanted
    still_works(a, b)


@each_kind
def test_c34_a_partial_checksum_is_completed_or_handed_on(link: Link, whole: Segment) -> None:
    a, b = link()
    passes((a, b), whole.header(), whole.frame(partial=True), [whole.frame()])
    assert (a.stats(core.TX).csum_completed, a.stats(core.TX).csum_partial) == (1, 0)


@each_kind
def test_a_partial_checksum_is_handed_on(link: Link, whole: Segment) -> None:
    a, b = link(GUEST_CSUM)
    a.pair.send(whole.frame(partial=True), header=whole.header())
    (packet,) = b.pair.receive()
    assert (packet.frame, packet.header[:10]) == (whole.frame(partial=True), whole.header()[:10])
    assert (a.stats(core.TX).csum_completed, a.stats(core.TX).csum_partial) == (0, 1)


def test_a_checksum_that_comes_to_zero_is_ones(link: Link) -> None:
    pair = link()
    for filler in range(0x10000):
        whole = replace(UDP4, payload=struct.pack(">H", filler))
        if whole.frame()[40:42] == b"\xff\xff":
            break
    passes(pair, whole.header(), whole.frame(partial=True), [whole.frame()])


def test_plain_partial_and_large_frames_of_a_burst_keep_their_order(link: Link) -> None:
    a, b = link()
    plain, partial = replace(UDP4, payload=b"plain"), replace(TCP6, payload=b"partial")
    wanted = []
    for number in range(12):
        kind = number % 4
        if kind == 0:
            a.pair.queue(plain.frame())
            wanted.append(plain.frame())
        elif kind == 1:
            a.pair.queue(partial.frame(partial=True), header=partial.header())
            wanted.append(partial.frame())
        else:
            whole = replace(TCP4, seq=number << 16) if kind == 2 else replace(UDP6, payload=data(2500, number))
            a.pair.queue(whole.frame(partial=True), header=whole.header(kind_of(whole), 1000))
            wanted += wire(whole.cut(1000))
    a.pair.tx.kick()
    assert a.pair.wait_sent()
    assert b.pair.frames(len(wanted)) == wanted
    still_works(a, b)


@pytest.mark.parametrize("order", [(0, TAKES, GUEST_CSUM), (TAKES, GUEST_CSUM, 0), (GUEST_CSUM, 0, TAKES)], ids=str)
@pytest.mark.parametrize(
    ("whole", "kind"), [(TCP4, TSO4), (TCP6, TSO6), (UDP4, USO), (UDP6, USO), (UDP4, UFO), (UDP6, UFO), (TCP4, 0)]
)
def test_a_flooded_frame_is_for_each_port_what_that_takes(
    bridge: core.Bridge, guests: MakeGuest, order: Sequence[int], whole: Segment, kind: int
) -> None:
    whole = replace(whole, to=BROADCAST)
    a = guests(bridge, features=MODERN | SENDS)
    others = {takes: guests(bridge, features=MODERN | takes) for takes in order}
    for each in others.values():
        each.pair.fill()
    a.pair.send(whole.frame(partial=True), header=whole.header(kind, 1000 if kind else 0))
    assert a.pair.wait_sent()
    (packet,) = others[TAKES].pair.receive()
    if kind:
        assert packet.frame == whole.frame(partial=True)
        assert packet.header[:10] == whole.header(kind, 1000)[:10]
        for takes in (0, GUEST_CSUM):
            count = len(whole.fragments(1000) if kind == UFO else whole.cut(1000))
            got = others[takes].pair.frames(count)
            if kind == UFO:
                ident = struct.unpack(">I", got[0][58:62])[0] if whole.version == 6 else 0
                assert got == whole.fragments(1000, ident)
            else:
                assert got == [part.frame(partial=bool(takes)) for part in whole.cut(1000)]
    else:
        # Once it is complete, it is that for whoever comes after.
        assert packet.frame in (whole.frame(partial=True), whole.frame())
        assert packet.header[0] == (packet.frame != whole.frame())
        assert others[0].pair.frames() == [whole.frame()]
    into, out = ledger(bridge, {each.port: 1 for each in (a, *others.values())})
    assert into == out


def test_c24_frames_of_many_segments_do_not_keep_others_waiting(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, features=MODERN | SENDS), guests(bridge)
    a.port.set_mac(mac(1), False)
    b.port.set_mac(mac(2), False)
    b.pair.fill()
    bomb = replace(TCP4, payload=data(128 * 8))
    for _ in range(64):
        a.pair.queue(bomb.frame(partial=True), header=bomb.header(TSO4, 8))
    a.pair.tx.kick()
    assert a.pair.wait_sent()
    assert a.stats(core.TX).segments == 64 * 127
    assert b.pair.frames(256)[:128] == wire(bomb.cut(8))
    assert b.drops(core.RX)["no_buffer"] + b.waiting() == 64 * 128 - 256
    assert a.stats(core.TX).bursts >= 64 * 128 // (4 * 64 + 127)
    b.drain()
    still_works(a, b)


def test_c24_a_guest_that_asks_for_the_most_and_smallest_segments_takes_no_more_than_its_turns(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    """While both have frames waiting, so many segments go out between two bursts of the other, and no more."""
    greedy, modest = guests(bridge, features=MODERN | SENDS), guests(bridge)
    receiver = guests(bridge, num=4096, spans=(Span(0x4000_0000, 32 << 20, 0x7F12_0000_0000, 0),))
    for number, each in enumerate((greedy, modest, receiver)):
        each.port.set_mac(mac(1 + number), False)
    receiver.pair.fill()
    bridge.stop()
    bomb = replace(TCP4, to=mac(3), payload=data(128 * 8))
    for _ in range(250):
        greedy.pair.queue(bomb.frame(partial=True), header=bomb.header(TSO4, 8))
    small = replace(TCP4, to=mac(3), source=mac(2), payload=b"modest").frame()
    for _ in range(250):
        modest.pair.queue(small)
    for each in greedy, modest:
        each.pair.tx.kick()
    bridge.start()
    assert modest.pair.wait_sent()
    got = receiver.pair.frames()
    assert got.count(small) == 250
    before = len(got) - 1 - got[::-1].index(small) + 1 - 250
    turns = -(-250 // 64) + 2
    assert before <= turns * (4 * 64 + 127)
    assert greedy.pair.wait_sent()
    assert greedy.stats(core.TX).segments == 250 * 127


def test_c24_64_kib_in_segments_of_8_bytes_is_refused_whole(link: Link) -> None:
    whole = replace(TCP4, payload=data(65535 - 40))
    pair = link()
    refused(pair, whole.header(TSO4, 8), whole.frame(partial=True), "gso_size")
    assert pair[0].stats(core.TX).segments == 0


# ---- any frame ----


tags = st.sampled_from([b"", b"\x81\0\0\5", b"\x88\xa8\0\6\x81\0\0\7"])
seeds = st.integers(0, 1 << 30)
words = st.sampled_from([0, 0, 4, 12, 20, 40])
extensions = st.lists(st.tuples(st.sampled_from([8, 16, 40]), st.sampled_from([0, 43, 60])), max_size=3)
cuts: st.SearchStrategy[list[int]] = st.one_of(
    st.just([]), st.lists(st.integers(0, 300), max_size=12), st.just([1] * 150)
)


@st.composite
def large_frames(draw: st.DrawFn) -> tuple[Segment, int, int, list[int]]:
    """A frame, how it is to be cut and into what size, and the descriptors that it lies in."""
    version, protocol = draw(st.sampled_from([4, 6])), draw(st.sampled_from([TCP, UDP]))
    size = draw(st.one_of(st.integers(8, 80), st.integers(500, 1500)))
    ufo = protocol == UDP and draw(st.booleans())
    most = min(128 * (size - size % 8 if ufo else size) - 8 * ufo, 12000)
    length = draw(st.one_of(st.integers(0, most), st.integers(0, most // size).map(lambda n: min(n * size + 1, most))))
    segment = Segment(
        version=version,
        protocol=protocol,
        payload=data(length, draw(seeds)),
        tags=draw(tags),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(0, 255)),
        ident=draw(st.integers(0xFF00, 0xFFFF) | st.integers(0, 0xFFFF)),
        fragment=draw(st.sampled_from([0, 0x4000])),
        flow=draw(st.integers(0, 0xFFFFF)),
        ip_options=b"\1" * draw(words) if version == 4 else b"",
        extensions=tuple(extension(*each) for each in draw(extensions)) if version == 6 and not ufo else (),
        ports=(draw(st.integers(0, 0xFFFF)), draw(st.integers(0, 0xFFFF))),
        seq=draw(st.integers(0, 0xFFFFFFFF) | st.integers(0xFFFF0000, 0xFFFFFFFF)),
        ack=draw(st.integers(0, 0xFFFFFFFF)),
        flags=draw(st.integers(0, 255)),
        window=draw(st.integers(0, 0xFFFF)),
        urgent=draw(st.integers(0, 0xFFFF)),
        options=b"\1" * draw(words) if protocol == TCP else b"",
        addresses=(draw(st.integers(0, 255)), draw(st.integers(0, 255))),
    )
    kind = UFO if ufo else kind_of(segment) | (ECN * draw(st.booleans()) if protocol == TCP else 0)
    return segment, kind, size, draw(cuts)


@pytest.fixture(scope="module", params=[0, RING_PACKED], ids=["split", "packed"])
def lane(request: pytest.FixtureRequest) -> Iterator[dict[int, Pair]]:
    """A guest that asks for everything, and guests that take nothing, checksums, or everything."""
    with core.Bridge() as bridge:
        bridge.start()
        a = Driver(bridge, MODERN | SENDS | request.param, num=2048)
        a.port.set_mac(mac(1), False)
        pairs = {}
        for number, takes in enumerate((0, GUEST_CSUM, TAKES)):
            pairs[takes] = a, Driver(bridge, MODERN | takes | request.param, num=1024)
            pairs[takes][1].port.set_mac(mac(10 + number), False)
        drivers = [a, *(b for _, b in pairs.values())]
        for each in drivers:
            each.start()
        yield pairs
        for each in drivers:
            each.close()


def through(pair: Pair, batch: Sequence[tuple[Segment, int, int, list[int]]]) -> list[tuple[bytes, bytes]]:
    """What the receiver gets, headers and frames."""
    a, b = pair
    drops = a.drops(core.TX)
    b.pair.fill()
    for whole, kind, size, sizes in batch:
        packet = 12 + whole.headers + len(whole.payload)
        fit = [each for at, each in enumerate(sizes) if sum(sizes[: at + 1]) <= packet]
        a.pair.queue(
            whole.frame(partial=True),
            Layout("drawn", lambda _, pieces=fit: pieces),  # type: ignore[misc]
            whole.header(kind, size),
        )
    a.pair.tx.kick()
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == drops
    return [(packet.header, packet.frame) for packet in b.pair.packets()]


def to(number: int, batch: Sequence[tuple[Segment, int, int, list[int]]]) -> list[tuple[Segment, int, int, list[int]]]:
    return [(replace(whole, to=mac(number)), *rest) for whole, *rest in batch]  # type: ignore[misc]


@settings(max_examples=150, deadline=None)
@given(batch=st.lists(large_frames(), min_size=1, max_size=6))
def test_any_frame_is_cut_into_the_frames_of_the_reference(
    lane: dict[int, Pair], batch: list[tuple[Segment, int, int, list[int]]]
) -> None:
    batch = to(10, batch)
    got = [sent for _, sent in through(lane[0], batch)]
    wanted: list[bytes] = []
    for whole, kind, size, _ in batch:
        size -= size % 8 if kind == UFO else 0
        if kind != UFO or 8 + len(whole.payload) <= size:
            wanted += wire(whole.cut(size))
            continue
        ident = 0
        if whole.version == 6 and len(got) > len(wanted):
            at = whole.l4 + 4
            (ident,) = struct.unpack(">I", got[len(wanted)][at : at + 4])
        wanted += whole.fragments(size, ident)
    assert got == wanted


@settings(max_examples=80, deadline=None)
@given(batch=st.lists(large_frames(), min_size=1, max_size=6))
def test_any_frame_is_whole_for_whom_takes_it_and_partial_for_whom_takes_that(
    lane: dict[int, Pair], batch: list[tuple[Segment, int, int, list[int]]]
) -> None:
    batch = [each for each in batch if each[1] != UFO]
    whole_ones = to(12, batch)
    for (header, sent), (whole, kind, size, _) in zip(through(lane[TAKES], whole_ones), whole_ones, strict=True):
        single = len(whole.payload) <= size
        assert sent == whole.frame(partial=True)
        assert header[:10] == (whole.header() if single else whole.header(kind, size))[:10]
    parts = [part for whole, _, size, _ in to(11, batch) for part in whole.cut(size)]
    got = through(lane[GUEST_CSUM], to(11, batch))
    assert got == [(part.header()[:10] + b"\1\0", part.frame(partial=True)) for part in parts]
