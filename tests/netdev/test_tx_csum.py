"""Checksums of frames to the wire, on veth pairs: made by the core, or left to the interface by AF_XDP's metadata.

A veth hands a checksum that is left to it on to its peer, which trusts it; told otherwise (ethtool -K tx off), it makes
the checksum. A field that the kernel does not like stops a socket's transmit ring for ever: after whatever a guest asks
for, a good frame has to pass. tests/netdev/test_large_frames.py has the frames of several descriptors.
"""

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.netdev.test_xsk import drops
from tests.rig import needs
from tests.rig.driver import LAYOUTS, TOGETHER, Driver, Layout
from tests.rig.guests import MakeBridge, MakeGuest, frame, mac
from tests.rig.netns import Veth, Wire, command, needs_root, veth
from tests.rig.offloads import SENDS, asks, data, summed
from tests.rig.rings import MODERN, Buffer
from tests.rig.segments import ACK, SYN, TSO4, TSO6, UDP, USO, Segment
from tests.rig.waiting import PATIENCE_S, eventually
from xdpnet import core
from xdpnet.netdev.port import Netdev

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [needs_root, needs.tx_metadata, pytest.mark.net, pytest.mark.core]

FAR, GUEST = mac(99), mac(1)
LONGEST = 1518
LEFT_FROM = 512  # shorter frames cost no less when they are left
FRAMES = 256


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=1, frames_per_queue=FRAMES, zerocopy="on", copybreak=0)


