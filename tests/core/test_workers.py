"""Workers: several of them on rings of their own and on shared ones, starting, stopping, and what idleness costs."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rig.driver import LAYOUTS, TOGETHER, Driver, ledger
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.rings import MODERN, VERSION_1
from tests.rig.segments import UDP, Segment
from tests.rig.waiting import eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]


def test_ring_r_belongs_to_worker_r_mod_w(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    a = guests(make_bridge(workers=3), pairs=7)
    assert [a.state(ring).worker for ring in range(14)] == [ring // 2 % 3 for ring in range(14)]


@pytest.mark.parametrize(
    ("workers", "pairs", "to_pairs"), [(1, 1, 1), (1, 4, 2), (2, 2, 2), (2, 4, 2), (2, 3, 1), (3, 4, 2), (4, 16, 3)]
)
def test_every_pair_of_one_guest_reaches_the_other(
    make_bridge: MakeBridge, guests: MakeGuest, workers: int, pairs: int, to_pairs: int
) -> None:
    bridge = make_bridge(workers=workers)
    a = guests(bridge, pairs=pairs, num=64)
    b = guests(bridge, pairs=to_pairs, num=1024)
    a.port.set_mac(mac(1), False)
    b.port.set_mac(mac(2), False)
    for pair in b.pairs:
        pair.fill(512)
    sent = []
    for turn in range(10):
        for number, pair in enumerate(a.pairs):
            for i in range(4):
                sent.append(frame(mac(2), mac(1), mark=bytes([number, turn, i])))
                pair.queue(sent[-1])
        for pair in a.pairs:
            pair.tx.kick()
        for pair in a.pairs:
            assert pair.wait_sent()
    got = [packet.frame for pair in b.pairs for packet in pair.packets()]
    assert sorted(got) == sorted(sent)
    # What one pair sent, one ring received, and in order.
    for pair in b.pairs:
        pair.packets()
    for number in range(pairs):
        assert [each for each in got if each[14] == number] == [each for each in sent if each[14] == number]
    assert ledger(bridge, {a.port: pairs, b.port: to_pairs}) == (len(sent), len(sent))


@pytest.mark.parametrize(("workers", "features"), [(2, MODERN), (3, MODERN), (2, VERSION_1)])
def test_shared_receive_rings_lose_and_mix_up_nothing(
    make_bridge: MakeBridge, guests: MakeGuest, workers: int, features: int
) -> None:
    """All workers deliver into the one receive ring of a guest, which calls for every buffer."""
    bridge = make_bridge(workers=workers)
    a = guests(bridge, pairs=workers, num=128, features=features)
    b = guests(bridge, pairs=1, num=1024, features=features)
    b.port.set_mac(mac(2), False)
    got: list[bytes] = []
    turns = 40
    for turn in range(turns):
        b.pair.fill(256)
        for number, pair in enumerate(a.pairs):
            for i in range(64):
                pair.queue(frame(mac(2), mac(1), mark=bytes([number, turn, i])))
        for pair in a.pairs:
            pair.tx.kick()
        got += b.pair.frames(64 * workers)
        for pair in a.pairs:
            assert pair.wait_sent()
    assert len(got) == 64 * workers * turns
    for number in range(workers):
        mine = [each[15:17] for each in got if each[14] == number]
        assert mine == [bytes([turn, i]) for turn in range(turns) for i in range(64)]
    assert b.drops(core.RX) == {}


def test_a_ring_is_stopped_and_started_a_thousand_times_while_others_run(
    make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(workers=2)
    a, b = guests(bridge, pairs=2), guests(bridge, pairs=2)
    for pair in b.pairs:
        pair.fill()
    for turn in range(1000):
        pair = a.pairs[turn % 2]
        pair.queue(frame(BROADCAST, mac(1)))
        pair.tx.kick()
        index = 2 * (turn % 2) + core.TX
        base = a.port.ring_stop(index)
        a.port.ring_start(index, pair.tx.config(base=base))
        assert pair.wait_sent()
        for each in b.pairs:
            each.packets()
            each.fill()
    assert a.stats(core.TX, 0).packets + a.stats(core.TX, 1).packets == 1000


def test_guests_come_and_go_while_others_run(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(workers=2)
    a, b = guests(bridge), guests(bridge)
    b.port.set_mac(mac(2), False)
    b.pair.fill()
    for turn in range(60):
        third = Driver(bridge, pairs=2).start()
        third.pair.fill()
        for i in range(20):
            a.pair.queue(frame(BROADCAST if i % 2 else mac(2), mac(1), mark=bytes([turn, i])))
        a.pair.tx.kick()
        third.close()
        got = b.pair.frames(20)
        # Frames to one address keep their order.
        for to, numbers in (mac(2), range(0, 20, 2)), (BROADCAST, range(1, 20, 2)):
            assert [each for each in got if each[:6] == to] == [
                frame(to, mac(1), mark=bytes([turn, i])) for i in numbers
            ]
        b.pair.fill()
        assert a.pair.wait_sent()


# ---- life ----


def test_workers_can_be_stopped_and_started_again(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(workers=2)
    a, b = guests(bridge), guests(bridge)
    b.pair.fill()
    for i in range(3):
        bridge.stop()
        bridge.stop()
        a.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
        a.pair.tx.kick(always=True)
        a.port.set_memory(a.memory.regions())  # nobody to wait for
        bridge.start()
        assert b.pair.frames() == [frame(BROADCAST, mac(1), mark=bytes([i]))]
    with pytest.raises(OSError, match="already"):
        bridge.start()


def test_a_bridge_that_never_started_is_set_up_and_closed() -> None:
    with core.Bridge(workers=16) as bridge:
        driver = Driver(bridge).start()
        driver.close()
    bridge.close()


def test_rings_started_before_the_workers_are_served(guests: MakeGuest) -> None:
    with core.Bridge() as bridge:
        a, b = Driver(bridge).start(), Driver(bridge).start()
        b.pair.fill()
        a.pair.send(frame(BROADCAST, mac(1)))
        bridge.start()
        assert b.pair.frames() == [frame(BROADCAST, mac(1))]
        a.close()
        b.close()


@pytest.mark.parametrize("workers", [0, 17, -1])
def test_the_number_of_workers_has_limits(workers: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.16"):
        core.Bridge(workers=workers)


@pytest.mark.parametrize("cpus", [(0, 5000), (1023, 1023), (5000,)])
def test_a_worker_on_a_cpu_that_does_not_exist_is_an_error_and_no_hang(cpus: tuple[int, ...]) -> None:
    with core.Bridge(workers=2, cpus=cpus) as bridge:
        for _ in range(2):
            with pytest.raises(OSError, match="start workers: Invalid argument"):
                bridge.start()


def test_workers_run_on_the_cpus_they_are_given(guests: MakeGuest) -> None:
    with core.Bridge(workers=2, cpus=(0,)) as bridge:
        bridge.start()
        assert eventually(lambda: all(bridge.worker_stats(i).tid for i in range(2)))
        for i in range(2):
            stats = bridge.worker_stats(i)
            status = Path(f"/proc/self/task/{stats.tid}/status").read_text()
            assert "Cpus_allowed_list:\t0\n" in status
            assert stats.cpu == 0


def test_time_is_held_once_and_advanced_only_while_it_is(held_time: None, make_bridge: MakeBridge) -> None:
    bridge = make_bridge()
    bridge.time_advance(0)
    with pytest.raises(OSError, match="hold time: Operation already in progress"):
        core.time_hold()
    core.time_release()
    core.time_release()
    with pytest.raises(OSError, match="advance time by 7 us: Invalid argument"):
        bridge.time_advance(7)
    core.time_hold()


def test_time_that_is_held_is_what_addresses_age_by(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(ageing_s=300)
    a = guests(bridge)
    a.pair.send_all([frame(BROADCAST, mac(1))])
    a.stop()
    bridge.time_advance(300_000_000)
    assert [(entry.mac, entry.age_s) for entry in bridge.fdb_dump()] == [(mac(1), 300)]
    bridge.time_advance(1_000_000)
    assert bridge.fdb_dump() == []


def test_when_time_is_advanced_all_workers_have_gone_round_by_the_new_time(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """A frame that the guest kicked nobody for is found by the look at all rings that is due after 100 ms."""
    bridge = make_bridge(spin_us=0, workers=2)
    a = guests(bridge, pairs=2)
    for _ in range(20):
        bridge.time_advance(100_000)
        assert all(pair.tx.waits() for pair in a.pairs)
        for pair in a.pairs:
            pair.queue(frame(BROADCAST, mac(1)))
            pair.tx.publish()
        bridge.time_advance(99_999)
        assert [pair.tx.pending() for pair in a.pairs] == [0, 0]
        bridge.time_advance(1)
        assert [len(pair.reap()) for pair in a.pairs] == [1, 1]


def turns(bridge: core.Bridge) -> tuple[int, int]:
    """Turns of the worker's loop while a second passes, and how often it slept."""
    before = bridge.worker_stats(0)
    for _ in range(10):
        bridge.time_advance(100_000)
    after = bridge.worker_stats(0)
    return after.loops - before.loops, after.sleeps - before.sleeps


