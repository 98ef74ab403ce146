"""What one guest may take of a worker: room in its arrays, descriptors walked, time; and what is left to others."""

import struct
import threading
from collections.abc import Sequence

import pytest

from tests.rig.driver import Driver, ledger
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.rings import INDIRECT, INDIRECT_DESC, MERGEABLE, MIB, MODERN, NEXT, RING_PACKED, VERSION_1, WRITE, Span
from tests.rig.waiting import eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

MAX_PIECES, MAX_DESCS = 1024, 2048  # that one chain may have, c/ring/vring.h
POLL_STEPS, POLL_BYTES = 4096, 640 << 10  # what one poll takes on, c/account.h
BURST = 64
ROOM = (Span(0x4000_0000, 32 * MIB, 0x7F12_0000_0000, 0x1000),)


def write_table(guest: Driver, sizes: list[int], flags: int, odd: int = 0, content: bytes = b"") -> int:
    """An indirect table of buffers of these sizes, in one stretch of memory that holds `content`; its address."""
    memory = guest.memory
    table = memory.reserve(16 * len(sizes) + 16, 16) + odd
    at = memory.reserve(sum(sizes) + 64, 64)
    memory.write(at, content)
    data = b""
    for i, size in enumerate(sizes):
        following = 0 if i == len(sizes) - 1 else i + 1
        tail = (0, flags) if guest.features & RING_PACKED else (flags | (NEXT if following else 0), following)
        data += struct.pack("<QIHH", at, size, *tail)
        at += size
    memory.write(table, data)
    return table


