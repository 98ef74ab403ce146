"""Rings of either layout against a plain model of a virtqueue: who has which buffer, and what must come back, in which
order and how long. Rings are tiny, of odd sizes where that is legal, and stopped, started and reset at any moment.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rig.driver import Driver, Layout, ledger
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.rings import EVENT_IDX, IN_ORDER, INDIRECT_DESC, MERGEABLE, RING_PACKED, VERSION_1, Buffer, Ring
from tests.rig.waiting import eventually
from xdpnet import core

pytestmark = pytest.mark.core


@pytest.fixture(scope="module", autouse=True)
def held_time() -> Iterator[None]:
    """No frame waits for too long."""
    core.time_hold()
    yield
    core.time_release()


Shape = tuple[tuple[int, int, int], int]  # layout, size, base; features


class Model:
    """One ring: chains in the order in which they were posted, and how many descriptors the device has taken."""

    def __init__(self, num: int, packed: bool, base: int) -> None:
        self.num = num
        self.packed = packed
        self.index, self.wrap = (base & 0x7FFF, base >> 15) if packed else (base, 0)
        self.posted: deque[tuple[int, int, int]] = deque()  # head or id, capacity, descriptors
        self.waiting: deque[bytes] = deque()

    def base(self) -> int:
        return (self.index | self.wrap << 15) * 0x10001 if self.packed else self.index

    def take(self) -> tuple[int, int]:
        """The oldest chain comes back: its head or id, and its capacity."""
        ident, capacity, descriptors = self.posted.popleft()
        if not self.packed:
            self.index = (self.index + 1) % 65536
            return ident, capacity
        self.index += descriptors
        if self.index >= self.num:
            self.index -= self.num
            self.wrap ^= 1
        return ident, capacity

    def receive(self, need: int, mergeable: bool) -> tuple[list[tuple[int, int]], str]:
        """What comes back (head or id, length) for a packet of so many bytes, and why it is dropped, or ""."""
        capacities: list[int] = []
        for _, capacity, _ in self.posted:
            capacities.append(capacity)
            if not capacity or (not mergeable and capacity < need):
                return [(self.take()[0], 0) for _ in capacities], "too_small"
            if sum(capacities) >= need:
                break
        else:
            # Not even all that the ring can have are enough.
            full = (
                sum(descriptors for *_, descriptors in self.posted) if self.packed else len(self.posted)
            ) == self.num
            return [], "no_buffer" if full else "waits"
        back = []
        for _ in capacities:
            ident, capacity = self.take()
            back.append((ident, min(capacity, need)))
            need -= back[-1][1]
        return back, ""


@dataclass(frozen=True)
class Post:
    sizes: Sequence[int]
    direct: int | None


@dataclass(frozen=True)
class Send:
    frames: Sequence[tuple[int, Sequence[int], int | None]]  # size, cuts, direct


@dataclass(frozen=True)
class Restart:
    sender: bool
    anew: bool  # the driver forgets its ring as well


@dataclass(frozen=True)
class Calls:
    sender: bool
    wanted: bool
    ahead: int


direct = st.sampled_from([None, None, 0])
posts = st.builds(Post, st.lists(st.sampled_from([0, 1, 5, 12, 40, 200, 1600]), min_size=1, max_size=4), direct)
sends = st.builds(
    Send,
    st.lists(
        st.tuples(st.sampled_from([0, 5, 14, 60, 61, 300, 1500]), st.lists(st.integers(0, 15), max_size=3), direct),
        min_size=1,
        max_size=6,
    ),
)
steps = st.lists(
    st.one_of(
        posts, posts, sends, sends, st.builds(Restart, st.booleans(), st.booleans()),
        st.builds(Calls, st.booleans(), st.booleans(), st.integers(0, 7)),
    ),
    max_size=40,
)  # fmt: skip
features = st.sets(st.sampled_from([MERGEABLE, EVENT_IDX, INDIRECT_DESC, IN_ORDER])).map(lambda s: sum(s) | VERSION_1)
split = st.tuples(st.just(0), st.sampled_from([1, 2, 4, 8]), st.integers(0, 0xFFFF))
packed = st.tuples(st.just(RING_PACKED), st.integers(1, 8) | st.sampled_from([11, 13]), st.integers(0, 0xFFFF))
shapes = st.tuples(st.one_of(split, packed), features)


class Play:
    """A guest that sends and one that receives, each with the model of its ring."""

    def __init__(self, bridge: core.Bridge, sender: Shape, receiver: Shape) -> None:
        self.bridge = bridge
        self.drivers: list[Driver] = []
        self.models: list[Model] = []
        for number, ((layout, num, base), bits) in enumerate([sender, receiver]):
            first = (base & 0x7FFF) % num | base & 0x8000 if layout else base
            driver = Driver(bridge, features=bits | layout, num=num, base=first)
            driver.port.set_mac(mac(number), False)
            self.drivers.append(driver)
            self.models.append(Model(num, bool(layout), first))
        self.a, self.b = self.drivers
        self.sent, self.received = self.models
        self.rings: list[Ring] = [self.a.pair.tx, self.b.pair.rx]
        self.drops = {"short": 0, "runt": 0, "no_buffer": 0, "too_small": 0, "not_ready": 0}
        self.count = 0

    def post(self, step: Post) -> None:
        indirect = step.direct if self.b.features & INDIRECT_DESC else None
        buffers = [Buffer(self.b.memory.take(max(size, 1)), size) for size in step.sizes]
        with contextlib.suppress(MemoryError):
            ident = self.b.pair.rx.add(buffers, writable=True, direct=indirect)
            self.received.posted.append((ident, sum(step.sizes), 1 if indirect == 0 else len(buffers)))
            self.b.pair.rx.kick()
            self.check_received(*self.deliver())

    def deliver(self) -> tuple[list[tuple[int, int]], list[bytes]]:
        """What comes back for the frames that wait, and the packets in it."""
        want: list[tuple[int, int]] = []
        packets: list[bytes] = []
        hdr, waiting = self.b.pair.hdr_len, self.received.waiting
        while waiting:
            back, drop = self.received.receive(hdr + len(waiting[0]), bool(self.b.features & MERGEABLE))
            if drop == "waits":
                break
            each = waiting.popleft()
            want += back
            if drop:
                self.drops[drop] += 1
            else:
                packets.append(bytes(10) + len(back).to_bytes(2, "little") + each)
        return want, packets

    def send(self, step: Send) -> None:
        hdr = self.a.pair.hdr_len
        heads: list[int] = []
        for size, cuts, wish in step.frames:
            indirect = wish if self.a.features & INDIRECT_DESC else None
            self.count += 1
            each = frame(BROADCAST, mac(0), size, mark=self.count.to_bytes(4, "big"))
            fit = [cut for i, cut in enumerate(cuts) if sum(cuts[: i + 1]) <= hdr + size]
            try:
                heads.append(self.a.pair.queue(each, Layout("drawn", lambda _, fit=fit: fit, indirect)))  # type: ignore[misc]
            except MemoryError:
                break
            self.sent.posted.append((heads[-1], 0, 1 if indirect == 0 else len(fit) + 1))
            if size < 14:
                self.drops["short" if not size else "runt"] += 1
                continue
            self.received.waiting.append(each)
        if not heads:
            return
        self.a.pair.tx.kick()
        assert eventually(lambda: self.a.pair.tx.pending() == len(heads))
        self.check_sent(heads)
        self.check_received(*self.deliver())

    def check_sent(self, heads: list[int]) -> None:
        assert [self.sent.take()[0] for _ in heads] == heads
        back = self.a.pair.tx.collect()
        assert [(head, written) for head, written, _ in back] == [(head, 0) for head in heads]

    def check_received(self, want: list[tuple[int, int]], packets: list[bytes]) -> None:
        assert eventually(lambda: self.b.pair.rx.pending() >= len(want))
        assert eventually(lambda: self.b.state(core.RX).waiting == len(self.received.waiting))
        back = self.b.pair.rx.collect()
        assert [(head, written) for head, written, _ in back] == want
        data = b""
        for _, written, chain in back:
            for buffer in chain.buffers:
                part = min(buffer.size, written)
                data += self.b.memory.read(buffer.addr, part)
                written -= part
        assert data == b"".join(packets)

    def restart(self, step: Restart) -> None:
        index = core.TX if step.sender else core.RX
        if not step.sender:
            self.drops["not_ready"] += len(self.received.waiting)
            self.received.waiting.clear()
        driver, model, ring = (self.drivers[not step.sender], self.models[not step.sender], self.rings[not step.sender])
        if step.anew:
            driver.restart(index)
            self.models[not step.sender] = model = Model(ring.num, model.packed, ring.default_base)
            self.sent, self.received = self.models
            return
        base = driver.port.ring_stop(index)
        assert base == model.base()
        driver.port.ring_start(index, ring.config(base=base))

    def calls(self, step: Calls) -> None:
        ring = self.rings[not step.sender]
        if step.wanted:
            ring.want_call(step.ahead % ring.num)
        else:
            ring.want_no_call()


@settings(max_examples=150, deadline=None)
@given(shapes, shapes, steps)
def test_what_comes_back_is_what_a_plain_model_says(sender: Shape, receiver: Shape, played: list[object]) -> None:
    with core.Bridge(workers=1, spin_us=20) as bridge:
        play = Play(bridge, sender, receiver)
        try:
            bridge.start()
            for driver in play.drivers:
                driver.start()
            for step in played:
                match step:
                    case Post():
                        play.post(step)
                    case Send():
                        play.send(step)
                    case Restart():
                        play.restart(step)
                    case Calls():
                        play.calls(step)
            for index, driver, model in (core.TX, play.a, play.sent), (core.RX, play.b, play.received):
                assert driver.state(index).broken == ""
                assert driver.port.ring_stop(index) == model.base()
            play.drops["not_ready"] += len(play.received.waiting)
            drops = {**play.a.drops(core.TX), **play.b.drops(core.RX)}
            assert drops == {name: n for name, n in play.drops.items() if n}
            into, out = ledger(bridge, {play.a.port: 1, play.b.port: 1})
            assert into == out
        finally:
            for driver in play.drivers:
                driver.close()
