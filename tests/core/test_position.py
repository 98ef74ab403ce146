"""Where a ring stands is found in the ring, unless the frontend knows better: its backend may have been killed before.

A split ring has it in its used index. A packed ring has it in the flags of its descriptors, at every place of either
lap; where a chain ends that was handed back last, its id tells, or the mark that the device has left.
"""

import random
import struct
from collections.abc import Sequence

import pytest

from tests.rig.driver import Driver, Layout
from tests.rig.guests import BROADCAST, MakeGuest, both_layouts, frame, mac, packed_only, split_only
from tests.rig.rings import (
    AVAIL,
    EVENT_IDX,
    IN_ORDER,
    MODERN,
    USED,
    WRAP,
    WRITE,
    Buffer,
    PackedRing,
)
from tests.rig.waiting import until_equal
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, packed_only]

SIZES = [1, 2, 3, 5, 8, 16]
each_order = pytest.mark.parametrize("order", [0, IN_ORDER], ids=["any order", "in order"])


def drawn(dice: random.Random, most: int) -> Layout:
    """A chain of so many descriptors at most."""
    pieces = dice.randint(1, most)
    return Layout("drawn", lambda _: [1] * (pieces - 1))


def stale(dice: random.Random, num: int, packed: int) -> int:
    """What a frontend may say that has not asked: the beginning, nothing, a place that was right once."""
    if not packed:
        return dice.choice([0, dice.randrange(65536)])
    return dice.choice([WRAP * 0x10001, 0, (dice.randrange(num) | dice.choice([0, WRAP])) * 0x10001])


# ---- what a frontend says ----


def waits_in(driver: Driver, n: int) -> list[bytes]:
    """So many frames in the transmit ring, which does not run."""
    frames = [frame(BROADCAST, mac(1), mark=bytes([i])) for i in range(n)]
    for each in frames:
        driver.pair.queue(each)
    driver.pair.tx.publish()
    return frames


@split_only
@pytest.mark.parametrize("start", [0, 65530], ids=["first lap", "indices that wrap"])
@pytest.mark.parametrize("told", range(1, 8))
def test_a_ring_goes_on_where_its_frontend_says(bridge: core.Bridge, guests: MakeGuest, start: int, told: int) -> None:
    """Between what was handed back and what is available: those before are for somebody else to hand back."""
    a, b = guests(bridge, started=False, base=start), guests(bridge)
    b.pair.fill()
    frames = waits_in(a, 8)
    a.port.ring_enable(core.TX, True)
    a.port.ring_start(core.TX, a.pair.tx.config((start + told) & 0xFFFF))
    heads = list(a.pair.tx.chains)
    if (start + told) & 0xFFFF == 0:
        told = 0  # that is said by who does not know
    assert b.pair.frames(8 - told) == frames[told:]
    until_equal(lambda: a.state(core.TX).used_idx, (start + 8 - told) & 0xFFFF)
    assert [head for head, _, _ in a.pair.tx.collect()] == heads[told:]
    # There we have stopped ourselves: it is right whatever it looks like.
    base = a.port.ring_stop(core.TX)
    assert base == (start + 8) & 0xFFFF
    a.port.ring_start(core.TX, a.pair.tx.config(base))
    a.pair.send(more := frame(BROADCAST, mac(1), mark=b"more"))
    assert b.pair.frames() == [more]


@split_only
@pytest.mark.parametrize("told", [0, 8, 9, 1000, 65535], ids=["nothing", "all", "beyond", "far beyond", "before"])
@pytest.mark.parametrize("order", [0, IN_ORDER], ids=["any order", "in order"])
def test_a_frontend_that_does_not_know_is_not_believed(
    bridge: core.Bridge, guests: MakeGuest, told: int, order: int
) -> None:
    a, b = guests(bridge, started=False, features=MODERN | order), guests(bridge)
    b.pair.fill()
    frames = waits_in(a, 8)
    a.port.ring_enable(core.TX, True)
    a.port.ring_start(core.TX, a.pair.tx.config(told))
    assert b.pair.frames(8) == frames
    assert a.pair.wait_sent()
    assert a.state(core.TX).broken == ""


