"""Frames longer than one AF_XDP buffer, on veth pairs: in several descriptors, both ways, at all their borders."""

import asyncio
import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.netdev.test_csum import PARTIAL, RIGHT, TCP, UDP, over
from tests.netdev.test_port import Watched
from tests.rig.driver import CRUMBLED, LAYOUTS, STRADDLING, TOGETHER, Driver, Layout
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, frame, mac
from tests.rig.netns import Veth, command, needs_root, veth
from tests.rig.rings import MODERN
from tests.rig.waiting import PATIENCE_S, eventually
from xdpnet import core
from xdpnet.errors import SetupError
from xdpnet.netdev.fitness import ETH_OVERHEAD, MAX_MTU, PLAIN_MTU
from xdpnet.netdev.link import require_link
from xdpnet.netdev.port import Mode, Netdev
from xdpnet.virtq.features import VirtioFeature, mask

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

GUEST, PEER = mac(1), mac(50)
TAG = 7
# From the wire a buffer takes 3840 bytes, to the wire 4064.
RX_BORDERS = (3839, 3840, 3841, 7679, 7680, 7681)
TX_BORDERS = (4063, 4064, 4065, 8127, 8128, 8129)
SIZES = (60, 1514, *RX_BORDERS, *TX_BORDERS, 9013, 9014)
CSUM = mask(VirtioFeature.VIRTIO_NET_F_CSUM)
TSO = mask(
    VirtioFeature.VIRTIO_NET_F_GUEST_CSUM, VirtioFeature.VIRTIO_NET_F_GUEST_TSO4, VirtioFeature.VIRTIO_NET_F_GUEST_TSO6
)


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=4, frames_per_queue=256)


@contextlib.contextmanager
def jumbo(
    bridge: core.Bridge, mtu: int = 9000, mode: Mode = "native", makes_csum: bool = True
) -> Iterator[tuple[Veth, Netdev]]:
    with veth(mtu=mtu) as pair, contextlib.closing(Netdev(bridge, pair.ifname, mode=mode)) as port:
        pair.namespace.run("ethtool", "-K", pair.peer, "txvlan", "off")
        command("ethtool", "-K", pair.ifname, "txvlan", "off", "tx", "on" if makes_csum else "off")
        port.open()
        port.sync_macs([GUEST])
        yield pair, port


def guest_on(bridge: core.Bridge, guests: MakeGuest, features: int = MODERN) -> Driver:
    made = guests(bridge, features=features)
    made.port.set_mac(GUEST, False)
    made.pair.fill()
    return made


def books(bridge: core.Bridge, guest: Driver, port: Netdev) -> tuple[int, int]:
    """Frames in with the copies made of them, and frames out with all drops."""
    sources = guest.stats(core.TX), port.port.queue_stats(0, core.RX)
    sinks = guest.stats(core.RX), port.port.queue_stats(0, core.TX)
    into = sum(each.packets + each.copies + each.segments - each.joined for each in sources)
    return into, sum(each.packets for each in sinks) + sum(sum(each.drops.values()) for each in (*sources, *sinks))


def all_is_well(bridge: core.Bridge, guest: Driver, port: Netdev) -> None:
    """Nothing was dropped by anybody, and every frame of the arena is where it was."""
    into, out = books(bridge, guest, port)
    assert into == out
    stats = port.port.xsk_stats(0)
    assert (stats.rx_dropped, stats.rx_invalid_descs, stats.tx_invalid_descs, stats.rx_ring_full) == (0, 0, 0, 0)
    assert stats.frames_free + stats.frames_tx == 128


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_frames_pass_both_ways_at_every_border_of_descriptors(
    bridge: core.Bridge, guests: MakeGuest, mode: Mode
) -> None:
    with jumbo(bridge, mode=mode) as (pair, port), pair.wire() as wire:
        assert port.mode == mode
        guest = guest_on(bridge, guests)
        for size in SIZES:
            sent = frame(PEER, GUEST, size)
            guest.pair.send(sent)
            assert wire.receive() == sent
            sent = frame(GUEST, PEER, size)
            wire.send(sent)
            assert guest.pair.frames() == [sent]
            guest.pair.fill()
        assert guest.pair.wait_sent()
        for direction in core.RX, core.TX:
            stats = port.port.queue_stats(0, direction)
            assert (stats.packets, stats.bytes) == (len(SIZES), sum(SIZES))
            assert sum(stats.drops.values()) == 0
        all_is_well(bridge, guest, port)