class Lane:
    """From a guest through the core to a veth, and the frames at its far end."""

    def __init__(self, bridge: core.Bridge, guest: Driver, pair: Veth, far: Wire) -> None:
        self.bridge, self.guest, self.pair, self.far = bridge, guest, pair, far
        self.port = bridge.add_netdev(1)
        self.port.set_mac(FAR, False)
        self.makes_csum(True)

    def makes_csum(self, makes: bool, zerocopy: core.ZeroCopy = "off", max_frame: int = LONGEST) -> None:
        self.port.close_queue(0)
        index = socket.if_nametoindex(self.pair.ifname)

        def opens() -> bool:
            with contextlib.suppress(OSError):
                self.port.open_queue(0, index, max_frame, zerocopy, makes_csum=makes)
                return True
            return False

        assert eventually(opens)

    def interface_makes_it(self) -> None:
        command("ethtool", "-K", self.pair.ifname, "tx", "off")

    def send(self, sent: bytes, header: bytes = bytes(12), layout: Layout = TOGETHER) -> None:
        self.guest.pair.send(sent, layout, header)
        assert self.guest.pair.wait_sent()

    def passes(self, sent: bytes, wanted: bytes, header: bytes = bytes(12), layout: Layout = TOGETHER) -> None:
        self.send(sent, header, layout)
        assert self.far.receive() == wanted

    @property
    def counts(self) -> tuple[int, int]:
        """Checksums made, and left."""
        stats = self.port.queue_stats(0, core.TX)
        return stats.csum_computed, stats.csum_partial

    def goes_on(self) -> None:
        """Every buffer is back, none twice, the kernel has refused nothing, and a good frame of either kind passes."""
        self.passes(frame(FAR, GUEST, mark=b"good"), frame(FAR, GUEST, mark=b"good"))
        self.send(BIG.frame(partial=True), BIG.header())
        assert self.far.receive() in (BIG.frame(partial=True), BIG.frame())
        stats = self.port.xsk_stats(0)
        assert (stats.tx_invalid_descs, stats.frames_free + stats.frames_tx) == (0, FRAMES // 2)
        assert drops(self.port.queue_stats(0, core.TX)) == {}


BIG = Segment(payload=data(1400), to=FAR)
KINDS = {
    "tcp4": BIG,
    "tcp6": replace(BIG, version=6),
    "udp4": replace(BIG, protocol=UDP),
    "udp6": replace(BIG, version=6, protocol=UDP),
    "tagged": replace(BIG, tags=b"\x81\x00\x00\x05"),
    "options": replace(BIG, ip_options=bytes(8), options=b"\1\1\x08\x0a" + bytes(8)),
}
each_kind = pytest.mark.parametrize("whole", KINDS.values(), ids=KINDS.keys())


@pytest.fixture
def lane(bridge: core.Bridge, guests: MakeGuest, pair: Veth) -> Iterator[Lane]:
    with pair.wire() as far:
        yield Lane(bridge, guests(bridge, features=MODERN | SENDS), pair, far)


def untagged(each: bytes, whole: Segment) -> bytes:
    """As AF_PACKET has it, which takes the tag out."""
    return each[:12] + each[12 + len(whole.tags) :]


# ---- who makes it ----


@each_kind
def test_a_checksum_is_left_to_the_interface_or_made_by_the_core(lane: Lane, whole: Segment) -> None:
    lane.passes(whole.frame(partial=True), untagged(whole.frame(partial=True), whole), whole.header())
    assert lane.counts == (0, 1)
    lane.interface_makes_it()
    lane.passes(whole.frame(partial=True), untagged(whole.frame(), whole), whole.header())
    assert lane.counts == (0, 2)
    lane.makes_csum(False)
    lane.passes(whole.frame(partial=True), untagged(whole.frame(), whole), whole.header())
    assert lane.counts == (1, 2)
    lane.goes_on()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("by", ["core", "interface"])
def test_a_checksum_is_right_whatever_the_length_and_the_chain(lane: Lane, layout: Layout, by: str) -> None:
    lane.interface_makes_it()
    lane.makes_csum(by == "interface")
    for size in 0, 1, 5, 6, 7, LEFT_FROM - 55, LEFT_FROM - 54, LEFT_FROM - 53, 1001, 1459, 1460:
        whole = replace(BIG, payload=data(size))
        lane.passes(whole.frame(partial=True), whole.frame().ljust(60, b"\0"), whole.header(), layout)
    assert lane.counts == ((11, 0) if by == "core" else (6, 5))
    lane.goes_on()


@pytest.mark.parametrize(("size", "left"), [(LEFT_FROM - 1, 0), (LEFT_FROM, 1)])
def test_a_short_frame_has_its_checksum_made_by_the_core(lane: Lane, size: int, left: int) -> None:
    whole = replace(BIG, payload=data(size - 54))
    lane.passes(whole.frame(partial=True), whole.frame(partial=bool(left)), whole.header())
    assert lane.counts == (1 - left, left)


@pytest.mark.parametrize(("kind", "gso"), [("tcp4", TSO4), ("tcp6", TSO6), ("udp4", USO), ("udp6", USO)])
@pytest.mark.parametrize("by", ["core", "interface", "peer"])
def test_each_segment_of_a_large_frame_has_its_checksum(lane: Lane, kind: str, gso: int, by: str) -> None:
    lane.makes_csum(by != "core")
    if by == "interface":
        lane.interface_makes_it()
    whole = replace(KINDS[kind], payload=data(10_000))
    lane.send(whole.frame(partial=True), whole.header(gso, 1400))
    for part in whole.cut(1400):
        left = by == "peer" and len(part.frame()) >= LEFT_FROM
        assert lane.far.receive() == part.frame(partial=left)
    # The last one is short.
    assert lane.counts == ((8, 0) if by == "core" else (1, 7))
    lane.goes_on()


def test_a_checksum_that_comes_to_zero_is_sent_as_ones(lane: Lane) -> None:
    lane.interface_makes_it()
    for filler in range(0x10000):
        whole = replace(KINDS["udp4"], payload=struct.pack(">H", filler) + BIG.payload)
        if whole.frame()[40:42] == b"\xff\xff":
            break
    lane.passes(whole.frame(partial=True), whole.frame(), whole.header())
    assert lane.counts == (0, 1)


def test_netdev_leaves_it_to_an_interface_that_has_it_turned_on(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth
) -> None:
    guest = guests(bridge, features=MODERN | SENDS)
    with pair.wire() as far:
        for turned, counts in (("on", (0, 1)), ("off", (1, 0))):
            command("ethtool", "-K", pair.ifname, "tx", turned)
            with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
                port.open()
                before = port.port.queue_stats(0, core.TX)
                guest.pair.send(BIG.frame(partial=True), header=BIG.header())
                assert far.receive() == BIG.frame(partial=turned == "on")
                after = port.port.queue_stats(0, core.TX)
                made = after.csum_computed - before.csum_computed, after.csum_partial - before.csum_partial
                assert made == counts


# ---- a stack that takes it ----


@pytest.fixture
def stack(bridge: core.Bridge, guests: MakeGuest, pair: Veth) -> Iterator[tuple[Driver, Netdev]]:
    """A guest, 10.99.0.2 to the far end's own stack."""
    guest = guests(bridge, features=MODERN | SENDS)
    guest.port.set_mac(GUEST, False)
    guest.pair.fill()
    space = ("ip", "-n", pair.namespace.name)
    command(*space, "neigh", "add", "10.99.0.2", "lladdr", GUEST.hex(":"), "dev", pair.peer)
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        port.sync_macs([GUEST])
        yield guest, port


class Here(Segment):
    """A segment from 10.99.0.2 to 10.99.0.1."""

    @property
    def ends(self) -> bytes:
        return bytes([10, 99, 0, 2, 10, 99, 0, 1])


@pytest.mark.parametrize("size", [1, 800, 1401])
def test_a_datagram_reaches_a_socket_only_with_its_checksum(
    stack: tuple[Driver, Netdev], pair: Veth, size: int
) -> None:
    guest, _ = stack
    sent = Here(protocol=UDP, payload=data(size), to=pair.peer_mac)
    with pair.namespace.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as receiver:
        receiver.bind((pair.address, 2000))
        receiver.settimeout(PATIENCE_S)
        # Nothing is asked for, and the checksum is wrong: the control.
        guest.pair.send(replace(sent, payload=data(size, 1)).frame(partial=True))
        guest.pair.send(sent.frame(partial=True), header=sent.header())
        assert receiver.recvfrom(65536) == (sent.payload, ("10.99.0.2", 1000))
        receiver.settimeout(0.1)
        with pytest.raises(TimeoutError):
            receiver.recv(65536)


def test_a_stream_reaches_a_socket_as_a_large_frame_that_was_cut(stack: tuple[Driver, Netdev], pair: Veth) -> None:
    guest, port = stack
    with pair.namespace.call(lambda: socket.create_server((pair.address, 2000))) as server:
        server.settimeout(PATIENCE_S)
        hello = Here(flags=SYN, seq=100, ack=0, window=65535, to=pair.peer_mac)
        guest.pair.send(hello.frame(partial=True), header=hello.header())
        (answer,) = guest.pair.frames()
        (seq,) = struct.unpack(">I", answer[38:42])
        whole = Here(flags=ACK, seq=101, ack=seq + 1, window=65535, to=pair.peer_mac, payload=data(20_000))
        guest.pair.send(whole.frame(partial=True), header=whole.header(TSO4, 1448))
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(PATIENCE_S)
            got = b""
            while len(got) < len(whole.payload):
                got += accepted.recv(65536)
        assert got == whole.payload
    stats = port.port.queue_stats(0, core.TX)
    assert (stats.csum_partial, stats.csum_computed) == (14, 1)


# ---- a guest that asks for what it should not ----

SIZES = (60, 255, 256, 257, LEFT_FROM, 1514)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("made", ["by the interface", "by the peer"])
def test_c6_a_field_at_the_very_end_passes_and_one_byte_further_is_refused(lane: Lane, size: int, made: str) -> None:
    if made == "by the interface":
        lane.interface_makes_it()
    end = min(size, 256)
    sent = frame(FAR, GUEST, size)
    for start, offset in ((end - 2, 0), (end - 7, 5), (14, end - 16), (15, end - 17)):
        left = made == "by the peer" and size >= LEFT_FROM
        lane.passes(sent, sent if left else summed(sent, start, offset), asks(start, offset))
    refused = [(end - 1, 0), (end - 2, 1), (14, end - 15), (end, 0), (13, 1), (0, 0), (0, 0xFFFF), (0xFFFF, 0)]
    refused += [(0xFFFF, 0xFFFF), (0xFFFF, 1), (0xFFFE, 2), (20, 0xFFFF)]
    for start, offset in refused:
        lane.send(sent, asks(start, offset))
    assert lane.guest.drops(core.TX) == {"csum": len(refused)}
    lane.goes_on()


@pytest.mark.parametrize("size", [4064, 4065, 9000])
def test_c6_in_a_frame_of_several_descriptors_too(bridge: core.Bridge, guests: MakeGuest, size: int) -> None:
    with veth(mtu=9000) as pair, pair.wire() as far:
        lane = Lane(bridge, guests(bridge, features=MODERN | SENDS), pair, far)
        lane.makes_csum(True, max_frame=9018)
        lane.interface_makes_it()
        sent = frame(FAR, GUEST, size)
        for start, offset in ((254, 0), (14, 240), (77, 1)):
            lane.passes(sent, summed(sent, start, offset), asks(start, offset))
        for start, offset in ((255, 0), (254, 1), (size - 2, 0), (4064, 0), (13, 0)):
            lane.send(sent, asks(start, offset))
        assert lane.guest.drops(core.TX) == {"csum": 5}
        assert lane.counts == (0, 3)
        lane.goes_on()


def test_c6_any_field_at_all_leaves_the_ring_going(lane: Lane) -> None:
    lane.interface_makes_it()
    dice = random.Random(6)
    refused = 0
    for _ in range(600):
        size = dice.choice((14, 15, 30, 60, 200, 511, 512, 600, 1514))
        end = min(size, 256)
        start = dice.choice((0, 13, 14, 15, 34, end - 3, end - 2, end - 1, end, size - 2, size, 0xFFFF))
        offset = dice.choice((0, 1, 2, 16, *(max(0, end - 2 - start + more) for more in (-1, 0, 1)), 0xFFFF))
        sent = frame(FAR, GUEST, size)
        if start >= 14 and start + offset + 2 <= end:
            lane.passes(sent, summed(sent, start, offset).ljust(60, b"\0"), asks(start, offset))
        else:
            lane.send(sent, asks(start, offset))
            refused += 1
    assert lane.guest.drops(core.TX) == {"csum": refused}
    assert 100 < refused < 500
    lane.goes_on()


# ---- C26: metadata is ours alone ----

METADATA = struct.pack("<QHHIQ", 2, 14, 20, 0, 0).ljust(32, b"\xff")  # a checksum that nobody has asked for


def test_c26_a_buffer_that_had_metadata_has_none_for_the_next_frame(lane: Lane) -> None:
    lane.interface_makes_it()
    plain = frame(FAR, GUEST, 1400)
    for _ in range(FRAMES):
        lane.passes(BIG.frame(partial=True), BIG.frame(), BIG.header())
    for _ in range(FRAMES):
        lane.passes(plain, plain)
    assert lane.counts == (0, FRAMES)


def lends(lane: Lane, at: int, sent: bytes) -> None:
    """The frame lies there, its virtio_net_hdr elsewhere; it is sent in place."""
    guest = lane.guest.pair
    header = guest.memory.reserve(12)
    guest.memory.write(at, sent)
    before = lane.port.queue_stats(0, core.TX).in_place
    guest.tx.add([Buffer(header, 12), Buffer(at, len(sent))], writable=False, owned=False)
    guest.tx.kick()
    assert lane.far.receive() == sent
    assert guest.wait_sent()
    assert lane.port.queue_stats(0, core.TX).in_place == before + 1


@pytest.mark.parametrize("size", [60, 1400])
def test_c26_what_lies_before_a_lent_frame_is_no_metadata(lane: Lane, size: int) -> None:
    lane.makes_csum(True, "on")
    lane.interface_makes_it()
    place = lane.guest.memory.reserve(8192, 4096)
    for at in (place + 32, place + 33, place + 2048, place + 4096):
        lane.guest.memory.write(at - 32, METADATA)
        lends(lane, at, frame(FAR, GUEST, size))
    lane.goes_on()


@pytest.mark.parametrize("size", [60, 1400])
def test_c26_the_first_byte_of_a_window_can_be_lent(lane: Lane, size: int) -> None:
    """The room for metadata before it is a private frame's."""
    lane.makes_csum(True, "on")
    # Its receive ring lies there, which nobody uses.
    lowest = lane.guest.pair.rx.parts()[0][0]
    assert lowest == lane.guest.memory.spans[0].guest_addr
    lends(lane, lowest, frame(FAR, GUEST, size))
    lane.goes_on()


def test_a_frame_that_needs_its_checksum_is_copied_from_a_guest_that_lends(lane: Lane) -> None:
    lane.makes_csum(True, "on")
    for _ in range(3):
        lane.passes(BIG.frame(partial=True), BIG.frame(partial=True), BIG.header())
        lane.passes(frame(FAR, GUEST, 1000), frame(FAR, GUEST, 1000))
    stats = lane.port.queue_stats(0, core.TX)
    assert (stats.in_place, stats.csum_partial) == (3, 3)
    lane.goes_on()
