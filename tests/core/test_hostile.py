"""What a hostile guest may write into a ring. Each case breaks that ring alone, by its name, or nothing at all: the
other guests' traffic passes, no byte outside posted buffers changes, and a ring reset revives the ring.
"""

import functools
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.rig.driver import TOGETHER, Layout
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac, packed_only, split_only
from tests.rig.rings import (
    AVAIL,
    BORDER,
    DESC,
    EVENT_IDX,
    HOLE,
    IN_ORDER,
    INDIRECT,
    INDIRECT_DESC,
    LEGACY,
    MERGEABLE,
    MODERN,
    NEXT,
    SPLIT_REGIONS,
    USED,
    VERSION_1,
    WRITE,
    Buffer,
    Chain,
    PackedRing,
    SplitRing,
    wait_readable,
)
from tests.rig.scene import END, Scene, break_it, each_ring, own_flags
from tests.rig.waiting import PATIENCE_S, eventually, until_equal
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

MakeScene = Callable[..., Scene]
BURST = 64  # frames that are taken from a ring in one turn


@pytest.fixture
def make_scene(bridge: core.Bridge, guests: MakeGuest) -> Iterator[MakeScene]:
    """Makes a scene, and sees to it afterwards that nothing of what the guest did has left a trace."""
    made: list[Scene] = []

    def make(bridge: core.Bridge = bridge, **options: int) -> Scene:
        made.append(Scene(bridge, guests, **options))
        return made[-1]

    yield make
    for scene in made:
        scene.leaves_no_trace()


@pytest.fixture
def scene(make_scene: MakeScene) -> Scene:
    return make_scene()


def split_ring(scene: Scene, index: int) -> SplitRing:
    ring = scene.ring(index)
    assert isinstance(ring, SplitRing)
    return ring


def packed_ring(scene: Scene, index: int) -> PackedRing:
    ring = scene.ring(index)
    assert isinstance(ring, PackedRing)
    return ring


def good_buffer(scene: Scene) -> tuple[int, int]:
    """Address and size of a packet to the first good guest."""
    addr = scene.bad.memory.take(2048)
    scene.bad.memory.write(addr, bytes(12) + frame(mac(1), mac(0)))
    return addr, 76


# ---- indices ----


@split_only
@each_ring
@pytest.mark.parametrize("jump", [17, 1000, 0x8000, -1, -17])
def test_b1_an_available_index_that_jumps(scene: Scene, index: int, jump: int) -> None:
    split_ring(scene, index).next_avail = jump & 0xFFFF
    break_it(scene, index, "avail_jump")


@each_ring
def test_b1_a_ring_that_is_full_is_legal(scene: Scene, index: int) -> None:
    ring = scene.ring(index)
    addr, size = good_buffer(scene)
    for _ in range(16):
        ring.raw((addr, size if index == core.TX else 2048, own_flags(index)))
    scene.use(index)
    assert eventually(lambda: ring.returned() == (16 if index == core.TX else 1))
    assert scene.bad.state(index).broken == ""


@split_only
@each_ring
@pytest.mark.parametrize("head", [16, 17, 0x8000, 0xFFFF])
def test_b3_a_head_outside_the_table(scene: Scene, index: int, head: int) -> None:
    split_ring(scene, index).put(head)
    break_it(scene, index, "head")


@split_only
@each_ring
def test_b3_the_last_head_is_legal(scene: Scene, index: int) -> None:
    ring = split_ring(scene, index)
    ring.free.rotate(1)
    scene.both_ways_work(index)
    assert ring.memory.read(ring.used + 4, 4) == struct.pack("<I", 15)


@split_only
def test_b4_the_same_head_in_every_entry_is_the_guest_s_own_loss(scene: Scene) -> None:
    ring = split_ring(scene, core.TX)
    ring.write_descriptor(ring.desc, 5, *good_buffer(scene))
    for _ in range(16):
        ring.put(5)
    ring.kick()
    assert scene.good[0].pair.frames(16) == [frame(mac(1), mac(0))] * 16
    assert eventually(lambda: ring.used_idx() == 16)


@split_only
def test_b4_the_same_receive_head_in_every_entry(scene: Scene) -> None:
    ring = split_ring(scene, core.RX)
    ring.write_descriptor(ring.desc, 5, scene.bad.memory.take(2048), 2048, WRITE)
    for _ in range(16):
        ring.put(5)
    ring.publish()
    for _ in range(16):
        scene.good[0].pair.send(frame(mac(0), mac(1)))
    assert eventually(lambda: ring.used_idx() == 16)
    assert scene.bad.state(core.RX).broken == ""


# ---- chains ----


@split_only
@each_ring
def test_b48_the_last_descriptor_of_the_table_leads_to_the_first(scene: Scene, index: int) -> None:
    ring = split_ring(scene, index)
    ring.free.rotate(1)
    addr, size = good_buffer(scene)
    ring.raw((addr, 20, own_flags(index) | NEXT), (addr + 20, size - 20, own_flags(index)))
    scene.use(index)
    assert eventually(lambda: ring.returned() == 1)
    assert [entry[:2] for entry in ring.collect()] == [(15, 0 if index == core.TX else size)]
    if index == core.TX:
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]
    else:
        assert ring.memory.read(addr + 12, 64) == frame(mac(0), mac(1))


@split_only
@each_ring
def test_b5_b48_the_last_descriptor_of_the_table_leads_out_of_it(scene: Scene, index: int) -> None:
    ring = split_ring(scene, index)
    ring.write_descriptor(ring.desc, 15, scene.bad.memory.take(64), 64, own_flags(index) | NEXT, 16)
    ring.put(15)
    break_it(scene, index, "next")


@split_only
@each_ring
@pytest.mark.parametrize("then", [16, 0x8000, 0xFFFF])
def test_b5_a_next_outside_the_table(scene: Scene, index: int, then: int) -> None:
    ring = split_ring(scene, index)
    ring.write_descriptor(ring.desc, 0, scene.bad.memory.take(64), 64, own_flags(index) | NEXT, then)
    ring.put(0)
    break_it(scene, index, "next")


@split_only
@each_ring
@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("size", [0, 1, 64], ids=["empty", "one byte", "64 bytes"])
def test_b6_b7_a_loop_of_descriptors(scene: Scene, index: int, length: int, size: int) -> None:
    scene.ring(index).raw(*[(scene.bad.memory.take(64), size, own_flags(index) | NEXT)] * length)
    break_it(scene, index, "loop")


