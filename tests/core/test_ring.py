"""What a guest may rightly do with descriptors, headers, indices and sizes, split and packed, through workers."""

import struct

import pytest

from tests.rig.driver import LAYOUTS, TOGETHER, Driver, Layout
from tests.rig.guests import BROADCAST, MakeGuest, Pair, both_layouts, frame, mac, packed_only, split_only
from tests.rig.rings import (
    BORDER,
    EVENT_IDX,
    INDIRECT,
    INDIRECT_DESC,
    LEGACY,
    MERGEABLE,
    MODERN,
    ONE_REGION,
    RING_PACKED,
    SPLIT_REGIONS,
    VERSION_1,
    WRAP,
    WRITE,
    Buffer,
)
from tests.rig.waiting import eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

HEADERS = {
    "12 bytes, mergeable": VERSION_1 | MERGEABLE,
    "12 bytes": VERSION_1,
    "10 bytes": LEGACY,
    "12, old": MERGEABLE,
}
each_header = pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
each_event = pytest.mark.parametrize("event", [0, EVENT_IDX], ids=["flags", "event index"])


# ---- layouts ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_header
@each_event
def test_b12_b20_frames_cross_in_every_layout_byte_for_byte(
    bridge: core.Bridge, guests: MakeGuest, layout: Layout, header: int, event: int
) -> None:
    """A packed ring has no chain of descriptors that ends in an indirect table: there, that is one table."""
    a = guests(bridge, features=header | event | INDIRECT_DESC)
    b = guests(bridge, features=header | event | INDIRECT_DESC)
    b.pair.fill()
    sent = [frame(BROADCAST, mac(1), size) for size in (14, 15, 31, 32, 33, 60, 64, 65, 1000, 1514, 1518)]
    for each in sent:
        a.pair.send(each, layout)
        assert a.pair.wait_sent()
    assert b.pair.frames(len(sent)) == sent
    assert (a.stats(core.TX).packets, a.stats(core.TX).bytes) == (len(sent), sum(map(len, sent)))
    assert (b.stats(core.RX).packets, b.stats(core.RX).bytes) == (len(sent), sum(map(len, sent)))


@each_header
def test_c33_the_received_header_is_all_zero_but_for_the_number_of_buffers(
    bridge: core.Bridge, guests: MakeGuest, header: int
) -> None:
    a, b = guests(bridge, features=header), guests(bridge, features=header)
    for buffer in (b.memory.take(2048) for _ in range(16)):
        b.memory.write(buffer, b"\xee" * 2048)
        b.pair.post_at(buffer, 2048)
    a.pair.send(frame(BROADCAST, mac(1)))
    (packet,) = b.pair.receive()
    wanted = bytes(10) if header == LEGACY else bytes(10) + b"\x01\x00"
    assert packet.header == wanted


def test_a_frame_between_guests_with_different_headers(bridge: core.Bridge, guests: MakeGuest) -> None:
    old, new = guests(bridge, features=LEGACY), guests(bridge, features=MODERN)
    old.pair.fill()
    new.pair.fill()
    for source, sink, address in (old, new, mac(1)), (new, old, mac(2)):
        source.pair.send(frame(BROADCAST, address))
        assert sink.pair.frames() == [frame(BROADCAST, address)]


@pytest.mark.parametrize("at", range(-40, 41, 10))
def test_b9_a_buffer_that_crosses_two_regions_is_one_frame(bridge: core.Bridge, guests: MakeGuest, at: int) -> None:
    a, b = guests(bridge, spans=SPLIT_REGIONS), guests(bridge, spans=SPLIT_REGIONS)
    sent = frame(BROADCAST, mac(1), 200)
    addr = BORDER - 30 - at
    a.memory.write(addr, bytes(12) + sent)
    b.pair.post_at(BORDER - 40 - at, 2048)
    a.pair.tx.add([Buffer(addr, 212)], writable=False, owned=False)
    a.pair.tx.kick()
    assert b.pair.frames() == [sent]


