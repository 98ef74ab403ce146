"""A guest that rewrites its rings and frames while the device reads them, from another process and at full speed.

What was checked must be what is used: whatever the rewriter does, nothing outside posted buffers changes, no other
guest notices, and no frame is delivered that the checks would not let pass.
"""

import itertools
import random
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.native import MAX_VALUES, compile_program, rewriting
from tests.rig.driver import Driver, ledger
from tests.rig.guests import MakeGuest, both_layouts, frame, mac, packed_only, split_only
from tests.rig.offloads import SENDS, data
from tests.rig.rings import AVAIL, HOLE, INDIRECT, MODERN, NEXT, USED, WRAP, WRITE, PackedRing, Ring, SplitRing
from tests.rig.scene import END, Scene, own_flags
from tests.rig.segments import TSO4, Segment
from tests.rig.waiting import PATIENCE_S, eventually, until_equal
from xdpnet import core
from xdpnet.counters import Traffic

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

NUM = 16
BAD_ADDRS = [HOLE, END - 8, 0, 2**64 - 8]
Words = dict[int, list[int]]


@pytest.fixture(scope="session")
def rewriter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program("rewriter", tmp_path_factory.mktemp("native"))


def descriptor_words(ring: Ring, at: int, addrs: list[int], flags: int, dice: random.Random) -> Words:
    """Right and wrong values for the two halves of the descriptor, or table entry, at an address."""
    tails = []
    for i in range(MAX_VALUES):
        size, kind = dice.choice([76, 512, 2048]), flags
        link, lap = dice.randrange(NUM), (AVAIL, USED)[i % 2]
        if i >= 8:  # half of them are right: what is refused at the first look races against nothing
            size = dice.choice([2048, 0, 12, 16, 64, 17])
            kind ^= dice.choice([0, NEXT, NEXT, INDIRECT, NEXT | INDIRECT, WRITE])
            link = dice.choice([0, 1, NUM - 1, NUM])
            lap = dice.choice([AVAIL, USED, AVAIL | USED, 0])
        packed = isinstance(ring, PackedRing)
        tails.append(size | (link << 32 | (kind | lap) << 48 if packed else kind << 32 | link << 48))
    return {at: addrs[:MAX_VALUES], at + 8: tails}


def hostile_words(scene: Scene, buffers: dict[int, list[int]], dice: random.Random) -> Words:
    """All of both rings, and an indirect table of each."""
    words: Words = {}
    for index in core.TX, core.RX:
        ring = scene.ring(index)
        table = scene.bad.memory.take(2048)
        buffers[index].append(table)
        addrs = [*buffers[index], *buffers[index], *BAD_ADDRS]
        for i in range(NUM):
            words |= descriptor_words(ring, ring.parts()[0][0] + 16 * i, addrs, own_flags(index), dice)
        for i in range(8):
            words |= descriptor_words(ring, table + 16 * i, addrs, own_flags(index), dice)
        if isinstance(ring, PackedRing):
            words[ring.driver] = [dice.randrange(2**32) | dice.choice([0, 1, 2, 3]) << 16 for _ in range(MAX_VALUES)]
            continue
        assert isinstance(ring, SplitRing)
        for at in range(ring.avail, ring.avail + 6 + 2 * NUM, 8):  # heads, and the event index
            words[at] = [
                sum(dice.choice([0, 1, 5, NUM - 1, NUM - 1, 2, NUM]) << 16 * i for i in range(4))
                for _ in range(MAX_VALUES)
            ]
        for at in range(ring.used, ring.used + 6 + 8 * NUM - 8, 8):  # what the device alone writes
            words[at] = [dice.randrange(2**64) for _ in range(MAX_VALUES)]
        # A device that starts anew takes the used index for its own: from there, these are not too far ahead.
        words[ring.used] = [20 << 16]
        words[ring.avail] = [dice.randrange(2) | dice.randrange(21, 37) << 16 for _ in range(MAX_VALUES)]
    return words


def enough(stats: Traffic) -> bool:
    """Both ends of a race were seen, again and again."""
    return stats.packets >= 30 and stats.breaks >= 30