@pytest.mark.parametrize("plain", [1, 63])
def test_receive_chains_of_many_pieces_before_and_behind_plain_ones_stay_within_the_worker(
    bridge: core.Bridge, guests: MakeGuest, plain: int
) -> None:
    """All of a burst go to a guest whose chains use the worker's arrays up, by each way of taking them."""
    evil = guests(bridge, features=VERSION_1 | MERGEABLE | INDIRECT_DESC, spans=ROOM)
    good = guests(bridge)
    evil.port.set_mac(mac(1), False)
    crumbs = write_table(evil, [1] * MAX_PIECES, WRITE)
    buffer = evil.memory.reserve(2048, 64)
    rx = evil.pair.rx
    for first in (4 * MAX_PIECES // 1024, BURST):
        for _ in range(first):
            rx.raw((crumbs, 16 * MAX_PIECES, INDIRECT))
        for _ in range(plain):
            rx.raw((buffer, 2048, WRITE))
    rx.publish()
    sent = 2 * BURST
    bridge.stop()
    for _ in range(sent):
        good.pair.queue(frame(mac(1), mac(2), 60))
    bridge.start()
    good.pair.tx.kick(always=True)
    assert good.pair.wait_sent()
    stats = evil.stats(core.RX)
    assert stats.packets + sum(stats.drops.values()) == sent
    assert evil.state(core.RX).broken == ""


def test_a_burst_takes_no_more_chains_than_the_ring_has(bridge: core.Bridge, guests: MakeGuest) -> None:
    """A small ring that is always full: what it sends comes back lap by lap, each frame once."""
    sender, sink = guests(bridge, features=MODERN, num=4), guests(bridge)
    sink.port.set_mac(mac(1), False)
    sink.pair.fill()
    frames = [frame(mac(1), mac(2), mark=i.to_bytes(2, "big")) for i in range(128)]
    sender.pair.send_all(frames)
    assert sink.pair.frames(len(frames)) == frames


# ---- receive buffers that cost more than a frame is worth ----


def with_empties(guest: Driver, descriptors: int, size: int, odd: int = 0) -> int:
    """A table of one buffer and otherwise empty descriptors; its address."""
    return write_table(guest, [size] + [0] * (descriptors - 1), WRITE, odd)


@pytest.mark.parametrize("odd", [0, 4], ids=["aligned", "odd"])
def test_a_guest_whose_receive_chains_cost_too_much_loses_frames_and_nobody_else_does(
    bridge: core.Bridge, guests: MakeGuest, odd: int
) -> None:
    sender, evil, good = guests(bridge, num=1024), guests(bridge, spans=ROOM), guests(bridge, num=1024)
    table = with_empties(evil, MAX_PIECES, 2048, odd)
    for _ in range(evil.pair.rx.num):
        evil.pair.rx.raw((table, 16 * MAX_PIECES, INDIRECT))
    evil.pair.rx.publish()
    good.pair.fill()
    frames = [frame(BROADCAST, mac(9), mark=i.to_bytes(2, "big")) for i in range(512)]
    sender.pair.send_all(frames)
    assert good.pair.frames(len(frames)) == frames
    stats, drops = evil.stats(core.RX), evil.drops(core.RX)
    assert set(drops) == {"costly"}
    assert stats.packets + drops["costly"] == len(frames)
    # What one may cost for each frame that comes, and what may be saved up.
    assert 0 < stats.packets <= (len(frames) * 32 + POLL_STEPS) / MAX_PIECES + 1
    assert evil.state(core.RX).broken == ""


@pytest.mark.parametrize("descriptors", [2, 19, 31])
def test_receive_chains_as_drivers_make_them_cost_nobody_a_frame(
    bridge: core.Bridge, guests: MakeGuest, descriptors: int
) -> None:
    sender, receiver = guests(bridge, num=1024), guests(bridge, spans=ROOM)
    table = with_empties(receiver, descriptors, 2048)
    frames = [frame(BROADCAST, mac(9), mark=i.to_bytes(2, "big")) for i in range(1024)]
    for start in range(0, len(frames), receiver.pair.rx.num):
        for _ in range(receiver.pair.rx.num):
            receiver.pair.rx.raw((table, 16 * descriptors, INDIRECT))
        receiver.pair.rx.publish()
        sender.pair.send_all(frames[start : start + receiver.pair.rx.num])
        receiver.pair.rx.collect()
    assert receiver.stats(core.RX).packets == len(frames)
    assert receiver.drops(core.RX) == {}


@pytest.mark.parametrize("way", [core.RX, core.TX], ids=["rx", "tx"])
@pytest.mark.parametrize("more", [0, 1], ids=["the most", "one more"])
def test_a_chain_has_so_many_descriptors_at_most_be_they_empty(
    bridge: core.Bridge, guests: MakeGuest, packed: int, way: int, more: int
) -> None:
    other, guest = guests(bridge), guests(bridge, spans=ROOM)
    descriptors = MAX_DESCS - (0 if packed else 1) + more  # in a split ring the one that refers to them is counted
    sent = frame(BROADCAST, mac(9))
    if way == core.RX:
        guest.pair.rx.raw((with_empties(guest, descriptors, 2048), 16 * descriptors, INDIRECT))
        guest.pair.rx.publish()
        other.pair.send_all([sent])
    else:
        other.pair.fill()
        table = write_table(guest, [12 + len(sent)] + [0] * (descriptors - 1), 0, content=bytes(12) + sent)
        guest.pair.tx.raw((table, 16 * descriptors, INDIRECT))
        guest.pair.tx.kick()
        assert eventually(lambda: guest.stats(core.TX).packets == 1)
    assert eventually(lambda: guest.drops(way) == ({"pieces": 1} if more else {}))
    assert guest.state(way).broken == ""


# ---- a turn is bounded by what it costs: where time is held, by its price alone ----


def audience(bridge: core.Bridge, guests: MakeGuest, count: int, num: int) -> list[Driver]:
    """Guests that have room for `num` frames of any size."""
    spans = (Span(0x4000_0000, (num // 8) * MIB, 0x7F12_0000_0000, 0),)
    made = [guests(bridge, num=num, spans=spans) for _ in range(count)]
    for guest in made:
        guest.pair.fill(65000)
    return made


def queue_all(sender: Driver, frames: Sequence[bytes]) -> None:
    for each in frames:
        sender.pair.queue(each)
    sender.pair.tx.kick(always=True)


@pytest.mark.parametrize("size", [9000, 60000])
def test_large_frames_of_one_guest_do_not_keep_the_small_ones_of_another_waiting(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest, size: int
) -> None:
    bridge = make_bridge()
    big = (Span(0x4000_0000, 64 * MIB, 0x7F12_0000_0000, 0x1000),)
    flood, other = guests(bridge, num=512, spans=big), guests(bridge)
    sink = guests(bridge, num=1024, spans=big)
    sink.port.set_mac(mac(5), False)
    sink.pair.post(400, 65000)
    bridge.stop()
    queue_all(flood, [frame(mac(5), mac(6), size)] * 256)
    queue_all(other, [frame(mac(5), mac(7), 64)] * 64)
    bridge.start()
    assert other.pair.wait_sent()
    assert flood.pair.wait_sent()
    got = [len(each) for each in sink.pair.frames(320)]
    last = max(i for i, length in enumerate(got) if length == 64)
    # Each polls once for what a poll takes on, and the small ones are less than that.
    assert sum(got[:last]) <= 64 * 64 + POLL_BYTES + size


def test_pairs_of_one_guest_have_together_what_a_guest_with_one_has(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge()
    flood, other = guests(bridge, num=256, pairs=8, spans=ROOM), guests(bridge, num=1024)
    sink = guests(bridge, num=4096, spans=ROOM)
    sink.port.set_mac(mac(5), False)
    sink.pair.fill(1600)
    bridge.stop()
    for pair in flood.pairs:
        for _ in range(256):
            pair.queue(frame(mac(5), mac(6), 1514))
        pair.tx.kick(always=True)
    queue_all(other, [frame(mac(5), mac(7), 1514)] * 512)
    bridge.start()
    for guest in flood, other:
        for pair in guest.pairs:
            assert pair.wait_sent()
    order = [each[6:12] for each in sink.pair.frames(2560)]
    last = max(i for i, source in enumerate(order) if source == mac(7))
    before = order[:last].count(mac(6))
    # As many of the one as of the other, but for what pairs of the same guest take on in one turn.
    assert before <= 512 + 8 * BURST


@pytest.mark.parametrize("size", [1000, 60000])
def test_a_frame_to_many_ports_reaches_each_once_and_the_books_balance(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest, size: int
) -> None:
    """The large ones are flooded in parts, and what is sent by others passes in between."""
    bridge = make_bridge()
    receivers = audience(bridge, guests, 24, num=16)
    flood = guests(bridge, spans=ROOM)
    sent = [frame(BROADCAST, mac(6), size, mark=bytes([i])) for i in range(8)]
    flood.pair.send_all(sent)
    for receiver in receivers:
        assert receiver.pair.frames(len(sent)) == sent
    stats = flood.stats(core.TX)
    assert (stats.packets, stats.copies, flood.drops(core.TX)) == (8, 8 * 23, {})
    into, out = ledger(bridge, {each.port: 1 for each in [flood, *receivers]})
    assert into == out


def test_a_large_frame_to_many_ports_lets_others_pass_before_it_has_reached_the_last(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge()
    receivers = audience(bridge, guests, 32, num=64)
    flood, other = guests(bridge, spans=ROOM), guests(bridge)
    receivers[-1].port.set_mac(mac(5), False)
    bridge.stop()
    queue_all(flood, [frame(BROADCAST, mac(6), 60000)])
    queue_all(other, [frame(mac(5), mac(7), 64)])
    bridge.start()
    assert [len(each) for each in receivers[-1].pair.frames(2)] == [64, 60000]
    assert flood.pair.wait_sent()


def test_a_frame_that_changes_while_it_is_flooded_is_another_one_from_there_on(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """A driver that rewrites its frame hurts itself alone: the books balance whatever it does."""
    bridge = make_bridge()
    receivers = audience(bridge, guests, 32, num=64)
    receivers[0].port.set_mac(mac(5), False)
    flood = guests(bridge, spans=ROOM)
    addr = flood.memory.reserve(65536, 64)
    flood.memory.write(addr, bytes(12) + frame(BROADCAST, mac(6), 60000))
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            flood.memory.write(addr + 12, mac(5))
            flood.memory.write(addr + 12, BROADCAST)

    rewriter = threading.Thread(target=rewrite)
    rewriter.start()
    try:
        for _ in range(20):
            flood.pair.tx.raw((addr, 12 + 60000, 0))
            flood.pair.tx.kick(always=True)
            assert eventually(lambda: flood.pair.tx.pending() == 1)
            flood.pair.tx.collect()
    finally:
        stop.set()
        rewriter.join()
    into, out = ledger(bridge, {each.port: 1 for each in [flood, *receivers]})
    assert into == out
    assert flood.stats(core.TX).packets >= 20
    assert all(got[:6] != mac(5) for each in receivers[1:] for got in each.pair.frames(0))
