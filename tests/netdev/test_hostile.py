"""A hostile guest before an interface: what it cannot have the core put into the kernel's transmit ring.

A descriptor that the kernel does not take can stop a ring for ever. So those that the core has written are read, from
the ring itself, after frames and headers of every wrong kind; and good frames must still pass. C14, C24 and so on are
rows of the list of hostile inputs.
"""

import mmap
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rig.driver import APART, TOGETHER, Driver, Layout, ledger
from tests.rig.guests import frame, mac
from tests.rig.netns import Veth, needs_root, veth
from tests.rig.offloads import SENDS, TCP4, asks, data, kind_of
from tests.rig.rings import MODERN, Buffer, Span
from tests.rig.segments import ECN, PSH, TSO4, TSO6, UDP, USO, Segment, wire
from xdpnet import core
from xdpnet.counters import Traffic

pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

FAR = mac(99)
PIECE = 4064  # of a frame of several descriptors: a buffer without the room for metadata
ENTRIES = 128
CONTINUED, METADATA = 1, 2  # options of a descriptor: XDP_PKT_CONTD, XDP_TX_METADATA
RAM = (Span(0x4000_0000, 1 << 26, 0x7F12_0000_0000, 0),)
WHOLE = replace(TCP4, to=FAR)

Frames = Sequence[tuple[bytes, bytes]]


class TxRing:
    """A socket's transmit ring, as the kernel has it."""

    def __init__(self, fd: int) -> None:
        with socket.socket(44, socket.SOCK_RAW, 0, fileno=os.dup(fd)) as xsk:
            offsets = struct.unpack("=16Q", xsk.getsockopt(283, 1, 128))  # XDP_MMAP_OFFSETS
        self._producer, self._consumer, self._entries, _ = offsets[4:8]
        self._map = mmap.mmap(fd, self._entries + 16 * ENTRIES, offset=0x8000_0000)

    def close(self) -> None:
        self._map.close()

    def index(self, at: int) -> int:
        return int(struct.unpack_from("=I", self._map, at)[0])

    @property
    def is_empty(self) -> bool:
        return self.index(self._producer) == self.index(self._consumer)

    def chains(self) -> list[list[tuple[int, int, int]]]:
        """Address, length and options of the descriptors of the last lap, by frame; its first may be cut off."""
        end = self.index(self._producer)
        made: list[list[tuple[int, int, int]]] = [[]]
        for i in range(max(0, end - ENTRIES), end):
            made[-1].append(struct.unpack_from("=QII", self._map, self._entries + 16 * (i % ENTRIES)))
            if not made[-1][-1][2] & CONTINUED:
                made.append([])
        assert made.pop() == []
        return made[end > ENTRIES :]


@dataclass
class Scene:
    bridge: core.Bridge
    guest: Driver
    port: core.Netdev
    ring: TxRing
    pair: Veth
    mtu: int
    lends: bool

    @property
    def tx(self) -> Traffic:
        return self.port.queue_stats(0, core.TX)

    def send(self, frames: Frames, layout: Layout = TOGETHER) -> None:
        """All of them are handed back, and every descriptor was one that the kernel takes."""
        for start in range(0, len(frames), 64):
            for header, each in frames[start : start + 64]:
                self.guest.pair.queue(each, layout, header)
            self.guest.pair.tx.kick()
            assert self.guest.pair.wait_sent()
            self.is_sound()

    def is_sound(self) -> None:
        for chain in self.ring.chains():
            sizes = [size for _, size, _ in chain]
            assert 60 <= sum(sizes) <= self.mtu + 18
            assert len(chain) == 1 or set(sizes[:-1]) == {PIECE}
            assert all(1 <= size <= 4096 for size in sizes)
            # Metadata, if any, is of our making, and of frames that were copied.
            own = METADATA * all(addr >> 48 == 0 for addr, _, _ in chain)
            assert [options & ~own for *_, options in chain] == [CONTINUED] * (len(chain) - 1) + [0]
        stats = self.port.xsk_stats(0)
        assert stats.tx_invalid_descs == 0

    def still_works(self) -> None:
        """A good frame gets through, and each that was sent is in one counter."""
        good = frame(FAR, mac(1), 200, mark=os.urandom(8))
        with self.pair.wire() as far:
            self.guest.pair.send(good)
            assert far.receive(lambda each: each == good) is not None
        assert self.guest.pair.wait_sent()
        into, out = ledger(self.bridge, {self.guest.port: 1})
        assert into == out + self.tx.packets + sum(self.tx.drops.values())
        assert self.ring.is_empty