@pytest.mark.parametrize("seed", range(4))
def test_b21_b22_b23_b24_b26_b27_rings_and_tables_rewritten_while_they_are_read(
    bridge: core.Bridge, guests: MakeGuest, packed: int, rewriter: Path, seed: int
) -> None:
    dice = random.Random(seed)
    scene = Scene(bridge, guests, num=NUM)
    scene.bad.port.set_mac(mac(0), check_source=True)  # no other bytes than a packet's are a frame to flood
    memory, (one, two) = scene.bad.memory, scene.good
    buffers = {index: [memory.take(2048) for _ in range(5)] for index in (core.TX, core.RX)}
    for addr in buffers[core.TX]:
        memory.write(addr, bytes(12) + frame(mac(1), mac(0), 2036))
    words = hostile_words(scene, buffers, dice)
    before = memory.snapshot()
    deadline = time.monotonic() + PATIENCE_S
    with rewriting(rewriter, memory, words) as rewriting_now:
        for turn in itertools.count():
            if turn >= 300 and all(enough(scene.bad.stats(index)) for index in range(2)):
                break
            assert time.monotonic() < deadline, "the rewriter does not get at the rings"
            for index in core.TX, core.RX:
                if scene.bad.state(index).broken:
                    scene.bad.port.ring_stop(index)
                    base = turn % NUM | (WRAP * (turn % 2) if packed else 0)
                    # One that makes no sense from the beginning is not looked at any further.
                    with rewriting_now.paused():
                        if packed:
                            scene.ring(index).reset(base)
                        scene.bad.port.ring_start(index, scene.ring(index).config(base))
            scene.ring(core.TX).kick(always=True)
            one.pair.send(frame(mac(0), mac(1), 60 + 8 * (turn % 180)))
            one.pair.send(frame(mac(2), mac(1), mark=turn.to_bytes(4, "big")))
            assert one.pair.wait_sent()
            assert two.pair.frames() == [frame(mac(2), mac(1), mark=turn.to_bytes(4, "big"))]
            two.pair.fill()
            one.pair.packets()
            one.pair.fill()
    scene.bad.stop()
    allowed = [(addr, 8) for addr in words] + [(addr, 2048) for addr in buffers[core.RX]]
    for ring in scene.bad.rings():
        allowed += [*ring.parts(), *ring.device_areas()]
    assert memory.changes(before, allowed) == []
    one.pair.packets()
    one.pair.fill()
    for index in range(2):
        scene.revives(index)


def test_b27_a_receive_buffer_that_grows_over_the_end_of_memory_once_it_was_checked(
    bridge: core.Bridge, guests: MakeGuest, packed: int, rewriter: Path
) -> None:
    """512 bytes are all that is left there: with 2048 it is refused, and with 512 it gets no more than that."""
    scene = Scene(bridge, guests, num=NUM)
    ring, one = scene.ring(core.RX), scene.good[0]
    at = HOLE - 512
    for _ in range(NUM):
        ring.raw((at, 512, WRITE))
    ring.publish()
    sizes = (512, 512, 512, 2048)  # a frame takes three that are right
    if packed:
        laps = ((3, AVAIL), (3, AVAIL), (3, AVAIL), (5, USED))
        tails = [size | i << 32 | (WRITE | lap) << 48 for size in sizes for i, lap in laps]
    else:
        tails = [size | WRITE << 32 for size in sizes]
    words = {ring.parts()[0][0] + 16 * i + 8: tails for i in range(NUM)}
    before = scene.bad.memory.snapshot()
    deadline = time.monotonic() + PATIENCE_S
    with rewriting(rewriter, scene.bad.memory, words):
        for turn in itertools.count():
            if turn >= 300 and enough(scene.bad.stats(core.RX)):
                break
            assert time.monotonic() < deadline, "the rewriter does not get at the ring"
            if scene.bad.state(core.RX).broken or not packed:
                base = scene.bad.port.ring_stop(core.RX)
                scene.bad.port.ring_start(core.RX, ring.config(base))
            if isinstance(ring, SplitRing):
                ring.memory.store16(ring.avail + 2, ring.used_idx() + NUM)
            one.pair.send_all([frame(mac(0), mac(1), 1500)] * 8)
    scene.bad.stop()
    allowed = [*ring.parts(), (at, 512), *((addr, 8) for addr in words)]
    assert scene.bad.memory.changes(before, [*allowed, *ring.device_areas()]) == []
    scene.others_are_undisturbed()
    scene.revives(core.RX)


