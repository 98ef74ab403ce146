"""Kicks and calls: who wakes whom, when, and how many of either are saved."""

import os

import pytest

from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac, packed_only
from tests.rig.rings import EVENT_IDX, MODERN, VERSION_1, fence, wait_readable
from tests.rig.slow import core_memory, slow, untouched, userfaultfd
from tests.rig.waiting import PATIENCE_S, eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

each_kind = pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event index"])


def asleep(driver: Driver) -> bool:
    """The worker waits for a kick at the very next chain."""
    return driver.pair.tx.waits()


@each_kind
def test_an_idle_ring_asks_for_a_kick_and_a_kick_wakes_it(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, features: int
) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    b.pair.fill()
    for i in range(30):
        bridge.time_advance(1000)
        assert asleep(a)
        a.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
        assert a.pair.tx.kick(), "the device did not ask for a kick"
        assert b.pair.frames() == [frame(BROADCAST, mac(1), mark=bytes([i]))]
        assert a.pair.wait_sent()
    assert a.stats(core.TX).kicks == 30


@each_kind
def test_a_busy_worker_asks_for_no_kicks(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, features: int
) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    b.pair.fill()
    for i in range(30):
        a.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
        assert not a.pair.tx.kick(always=False) or i == 0
        assert b.pair.frames() == [frame(BROADCAST, mac(1), mark=bytes([i]))]
    stats = a.stats(core.TX)
    assert stats.kicks + stats.kicks_saved >= 30
    assert stats.kicks <= 1


@each_kind
def test_receive_buffers_are_posted_without_kicks(bridge: core.Bridge, guests: MakeGuest, features: int) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    for i in range(40):
        b.pair.post(1)
        a.pair.send(frame(BROADCAST, mac(1), mark=bytes([i])))
        assert b.pair.frames() == [frame(BROADCAST, mac(1), mark=bytes([i]))]
    assert b.pair.rx.kicks == 0


def test_with_event_index_there_is_a_call_only_past_the_published_index(
    held_time: None, bridge: core.Bridge, guests: MakeGuest
) -> None:
    a, b = guests(bridge), guests(bridge)
    b.pair.fill()
    a.pair.send(frame(BROADCAST, mac(1)))
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]  # the first call after a start always comes
    b.pair.rx.calls()
    b.pair.rx.want_call(ahead=4)
    before = b.stats(core.RX)
    for i in range(4):
        a.pair.send(frame(BROADCAST, mac(1), mark=bytes([i])))
        assert a.pair.wait_sent()
        bridge.time_advance(0)  # whether to call for it is decided before the next one comes
    assert b.stats(core.RX).calls_saved == before.calls_saved + 4
    assert b.pair.rx.calls() == 0
    a.pair.send(frame(BROADCAST, mac(1)))
    assert wait_readable(b.pair.rx.call_fd, PATIENCE_S)
    after = b.stats(core.RX)
    assert (after.calls - before.calls, after.calls_saved - before.calls_saved) == (1, 4)


@each_kind
def test_a_guest_that_wants_no_calls_gets_none(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, features: int
) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    b.pair.fill()
    a.pair.send(frame(BROADCAST, mac(1)))
    assert len(b.pair.frames()) == 1
    b.pair.rx.calls()
    calls = b.stats(core.RX).calls
    b.pair.rx.want_no_call()
    for _ in range(20):
        a.pair.send(frame(BROADCAST, mac(1)))
        assert a.pair.wait_sent()
        bridge.time_advance(0)
    assert b.stats(core.RX).calls_saved >= 20
    assert (b.stats(core.RX).calls, b.pair.rx.calls()) == (calls, 0)


@each_kind
def test_calls_and_saved_calls_over_the_wrap_of_the_index(
    bridge: core.Bridge, guests: MakeGuest, features: int, packed: int
) -> None:
    base = 250 if packed else 65530
    a, b = guests(bridge, features=features), guests(bridge, features=features, base=base)
    b.pair.fill()
    for i in range(20):
        a.pair.send(frame(BROADCAST, mac(1), mark=bytes([i])))
        assert b.pair.frames() == [frame(BROADCAST, mac(1), mark=bytes([i]))]


