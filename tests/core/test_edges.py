"""Edges that no guest and no interface comes to by itself: sizes of a bridge, the largest tables, odd group sockets."""

import os
import socket
from collections.abc import Iterator

import pytest

from tests.core.test_bounds import write_table
from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.rings import INDIRECT, INDIRECT_DESC, MIB, NEXT, VERSION_1, GuestMemory, Span
from tests.rig.waiting import eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = pytest.mark.core

ROOM = (Span(0x4000_0000, 32 * MIB, 0x7F12_0000_0000, 0x1000),)
MOST_ENTRIES = 65536  # of an indirect table, whatever the ring's size: c/ring/vring.c
MAX_DESCS = 2048
MAX_GROUP_FRAME = 65535 + 14 + 8 + 64 - 4  # GROUP_FRAME less a tag
UNTOLD = bytes(10)  # a virtio_net_hdr that asks for nothing (PACKET_VNET_HDR)


# ---- bridges ----


@pytest.mark.parametrize("frames", [core.lib.XN_MIN_FRAMES, 65536])
def test_the_fewest_and_the_most_frames_that_a_queue_may_have(frames: int) -> None:
    core.Bridge(frames_per_queue=frames).close()


@pytest.mark.parametrize("frames", [0, core.lib.XN_MIN_FRAMES // 2, core.lib.XN_MIN_FRAMES + 1, 65535, 131072])
def test_fewer_or_more_frames_or_no_power_of_two_are_refused(frames: int) -> None:
    with pytest.raises(OSError, match="create bridge: Invalid argument"):
        core.Bridge(frames_per_queue=frames)


def test_time_advances_on_a_bridge_that_does_not_run(held_time: None) -> None:
    with core.Bridge() as bridge:
        bridge.time_advance(1000)
        assert bridge.worker_stats(0).loops == 0


def test_each_reason_has_the_name_that_the_header_gives_it_and_there_is_none_behind_the_last() -> None:
    for names, prefix, first in (core.DROP_NAMES, "XN_DROP_", 0), (core.BROKEN_NAMES, "XN_BROKEN_", 1):
        assert len(names) == getattr(core.lib, f"{prefix}COUNT")
        for number, name in enumerate(names[first:], first):
            assert getattr(core.lib, prefix + name.upper()) == number
    assert core.BROKEN_NAMES[core.lib.XN_RING_OK] == ""


# ---- ports and rings ----


def test_an_address_of_another_is_refused_to_a_port_that_has_none(bridge: core.Bridge) -> None:
    one, two = bridge.add_guest(1), bridge.add_guest(1)
    one.set_mac(mac(1), False)
    with pytest.raises(OSError, match="File exists"):
        two.set_mac(mac(1), False)
    assert [(entry.mac, entry.port) for entry in bridge.fdb_dump()] == [(mac(1), one)]


@both_layouts
@pytest.mark.parametrize("index", [core.RX, core.TX])
def test_a_ring_that_is_started_again_goes_on_where_it_is_told(
    bridge: core.Bridge, guests: MakeGuest, packed: int, index: int
) -> None:
    a, b = guests(bridge), guests(bridge)
    for round_ in range(2):
        a.pair.fill()
        b.pair.send(frame(BROADCAST, mac(2), mark=bytes([round_])))
        assert a.pair.frames() == [frame(BROADCAST, mac(2), mark=bytes([round_]))]
        b.pair.fill()
        a.pair.send(frame(mac(2), mac(1), mark=bytes([round_])))
        assert b.pair.frames() == [frame(mac(2), mac(1), mark=bytes([round_]))]
        assert a.pair.wait_sent()
        ring = a.rings()[index]
        at = a.port.ring_stop(index)
        for _ in range(2):
            a.port.ring_start(index, ring.config(base=at & 0xFFFF))
    assert a.state(index).started


@both_layouts
@pytest.mark.parametrize("more", [0, 1])
def test_an_indirect_table_has_65536_entries_at_most_however_large_the_ring(
    bridge: core.Bridge, guests: MakeGuest, packed: int, more: int
) -> None:
    guest = guests(bridge, features=VERSION_1 | INDIRECT_DESC, num=8192, spans=ROOM)
    table = write_table(guest, [0] * (MAX_DESCS + 1), 0)
    guest.memory.reserve(16 * MOST_ENTRIES, 16)
    guest.pair.tx.raw((table, 16 * (MOST_ENTRIES + more), INDIRECT))
    guest.pair.tx.kick(always=True)
    assert eventually(lambda: guest.stats(core.TX).chains == 1 or guest.state(core.TX).broken)
    # Legal, but of more descriptors than one chain may have.
    assert guest.drops(core.TX) == ({} if more else {"pieces": 1})
    assert guest.state(core.TX).broken == ("indirect_len" if more else "")


@pytest.mark.parametrize("more", [0, 1])
def test_a_chain_of_empty_descriptors_in_the_ring_has_2048_at_most(
    bridge: core.Bridge, guests: MakeGuest, more: int
) -> None:
    sink = guests(bridge)
    sink.pair.fill()
    guest = guests(bridge, num=4096, spans=ROOM)
    sent = frame(BROADCAST, mac(9))
    at = guest.memory.take(4096)
    guest.memory.write(at, bytes(12) + sent)
    guest.pair.tx.raw(*[(at, 0, NEXT)] * (MAX_DESCS - 1 + more), (at, 12 + len(sent), 0))
    guest.pair.tx.kick(always=True)
    assert eventually(lambda: guest.stats(core.TX).chains == 1)
    assert guest.drops(core.TX) == ({"pieces": 1} if more else {})
    assert guest.state(core.TX).broken == ""
    assert more or sink.pair.frames() == [sent]


def test_as_many_regions_as_there_may_be_lie_where_frames_are_sent_from(
    make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """In any order, and not all at once: the gaps between them are found again."""
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256, zerocopy="on")
    a, b = guests(bridge), guests(bridge)
    with GuestMemory([Span(i << 32, 64 << 10, i << 32, i << 16) for i in range(1, 64)], prealloc=True) as more:
        bridge.events()
        for turn in range(2):
            for region in more.regions():
                a.port.add_region(region)
            with pytest.raises(OSError, match="No space"):
                a.port.add_region(more.regions()[0])
            assert bridge.events() & core.EVENT_UMEM
            b.pair.fill()
            a.pair.send(frame(BROADCAST, mac(1), 1000))
            assert b.pair.frames() == [frame(BROADCAST, mac(1), 1000)]
            for region in more.regions()[turn::2]:
                a.port.remove_region(region)
            for region in more.regions()[1 - turn :: 2]:
                a.port.remove_region(region)


# ---- group sockets, as the kernel would not have them ----


@pytest.fixture
def group(bridge: core.Bridge) -> Iterator[tuple[int, socket.socket]]:
    """A netdev whose group socket has its other end here."""
    port = bridge.add_netdev(1)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        there.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        port.set_group_fd(there.fileno())
        yield port, here
        port.set_group_fd(-1)


def filled(bridge: core.Bridge, guests: MakeGuest) -> Driver:
    made = guests(bridge)
    made.pair.fill()
    return made


def test_what_comes_with_a_group_frame_and_is_no_tag_is_not_looked_at(
    bridge: core.Bridge, guests: MakeGuest, group: tuple[core.Netdev, socket.socket]
) -> None:
    sink = filled(bridge, guests)
    sent = frame(BROADCAST, mac(9))
    group[1].send(UNTOLD + sent)
    assert sink.pair.frames() == [sent]


def test_a_group_frame_that_is_longer_than_any_is_dropped_and_the_next_passes(
    bridge: core.Bridge, guests: MakeGuest, group: tuple[core.Netdev, socket.socket]
) -> None:
    sink = filled(bridge, guests)
    port, here = group
    here.send(UNTOLD + frame(BROADCAST, mac(9), MAX_GROUP_FRAME + 1))
    here.send(UNTOLD + frame(BROADCAST, mac(9)))
    assert sink.pair.frames() == [frame(BROADCAST, mac(9))]
    assert port.queue_stats(0, core.RX).drops["truncated"] == 1


def test_a_frame_from_a_group_address_or_from_none_passes_and_teaches_nothing(
    bridge: core.Bridge, guests: MakeGuest, group: tuple[core.Netdev, socket.socket]
) -> None:
    sink = filled(bridge, guests)
    for source in BROADCAST, bytes(6):
        group[1].send(UNTOLD + frame(BROADCAST, source))
        assert sink.pair.frames() == [frame(BROADCAST, source)]
    assert bridge.fdb_dump() == []


def test_a_group_socket_that_fails_is_told_once_and_left_alone_until_there_is_another(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    sink = filled(bridge, guests)
    port = bridge.add_netdev(1)
    ready, write = os.pipe()
    port.set_group_fd(ready)
    assert eventually(lambda: bridge.events() & core.EVENT_SOCKET)
    for _ in range(3):
        os.write(write, b"x")
        sink.pair.send(frame(BROADCAST, mac(1)))
        assert sink.pair.wait_sent()
    assert not bridge.events() & core.EVENT_SOCKET
    os.close(ready)
    os.close(write)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        port.set_group_fd(there.fileno())
        here.send(UNTOLD + frame(BROADCAST, mac(9)))
        assert sink.pair.frames() == [frame(BROADCAST, mac(9))]
        port.set_group_fd(-1)
