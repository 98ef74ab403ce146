"""What the core cuts and joins, beside what the kernel makes of the very same frames.

A super-frame goes into a veth pair by an AF_PACKET socket with a virtio_net_hdr, as a guest's through a tap; the kernel
cuts it, for the interface does no segmentation, and the far end sees the frames. There, too, the kernel joins frames of
a flow (GRO), and the socket tells with which virtio_net_hdr.
"""

import random
import shutil
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_coalesce import ALL, any_burst, by_flow, key_of
from tests.core.test_offload import extension, large_frames, through
from tests.native.offload import BURST, Offload
from tests.rig.driver import Driver
from tests.rig.guests import Pair, mac
from tests.rig.netns import Veth, command, needs_root, veth
from tests.rig.offloads import SENDS, TCP4, UDP6, data, kind_of
from tests.rig.rings import MODERN
from tests.rig.segments import ACK, ECE, PSH, TCP, UDP, UFO, USO, Segment
from tests.rig.waiting import PATIENCE_S
from xdpnet import core

pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

SOL_PACKET, PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 8, 15, 23
SO_RCVBUFFORCE = 33
TAG_VALID, TPID_VALID = 1 << 4, 1 << 6
PLAIN = bytes(10)
EXTENSIONS = (0, 43, 44, 60)  # those of IPv6 that the tests make
IDENT = b"id.."  # in place of what is drawn for the fragments of each datagram of IPv6


def packet_socket(ifname: str) -> socket.socket:
    """Frames with a virtio_net_hdr in front, both ways."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    for option in PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING:
        raw.setsockopt(SOL_PACKET, option, 1)
    raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
    raw.bind((ifname, 3))
    return raw


class Kernel:
    """A veth pair whose near end hands over frames as they are to be on the wire."""

    def __init__(self, pair: Veth) -> None:
        command("ethtool", "-K", pair.ifname, "tx", "off", "tso", "off", "gso", "off", "txvlan", "off")
        self._near = packet_socket(pair.ifname)
        self._far = pair.namespace.call(lambda: packet_socket(pair.peer))

    def close(self) -> None:
        self._near.close()
        self._far.close()

    def send(self, header: bytes, frame: bytes) -> None:
        self._near.send(header[:10] + frame)

    def receive(self, timeout: float) -> tuple[bytes, bytes] | None:
        """The next frame with its header; None: there is none."""
        self._far.settimeout(timeout)
        try:
            packet, ancillary, _, _ = self._far.recvmsg(1 << 17, 1 << 10)
        except (TimeoutError, BlockingIOError):
            return None
        header, frame = packet[:10], packet[10:]
        for _, kind, value in ancillary:
            status, _, _, _, _, tag, protocol = struct.unpack("=IIIHHHH", value[:20])
            if kind == PACKET_AUXDATA and status & TAG_VALID:
                tag = struct.pack(">HH", protocol if status & TPID_VALID else 0x8100, tag)
                frame = frame[:12] + tag + frame[12:]
        return header, frame

    def through(self, header: bytes, frame: bytes, count: int) -> list[bytes]:
        """The frames that it becomes; `count` are waited for, others taken along."""
        self.send(header, frame)
        got: list[bytes] = []
        while (each := self.receive(PATIENCE_S if len(got) < count else 0)) is not None:
            assert (each[0][0] & 1, each[0][1]) == (0, 0)  # its checksum is complete, and it is one
            got.append(each[1])
        return got


@pytest.fixture(scope="module")
def pair() -> Iterator[Veth]:
    with veth(mtu=9000) as made:
        yield made


@pytest.fixture(scope="module")
def cuts(pair: Veth) -> Iterator[Kernel]:
    """It cuts, and joins nothing again."""
    pair.namespace.run("ethtool", "-K", pair.peer, "gro", "off")
    with closing(Kernel(pair)) as made:
        yield made


@pytest.fixture(scope="module")
def guests() -> Iterator[Pair]:
    """One that asks for everything, and one that takes nothing."""
    with core.Bridge() as bridge:
        bridge.start()
        with closing(Driver(bridge, MODERN | SENDS, num=2048)) as a, closing(Driver(bridge, num=1024)) as b:
            a.port.set_mac(mac(1), False)
            b.port.set_mac(mac(2), False)
            yield a.start(), b.start()


def ones(frame: bytes) -> bytes:
    """A checksum of TCP that comes to zero may be sent as ones: the core does, and of segments the kernel does not."""
    at = len(key_of(frame)[0])
    if frame[at] >> 4 == 4:
        protocol, at = frame[at + 9], at + 4 * (frame[at] & 15)
    else:
        protocol, at = frame[at + 6], at + 40
        while protocol in EXTENSIONS:
            protocol, at = frame[at], at + 8 + 8 * frame[at + 1]
    at += 16
    if protocol != TCP or frame[at : at + 2] != b"\0\0":
        return frame
    return frame[:at] + b"\xff\xff" + frame[at + 2 :]


# ---- cut ----


def without_ident(frames: Sequence[bytes], whole: Segment, kind: int) -> list[bytes]:
    """The identification of IPv6 fragments is everybody's own; it is one for all of a datagram."""
    at = whole.l4 + 4
    if kind != UFO or whole.version == 4 or len(frames) < 2:
        return [ones(each) for each in frames]
    assert len({each[at : at + 4] for each in frames}) == 1
    return [each[:at] + IDENT + each[at + 4 :] for each in frames]