@packed_only
@each_ring
@pytest.mark.parametrize("size", [0, 1, 64], ids=["empty", "one byte", "64 bytes"])
def test_b34_a_chain_of_the_whole_ring_that_goes_on(scene: Scene, index: int, size: int) -> None:
    scene.ring(index).raw(*[(scene.bad.memory.take(64), size, own_flags(index) | NEXT)] * 16)
    break_it(scene, index, "loop")


@each_ring
def test_b34_b48_a_chain_of_the_whole_ring_is_legal(scene: Scene, index: int) -> None:
    """And ends in its last descriptor."""
    ring = scene.ring(index)
    pieces = [1] * 15
    if index == core.TX:
        scene.bad.pair.send(frame(mac(1), mac(0)), Layout("whole ring", lambda _: pieces))
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]
    else:
        scene.bad.pair.post(1, 2048, pieces)
        scene.good[0].pair.send(frame(mac(0), mac(1)))
        assert scene.bad.pair.frames() == [frame(mac(0), mac(1))]
    assert eventually(lambda: ring.returned() == 1)
    assert scene.bad.state(index).broken == ""


@packed_only
@each_ring
@pytest.mark.parametrize("length", [1, 2, 15])
def test_b34_a_chain_that_runs_into_a_descriptor_that_is_not_available(scene: Scene, index: int, length: int) -> None:
    scene.ring(index).raw(*[(scene.bad.memory.take(64), 64, own_flags(index) | NEXT)] * length)
    break_it(scene, index, "chain")


@each_ring
@pytest.mark.parametrize(
    ("addr", "size"),
    [
        (0, 64),
        (HOLE, 1),
        (HOLE - 1, 2),
        (HOLE + 0x10_0000, 64),
        (END, 1),
        (END - 63, 64),
        (END - 1, 0xFFFF_FFFF),
        (SPLIT_REGIONS[0].guest_addr - 1, 2),
        (SPLIT_REGIONS[0].user_addr, 64),
        (2**64 - 1, 1),
        (2**64 - 1, 2),
        (2**64 - 32, 64),
        (2**63, 0xFFFF_FFFF),
    ],
    ids=hex,
)
def test_b8_b11_an_address_outside_memory(scene: Scene, index: int, addr: int, size: int) -> None:
    scene.ring(index).raw((addr, size, own_flags(index)))
    break_it(scene, index, "addr")


@each_ring
def test_b8_the_last_descriptor_of_a_chain_outside_memory(scene: Scene, index: int) -> None:
    good = scene.bad.memory.take(64), 64, own_flags(index) | NEXT
    scene.ring(index).raw(good, good, (HOLE, 64, own_flags(index)))
    break_it(scene, index, "addr")


def test_b8_the_last_byte_of_memory_is_legal(scene: Scene) -> None:
    scene.bad.memory.write(END - 76, bytes(12) + frame(mac(1), mac(0)))
    scene.ring(core.TX).raw((END - 76, 76, 0))
    scene.ring(core.TX).kick()
    assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]


@each_ring
def test_b10_an_empty_descriptor_at_address_0_in_the_middle_of_a_chain_is_skipped(scene: Scene, index: int) -> None:
    ring, flags = scene.ring(index), own_flags(index)
    addr, size = good_buffer(scene)
    ring.raw((addr, 20, flags | NEXT), (0, 0, flags | NEXT), (addr + 20, size - 20, flags))
    scene.use(index)
    assert eventually(lambda: ring.returned() == 1)
    assert [written for _, written, _ in ring.collect()] == [0 if index == core.TX else size]
    if index == core.TX:
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]
    else:
        assert ring.memory.read(addr + 12, 64) == frame(mac(0), mac(1))
    scene.both_ways_work(index)


@each_ring
@pytest.mark.parametrize("empties", [1, 2])
def test_b10_a_chain_of_nothing_is_handed_back(scene: Scene, index: int, empties: int) -> None:
    """And the frame that found it is lost; the ring goes on."""
    ring, flags = scene.ring(index), own_flags(index)
    ring.raw(*[(0, 0, flags | NEXT)] * (empties - 1), (0, 0, flags))
    scene.use(index)
    assert eventually(lambda: ring.returned() == 1)
    assert [written for _, written, _ in ring.collect()] == [0]
    assert scene.bad.drops(index) == {"short" if index == core.TX else "too_small": 1}
    scene.both_ways_work(index)


@each_ring
def test_b11_one_descriptor_of_4_gib_that_is_all_memory(scene: Scene, index: int) -> None:
    """To transmit: dropped. To receive: as good as any."""
    ring, size = scene.ring(index), 2**32 - 1
    sparse = os.memfd_create("sparse")
    try:
        os.ftruncate(sparse, 2**32)
        scene.bad.port.add_region(core.Region(2**40, 2**32, 2**40, 0, sparse))
        ring.raw((2**40, size, own_flags(index)))
        scene.use(index)
        assert eventually(lambda: ring.returned() == 1)
        assert [written for _, written, _ in ring.collect()] == [0 if index == core.TX else 76]
        assert scene.bad.drops(index) == ({"oversize": 1} if index == core.TX else {})
        if index == core.RX:
            assert os.pread(sparse, 64, 12) == frame(mac(0), mac(1))
    finally:
        os.close(sparse)
    scene.both_ways_work(index)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([11], "short"), ([12], "short"), ([1] * 12, "short"), ([12, 0], "short"),
        ([13], "runt"), ([12, 13], "runt"), ([12, 14], ""), ([1] * 15, "runt"),
        ([65535 + 22 + 12], ""), ([65535 + 23 + 12], "oversize"), ([12, 60_000, 5558], "oversize"),
    ],
    ids=str,
)  # fmt: skip
def test_b11_b12_b13_a_chain_about_as_long_as_the_header_or_the_longest_frame(
    scene: Scene, sizes: list[int], reason: str
) -> None:
    ring = scene.ring(core.TX)
    start = scene.bad.memory.reserve(sum(sizes), region=0)
    scene.bad.memory.write(start, (bytes(12) + frame(mac(1), mac(0), sum(sizes)))[: sum(sizes)])
    at, last = start, len(sizes) - 1
    entries = []
    for i, size in enumerate(sizes):
        entries.append((at, size, 0 if i == last else NEXT))
        at += size
    if not reason:
        scene.good[0].restart(core.RX)
        scene.good[0].pair.post(1, 1 << 17)
    ring.raw(*entries)
    ring.kick()
    assert eventually(lambda: ring.returned() == 1)
    assert scene.bad.drops(core.TX) == ({reason: 1} if reason else {})
    if not reason:
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0), sum(sizes) - 12)]
        scene.good[0].restart(core.RX)
        scene.good[0].pair.fill()
    ring.collect()
    scene.both_ways_work(core.TX)