@pytest.mark.parametrize("entry", range(4))
def test_b18_an_indirect_table_that_crosses_two_regions(bridge: core.Bridge, guests: MakeGuest, entry: int) -> None:
    a, b = guests(bridge, spans=SPLIT_REGIONS), guests(bridge)
    b.pair.fill()
    sent = frame(BROADCAST, mac(1), 100)
    buffers = a.pair.buffers_for(bytes(12) + sent, [12, 20])
    table = BORDER - 8 - 16 * entry  # the border goes through a descriptor, not only between two
    a.pair.tx.write_table(table, [(buffer.addr, buffer.size, 0) for buffer in buffers])
    post_indirect(a, table, 48)
    assert b.pair.frames() == [sent]


def post_indirect(driver: Driver, table: int, size: int, flags: int = INDIRECT) -> None:
    driver.pair.tx.raw((table, size, flags))
    driver.pair.tx.kick()


def test_an_indirect_table_may_lie_at_an_odd_address(pair: Pair) -> None:
    a, b = pair
    sent = frame(mac(2), mac(1))
    (buffer,) = a.pair.buffers_for(bytes(12) + sent, [])
    table = a.memory.take(64) + 1
    a.pair.tx.write_table(table, [(buffer.addr, buffer.size, 0)])
    post_indirect(a, table, 16)
    assert b.pair.frames() == [sent]


def test_b16_the_write_flag_of_an_indirect_descriptor_is_ignored(pair: Pair) -> None:
    a, b = pair
    sent = frame(mac(2), mac(1))
    (buffer,) = a.pair.buffers_for(bytes(12) + sent, [])
    table = a.memory.take(64)
    a.pair.tx.write_table(table, [(buffer.addr, buffer.size, 0)])
    post_indirect(a, table, 16, flags=INDIRECT | WRITE)
    assert b.pair.frames() == [sent]


@pytest.mark.parametrize("size", [14, 59, 1514, 9014, 65535 + 22])
def test_frames_of_every_legal_size_pass_through_big_buffers(pair: Pair, size: int) -> None:
    a, b = pair
    b.pair.rx.collect()
    b.restart(0)
    b.pair.post(2, 1 << 17)
    a.pair.send(frame(mac(2), mac(1), size))
    assert b.pair.frames() == [frame(mac(2), mac(1), size)]


# ---- what is too short, too long, or asks for too much ----


@pytest.mark.parametrize(
    ("size", "reason"),
    [(-12, "short"), (-1, "short"), (0, "short"), (1, "runt"), (13, "runt"), (65535 + 23, "oversize")],
)
def test_b10_b11_b13_c13_c14_a_chain_without_a_legal_frame_is_dropped_and_handed_back(
    pair: Pair, size: int, reason: str
) -> None:
    a, b = pair
    packet = (bytes(12) + frame(mac(2), mac(1), max(size, 0)))[: 12 + size]
    buffers = a.pair.buffers_for(packet, []) if packet else [Buffer(0, 0)]
    a.pair.tx.add(buffers, writable=False, owned=False)
    a.pair.tx.kick()
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {reason: 1}
    still_works(a, b)


def still_works(a: Driver, b: Driver) -> None:
    a.pair.send(frame(mac(2), mac(1), mark=b"after"))
    assert b.pair.frames() == [frame(mac(2), mac(1), mark=b"after")]


@pytest.mark.parametrize(
    ("header", "reason"),
    [(b"\x01", "csum"), (b"\x00\x01", "gso_type"), (b"\x00\x83", "gso_type"), (b"\x01\x05", "gso_type")],
    ids=["csum", "tso4", "ecn", "udp"],
)
def test_an_offload_that_was_not_negotiated_is_dropped(pair: Pair, header: bytes, reason: str) -> None:
    a, b = pair
    a.pair.send(frame(mac(2), mac(1)), header=header.ljust(12, b"\0"))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {reason: 1}
    still_works(a, b)


def test_header_fields_without_a_meaning_are_ignored(pair: Pair) -> None:
    a, b = pair
    a.pair.send(frame(mac(2), mac(1)), header=b"\xfe\x00" + b"\xff" * 10)
    (packet,) = b.pair.receive()
    assert packet.header == bytes(10) + b"\x01\x00"


