"""What one guest may take of a worker: room in its arrays, descriptors walked, time; and what is left to others."""

import struct

import pytest

from tests.driver import Driver
from tests.guests import MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rings import INDIRECT, INDIRECT_DESC, MERGEABLE, MIB, MODERN, NEXT, RING_PACKED, VERSION_1, WRITE, Span
from xdpnet import core

pytest_plugins = ["tests.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

MAX_PIECES = 1024  # that one chain may have, c/vring.h
BURST = 64
ROOM = (Span(0x4000_0000, 32 * MIB, 0x7F12_0000_0000, 0x1000),)


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge()


def write_table(guest: Driver, sizes: list[int], flags: int, odd: int = 0) -> int:
    """An indirect table of buffers of these sizes, in one stretch of memory; its address."""
    memory = guest.memory
    table = memory.reserve(16 * len(sizes) + 16, 16) + odd
    at = memory.reserve(sum(sizes) + 64, 64)
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
    bridge.set_mac(evil.port, mac(1), False)
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
    bridge.set_mac(sink.port, mac(1), False)
    sink.pair.fill()
    frames = [frame(mac(1), mac(2), mark=i.to_bytes(2, "big")) for i in range(128)]
    sender.pair.send_all(frames)
    assert sink.pair.frames(len(frames)) == frames