def test_b11_a_chain_of_more_than_4_gib_is_dropped(scene: Scene) -> None:
    """Every descriptor is all of the memory below the hole."""
    ring = scene.ring(core.TX)
    start = SPLIT_REGIONS[0].guest_addr
    table = scene.bad.memory.take(16 * 256)
    ring.write_table(table, [(start, HOLE - start, 0)] * 256)
    for _ in range(4):
        ring.raw((table, 16 * 256, INDIRECT))
    ring.kick()
    assert eventually(lambda: ring.returned() == 4)
    assert scene.bad.drops(core.TX) == {"oversize": 4}
    scene.others_are_undisturbed()


def test_b11_a_receive_buffer_of_more_than_4_gib_takes_a_frame(scene: Scene) -> None:
    """The length written is that of the frame."""
    ring = scene.ring(core.RX)
    memory = scene.bad.memory
    table = memory.take(16 * 1024)
    place = memory.take(1 << 20)
    ring.write_table(table, [(place, 1 << 20, WRITE)] * 256)
    ring.raw((table, 16 * 256, INDIRECT))
    scene.use(core.RX)
    assert eventually(lambda: ring.returned() == 1)
    assert [written for _, written, _ in ring.collect()] == [76]
    assert memory.read(place + 12, 64) == frame(mac(0), mac(1))


@each_ring
def test_b14_a_descriptor_of_the_wrong_direction(scene: Scene, index: int) -> None:
    scene.ring(index).raw((scene.bad.memory.take(2048), 2048, own_flags(1 - index)))
    break_it(scene, index, "direction")


@each_ring
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_b14_one_descriptor_of_the_wrong_direction_in_a_chain(scene: Scene, index: int, wrong: int) -> None:
    scene.ring(index).raw(
        *(
            (scene.bad.memory.take(512), 512, own_flags(1 - index if at == wrong else index) | (NEXT if at < 2 else 0))
            for at in range(3)
        )
    )
    break_it(scene, index, "direction")


@split_only
@each_ring
def test_b14_the_wrong_direction_inside_an_indirect_table(scene: Scene, index: int) -> None:
    table_of_the_wrong_direction(scene, index, scene.bad.memory.take(512), 512)
    break_it(scene, index, "direction")


@packed_only
def test_b14_the_wrong_direction_inside_an_indirect_table_to_receive(scene: Scene) -> None:
    table_of_the_wrong_direction(scene, core.RX, scene.bad.memory.take(512), 512)
    break_it(scene, core.RX, "direction")


@packed_only
def test_b14_in_an_indirect_table_to_transmit_the_direction_does_not_matter(scene: Scene) -> None:
    """DPDK's driver leaves the flag of a writable buffer in such tables."""
    addr, size = good_buffer(scene)
    table_of_the_wrong_direction(scene, core.TX, addr, size)
    scene.use(core.TX)
    assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]
    scene.both_ways_work(core.TX)


def table_of_the_wrong_direction(scene: Scene, index: int, addr: int, size: int) -> None:
    ring = scene.ring(index)
    table = scene.bad.memory.take(16)
    ring.write_table(table, [(addr, size, own_flags(1 - index))])
    ring.raw((table, 16, INDIRECT))


# ---- indirect tables ----


@each_ring
def test_b15_an_indirect_descriptor_that_was_not_negotiated(make_scene: MakeScene, index: int) -> None:
    scene = make_scene(features=MODERN & ~INDIRECT_DESC)
    ring = scene.ring(index)
    table = scene.bad.memory.take(16)
    ring.write_table(table, [(scene.bad.memory.take(512), 512, own_flags(index))])
    ring.raw((table, 16, INDIRECT))
    break_it(scene, index, "indirect")


@each_ring
def test_b16_an_indirect_descriptor_with_next(scene: Scene, index: int) -> None:
    ring = scene.ring(index)
    table = scene.bad.memory.take(16)
    ring.write_table(table, [(scene.bad.memory.take(512), 512, own_flags(index))])
    ring.raw((table, 16, INDIRECT | NEXT), (scene.bad.memory.take(512), 512, own_flags(index)))
    break_it(scene, index, "indirect")


@each_ring
def test_b16_an_indirect_table_in_an_indirect_table(scene: Scene, index: int) -> None:
    ring = scene.ring(index)
    table = scene.bad.memory.take(16)
    ring.write_table(table, [(table, 16, INDIRECT)])
    ring.raw((table, 16, INDIRECT))
    break_it(scene, index, "indirect")


@packed_only
@each_ring
def test_b20_an_indirect_table_behind_other_descriptors(scene: Scene, index: int) -> None:
    """In a split ring this is legal."""
    ring = scene.ring(index)
    table = scene.bad.memory.take(16)
    ring.write_table(table, [(scene.bad.memory.take(512), 512, own_flags(index))])
    ring.raw((scene.bad.memory.take(512), 512, own_flags(index) | NEXT), (table, 16, INDIRECT))
    break_it(scene, index, "indirect")


@each_ring
@pytest.mark.parametrize("size", [0, 1, 15, 17, 16 * 16 * 16 + 16, 0xFFFF_FFFF, 0xFFFF_FFF0])
def test_b17_an_indirect_table_of_a_wrong_size(scene: Scene, index: int, size: int) -> None:
    scene.ring(index).raw((SPLIT_REGIONS[2].guest_addr, size, INDIRECT))
    break_it(scene, index, "indirect_len")


def test_b17_an_indirect_table_of_sixteen_times_the_ring_is_legal(scene: Scene) -> None:
    ring = scene.ring(core.TX)
    table = SPLIT_REGIONS[2].guest_addr
    addr, size = good_buffer(scene)
    ring.write_table(table, [(addr, size, 0)] + [(addr, 0, 0)] * 255)
    ring.raw((table, 16 * 256, INDIRECT))
    ring.kick()
    assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]


@each_ring
@pytest.mark.parametrize(
    "table", [END - 32, HOLE - 32, BORDER - 32, BORDER - 16, BORDER - 24, BORDER - 31, END - 1001], ids=hex
)
def test_b18_an_indirect_table_anywhere_in_memory_is_legal(scene: Scene, index: int, table: int) -> None:
    """At the end of a region, across the border of two, at an odd address."""
    ring, flags = scene.ring(index), own_flags(index)
    addr, size = good_buffer(scene)
    ring.write_table(table, [(addr, 20, flags), (addr + 20, size - 20, flags)])
    ring.raw((table, 32, INDIRECT))
    scene.use(index)
    assert eventually(lambda: ring.returned() == 1)
    if index == core.TX:
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]
    else:
        assert ring.memory.read(addr + 12, 64) == frame(mac(0), mac(1))