@pytest.mark.parametrize("mtu", [PLAIN_MTU, PLAIN_MTU + 1, 9000, MAX_MTU])
def test_the_longest_frame_of_an_mtu_passes_with_a_tag_and_one_byte_more_does_not(
    bridge: core.Bridge, guests: MakeGuest, mtu: int
) -> None:
    longest = mtu + ETH_OVERHEAD
    with jumbo(bridge, mtu) as (pair, port), pair.wire() as wire:
        guest = guest_on(bridge, guests)
        sent = frame(PEER, GUEST, longest, vlan=TAG)
        guest.pair.send(sent)
        # AF_PACKET takes the tag out at the far end.
        assert wire.receive() == sent[:12] + sent[16:]
        guest.pair.send(frame(PEER, GUEST, longest + 1, vlan=TAG))
        assert guest.pair.wait_sent()
        assert port.port.queue_stats(0, core.TX).drops["oversize"] == 1
        for destination in GUEST, BROADCAST:
            sent = frame(destination, PEER, longest, vlan=TAG)
            wire.send(sent)
            assert guest.pair.frames() == [sent]
            guest.pair.fill()
        all_is_well(bridge, guest, port)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_frames_of_any_chain_leave_byte_for_byte(bridge: core.Bridge, guests: MakeGuest, layout: Layout) -> None:
    with jumbo(bridge) as (pair, port), pair.wire() as wire:
        guest = guest_on(bridge, guests)
        for size in TX_BORDERS:
            guest.pair.send(frame(PEER, GUEST, size), layout)
            assert wire.receive() == frame(PEER, GUEST, size)
        all_is_well(bridge, guest, port)


CUT_ODDLY = Layout("borders at odd offsets", lambda hdr: [hdr, 4001, 97, 4001])
CUT_AT_FRAMES = Layout("borders at those of frames", lambda hdr: [hdr + 4064, 1, 4063])


@pytest.mark.parametrize("layout", [TOGETHER, STRADDLING, CRUMBLED, CUT_ODDLY, CUT_AT_FRAMES], ids=str)
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("by", ["core", "interface"])
def test_a_checksum_is_made_over_all_descriptors(
    bridge: core.Bridge, guests: MakeGuest, layout: Layout, protocol: int, by: str
) -> None:
    with jumbo(bridge, makes_csum=by == "interface") as (pair, port), pair.wire() as wire:
        # What is left to it the interface leaves to a peer on the same host, unless it is told otherwise.
        command("ethtool", "-K", pair.ifname, "tx", "off")
        guest = guest_on(bridge, guests, MODERN | CSUM)
        header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16 if protocol == TCP else 6, 0)
        for size in (8300, 8301, 8946):
            payload = os.urandom(size)
            guest.pair.send(over(4, protocol, payload, PARTIAL, to=mac(60)), layout, header)
            assert wire.receive() == over(4, protocol, payload, RIGHT, to=mac(60))
        stats = port.port.queue_stats(0, core.TX)
        assert (stats.csum_computed, stats.csum_partial) == ((3, 0) if by == "core" else (0, 3))
        all_is_well(bridge, guest, port)


def test_a_partial_checksum_of_a_large_frame_is_completed_for_a_guest(bridge: core.Bridge, guests: MakeGuest) -> None:
    with jumbo(bridge) as (pair, port), pair.wire() as wire:
        guest = guest_on(bridge, guests)
        for size in (3800, 8001, 8946):
            payload = os.urandom(size)
            wire.send(over(4, TCP, payload, PARTIAL, to=GUEST))
            assert guest.pair.frames() == [over(4, TCP, payload, RIGHT, to=GUEST)]
            guest.pair.fill()
        all_is_well(bridge, guest, port)


