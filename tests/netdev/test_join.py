"""Frames of a flow that arrive together from a veth pair become one for a guest that takes such.

The whole way, through AF_XDP and two guests' rings; what is joined and what not is in core/test_coalesce.py. The worker
stands still while a burst is sent, so that it finds all of it.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from tests.rig.driver import Driver
from tests.rig.driver import Packet as Received
from tests.rig.guests import frame, mac
from tests.rig.netns import Veth, Wire, needs_root, veth
from tests.rig.offloads import GUEST_CSUM, TAKES, data
from tests.rig.rings import MIB, MODERN, Span
from tests.rig.segments import TCP, TSO4, TSO6, UDP, USO, Segment
from xdpnet import core
from xdpnet.counters import Traffic
from xdpnet.netdev.port import Netdev

pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

RAM = (Span(0x4000_0000, 64 * MIB, 0x7F12_0000_0000, 0),)
GUESTS = {TAKES: mac(2), GUEST_CSUM: mac(3), 0: mac(4)}
DATA_VALID = 2


class Scene:
    """Guests behind one interface: one takes everything, one partial checksums, one nothing."""

    def __init__(self, bridge: core.Bridge, netdev: Netdev, wire: Wire) -> None:
        self.bridge, self.netdev, self.wire = bridge, netdev, wire
        self.guests = {takes: Driver(bridge, MODERN | takes, num=512, spans=RAM).start() for takes in GUESTS}
        for takes, driver in self.guests.items():
            driver.port.set_mac(GUESTS[takes], False)
        netdev.sync_macs(GUESTS.values())

    def through(self, sent: Sequence[bytes], takes: int = TAKES) -> list[Received]:
        """All that comes of a burst; the books are right afterwards."""
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
        assert len(got) == len(sent) - (self.stats().joined - before.joined)
        return got

    def stats(self) -> Traffic:
        return self.netdev.port.queue_stats(0, core.RX)


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


KINDS = [(4, TCP, TSO4), (6, TCP, TSO6), (4, UDP, USO), (6, UDP, USO)]


@pytest.mark.parametrize(("version", "protocol", "gso_type"), KINDS, ids=["tcp4", "tcp6", "udp4", "udp6"])
@pytest.mark.parametrize("partial", [True, False], ids=["partial", "right"])
def test_a_burst_of_one_flow_becomes_one_frame(
    scene: Scene, version: int, protocol: int, gso_type: int, partial: bool
) -> None:
    whole = Segment(version, protocol, data(5001), to=GUESTS[TAKES])
    before = scene.stats()
    (got,) = scene.through([each.frame(partial) for each in whole.cut(1000)])
    assert got.frame == whole.frame(partial=True)
    assert got.header == whole.header(gso_type, 1000)[:10] + struct.pack("<H", len(got.lengths))
    assert scene.stats().csum_verified - before.csum_verified == (0 if partial else 6)


@pytest.mark.parametrize("takes", [GUEST_CSUM, 0], ids=["checksums", "nothing"])
def test_a_guest_that_takes_no_large_frames_gets_every_frame(scene: Scene, takes: int) -> None:
    parts = Segment(payload=data(5000), to=GUESTS[takes]).cut(1000)
    got = scene.through([each.frame(partial=True) for each in parts], takes)
    assert [each.frame for each in got] == [each.frame(partial=bool(takes)) for each in parts]


@pytest.mark.parametrize("partial", [True, False], ids=["partial", "right"])
def test_no_frame_is_longer_than_an_ip_packet_may_be(scene: Scene, partial: bool) -> None:
    whole = Segment(payload=data(60 * 1400), to=GUESTS[TAKES])
    got = scene.through([each.frame(partial) for each in whole.cut(1400)])
    assert len(got) < 60
    assert all(len(each.frame) - 14 <= 65535 for each in got)
    assert b"".join(each.frame[whole.headers :] for each in got) == whole.payload


def test_two_flows_and_others_in_between_are_told_apart(scene: Scene) -> None:
    one, other = (Segment(payload=data(3000), to=GUESTS[TAKES], ports=(1000, port)) for port in (2000, 2001))
    plain = frame(GUESTS[TAKES], mac(9), 200)
    sent = []
    for both in zip(one.cut(1000), other.cut(1000), strict=True):
        sent += [both[0].frame(), plain, both[1].frame()]
    got = [each.frame for each in scene.through(sent)]
    assert sorted(got) == sorted([one.frame(partial=True), other.frame(partial=True), *[plain] * 3])


def test_c29_a_wrong_checksum_stays_apart_and_is_not_called_right(scene: Scene) -> None:
    first, second, third = (each.frame() for each in Segment(payload=data(3000), to=GUESTS[TAKES]).cut(1000))
    wrong = second[:-1] + bytes([second[-1] ^ 1])
    got = scene.through([first, wrong, third])
    assert [each.frame for each in got] == [first, wrong, third]
    assert got[0].header[0] == DATA_VALID
    assert got[1].header[0] == 0


@pytest.mark.parametrize(("size", "joined"), [(7, False), (8, True)])
def test_segments_that_no_guest_could_send_as_one_stay_apart(scene: Scene, size: int, joined: bool) -> None:
    whole = Segment(payload=data(3 * size), to=GUESTS[TAKES])
    got = scene.through([each.frame() for each in whole.cut(size)])
    wanted = [whole.frame(partial=True)] if joined else [each.frame() for each in whole.cut(size)]
    assert [each.frame for each in got] == wanted