def test_a_burst_costs_one_call(held_time: None, bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, features=VERSION_1), guests(bridge, features=VERSION_1)
    b.pair.fill()
    for i in range(64):
        a.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
    a.pair.tx.kick()
    assert len(b.pair.frames(64)) == 64
    bridge.time_advance(0)
    assert b.stats(core.RX).calls == a.stats(core.TX).calls == 1


def send_one_by_one(driver: Driver, count: int, packet: bytes) -> int:
    """The calls that they bring a driver that looks for what it has back by itself, at once; one frame in 40 us, which
    is a fifth of what a call for what was sent waits at most."""
    tx = driver.pair.tx
    before = driver.stats(core.TX).calls
    for _ in range(count):
        driver.pair.queue(packet)
        tx.kick()
        driver.bridge.time_advance(0)
        assert len(driver.pair.reap()) == 1
        tx.want_call()
        driver.bridge.time_advance(40)
    return driver.stats(core.TX).calls - before


def test_a_guest_that_streams_and_sees_by_itself_that_its_frames_are_sent_is_not_called(
    held_time: None, bridge: core.Bridge, guests: MakeGuest
) -> None:
    """When one frame's call is due, the guest has seen that, but not yet the next."""
    a = guests(bridge)
    stream = frame(BROADCAST, mac(1), 60_000)
    send_one_by_one(a, 50, stream)
    assert send_one_by_one(a, 100, stream) == 0


def test_in_a_conversation_a_guest_is_called_at_once_for_each_frame_that_is_sent(
    held_time: None, bridge: core.Bridge, guests: MakeGuest
) -> None:
    """Without event index every look of the worker at what it owes is a call: held back, many would become one."""
    a = guests(bridge, features=VERSION_1)
    assert send_one_by_one(a, 100, frame(BROADCAST, mac(1))) == 100


def test_a_guest_that_streams_is_called_for_many_frames_at_once(
    held_time: None, bridge: core.Bridge, guests: MakeGuest
) -> None:
    a = guests(bridge, features=VERSION_1)
    stream = frame(BROADCAST, mac(1), 60_000)
    send_one_by_one(a, 50, stream)
    assert send_one_by_one(a, 100, stream) == 20
    # And when its stream has ended it is soon in a conversation again.
    send_one_by_one(a, 50, frame(BROADCAST, mac(1)))
    assert send_one_by_one(a, 100, frame(BROADCAST, mac(1))) == 100


@each_kind
def test_a_new_call_fd_is_signalled_at_once_and_used_from_then_on(
    bridge: core.Bridge, guests: MakeGuest, features: int
) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    b.pair.fill()
    old, new = b.pair.rx.call_fd, os.eventfd(0, os.EFD_NONBLOCK)
    b.port.ring_set_call(0, new)
    assert wait_readable(new, PATIENCE_S)
    os.eventfd_read(new)
    b.pair.rx.want_call()
    a.pair.send(frame(BROADCAST, mac(1)))
    assert wait_readable(new, PATIENCE_S)
    assert not wait_readable(old, 0)
    b.port.ring_set_call(0, -1)
    os.eventfd_read(new)
    a.pair.send(frame(BROADCAST, mac(1)))
    assert eventually(lambda: b.stats(core.RX).packets == 2)
    assert not wait_readable(new, 0)
    os.close(new)


@each_kind
def test_guests_that_poll_and_rings_that_are_polled_need_no_eventfds(
    bridge: core.Bridge, guests: MakeGuest, features: int
) -> None:
    a = guests(bridge, features=features, started=False).start(kick=False, call=False)
    b = guests(bridge, features=features, started=False).start(kick=False, call=False)
    b.pair.fill()
    for i in range(10):
        a.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
        a.pair.tx.publish()
    assert eventually(lambda: b.stats(core.RX).packets == 10)
    assert len(b.pair.packets()) == 10
    assert eventually(lambda: a.pair.tx.returned() == 10)


def test_a_call_fd_that_is_full_stops_nobody(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, features=VERSION_1), guests(bridge, features=VERSION_1)
    os.eventfd_write(b.pair.rx.call_fd, 2**64 - 2)
    b.pair.fill()
    for _ in range(10):
        a.pair.send(frame(BROADCAST, mac(1)))
        assert a.pair.wait_sent()
    assert eventually(lambda: b.stats(core.RX).packets == 10)