@pytest.mark.parametrize("cut", [[], [12], [12, 9], [1] * 30, [12, 14, 3]], ids=str)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_b25_what_was_checked_is_what_is_delivered(
    bridge: core.Bridge, guests: MakeGuest, rewriter: Path, cut: list[int], indirect: bool
) -> None:
    """Source and destination flip between the guest's own and others' addresses while the frame is sent."""
    bad, one, two = (guests(bridge, num=512) for _ in range(3))
    for number, driver in enumerate([bad, one, two]):
        driver.port.set_mac(mac(number), check_source=True)
    memory, ring = bad.memory, bad.pair.tx
    packet = bytes(12) + frame(mac(1), mac(0), 100)
    at = memory.take(256)
    memory.write(at, packet)
    # Bytes 16 to 23 are the end of the destination, where these addresses differ, and the source.
    values = [
        int.from_bytes(to[4:] + source, "little")
        for to, source in itertools.product([mac(1), mac(2)], [mac(0), mac(0), mac(2), mac(9)])
    ]
    sizes = [*cut, len(packet) - sum(cut)]
    starts = list(itertools.accumulate(sizes, initial=at))
    pieces = list(zip(starts, sizes, strict=False))
    table = memory.take(16 * len(pieces))
    ring.write_table(table, [(addr, size, 0) for addr, size in pieces])
    delivered = 0
    deadline = time.monotonic() + PATIENCE_S
    with rewriting(rewriter, memory, {at + 16: values}):
        for turn in itertools.count():
            if turn >= 60 and delivered > 20 and bad.stats(core.TX).drops["spoof"] > 20:
                break
            assert time.monotonic() < deadline, "the rewriter does not get at the frame"
            for driver in one, two:
                driver.pair.fill()
            for _ in range(16):
                if indirect:
                    ring.raw((table, 16 * len(pieces), INDIRECT))
                else:
                    last = len(pieces) - 1
                    ring.raw(*((addr, size, 0 if i == last else NEXT) for i, (addr, size) in enumerate(pieces)))
            ring.kick()
            assert eventually(lambda: ring.pending() == 16)
            give_back(bad)
            for driver, address in (one, mac(1)), (two, mac(2)):
                for got in driver.pair.packets():
                    assert got.frame[:12] == address + mac(0)
                    assert got.frame[12:] == frame(mac(1), mac(0), 100)[12:]
                    delivered += 1
    stats = bad.stats(core.TX)
    assert stats.packets == turn * 16
    assert delivered + sum(stats.drops.values()) == stats.packets