@each_ring
def test_b18_an_indirect_table_that_is_the_ring_itself_is_a_table_in_a_table(scene: Scene, index: int) -> None:
    ring = scene.ring(index)
    ring.raw((ring.parts()[0][0], 16, INDIRECT))
    break_it(scene, index, "indirect")


@each_ring
def test_b18_an_indirect_table_in_descriptors_that_the_ring_does_not_use(scene: Scene, index: int) -> None:
    ring, flags = scene.ring(index), own_flags(index)
    addr, size = good_buffer(scene)
    table = ring.parts()[0][0] + 16 * 14
    ring.write_table(table, [(addr, 20, flags), (addr + 20, size - 20, flags)])
    ring.raw((table, 32, INDIRECT))
    scene.use(index)
    assert eventually(lambda: ring.returned() == 1)
    assert scene.bad.state(index).broken == ""
    if index == core.TX:
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0))]
    else:
        assert ring.memory.read(addr + 12, 64) == frame(mac(0), mac(1))


@each_ring
@pytest.mark.parametrize("addr", [0, HOLE, END, END - 16, HOLE - 16, 2**64 - 16, 2**64 - 32])
def test_b18_an_indirect_table_outside_memory(scene: Scene, index: int, packed: int, addr: int) -> None:
    """Two descriptors; where the first is in memory, it leads to the second."""
    if addr in (END - 16, HOLE - 16):
        flags = own_flags(index) | NEXT
        last = (0, flags) if packed else (flags, 1)
        scene.bad.memory.write(addr, struct.pack("<QIHH", scene.bad.memory.take(64), 64, *last))
    scene.ring(index).raw((addr, 32, INDIRECT))
    break_it(scene, index, "addr")


@split_only
@each_ring
def test_b19_a_next_outside_an_indirect_table(scene: Scene, index: int) -> None:
    ring = split_ring(scene, index)
    table = scene.bad.memory.take(64)
    ring.write_descriptor(table, 0, scene.bad.memory.take(64), 64, own_flags(index) | NEXT, 2)
    ring.raw((table, 32, INDIRECT))
    break_it(scene, index, "next")


@split_only
@each_ring
@pytest.mark.parametrize("size", [0, 8])
def test_b19_a_loop_in_an_indirect_table(scene: Scene, index: int, size: int) -> None:
    ring = split_ring(scene, index)
    table = scene.bad.memory.take(64)
    ring.write_descriptor(table, 0, scene.bad.memory.take(64), size, own_flags(index) | NEXT, 1)
    ring.write_descriptor(table, 1, scene.bad.memory.take(64), size, own_flags(index) | NEXT, 0)
    ring.raw((table, 32, INDIRECT))
    break_it(scene, index, "loop")


@packed_only
def test_b19_in_a_packed_indirect_table_only_the_write_flag_means_anything(scene: Scene) -> None:
    ring = scene.ring(core.TX)
    sent = frame(mac(1), mac(0), 200)
    table = scene.bad.memory.take(64)
    buffers = scene.bad.pair.buffers_for(bytes(12) + sent, [12, 100])
    for i, (flags, ident) in enumerate([(0, 0xFFFF), (NEXT | AVAIL, 16), (NEXT | USED | AVAIL, 0)]):
        packed = struct.pack("<QIHH", buffers[i].addr, buffers[i].size, ident, flags)
        scene.bad.memory.write(table + 16 * i, packed)
    ring.raw((table, 48, INDIRECT))
    ring.kick()
    assert scene.good[0].pair.frames() == [sent]


# ---- packed: availability, wrap counters, buffer ids ----


@packed_only
@each_ring
@pytest.mark.parametrize("flags", [0, AVAIL | USED, USED], ids=["neither", "both", "the other lap"])
def test_b32_b33_a_descriptor_with_the_flags_of_another_lap_is_not_available(
    scene: Scene, index: int, flags: int
) -> None:
    ring = packed_ring(scene, index)
    addr, size = good_buffer(scene)
    ring.raw((addr, size if index == core.TX else 2048, own_flags(index)))
    held = ring.held
    ring.memory.store16(ring.desc + 14, flags | own_flags(index))
    ring.held = None
    before = scene.bad.memory.snapshot()
    scene.use(index)
    scene.others_are_undisturbed()
    assert scene.bad.memory.changes(before, [(ring.device, 4)]) == []
    assert scene.bad.state(index).broken == ""
    if index == core.TX:
        assert held is not None
        ring.memory.store16(*held)
        ring.kick(always=True)
        assert frame(mac(1), mac(0)) in scene.good[0].pair.frames()


@packed_only
def test_b32_a_ring_that_is_never_available_keeps_no_worker_awake(
    held_time: None, make_bridge: MakeBridge, make_scene: MakeScene
) -> None:
    """It sleeps after every turn, of which there is one a kick."""
    bridge = make_bridge(spin_us=0)
    scene = make_scene(bridge)
    ring = packed_ring(scene, core.TX)
    for i in range(16):
        ring.memory.write(ring.desc + 16 * i, struct.pack("<QIHH", HOLE, 64, i, AVAIL | USED))
    bridge.time_advance(0)
    before = bridge.worker_stats(0)
    for _ in range(100):
        os.eventfd_write(ring.kick_fd, 1)
    bridge.time_advance(0)
    after = bridge.worker_stats(0)
    assert after.loops - before.loops <= 110
    assert abs((after.loops - before.loops) - (after.sleeps - before.sleeps)) <= 1
    assert scene.bad.state(core.TX).broken == ""


@packed_only
@pytest.mark.parametrize("num", [3, 16, 255])
def test_b33_a_wrap_counter_flipped_in_the_middle_of_the_ring(make_scene: MakeScene, num: int) -> None:
    """The guest goes on as if it were a lap further: its descriptors are not available, until it repents."""
    scene = make_scene(num=num)
    ring = packed_ring(scene, core.TX)
    scene.bad.pair.send(frame(mac(1), mac(0)))
    assert len(scene.good[0].pair.frames()) == 1
    assert scene.bad.pair.wait_sent()
    ring.next_avail += num
    ring.raw((*good_buffer(scene), 0))
    ring.kick(always=True)
    scene.others_are_undisturbed()
    assert scene.bad.state(core.TX).broken == ""
    assert scene.bad.stats(core.TX).packets == 1
    scene.revives(core.TX)