@pytest.mark.parametrize(("pieces", "passes"), [(1024, True), (1025, False)])
def test_a_chain_of_1024_pieces_passes_and_one_more_is_dropped(
    bridge: core.Bridge, guests: MakeGuest, pieces: int, passes: bool
) -> None:
    a, b = guests(bridge, num=2048), guests(bridge)
    b.pair.fill(4096)
    sent = frame(BROADCAST, mac(1), 1500)
    a.pair.send(sent, Layout("many", lambda _: [1] * (pieces - 1)))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == ({} if passes else {"pieces": 1})
    assert b.pair.frames(int(passes)) == [sent] * passes


def test_a_burst_of_long_chains_all_pass_in_order(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, num=32768), guests(bridge)
    b.pair.fill(4096)
    sent = [frame(BROADCAST, mac(1), 1500, mark=bytes([i])) for i in range(20)]
    for each in sent:
        a.pair.queue(each, Layout("many", lambda _: [1] * 1000))
    a.pair.tx.kick()
    assert a.pair.wait_sent()
    assert b.pair.frames(20) == sent


# ---- mergeable receive buffers ----


@pytest.mark.parametrize("size", [1, 11, 12, 13, 64, 100, 700])
def test_a_frame_is_spread_over_as_many_small_buffers_as_it_takes(
    bridge: core.Bridge, guests: MakeGuest, size: int
) -> None:
    a, b = guests(bridge), guests(bridge, num=2048)
    b.pair.post(2048, size)
    sent = [frame(BROADCAST, mac(1), length) for length in (60, 700, 333)]
    a.pair.send_all(sent)
    packets = b.pair.receive(3)
    assert [packet.frame for packet in packets] == sent
    for packet in packets:
        whole = 12 + len(packet.frame)
        assert packet.lengths == (size,) * (whole // size) + ((whole % size,) if whole % size else ())
        assert packet.num_buffers == len(packet.lengths)


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 9, 30], [0, 12, 0]], ids=str)
def test_receive_buffers_of_several_descriptors(bridge: core.Bridge, guests: MakeGuest, pieces: list[int]) -> None:
    a, b = guests(bridge), guests(bridge)
    b.pair.post(4, 1000, pieces)
    b.pair.post(4, 1000, pieces, direct=0)
    b.pair.post(4, 1000, pieces, direct=1)
    sent = [frame(BROADCAST, mac(1), 900, mark=bytes([i])) for i in range(12)]
    a.pair.send_all(sent)
    assert b.pair.frames(12) == sent


def test_a_frame_with_too_few_mergeable_buffers_takes_none_of_them(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge), guests(bridge)
    b.pair.post(9, 100)
    a.pair.send(frame(BROADCAST, mac(1), 1000))
    assert a.pair.wait_sent()
    assert b.waiting() == 1
    assert b.pair.rx.returned() == 0
    b.pair.post(2, 100)
    assert b.pair.frames() == [frame(BROADCAST, mac(1), 1000)]
    assert b.drops(core.RX) == {}