@split_only
def test_receive_buffers_that_another_backend_has_are_left_to_it(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge), guests(bridge, started=False)
    b.pair.post(8)
    heads = list(b.pair.rx.chains)
    b.port.ring_enable(core.RX, True)
    b.port.ring_start(core.RX, b.pair.rx.config(5))
    a.pair.send_all(frames := [frame(BROADCAST, mac(1), mark=bytes([i])) for i in range(3)])
    until_equal(lambda: b.state(core.RX).used_idx, 3)
    assert [head for head, _, _ in b.pair.rx.collect()] == heads[5:]
    assert b.port.ring_stop(core.RX) == 8
    assert len(frames) == 3


# ---- wherever a device has stopped ----


@both_layouts
@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize("most", [1, 3], ids=["single", "chains"])
@pytest.mark.parametrize("event", [0, EVENT_IDX], ids=["flags", "event index"])
@each_order
def test_a_transmit_ring_goes_on_where_it_was_left(
    bridge: core.Bridge, guests: MakeGuest, packed: int, num: int, most: int, event: int, order: int
) -> None:
    if not packed:
        num = 1 << (num - 1).bit_length()
    dice = random.Random(num * most)
    a, b = guests(bridge, features=MODERN & ~EVENT_IDX | event | order, num=num), guests(bridge)
    b.pair.fill()
    for turn in range(6 * num):
        before = [frame(BROADCAST, mac(1), mark=bytes([turn, i])) for i in range(dice.randint(0, 2))]
        for each in before:
            a.pair.send_all([each], drawn(dice, min(most, num)))
        a.port.ring_stop(core.TX)
        waiting: list[bytes] = []
        while (room := min(a.pair.tx.room, most)) and dice.random() < 0.7:
            waiting.append(frame(BROADCAST, mac(1), mark=bytes([turn, 9, len(waiting)])))
            a.pair.queue(waiting[-1], drawn(dice, room))
        a.pair.tx.publish()
        a.port.ring_start(core.TX, a.pair.tx.config(stale(dice, num, packed)))
        assert a.state(core.TX).broken == ""
        assert a.pair.wait_sent()
        assert b.pair.frames(len(before) + len(waiting)) == before + waiting
        b.pair.fill()


@both_layouts
@pytest.mark.parametrize("num", SIZES)
@pytest.mark.parametrize("most", [1, 3], ids=["single", "chains"])
@each_order
def test_a_receive_ring_goes_on_where_it_was_left(
    bridge: core.Bridge, guests: MakeGuest, packed: int, num: int, most: int, order: int
) -> None:
    if not packed:
        num = 1 << (num - 1).bit_length()
    dice = random.Random(num * most)
    a, b = guests(bridge), guests(bridge, features=MODERN | order, num=num)

    def post(chance: float) -> int:
        posted = 0
        while (room := min(b.pair.rx.room, most)) and dice.random() < chance:
            b.pair.post(1, 256, [1] * (dice.randint(1, room) - 1))
            posted += 1
        return posted

    buffers = 0
    for turn in range(6 * num):
        buffers += post(0.7)
        sent = [frame(BROADCAST, mac(1), mark=bytes([turn, i])) for i in range(min(buffers, dice.randint(0, 3)))]
        a.pair.send_all(sent)
        assert b.pair.frames(len(sent)) == sent
        buffers -= len(sent)
        b.port.ring_stop(core.RX)
        buffers += post(dice.choice([0.7, 1]))  # at times the ring is full
        b.port.ring_start(core.RX, b.pair.rx.config(stale(dice, num, packed)))
        assert b.state(core.RX).broken == ""
    buffers += post(1)
    a.pair.send_all(sent := [frame(BROADCAST, mac(1), mark=bytes([255, i])) for i in range(buffers)])
    assert b.pair.frames(buffers) == sent


@both_layouts
@pytest.mark.parametrize("index", [core.RX, core.TX], ids=["rx", "tx"])
def test_a_guest_is_woken_for_what_was_handed_back_before(bridge: core.Bridge, guests: MakeGuest, index: int) -> None:
    """Its daemon may have been killed before it told of it; one that has only been asked where it stands has told."""
    a, b = guests(bridge), guests(bridge)
    b.pair.fill()
    driver = (b, a)[index]
    a.pair.send(frame(BROADCAST, mac(1)))
    assert a.pair.wait_sent()
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]
    ring = driver.pair.tx if index else driver.pair.rx
    for told, calls in (ring.base(), 0), (0, 1):
        driver.port.ring_stop(index)
        ring.want_no_call()
        ring.calls()
        driver.port.ring_start(index, ring.config(told))
        assert ring.calls() == calls


