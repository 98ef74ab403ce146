"""Properties of the data path over layouts, sizes and buffers that nobody thought of."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rig.driver import Driver, Layout, ledger
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.rings import EVENT_IDX, IN_ORDER, INDIRECT_DESC, MERGEABLE, RING_PACKED, SPLIT_REGIONS, VERSION_1, WRAP
from xdpnet import core

pytestmark = pytest.mark.core

features = st.sets(
    st.sampled_from([VERSION_1, MERGEABLE, EVENT_IDX, IN_ORDER, RING_PACKED, INDIRECT_DESC, IN_ORDER, RING_PACKED])
).map(sum)
pieces = st.lists(st.integers(0, 40), max_size=20)
frames = st.lists(
    st.tuples(st.integers(0, 1600), pieces, st.integers(0, 6), st.sampled_from([BROADCAST, mac(1), mac(2), mac(3)])),
    min_size=1,
    max_size=20,
)
buffers = st.lists(st.tuples(st.integers(0, 2000), pieces), max_size=40)


def fit(cuts: Sequence[int], total: int) -> list[int]:
    """The cuts that lie within the total."""
    kept: list[int] = []
    for size in cuts:
        if sum(kept) + size > total:
            break
        kept.append(size)
    return kept


def fit_base(base: int, ring_features: int, num: int) -> int:
    """Any number for a split ring; an index in the ring, and a wrap counter, for a packed one."""
    return (base & ~WRAP) % num | base & WRAP if ring_features & RING_PACKED else base


def is_subsequence(part: list[bytes], whole: list[bytes]) -> bool:
    rest = iter(whole)
    return all(any(each == other for other in rest) for each in part)


@settings(max_examples=120, deadline=None)
@given(features, features, frames, buffers, st.integers(0, 0xFFFF), st.sampled_from([1, 2, 3]))
def test_what_is_delivered_was_sent_and_what_was_sent_is_accounted_for(
    to_features: int,
    from_features: int,
    sent: list[tuple[int, list[int], int, bytes]],
    posted: list[tuple[int, list[int]]],
    base: int,
    workers: int,
) -> None:
    with core.Bridge(workers=workers, spin_us=0) as bridge:
        a = Driver(bridge, features=from_features, base=base, spans=SPLIT_REGIONS)
        b = Driver(bridge, features=to_features, base=base ^ 0xFFFF, num=1024)
        try:
            a.port.set_mac(mac(1), False)
            b.port.set_mac(mac(2), False)
            bridge.start()
            a.start()
            b.start()
            for size, cuts in posted:
                if b.pair.rx.room > len(cuts):
                    b.pair.post(1, size, fit(cuts, size))
            all_frames = []
            for number, (size, cuts, direct, to) in enumerate(sent):
                each = frame(to, mac(1), size, mark=bytes([number]))
                layout = Layout("drawn", lambda hdr, c=cuts, n=size: fit(c, hdr + n), direct)  # type: ignore[misc]
                if not from_features & INDIRECT_DESC:
                    layout = Layout("drawn", layout.cut)
                a.pair.queue(each, layout)
                all_frames.append(each)
                if number % 3 == 0:
                    a.pair.tx.kick()
            a.pair.tx.kick()
            assert a.pair.wait_sent()
            packets = b.pair.packets()
            # Unicast and group-addressed frames each keep their order.
            for group in (mac(2),), (BROADCAST, mac(3)):
                assert is_subsequence([p.frame for p in packets if p.frame[:6] in group], all_frames)
            assert len(packets) == b.stats(core.RX).packets
            assert sum(len(p.frame) for p in packets) == b.stats(core.RX).bytes
            if to_features & (VERSION_1 | MERGEABLE):
                assert all(p.header[:10] == bytes(10) for p in packets)
                assert all(p.num_buffers == len(p.lengths) for p in packets)
            assert a.stats(core.TX).packets == len(sent)
            assert a.state(core.TX).broken == b.state(core.RX).broken == ""
            into, out = ledger(bridge, {a.port: 1, b.port: 1})
            assert into == out == len(sent)
        finally:
            a.close()
            b.close()
