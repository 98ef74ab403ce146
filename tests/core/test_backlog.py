"""Frames that find no buffer in a guest's receive ring: they wait, as a tap's queue would have them wait, in order, not
without end, and behind nobody else's.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest

from tests.rig.driver import Driver, ledger
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.netns import needs_root, veth
from tests.rig.offloads import SENDS, TAKES, data
from tests.rig.rings import EVENT_IDX, MIB, MODERN, VERSION_1, Span
from tests.rig.segments import TSO4, Segment
from tests.rig.waiting import eventually, until_equal
from xdpnet import core
from xdpnet.netdev.port import Netdev

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

FRAMES = 1024  # that wait for one ring, c/ring/backlog.h
BYTES = 16 * MIB  # of one guest
AGE_US = 1_000_000
LOOK_US = 100_000  # sources that sleep are looked at so often, c/worker/worker.c
each_event = pytest.mark.parametrize("event", [0, EVENT_IDX], ids=["flags", "event index"])
RAM = (Span(0x4000_0000, 32 * MIB, 0x7F12_0000_0000, 0x1000),)


@pytest.fixture
def bridge(held_time: None, make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge()


@pytest.fixture
def sender(bridge: core.Bridge, guests: MakeGuest) -> Driver:
    made = guests(bridge, num=1024, spans=RAM)
    made.port.set_mac(mac(1), False)
    return made


def numbered(count: int, to: bytes = mac(2), size: int = 64, start: int = 0) -> list[bytes]:
    return [frame(to, mac(1), size, mark=(start + i).to_bytes(4, "big")) for i in range(count)]


def receiver(bridge: core.Bridge, guests: MakeGuest, number: int = 2, **options: object) -> Driver:
    made = guests(bridge, **options)
    made.port.set_mac(mac(number), False)
    return made


def balance(bridge: core.Bridge, *guests: Driver) -> bool:
    into, out = ledger(bridge, {each.port: len(each.pairs) for each in guests})
    return into == out


@each_event
def test_frames_wait_for_buffers_and_come_in_order_when_the_guest_posts_some(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver, event: int
) -> None:
    """The guest kicks when it is asked to, and not otherwise."""
    b = receiver(bridge, guests, features=VERSION_1 | event, num=32)
    b.pair.fill()
    sent = numbered(300)
    sender.pair.send_all(sent)
    got = b.pair.frames(32)
    assert (b.waiting(), b.stats(core.RX).waited) == (268, 268)
    for count in 1, 2, 7, *[32] * 10:
        b.pair.post(min(count, b.pair.rx.room))
        expected = min(count, 300 - len(got))
        if not expected:
            break
        got += b.pair.frames(expected)
    assert got == sent
    assert b.drops(core.RX) == {}
    assert balance(bridge, sender, b)
    # Nothing waits: nothing is asked for.
    bridge.time_advance(LOOK_US)
    kicks = b.pair.rx.kicks
    for _ in range(3):
        sender.pair.send_all(numbered(2))
        assert b.pair.frames(2) == numbered(2)
        b.pair.fill()
    assert b.pair.rx.kicks == kicks


def test_what_is_sent_meanwhile_comes_behind_what_waits(bridge: core.Bridge, guests: MakeGuest, sender: Driver) -> None:
    b = receiver(bridge, guests, num=256)
    sent = numbered(400)
    sender.pair.send_all(sent[:100])
    got: list[bytes] = []
    for i in range(100, 400, 50):
        b.pair.post(30)
        sender.pair.send_all(sent[i : i + 50])
        got += b.pair.frames(30)
    b.pair.fill()
    got += b.pair.frames(400 - len(got))
    assert got == sent


def test_a_short_frame_does_not_overtake_a_long_one_that_waits_for_more_buffers(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = receiver(bridge, guests, num=64)
    b.pair.post(5, 1000)
    sent = [frame(mac(2), mac(1), 9000), frame(mac(2), mac(1), 60)]
    sender.pair.send_all(sent)
    bridge.time_advance(0)
    assert b.waiting() == 2
    # It is not polled for that: what is there has been looked at.
    for _ in range(4):
        b.pair.post(1, 1000)
        bridge.time_advance(0)
        assert b.waiting() == 2
    b.pair.post(2, 1000)
    assert b.pair.frames(2) == sent


# ---- bounds ----


@pytest.mark.parametrize("more", [0, 1])
def test_so_many_frames_wait_for_a_ring_and_no_more(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver, more: int
) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(FRAMES + more))
    assert b.waiting() == FRAMES
    assert b.drops(core.RX) == ({"no_buffer": 1} if more else {})
    b.pair.fill()
    assert b.pair.frames(256) == numbered(256)
    # There is room again, at the end of what was used as at its start.
    sender.pair.send_all(numbered(256, start=FRAMES))
    got = []
    for _ in range(4):
        b.pair.fill()
        got += b.pair.frames(256)
    assert got == numbered(1024, start=256)
    assert balance(bridge, sender, b)


@pytest.mark.parametrize("pairs", [1, 3, 16])
def test_so_many_bytes_wait_for_a_guest_and_no_more(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver, pairs: int
) -> None:
    """Its rings have even shares."""
    b = receiver(bridge, guests, pairs=pairs, num=64, spans=RAM)
    share = 1 << (BYTES // pairs).bit_length() - 1
    size = 60_000
    fit = share // size
    rest = share - fit * size
    sent = [*numbered(fit, size=size), frame(mac(2), mac(1), rest)]
    sender.pair.send_all([*sent, *numbered(1)])
    ring = next(i for i in range(pairs) if b.waiting(i))
    assert b.waiting(ring) == fit + 1
    assert b.drops(core.RX, ring) == {"no_buffer": 1}
    pair = b.pairs[ring]
    got: list[bytes] = []
    while len(got) <= fit:
        pair.fill(4096)
        got += pair.frames()
    assert got == sent
    # And round the end of that memory.
    sender.pair.send_all(sent[-2:])
    pair.fill(4096)
    got = pair.frames(1)
    pair.fill(4096)
    assert got + pair.frames(2 - len(got)) == sent[-2:]


@pytest.mark.parametrize("more", [0, 1])
def test_a_frame_waits_for_a_second_and_no_longer(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver, more: int
) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(10))
    bridge.time_advance(AGE_US - LOOK_US)
    sender.pair.send_all(numbered(5, start=10))
    bridge.time_advance(LOOK_US)
    assert b.waiting() == 15
    bridge.time_advance(more)
    b.pair.fill()
    expected = numbered(15)[10 * more :]
    assert b.pair.frames(len(expected)) == expected
    assert b.drops(core.RX) == ({"no_buffer": 10} if more else {})


def test_frames_that_wait_in_vain_are_dropped_without_anybody_s_doing(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(10))
    bridge.time_advance(AGE_US)
    assert b.waiting() == 10
    bridge.time_advance(LOOK_US)
    assert b.waiting() == 0
    assert b.drops(core.RX) == {"no_buffer": 10}


@pytest.mark.parametrize("free", [0, 1])
def test_a_frame_for_which_the_whole_ring_is_not_enough_does_not_wait(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver, free: int
) -> None:
    b = receiver(bridge, guests, num=8)
    b.pair.post(8 - free, 100)
    sender.pair.send_all([frame(mac(2), mac(1), 1000), *numbered(1)])
    bridge.time_advance(0)
    assert b.waiting() == 2 * free
    assert b.drops(core.RX) == ({} if free else {"no_buffer": 1})
    assert b.pair.rx.returned() == (not free)


def test_memory_is_taken_when_frames_wait_and_given_back_afterwards(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * 4096

    b = receiver(bridge, guests)
    before = mapped()
    sender.pair.send_all(numbered(1))
    assert b.waiting() == 1
    assert mapped() - before >= BYTES
    b.pair.fill()
    assert b.pair.frames() == numbered(1)
    bridge.time_advance(AGE_US)
    bridge.time_advance(LOOK_US)
    assert mapped() - before < BYTES


# ---- nobody else is kept waiting ----


def test_a_guest_that_takes_nothing_holds_up_neither_the_sender_nor_others(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = receiver(bridge, guests)
    c = receiver(bridge, guests, number=3, num=512, spans=RAM)
    c.pair.fill()
    for i in range(200):
        sender.pair.queue(frame(mac(2), mac(1), mark=bytes([i])))
        sender.pair.queue(frame(mac(3), mac(1), mark=bytes([i])))
        sender.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
    sender.pair.tx.kick()
    got = c.pair.frames(400)
    # What is flooded goes last, of each burst.
    got.sort(key=lambda each: each[14])
    assert got == [frame(to, mac(1), mark=bytes([i])) for i in range(200) for to in (mac(3), BROADCAST)]
    # All that the sender has given is its own again.
    assert sender.pair.wait_sent()
    assert b.waiting() == 400
    assert c.drops(core.RX) == {}


def test_what_waits_is_a_copy(bridge: core.Bridge, guests: MakeGuest, sender: Driver) -> None:
    """The sender's memory is its own again, whatever it does with it."""
    b = receiver(bridge, guests)
    receiver(bridge, guests, number=3)
    sent = numbered(200, size=1500)
    sender.pair.send_all(sent)
    sender.pair.send_all(numbered(200, to=mac(3), size=1500, start=1000))  # into the very same buffers
    b.pair.fill()
    assert b.pair.frames(200) == sent