def test_an_idle_bridge_sleeps(held_time: None, make_bridge: MakeBridge, guests: MakeGuest) -> None:
    """After every turn, of which there are some each time that it is woken."""
    bridge = make_bridge(spin_us=0)
    guests(bridge)
    bridge.time_advance(0)
    loops, sleeps = turns(bridge)
    assert 30 <= loops <= 50
    assert abs(loops - sleeps) <= 1


def send_in_one_turn(driver: Driver, frames: int = 1, size: int = 64) -> None:
    """No time passes."""
    for _ in range(frames):
        driver.pair.queue(frame(BROADCAST, mac(1), size))
    driver.pair.tx.kick()
    driver.bridge.time_advance(0)
    assert len(driver.pair.reap()) == frames


def kicks(driver: Driver, frames: int = 1, size: int = 64) -> int:
    """That the worker had to be given, from its sleep, in 30 turns with 10 ms of nothing after each."""
    driver.bridge.time_advance(1_000_000)
    before = driver.stats(core.TX).kicks
    for _ in range(30):
        send_in_one_turn(driver, frames, size)
        driver.bridge.time_advance(10_000)
    return driver.stats(core.TX).kicks - before


def is_polled_for(driver: Driver, us: int, frames: int = 1, size: int = 64) -> bool:
    """Whether the ring is, after such a turn, and no longer."""
    send_in_one_turn(driver, frames, size)
    driver.bridge.time_advance(us - 1)
    before = driver.pair.tx.waits()
    driver.bridge.time_advance(1)
    return not before and driver.pair.tx.waits()