def same_as_kernel(cuts: Kernel, guests: Pair, batch: Sequence[tuple[Segment, int, int, list[int]]]) -> None:
    ours = [each for _, each in through(guests, batch)]
    for whole, kind, size, _ in batch:
        if kind == UFO:
            size -= size % 8  # others the kernel takes at their word, and makes fragments that nobody can put together
        count = len(whole.fragments(size) if kind == UFO else whole.cut(size))
        # What is one segment is no GSO frame for the kernel, which refuses some that claim it.
        header = whole.header(kind, size) if count > 1 else whole.header()
        frames = cuts.through(header, whole.frame(partial=True), count)
        mine, ours = ours[: len(frames)], ours[len(frames) :]
        assert without_ident(mine, whole, kind) == without_ident(frames, whole, kind)
    assert ours == []


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(large_frames(), min_size=1, max_size=5))
def test_any_frame_is_cut_into_the_frames_that_the_kernel_cuts_it_into(
    cuts: Kernel, guests: Pair, batch: list[tuple[Segment, int, int, list[int]]]
) -> None:
    same_as_kernel(cuts, guests, batch)


@pytest.mark.parametrize("flags", [each | ACK for each in range(0, 256, 16 + 1)] + [0, 0xFF], ids=hex)
def test_c25_every_flag_is_where_the_kernel_has_it(cuts: Kernel, guests: Pair, flags: int) -> None:
    for whole in replace(TCP4, flags=flags, urgent=9), replace(TCP4, version=6, flags=flags):
        same_as_kernel(cuts, guests, [(whole, kind_of(whole), 1000, [])])


def test_a_frame_of_64_kib_is_cut_as_the_kernel_cuts_it(cuts: Kernel, guests: Pair) -> None:
    tags = b"\x88\xa8\0\5\x81\0\0\6"
    for whole in replace(TCP4, payload=data(65535 - 40), tags=tags), replace(UDP6, payload=data(65535 - 48), tags=tags):
        same_as_kernel(cuts, guests, [(whole, kind_of(whole), 1448, [])])


@pytest.mark.parametrize("extensions", [(), (extension(8),), (extension(16, 60), extension(8, 43))], ids=len)
def test_a_checksum_that_comes_to_zero_is_the_kernels_or_ones(
    cuts: Kernel, guests: Pair, extensions: tuple[tuple[int, bytes], ...]
) -> None:
    whole = replace(TCP4, version=6, extensions=extensions)
    at = whole.l4 + whole.csum_offset
    first = whole.cut(1000)[0].frame()
    zero = replace(whole, urgent=int.from_bytes(first[at : at + 2], "big"))
    assert zero.cut(1000)[0].frame()[at : at + 2] in (b"\0\0", b"\xff\xff")
    same_as_kernel(cuts, guests, [(zero, kind_of(zero), 1000, [])])