# ---- what a frame is stays what it is ----


def test_a_frame_to_be_segmented_waits_whole(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, features=MODERN | SENDS | TAKES), guests(bridge, features=MODERN | SENDS | TAKES)
    b.port.set_mac(mac(2), False)
    whole = Segment(payload=data(30_000))
    sent = [replace(whole, seq=1 + i).frame(partial=True) for i in range(3)]
    for each in sent:
        a.pair.send(each, header=whole.header(TSO4, 1448))
    assert a.pair.wait_sent()
    assert b.waiting() == 3
    b.pair.fill(4096)
    packets = b.pair.receive(3)
    assert [packet.frame for packet in packets] == sent
    assert {packet.header[:10] for packet in packets} == {whole.header(TSO4, 1448)[:10]}


# ---- ends ----


def stops(bridge: core.Bridge, guest: Driver) -> None:
    guest.port.ring_stop(core.RX)


def starts_anew(bridge: core.Bridge, guest: Driver) -> None:
    guest.restart(core.RX)


def disables(bridge: core.Bridge, guest: Driver) -> None:
    guest.port.ring_enable(core.RX, False)


def loses_its_memory(bridge: core.Bridge, guest: Driver) -> None:
    guest.port.set_memory([])


@pytest.mark.parametrize("end", [stops, starts_anew, disables, loses_its_memory], ids=lambda end: end.__name__)
def test_frames_wait_for_no_ring_that_is_down(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver, end: Callable[[core.Bridge, Driver], None]
) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(10))
    assert b.waiting() == 10
    end(bridge, b)
    assert b.waiting() == 0
    assert b.drops(core.RX) == {"not_ready": 10}
    if end is starts_anew:
        b.pair.fill()
        sender.pair.send_all(numbered(1))
        assert b.pair.frames() == numbered(1)
    assert balance(bridge, sender, b)


