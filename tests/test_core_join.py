"""Frames of a flow that arrive together become one for a guest that takes such: from a veth pair, through AF_XDP.

The worker stands still while a burst is sent, so that it finds it as a whole. What was joined is compared with what the
reference would cut into those frames.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest

from tests.driver import Driver
from tests.driver import Packet as Received
from tests.guests import frame, mac
from tests.netns import Veth, Wire, needs_root, veth
from tests.packets import (
    ACK,
    CWR,
    DATA_VALID,
    ECE,
    FIN,
    GSO_TCPV4,
    GSO_UDP_L4,
    NEEDS_CSUM,
    ONE_TAG,
    PSH,
    SYN,
    TCP,
    TWO_TAGS,
    UDP,
    URG,
    Packet,
)
from tests.rings import MIB, MODERN, Span
from tests.test_core_offload import GUEST_CSUM, TAKES, fields, noise
from xdpnet import core
from xdpnet.netdev import Netdev

pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

RAM = (Span(0x4000_0000, 64 * MIB, 0x7F12_0000_0000, 0),)
BASE = Packet(4, TCP, noise(5 * 1000), options=b"\x01\x01\x08\x0a" + bytes(8))
MAC = {TAKES: mac(2), GUEST_CSUM: mac(3)}


class Scene:
    """Two guests behind one interface: one takes everything, the other partial checksums at most."""

    def __init__(self, bridge: core.Bridge, netdev: Netdev, wire: Wire) -> None:
        self.bridge, self.netdev, self.wire = bridge, netdev, wire
        self.guests = {takes: Driver(bridge, MODERN | takes, num=512, spans=RAM).start() for takes in MAC}
        for takes, driver in self.guests.items():
            bridge.set_mac(driver.port, MAC[takes], False)
        netdev.sync_macs(MAC.values())

    def through(self, sent: Sequence[bytes], takes: int = TAKES) -> list[Received]:
        """All of it, sent while the worker stands still."""
        pair = self.guests[takes].pair
        pair.packets()
        pair.post(min(pair.rx.room, 200), 4096)
        before = self.stats()
        self.bridge.stop()
        for each in sent:
            self.wire.send(each)
        self.bridge.start()
        got = pair.receive(1)
        while self.stats().packets < before.packets + len(sent):
            got += pair.receive(1, 1)
        got += pair.packets()
        joined = self.stats().joined - before.joined
        assert len(got) == len(sent) - joined
        return got

    def stats(self) -> core.QueueStats:
        return self.bridge.queue_stats(self.netdev.port, 0, core.RX)


@pytest.fixture(scope="module")
def pair() -> Iterator[Veth]:
    with veth() as made:
        yield made


@pytest.fixture(scope="module")
def scene(pair: Veth) -> Iterator[Scene]:
    with core.Bridge(netdev_queues=1, frames_per_queue=512) as bridge, pair.wire() as wire:
        bridge.start()
        with closing(Netdev(bridge, pair.ifname)) as netdev:
            netdev.open()
            made = Scene(bridge, netdev, wire)
            yield made
            for driver in made.guests.values():
                driver.close()


each_sum = pytest.mark.parametrize("partial", [True, False], ids=["partial", "right"])
SHAPES = {
    "tcp4": BASE,
    "tcp6": replace(BASE, version=6),
    "one tag": replace(BASE, tags=ONE_TAG),
    "two tags": replace(BASE, version=6, tags=TWO_TAGS),
    "ends short": replace(BASE, payload=noise(4001)),
    "pushed at the end": replace(BASE, flags=ACK | PSH),
    "sequence wraps": replace(BASE, seq=0xFFFFFF00),
    "identification wraps": replace(BASE, ident=0xFFFE),
    "with ECE": replace(BASE, flags=ACK | ECE),
    "udp4": Packet(4, UDP, noise(5000)),
    "udp6": Packet(6, UDP, noise(4001)),
}


@each_sum
@pytest.mark.parametrize("whole", SHAPES.values(), ids=SHAPES.keys())
def test_a_burst_of_one_flow_becomes_one_frame(scene: Scene, whole: Packet, partial: bool) -> None:
    whole = replace(whole, to=MAC[TAKES])
    (got,) = scene.through([each.frame(partial) for each in whole.segments(1000)])
    assert got.frame == whole.frame(partial=True)
    assert fields(got) == (NEEDS_CSUM, whole.gso_type, whole.headers, 1000, whole.l4, whole.csum_offset)
    assert got.num_buffers == len(got.lengths)


def test_a_fixed_identification_of_what_may_not_be_fragmented_too(scene: Scene) -> None:
    whole = replace(BASE, to=MAC[TAKES])
    assert len(scene.through([replace(each, ident=9).frame() for each in whole.segments(1000)])) == 1
    apart = replace(whole, fragment=0)
    assert len(scene.through([replace(each, ident=9).frame() for each in apart.segments(1000)])) == 5


def test_a_guest_that_takes_none_gets_every_frame(scene: Scene) -> None:
    sent = [each.frame() for each in replace(BASE, to=MAC[GUEST_CSUM]).segments(1000)]
    assert [each.frame for each in scene.through(sent, GUEST_CSUM)] == sent


@each_sum
def test_no_frame_is_longer_than_an_ip_packet_may_be(scene: Scene, partial: bool) -> None:
    whole = replace(BASE, to=MAC[TAKES], payload=noise(60 * 1400))
    got = scene.through([each.frame(partial) for each in whole.segments(1400)])
    assert all(len(each.frame) - 14 <= 65535 for each in got)
    assert b"".join(each.frame[whole.headers :] for each in got) == whole.payload


def test_two_flows_are_joined_apart(scene: Scene) -> None:
    one, other = (replace(BASE, to=MAC[TAKES], port=port) for port in (2000, 2001))
    pairs = zip(one.segments(1000), other.segments(1000), strict=True)
    got = scene.through([each.frame() for both in pairs for each in both])
    assert [each.frame for each in got] == [one.frame(partial=True), other.frame(partial=True)]


FIRST, SECOND, THIRD = replace(BASE, to=MAC[TAKES], payload=noise(3000)).segments(1000)
APART = {
    "a gap": replace(SECOND, seq=SECOND.seq + 1),
    "a repetition": replace(SECOND, seq=FIRST.seq),
    "FIN": replace(SECOND, flags=ACK | FIN),
    "SYN": replace(SECOND, flags=ACK | SYN),
    "URG": replace(SECOND, flags=ACK | URG),
    "CWR": replace(SECOND, flags=ACK | CWR),
    "ECE": replace(SECOND, flags=ACK | ECE),
    "another acknowledgement": replace(SECOND, ack=3),
    "another window": replace(SECOND, window=501),
    "other options": replace(SECOND, options=b"\x01\x01\x08\x0a" + bytes(7) + b"\1"),
    "no options": replace(SECOND, options=b""),
    "another TTL": replace(SECOND, ttl=63),
    "another class": replace(SECOND, tos=3),
    "may be fragmented": replace(SECOND, fragment=0),
    "a fragment": replace(SECOND, fragment=0x2000),
    "IP options": replace(SECOND, ip_options=bytes(4)),
    "an identification far ahead": replace(SECOND, ident=SECOND.ident + 5),
    "longer than the first": replace(SECOND, payload=noise(1001)),
    "no data": replace(SECOND, payload=b""),
    "another tag": replace(SECOND, tags=ONE_TAG),
}


@pytest.mark.parametrize("odd", APART.values(), ids=APART.keys())
def test_what_is_not_the_next_of_its_flow_stays_apart_and_in_order(scene: Scene, odd: Packet) -> None:
    sent = [FIRST.frame(), odd.frame(), THIRD.frame()]
    assert [each.frame for each in scene.through(sent)] == sent


def test_a_wrong_checksum_stays_apart_and_is_not_called_right(scene: Scene) -> None:
    wrong = bytearray(SECOND.frame())
    wrong[-1] ^= 1
    got = scene.through([FIRST.frame(), bytes(wrong), THIRD.frame()])
    assert [each.frame for each in got] == [FIRST.frame(), bytes(wrong), THIRD.frame()]
    assert [fields(each)[0] for each in got] == [DATA_VALID, 0, 0]


def test_a_wrong_ip_checksum_is_not_made_a_right_one(scene: Scene) -> None:
    wrong = bytearray(SECOND.frame())
    wrong[24] ^= 1
    sent = [FIRST.frame(), bytes(wrong), THIRD.frame()]
    assert [each.frame for each in scene.through(sent)] == sent


def test_padding_stays_apart(scene: Scene) -> None:
    sent = [FIRST.frame(), SECOND.frame() + b"\0" * 4, THIRD.frame()]
    assert [each.frame for each in scene.through(sent)] == sent


def test_a_datagram_without_a_checksum_stays_apart(scene: Scene) -> None:
    first, second = Packet(4, UDP, noise(2000), to=MAC[TAKES]).segments(1000)
    bare = second.frame()[:40] + b"\0\0" + second.frame()[42:]
    assert [each.frame for each in scene.through([first.frame(), bare])] == [first.frame(), bare]


def test_a_pushed_or_shorter_segment_ends_its_frame(scene: Scene) -> None:
    one, two, three, four = replace(BASE, to=MAC[TAKES], payload=noise(4000)).segments(1000)
    got = scene.through([one.frame(), replace(two, flags=ACK | PSH).frame(), three.frame(), four.frame()])
    assert [len(each.frame) for each in got] == [one.headers + 2000] * 2
    assert [fields(each)[1] for each in got] == [GSO_TCPV4] * 2
    short = replace(two, payload=two.payload[:999])
    got = scene.through([one.frame(), short.frame(), replace(three, seq=three.seq - 1).frame()])
    assert [len(each.frame) for each in got] == [one.headers + 1999, one.headers + 1000]


def test_other_frames_in_between_are_left_alone(scene: Scene) -> None:
    plain = frame(MAC[TAKES], mac(9), 200)
    got = scene.through([FIRST.frame(), plain, SECOND.frame(), plain, THIRD.frame()])
    whole = replace(FIRST, payload=noise(3000))
    assert [each.frame for each in got] == [whole.frame(partial=True), plain, plain]


def test_datagrams_of_one_length_are_told_with_it(scene: Scene) -> None:
    whole = Packet(6, UDP, noise(5000), to=MAC[TAKES])
    (got,) = scene.through([each.frame() for each in whole.segments(1000)])
    assert fields(got)[1:4] == (GSO_UDP_L4, whole.headers, 1000)