@pytest.mark.parametrize("num", [1, 7, 256])
@pytest.mark.parametrize("posted", [0, 1, 6, 7, 256])
def test_a_ring_that_nobody_has_used_yet_is_at_its_beginning(
    bridge: core.Bridge, guests: MakeGuest, num: int, posted: int
) -> None:
    """Its first lap has the wrap counter 1; user-mode Linux says 0."""
    a, b = guests(bridge), guests(bridge, started=False, num=num)
    b.pair.post(min(posted, num))
    b.port.ring_start(core.RX, b.pair.rx.config(base=0))
    assert b.port.ring_stop(core.RX) == WRAP * 0x10001
    b.port.ring_start(core.RX, b.pair.rx.config(base=0))
    b.port.ring_enable(core.RX, True)
    b.pair.fill()
    a.pair.send(frame(BROADCAST, mac(1)))
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]


# ---- killed in the middle of a burst, or behind another device: what such a one leaves, written by hand ----


class Left:
    """A receive ring that is not started, and what a device has written there."""

    def __init__(self, bridge: core.Bridge, guests: MakeGuest, num: int, base: int, order: int = 0) -> None:
        self.bridge = bridge
        self.driver: Driver = guests(bridge, started=False, features=MODERN | order, num=num, base=base)
        ring = self.driver.pair.rx
        assert isinstance(ring, PackedRing)
        self.ring = ring
        self.at = ring.next_avail  # the device's place

    def post(self, *sizes: int, ident: int | None = None) -> None:
        """Chains of so many descriptors."""
        for size in sizes:
            if ident is not None:
                self.ring.free.remove(ident)
                self.ring.free.appendleft(ident)
            self.ring.add([Buffer(self.driver.memory.take(256), 256) for _ in range(size)], writable=True)
        self.ring.publish()

    def use(self, chains: Sequence[int], shown: Sequence[bool]) -> None:
        """Hands back the next chains, of so many descriptors; a first one that is not shown has all but its flags."""
        memory = self.driver.memory
        idents = list(self.ring.chains)
        for size, show, ident in zip(chains, shown, idents, strict=False):
            pos, wrap = self.ring.place(self.at)
            at = self.ring.desc + 16 * pos
            memory.write(at + 8, struct.pack("<IH", 76, ident))
            if show:
                memory.store16(at + 14, (AVAIL | USED) * wrap | WRITE)
            self.at += size

    def mark(self, place: int) -> None:
        self.driver.memory.store16(self.ring.device, self.ring.off_wrap(place))

    def start(self, base: int) -> int | None:
        """Where the device has found it, on the driver's line; None: it broke."""
        port = self.driver.port
        port.ring_start(core.RX, self.ring.config(base))
        broken = self.driver.state(core.RX).broken
        found = port.ring_stop(core.RX)
        if broken:
            assert broken == "position"
            assert self.ring.is_in_error()
            return None
        assert found % 0x10001 == 0
        places = range(self.ring.next_avail - self.ring.num, self.ring.next_avail + 1)
        return next(place for place in places if self.ring.off_wrap(place) == found // 0x10001)


BASES = [WRAP, 0, 5 | WRAP, 5, 7 | WRAP, 7]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("chains", [[1, 1], [1, 1, 1, 1], [2, 1, 1], [1, 2], [3, 3], [1, 3, 2]], ids=str)
def test_a_burst_that_was_not_yet_shown_is_shown(
    bridge: core.Bridge, guests: MakeGuest, base: int, chains: list[int]
) -> None:
    """The first of a burst shows all others: if that never happens, the driver sees none, ever."""
    for shown in range(2, len(chains) + 1):
        left = Left(bridge, guests, 8, base)
        left.post(*chains)
        left.post(*[1] * left.ring.room)
        left.mark(left.at)
        left.use(chains[:shown], [i > 0 for i in range(shown)])
        assert left.ring.returned() == 0
        assert left.start(0) == left.at
        assert left.ring.returned() == shown
        assert [(written, len(chain.descriptors)) for _, written, chain in left.ring.collect()] == [
            (76, size) for size in chains[:shown]
        ]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("old", [0, 1, 5], ids=["fresh mark", "old mark", "older mark"])
def test_the_mark_is_where_single_descriptors_begin(
    bridge: core.Bridge, guests: MakeGuest, base: int, old: int
) -> None:
    """Of these each shows by itself."""
    left = Left(bridge, guests, 8, base)
    left.post(*[1] * 5)
    left.use([1] * 5, [True] * 5)
    left.mark(left.at - old)
    left.ring.collect()
    left.post(*[1] * 8)
    assert left.start(0) == left.at


@pytest.mark.parametrize("base", BASES)
def test_a_descriptor_behind_a_chain_that_has_its_id_is_told_by_the_mark_or_the_frontend_or_not_at_all(
    bridge: core.Bridge, guests: MakeGuest, base: int
) -> None:
    """Of a chain of two whose first has become an element, the second looks like one that was made available since."""
    for several in False, True:

        def left_by(mark: int, several: bool = several) -> Left:
            left = Left(bridge, guests, 8, base)
            left.post(*([2] if several else [1]), ident=3)
            left.use([2] if several else [1], [True])
            if not several:
                left.ring.collect()
                left.post(1, ident=3)
            left.post(1, 1)
            left.mark(left.at + mark)
            return left

        left = left_by(0)
        elsewhere = left.ring.off_wrap(left.at - 4)
        assert left.start(elsewhere) == left.at
        told = left_by(2)
        assert told.start(told.ring.off_wrap(told.at)) == told.at
        assert left_by(2).start(elsewhere) is None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("batch", [[1, 1], [1, 1, 1], [2, 1], [1, 2], [2, 2, 1]], ids=str)
def test_in_order_the_id_of_an_element_is_that_of_the_last_chain_that_it_is_about(
    bridge: core.Bridge, guests: MakeGuest, base: int, batch: list[int]
) -> None:
    """Another device than ours has left it so, without a mark."""
    left = Left(bridge, guests, 8, base, IN_ORDER)
    left.post(*batch)
    pos, wrap = left.ring.place(left.at)
    at = left.ring.desc + 16 * pos
    left.driver.memory.write(at + 8, struct.pack("<IH", 0, list(left.ring.chains)[-1]))
    left.driver.memory.store16(at + 14, (AVAIL | USED) * wrap)
    left.at += sum(batch)
    left.post(*[1] * left.ring.room)
    left.mark(left.at + 9)
    assert left.start(left.ring.off_wrap(left.at)) == left.at
    left.mark(left.at)
    assert left.start(0) == left.at


def test_a_ring_without_any_sense_is_broken_until_its_driver_has_reset_it(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    """A chain that the driver is just writing looks so, too: its first descriptor's flags come last."""
    a, left = guests(bridge), Left(bridge, guests, 8, 3 | WRAP)
    left.ring.add([Buffer(left.driver.memory.take(256), 128) for _ in range(3)], writable=True)
    assert left.start(3 | WRAP) is None
    left.ring.publish()
    assert left.start(0) == left.at
    left.driver.start()
    a.pair.send(frame(BROADCAST, mac(1)))
    assert left.driver.pair.frames() == [frame(BROADCAST, mac(1))]


@pytest.mark.parametrize("seed", range(20))
def test_no_content_of_a_ring_makes_its_start_more_than_broken(
    bridge: core.Bridge, guests: MakeGuest, seed: int
) -> None:
    dice = random.Random(seed)
    a, b = guests(bridge), guests(bridge, started=False, num=dice.choice([1, 2, 7, 64]))
    ring = b.pair.rx
    assert isinstance(ring, PackedRing)
    kinds = dice.sample([0, AVAIL, USED, AVAIL | USED], dice.randint(1, 4))
    for i in range(ring.num):
        tail = struct.pack("<IHH", 2048, dice.choice([i, 0, 0xFFFF]), dice.choice(kinds) | dice.choice([0, WRITE, 1]))
        b.memory.write(ring.desc + 16 * i + 8, tail)
    b.memory.store16(ring.device, dice.randrange(65536))
    before = b.memory.snapshot()
    for index, each in enumerate(b.rings()):
        base = dice.randrange(ring.num) | dice.choice([0, WRAP])
        b.port.ring_start(index, each.config(base))
        b.port.ring_enable(index, True)
    for _ in range(3):
        a.pair.send(frame(BROADCAST, mac(1)))
        assert a.pair.wait_sent()
    assert b.memory.changes(before, [area for each in b.rings() for area in each.device_areas()]) == []
    for index in range(2):
        b.restart(index)
        assert b.state(index).broken == ""