@each_kind
def test_frames_posted_before_the_start_are_found_without_a_kick(
    bridge: core.Bridge, guests: MakeGuest, features: int
) -> None:
    b = guests(bridge, features=features)
    b.pair.fill()
    a = guests(bridge, features=features, started=False)
    a.pair.queue(frame(BROADCAST, mac(1)))
    a.pair.tx.publish()
    a.start()
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]


@each_kind
def test_b42_a_lost_kick_delays_a_frame_and_loses_none(bridge: core.Bridge, guests: MakeGuest, features: int) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    b.pair.fill()
    assert eventually(lambda: asleep(a))
    a.pair.queue(frame(BROADCAST, mac(1)))
    a.pair.tx.publish()
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]


@pytest.mark.parametrize("features", [VERSION_1, MODERN], ids=["flags", "event index"])
@pytest.mark.parametrize("spin_us", [0, 50])
def test_ping_pong_loses_no_wake_up(make_bridge: MakeBridge, guests: MakeGuest, features: int, spin_us: int) -> None:
    """Each side sleeps until it is called; one lost wake-up of either kind ends it."""
    bridge = make_bridge(spin_us=spin_us, workers=2)
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    a.pair.fill()
    b.pair.fill()
    for i in range(1500):
        one, two = (a, b) if i % 2 else (b, a)
        one.pair.send(frame(BROADCAST, mac(i % 2), mark=i.to_bytes(4, "big")))
        assert len(two.pair.frames()) == 1, f"lost at {i}"
        one.pair.reap()
        two.pair.post(1)


def test_without_event_index_a_worker_that_found_work_while_arming_stops_asking_again(
    make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """Kicks stay off for as long as the ring is polled."""
    bridge = make_bridge(spin_us=0)
    a, b = guests(bridge, features=VERSION_1), guests(bridge, features=VERSION_1)
    b.pair.fill()
    for _ in range(150):
        a.pair.send_all([frame(BROADCAST, mac(1))] * 50)
        b.pair.packets()
        b.pair.fill()
    stats = a.stats(core.TX)
    assert stats.kicks <= a.pair.tx.kicks


@packed_only
@userfaultfd
@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_packed_ring_that_goes_round_twice_before_the_worker_looks_still_calls(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, num: int
) -> None:
    """In one turn: `num` frames for a tiny ring, then a frame in memory that does not answer, meanwhile the guest posts
    again, then as many frames. Sources are polled in the order in which they were started.

    After two laps the ring stands where it stood; that is not the same as nothing having happened.
    """
    sink, first, stuck, second = (guests(bridge, num=entries) for entries in (num, 16, 16, 16))
    sink.port.set_mac(mac(1), False)
    stuck.port.set_mac(mac(2), check_source=True)  # its page of zeros is for nobody
    sink.pair.post(1)
    first.pair.send(frame(mac(1), mac(3)))
    assert len(sink.pair.frames()) == 1  # so that a call has been made, and there is an index to compare with
    for turn in range(3):
        bridge.stop()
        sink.pair.post(sink.pair.rx.room)
        for each, source in (first, mac(3)), (second, mac(4)):
            for _ in range(num):
                each.pair.queue(frame(mac(1), source, mark=bytes([turn])))
        with slow(core_memory(stuck)):
            stuck.pair.tx.raw((untouched(stuck), 80, 0))
            for each in first, stuck, second:
                each.pair.tx.kick(always=True)
            bridge.start()
            assert eventually(lambda: sink.pair.rx.pending() == num)
            assert [packet.frame[6:12] for packet in sink.pair.packets()] == [mac(3)] * num
            sink.pair.rx.calls()
            sink.pair.post(num)
            sink.pair.rx.want_call()
            fence()
            assert not sink.pair.rx.pending()
        assert wait_readable(sink.pair.rx.call_fd, PATIENCE_S)
        assert [packet.frame[6:12] for packet in sink.pair.packets()] == [mac(4)] * num
        for each in first, stuck, second:
            assert each.pair.wait_sent()
