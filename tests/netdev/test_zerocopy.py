"""Guests' frames sent from where they lie, on veth pairs: the bytes, the order, memory that comes and goes.

`held` makes the far end keep every frame that it gets, so that the kernel keeps what it was lent until the test says
otherwise. After each test of a bridge its books balance.
"""

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.rig import dpdk
from tests.rig.descriptors import open_files
from tests.rig.driver import APART, CRUMBLED, LAYOUTS, TOGETHER, Driver, Layout
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.netns import Held, Veth, command, needs_root, veth
from tests.rig.rings import (
    INDIRECT,
    INDIRECT_DESC,
    MERGEABLE,
    MIB,
    MODERN,
    ONE_REGION,
    VERSION_1,
    Buffer,
    GuestMemory,
    Span,
    SplitRing,
)
from tests.rig.segments import TSO4, TSO6, Segment
from tests.rig.waiting import PATIENCE_S, eventually, once_free
from xdpnet import core
from xdpnet.counters import Traffic
from xdpnet.netdev.port import Netdev
from xdpnet.netdev.watch import Watch
from xdpnet.virtq.features import VirtioFeature, mask

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

FAR = mac(99)
LONGEST = 1518
HUGE = 2 * MIB
HUGE_SPAN = (Span(0x4000_0000, 4 * HUGE, 0x7F12_0000_0000, 0),)
SECOND_REGION = Span(0x8000_0000, 4 * MIB, 0x7F13_0000_0000, 16 * MIB)
PACKED = VERSION_1 | MERGEABLE | mask(VirtioFeature.VIRTIO_F_RING_PACKED)
LET_GO_S = 1.0  # what the core waits at most


@pytest.fixture
def pair() -> Iterator[Veth]:
    with veth(queues=2) as made:
        yield made


@pytest.fixture
def huge_pages(tmp_path: Path) -> Iterator[None]:
    """Enough of them free for a small guest; first in a test's list, for it has to outlive the guest."""
    with dpdk.huge_pages(32, tmp_path):
        yield


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=2, frames_per_queue=256, zerocopy="on", copybreak=0)


@dataclass
class Wired:
    """A netdev port of one queue on a veth pair."""

    bridge: core.Bridge
    ifname: str
    port: core.Netdev
    policy: core.ZeroCopy = "on"
    queues: int = 1
    copies_at_once: bool = False  # of veth it could be said: as a rule these tests want the harder case

    def renew(self) -> None:
        """As the daemon does when guest memory has changed."""
        self.close()
        for queue in range(self.queues):
            once_free(partial(self.open, queue))

    def close(self) -> None:
        for queue in range(self.queues):
            self.port.close_queue(queue)

    def open(self, queue: int) -> None:
        index = socket.if_nametoindex(self.ifname)
        self.port.open_queue(queue, index, LONGEST, self.policy, self.copies_at_once)

    def stale(self) -> bool:
        return self.port.is_stale(self.policy)

    @property
    def tx(self) -> Traffic:
        return self.port.queue_stats(0, core.TX)

    @property
    def sent(self) -> tuple[int, int]:
        """In place, and copied."""
        return self.tx.in_place, self.tx.packets - self.tx.in_place

    @property
    def in_flight(self) -> int:
        return self.port.xsk_stats(0).in_flight


@pytest.fixture
def port(bridge: core.Bridge, pair: Veth) -> Wired:
    return wired(bridge, pair)


def wired(bridge: core.Bridge, pair: Veth, policy: core.ZeroCopy = "on", queues: int = 1) -> Wired:
    made = Wired(bridge, pair.ifname, bridge.add_netdev(queues), policy, queues)
    made.port.set_mac(FAR, False)
    made.renew()
    return made


@pytest.fixture
def held(pair: Veth) -> Held:
    return Held(pair)


def full(mark: int, size: int = 1400) -> bytes:
    return frame(FAR, mac(1), size, mark=mark.to_bytes(4, "big"))


def lend(a: Driver, port: Wired, count: int = 10) -> None:
    """Has the guest send so many frames that stay with the kernel; the first, which passes, is behind them."""
    a.pair.send(full(0))
    assert a.pair.wait_sent()
    before = port.sent
    for i in range(count):
        a.pair.queue(full(i))
    a.pair.tx.kick()
    assert eventually(lambda: port.sent == (before[0] + count, before[1]))
    assert eventually(lambda: port.in_flight == count)


def returned(a: Driver) -> int:
    a.pair.reap()
    return len(a.pair.tx.free)


# ---- the bytes ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_frames_leave_byte_for_byte_in_place_where_they_are_in_one_piece(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, layout: Layout
) -> None:
    a = guests(bridge, features=VERSION_1 | INDIRECT_DESC)
    port.renew()
    sizes = (60, 61, 64, 1000, 1514)
    with pair.wire() as wire:
        for size in sizes:
            a.pair.send(frame(FAR, mac(1), size), layout)
            assert wire.receive() == frame(FAR, mac(1), size)
    assert a.pair.wait_sent()
    assert port.sent == ((5, 0) if layout in (TOGETHER, APART, CRUMBLED) else (0, 5))
    assert port.tx.bytes == sum(sizes)