def test_frames_that_wait_survive_a_change_of_memory_that_leaves_the_ring(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(10))
    b.port.set_memory(b.memory.regions())
    assert b.waiting() == 10
    b.pair.fill()
    assert b.pair.frames(10) == numbered(10)


def test_a_ring_that_breaks_loses_what_waits(bridge: core.Bridge, guests: MakeGuest, sender: Driver) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(10))
    b.pair.rx.raw((0, 64, 2))
    b.pair.rx.kick()
    assert eventually(lambda: b.state(core.RX).broken == "addr")
    assert eventually(lambda: b.drops(core.RX) == {"broken": 10})
    assert balance(bridge, sender, b)


def test_a_guest_that_goes_away_takes_along_what_waits_for_it(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = Driver(bridge).start()
    b.port.set_mac(mac(2), False)
    sender.pair.send_all(numbered(10))
    b.close()
    c = receiver(bridge, guests)
    sender.pair.send_all(numbered(1))
    c.pair.fill()
    assert c.pair.frames() == numbered(1)


# ---- several workers ----


@pytest.mark.parametrize("workers", [2, 3])
@each_event
def test_frames_of_several_workers_wait_for_one_ring_in_the_order_of_each(
    make_bridge: MakeBridge, guests: MakeGuest, workers: int, event: int
) -> None:
    """Its own worker puts them into the ring, whoever has had them wait."""
    bridge = make_bridge(workers=workers)
    a = guests(bridge, pairs=workers, num=512)
    b = receiver(bridge, guests, features=VERSION_1 | event, num=16)
    for number, pair in enumerate(a.pairs):
        for i in range(200):
            pair.queue(frame(mac(2), mac(1), mark=bytes([number, i])))
    for pair in a.pairs:
        pair.tx.kick()
    for pair in a.pairs:
        assert pair.wait_sent()
    got: list[bytes] = []
    while len(got) < 200 * workers:
        b.pair.fill()
        more = b.pair.frames()
        assert more
        got += more
    for number in range(workers):
        assert [each[15] for each in got if each[14] == number] == list(range(200))


# ---- from the wire ----


@needs_root
@pytest.mark.net
@pytest.mark.parametrize("mtu", [1500, 9000])
def test_frames_of_the_wire_wait_and_leave_the_interface_all_its_buffers(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest, mtu: int
) -> None:
    """More of them than it has, and another guest gets its own through the same queue."""
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256)
    with veth(mtu=mtu) as made, made.wire() as wire, closing(Netdev(bridge, made.ifname)) as netdev:
        netdev.open()
        b, c = receiver(bridge, guests), receiver(bridge, guests, number=3)
        netdev.sync_macs([mac(2), mac(3)])
        c.pair.fill()
        sent = [frame(mac(2), mac(9), mtu, mark=i.to_bytes(4, "big")) for i in range(400)]
        for i, each in enumerate(sent, 1):
            wire.send(each)
            if not i % 20:
                until_equal(lambda: netdev.port.queue_stats(0, core.RX).packets, i)
        assert eventually(lambda: b.waiting() == 400)  # they are counted as they come, and wait a moment later
        wire.send(frame(mac(3), mac(9)))
        assert c.pair.frames() == [frame(mac(3), mac(9))]
        assert netdev.port.xsk_stats(0).rx_fill_ring_empty_descs == 0
        got: list[bytes] = []
        while len(got) < 400:
            b.pair.fill(4096)
            more = b.pair.frames()
            assert more
            got += more
        assert got == sent
        assert b.drops(core.RX) == {}


