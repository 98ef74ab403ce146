"""Frames of a burst from the wire that are joined for a guest: which, which not, and that cut again they are the same.

The core's gro and gso are called directly, on bursts of the test's choice; what goes in is made by rig/segments.py.
"""

import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.native.offload import BURST, Joined, Offload
from tests.rig.segments import ACK, CWR, ECE, FIN, PSH, RST, SYN, TCP, TSO4, TSO6, UDP, URG, USO, Segment, wire

pytestmark = [pytest.mark.core, pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")]

NEED_CSUM, NEED_TSO4, NEED_TSO6, NEED_ECN, NEED_UFO, NEED_USO4, NEED_USO6 = (1 << bit for bit in range(7))
ALL = 0x7F
PARTIAL, VALID = 1, 2
NOP = b"\1"

TCP4 = Segment(payload=random.Random(1).randbytes(4000))
TCP6 = replace(TCP4, version=6)
UDP4 = replace(TCP4, protocol=UDP)
UDP6 = replace(TCP6, protocol=UDP)
KINDS = {
    "tcp4": (TCP4, NEED_TSO4, TSO4),
    "tcp6": (TCP6, NEED_TSO6, TSO6),
    "udp4": (UDP4, NEED_USO4, USO),
    "udp6": (UDP6, NEED_USO6, USO),
}
each_kind = pytest.mark.parametrize(("whole", "need", "gso_type"), KINDS.values(), ids=KINDS.keys())


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Offload:
    return Offload(tmp_path_factory.mktemp("offload"))


def apart(offload: Offload, frames: Sequence[bytes], takes: int = ALL) -> Joined:
    """None is joined, none is changed."""
    made = offload.join(frames, takes)
    assert [each for _, each in made.frames] == list(frames)
    return made


@each_kind
@pytest.mark.parametrize("piece", [0, 700])
def test_a_stream_becomes_the_frame_that_it_was_cut_from(
    offload: Offload, whole: Segment, need: int, gso_type: int, piece: int
) -> None:
    for tags in b"", b"\x81\0\0\5", b"\x88\xa8\0\6\x81\0\0\5":
        tagged = replace(whole, tags=tags)
        sent = wire(tagged.cut(999))
        made = offload.join(sent, NEED_CSUM | need, piece)
        wanted = tagged.header(gso_type, 999)[:10] + b"\1\0"
        assert made.frames == [(wanted, tagged.frame(partial=True))]
        assert (made.cut, made.verified) == (sent, len(sent))


@each_kind
def test_what_the_guest_does_not_take_is_not_joined(offload: Offload, whole: Segment, need: int, gso_type: int) -> None:
    made = apart(offload, wire(whole.cut(1000)), ALL & ~need)
    assert all(header[0] == 0 for header, _ in made.frames)
    assert made.verified == 0


@each_kind
def test_partial_checksums_are_joined_without_a_look(
    offload: Offload, whole: Segment, need: int, gso_type: int
) -> None:
    parts = whole.cut(1000)
    made = offload.join([part.frame(partial=True) for part in parts], ALL)
    assert [each for _, each in made.frames] == [whole.frame(partial=True)]
    assert (made.cut, made.verified) == (wire(parts), 0)


def test_right_and_partial_checksums_go_together(offload: Offload) -> None:
    parts = TCP4.cut(1000)
    made = offload.join([part.frame(partial=bool(i % 2)) for i, part in enumerate(parts)], ALL)
    assert [each for _, each in made.frames] == [TCP4.frame(partial=True)]
    assert (made.cut, made.verified) == (wire(parts), 2)


def test_a_joined_ip_packet_has_65535_bytes_and_no_more(offload: Offload) -> None:
    for whole, room in (TCP4, 65535 - 40), (TCP6, 65535 - 60), (UDP4, 65535 - 28), (UDP6, 65535 - 48):
        legal, illegal = (
            replace(whole, payload=bytes(range(256)) * 255 + bytes(n)) for n in (room - 65280, room - 65279)
        )
        for large, count in (legal, 1), (illegal, 2):
            sent = wire(large.cut(13200))
            made = offload.join(sent, ALL)
            assert len(made.frames) == count
            assert made.cut == sent


def test_a_whole_burst_is_joined(offload: Offload) -> None:
    sent = wire(replace(TCP4, payload=bytes(64 * 1000)).cut(1000))
    assert len(sent) == BURST
    made = offload.join(sent, ALL)
    assert (len(made.frames), made.cut, made.verified) == (1, sent, 64)


def test_8_flows_are_followed_and_the_frames_of_a_ninth_pass(offload: Offload) -> None:
    streams = [replace(TCP4, ports=(1, port)).cut(1000) for port in range(9)]
    sent = [part.frame() for each in zip(*streams, strict=True) for part in each]
    made = offload.join(sent, ALL)
    assert len(made.frames) == 8 + 4
    assert made.firsts == [*range(9), 17, 26, 35]


def test_a_flow_goes_on_behind_a_short_frame_as_another(offload: Offload) -> None:
    sizes = [1000, 1000, 400, 400, 400, 1000, 1000]
    sent, seq = [], 1
    for number, size in enumerate(sizes):
        sent.append(replace(TCP4, payload=bytes(size), seq=seq, ident=number).frame())
        seq += size
    made = offload.join(sent, ALL)
    assert made.firsts == [0, 3, 5]
    assert made.cut == sent


@pytest.mark.parametrize("steps", [(1, 1), (0, 0)], ids=["counts up", "the same"])
def test_an_identification_counts_up_or_is_the_same_with_dont_fragment(
    offload: Offload, steps: tuple[int, int]
) -> None:
    idents = [0xFFFF, 0xFFFF + steps[0], 0xFFFF + sum(steps)]
    for fragment, count in (0x4000, 1), (0, 1 if steps[0] else 3):
        parts = [
            replace(part, ident=ident, fragment=fragment) for part, ident in zip(TCP4.cut(1500), idents, strict=True)
        ]
        assert len(offload.join(wire(parts), ALL).frames) == count


@pytest.mark.parametrize("steps", [(1, 0), (0, 1), (2, 1), (1, 2), (0xFFFF, 1)], ids=str)
def test_any_other_identification_ends_a_join(offload: Offload, steps: tuple[int, int]) -> None:
    idents = [7, 7 + steps[0], 7 + sum(steps)]
    parts = [replace(part, ident=ident) for part, ident in zip(TCP4.cut(1500), idents, strict=True)]
    assert len(offload.join(wire(parts), ALL).frames) == 2 + (steps[0] > 1 and steps[1] != 1)


def test_a_pushed_frame_is_the_last_of_its_join(offload: Offload) -> None:
    parts = [replace(part, flags=part.flags | PSH * (i == 1)) for i, part in enumerate(TCP4.cut(1000))]
    made = offload.join(wire(parts), ALL)
    assert made.firsts == [0, 2]
    assert made.cut == wire(parts)
    assert made.frames[0][1][47] == ACK | PSH
    assert made.frames[1][1][47] == ACK


def key_of(sent: bytes) -> tuple[bytes, bytes]:
    """What makes it one of its flow: Ethernet and its tags; addresses and ports, behind any options and extensions."""
    l3 = 14
    while sent[l3 - 2 : l3] in (b"\x81\0", b"\x88\xa8"):
        l3 += 4
    if sent[l3] >> 4 == 4:
        l4 = l3 + (sent[l3] & 15) * 4
        return sent[:l3], sent[l3 + 12 : l3 + 20] + sent[l4 : l4 + 4]
    l4 = l3 + 40 + 8 * (sent[l3 + 6] in (44, 60))
    return sent[:l3], sent[l3 + 8 : l3 + 40] + sent[l4 : l4 + 4]


Change = Callable[[Segment], Segment]
APART: dict[str, Change] = {
    "syn": lambda s: replace(s, flags=s.flags | SYN),
    "fin": lambda s: replace(s, flags=s.flags | FIN),
    "rst": lambda s: replace(s, flags=s.flags | RST),
    "urg": lambda s: replace(s, flags=s.flags | URG),
    "cwr": lambda s: replace(s, flags=s.flags | CWR),
    "ece": lambda s: replace(s, flags=s.flags | ECE),
    "no ack": lambda s: replace(s, flags=0),
    "another ack": lambda s: replace(s, ack=s.ack + 1),
    "window": lambda s: replace(s, window=s.window + 1),
    "urgent pointer": lambda s: replace(s, urgent=1),
    "tcp options": lambda s: replace(s, options=NOP * 4),
    "a gap": lambda s: replace(s, seq=s.seq + 1),
    "an overlap": lambda s: replace(s, seq=s.seq - 1),
}
APART_BY_IP: dict[str, Change] = {
    "ttl": lambda s: replace(s, ttl=63),
    "tos": lambda s: replace(s, tos=2),
    "tags": lambda s: replace(s, tags=b"\x81\0\0\5"),
    "source": lambda s: replace(s, source=b"\x02" * 6),
    "destination": lambda s: replace(s, to=b"\x02" * 6),
    "address": lambda s: replace(s, addresses=(1, 3)),
    "port": lambda s: replace(s, ports=(1000, 2001)),
    "longer": lambda s: replace(s, payload=s.payload + b"x"),
    "empty": lambda s: replace(s, payload=b""),
}
APART_BY_V4: dict[str, Change] = {
    "ip options": lambda s: replace(s, ip_options=NOP * 4),
    "may be fragmented": lambda s: replace(s, fragment=0),
    "reserved bit": lambda s: replace(s, fragment=0xC000),
    "more fragments": lambda s: replace(s, fragment=0x2000),
    "a fragment": lambda s: replace(s, fragment=0x0010),
    "identification": lambda s: replace(s, ident=s.ident + 5),
}
APART_BY_V6: dict[str, Change] = {
    "flow label": lambda s: replace(s, flow=1),
    "extension header": lambda s: replace(s, extensions=((60, b"\0\1\4" + bytes(4)),)),
    "a fragment": lambda s: replace(s, extensions=((44, struct.pack(">BHI", 0, 0, 7)),)),
}


def changes_of(whole: Segment) -> dict[str, Change]:
    found = APART_BY_IP | (APART_BY_V4 if whole.version == 4 else APART_BY_V6)
    return found | APART if whole.protocol == TCP else found


@pytest.mark.parametrize(
    ("whole", "change"),
    [
        pytest.param(whole, change, id=f"{kind}, {name}")
        for kind, (whole, _, _) in KINDS.items()
        for name, change in changes_of(whole).items()
    ],
)
def test_a_frame_that_differs_stays_apart_and_in_its_place(offload: Offload, whole: Segment, change: Change) -> None:
    parts = whole.cut(1000)
    if len(change(parts[0]).payload) <= 1000:
        apart(offload, [change(parts[0]).frame(), parts[1].frame()])
    parts[1] = change(parts[1])
    apart(offload, wire(parts[:2]))
    # Behind it nothing is joined to what was before it, if it is of the same flow.
    made = offload.join(wire(parts), ALL)
    assert made.firsts[:2] == [0, 1]
    if key_of(parts[0].frame()) == key_of(parts[1].frame()):
        assert made.cut == wire(parts)


@each_kind
def test_c29_a_wrong_checksum_stays_apart_and_wrong(offload: Offload, whole: Segment, need: int, gso_type: int) -> None:
    good = wire(whole.cut(1000))
    for bad in range(4):
        sent = list(good)
        sent[bad] = sent[bad][:-1] + bytes([sent[bad][-1] ^ 0x10])
        made = offload.join(sent, ALL)
        assert made.cut == sent
        (header,) = [header for header, each in made.frames if each == sent[bad]]
        assert header[0] == 0


@pytest.mark.parametrize("whole", [TCP4, UDP4], ids=["tcp", "udp"])
@pytest.mark.parametrize("at", [1, 4, 5, 8, 10, 11])
def test_a_wrong_checksum_of_ipv4_stays_apart_and_wrong(offload: Offload, whole: Segment, at: int) -> None:
    good = wire(whole.cut(1000))
    for bad in range(4):
        sent = list(good)
        sent[bad] = sent[bad][: 14 + at] + bytes([sent[bad][14 + at] ^ 0x01]) + sent[bad][14 + at + 1 :]
        made = offload.join(sent, ALL)
        assert made.cut == sent
        assert sent[bad] in [each for _, each in made.frames]


@each_kind
def test_padding_keeps_a_frame_apart(offload: Offload, whole: Segment, need: int, gso_type: int) -> None:
    one, two = wire(replace(whole, payload=b"abcd").cut(2))
    apart(offload, [one + b"\0\0", two])
    apart(offload, [one, two + b"\0\0"])


@pytest.mark.parametrize("whole", [UDP4, UDP6], ids=["v4", "v6"])
def test_udp_without_a_checksum_stays_apart(offload: Offload, whole: Segment) -> None:
    at = whole.l4 + 6
    sent = [each[:at] + b"\0\0" + each[at + 2 :] for each in wire(whole.cut(1000))]
    assert all(header[0] == 0 for header, _ in apart(offload, sent).frames)


@pytest.mark.parametrize("whole", [UDP4, UDP6], ids=["v4", "v6"])
def test_no_checksum_where_the_right_one_is_ones_is_none(offload: Offload, whole: Segment) -> None:
    at = whole.l4 + 6
    first = replace(whole, payload=bytes(10))
    first = replace(first, payload=bytes(8) + first.frame()[at : at + 2])
    assert first.frame()[at : at + 2] == b"\xff\xff"
    sent = [each.frame() for each in (first, replace(first, ident=first.ident + 1))]
    assert len(offload.join(sent, ALL).frames) == 1
    apart(offload, [each[:at] + b"\0\0" + each[at + 2 :] for each in sent])


@pytest.mark.parametrize("whole", [UDP4, UDP6], ids=["v4", "v6"])
@pytest.mark.parametrize("length", [8, 1007])
def test_a_datagram_that_does_not_fill_its_packet_stays_apart(offload: Offload, whole: Segment, length: int) -> None:
    """Its checksum is as if it did."""
    at = whole.l4 + 4
    sent = []
    for each in wire(whole.cut(1000)):
        value = int.from_bytes(each[at + 2 : at + 4], "big") + 1008 - length
        sent.append(each[:at] + struct.pack(">HH", length, (value & 0xFFFF) + (value >> 16)) + each[at + 4 :])
    apart(offload, sent)


def test_flags_that_tcp_has_no_use_for_keep_frames_apart(offload: Offload) -> None:
    apart(offload, wire([replace(part, flags=0x100 | ACK) for part in TCP4.cut(1000)]))


@pytest.mark.parametrize("inner", [TCP4, UDP6], ids=["tcp", "udp"])
def test_a_tunnel_s_frames_with_partial_checksums_inside_stay_apart(offload: Offload, inner: Segment) -> None:
    sent = []
    for ident, part in enumerate(inner.cut(1000)):
        payload, partial = (b"\x08" + bytes(7) + part.frame(partial) for partial in (False, True))
        done = replace(UDP4, payload=payload, ports=(1000, 4789), ident=ident).frame()
        sent.append(done[: -len(payload)] + partial)  # the outer sum is as if the inner were complete
    made = apart(offload, sent)
    assert all(header[0] == PARTIAL for header, _ in made.frames)


def test_a_frame_that_was_looked_at_and_stays_alone_is_known_to_be_valid(offload: Offload) -> None:
    parts = TCP4.cut(1000)[:3]
    sent = wire(parts)
    sent[1] = sent[1][:-1] + bytes([sent[1][-1] ^ 1])
    made = apart(offload, sent)
    assert [header[0] for header, _ in made.frames] == [VALID, 0, 0]
    assert made.verified == 1


# ---- any burst ----


@dataclass
class Stream:
    """A flow on its way: what its next frame is."""

    next: Segment
    step: int  # of its identifications
    size: int


@dataclass(frozen=True)
class Sent:
    flow: Stream
    raw: bytes
    done: bytes  # once its checksum is complete
    right: bool  # and that is right


def is_fragment(each: Segment) -> bool:
    return bool(each.fragment & 0x3FFF) if each.version == 4 else any(kind == 44 for kind, _ in each.extensions)


def spoil(rng: random.Random, each: Segment, done: bytes) -> tuple[bytes, bool]:
    """The frame with something wrong or odd, and whether its checksum is still right."""
    kind = rng.randrange(4)
    if kind == 0 and each.payload:
        return done[:-1] + bytes([done[-1] ^ 1 << rng.randrange(8)]), False
    if kind == 1 and each.version == 4:
        at = each.l3 + 10
        return done[:at] + bytes([done[at] ^ 0x40]) + done[at + 1 :], True
    if kind == 2 and each.protocol == UDP:
        at = each.l4 + 6
        return done[:at] + b"\0\0" + done[at + 2 :], False
    return done + rng.randbytes(rng.randrange(1, 20)), True


def any_burst(rng: random.Random, oddity: float) -> list[Sent]:
    """Frames of some streams; of these, `oddity` are not as their stream would go on."""
    streams = []
    for number in range(rng.randrange(1, 11)):
        version, protocol = rng.choice([4, 6]), rng.choice([TCP, TCP, UDP])
        first = Segment(
            version=version,
            protocol=protocol,
            tags=rng.choice([b"", b"", b"\x81\0\0\5", b"\x88\xa8\0\6\x81\0\0\7"]),
            ports=(number, rng.randrange(65536)),
            seq=rng.choice([rng.randrange(1 << 32), 0xFFFFFFFF - rng.randrange(5000)]),
            ident=rng.choice([rng.randrange(65536), 65535 - rng.randrange(4)]),
            fragment=rng.choice([0, 0x4000]),
            options=NOP * rng.choice([0, 0, 12]) if protocol == TCP else b"",
        )
        step = 0 if first.fragment and rng.random() < 0.3 else 1
        streams.append(Stream(first, step, rng.choice([1, 2, 3, 8, 31, 100, 536, 1000, 1448, 3001])))
    made = []
    for _ in range(rng.randrange(2, BURST + 1)):
        flow = streams[min(rng.randrange(len(streams)), rng.randrange(len(streams)))]
        size = flow.size if rng.random() > oddity else rng.randrange(flow.size + 2)
        each = replace(flow.next, payload=rng.randbytes(size))
        if rng.random() < oddity:
            each = rng.choice(list(changes_of(each).values()))(each)
        if rng.random() < 0.05:
            each = replace(each, flags=each.flags | PSH)
        done = each.frame()
        sent = Sent(flow, each.frame(partial=rng.random() < 0.2 and not is_fragment(each)), done, True)
        if rng.random() < oddity / 3:
            spoiled, right = spoil(rng, each, done)
            sent = Sent(flow, spoiled, spoiled, right)
        made.append(sent)
        seq = flow.next.seq + len(each.payload) & 0xFFFFFFFF
        flow.next = replace(flow.next, seq=seq, ident=flow.next.ident + flow.step)
    return made


def by_flow(frames: Sequence[bytes], constant: set[tuple[bytes, bytes]]) -> dict[tuple[bytes, bytes], list[bytes]]:
    """In order; without the identifications that were the same, which count up where they are cut again."""
    found: dict[tuple[bytes, bytes], list[bytes]] = {}
    for each in frames:
        key = key_of(each)
        l3 = len(key[0])
        if key in constant and each[l3] >> 4 == 4:
            each = each[: l3 + 4] + b"id" + each[l3 + 6 : l3 + 10] + b"ok" + each[l3 + 12 :]
        found.setdefault(key, []).append(each)
    return found


@settings(max_examples=600, deadline=None)
@given(
    seed=st.integers(0, 1 << 48),
    oddity=st.sampled_from([0, 0.05, 0.3]),
    takes=st.sampled_from([ALL, ALL, ALL, NEED_CSUM | NEED_TSO4, NEED_CSUM | NEED_USO6]),
    piece=st.sampled_from([0, 0, 500]),
)
def test_any_burst_cut_again_is_the_burst_in_order_of_every_flow(
    offload: Offload, seed: int, oddity: float, takes: int, piece: int
) -> None:
    burst = any_burst(random.Random(seed), oddity)
    made = offload.join([each.raw for each in burst], takes, piece)
    constant = {key_of(each.raw) for each in burst if not each.flow.step}
    assert by_flow(made.cut, constant) == by_flow([each.done for each in burst], constant)
    assert made.firsts == sorted(made.firsts)
    rights = {each.raw for each in burst if each.right}
    for header, whole in made.frames:
        assert len(whole) - len(key_of(whole)[0]) <= 65535 + 40 * (whole[len(key_of(whole)[0])] >> 4 == 6)
        assert header[0] in (0, PARTIAL, VALID)
        assert header[0] != VALID or whole in rights
        assert not header[1] or header[0] == PARTIAL
    alone = len({id(each.flow) for each in burst}) == 1 and burst[0].flow.size >= 8
    if takes == ALL and not oddity and len(constant) == 0 and alone:
        kind = burst[0].flow.next
        pushed = sum(bool(kind.protocol == TCP and key_flags(each.raw) & PSH) for each in burst)
        limit = 65535 // (kind.headers - kind.l3 + burst[0].flow.size)
        assert len(made.frames) <= pushed + 1 + len(burst) // max(limit, 1)


def key_flags(sent: bytes) -> int:
    """Of TCP, without options or extension headers of IP."""
    l3 = len(key_of(sent)[0])
    return sent[l3 + (20 if sent[l3] >> 4 == 4 else 40) + 13]