def test_a_frame_may_lie_at_any_address(bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired) -> None:
    a = guests(bridge, features=VERSION_1)
    port.renew()
    page = a.memory.reserve(4 * 4096, 4096)
    places = [*range(page, page + 9), *range(page + 4096 - 20, page + 4096), page + 8191]
    with pair.wire() as wire:
        for i, place in enumerate(places):
            a.memory.write(place, bytes(12) + full(i))
            a.pair.tx.add([Buffer(place, 12 + 1400)], writable=False, owned=False)
            a.pair.tx.kick()
            assert wire.receive() == full(i)
            assert a.pair.wait_sent()
    assert port.sent == (len(places), 0)


def test_thousands_of_frames_leave_in_order_and_their_chains_come_back_in_order(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge, num=64)
    port.renew()
    sent = [full(i, 60 + i % 1400) for i in range(4000)]
    with pair.wire() as wire:
        for start in range(0, 4000, 250):
            batch = sent[start : start + 250]
            a.pair.send_all(batch)
            assert [wire.receive() for _ in batch] == batch
    assert port.sent == (4000, 0)
    assert port.port.xsk_stats(0).tx_invalid_descs == 0


@dataclass
class PackedTx:
    """A driver's packed transmit ring that never reuses memory."""

    driver: Driver
    num: int = 16
    next: int = 0  # free-running, in descriptors
    used: int = 0
    heads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        memory = self.driver.memory
        self.desc = memory.reserve(16 * self.num, 16)
        self.events = memory.reserve(8, 4)
        memory.write(self.desc, bytes(16 * self.num))
        memory.write(self.events, bytes(8))
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        user = memory.user
        self.config = core.RingConfig(
            self.num, 0x8000, user(self.desc), user(self.events), user(self.events + 4), self.kick, self.call
        )

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)

    def send(self, packet: bytes, cut: Sequence[int] = ()) -> None:
        """One chain, with a descriptor for each piece; its buffer id is its place."""
        memory = self.driver.memory
        sizes = [*cut, len(packet) - sum(cut)]
        at, first = 0, self.next
        entries = []
        for i, size in enumerate(sizes):
            addr = memory.take(size)
            memory.write(addr, packet[at : at + size])
            at += size
            wrap = (self.next // self.num) % 2 == 0
            flags = (0x80 if wrap else 0x8000) | (1 if i < len(sizes) - 1 else 0)
            entries.append((self.next % self.num, struct.pack("<QIHH", addr, size, first % self.num, flags)))
            self.next += 1
        for place, entry in reversed(entries):
            memory.write(self.desc + 16 * place, entry[:14])
            memory.store16(self.desc + 16 * place + 14, struct.unpack("<H", entry[14:])[0])
        self.heads.append(first)
        os.eventfd_write(self.kick, 1)

    def done(self) -> int:
        """How many chains the device has handed back, all in order."""
        n = 0
        for head in self.heads:
            place, wrap = head % self.num, (head // self.num) % 2 == 0
            flags = self.driver.memory.load16(self.desc + 16 * place + 14) & 0x8080
            if flags != (0x8080 if wrap else 0):
                break
            n += 1
        del self.heads[:n]
        return n


def test_frames_of_a_packed_ring_leave_byte_for_byte_and_in_place(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge, started=False, features=PACKED)
    ring = PackedTx(a)
    with contextlib.closing(ring), pair.wire() as wire:
        a.port.ring_start(1, ring.config)
        a.port.ring_enable(1, True)
        port.renew()
        for i in range(100):  # laps, with chains of one and of two descriptors
            ring.send(bytes(12) + full(i, 60 + 7 * i), [12] if i % 3 == 0 else [])
            assert wire.receive() == full(i, 60 + 7 * i)
            assert eventually(lambda: ring.done() == 1)
        a.port.ring_stop(1)
    assert port.sent == (100, 0)


def test_a_packed_ring_is_handed_back_only_when_the_kernel_has_sent_it(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a = guests(bridge, started=False, features=PACKED)
    ring = PackedTx(a)
    with contextlib.closing(ring):
        a.port.ring_start(1, ring.config)
        a.port.ring_enable(1, True)
        port.renew()
        ring.send(bytes(12) + full(0))
        assert eventually(lambda: ring.done() == 1)
        for i in range(7):
            ring.send(bytes(12) + full(i), [12])
        assert eventually(lambda: port.in_flight == 7)
        assert ring.done() == 0
        held.release()
        assert eventually(lambda: not ring.heads or (ring.done() >= 0 and not ring.heads))
        base = a.port.ring_stop(1)
        assert base == 15 * 0x10001 | 0x80008000


# ---- what is copied all the same ----


@pytest.mark.parametrize(("size", "in_place"), [(999, 0), (1000, 1)])
def test_frames_below_the_copybreak_are_copied(
    make_bridge: MakeBridge, guests: MakeGuest, pair: Veth, size: int, in_place: int
) -> None:
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256, zerocopy="on", copybreak=1000)
    a = guests(bridge)
    port = wired(bridge, pair)
    with pair.wire() as wire:
        a.pair.send(full(1, size))
        assert wire.receive() == full(1, size)
    assert port.sent == (in_place, 1 - in_place)


@pytest.mark.parametrize(("size", "in_place"), [(59, 0), (60, 1)])
def test_a_frame_that_needs_padding_is_copied(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, size: int, in_place: int
) -> None:
    a = guests(bridge)
    port.renew()
    with pair.wire() as wire:
        a.pair.send(full(1, size))
        assert wire.receive() == full(1, size).ljust(60, b"\0")
    assert port.sent == (in_place, 1 - in_place)


@pytest.mark.parametrize("checked", [False, True])
def test_a_guest_whose_source_address_is_checked_is_copied(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, checked: bool
) -> None:
    a = guests(bridge, started=False)
    a.port.set_mac(mac(1), checked)
    a.port.set_memory(a.memory.regions())
    a.start()
    port.renew()
    with pair.wire() as wire:
        a.pair.send(full(1))
        assert wire.receive() == full(1)
    assert port.sent == ((0, 1) if checked else (1, 0))
    # Its memory is not pinned either.
    private = 2 * 256 * core.FRAME_SIZE
    assert (port.port.xsk_stats(0).umem == private) == checked


def test_a_check_that_begins_later_ends_it_at_once(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge)
    port.renew()
    with pair.wire() as wire:
        for checked in False, True, False:
            a.port.set_mac(mac(1), checked)
            a.pair.send(full(1))
            assert wire.receive() == full(1)
    assert port.sent == (2, 1)


@pytest.mark.parametrize(
    ("huge", "another_has_an_address", "in_place"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_auto_sends_in_place_from_huge_pages_while_no_address_of_another_could_be_forged(
    huge_pages: None,
    make_bridge: MakeBridge,
    guests: MakeGuest,
    pair: Veth,
    huge: bool,
    another_has_an_address: bool,
    in_place: int,
) -> None:
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256, zerocopy="auto", copybreak=60)
    a = guests(bridge, spans=HUGE_SPAN, memfd_flags=os.MFD_HUGETLB if huge else 0)
    b = guests(bridge)
    if another_has_an_address:
        b.port.set_mac(mac(2), True)
    port = wired(bridge, pair, "auto")
    with pair.wire() as wire:
        a.pair.send(full(1))
        assert wire.receive() == full(1)
    assert port.sent == (in_place, 1 - in_place)


def test_a_netdev_that_is_off_copies_beside_one_that_is_on(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    with veth() as other:
        off = Wired(bridge, other.ifname, bridge.add_netdev(1), "off")
        off.port.set_mac(mac(98), False)
        a = guests(bridge)
        off.renew()
        assert not off.stale()
        port.renew()
        with pair.wire() as on_wire, other.wire() as off_wire:
            for to, wire in (FAR, on_wire), (mac(98), off_wire):
                a.pair.send(frame(to, mac(1), 1000))
                assert wire.receive() == frame(to, mac(1), 1000)
            a.pair.send(frame(BROADCAST, mac(1), 1000))
            assert on_wire.receive() == off_wire.receive() == frame(BROADCAST, mac(1), 1000)
        assert a.pair.wait_sent()
        assert (port.sent, off.sent) == ((2, 0), (0, 2))
        off.port.remove()


def test_a_frame_flooded_to_two_interfaces_and_a_guest_is_lent_once(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    with veth() as other:
        second = Wired(bridge, other.ifname, bridge.add_netdev(1))
        a, b = guests(bridge), guests(bridge)
        b.pair.fill()
        second.renew()
        port.renew()
        with pair.wire() as wire, other.wire() as other_wire:
            a.pair.send(frame(BROADCAST, mac(1), 1000))
            assert wire.receive() == other_wire.receive() == frame(BROADCAST, mac(1), 1000)
        assert b.pair.frames() == [frame(BROADCAST, mac(1), 1000)]
        assert a.pair.wait_sent()
        assert sorted((port.sent, second.sent)) == [(0, 1), (1, 0)]
        second.port.remove()


def test_a_frame_whose_checksum_was_made_for_a_guest_is_not_lent_behind_it(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth
) -> None:
    """Its headers, here all of it, lie in the core's own memory then."""
    b = guests(bridge)
    b.pair.fill()
    port = wired(bridge, pair)
    a = guests(bridge, features=MODERN | mask(VirtioFeature.VIRTIO_NET_F_CSUM))
    port.renew()
    whole = Segment(payload=bytes(100), to=BROADCAST)
    with pair.wire() as wire:
        a.pair.send(whole.frame(partial=True), header=whole.header())
        assert b.pair.frames() == [whole.frame()]
        assert wire.receive() == whole.frame()
    assert a.pair.wait_sent()
    assert port.sent == (0, 1)


@pytest.mark.parametrize("version", [4, 6])
def test_a_large_frame_leaves_as_copied_segments_and_plain_ones_around_it_in_place(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, version: int
) -> None:
    tso = (VirtioFeature.VIRTIO_NET_F_HOST_TSO4, VirtioFeature.VIRTIO_NET_F_HOST_TSO6)
    a = guests(bridge, features=MODERN | mask(VirtioFeature.VIRTIO_NET_F_CSUM, *tso))
    port.renew()
    whole = Segment(version=version, payload=bytes(i & 0xFF for i in range(5001)), to=FAR)
    with pair.wire() as wire:
        a.pair.queue(full(1))
        a.pair.queue(whole.frame(partial=True), header=whole.header(TSO4 if version == 4 else TSO6, 1001))
        a.pair.queue(full(2))
        a.pair.tx.kick()
        wanted = [full(1), *(part.frame() for part in whole.cut(1001)), full(2)]
        assert [wire.receive() for _ in wanted] == wanted
    assert a.pair.wait_sent()
    assert port.sent == (2, 5)
    assert port.tx.csum_computed == 5


# ---- the order, and the end of a loan ----


def test_a_chain_is_handed_back_only_when_the_kernel_has_sent_it_and_none_overtakes_it(
    bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a, b = guests(bridge), guests(bridge)
    b.port.set_mac(mac(2), False)
    b.pair.fill()
    port.renew()
    lend(a, port)
    a.pair.send(frame(mac(2), mac(1)))  # copied and delivered at once
    assert b.pair.frames() == [frame(mac(2), mac(1))]
    assert returned(a) == 256 - 11
    held.release()
    # Nothing else happens: the worker looks by itself.
    assert a.pair.wait_sent()
    assert a.pair.reap() == []


def test_a_buffer_that_is_posted_twice_comes_back_twice(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a = guests(bridge)
    port.renew()
    lend(a, port, 1)
    (chain,) = a.pair.tx.chains.values()
    for _ in range(20):
        a.pair.tx.add(chain.buffers, writable=False, owned=False)
    a.pair.tx.kick()
    assert eventually(lambda: port.in_flight == 21)
    held.release()
    assert a.pair.wait_sent()
    assert eventually(lambda: port.in_flight == 0)


@both_layouts
def test_b26_b36_descriptors_rewritten_while_the_kernel_has_their_frames_are_handed_back_as_they_were(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    """Head or buffer id, and how many descriptors a chain takes, are of when it was fetched."""
    a = guests(bridge, num=32)
    ring = a.pair.tx
    port.renew()
    a.pair.send(full(0))
    assert a.pair.wait_sent()
    heads = [a.pair.queue(full(i), APART) for i in range(10)]
    ring.kick()
    assert eventually(lambda: port.in_flight == 10)
    for i in range(1, 21):
        # To a packed ring: neither available nor used in this lap.
        a.memory.write(ring.parts()[0][0] + 16 * i, struct.pack("<QIHH", 0, 2**32 - 1, 0xFFFF, 0x8000 | INDIRECT))
    held.release()
    assert eventually(lambda: ring.pending() == 10)
    assert [(head, written) for head, written, _ in ring.collect()] == [(head, 0) for head in heads]
    assert a.state(core.TX).broken == ""
    assert port.sent == (11, 0)


def test_a_head_that_is_made_available_again_and_again_is_never_out_more_often_than_the_ring_has_entries(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a = guests(bridge, num=16)
    port.renew()
    lend(a, port, 8)
    ring = a.pair.tx
    assert isinstance(ring, SplitRing)
    head = next(iter(ring.chains))
    for _ in range(100):
        before = a.port.ring_state(1).last_avail
        for _ in range(16):
            ring.put(head)
        ring.publish()
        os.eventfd_write(ring.kick_fd, 1)
        bridge.time_advance(0)
        if a.port.ring_state(1).last_avail == before:
            break
    assert port.in_flight <= 16
    held.release()
    assert eventually(lambda: port.in_flight == 0)


def used_idx(guest: Driver) -> int:
    """Of its split transmit ring."""
    assert isinstance(guest.pair.tx, SplitRing)
    return guest.pair.tx.used_idx()


def test_a_stopped_ring_has_got_everything_back_before_the_answer(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge)
    port.renew()
    for _ in range(20):
        for i in range(100):
            a.pair.queue(full(i))
        a.pair.tx.kick()
        base = a.port.ring_stop(1)
        assert used_idx(a) == base
        a.pair.reap()
        a.port.ring_start(1, a.pair.tx.config(base=base))
        a.port.ring_enable(1, True)
        os.eventfd_write(a.pair.tx.kick_fd, 1)
        assert a.pair.wait_sent()
    assert port.sent[0] == 2000


def test_what_the_kernel_does_not_let_go_of_is_ended_by_closing_the_socket(
    bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a = guests(bridge)
    port.renew()
    lend(a, port)
    bridge.events()
    assert not port.stale()
    base = a.port.ring_stop(1)
    assert used_idx(a) == base == 11
    assert bridge.events() & core.EVENT_UMEM
    assert port.stale()
    assert not port.port.xsk_stats(0).open
    held.release()
    port.renew()
    assert not port.stale()


def test_a_guest_whose_loans_cost_the_others_a_socket_is_copied_from_then_on(
    bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a, b = guests(bridge), guests(bridge)
    port.renew()
    lend(a, port)
    before = bridge.parked_ns
    a.port.set_memory(a.memory.regions())
    assert bridge.parked_ns > before
    held.release()
    port.renew()
    in_place, copied = port.sent
    os.eventfd_write(a.pair.tx.kick_fd, 1)
    for guest in a, b:
        guest.pair.send(full(1))
        assert guest.pair.wait_sent()
    assert port.sent == (in_place + 1, copied + 1)


def test_a_loan_that_lasts_too_long_is_reported_and_a_new_socket_ends_it(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a = guests(bridge)
    port.renew()
    lend(a, port)
    bridge.events()
    bridge.time_advance(1_000_000)
    assert not port.stale()
    assert not bridge.events() & core.EVENT_UMEM
    bridge.time_advance(1)
    assert port.stale()
    assert bridge.events() & core.EVENT_UMEM
    held.release()
    port.renew()
    assert a.pair.wait_sent()


def test_an_interface_that_goes_down_keeps_no_buffer_and_sends_when_it_is_up_again(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge)
    port.renew()
    command("ip", "link", "set", pair.ifname, "down")
    a.pair.send(full(1))
    assert a.pair.wait_sent()
    a.memory.map[:] = bytes(a.memory.size)  # the guest does something else with its memory
    with pair.wire() as wire:
        command("ip", "link", "set", pair.ifname, "up")
        assert wire.receive() == full(1)
    assert port.sent == (1, 0)
    assert eventually(lambda: port.in_flight == 0)


def test_where_the_kernel_copies_at_once_nobody_waits_for_the_frame(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, held: Held
) -> None:
    a = guests(bridge)
    port.copies_at_once = True
    port.renew()
    for turn in range(3):  # the socket has 128 frames to send: the next guest would have to wait
        for i in range(40):
            a.pair.queue(full(i))
        a.pair.tx.kick()
        assert a.pair.wait_sent()
        assert port.sent == (40 * (turn + 1), 0)
        assert port.in_flight == 0
    frames = port.port.xsk_stats(0)
    assert (frames.frames_free, frames.frames_tx) == (128 - 119, 119)
    held.release()
    a.pair.send_all(full(i) for i in range(500))
    assert port.sent == (620, 0)


def test_what_a_guest_writes_after_it_has_its_buffer_back_is_not_sent(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge, num=16)
    port.copies_at_once = True
    port.renew()
    place = a.memory.reserve(2048)
    with pair.wire() as wire:
        for i in range(2000):  # one buffer, rewritten as soon as it is back
            a.memory.write(place, bytes(12) + full(i))
            a.pair.tx.add([Buffer(place, 12 + 1400)], writable=False, owned=False)
            a.pair.tx.kick()
            assert a.pair.wait_sent()
            if i % 100 == 99:
                assert [wire.receive() for _ in range(100)] == [full(mark) for mark in range(i - 99, i + 1)]
    assert port.sent == (2000, 0)


@pytest.mark.parametrize("copies_at_once", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("queues", [1, 2])
def test_several_workers_lend_to_several_or_shared_sockets(
    make_bridge: MakeBridge, guests: MakeGuest, pair: Veth, workers: int, queues: int, copies_at_once: bool
) -> None:
    bridge = make_bridge(workers=workers, netdev_queues=2, frames_per_queue=1024, zerocopy="on", copybreak=0)
    a = guests(bridge, pairs=workers)
    port = wired(bridge, pair, queues=queues)
    port.copies_at_once = copies_at_once
    port.renew()
    sent = [full(100 * number + i, 200) for number in range(workers) for i in range(100)]
    with pair.wire() as wire:
        for _ in range(5):
            for number, each in enumerate(a.pairs):
                for i in range(100):
                    each.queue(sent[100 * number + i])
            for each in a.pairs:
                each.tx.kick()
            for each in a.pairs:
                assert each.wait_sent()
            got = [wire.receive() for _ in sent]
            assert sorted(got) == sent  # type: ignore[type-var]


# ---- memory comes and goes ----


def test_a_guest_that_joins_is_copied_until_the_socket_is_renewed(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    assert not port.stale()
    bridge.events()
    a = guests(bridge)
    assert bridge.events() & core.EVENT_UMEM
    assert port.stale()
    with pair.wire() as wire:
        for expected in (0, 1), (1, 1):
            a.pair.send(full(1))
            assert wire.receive() == full(1)
            assert port.sent == expected
            port.renew()
            assert not port.stale()


def test_a_region_that_is_added_or_removed_costs_nobody_a_frame(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a, b = guests(bridge), guests(bridge)
    port.renew()
    with GuestMemory((SECOND_REGION,), prealloc=True) as more, pair.wire() as wire:
        (region,) = more.regions()
        a.port.add_region(region)
        assert port.stale()
        more.write(SECOND_REGION.guest_addr, bytes(12) + full(7))

        def send_from_region() -> None:
            a.pair.tx.add([Buffer(SECOND_REGION.guest_addr, 12 + 1400)], writable=False, owned=False)
            a.pair.tx.kick()
            assert wire.receive() == full(7)

        send_from_region()
        assert port.sent == (0, 1)
        b.pair.send(full(2))
        assert wire.receive() == full(2)
        assert port.sent == (1, 1)
        port.renew()
        send_from_region()
        assert port.sent == (2, 1)
        a.port.remove_region(region)
        assert port.stale()
        for each in a, b:
            each.pair.send(full(3))
            assert wire.receive() == full(3)
        assert port.sent == (4, 1)
        before = port.port.xsk_stats(0).umem
        port.renew()
        assert port.port.xsk_stats(0).umem < before


def test_frames_in_flight_are_back_before_their_memory_is_taken_away(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge)
    port.renew()
    for _ in range(10):
        for i in range(100):
            a.pair.queue(full(i))
        a.pair.tx.kick()
        a.port.set_memory(a.memory.regions())
        assert a.pair.wait_sent()
        port.renew()
    a.port.set_memory([])
    assert port.in_flight == 0


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_guest_leaves_with_frames_in_flight_and_the_others_go_on(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, leaver: int
) -> None:
    """Whether its window was in the middle, where it leaves a hole, or at an end."""
    there = [Driver(bridge).start() for _ in range(3)]
    port.renew()
    for i in range(100):
        there[leaver].pair.queue(full(i))
    there[leaver].pair.tx.kick()
    there.pop(leaver).close()
    assert port.stale()
    port.renew()
    with pair.wire() as wire:
        for number, each in enumerate(there):
            before = port.tx.in_place
            each.pair.send(frame(FAR, mac(1), 1000, mark=b"after" + bytes([number])))
            assert wire.receive(lambda got, n=number: got[14:20] == b"after" + bytes([n])) is not None  # type: ignore[misc]
            assert port.tx.in_place == before + 1
    newcomer = guests(bridge)
    port.renew()
    with pair.wire() as wire:
        newcomer.pair.send(full(5))
        assert wire.receive() == full(5)
    for each in there:
        each.close()
    assert port.tx.packets == port.tx.in_place


def test_a_guest_leaves_while_the_kernel_holds_its_frames(
    bridge: core.Bridge, guests: MakeGuest, port: Wired, held: Held
) -> None:
    a, b = Driver(bridge).start(), guests(bridge)
    port.renew()
    lend(a, port)
    a.close()
    assert port.stale()
    held.release()
    port.renew()
    b.pair.send(full(1))
    assert b.pair.wait_sent()


def test_memory_that_was_cut_off_is_left_out_and_the_others_are_sent_in_place(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a, b = guests(bridge), guests(bridge)
    port.renew()
    os.ftruncate(a.memory.fd, 0)
    os.eventfd_write(a.pair.tx.kick_fd, 1)
    assert eventually(lambda: a.port.ring_state(1).broken == "memory")
    port.renew()
    with pair.wire() as wire:
        b.pair.send(full(1))
        assert wire.receive() == full(1)
    assert port.sent == (1, 0)
    a.port.set_memory([])
    port.renew()
    with pair.wire() as wire:
        b.pair.send(full(2))
        assert wire.receive() == full(2)
    assert port.sent == (2, 0)


def free_huge_pages() -> int:
    return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())


@pytest.mark.parametrize("policy", ["auto", "on"])
@pytest.mark.parametrize("missing", [0, 1, 4])
def test_13_huge_pages_that_the_frontend_has_not_are_not_taken_from_the_host(
    huge_pages: None, make_bridge: MakeBridge, guests: MakeGuest, pair: Veth, policy: core.ZeroCopy, missing: int
) -> None:
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256, zerocopy=policy, copybreak=60)
    port = wired(bridge, pair, policy)
    a = guests(bridge, spans=HUGE_SPAN, memfd_flags=os.MFD_HUGETLB)
    memory = os.memfd_create("sparse", os.MFD_HUGETLB)
    try:
        os.ftruncate(memory, 4 * HUGE)
        if missing < 4:
            os.posix_fallocate(memory, missing * HUGE, (4 - missing) * HUGE)
        free = free_huge_pages()
        a.port.add_region(core.Region(1 << 40, 4 * HUGE, 1 << 40, 0, memory))
        port.renew()
        assert free_huge_pages() == free
        assert os.fstat(memory).st_blocks * 512 == (4 - missing) * HUGE
    finally:
        os.close(memory)
    with pair.wire() as wire:
        a.pair.send(full(1))
        assert wire.receive() == full(1)
    assert port.sent == (int(not missing), int(bool(missing)))


@pytest.mark.parametrize("hole", [None, 0, 4096, SECOND_REGION.size - 4096], ids=str)
def test_13_pages_that_the_frontend_has_not_are_not_made_by_the_daemon(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, hole: int | None
) -> None:
    """`on`, which takes memory of any kind, takes no page that would be charged to it."""
    a, b = guests(bridge), guests(bridge)
    with GuestMemory((SECOND_REGION,)) as more:
        size = more.size
        for start, end in [(0, size)] if hole is None else [(0, hole), (hole + 4096, size)]:
            if start < end:
                os.posix_fallocate(more.fd, start, end - start)
        have = os.fstat(more.fd).st_blocks
        assert have * 512 == size - (0 if hole is None else 4096)
        a.port.add_region(more.regions()[0])
        port.renew()
        assert os.fstat(more.fd).st_blocks == have
    with pair.wire() as wire:
        for each in a, b:
            each.pair.send(full(1))
            assert wire.receive() == full(1)
    assert port.sent == ((2, 0) if hole is None else (1, 1))


def test_whatever_came_and_went_the_books_balance(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a = guests(bridge)
    for turn in range(10):
        for i in range(50):
            a.pair.queue(full(i))
        a.pair.tx.kick()
        port.renew()
        if turn % 3 == 0:
            a.port.set_memory(a.memory.regions())
        assert a.pair.wait_sent()
    out = port.tx.packets + sum(port.tx.drops.values())
    tx = a.stats(core.TX)
    assert tx.packets == 500
    assert tx.packets + tx.copies == out + sum(tx.drops.values())


# ---- memory that is given up and taken back ----


@dataclass
class Balloon:
    """A guest with pages that it gives up, takes back and sends from."""

    driver: Driver
    page: int
    size: int = 2 * 4096

    def cycle(self) -> None:
        """The host's tables have the new pages before the daemon sees any of them."""
        self.driver.memory.give_up(self.page, self.size)
        self.driver.memory.write(self.page, bytes(self.size))

    def send(self, mark: int, offset: int = 0) -> bytes:
        at, sent = self.page + offset, full(mark)
        self.driver.memory.write(at, bytes(12) + sent)
        self.driver.pair.tx.add([Buffer(at, 12 + len(sent))], writable=False, owned=False)
        self.driver.pair.tx.kick()
        return sent


def balloon(driver: Driver, page: int = 4096) -> Balloon:
    return Balloon(driver, driver.memory.reserve(2 * page, page), 2 * page)


# In the first page, across the border with the frame's end alone in the second, and in the second.
@pytest.mark.parametrize("offset", [0, 4096 - 12 - 60, 4096 - 12 - 1399, 4096 - 12])
@pytest.mark.parametrize("given_up", [0, 1, 2], ids=["first page", "second page", "both"])
def test_a_frame_from_memory_that_was_given_up_and_taken_back_leaves_as_it_is_now(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired, offset: int, given_up: int
) -> None:
    a = balloon(guests(bridge))
    port.renew()
    with pair.wire() as wire:
        assert a.send(1, offset) == wire.receive()
        assert a.driver.pair.wait_sent()
        assert port.sent == (1, 0)
        start, size = (a.page + given_up * 4096, 4096) if given_up < 2 else (a.page, 2 * 4096)
        a.driver.memory.give_up(start, size)
        for i in range(2, 10):
            assert a.send(i, offset) == wire.receive()
            assert a.driver.pair.wait_sent()
        touched = {offset // 4096, (offset + 12 + 1399) // 4096}  # the header's too
        assert port.sent == ((1, 8) if touched & {0: {0}, 1: {1}, 2: {0, 1}}[given_up] else (9, 0))


@pytest.mark.parametrize("policy", ["auto", "on"])
def test_a_frame_from_huge_pages_that_were_given_up_and_taken_back_leaves_as_it_is_now(
    huge_pages: None, make_bridge: MakeBridge, guests: MakeGuest, pair: Veth, policy: core.ZeroCopy
) -> None:
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256, zerocopy=policy, copybreak=60)
    span = Span(0x4000_0000, 8 * HUGE, 0x7F12_0000_0000, 0)
    a = balloon(guests(bridge, spans=(span,), memfd_flags=os.MFD_HUGETLB), HUGE)
    port = wired(bridge, pair, policy)
    with pair.wire() as wire:
        for i in range(2):
            assert a.send(i) == wire.receive()
            assert a.driver.pair.wait_sent()
            assert port.sent == (1, i)
            a.cycle()


def test_a_guest_whose_memory_moved_is_copied_and_no_longer_pinned_and_the_others_go_on_in_place(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a, b = balloon(guests(bridge)), guests(bridge)
    port.renew()
    with pair.wire() as wire:

        def both(in_place: int) -> None:
            before = port.sent
            a.send(1)
            assert full(1) == wire.receive()
            b.pair.send(full(2))
            assert wire.receive() == full(2)
            assert port.sent == (before[0] + in_place, before[1] + 2 - in_place)
            assert a.driver.pair.wait_sent()

        both(in_place=2)
        assert not a.driver.port.leave_umem()
        bridge.events()
        a.cycle()
        both(in_place=1)
        assert eventually(lambda: bridge.events() & core.EVENT_UMEM)
        assert not port.stale()
        before = port.port.xsk_stats(0).umem
        assert not b.port.leave_umem()
        assert a.driver.port.leave_umem()
        assert not a.driver.port.leave_umem()
        assert port.stale()
        both(in_place=1)
        port.renew()
        assert port.port.xsk_stats(0).umem < before + a.driver.memory.size
        both(in_place=1)
        a.driver.memory.give_up(a.page, a.size)
        have = os.fstat(a.driver.memory.fd).st_blocks
        port.renew()
        assert os.fstat(a.driver.memory.fd).st_blocks == have  # its balloon stays its own
        both(in_place=1)
        a.cycle()
        # With another table, as after a reset of its driver, it begins anew.
        a.driver.port.set_memory(a.driver.memory.regions())
        port.renew()
        both(in_place=2)


def test_pages_given_up_before_they_are_pinned_again_are_not_made_anew_and_the_guest_is_copied(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    """Nobody has touched them, so nobody knows yet: it shows when sockets are opened."""
    a, b = balloon(guests(bridge)), guests(bridge)
    a.driver.memory.give_up(a.page, a.size)
    have = os.fstat(a.driver.memory.fd).st_blocks
    bridge.events()
    with pytest.raises(OSError, match="Bad address"):
        port.renew()
    assert bridge.events() & core.EVENT_UMEM
    assert a.driver.port.leave_umem()
    port.renew()
    assert os.fstat(a.driver.memory.fd).st_blocks == have
    with pair.wire() as wire:
        assert a.send(1) == wire.receive()
        assert port.sent == (0, 1)
        b.pair.send(full(2))
        assert wire.receive() == full(2)
    assert port.sent == (1, 1)


def test_memory_that_moves_all_the_time_costs_no_frame(make_bridge: MakeBridge, guests: MakeGuest, pair: Veth) -> None:
    """Several workers meet the pages that are gone, at the same time."""
    bridge = make_bridge(workers=2, netdev_queues=2, frames_per_queue=1024, zerocopy="on", copybreak=0)
    a = guests(bridge, pairs=2)
    port = wired(bridge, pair)
    pages = [a.memory.reserve(4096, 4096) for _ in range(64)]
    with pair.wire() as wire:
        for turn in range(20):
            a.port.set_memory(a.memory.regions())
            port.renew()
            for page in pages:
                a.memory.give_up(page, 4096)
            for mark, page in enumerate(pages):
                a.memory.write(page, bytes(12) + full(100 * turn + mark))
                a.pairs[mark % 2].tx.add([Buffer(page, 12 + 1400)], writable=False, owned=False)
            for each in a.pairs:
                each.tx.kick()
            for each in a.pairs:
                assert each.wait_sent()
            got = sorted(filter(None, (wire.receive() for _ in pages)))
            assert got == sorted(full(100 * turn + mark) for mark in range(64))
    assert port.tx.packets == 20 * 64


# ---- the interface's part ----


class Watched:
    """A Netdev whose watch() runs; only the loop's thread is used."""

    def __init__(self, netdev: Netdev, bridge: core.Bridge) -> None:
        self.netdev = netdev
        self.bridge = bridge

    async def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if self.bridge.events() & core.EVENT_UMEM:
                self.netdev.memory_changed()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdpnet.netdev.port.RENEW_PAUSE_S", 0.3)


def test_sockets_are_renewed_as_guests_come_and_go_and_the_link_stays(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, quickly: None
) -> None:
    netdev = Netdev(bridge, pair.ifname, zerocopy="on")
    netdev.open()

    def umem() -> int:
        return netdev.port.xsk_stats(0).umem

    async def life() -> None:
        task = asyncio.create_task(Watch(netdev, lambda _: None).run())
        watched = Watched(netdev, bridge)
        try:
            private = umem()
            a, b = Driver(bridge).start(), Driver(bridge).start()
            # A window begins in a table of pages where its file does (c/memory/staging.h).
            windows = ONE_REGION[0].offset + 2 * ONE_REGION[0].size
            await watched.until(lambda: umem() == private + windows and not netdev.port.is_stale("on"))
            a.pair.send(full(1))
            b.pair.send(full(2))
            await watched.until(lambda: netdev.port.queue_stats(0, core.TX).in_place == 2)
            a.close()
            b.close()
            await watched.until(lambda: umem() == private)
            assert netdev.alive
            assert netdev.state == "up"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    try:
        asyncio.run(life())
    finally:
        netdev.close()


def test_sockets_are_renewed_one_after_another_with_memory_that_was_registered_before(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    netdev = Netdev(bridge, pair.ifname, zerocopy="on")
    netdev.open()
    assert netdev.queues == 2
    opens = netdev.port.open_queue
    found: list[tuple[int, list[int], int, object]] = []

    def sockets() -> int:
        return sum("socket" in link for link in open_files().values())

    def watched(queue: int, *arguments: object, **options: object) -> None:
        others = [each for each in range(2) if each != queue and netdev.port.xsk_stats(each).open]
        before = sockets()
        opens(queue, *arguments, **options)  # type: ignore[arg-type]
        found.append((queue, others, sockets() - before, options["copy"]))

    async def life() -> None:
        task = asyncio.create_task(Watch(netdev, lambda _: None).run())
        try:
            guests(bridge)
            await Watched(netdev, bridge).until(lambda: len(found) == 2)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    monkeypatch.setattr(netdev.port, "open_queue", watched)
    with contextlib.closing(netdev):
        asyncio.run(life())
        # The first takes the socket that has the memory; veth has no zero copy, which is not asked again.
        assert found == [(0, [1], 0, True), (1, [0], 1, True)]


def test_memory_that_is_registered_and_gone_before_it_is_used_is_registered_anew(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: Wired
) -> None:
    a, b = Driver(bridge).start(), guests(bridge)
    for _ in range(2):  # again: what is there is enough
        port.port.prepare(LONGEST, "on")
    a.close()
    port.renew()
    assert not port.stale()
    with pair.wire() as wire:
        b.pair.send(full(1))
        assert wire.receive() == full(1)
    assert port.sent == (1, 0)
    port.port.prepare(LONGEST, "on")  # an open one has it


def test_memory_that_cannot_be_pinned_is_said_and_frames_are_copied(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = guests(bridge), guests(bridge)
    with GuestMemory((SECOND_REGION,), prealloc=True) as more:
        a.port.add_region(more.regions()[0])
        os.ftruncate(more.fd, 0)  # which nobody notices: no ring is there, nor any buffer
    with contextlib.closing(Netdev(bridge, pair.ifname, zerocopy="on")) as netdev:
        netdev.open()
        assert "with guest memory; frames are copied" in caplog.text
        netdev.port.set_mac(FAR, False)
        with pair.wire() as wire:
            b.pair.send(full(1))
            assert wire.receive(lambda got: got == full(1)) is not None
        assert netdev.port.queue_stats(0, core.TX).in_place == 0
