"""A guest's side of a virtio-net card, in Python: a queue pair that sends and receives frames, and a driver of several.

QueuePair sends and receives frames on two rings of either layout; Driver is as many of them as the card has, attached
to a port of a core.Bridge. A wait has a deadline and sleeps on the call eventfd alone. virtio 1.3, 5.1.6.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from tests.rig.rings import MERGEABLE, MODERN, ONE_REGION, VERSION_1, Buffer, Chain, GuestMemory, Ring, Span, make_ring
from tests.rig.waiting import PATIENCE_S
from xdpnet import core
from xdpnet.counters import Traffic


@dataclass(frozen=True)
class Layout:
    """How a packet lies in descriptors: from the header's length the sizes of the pieces, but for the last."""

    name: str
    cut: Callable[[int], list[int]] = field(default=lambda hdr: [])  # noqa: ARG005
    direct: int | None = None  # as Ring.add

    def __str__(self) -> str:
        return self.name


TOGETHER = Layout("header and frame in one descriptor")
APART = Layout("header in its own descriptor", lambda hdr: [hdr])
CRUMBLED = Layout("header in one-byte descriptors", lambda hdr: [1] * hdr)
STRADDLING = Layout("header and first bytes in uneven descriptors", lambda hdr: [5, hdr, 1, 2, 3])
EMPTIES = Layout("empty descriptors in between", lambda hdr: [0, hdr, 0, 10, 0, 0])
ALL_INDIRECT = Layout("one indirect table", lambda hdr: [hdr, 7], direct=0)
MIXED = Layout("a descriptor, then an indirect table", lambda hdr: [hdr, 7, 7], direct=2)
LAYOUTS = (TOGETHER, APART, CRUMBLED, STRADDLING, EMPTIES, ALL_INDIRECT, MIXED)


@dataclass(frozen=True)
class Packet:
    """A received frame with its virtio_net_hdr, and what the device wrote into each of its buffers."""

    header: bytes
    frame: bytes
    lengths: tuple[int, ...]

    @property
    def num_buffers(self) -> int:
        return int.from_bytes(self.header[10:12], "little")


class QueuePair:
    """A receive and a transmit ring."""

    def __init__(self, memory: GuestMemory, features: int = MODERN, num: int = 256, base: int | None = None) -> None:
        self.memory = memory
        self.features = features
        self.hdr_len = 12 if features & (VERSION_1 | MERGEABLE) else 10
        self.rx = make_ring(memory, num, features, base)
        self.tx = make_ring(memory, num, features, base)
        self.handed_back: list[Chain] = []  # receive buffers that came back empty

    def close(self) -> None:
        self.rx.close()
        self.tx.close()

    # ---- sending ----

    def buffers_for(self, packet: bytes, cut: Sequence[int]) -> list[Buffer]:
        """Guest memory holding the packet, a buffer of its own for each piece."""
        sizes = [*cut, len(packet) - sum(cut)]
        buffers = []
        at = 0
        for size in sizes:
            buffer = Buffer(self.memory.take(max(size, 1)), size)
            self.memory.write(buffer.addr, packet[at : at + size])
            buffers.append(buffer)
            at += size
        return buffers

    def queue(self, frame: bytes, layout: Layout = TOGETHER, header: bytes | None = None) -> int:
        """Puts a frame into the transmit ring; kick() shows it. Returns its head or buffer id."""
        header = bytes(self.hdr_len) if header is None else header
        buffers = self.buffers_for(header + frame, layout.cut(len(header)))
        return self.tx.add(buffers, writable=False, direct=layout.direct)

    def send(self, frame: bytes, layout: Layout = TOGETHER, header: bytes | None = None) -> int:
        head = self.queue(frame, layout, header)
        self.tx.kick()
        return head

    def reap(self) -> list[int]:
        """Takes back what was sent; the lengths that the device reported (0 each, if it is right)."""
        return [self._give_back(written, chain) for _, written, chain in self.tx.collect()]

    def _give_back(self, written: int, chain: Chain) -> int:
        if chain.owned:
            for buffer in chain.buffers:
                self.memory.give(buffer.addr, max(buffer.size, 1))
        return written

    def wait_sent(self, timeout: float = PATIENCE_S) -> bool:
        """Until the device has taken all that was sent."""
        deadline = time.monotonic() + timeout
        while self.tx.chains:
            self.reap()
            if self.tx.chains and not self.tx.sleep(deadline):
                return False
        return True

    def send_all(self, frames: Iterable[bytes], layout: Layout = TOGETHER, timeout: float = PATIENCE_S) -> None:
        """Sends them all, waiting for room in the ring; kicks once a batch."""
        deadline = time.monotonic() + timeout
        for frame in frames:
            while True:
                try:
                    self.queue(frame, layout)
                    break
                except MemoryError:
                    self.tx.kick()
                    if not self.tx.sleep(deadline):
                        raise TimeoutError("the device takes no more frames") from None
                    self.reap()
        self.tx.kick()
        if not self.wait_sent(deadline - time.monotonic()):
            raise TimeoutError("the device does not take all frames")

    # ---- receiving ----

    def post(self, count: int, size: int = 2048, pieces: Sequence[int] = (), direct: int | None = None) -> None:
        """Posts receive buffers of `size` bytes, cut into `pieces` and the rest."""
        for _ in range(count):
            sizes = [*pieces, size - sum(pieces)]
            buffers = [Buffer(self.memory.take(max(part, 1)), part) for part in sizes]
            self.rx.add(buffers, writable=True, direct=direct)
        self.rx.kick()

    def post_at(self, addr: int, size: int) -> None:
        """Posts a receive buffer at a place of the test's choice."""
        self.rx.add([Buffer(addr, size)], writable=True, owned=False)
        self.rx.kick()

    def fill(self, size: int = 2048) -> None:
        """Posts a receive buffer for every free descriptor."""
        self.post(self.rx.room, size)

    def _next_packet(self) -> Packet | None:
        """The next whole packet; None: there is none yet. Buffers that came back empty are put aside."""
        while (entries := self.rx.collect(1)) and not entries[0][1]:
            self.handed_back.append(entries[0][2])
            self._give_back(0, entries[0][2])
        if not entries:
            return None
        parts = [self._read(entries[0])]
        # The buffers of one packet become visible together (5.1.6.4): no waiting here. The header may lie in several.
        while sum(map(len, parts)) < self.hdr_len or (
            self.features & MERGEABLE and len(parts) < int.from_bytes(b"".join(parts[:12])[10:12], "little")
        ):
            (entry,) = self.rx.collect(1)
            parts.append(self._read(entry))
        whole = b"".join(parts)
        return Packet(whole[: self.hdr_len], whole[self.hdr_len :], tuple(map(len, parts)))

    def _read(self, entry: tuple[int, int, Chain]) -> bytes:
        _, written, chain = entry
        data = b""
        for buffer in chain.buffers:
            data += self.memory.read(buffer.addr, min(buffer.size, written - len(data)))
        if len(data) != written:
            raise ValueError(f"the device wrote {written} bytes into a buffer of {len(data)}")
        self._give_back(written, chain)
        return data

    def packets(self) -> list[Packet]:
        """What is there now."""
        return list(iter(self._next_packet, None))

    def receive(self, count: int = 1, timeout: float = PATIENCE_S, refill: int = 0) -> list[Packet]:
        """At least `count` packets, fewer if they do not come; `refill` posts new buffers of that size as it goes."""
        deadline = time.monotonic() + timeout
        got = self.packets()
        while len(got) < count:
            if refill:
                self.fill(refill)
            if not self.rx.sleep(deadline):
                break
            got += self.packets()
        return got

    def drain(self, waiting: Callable[[], object]) -> None:
        """Takes all there is, for as long as frames wait for buffers; the ring is full of them then."""
        while waiting():
            self.fill()
            self.packets()
        self.packets()
        self.fill()

    def frames(self, count: int = 1, timeout: float = PATIENCE_S) -> list[bytes]:
        return [packet.frame for packet in self.receive(count, timeout)]