def test_in_a_conversation_the_worker_polls_from_one_frame_to_the_next(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    a = guests(make_bridge(spin_us=2000))
    assert kicks(a) == 2
    assert is_polled_for(a, 16 * 2000)


def test_one_pause_does_not_end_a_conversation(held_time: None, make_bridge: MakeBridge, guests: MakeGuest) -> None:
    """After one the worker polls half as long, which is still from frame to frame; after a second it has to be woken
    for the next frame too, and polls as long as before."""
    a = guests(make_bridge(spin_us=2000))
    kicks(a)
    woken = []
    for _ in range(10):
        a.bridge.time_advance(60_000)
        before = a.stats(core.TX).kicks
        for _ in range(3):
            send_in_one_turn(a)
            a.bridge.time_advance(10_000)
        woken.append(a.stats(core.TX).kicks - before)
    assert woken == [1, 2] * 5


def test_in_a_conversation_that_is_too_slow_for_that_the_worker_sleeps_soon(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    a = guests(make_bridge(spin_us=500))
    assert kicks(a) == 30
    assert is_polled_for(a, 500)


def test_between_the_bursts_of_a_stream_the_worker_sleeps(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    a = guests(make_bridge(spin_us=2000))
    assert kicks(a, 5, 60_000) == 30
    assert is_polled_for(a, 2000, 5, 60_000)


def test_a_broken_ring_that_is_polled_keeps_no_worker_awake(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(spin_us=0)
    a = guests(bridge, started=False).start(kick=False)
    a.pair.tx.raw((0, 64, 0))
    a.pair.tx.publish()
    assert eventually(lambda: a.state(core.TX).broken == "addr")
    bridge.time_advance(0)
    loops, sleeps = turns(bridge)
    assert 30 <= loops <= 50
    assert abs(loops - sleeps) <= 1


# ---- the ledger, at random ----


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_frames_in_are_frames_out_and_drops_whatever_happens(
    make_bridge: MakeBridge, guests: MakeGuest, workers: int
) -> None:
    dice = random.Random(workers)
    bridge = make_bridge(workers=workers)
    shapes = [dice.randrange(1, 4) for _ in range(4)]
    drivers = [guests(bridge, pairs=pairs, num=128, features=dice.choice([MODERN, VERSION_1, 0])) for pairs in shapes]
    sent = 0
    for _ in range(150):
        driver = dice.choice(drivers)
        pair = dice.choice(driver.pairs)
        event = dice.random()
        if event < 0.3:
            try:
                pair.post(dice.randrange(1, 20), dice.choice([0, 10, 60, 100, 300, 2048]))
            except MemoryError:
                pair.packets()
        elif event < 0.35:
            ring = dice.randrange(2 * len(driver.pairs))
            driver.port.ring_enable(ring, dice.random() < 0.7)
        else:
            for _ in range(dice.randrange(1, 60)):
                to = dice.choice([BROADCAST, mac(99), *(mac(i) for i in range(4))])
                source = mac(drivers.index(driver)) if dice.random() < 0.9 else dice.choice([bytes(6), mac(1)])
                pair.queue(frame(to, source, dice.choice([0, 5, 14, 60, 64, 600, 1514])))
                sent += 1
            pair.tx.kick()
            assert pair.wait_sent()
        for each in pair.packets():
            assert each.frame
    for driver in drivers:
        for pair in driver.pairs:
            assert pair.wait_sent()
    ports = {driver.port: len(driver.pairs) for driver in drivers}
    # Those that waited may be on their way.
    assert eventually(lambda: len(set(ledger(bridge, ports))) == 1)
    assert ledger(bridge, ports)[0] >= sent


# ---- which of a guest's rings ----


def flows(count: int, frames: int, **fields: Any) -> list[Segment]:
    """As they come in turn."""
    return [
        Segment(payload=bytes([i]), ports=(1000 + flow, 80), **fields) for i in range(frames) for flow in range(count)
    ]


def rings_of(guest: Driver, sent: Sequence[Segment]) -> dict[tuple[int, int], set[int]]:
    """Through which pairs the frames of each flow came; those of each in order."""
    expected = [segment.frame() for segment in sent]
    at: dict[tuple[int, int], set[int]] = {}
    came: list[tuple[int, bytes]] = []
    while len(came) < len(sent):
        for number, pair in enumerate(guest.pairs):
            came += [(number, packet.frame) for packet in pair.packets()]
            pair.fill()
    order = [each for _, each in came]
    for ports in {segment.ports for segment in sent}:
        mine = [each for segment, each in zip(sent, expected, strict=True) if segment.ports == ports]
        assert [each for each in order if each in set(mine)] == mine
        at[ports] = {number for number, each in came if each in set(mine)}
    return at


@pytest.mark.parametrize(("workers", "pairs"), [(1, 2), (1, 4), (1, 16), (2, 4), (2, 3), (3, 4)])
@pytest.mark.parametrize("version", [4, 6])
def test_frames_are_spread_over_a_guest_s_rings_by_flow_and_a_flow_keeps_to_one(
    make_bridge: MakeBridge, guests: MakeGuest, workers: int, pairs: int, version: int
) -> None:
    """One queue brings them all. A ring that only its own worker may use is not another worker's choice."""
    bridge = make_bridge(workers=workers)
    a, b = guests(bridge, num=1024), guests(bridge, pairs=pairs, num=64)
    b.port.set_mac(mac(2), False)
    for pair in b.pairs:
        pair.fill()
    sent = flows(64, 5, version=version)
    a.pair.send_all([segment.frame() for segment in sent])
    at = rings_of(b, sent)
    assert all(len(rings) == 1 for rings in at.values())
    own = pairs % workers == 0
    assert {ring for rings in at.values() for ring in rings} == set(range(0, pairs, workers if own else 1))


def test_only_enabled_rings_are_chosen(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge()
    a, b = guests(bridge), guests(bridge, pairs=4)
    b.port.set_mac(mac(2), False)
    for pair in b.pairs:
        pair.fill()
    for enabled in [0], [0, 2], [0, 1, 2, 3]:
        for number in range(4):
            b.port.ring_enable(2 * number + core.RX, number in enabled)
        sent = flows(40, 1, seq=len(enabled))
        a.pair.send_all([segment.frame() for segment in sent])
        assert {ring for rings in rings_of(b, sent).values() for ring in rings} == set(enabled)


@pytest.mark.parametrize(
    "kind", ["fragments", "two tags", "options", "extension headers", "no ip", "torn up", "cut short"]
)
def test_frames_of_any_kind_keep_to_one_ring_of_several(make_bridge: MakeBridge, guests: MakeGuest, kind: str) -> None:
    bridge = make_bridge()
    a, b = guests(bridge), guests(bridge, pairs=4)
    b.port.set_mac(mac(2), False)
    for pair in b.pairs:
        pair.fill()
    one = Segment(payload=bytes(100), protocol=UDP)
    sent = {
        "fragments": Segment(payload=bytes(4000), protocol=UDP).fragments(800),
        "two tags": [replace(one, tags=b"\x81\x00\0\7" * 2).frame()] * 8,
        "options": [replace(one, ip_options=bytes([1]) * 40).frame()] * 8,
        "extension headers": [replace(one, version=6, extensions=((0, bytes(7)),)).frame()] * 8,
        "no ip": [frame(mac(2), mac(1), size) for size in (14, 15, 60, 1000)],
        "torn up": [one.frame()] * 8,
        "cut short": [one.frame()[:size] for size in range(14, 34)],
    }[kind]
    layouts = LAYOUTS if kind == "torn up" else [TOGETHER]
    for number, each in enumerate(sent):
        a.pair.send(each, layouts[number % len(layouts)])
    assert a.pair.wait_sent()
    got = {number: [packet.frame for packet in pair.packets()] for number, pair in enumerate(b.pairs)}
    assert [frames for frames in got.values() if frames] == [sent]