@packed_only
@each_ring
@pytest.mark.parametrize("ident", [16, 17, 0x8000, 0xFFFF])
@pytest.mark.parametrize("length", [1, 3])
def test_b35_a_buffer_id_outside_the_ring(scene: Scene, index: int, ident: int, length: int) -> None:
    """The one that counts is in the last descriptor of the chain."""
    ring = packed_ring(scene, index)
    flags = own_flags(index)
    first = [(scene.bad.memory.take(512), 512, flags | NEXT, 0)] * (length - 1)
    ring.post([*first, (scene.bad.memory.take(512), 512, flags, ident)])
    break_it(scene, index, "id")


@packed_only
@each_ring
def test_b35_ids_that_differ_within_a_chain_give_way_to_the_last(scene: Scene, index: int) -> None:
    ring = packed_ring(scene, index)
    addr, size = good_buffer(scene)
    flags = own_flags(index)
    ring.post([(addr, 20, flags | NEXT, 0xFFFF), (addr + 20, 20, flags | NEXT, 3), (addr + 40, size - 40, flags, 15)])
    ring.chains[15] = ring.chains[0xFFFF] = ring.chains[3] = Chain((), (0, 1, 2), owned=False)
    scene.use(index)
    assert eventually(lambda: ring.returned() == 1)
    assert [entry[:2] for entry in ring.collect()] == [(15, 0 if index == core.TX else 76)]


@packed_only
@each_ring
def test_b35_the_same_buffer_id_in_every_descriptor_comes_back_as_often(scene: Scene, index: int) -> None:
    ring = packed_ring(scene, index)
    addr, size = good_buffer(scene)
    for _ in range(16):
        ring.raw((addr, size if index == core.TX else 2048, own_flags(index)), ident=7)
    scene.use(index)
    if index == core.RX:
        scene.good[0].pair.send_all([frame(mac(0), mac(1))] * 15)
    assert eventually(lambda: ring.returned() == 16)
    assert scene.bad.state(index).broken == ""


# ---- what was right before the fault ----


def test_chains_before_the_bad_one_are_delivered_and_handed_back(scene: Scene) -> None:
    ring = scene.ring(core.TX)
    for i in range(5):
        scene.bad.pair.queue(frame(mac(1), mac(0), mark=bytes([i])))
    ring.raw((HOLE, 64, 0))
    ring.kick()
    assert scene.good[0].pair.frames(5) == [frame(mac(1), mac(0), mark=bytes([i])) for i in range(5)]
    assert eventually(lambda: scene.bad.state(core.TX).broken == "addr")
    assert eventually(lambda: ring.returned() == 5)


def test_frames_before_a_bad_receive_buffer_arrive_and_those_behind_are_counted(scene: Scene) -> None:
    scene.bad.pair.post(3)
    scene.ring(core.RX).raw((HOLE, 64, WRITE))
    scene.ring(core.RX).publish()
    scene.good[0].pair.send_all([frame(mac(0), mac(1), mark=bytes([i])) for i in range(10)])
    assert scene.bad.pair.frames(3) == [frame(mac(0), mac(1), mark=bytes([i])) for i in range(3)]
    assert scene.bad.drops(core.RX) == {"broken": 7}


# ---- the guest changes things under our feet ----


def test_b26_the_device_never_reads_back_what_it_writes(scene: Scene) -> None:
    """Used index and elements; packed: used descriptors, and what suppresses kicks."""
    ring = scene.ring(core.TX)
    for i in range(40):
        if isinstance(ring, SplitRing):
            ring.memory.store16(ring.used + 2, 0xDEAD)
            ring.memory.write(ring.used + 4, b"\xff" * 8 * ring.num)
        elif isinstance(ring, PackedRing):
            ring.memory.write(ring.device, b"\xad\xde\xff\xff")
            for n in range(ring.last_used - min(i, 15), ring.last_used):
                pos, wrap = ring.place(n)
                flags = (AVAIL | USED) * wrap | 7
                ring.memory.write(ring.desc + 16 * pos, struct.pack("<QIHH", HOLE, 2**32 - 1, 0xDEAD, flags))
        scene.bad.pair.queue(frame(mac(1), mac(0), mark=bytes([i])))
        ring.kick(always=True)
        assert scene.good[0].pair.frames() == [frame(mac(1), mac(0), mark=bytes([i]))]
        assert eventually(functools.partial(lambda want: ring.returned() == want, i + 1))
        scene.bad.pair.reap()


@pytest.mark.parametrize("part", range(4), ids=["descriptors", "driver's area", "device's area", "transmit ring"])
def test_a23_b31_a_receive_buffer_over_the_guest_s_own_ring_hurts_only_itself(scene: Scene, part: int) -> None:
    ring = scene.ring(core.RX)
    (at, _) = [*ring.parts(), scene.ring(core.TX).parts()[0]][part]
    for _ in range(4):
        ring.raw((at, 128, WRITE))
        scene.use(core.RX)
        scene.others_are_undisturbed()
        scene.bad.restart(core.RX)
        scene.bad.restart(core.TX)
    scene.both_ways_work(core.RX)


def test_b31_receive_buffers_that_overlap_each_other_and_what_is_sent(scene: Scene) -> None:
    addr, size = good_buffer(scene)
    for shift in 0, 0, 7, 64:
        scene.ring(core.RX).raw((addr + shift, 1024, WRITE))
    scene.ring(core.RX).publish()
    for _ in range(4):
        scene.ring(core.TX).raw((addr, size, 0))
    scene.ring(core.TX).kick()
    scene.good[0].pair.send_all([frame(mac(0), mac(1), mark=bytes([i])) for i in range(4)])
    assert eventually(lambda: scene.ring(core.RX).returned() == 4)
    assert eventually(lambda: scene.ring(core.TX).returned() == 4)
    assert [scene.bad.state(index).broken for index in range(2)] == ["", ""]


def test_a22_two_rings_in_one_place_hurt_only_themselves(scene: Scene) -> None:
    scene.bad.port.ring_stop(core.RX)
    scene.bad.port.ring_start(core.RX, scene.ring(core.TX).config())
    for _ in range(8):
        # For nobody: what the others get is compared. Kicked, as each ring's wish for none is also the other's.
        scene.bad.pair.queue(frame(mac(0), mac(0)))
        scene.ring(core.TX).kick(always=True)
        scene.good[0].pair.send(frame(mac(0), mac(1)))
        scene.others_are_undisturbed()
    scene.bad.restart(core.RX)
    scene.bad.restart(core.TX)
    scene.both_ways_work(core.TX)
    scene.both_ways_work(core.RX)