class Driver:
    """A guest on a port of a bridge: memory, features, and queue pairs that are started and enabled."""

    def __init__(
        self,
        bridge: core.Bridge,
        features: int = MODERN,
        num: int = 256,
        pairs: int = 1,
        spans: Sequence[Span] = ONE_REGION,
        base: int | None = None,
        memfd_flags: int = 0,
        memory: type[GuestMemory] = GuestMemory,
    ) -> None:
        self.bridge = bridge
        self.features = features
        self.memory = memory(spans, memfd_flags, prealloc=bridge.zerocopy != "off")  # else nothing of it is lent
        self.port = bridge.add_guest(pairs)
        self.port.set_memory(self.memory.regions())
        self.port.set_features(features)
        self.pairs = [QueuePair(self.memory, features, num, base) for _ in range(pairs)]

    @property
    def pair(self) -> QueuePair:
        return self.pairs[0]

    def rings(self) -> list[Ring]:
        """By ring index."""
        return [ring for pair in self.pairs for ring in (pair.rx, pair.tx)]

    def start(self, kick: bool = True, call: bool = True) -> Self:
        for index, ring in enumerate(self.rings()):
            # In this order: what a ring sends while it is started and disabled is thrown away.
            self.port.ring_enable(index, True)
            self.port.ring_start(index, ring.config(kick=kick, call=call))
        return self

    def restart(self, index: int) -> None:
        """As a driver resets a ring: stop, forget, start."""
        ring = self.rings()[index]
        self.port.ring_stop(index)
        for fd in ring.err_fd, ring.call_fd:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                continue
        ring.reset()
        self.port.ring_start(index, ring.config())

    def stop(self) -> list[int]:
        return [self.port.ring_stop(index) for index in range(2 * len(self.pairs))]

    def close(self) -> None:
        """Removes the port."""
        self.port.remove()
        for pair in self.pairs:
            pair.close()
        self.memory.close()

    def state(self, ring: int) -> core.RingState:
        return self.port.ring_state(ring)

    def stats(self, direction: int, pair: int = 0) -> Traffic:
        return self.port.queue_stats(pair, direction)

    def waiting(self, pair: int = 0) -> int:
        """Frames that wait for receive buffers."""
        return self.state(2 * pair + core.RX).waiting

    def drain(self) -> None:
        for number, pair in enumerate(self.pairs):
            pair.drain(partial(self.waiting, number))

    def drops(self, direction: int, pair: int = 0) -> dict[str, int]:
        """Only the reasons that occurred."""
        return {name: n for name, n in self.stats(direction, pair).drops.items() if n}


def ledger(bridge: core.Bridge, ports: dict[core.Guest, int]) -> tuple[int, int]:
    """Frames into the bridge with the copies made of them, and frames out with all drops and with what waits; by port
    and its queues, for guests, whose tx goes in and whose rx goes out."""
    into = out = 0
    for port, queues in ports.items():
        for queue in range(queues):
            tx = port.queue_stats(queue, core.TX)
            rx = port.queue_stats(queue, core.RX)
            into += tx.packets + tx.copies + tx.segments
            out += rx.packets + sum(rx.drops.values()) + sum(tx.drops.values())
            out += port.ring_state(2 * queue).waiting
    return into, out