def test_b25_headers_that_were_judged_are_those_that_a_frame_is_cut_by(
    bridge: core.Bridge, guests: MakeGuest, rewriter: Path
) -> None:
    """virtio_net_hdr, IP and TCP headers flip between right and wrong; every segment is one of a right frame."""
    bad, one = guests(bridge, features=MODERN | SENDS), guests(bridge, num=1024)
    bad.port.set_mac(mac(1), check_source=True)
    one.port.set_mac(mac(2), check_source=True)
    whole = Segment(payload=data(3000))
    packet = whole.header(TSO4, 1000) + whole.frame(partial=True)
    at = bad.memory.reserve(4096)
    bad.memory.write(at, packet)
    words: Words = {}
    for offset, value in (
        (2, b"\xff\xff"), (4, struct.pack("<H", 600)), (4, b"\7\0"), (6, b"\xff\xff"), (6, b"\x23"),
        (1, b"\5"), (1, b"\2"),
        (12 + 14, b"\x46"), (12 + 14, b"\x44"), (12 + 16, b"\0\0"), (12 + 16, b"\xff\xff"),
        (12 + 20, b"\x20\0"), (12 + 23, b"\x11"), (12 + 46, b"\x40"), (12 + 46, b"\xf0"),
    ):  # fmt: skip
        changed = packet[:offset] + value + packet[offset + len(value) :]
        word = offset & ~7
        right = int.from_bytes(packet[word : word + 8], "little")
        words.setdefault(at + word, [right] * 4).append(int.from_bytes(changed[word : word + 8], "little"))
    # A TCP header of 60 bytes is one, of which these are the options.
    taken = [whole, replace(whole, options=whole.payload[:40], payload=whole.payload[40:])]
    legal = {part.frame() for each in taken for size in (1000, 600) for part in each.cut(size)}
    reasons = ("l3", "l4", "csum", "gso_size", "gso_type", "gso_proto", "fragment")
    seen: set[bytes] = set()
    sent = 0
    deadline = time.monotonic() + PATIENCE_S
    with rewriting(rewriter, bad.memory, words):
        while sent < 2400 or len(seen) < 5 or not all(bad.drops(core.TX).get(reason) for reason in reasons):
            assert time.monotonic() < deadline, f"{len(seen)} kinds of segments, {bad.drops(core.TX)}"
            one.pair.fill()
            for _ in range(16):
                bad.pair.tx.raw((at, len(packet), 0))
            bad.pair.tx.kick()
            sent += 16
            assert eventually(lambda: bad.pair.tx.pending() == 16)
            give_back(bad)
            seen.update(got.frame for got in one.pair.packets())
    assert seen <= legal
    stats = bad.stats(core.TX)
    assert sum(stats.drops.values()) < stats.packets == sent
    into, out = ledger(bridge, {bad.port: 1, one.port: 1})
    assert into == out
    one.pair.fill()
    bad.pair.send(frame(mac(2), mac(1), mark=b"after"))
    assert one.pair.frames() == [frame(mac(2), mac(1), mark=b"after")]


def give_back(driver: Driver) -> None:
    """What raw() has posted: descriptors are free again, and no memory was taken for them."""
    driver.pair.tx.collect()


@pytest.mark.parametrize("late", [False, True], ids=["first lap", "later"])
def test_b21_b22_b23_descriptors_and_tables_that_are_legal_whichever_way_break_nothing(
    bridge: core.Bridge, guests: MakeGuest, packed: int, rewriter: Path, late: bool
) -> None:
    """Length and flags change together, from those of a buffer to those of a table and back, and so do the table's own.

    Who takes one from before and the other from after sees a table of no whole number of entries, or a frame of a
    length that none has.
    """
    scene = Scene(bridge, guests, num=NUM)
    memory, ring, sink = scene.bad.memory, scene.ring(core.TX), scene.good[0]
    # As a buffer it begins with a header that asks for nothing and the addresses of a frame for all.
    table = memory.reserve(64, 1 << 17)
    first, second, third = table + (1 << 17), table + (2 << 17), table + (3 << 17)
    whole = bytes(12) + frame(mac(1), mac(0), 400)
    memory.write(first, whole[:52])
    memory.write(second, whole[52:152])
    memory.write(third, whole[52:152])
    ring.write_table(table, [(first, 52, 0), (second, 60, 0), (third, 70, 0)][: 3 if packed else 2])
    contents = {40 + size: whole[12 : 52 + size] for size in (60, 80)}
    if packed:
        contents |= {40 + size + 70: whole[12 : 52 + size] + whole[52:122] for size in (60, 80)}
    tails = [(76, 0), (32, INDIRECT), (48, INDIRECT)]
    words: Words = {table + 16 + 8: [60, 80]}
    lap = USED if late else AVAIL
    for i in range(NUM):
        at = ring.parts()[0][0] + 16 * i
        memory.write(at, table.to_bytes(8, "little"))
        words[at + 8] = [size | (i << 32 | (kind | lap) << 48 if packed else kind << 32) for size, kind in tails]
    bases = itertools.cycle([0 if late else WRAP]) if packed else itertools.count(NUM * 4095 * late, NUM)
    seen: dict[int, int] = {}
    kinds = {76 - 12, *contents}
    deadline = time.monotonic() + PATIENCE_S
    with rewriting(rewriter, memory, words) as rewriting_now:
        for turn, base in enumerate(bases, start=1):
            if turn > 200 and set(seen) == kinds:
                break
            assert time.monotonic() < deadline, f"the rewriter does not get at the ring: {seen}"
            scene.bad.port.ring_stop(core.TX)
            if isinstance(ring, SplitRing):
                for i in range(NUM):
                    memory.store16(ring.avail + 4 + 2 * i, i)
                memory.store16(ring.used + 2, base)
                memory.store16(ring.avail + 2, base + NUM)
            with rewriting_now.paused():
                if packed:  # a lap that is available as a whole
                    for at in range(ring.parts()[0][0] + 8, ring.parts()[0][0] + 16 * NUM, 16):
                        memory.write(at, words[at][0].to_bytes(8, "little"))
                scene.bad.port.ring_start(core.TX, ring.config(base & 0xFFFF))
            until_equal(lambda: scene.bad.stats(core.TX).chains, NUM * turn)
            for packet in sink.pair.packets():
                size = len(packet.frame)
                seen[size] = seen.get(size, 0) + 1
                if size != 76 - 12:
                    assert packet.frame == contents[size]
            sink.pair.fill()
            for chain in sink.pair.rx.chains.values():
                sink.memory.write(chain.buffers[0].addr, bytes(256))
    assert scene.bad.state(core.TX).broken == ""
    assert scene.bad.drops(core.TX) == {}
    assert set(seen) == kinds
    assert sum(seen.values()) == (turn - 1) * NUM
    scene.good[1].drain()
    scene.revives(core.TX)


