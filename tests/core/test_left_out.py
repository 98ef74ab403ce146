"""Guest memory that is known and not mapped: what lies there is handed back, and the guest goes on; what lies in no
region at all breaks the ring.

    0x4000_0000          BORDER              HOLE
    | mapped, with rings | left out          | nothing
"""

from dataclasses import replace

import pytest

from tests.rig.driver import ALL_INDIRECT, APART, Driver, ledger
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.rings import (
    BORDER,
    HOLE,
    IN_ORDER,
    INDIRECT,
    MODERN,
    NEXT,
    SPLIT_REGIONS,
    VERSION_1,
    WRITE,
    Buffer,
    GuestMemory,
)
from tests.rig.waiting import eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

POLL_STEPS, FRAME_STEPS = 4096, 32  # c/account.h, c/port/guest_rx.c
HEADER = bytes(12)
FRAME = frame(BROADCAST, mac(1))
PACKET = HEADER + FRAME
FEATURES = pytest.mark.parametrize(
    "features", [MODERN, MODERN | IN_ORDER, VERSION_1], ids=["modern", "in order", "not mergeable"]
)


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge()


def table(memory: GuestMemory) -> list[core.Region]:
    """The second region is left out, and is not the last to be said."""
    first, second, third = memory.regions()
    return [first, replace(second, fd=-1, left_out=True), third]


@pytest.fixture
def make_guest(bridge: core.Bridge, guests: MakeGuest) -> MakeGuest:
    def make(**options: object) -> Driver:
        made = guests(bridge, spans=SPLIT_REGIONS, **options)
        made.port.set_memory(table(made.memory))
        return made

    return make


def goes_on(a: Driver, b: Driver) -> None:
    """Each hears the other."""
    b.pair.fill()
    a.pair.fill()
    for one, other in (a, b), (b, a):
        sent = frame(BROADCAST, mac(1), mark=b"on")
        one.pair.send(sent)
        assert sent in other.pair.frames()


# ---- to send ----


@pytest.mark.parametrize(
    ("addr", "fate"),
    [
        (BORDER - len(PACKET), "sent"),
        (BORDER - len(PACKET) + 1, "handed back"),
        (HOLE - len(PACKET), "handed back"),
        (HOLE - 1, "handed back"),
        (HOLE, "breaks"),
    ],
    ids=["last byte mapped", "last byte left out", "all left out", "first byte left out", "in no region"],
)
@FEATURES
def test_a_frame_with_a_byte_that_is_left_out_is_dropped_and_what_is_outside_of_all_breaks(
    make_guest: MakeGuest, addr: int, fate: str, features: int
) -> None:
    a, b = make_guest(features=features), make_guest()
    b.pair.fill()
    if addr + len(PACKET) <= HOLE:
        a.memory.write(addr, PACKET)
    if fate == "breaks":
        a.pair.tx.raw((addr, len(PACKET), 0))
        a.pair.tx.kick()
        assert eventually(lambda: a.state(core.TX).broken == "addr")
        assert a.drops(core.TX) == {}
        return
    a.pair.tx.add([Buffer(addr, len(PACKET))], writable=False, owned=False)
    a.pair.tx.kick()
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == ({} if fate == "sent" else {"left_out": 1})
    assert a.state(core.TX).broken == ""
    assert b.pair.frames() == [FRAME] if fate == "sent" else b.stats(core.RX).packets == 0
    goes_on(a, b)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_chain_with_one_piece_that_is_left_out_comes_back_whole_and_the_next_is_found(
    make_guest: MakeGuest, place: int
) -> None:
    a, b = make_guest(num=8), make_guest()
    b.pair.fill()
    for _ in range(5):
        buffers = a.pair.buffers_for(PACKET, [12, 20])
        buffers[place] = Buffer(HOLE - 64, buffers[place].size)
        a.pair.tx.add(buffers, writable=False, owned=False)
        a.pair.send(FRAME, APART)
        assert a.pair.wait_sent()
        assert b.pair.frames() == [FRAME]
    assert a.drops(core.TX) == {"left_out": 5}


@pytest.mark.parametrize("in_table", [False, True], ids=["the table", "a buffer of the table"])
@pytest.mark.parametrize("index", [core.TX, core.RX])
def test_an_indirect_table_is_left_out_or_refers_to_what_is(make_guest: MakeGuest, index: int, in_table: bool) -> None:
    a, b = make_guest(), make_guest()
    b.pair.fill()
    ring, flags = (a.pair.tx, 0) if index == core.TX else (a.pair.rx, WRITE)
    at = a.memory.reserve(48, 16) if in_table else HOLE - 48
    data = BORDER if in_table else a.memory.reserve(256, 64)
    ring.write_table(at, [(data + 64 * i, 64, flags) for i in range(3)])
    ring.raw((at, 48, INDIRECT))
    ring.kick()
    if index == core.TX:
        assert a.pair.wait_sent()
        assert a.drops(core.TX) == {"left_out": 1}
    else:
        a.pair.fill()
        b.pair.send(FRAME)
        assert a.pair.frames() == [FRAME]
        assert a.stats(core.RX).left_out == 1
        assert a.drops(core.RX) == {}
    goes_on(a, b)