# ---- joined ----

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> Offload:
    return Offload(tmp_path_factory.mktemp("offload"))


@needs_gcc
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 48), oddity=st.sampled_from([0, 0.05, 0.3]), piece=st.sampled_from([0, 500]))
def test_what_was_joined_the_kernel_cuts_into_the_burst_that_it_was(
    cuts: Kernel, offload: Offload, seed: int, oddity: float, piece: int
) -> None:
    burst = any_burst(random.Random(seed), oddity)
    joined = offload.join([each.raw for each in burst], ALL, piece)
    constant = {key_of(each.raw) for each in burst if not each.flow.step}
    frames: list[bytes] = []
    for header, whole in joined.frames:
        (size,) = struct.unpack("<H", header[4:6])
        payload = len(whole) - int.from_bytes(header[2:4], "little")
        frames += cuts.through(header, whole, -(-payload // size) if size else 1)
    done = by_flow([ones(each.done) for each in burst], constant)
    assert by_flow([ones(each) for each in frames], constant) == done


@pytest.fixture(scope="module")
def joins() -> Iterator[Kernel]:
    """It holds what it joins beyond the one frame that it is handed at a time, for longer than a test sends."""
    with veth(mtu=9000) as pair:
        pair.namespace.run("ethtool", "-K", pair.peer, "gro", "on", "rx-udp-gro-forwarding", "on")
        flush = f"echo 20000000 > /sys/class/net/{pair.peer}/gro_flush_timeout"
        command("ip", "netns", "exec", pair.namespace.name, "sh", "-c", flush)  # which has a /sys of its own
        with closing(Kernel(pair)) as made:
            yield made


@st.composite
def streams(draw: st.DrawFn) -> list[Segment]:
    """A flow as a sender cuts it that fits into one frame."""
    protocol, version = draw(st.sampled_from([TCP, UDP])), draw(st.sampled_from([4, 6]))
    size = draw(st.integers(8, 60) | st.integers(500, 1460))
    whole = Segment(
        version=version,
        protocol=protocol,
        payload=data(draw(st.integers(size + 1, min(BURST // 2, 60000 // size) * size)), draw(st.integers(0, 1 << 30))),
        tos=draw(st.integers(0, 255)),
        ttl=draw(st.integers(1, 255)),
        ident=draw(st.integers(0xFFF0, 0xFFFF) | st.integers(0, 0xFFFF)),
        fragment=draw(st.sampled_from([0, 0x4000])),
        flow=draw(st.integers(0, 0xFFFFF)),
        ports=(draw(st.integers(1, 0xFFFF)), draw(st.integers(1, 0xFFFF))),
        seq=draw(st.integers(0, 0xFFFFFFFF) | st.integers(0xFFFF0000, 0xFFFFFFFF)),
        ack=draw(st.integers(0, 0xFFFFFFFF)),
        flags=ACK | draw(st.sampled_from([0, ECE])) | draw(st.sampled_from([0, PSH])),
        window=draw(st.integers(0, 0xFFFF)),
        options=draw(st.sampled_from([b"", b"\1\1\x08\x0a" + bytes(8)])) if protocol == TCP else b"",
    )
    return whole.cut(size)


@needs_gcc
@settings(max_examples=100, deadline=None)
@given(parts=streams())
def test_a_stream_is_joined_into_the_frame_that_the_kernel_joins_it_into(
    joins: Kernel, offload: Offload, parts: list[Segment]
) -> None:
    frames = [each.frame() for each in parts]
    (ours,) = offload.join(frames, ALL).frames
    # What the kernel holds it lets go at the next tick of its clock: a burst may be too slow for it.
    for _ in range(50):
        for each in frames:
            joins.send(PLAIN, each)
        got = [joins.receive(PATIENCE_S)]
        while (more := joins.receive(0 if got[0] and got[0][1] == ours[1] else 0.1)) is not None:
            got.append(more)
        if len(got) == 1:
            break
    assert got[0] is not None
    header, frame = got[0]
    assert frame == ours[1]
    # hdr_len is a hint, and the kernel's is another.
    assert (header[:2], header[4:10]) == (ours[0][:2], ours[0][4:10])
    assert header[1] in (1, 4, USO)