def test_the_guest_waits_for_room_and_loses_nothing(bridge: core.Bridge, guests: MakeGuest) -> None:
    """Each turn has more descriptors to send than the socket has frames."""
    with jumbo(bridge) as (pair, port), pair.wire() as wire:
        guest = guest_on(bridge, guests)
        sent = [frame(PEER, GUEST, 9000 if i % 3 else 60, mark=i.to_bytes(4, "big")) for i in range(200)]
        wire.send(frame(GUEST, PEER))  # tells where it is: what is flooded does not wait
        assert guest.pair.frames() == [frame(GUEST, PEER)]
        for each in sent:
            guest.pair.queue(each)
        guest.pair.tx.kick()
        assert guest.pair.wait_sent()
        got = wire.receive_all()
        assert got
        assert port.port.queue_stats(0, core.TX).packets == len(sent)
        assert set(got) <= set(sent)  # not all: the far end's socket buffer is small
        all_is_well(bridge, guest, port)
        assert eventually(lambda: port.port.xsk_stats(0).tx_invalid_descs == 0)


def test_bursts_from_the_wire_keep_their_order(bridge: core.Bridge, guests: MakeGuest) -> None:
    with jumbo(bridge) as (pair, port), pair.wire() as wire:
        guest = guest_on(bridge, guests)
        for round_ in range(20):
            sent = [frame(GUEST, PEER, size, mark=bytes([round_, i])) for i, size in enumerate([9014, 60, 4000] * 6)]
            for each in sent:
                wire.send(each)
            assert guest.pair.frames(len(sent)) == sent
            guest.pair.fill()
        all_is_well(bridge, guest, port)


def test_interfaces_with_and_without_large_frames_serve_one_guest(bridge: core.Bridge, guests: MakeGuest) -> None:
    """Each kind of sockets has a UMEM of its own, whichever is opened first, closed and opened again."""
    with (
        jumbo(bridge, 1500) as (small, _),
        jumbo(bridge, 9000) as (large, _),
        small.wire() as one,
        large.wire() as two,
    ):
        guest = guest_on(bridge, guests)
        guest.pair.send(frame(BROADCAST, GUEST, 1514))
        for wire, peer, size in (one, mac(51), 1514), (two, mac(52), 9014):
            assert wire.receive() == frame(BROADCAST, GUEST, 1514)
            wire.send(frame(GUEST, peer, size))
            assert guest.pair.frames() == [frame(GUEST, peer, size)]
            guest.pair.fill()
            guest.pair.send(frame(peer, GUEST, size))
            assert wire.receive() == frame(peer, GUEST, size)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_the_mtu_is_changed_at_run_time(
    bridge: core.Bridge, guests: MakeGuest, caplog: pytest.LogCaptureFixture, mode: Mode
) -> None:
    with jumbo(bridge, 1500, mode) as (pair, port):
        guest = guest_on(bridge, guests)

        async def set_mtu(mtu: int) -> None:
            command("ip", "link", "set", pair.ifname, "mtu", str(mtu))
            while port._mtu != mtu or not port.alive:
                await asyncio.sleep(0.02)
            # In native mode the kernel takes no more of the peer than the program is for.
            command("ip", "-n", pair.namespace.name, "link", "set", pair.peer, "mtu", str(mtu))

        async def story() -> None:
            with pair.wire() as wire:
                async with Watched(port) as watch:
                    for mtu in (9000, MAX_MTU, 1500, 3500, PLAIN_MTU + 1):
                        async with asyncio.timeout(PATIENCE_S):
                            await set_mtu(mtu)
                        for size in (60, mtu + 14):
                            wire.send(frame(GUEST, PEER, size))
                            assert guest.pair.frames() == [frame(GUEST, PEER, size)]
                            guest.pair.fill()
                            guest.pair.send(frame(PEER, GUEST, size))
                            assert wire.receive() == frame(PEER, GUEST, size)
                    watch.states.clear()
                    command("ip", "link", "set", pair.ifname, "mtu", str(MAX_MTU + 1))
                    await watch.reach("down")

        asyncio.run(story())
        assert f"MTU {MAX_MTU + 1} is above {MAX_MTU}" in caplog.text