def test_a_table_of_which_the_last_entry_is_left_out_is_read_up_to_there(make_guest: MakeGuest) -> None:
    a, b = make_guest(), make_guest()
    for entries, drops in (2, {}), (3, {"left_out": 1}):
        b.pair.fill()
        buffers = a.pair.buffers_for(PACKET, [12] if entries == 2 else [12, 20])
        at = BORDER - 32
        a.pair.tx.write_table(at, [(each.addr, each.size, 0) for each in buffers])
        a.pair.tx.raw((at, 16 * entries, INDIRECT))
        a.pair.tx.kick()
        assert a.pair.wait_sent()
        assert a.drops(core.TX) == drops
    assert b.pair.frames() == [FRAME]
    goes_on(a, b)


def test_what_breaks_a_chain_before_its_piece_that_is_left_out_breaks_the_ring(make_guest: MakeGuest) -> None:
    a = make_guest()
    a.pair.tx.raw((HOLE, 64, NEXT), (BORDER, 64, 0))
    a.pair.tx.kick()
    assert eventually(lambda: a.state(core.TX).broken == "addr")


# ---- to receive ----


@pytest.mark.parametrize(
    ("addr", "fate"),
    [
        (BORDER - 2048, "filled"),
        (BORDER - 2047, "handed back"),
        (HOLE - 2048, "handed back"),
        (HOLE - 1, "handed back"),
        (HOLE, "breaks"),
    ],
    ids=["last byte mapped", "last byte left out", "all left out", "first byte left out", "in no region"],
)
@FEATURES
def test_a_buffer_with_a_byte_that_is_left_out_comes_back_empty_and_the_frame_takes_the_next(
    make_guest: MakeGuest, addr: int, fate: str, features: int
) -> None:
    a, b = make_guest(), make_guest(features=features)
    if fate == "breaks":
        b.pair.rx.raw((addr, 2048, WRITE))
        b.pair.rx.kick()
        a.pair.send(FRAME)
        assert eventually(lambda: b.state(core.RX).broken == "addr")
        assert b.drops(core.RX) == {"broken": 1}
        return
    b.pair.post_at(addr, 2048)
    b.pair.post(1)
    a.pair.send(FRAME)
    assert b.pair.frames() == [FRAME]
    back = fate == "handed back"
    assert [chain.buffers[0].addr for chain in b.pair.handed_back] == [addr] * back
    stats = b.stats(core.RX)
    assert (stats.left_out, stats.packets, b.drops(core.RX)) == (int(back), 1, {})
    goes_on(a, b)


@FEATURES
def test_among_others_buffers_that_are_left_out_cost_no_frame(make_guest: MakeGuest, features: int) -> None:
    """The number of them between two others, and so where a burst meets them, differs from burst to burst."""
    a, b = make_guest(), make_guest(features=features)
    sent = []
    for turn in range(40):
        for i in range(16):
            for _ in range((turn + i) % 4):
                b.pair.post_at(BORDER + 4096 * i, 2048)
            b.pair.post(1)
        burst = [frame(BROADCAST, mac(1), mark=bytes([turn, i])) for i in range(16)]
        a.pair.send_all(burst)
        sent += burst
        assert b.pair.frames(16) == burst
    stats = b.stats(core.RX)
    assert stats.packets == len(sent)
    assert b.drops(core.RX) == {}
    # What lies behind the last one that was filled is handed back as the next burst comes.
    assert stats.left_out == len(b.pair.handed_back) == 40 * 16 * 3 // 2


def test_a_frame_in_several_buffers_takes_no_place_among_such_that_are_left_out(make_guest: MakeGuest) -> None:
    """Those that it would have had before go back with them: what a frame is in follows each other."""
    a, b = make_guest(), make_guest()
    large = frame(BROADCAST, mac(1), 1200)
    b.pair.post(2, 500)
    b.pair.post_at(BORDER, 500)
    b.pair.post(3, 500)
    a.pair.send(large)
    (packet,) = b.pair.receive()
    assert packet.frame == large
    assert packet.lengths == (500, 500, 212)
    assert len(b.pair.handed_back) == 3
    assert (b.stats(core.RX).left_out, b.drops(core.RX)) == (1, {})