@split_only
def test_b30_receive_buffers_withdrawn_halfway(scene: Scene) -> None:
    """The frame needs two buffers; when the first is taken, the second is no longer there."""
    ring = split_ring(scene, core.RX)
    scene.bad.pair.post(2, 100)
    scene.good[0].pair.send(frame(mac(0), mac(1)))
    assert len(scene.bad.pair.frames()) == 1
    ring.next_avail = 0
    ring.publish()
    before = scene.bad.memory.snapshot()
    scene.good[0].pair.send(frame(mac(0), mac(1), 150))
    assert scene.good[0].pair.wait_sent()
    assert scene.bad.memory.changes(before, []) == []
    scene.is_broken(core.RX, "avail_jump")
    assert scene.bad.drops(core.RX)["broken"] >= 1


@packed_only
def test_b30_packed_receive_buffers_withdrawn_halfway(scene: Scene) -> None:
    """A packed ring shows no more than that the second buffer is not there: nothing of the first is used."""
    ring = packed_ring(scene, core.RX)
    scene.bad.pair.post(2, 100)
    flags_at = ring.desc + 16 + 14
    flags = ring.memory.load16(flags_at)
    ring.memory.store16(flags_at, WRITE)
    before = scene.bad.memory.snapshot()
    scene.good[0].pair.send(frame(mac(0), mac(1), 150))
    assert scene.good[0].pair.wait_sent()
    assert scene.bad.waiting() == 1
    # But for when it wants to be kicked.
    assert scene.bad.memory.changes(before, [ring.parts()[2]]) == []
    ring.memory.store16(flags_at, flags)
    ring.kick(always=True)
    assert scene.bad.pair.frames() == [frame(mac(0), mac(1), 150)]


@packed_only
def test_b30_packed_receive_buffers_withdrawn_and_replaced_by_what_breaks_the_ring(scene: Scene) -> None:
    """Nothing of the first is used then either."""
    ring = packed_ring(scene, core.RX)
    scene.bad.pair.post(1, 100)
    ring.raw((HOLE, 100, WRITE))
    ring.publish()
    before = scene.bad.memory.snapshot()
    scene.good[0].pair.send(frame(mac(0), mac(1), 150))
    assert scene.good[0].pair.wait_sent()
    assert scene.bad.memory.changes(before, []) == []
    scene.is_broken(core.RX, "addr")


def test_b28_a_receive_ring_that_is_never_filled_waits(scene: Scene) -> None:
    for _ in range(3):
        scene.use(core.RX)
    assert scene.bad.waiting() == 3
    scene.bad.drain()
    scene.both_ways_work(core.RX)
    assert scene.bad.drops(core.RX) == {}


def test_b28_receive_buffers_of_one_byte_wait_until_they_are_enough(make_scene: MakeScene) -> None:
    """76 of them are; 75 are not, and take nothing."""
    scene = make_scene(num=128)
    ring = scene.ring(core.RX)
    scene.bad.pair.post(75, 1)
    scene.use(core.RX)
    assert scene.bad.waiting() == 1
    assert ring.returned() == 0
    scene.bad.pair.post(1, 1)
    (packet,) = scene.bad.pair.receive()
    assert (packet.frame, packet.num_buffers) == (frame(mac(0), mac(1)), 76)
    scene.both_ways_work(core.RX)


@pytest.mark.parametrize("size", [0, 1, 12, 75])
def test_b29_without_mergeable_buffers_one_that_is_too_small_comes_back_empty(make_scene: MakeScene, size: int) -> None:
    scene = make_scene(features=MODERN & ~MERGEABLE)
    ring = scene.ring(core.RX)
    place = scene.bad.memory.take(128)
    for length in size, 76:
        ring.raw((place, length, WRITE))
    scene.use(core.RX)
    assert eventually(lambda: ring.returned() == 1)
    assert [written for _, written, _ in ring.collect()] == [0]
    assert scene.bad.drops(core.RX) == {"too_small": 1}
    scene.use(core.RX)
    assert eventually(lambda: ring.pending() == 1)
    assert [written for _, written, _ in ring.collect()] == [76]
    assert ring.memory.read(place + 12, 64) == frame(mac(0), mac(1))
    scene.both_ways_work(core.RX)


def test_b31_the_same_memory_at_two_addresses_is_the_guest_s_own_affair(scene: Scene) -> None:
    """Both receive a frame there, and what is there then is sent from both."""
    memory, span, alias = scene.bad.memory, SPLIT_REGIONS[2], 2**40
    addr = memory.reserve(2048, region=2)
    other = addr - span.guest_addr + alias
    scene.bad.port.add_region(core.Region(alias, span.size, alias, span.offset, memory.fd))
    for at in addr, other:
        scene.ring(core.RX).raw((at, 2048, WRITE))
    scene.ring(core.RX).publish()
    scene.good[0].pair.send_all([frame(mac(0), mac(1), mark=bytes([i])) for i in range(2)])
    assert eventually(lambda: scene.ring(core.RX).returned() == 2)
    assert memory.read(addr + 12, 64) in [frame(mac(0), mac(1), mark=bytes([i])) for i in range(2)]
    memory.write(other - alias + span.guest_addr, bytes(12) + frame(mac(1), mac(0)))
    for at in addr, other:
        scene.ring(core.TX).raw((at, 76, 0))
    scene.ring(core.TX).kick()
    assert scene.good[0].pair.frames(2) == [frame(mac(1), mac(0))] * 2
    assert [scene.bad.state(index).broken for index in range(2)] == ["", ""]


# ---- notifications ----


@pytest.mark.parametrize("features", [LEGACY, VERSION_1 | EVENT_IDX], ids=["flags", "event index"])
def test_b24_b37_b38_b40_notification_fields_rewritten_at_random_lose_no_frame(
    bridge: core.Bridge, guests: MakeGuest, features: int, scene: Scene
) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    b.pair.fill()
    dice = random.Random(features)
    for i in range(200):
        for ring in a.pair.tx, b.pair.rx:
            if isinstance(ring, SplitRing):
                ring.memory.store16(ring.avail, dice.randrange(1 << 16))
                ring.memory.store16(ring.used_event_at, dice.randrange(1 << 16))
            elif isinstance(ring, PackedRing):
                ring.suppress(dice.choice([0, 1, 2, 3, 4, 0xFFFF]), dice.randrange(1 << 16))
        a.pair.queue(frame(BROADCAST, mac(5), mark=bytes([i])))
        a.pair.tx.kick(always=True)
    assert eventually(lambda: b.stats(core.RX).packets == 200)
    assert [packet.frame for packet in b.pair.packets()] == [
        frame(BROADCAST, mac(5), mark=bytes([i])) for i in range(200)
    ]
    for driver, direction in (a, core.TX), (b, core.RX):
        stats = driver.stats(direction)
        assert stats.calls + stats.calls_saved <= 200