def test_many_frames_into_small_buffers_fill_the_core_s_scratch_more_than_once(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    a, b = guests(bridge), guests(bridge, num=32768)
    b.pair.post(32768, 12)
    sent = [frame(BROADCAST, mac(1), 500, mark=bytes([i])) for i in range(63)]
    a.pair.send_all(sent)
    assert b.pair.frames(63) == sent
    assert b.drops(core.RX) == {}


def test_a_frame_that_needs_more_buffers_than_the_core_gathers_does_not_stop_the_ring(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    a, b = guests(bridge), guests(bridge, num=32768)
    b.pair.post(32768, 1)
    a.pair.send_all([frame(BROADCAST, mac(1), 9000), frame(BROADCAST, mac(1), 100)])
    assert b.pair.frames() == [frame(BROADCAST, mac(1), 100)]
    assert b.drops(core.RX) == {"too_small": 1}


# ---- receive buffers that fit nothing ----


def test_a_buffer_too_small_for_the_frame_is_handed_back_empty_without_mergeable_buffers(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    a, b = guests(bridge), guests(bridge, features=VERSION_1)
    b.pair.post(1, 12 + 99)
    b.pair.post(2, 12 + 100)
    sent = frame(BROADCAST, mac(1), 100)
    a.pair.send_all([sent, sent])
    assert b.pair.frames() == [sent]
    assert len(b.pair.handed_back) == 1
    assert b.drops(core.RX) == {"too_small": 1}


def test_small_buffers_behind_frames_that_fit_stop_nothing(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge), guests(bridge, features=VERSION_1)
    for _ in range(8):
        b.pair.post(2, 2048)
        b.pair.post(1, 20)
    sent = [frame(BROADCAST, mac(1), 100, mark=bytes([i])) for i in range(24)]
    a.pair.send_all(sent)
    got = b.pair.frames(16)
    assert got == [each for i, each in enumerate(sent) if i % 3 != 2]
    assert b.drops(core.RX) == {"too_small": 8}


@pytest.mark.parametrize("size", [0, 1])
@each_header
def test_a_ring_full_of_useless_buffers_is_emptied_and_usable_again(
    bridge: core.Bridge, guests: MakeGuest, header: int, size: int
) -> None:
    a, b = guests(bridge), guests(bridge, features=header, num=4)
    b.pair.post(4, size)
    for _ in range(8):
        a.pair.send(frame(BROADCAST, mac(1)))
        assert a.pair.wait_sent()
    if size and header & MERGEABLE:
        assert b.drops(core.RX) == {"no_buffer": 8}  # there is no room in the ring for more than these four bytes
        return
    assert b.drops(core.RX) == {"too_small": 4}
    assert b.waiting() == 4
    assert b.pair.receive(timeout=0) == []
    b.pair.post(4, 2048)
    assert b.pair.frames(4) == [frame(BROADCAST, mac(1))] * 4


# ---- indices and sizes ----


@pytest.mark.parametrize("num", [1, 2, 256, 32768])
@each_event
def test_b48_rings_of_every_size_wrap(bridge: core.Bridge, guests: MakeGuest, num: int, event: int) -> None:
    wrap_around(bridge, guests, num, event)


@packed_only
@pytest.mark.parametrize("num", [3, 5, 7, 255, 257, 32767])
@each_event
def test_b33_packed_rings_wrap_at_sizes_that_are_no_powers_of_two(
    bridge: core.Bridge, guests: MakeGuest, num: int, event: int
) -> None:
    wrap_around(bridge, guests, num, event)


def wrap_around(bridge: core.Bridge, guests: MakeGuest, num: int, event: int) -> None:
    features = VERSION_1 | event
    a, b = guests(bridge, features=features, num=num), guests(bridge, features=features, num=num)
    for burst in range(max(3, 600 // num)):
        count = min(num, 64)
        b.pair.post(min(count, b.pair.rx.room), 256)
        sent = [frame(BROADCAST, mac(1), mark=struct.pack("<HB", burst, i)) for i in range(count)]
        a.pair.send_all(sent)
        assert b.pair.frames(count) == sent


@packed_only
@each_event
@pytest.mark.parametrize("num", [3, 8, 32767, 32768])
@pytest.mark.parametrize("wrap", [WRAP, 0], ids=["wrap 1", "wrap 0"])
def test_a_packed_ring_starts_near_its_end_and_wraps(
    bridge: core.Bridge, guests: MakeGuest, num: int, event: int, wrap: int
) -> None:
    features = VERSION_1 | event
    a = guests(bridge, features=features, num=num, base=num - 1 | wrap)
    b = guests(bridge, features=features, num=num, base=num - 2 | wrap)
    for i in range(12):
        b.pair.post(1, 256)
        sent = frame(BROADCAST, mac(1), mark=bytes([i]))
        a.pair.send(sent)
        assert a.pair.wait_sent()
        assert b.pair.frames() == [sent]
    bases = [b.port.ring_stop(0), a.port.ring_stop(1)]
    for ring, base, first in (b.pair.rx, bases[0], num - 2), (a.pair.tx, bases[1], num - 1):
        laps, index = divmod(first + 12, num)
        assert base == (index | (wrap ^ WRAP if laps % 2 else wrap)) * 0x10001
        assert base == ring.base()


@packed_only
@each_event
def test_b48_long_chains_across_the_end_of_a_packed_ring(bridge: core.Bridge, guests: MakeGuest, event: int) -> None:
    a = guests(bridge, features=VERSION_1 | event, num=7)
    b = guests(bridge, features=VERSION_1 | event, num=11)
    for i in range(40):
        b.pair.post(1, 512, [12, 20, 7, 1][: i % 5])
        sent = frame(BROADCAST, mac(1), 200, mark=bytes([i]))
        a.pair.send(sent, Layout("drawn", lambda hdr, n=i % 7: [hdr, 3, 9, 1, 1, 1][:n]))  # type: ignore[misc]
        assert a.pair.wait_sent()
        assert b.pair.frames() == [sent]


@split_only
@each_event
def test_b2_indices_wrap_from_65535_to_0(bridge: core.Bridge, guests: MakeGuest, event: int) -> None:
    features = VERSION_1 | event
    a = guests(bridge, features=features, num=8, base=65530)
    b = guests(bridge, features=features, num=8, base=65533)
    for i in range(12):
        b.pair.post(1, 256)
        sent = frame(BROADCAST, mac(1), mark=bytes([i]))
        a.pair.send(sent)
        assert a.pair.wait_sent()
        assert b.pair.frames() == [sent]
    assert a.state(core.TX).used_idx == a.state(core.TX).last_avail == (65530 + 12) & 0xFFFF
    assert b.state(core.RX).used_idx == b.state(core.RX).last_avail == (65533 + 12) & 0xFFFF


SPLIT_STARTS = [(1, 0, True), (1, 65535, True), (32768, 65535, True), (0, 0, False), (3, 0, False), (32769, 0, False)]
SPLIT_STARTS += [(65536, 0, False), (2**31, 0, False), (4, 65536, False)]
PACKED_STARTS = [(1, 0, True), (1, WRAP, True), (1, 1, False), (3, 2, True), (3, 2 | WRAP, True), (3, 3, False)]
PACKED_STARTS += [(3, 3 | WRAP, False), (32767, 32766 | WRAP, True), (32767, 32767, False), (32768, 65535, True)]
PACKED_STARTS += [(32769, 0, False), (0, 0, False), (0, WRAP, False), (65536, 0, False), (2**31, 0, False)]


@split_only
@pytest.mark.parametrize(("num", "base", "legal"), SPLIT_STARTS)
def test_the_sizes_and_indices_that_a_split_ring_may_start_with(
    bridge: core.Bridge, guests: MakeGuest, num: int, base: int, legal: bool
) -> None:
    start_with(bridge, guests, num, base, base, legal)


@packed_only
@pytest.mark.parametrize(("num", "base", "legal"), PACKED_STARTS)
def test_the_sizes_and_indices_that_a_packed_ring_may_start_with(
    bridge: core.Bridge, guests: MakeGuest, num: int, base: int, legal: bool
) -> None:
    """As the lower half of the base has it; the upper half, of the used ring, is the same when the ring is stopped."""
    start_with(bridge, guests, num, base, base * 0x10001, legal)


def start_with(bridge: core.Bridge, guests: MakeGuest, num: int, base: int, stopped_base: int, legal: bool) -> None:
    a = guests(bridge, started=False, num=32768)
    config = replace(a.pair.rx.config(), num=num, base=stopped_base)
    if legal:
        a.pair.rx.reset(base)
        a.port.ring_start(0, config)
        assert a.port.ring_stop(0) == stopped_base
    else:
        with pytest.raises(OSError, match=f"start ring 0 of port {a.port}: Invalid argument"):
            a.port.ring_start(0, config)


def replace(config: core.RingConfig, **fields: int) -> core.RingConfig:
    return core.RingConfig(**{name: fields.get(name, getattr(config, name)) for name in core.RingConfig.__slots__})


@pytest.mark.parametrize(("part", "align"), [("desc_addr", 16), ("avail_addr", 2), ("used_addr", 4)])
def test_a_misaligned_part_of_a_ring_is_refused(
    bridge: core.Bridge, guests: MakeGuest, packed: int, part: str, align: int
) -> None:
    a = guests(bridge, started=False)
    if packed and part == "avail_addr":
        align = 4
    config = a.pair.rx.config()
    with pytest.raises(OSError, match="Invalid argument"):
        a.port.ring_start(0, replace(config, **{part: getattr(config, part) + align // 2}))
    a.port.ring_start(0, config)


def test_a_ring_that_memory_makes_misaligned_is_refused(bridge: core.Bridge, guests: MakeGuest) -> None:
    """Aligned in the frontend's addresses, but the region begins at an odd place of its file."""
    a = guests(bridge, started=False)
    (region,) = a.memory.regions()
    config = a.pair.rx.config()
    for shift in 1, 2, 4, 8:
        shifted = core.Region(region.guest_addr, region.size - 64, region.user_addr, region.offset + shift, region.fd)
        a.port.set_memory([shifted])
        with pytest.raises(OSError, match="start ring 0"):
            a.port.ring_start(0, config)
    shifted = core.Region(region.guest_addr, region.size - 64, region.user_addr, region.offset + 16, region.fd)
    a.port.set_memory([shifted])
    a.port.ring_start(0, config)
    a.port.ring_stop(0)


@pytest.mark.parametrize("part", ["desc_addr", "avail_addr", "used_addr"])
def test_a_part_of_a_ring_must_lie_in_memory_to_its_last_byte(
    bridge: core.Bridge, guests: MakeGuest, part: str
) -> None:
    a = guests(bridge, started=False, num=256)
    sizes = [size for _, size in a.pair.rx.parts()]
    size = dict(zip(["desc_addr", "avail_addr", "used_addr"], sizes, strict=True))[part]
    (span,) = ONE_REGION
    end = span.user_addr + span.size
    last = (end - size) & ~15
    config = a.pair.rx.config()
    a.port.ring_start(0, replace(config, **{part: last}))
    a.port.ring_stop(0)
    for addr in last + 16, end, span.user_addr - 16, 0, 2**64 - 16:
        with pytest.raises(OSError, match="Bad address"):
            a.port.ring_start(0, replace(config, **{part: addr}))


# ---- starting and stopping ----


def base_after(packed: int, chains: int) -> int:
    """GET_VRING_BASE, so many single descriptors after the start."""
    return (WRAP | chains) * 0x10001 if packed else chains


def test_stop_and_start_go_on_where_the_ring_stood(pair: Pair, packed: int) -> None:
    a, b = pair
    for i in range(5):
        a.pair.send(frame(mac(2), mac(1), mark=bytes([i])))
        assert a.pair.wait_sent()
    assert len(b.pair.frames(5)) == 5
    bases = {driver: [base_after(packed, n) for n in done] for driver, done in ((a, [0, 5]), (b, [5, 0]))}
    assert (a.stop(), b.stop()) == (bases[a], bases[b])
    assert not a.state(core.TX).started
    a.pair.send(frame(mac(2), mac(1), mark=b"waits"))  # nobody looks: it stays in the ring
    for driver in b, a:
        for index, ring in enumerate(driver.rings()):
            driver.port.ring_start(index, ring.config(base=bases[driver][index]))
    assert b.pair.frames() == [frame(mac(2), mac(1), mark=b"waits")]
    assert a.pair.wait_sent()


@split_only
def test_a_split_ring_starts_where_its_used_index_stands(bridge: core.Bridge, guests: MakeGuest) -> None:
    """Whatever the frontend believes: it may have asked a backend that had just been started."""
    b = guests(bridge)
    b.pair.fill()
    a = guests(bridge, started=False, base=65535)
    for index, ring in enumerate(a.rings()):
        a.port.ring_start(index, ring.config(base=7))
        a.port.ring_enable(index, True)
    a.pair.send(frame(BROADCAST, mac(1)))
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]
    assert a.stop() == [65535, 0]


def test_after_stop_the_ring_is_left_alone(pair: Pair) -> None:
    a, b = pair
    b.stop()
    before = b.memory.snapshot()
    for _ in range(10):
        a.pair.send(frame(mac(2), mac(1)))
    assert a.pair.wait_sent()
    assert b.memory.changes(before, []) == []
    assert b.drops(core.RX) == {"not_ready": 10}


def test_stopping_twice_and_stopping_what_never_started_are_harmless(
    bridge: core.Bridge, guests: MakeGuest, packed: int
) -> None:
    a = guests(bridge, started=False)
    assert a.port.ring_stop(0) == 0
    a.start()
    assert a.stop() == a.stop() == [base_after(packed, 0)] * 2


def test_a_disabled_transmit_ring_throws_away_and_a_disabled_receive_ring_gets_nothing(pair: Pair) -> None:
    a, b = pair
    a.port.ring_enable(1, False)
    a.pair.send(frame(mac(2), mac(1)))
    assert a.pair.wait_sent()
    assert a.drops(core.TX) == {"disabled": 1}
    a.port.ring_enable(1, True)
    b.port.ring_enable(0, False)
    a.pair.send(frame(mac(2), mac(1)))
    assert a.pair.wait_sent()
    assert b.drops(core.RX) == {"not_ready": 1}
    assert b.pair.rx.returned() == 0
    b.port.ring_enable(0, True)
    still_works(a, b)


def test_features_that_change_the_layout_wait_for_stopped_rings(bridge: core.Bridge, guests: MakeGuest) -> None:
    a = guests(bridge)
    a.port.set_features(a.features | 1 << 5)
    for bit in EVENT_IDX, RING_PACKED:
        with pytest.raises(OSError, match=r"set features .*busy"):
            a.port.set_features(a.features ^ bit)
    a.stop()
    a.port.set_features(a.features ^ EVENT_IDX)


# ---- what the device may write ----


def test_the_device_writes_used_rings_and_posted_buffers_and_nothing_else(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    a, b = guests(bridge, spans=SPLIT_REGIONS), guests(bridge, spans=SPLIT_REGIONS)
    posted = [(b.memory.take(300) + 17, 200 + i) for i in range(40)]
    for addr, size in posted:
        b.pair.post_at(addr, size)
    for layout in LAYOUTS:
        for size in 60, 700:
            a.pair.queue(frame(BROADCAST, mac(1), size), layout)
    a.pair.tx.publish()
    before_a, before_b = a.memory.snapshot(), b.memory.snapshot()
    a.pair.tx.kick(always=True)
    assert eventually(lambda: a.pair.tx.returned() == 2 * len(LAYOUTS))
    assert eventually(lambda: b.stats(core.RX).packets == 2 * len(LAYOUTS))
    assert a.memory.changes(before_a, [area for ring in a.rings() for area in ring.device_areas()]) == []
    assert b.memory.changes(before_b, [*posted, *(area for ring in b.rings() for area in ring.device_areas())]) == []


def test_a_buffer_gets_the_frame_and_not_a_byte_more(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge), guests(bridge)
    addr = b.memory.take(4096)
    b.memory.write(addr, b"\xa5" * 4096)
    b.pair.post_at(addr + 1000, 2048)
    a.pair.send(frame(BROADCAST, mac(1), 77))
    (packet,) = b.pair.receive()
    assert packet.lengths == (89,)
    assert b.memory.read(addr, 1000) == b"\xa5" * 1000
    assert b.memory.read(addr + 1000 + 89, 3096 - 89) == b"\xa5" * (3096 - 89)


def test_frames_keep_their_order(pair: Pair) -> None:
    a, b = pair
    sent = [frame(mac(2), mac(1), mark=struct.pack("<I", i)) for i in range(3000)]
    got = []
    for start in range(0, 3000, 200):
        a.pair.send_all(sent[start : start + 200], TOGETHER)
        got += [packet.frame for packet in b.pair.receive(200)]
        b.pair.fill()
    assert got == sent