@pytest.fixture(
    scope="module",
    params=[(1500, "off"), (1500, "on"), (9000, "off"), (9000, "on")],
    ids=["copied", "in place", "large, copied", "large, in place"],
)
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    mtu, zerocopy = request.param
    with (
        veth(mtu=mtu) as pair,
        core.Bridge(netdev_queues=1, frames_per_queue=2 * ENTRIES, zerocopy=zerocopy, copybreak=0) as bridge,
    ):
        bridge.start()
        with closing(Driver(bridge, MODERN | SENDS, num=1024, spans=RAM)) as guest:
            port = bridge.add_netdev(1)
            port.set_mac(FAR, False)
            port.open_queue(0, socket.if_nametoindex(pair.ifname), mtu + 18, zerocopy)
            with closing(TxRing(port.queue_fd(0))) as ring:
                yield Scene(bridge, guest.start(), port, ring, pair, mtu, zerocopy == "on")


def put(sent: bytes, at: int, value: int) -> bytes:
    return sent[:at] + bytes([value]) + sent[at + 1 :]


def every_gso_type() -> Frames:
    sent = WHOLE.frame(partial=True)
    return [(WHOLE.header(kind, size), sent) for kind in range(256) for size in (0, 1, 7, 8, 30, 1460, 0xFFFF)]


def every_place_of_a_checksum() -> Frames:
    return [
        (asks(start, offset), frame(FAR, mac(1), size))
        for size in (14, 60, 255, 256, 1514)
        for start in (0, 13, 14, 15, 34, size - 2, size - 1, size, 0x7FFF, 0xFFFE, 0xFFFF)
        for offset in (0, 1, 16, 200, 0x7FFF, 0xFFFE, 0xFFFF)
    ]


def every_lie_of_the_headers() -> Frames:
    made = []
    for version, protocol in (4, 6), (6, 6), (4, UDP), (6, UDP):
        whole = replace(WHOLE, version=version, protocol=protocol)
        sent, header = whole.frame(partial=True), whole.header(kind_of(whole), 1000)
        made += [(header, put(sent, at, value)) for at in range(12, whole.headers) for value in (0, 0x45, 0x7F, 0xFF)]
    return made


def every_length() -> Frames:
    sent, header = WHOLE.frame(partial=True), WHOLE.header(TSO4, 1000)
    borders = [size + by for size in (256, 1514, 1518, 3840, 4096, 8192, 9014, 9018, 12288, 65535) for by in (-1, 0, 1)]
    return [(header, sent[:size]) for size in range(120)] + [
        (bytes(12), frame(FAR, mac(1), size)) for size in [*range(120), *borders]
    ]


def tags_and_tunnels() -> Frames:
    sent = WHOLE.frame(partial=True)
    kinds = [0, 100, 0x05DC, 0x0806, 0x6558, 0x8847, 0x8864, 0x88CC, 0x8808, 0xFFFF]
    return [
        (header, sent[:12] + tag * count + sent[12:])
        for header in (bytes(12), WHOLE.header(TSO4, 1000))
        for tag in (b"\x81\0\0\0", b"\x81\0\x0f\xff", b"\x88\xa8\0\5")
        for count in (1, 2, 3, 64)
    ] + [(WHOLE.header(TSO6, 1000), FAR + mac(1) + struct.pack(">H", kind) + data(1400)) for kind in kinds]


@pytest.mark.parametrize(
    "make",
    [every_gso_type, every_place_of_a_checksum, every_lie_of_the_headers, every_length, tags_and_tunnels],
    ids=lambda make: str(make.__name__),
)
@pytest.mark.parametrize("layout", [TOGETHER, APART], ids=str)
def test_c1_to_c21_no_frame_or_header_makes_a_descriptor_that_the_kernel_does_not_take(
    scene: Scene, make: Callable[[], Frames], layout: Layout
) -> None:
    scene.send(make(), layout)
    scene.still_works()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 48))