@packed_only
@pytest.mark.parametrize(
    ("flags", "features"),
    [(3, MODERN), (3, VERSION_1), (DESC, VERSION_1), (0xFFFF, MODERN), (4, MODERN), (0, MODERN)],
    ids=["reserved", "reserved, no event index", "DESC, no event index", "all bits", "an unknown bit", "ENABLE"],
)
def test_b37_suppression_that_makes_no_sense_is_none(
    bridge: core.Bridge, guests: MakeGuest, flags: int, features: int, scene: Scene
) -> None:
    a, b = guests(bridge), guests(bridge, features=features)
    b.pair.fill()
    ring = b.pair.rx
    assert isinstance(ring, PackedRing)
    for i in range(8):
        ring.suppress(flags, 0x7123 + 0x1111 * i)
        a.pair.send(frame(BROADCAST, mac(5), mark=bytes([i])))
        assert wait_readable(ring.call_fd, PATIENCE_S)
        assert ring.calls() == 1
        assert a.pair.wait_sent()
    assert b.stats(core.RX).calls == 8


def test_b39_a_guest_that_asks_for_an_interrupt_too_late_loses_only_that(
    bridge: core.Bridge, guests: MakeGuest, scene: Scene
) -> None:
    a, b = guests(bridge, num=64), guests(bridge, num=64)
    b.pair.fill()
    a.pair.send(frame(BROADCAST, mac(5)))
    assert len(b.pair.frames()) == 1
    b.pair.rx.calls()
    b.pair.rx.want_call(ahead=63)
    for i in range(62):
        a.pair.send(frame(BROADCAST, mac(5), mark=bytes([i])))
        assert a.pair.wait_sent()
    assert eventually(lambda: b.stats(core.RX).packets == 63)
    assert b.pair.rx.calls() == 0
    assert [packet.frame[14] for packet in b.pair.packets()] == list(range(62))


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event index"])
def test_b38_a_guest_that_asks_for_an_interrupt_at_every_frame_gets_one_a_burst_at_most(
    bridge: core.Bridge, guests: MakeGuest, features: int, scene: Scene
) -> None:
    a, b = guests(bridge, features=features), guests(bridge, features=features)
    got = 0
    for turn in range(20):
        b.pair.fill()
        for i in range(200):
            a.pair.queue(frame(BROADCAST, mac(5), mark=bytes([turn, i])))
        for ring in a.pair.tx, b.pair.rx:
            ring.want_call()
        a.pair.tx.kick(always=True)
        assert a.pair.wait_sent()
        until_equal(lambda: b.stats(core.RX).packets, 200 * (turn + 1))
        got += len(b.pair.packets())
    assert got == 4000
    for driver, direction in (a, core.TX), (b, core.RX):
        stats = driver.stats(direction)
        assert 20 <= stats.calls <= stats.bursts
        assert stats.bursts <= 4000 / 8, "the frames did not come in bursts"


def test_b41_a_kick_for_every_reason_and_none_costs_nothing_but_time(scene: Scene) -> None:
    for _ in range(1000):
        os.eventfd_write(scene.ring(core.TX).kick_fd, 1)
    scene.both_ways_work(core.TX)


def test_b41_a_storm_of_kicks_that_announce_nothing_keeps_nobody_waiting(scene: Scene) -> None:
    """As many as another thread can send, while the others talk."""
    ring, ends = scene.ring(core.TX), threading.Event()

    def storm() -> int:
        sent = 0
        while not ends.is_set() or sent <= 1000:
            os.eventfd_write(ring.kick_fd, 1)
            sent += 1
        return sent

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(storm)
        try:
            for _ in range(100):
                scene.others_are_undisturbed()
        finally:
            ends.set()
    assert sent.result() > 1000
    stats = scene.bad.stats(core.TX)
    assert (stats.packets, stats.breaks) == (0, 0)
    assert stats.kicks <= scene.bridge.worker_stats(0).loops
    scene.both_ways_work(core.TX)


@each_ring
def test_b42_a_guest_that_never_kicks_is_served_all_the_same(scene: Scene, index: int) -> None:
    ring = scene.ring(index)
    for i in range(3):
        assert eventually(scene.ring(core.TX).waits)
        if index == core.TX:
            scene.bad.pair.queue(frame(mac(1), mac(0), mark=bytes([i])))
            ring.publish()
            assert scene.good[0].pair.frames() == [frame(mac(1), mac(0), mark=bytes([i]))]
        else:
            ring.raw((*good_buffer(scene), WRITE))
            ring.publish()
            scene.use(index)
            until_equal(ring.returned, i + 1)
    assert scene.bad.stats(index).kicks == 0
    assert scene.bad.drops(index) == {}


def test_b42_a_guest_that_never_kicks_is_served_beside_busy_ones(scene: Scene) -> None:
    assert eventually(scene.ring(core.TX).waits)
    scene.bad.pair.queue(frame(mac(0), mac(0)))  # for nobody
    scene.ring(core.TX).publish()
    deadline = time.monotonic() + PATIENCE_S
    while not scene.bad.stats(core.TX).packets:
        assert time.monotonic() < deadline, "nobody looks as long as others are busy"
        scene.others_are_undisturbed()
    assert scene.bad.drops(core.TX) == {"no_port": 1}
    assert scene.bad.stats(core.TX).kicks == 0


def test_b43_a_kick_while_the_ring_is_stopped_or_disabled_is_not_missed(scene: Scene) -> None:
    ring, port = scene.ring(core.TX), scene.bad.port
    base = port.ring_stop(core.TX)
    scene.bad.pair.queue(frame(mac(1), mac(0), mark=b"stopped"))
    ring.kick(always=True)
    scene.others_are_undisturbed()
    port.ring_start(core.TX, ring.config(base=base))
    assert scene.good[0].pair.frames() == [frame(mac(1), mac(0), mark=b"stopped")]
    port.ring_enable(core.RX, False)
    scene.bad.pair.post(1)
    ring.kick(always=True)
    port.ring_enable(core.RX, True)
    scene.good[0].pair.send(frame(mac(0), mac(1)))
    assert scene.bad.pair.frames() == [frame(mac(0), mac(1))]


# ---- many at once, rings that come and go, order ----


def test_b44_everything_sent_at_once_and_then_nothing(bridge: core.Bridge, guests: MakeGuest, scene: Scene) -> None:
    a, b = guests(bridge, num=1024), guests(bridge, num=1024)
    b.pair.fill(256)
    sent = [frame(BROADCAST, mac(5), mark=i.to_bytes(2, "big")) for i in range(1024)]
    for each in sent:
        a.pair.queue(each)
    a.pair.tx.kick()
    assert b.pair.frames(1024) == sent
    assert a.pair.wait_sent()