# ---- a ring that has none at all ----


def test_a_ring_is_starved_from_the_frame_that_found_no_buffer_until_the_guest_posts_one(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    """Also when nothing waits any more, and nothing comes; and its buffers are noticed before anything does."""
    b = receiver(bridge, guests, pairs=2)
    assert b.port.faults() == core.GuestFaults("", 0, 0, 0.0)
    sender.pair.send_all(numbered(2))
    bridge.time_advance(0)
    for seconds in 3, 6:
        bridge.time_advance(3_000_000)
        bridge.time_advance(0)
        faults = b.port.faults()
        assert (faults.broken, faults.starved_ring % 2) == ("", core.RX)
        assert faults.starved_s == pytest.approx(seconds, abs=0.2)
        assert b.waiting() == 0
    for pair in b.pairs:
        pair.post(1)
    bridge.time_advance(LOOK_US)
    assert b.port.faults().starved_s == 0
    sender.pair.send_all(numbered(1))
    assert eventually(lambda: b.stats(core.RX).packets + b.stats(core.RX, 1).packets == 1)
    assert b.port.faults().starved_s == 0


def test_who_has_waited_and_then_took_its_frames_is_not_starved(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = receiver(bridge, guests)
    sender.pair.send_all(numbered(2))
    bridge.time_advance(500_000)
    assert b.port.faults().starved_s == pytest.approx(0.5, abs=0.2)
    b.pair.post(2)
    assert b.pair.frames(2) == numbered(2)
    assert b.port.faults().starved_s == 0
    sender.pair.send_all(numbered(1))
    bridge.time_advance(100_000)
    assert b.port.faults().starved_s < 0.3  # anew


def test_a_ring_that_is_disabled_or_stopped_is_not_starved(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    b = receiver(bridge, guests)
    for end in lambda: b.port.ring_enable(0, False), lambda: b.port.ring_stop(0):
        b.port.ring_enable(0, True)
        sender.pair.send_all(numbered(2))
        bridge.time_advance(3_000_000)
        assert b.port.faults().starved_s > 2
        end()
        assert b.port.faults().starved_s == 0


def test_of_a_guest_with_broken_rings_the_first_is_named(
    bridge: core.Bridge, guests: MakeGuest, sender: Driver
) -> None:
    """A starved one that breaks is broken, and nobody looks after it any more."""
    b = receiver(bridge, guests, pairs=2)
    sender.pair.send_all(numbered(2))
    bridge.time_advance(3_000_000)
    starved = b.port.faults().starved_ring
    for ring in 3, 1:
        b.rings()[ring].raw((0, 64, 0))  # outside of its memory
        b.rings()[ring].kick(always=True)
        assert eventually(lambda: b.state(ring).broken)  # noqa: B023
        assert (b.port.faults().broken, b.port.faults().broken_ring) == ("addr", ring)
    b.rings()[starved].raw((0, 64, 2))
    b.rings()[starved].kick(always=True)
    sender.pair.send_all(numbered(2))
    bridge.time_advance(LOOK_US)
    assert eventually(lambda: b.port.faults().starved_s == 0)