def test_a_kernel_without_programs_for_large_frames_names_the_remedy(bridge: core.Bridge) -> None:
    with jumbo(bridge, 1500) as (pair, port):
        program = port._program
        assert program is not None
        os.close(program.frags_fd)
        program.frags_fd = -1
        port.detach()
        command("ip", "link", "set", pair.ifname, "mtu", str(PLAIN_MTU + 1))
        with pytest.raises(SetupError, match=f"MTU {PLAIN_MTU + 1}") as failure:
            port.attach(require_link(pair.ifname))
        assert f"mtu {PLAIN_MTU}" in failure.value.remedy
        assert "6.6" in failure.value.remedy


@pytest.mark.parametrize(("size", "in_place"), [(4064, 1), (4065, 0), (9000, 0)])
def test_frames_are_sent_from_where_they_lie_as_long_as_one_descriptor_holds_them(
    make_bridge: MakeBridge, guests: MakeGuest, size: int, in_place: int
) -> None:
    bridge = make_bridge(netdev_queues=2, frames_per_queue=256, zerocopy="on")
    guest = guests(bridge)
    guest.pair.fill()
    with veth(mtu=9000) as pair, contextlib.closing(Netdev(bridge, pair.ifname, zerocopy="on")) as port:
        port.open()
        port.sync_macs([GUEST])
        with pair.wire() as wire:
            guest.pair.send(frame(PEER, GUEST, size))
            assert wire.receive() == frame(PEER, GUEST, size)
            assert guest.pair.wait_sent()
            assert port.port.queue_stats(0, core.TX).in_place == in_place
            wire.send(frame(GUEST, PEER, 9014))
            assert guest.pair.frames() == [frame(GUEST, PEER, 9014)]
            all_is_well(bridge, guest, port)


# ---- what the kernel has joined ----


def send_joined(pair: Veth, whole: bytes, kind: int, size: int) -> None:
    """As TCP or UDP does that has the interface cut: one frame that stands for many."""

    def inside() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.setsockopt(263, 15, 1)  # PACKET_VNET_HDR
            raw.bind((pair.peer, 3))
            offset = 16 if kind == 1 else 6
            raw.send(struct.pack("=BBHHHH", 1, kind, 34 + (20 if kind == 1 else 8), size, 34, offset) + whole)

    pair.namespace.call(inside)