@packed_only
def test_b26_b36_used_descriptors_rewritten_all_the_time_confuse_nobody(
    bridge: core.Bridge, guests: MakeGuest, rewriter: Path
) -> None:
    """All that the device has handed back in this lap, and its event suppression."""
    scene = Scene(bridge, guests, num=256)
    ring, one = scene.ring(core.TX), scene.good[0]
    assert isinstance(ring, PackedRing)

    def send(first: int, last: int) -> None:
        for i in range(first, last):
            addr = scene.bad.memory.take(128)
            scene.bad.memory.write(addr, bytes(12) + frame(mac(1), mac(0), mark=bytes([i])))
            ring.raw((addr, 76, 0))
            ring.kick(always=True)
            assert one.pair.frames() == [frame(mac(1), mac(0), mark=bytes([i]))]
            one.pair.fill()

    send(0, 100)
    assert eventually(lambda: ring.returned() == 100)
    ring.collect()
    words = {ring.desc + 16 * i: [0, HOLE, 2**64 - 1] for i in range(100)}
    tails = [(flags << 48 | ident << 32 | 2**32 - 1) for flags in (USED, AVAIL | USED, NEXT) for ident in (0, 0xFFFF)]
    words |= {ring.desc + 16 * i + 8: tails for i in range(100)}
    words[ring.device & ~7] = [0, 2**64 - 1, 0x0002_DEAD_0002_DEAD]
    with rewriting(rewriter, scene.bad.memory, words):
        send(100, 250)
    assert eventually(lambda: ring.returned() == 250)
    assert scene.bad.state(core.TX).broken == ""
    scene.revives(core.TX)


@split_only
def test_b26_a_used_ring_rewritten_all_the_time_confuses_nobody_but_its_guest(
    bridge: core.Bridge, guests: MakeGuest, rewriter: Path
) -> None:
    scene = Scene(bridge, guests)
    ring = scene.ring(core.TX)
    assert isinstance(ring, SplitRing)
    first = -(-ring.used // 8) * 8
    words = {at: [0, 2**64 - 1, 0xDEAD_BEEF_DEAD_BEEF] for at in range(first, ring.used + 8 * ring.num, 8)}
    with rewriting(rewriter, scene.bad.memory, words):
        for i in range(200):
            addr = scene.bad.memory.take(128)
            scene.bad.memory.write(addr, bytes(12) + frame(mac(1), mac(0), mark=bytes([i])))
            ring.write_descriptor(ring.desc, i % 16, addr, 76)
            ring.put(i % 16)
            ring.kick(always=True)
            assert scene.good[0].pair.frames() == [frame(mac(1), mac(0), mark=bytes([i]))]
            scene.good[0].pair.fill()
    assert scene.bad.state(core.TX).broken == ""
    ring.put(200 % 16)
    ring.kick(always=True)
    assert eventually(lambda: ring.used_idx() == 201)
    scene.good[0].pair.packets()
    scene.good[0].pair.fill()
    scene.revives(core.TX)