def test_a_guest_with_no_other_buffers_costs_its_neighbours_no_frame_and_lives_on(
    bridge: core.Bridge, guests: MakeGuest, make_guest: MakeGuest
) -> None:
    sender, evil, good = guests(bridge, num=1024), make_guest(num=1024), guests(bridge, num=1024)
    frames = [frame(BROADCAST, mac(9), mark=i.to_bytes(2, "big")) for i in range(512)]
    for _ in range(4):
        for _ in range(evil.pair.rx.room):
            evil.pair.post_at(BORDER, 2048)
        good.pair.fill()
        sender.pair.send_all(frames)
        assert good.pair.frames(len(frames)) == frames
        evil.pair.packets()
    stats = evil.stats(core.RX)
    assert stats.packets == 0
    assert set(evil.drops(core.RX)) <= {"left_out", "costly", "no_buffer"}
    # A walk takes three steps and more; what may be saved up has been spent when the last one begins.
    assert 1024 <= stats.left_out <= (4 * len(frames) * FRAME_STEPS + 2 * POLL_STEPS) / 3
    assert good.drops(core.RX) == {}
    into, out = ledger(bridge, {each.port: 1 for each in (sender, evil, good)})
    assert into == out
    evil.drain()
    goes_on(sender, evil)


def test_frames_that_found_all_buffers_left_out_wait_for_others(make_guest: MakeGuest) -> None:
    a, b = make_guest(), make_guest(num=4)
    for _ in range(4):
        b.pair.post_at(BORDER, 2048)
    a.pair.send(FRAME)
    assert eventually(lambda: b.waiting() == 1)
    assert b.pair.packets() == []
    assert len(b.pair.handed_back) == 4
    b.pair.post_at(BORDER, 2048)
    b.pair.post(1)
    assert b.pair.frames() == [FRAME]
    assert (b.stats(core.RX).left_out, b.drops(core.RX)) == (5, {})


# ---- rings and tables ----


def test_no_ring_starts_in_memory_that_is_left_out_and_one_that_runs_stops(make_guest: MakeGuest) -> None:
    a, b = make_guest(), make_guest()
    first, second, third = a.memory.regions()
    a.port.set_memory([replace(first, left_out=True, fd=-1), second, third])
    assert [a.state(index).started for index in range(2)] == [False, False]
    with pytest.raises(OSError, match="Bad address"):
        a.port.ring_start(core.TX, a.pair.tx.config())
    a.port.set_memory([first, second, third])
    a.restart(core.RX)
    a.restart(core.TX)
    goes_on(a, b)


def test_a_region_that_is_left_out_comes_and_goes_while_frames_flow(make_guest: MakeGuest) -> None:
    """Within it, before it came and after it went, there is no memory."""
    a, b = make_guest(), make_guest()
    left_out = table(a.memory)[1]
    for _ in range(20):
        a.port.remove_region(left_out)
        goes_on(a, b)
        a.port.add_region(left_out)
        a.pair.tx.raw((BORDER, 64, 0))
        goes_on(a, b)
    assert a.drops(core.TX) == {"left_out": 20}
    a.port.remove_region(left_out)
    a.pair.tx.raw((BORDER, 64, 0))
    a.pair.tx.kick()
    assert eventually(lambda: a.state(core.TX).broken == "addr")


def test_regions_that_are_left_out_take_their_slots_and_overlap_with_nothing(bridge: core.Bridge) -> None:
    port = bridge.add_guest(1)
    with GuestMemory() as memory:
        regions = [
            core.Region(i << 20, 4096, i << 30, i << 12, -1 if i % 2 else memory.fd, left_out=bool(i % 2))
            for i in range(core.MAX_REGIONS + 1)
        ]
        port.set_memory(regions[:-1])
        with pytest.raises(OSError, match="No space"):
            port.add_region(regions[-1])
        for i in 0, 1:
            with pytest.raises(OSError, match="File exists"):
                port.set_memory([regions[i], replace(regions[1 - i], guest_addr=regions[i].guest_addr + 4095)])
            with pytest.raises(OSError, match="File exists"):
                port.set_memory([regions[i], replace(regions[1 - i], user_addr=regions[i].user_addr + 4095)])
        for i in range(core.MAX_REGIONS):
            port.remove_region(regions[i])
            port.add_region(regions[-1])
            port.remove_region(regions[-1])
            port.add_region(regions[i])
        with pytest.raises(OSError, match="No space"):
            port.add_region(regions[-1])
        port.set_memory([])


def test_a_chain_that_is_left_out_is_dropped_for_that_in_a_ring_of_tables_alone(make_guest: MakeGuest) -> None:
    a, b = make_guest(), make_guest()
    b.pair.fill()
    a.pair.tx.add([Buffer(BORDER, 12), Buffer(BORDER + 64, 64)], writable=False, direct=0, owned=False)
    a.pair.send(FRAME, ALL_INDIRECT)
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {"left_out": 1}
    assert b.pair.frames() == [FRAME]