@pytest.fixture(params=["told", "untold"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel lets the program see what is several frames in one."""
    if request.param == "untold":
        monkeypatch.setattr(Netdev, "_tells", lambda _: False)
    return bool(request.param == "told")


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("takes", [0, TSO], ids=["cut", "whole"])
def test_c30_tcp_that_the_kernel_has_joined_reaches_the_guest(
    bridge: core.Bridge, guests: MakeGuest, told: bool, takes: int, mtu: int
) -> None:
    payload, size = os.urandom(30000), 1400 if told else mtu - 40
    with jumbo(bridge, mtu, mode="generic") as (pair, port):
        guest = guest_on(bridge, guests, MODERN | takes)
        send_joined(pair, over(4, TCP, payload, PARTIAL, to=GUEST), 1, 1400)
        got = guest.pair.receive(1 if takes else -(-len(payload) // size))
        assert b"".join(packet.frame[54:] for packet in got) == payload
        if takes:
            assert got[0].header[:10] == struct.pack("<BBHHHH", 1, 1, 54, size, 34, 16)
        else:
            assert {len(packet.frame) for packet in got[:-1]} == {size + 54}
        into, out = books(bridge, guest, port)
        assert into == out


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_c30_datagrams_that_the_kernel_has_joined_do_not_become_one(
    bridge: core.Bridge, guests: MakeGuest, told: bool, mtu: int
) -> None:
    with jumbo(bridge, mtu, mode="generic") as (pair, port):
        guest = guest_on(bridge, guests, MODERN | TSO)
        send_joined(pair, over(4, UDP, bytes(14000), PARTIAL, to=GUEST), 5, 1400)
        if told:
            assert [len(each) for each in guest.pair.frames(10)] == [1442] * 10
        else:
            assert eventually(lambda: port.port.queue_stats(0, core.RX).drops["oversize"] == 1)
            assert guest.pair.frames(1, 0.2) == []


# ---- a kernel that does not deliver as it should ----

CONTINUED = 1
HEADROOM = 256


class FaultyKernel:
    """Writes into a socket's receive ring what no kernel should, with frames taken from the fill ring."""

    def __init__(self, fd: int, entries: int) -> None:
        with socket.socket(44, socket.SOCK_RAW, 0, fileno=os.dup(fd)) as xsk:
            offsets = struct.unpack("=16Q", xsk.getsockopt(283, 1, 128))  # XDP_MMAP_OFFSETS
        self._entries = entries
        self._rx, self._fill = offsets[:4], offsets[8:12]
        self._rx_map = mmap.mmap(fd, self._rx[2] + 16 * entries, offset=0)
        self._fill_map = mmap.mmap(fd, self._fill[2] + 8 * entries, offset=0x1_0000_0000)
        self._taken = 0

    def close(self) -> None:
        self._rx_map.close()
        self._fill_map.close()

    def take(self) -> int:
        at = self._fill[2] + 8 * (self._taken % self._entries)
        self._taken += 1
        return int(struct.unpack_from("=Q", self._fill_map, at)[0]) + HEADROOM

    def deliver(self, descriptors: Sequence[tuple[int, int, int]]) -> None:
        """Address, length, options of each."""
        (producer,) = struct.unpack_from("=I", self._rx_map, self._rx[0])
        for i, descriptor in enumerate(descriptors):
            at = self._rx[2] + 16 * ((producer + i) % self._entries)
            struct.pack_into("=QII", self._rx_map, at, *descriptor)
        # In one store: struct.pack_into() writes zeros first.
        at = self._rx[0]
        with memoryview(self._rx_map) as whole, whole[at : at + 4] as entry, entry.cast("I") as index:
            index[0] = producer + len(descriptors)

    def chain(self, *lengths: int, ends: bool = True) -> list[tuple[int, int, int]]:
        options = [CONTINUED] * (len(lengths) - ends) + [0] * ends
        return [(self.take(), length, flag) for length, flag in zip(lengths, options, strict=True)]

    @property
    def consumed(self) -> int:
        return int(struct.unpack_from("=I", self._rx_map, self._rx[1])[0])

    @property
    def returned(self) -> int:
        """Frames that were put into the fill ring since it was full."""
        return int(struct.unpack_from("=I", self._fill_map, self._fill[0])[0]) - self._entries


@pytest.fixture
def port(bridge: core.Bridge, request: pytest.FixtureRequest) -> Iterator[int]:
    """Without a program: only we deliver."""
    mtu: int = getattr(request, "param", 9000)
    with veth(mtu=mtu) as pair:
        made = bridge.add_netdev(1)
        made.open_queue(0, socket.if_nametoindex(pair.ifname), mtu + 18)
        yield made
        made.close_queue(0)


@pytest.fixture
def kernel(bridge: core.Bridge, port: core.Netdev) -> Iterator[FaultyKernel]:
    with contextlib.closing(FaultyKernel(port.queue_fd(0), 128)) as made:
        yield made


@pytest.fixture
def guest(bridge: core.Bridge, guests: MakeGuest) -> Driver:
    made = guests(bridge)
    made.pair.fill()
    return made


Drops = Callable[[], dict[str, int]]


@pytest.fixture
def drops(bridge: core.Bridge, port: core.Netdev) -> Drops:
    return lambda: {name: n for name, n in port.queue_stats(0, core.RX).drops.items() if n}


def lengths(guest: Driver, count: int = 1) -> list[int]:
    return [len(each) for each in guest.pair.frames(count)]


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_chain_whose_end_comes_later_is_waited_for(
    held_time: None, kernel: FaultyKernel, guest: Driver, drops: Drops, first: int
) -> None:
    chain = kernel.chain(3840, 3840, 100, 8)
    kernel.deliver([*kernel.chain(60), *chain[:first]])
    assert lengths(guest) == [60]
    guest.bridge.time_advance(1_000_000)
    assert guest.pair.packets() == []
    assert (kernel.consumed, kernel.returned) == (1, 1)
    kernel.deliver([*chain[first:], *kernel.chain(3840, 1), *kernel.chain(61)])
    assert lengths(guest, 3) == [7788, 3841, 61]
    assert eventually(lambda: (kernel.consumed, kernel.returned) == (8, 8))
    assert drops() == {}


@pytest.mark.parametrize(("pieces", "passes"), [(18, True), (19, False), (40, False)])
def test_c27_a_chain_has_at_most_as_many_pieces_as_the_kernel_gives_a_frame(
    kernel: FaultyKernel, guest: Driver, drops: Drops, pieces: int, passes: bool
) -> None:
    kernel.deliver([*kernel.chain(*[50] * pieces), *kernel.chain(60)])
    assert lengths(guest, 1 + passes) == [50 * pieces] * passes + [60]
    assert eventually(lambda: kernel.returned == pieces + 1)
    assert drops() == ({} if passes else {"frags": 1})


def test_c27_a_chain_that_is_too_long_before_it_ends_is_dropped_with_all_that_comes_of_it(
    kernel: FaultyKernel, guest: Driver, drops: Drops
) -> None:
    kernel.deliver(kernel.chain(*[50] * 19, ends=False))
    assert eventually(lambda: kernel.returned == 19)
    assert drops() == {"frags": 1}
    kernel.deliver(kernel.chain(*[50] * 30, ends=False))
    assert eventually(lambda: kernel.returned == 49)
    kernel.deliver([*kernel.chain(50, 50), *kernel.chain(3840, 3840)])
    assert lengths(guest) == [7680]
    assert eventually(lambda: kernel.returned == 53)
    assert drops() == {"frags": 1}


def test_c27_a_chain_that_never_ends_does_not_hold_its_frames_for_ever(
    held_time: None, kernel: FaultyKernel, guest: Driver, drops: Drops
) -> None:
    kernel.deliver(kernel.chain(3840, 3840, ends=False))
    guest.bridge.time_advance(0)
    guest.bridge.time_advance(1_000_000)
    assert (guest.pair.packets(), kernel.returned, drops()) == ([], 0, {})
    guest.bridge.time_advance(1)
    assert kernel.returned == 2
    assert drops() == {"frags": 1}
    kernel.deliver([*kernel.chain(5), *kernel.chain(64)])
    assert lengths(guest) == [64]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("fault", ["address", "length"])
def test_c28_a_piece_out_of_place_drops_its_chain_alone(
    kernel: FaultyKernel, guest: Driver, drops: Drops, which: int, fault: str
) -> None:
    chain = kernel.chain(3840, 3840, 100)
    addr, length, options = chain[which]
    chain[which] = (1 << 40, length, options) if fault == "address" else (addr, 3841, options)
    kernel.deliver([*kernel.chain(60), *chain, *kernel.chain(3840, 62)])
    assert lengths(guest, 2) == [60, 3902]
    # What is not ours is not given back.
    assert eventually(lambda: (kernel.consumed, kernel.returned) == (6, 5))
    assert drops() == {"bad_frame": 1}


def test_more_chains_than_a_burst_holds_all_arrive(kernel: FaultyKernel, guest: Driver, drops: Drops) -> None:
    descriptors = [each for i in range(60) for each in kernel.chain(*[100] * (1 + i % 3))]
    assert len(descriptors) == 120
    kernel.deliver(descriptors)
    assert lengths(guest, 60) == [100 * (1 + i % 3) for i in range(60)]
    assert eventually(lambda: kernel.returned == 120)
    assert drops() == {}


each_socket = pytest.mark.parametrize("port", [1500, 9000], indirect=True, ids=["plain", "large"])
WITHIN = {  # where the last byte of 60 is the last of a frame, of 4096 bytes, and where it is not
    "from its start": lambda addr: (addr - HEADROOM, 60, 0),
    "to its end": lambda addr: (addr - HEADROOM + 4096 - 60, 60, 0),
    "at an odd address": lambda addr: (addr + 1, 60, 0),
    "whole": lambda addr: (addr - HEADROOM, 4096, 0),
}
NOT_OURS = {
    "past its end": lambda addr: (addr - HEADROOM + 4096 - 59, 60, 0),
    "longer than a frame": lambda addr: (addr - HEADROOM, 4097, 0),
    "as long as can be": lambda addr: (addr, 0xFFFFFFFF, 0),
    "beyond the memory": lambda _: (1 << 40, 60, 0),
    "at the end of all addresses": lambda _: ((1 << 64) - 8, 60, 0),
    "in a frame for transmit": lambda addr: (addr + 128 * 4096, 60, 0),
    "an option for transmit": lambda addr: (addr, 60, 2),
    "an unknown option": lambda addr: (addr, 60, 1 << 31),
}
Place = Callable[[int], tuple[int, int, int]]


@each_socket
@pytest.mark.parametrize("place", WITHIN.values(), ids=WITHIN.keys())
def test_c28_a_descriptor_may_be_anywhere_in_a_frame_of_the_socket(
    kernel: FaultyKernel, guest: Driver, drops: Drops, place: Place
) -> None:
    descriptor = place(kernel.take())
    kernel.deliver([*kernel.chain(61), descriptor, *kernel.chain(62)])
    assert lengths(guest, 3) == [61, descriptor[1], 62]
    assert eventually(lambda: (kernel.consumed, kernel.returned) == (3, 3))
    assert drops() == {}


@each_socket
@pytest.mark.parametrize("place", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_c28_a_descriptor_that_is_not_ours_drops_its_frame_alone(
    kernel: FaultyKernel, guest: Driver, drops: Drops, place: Place
) -> None:
    kernel.deliver([*kernel.chain(61), place(kernel.take()), *kernel.chain(62)])
    assert lengths(guest, 2) == [61, 62]
    assert eventually(lambda: (kernel.consumed, kernel.returned) == (3, 2))
    assert drops() == {"bad_frame": 1}


@pytest.mark.parametrize("port", [1500], indirect=True)
def test_c28_a_part_of_a_frame_on_a_socket_that_gets_none_is_not_ours(
    kernel: FaultyKernel, guest: Driver, drops: Drops
) -> None:
    kernel.deliver([*kernel.chain(60, ends=False), *kernel.chain(62)])
    assert lengths(guest) == [62]
    assert drops() == {"bad_frame": 1}


@each_socket
def test_c28_a_kernel_that_does_so_three_times_gets_a_new_socket(
    bridge: core.Bridge, port: core.Netdev, kernel: FaultyKernel, guest: Driver, drops: Drops
) -> None:
    bridge.events()
    for _ in range(2):
        kernel.deliver([(1 << 40, 60, 0)])
    assert eventually(lambda: kernel.consumed == 2)
    assert not port.is_stale("off")
    assert not bridge.events() & core.EVENT_UMEM
    kernel.deliver([(1 << 40, 60, 0), *kernel.chain(60)])
    assert lengths(guest) == [60]
    assert port.is_stale("off")
    assert bridge.events() & core.EVENT_UMEM
    assert drops() == {"bad_frame": 3}


@each_socket
@pytest.mark.parametrize(("size", "passes"), [(0, False), (1, False), (13, False), (14, True)])
def test_c27_a_frame_without_an_ethernet_header_is_dropped_and_its_buffer_goes_back(
    kernel: FaultyKernel, guest: Driver, drops: Drops, size: int, passes: bool
) -> None:
    kernel.deliver([*kernel.chain(size), *kernel.chain(60)])
    assert lengths(guest, 1 + passes) == [size] * passes + [60]
    assert eventually(lambda: kernel.returned == 2)
    assert drops() == ({} if passes else {"runt": 1})