def test_b44_a_guest_that_posts_all_at_once_does_not_keep_another_waiting(
    bridge: core.Bridge, guests: MakeGuest, scene: Scene
) -> None:
    """A burst of the one, then what the other has."""
    sink, flood, other = guests(bridge, num=1024), guests(bridge, num=8192), guests(bridge)
    sink.port.set_mac(mac(5), False)
    sink.pair.fill(256)
    bridge.stop()
    for i in range(8192):
        flood.pair.queue(frame(mac(5), mac(6), mark=i.to_bytes(2, "big")))
    other.pair.queue(frame(mac(5), mac(7)))
    for driver in flood, other:
        driver.pair.tx.kick(always=True)
    bridge.start()
    assert flood.pair.wait_sent()
    assert other.pair.wait_sent()
    got = sink.pair.frames(1024)
    assert got.index(frame(mac(5), mac(7))) <= 2 * BURST
    assert sink.drops(core.RX)["no_buffer"] + sink.waiting() == 8192 + 1 - 1024
    assert flood.drops(core.TX) == other.drops(core.TX) == {}


@each_ring
def test_b45_only_one_ring_of_a_pair_is_enabled(scene: Scene, index: int) -> None:
    scene.bad.port.ring_enable(1 - index, False)
    scene.both_ways_work(index)
    if index == core.TX:
        scene.use(core.RX)
        assert scene.bad.drops(core.RX) == {"not_ready": 1}
    else:
        scene.bad.pair.send(frame(mac(1), mac(0)))
        assert scene.bad.pair.wait_sent()
        assert scene.bad.drops(core.TX) == {"disabled": 1}
    scene.both_ways_work(index)
    scene.bad.port.ring_enable(1 - index, True)


@pytest.mark.parametrize("enabled", [[0, 1], [1, 3], [2]], ids=str)
def test_b45_some_of_the_pairs_are_enabled(
    bridge: core.Bridge, guests: MakeGuest, scene: Scene, enabled: list[int]
) -> None:
    """Frames go to these alone, and the others' transmit rings are thrown away, even while it changes all the time."""
    a = guests(bridge, pairs=4, num=64)
    a.port.set_mac(mac(5), False)
    for pair in a.pairs:
        pair.fill(256)
    for turn in range(2000):
        a.port.ring_enable(turn % 8, bool(turn // 8 % 2))
    for index in range(8):
        a.port.ring_enable(index, index // 2 in enabled)
    for i in range(8):
        scene.good[0].pair.send(frame(mac(5), mac(1), mark=bytes([i])))
    assert eventually(lambda: sum(pair.rx.pending() for pair in a.pairs) == 8)
    got = {number: [packet.frame for packet in pair.packets()] for number, pair in enumerate(a.pairs)}
    (used,) = (number for number, frames in got.items() if frames)  # by one of them, for they are of one flow
    assert used in enabled
    assert got[used] == [frame(mac(5), mac(1), mark=bytes([i])) for i in range(8)]
    for pair in a.pairs:
        pair.send(frame(mac(1), mac(5)))
        assert pair.wait_sent()
    assert scene.good[0].pair.frames(len(enabled)) == [frame(mac(1), mac(5))] * len(enabled)
    assert [a.drops(core.TX, number) for number in range(4)] == [
        {} if number in enabled else {"disabled": 1} for number in range(4)
    ]


def test_b45_rings_enabled_and_disabled_again_and_again(scene: Scene) -> None:
    for turn in range(1000):
        scene.bad.port.ring_enable(turn % 2, bool(turn & 2))
    for index in range(2):
        scene.bad.port.ring_enable(index, True)
        scene.both_ways_work(index)


def test_b46_a_guest_that_resets_in_the_middle_of_a_batch(scene: Scene) -> None:
    """After the stop, nothing of the guest is touched."""
    for turn in range(50):
        scene.bad.pair.fill()
        for i in range(scene.ring(core.TX).room):
            scene.bad.pair.queue(frame(mac(1), mac(0), mark=bytes([turn, i])))
        scene.ring(core.TX).kick(always=True)
        for i in range(8):
            scene.good[0].pair.queue(frame(mac(0), mac(1), mark=bytes([turn, i])))
        scene.good[0].pair.tx.kick()
        scene.bad.stop()
        before = scene.bad.memory.snapshot()
        assert scene.good[0].pair.wait_sent()
        assert scene.bad.memory.changes(before, []) == []
        for index in range(2):
            scene.bad.restart(index)
        scene.good[0].pair.packets()
        scene.good[0].pair.fill()
    scene.both_ways_work(core.TX)
    scene.both_ways_work(core.RX)


@pytest.mark.parametrize("features", [0, IN_ORDER], ids=["any order", "in order"])
def test_b47_chains_come_back_in_the_order_in_which_they_were_posted(
    bridge: core.Bridge, guests: MakeGuest, features: int, scene: Scene
) -> None:
    """Whatever their heads or ids, and whether their frames are delivered, dropped or nonsense."""
    a, b = guests(bridge, features=MODERN | features), guests(bridge, features=MODERN | features)
    dice = random.Random(47)
    for ring in a.pair.tx, b.pair.rx:
        dice.shuffle(ring.free)
    posted: list[int] = []
    returned: list[int] = []
    received: list[int] = []
    for turn in range(60):
        room = min(b.pair.rx.room // 2, 20)
        for _ in range(room):
            size = dice.choice([100, 700, 2048])
            addr = b.memory.take(2048)
            received.append(b.pair.rx.add([Buffer(addr, size)], writable=True))
        b.pair.rx.kick()
        for i in range(16):
            to, size = dice.choice([mac(9), BROADCAST]), dice.choice([0, 10, 64, 1000])
            layout = dice.choice([TOGETHER, Layout("two", lambda hdr: [hdr]), Layout("table", lambda hdr: [hdr], 0)])
            posted.append(a.pair.queue(frame(to, mac(5), size, mark=bytes([turn, i])), layout))
        a.pair.tx.kick()
        assert eventually(lambda: a.pair.tx.pending() == 16)
        returned += [head for head, _, _ in a.pair.tx.collect()]
        came = [head for head, _, _ in b.pair.rx.collect()]
        assert came == received[: len(came)]
        del received[: len(came)]
    assert returned == posted
    assert set(a.drops(core.TX)) == {"short", "runt"}
    assert a.state(core.TX).broken == b.state(core.RX).broken == ""