def test_any_header_with_any_frame_makes_no_such_descriptor_either(scene: Scene, seed: int) -> None:
    rng = random.Random(seed)
    frames = []
    for _ in range(20):
        whole = replace(
            WHOLE, version=rng.choice([4, 6]), protocol=rng.choice([6, UDP]), payload=rng.randbytes(rng.randrange(4000))
        )
        kind, sent = rng.choice([0, kind_of(whole), kind_of(whole) | ECN]), bytearray(whole.frame(partial=True))
        header = bytearray(whole.header(kind, rng.choice([8, 100, 1400, 4000, 8900, 0xFFFF])))
        for _ in range(rng.randrange(4)):
            header[rng.randrange(12)] = rng.choice([0, 1, 0x20, 0xFF, rng.randrange(256)])
        for _ in range(rng.randrange(3)):
            sent[rng.randrange(12, 42)] = rng.choice([0, 0x60, 0xFF, rng.randrange(256)])
        frames.append((bytes(header), bytes(sent[: rng.choice([len(sent), rng.randrange(len(sent))])])))
    scene.send(frames)


def test_c26_bytes_of_a_guest_before_its_frame_are_no_options_of_a_descriptor(scene: Scene) -> None:
    """Where the kernel would look for metadata, which asks for a checksum here: past the end of what it is about."""
    metadata = (struct.pack("<QHH", 2, 0xFFFF, 0xFFFF) + bytes(12)) * 20
    memory = scene.guest.memory
    for offset in range(24):
        sent = frame(FAR, mac(1), 300, mark=bytes([offset]))
        packet, before = bytes(12) + sent, scene.tx.in_place
        addr = memory.take(4096)
        memory.write(addr, metadata[offset:] + packet)
        with scene.pair.wire() as far:
            scene.guest.pair.tx.add([Buffer(addr + len(metadata) - offset, len(packet))], writable=False, owned=False)
            scene.guest.pair.tx.kick()
            assert far.receive() == sent
        assert scene.guest.pair.wait_sent()
        assert scene.tx.in_place == before + scene.lends
        assert [options for *_, options in scene.ring.chains()[-1]] == [0]
        memory.give(addr, 4096)
    scene.still_works()


@pytest.mark.parametrize("protocol", [6, UDP], ids=["tcp", "udp"])
def test_c13_the_last_segment_is_padded_with_zeroes(scene: Scene, protocol: int) -> None:
    whole = replace(WHOLE, protocol=protocol, payload=data(2001), flags=WHOLE.flags | PSH)
    scene.send([(bytes(12), frame(FAR, mac(1), 1500, mark=b"secret" * 240))] * ENTRIES)
    with scene.pair.wire() as far:
        scene.send([(whole.header(kind_of(whole), 1000), whole.frame(partial=True))])
        assert [far.receive() for _ in range(3)] == [each.ljust(60, b"\0") for each in wire(whole.cut(1000))]
        assert far.receive(timeout=0.1) is None


def test_c24_as_many_segments_as_can_be_wait_for_room_and_none_is_lost(scene: Scene) -> None:
    """Each frame takes all the descriptors that there are, and there are more frames than laps of the ring."""
    bombs = [
        (whole.header(kind_of(whole), 8), whole.frame(partial=True))
        for i in range(100)
        for whole in [replace(WHOLE, payload=data(128 * 8, i), seq=i << 16, protocol=(6, UDP)[i % 2])]
    ]
    assert kind_of(replace(WHOLE, protocol=UDP)) == USO
    before, drops = scene.tx.packets, dict(scene.tx.drops)
    scene.send(bombs)
    assert scene.tx.packets - before == 100 * 128
    assert scene.tx.drops == drops
    scene.still_works()


def test_c14_what_is_cut_into_more_than_the_interface_carries_is_dropped_and_counted(scene: Scene) -> None:
    room = scene.mtu + 18 - WHOLE.headers
    for size, passes in ((room, True), (room + 1, False)):
        whole: Segment = replace(WHOLE, payload=data(3 * size))
        packets, oversize = scene.tx.packets, scene.tx.drops["oversize"]
        scene.send([(whole.header(TSO4, size), whole.frame(partial=True))])
        assert (scene.tx.packets - packets, scene.tx.drops["oversize"] - oversize) == ((3, 0) if passes else (0, 3))
    scene.still_works()
