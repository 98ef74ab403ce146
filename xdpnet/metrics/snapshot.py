"""The one Snapshot that the table, the JSON and the Prometheus metrics are made of.

Values only: take.py reads them from the running daemon; another process reads them from the control socket's JSON.
rx and tx of a guest are the guest's own view: tx is what it sent. On an interface rx comes from the wire.
Invariant, exact when no frame is on its way: into the bridge + copies + segments = out of it + joined + drops + those
that wait for receive buffers.

Counters never run backwards; field names are those of c/xdpnet.h, with "available" and "last" spelled out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from xdpnet.counters import Traffic, VhostUser, Work, XdpStatistics
from xdpnet.states import UP, State


@dataclass(frozen=True, slots=True)
class Ring:
    """A guest's ring; the four indices are free-running modulo 2^16, as they stand in the guest's memory.

    waiting: frames that wait for receive buffers.
    """

    size: int
    started: bool
    enabled: bool
    broken: str
    worker: int
    available: int
    used: int
    available_event: int
    used_event: int
    last_available: int
    waiting: int
    packed: bool = False


@dataclass(frozen=True, slots=True)
class Xsk:
    """An interface's AF_XDP socket: its statistics, where its frames are, how many are sent from guest memory just now.

    zerocopy is the driver's; umem is the size of its memory in bytes, guests' included.
    """

    open: bool
    zerocopy: bool
    statistics: XdpStatistics
    frames_free: int
    frames_fill: int
    frames_tx: int
    in_flight: int
    umem: int


@dataclass(frozen=True, slots=True)
class Queue:
    number: int
    rx: Traffic
    tx: Traffic
    rx_ring: Ring | None = None
    tx_ring: Ring | None = None
    xsk: Xsk | None = None


@dataclass(frozen=True, slots=True)
class Offence:
    """The last frame of a guest that was dropped as `reason`: source, destination and EtherType.

    ip: the address that it speaks for; empty: none that is known.
    """

    reason: str
    source: str
    destination: str
    type: int
    ip: str
    age_s: float

    def __str__(self) -> str:
        """Whom it is about, in words."""
        if self.reason == "spoof":
            return f"from {self.source}"
        return f"as {self.ip}" if self.ip else f"to {self.destination}, EtherType {self.type:#06x}"


@dataclass(slots=True, kw_only=True)
class Guest(VhostUser):
    """A vhost-user socket, its features as negotiated; a copy of what is counted of it.

    mtu: what the guest was told that it may send, by the configuration or its frontend; 0: nothing.
    """

    socket: str
    client: bool
    connected: bool
    mac: str
    features: tuple[str, ...]
    mtu: int = 0
    state: State = UP
    offences: tuple[Offence, ...] = ()


@dataclass(frozen=True, slots=True)
class Netdev:
    """A network interface; mode is the one that XDP was attached in.

    zerocopy: the driver reads and writes frames where they lie. policy: whether they may lie in guest memory.
    group_lost: group-addressed frames that found the buffer of the AF_PACKET socket full.
    unserved: its receive queues that have no AF_XDP socket. Queues that it had once stay in the books.
    """

    interface: str
    ifindex: int
    alive: bool
    mode: str
    zerocopy: bool
    policy: str
    verdicts: dict[str, int]
    group_lost: int
    unserved: int
    mtu: int = 0  # 0: away


@dataclass(frozen=True, slots=True)
class Port:
    """A guest or an interface; the other one of guest and netdev is None. given, learned: how many addresses it has.

    busy_cycles: what the workers have spent on it.
    """

    name: str
    number: int
    queues: tuple[Queue, ...]
    guest: Guest | None = None
    netdev: Netdev | None = None
    given: int = 0
    learned: int = 0
    busy_cycles: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker(Work):
    """stalled_at: where it has been for stalled_s seconds without going on, as in Stall; empty and 0 while it does.

    cpu_s: seconds that its thread has run for.
    """

    number: int
    cpu: int
    tid: int
    cpu_s: float = 0.0
    stalled_s: float = 0.0
    stalled_at: str = ""


@dataclass(frozen=True, slots=True)
class Address:
    """An entry of the forwarding table; vlan -1 stands for any."""

    mac: str
    vlan: int
    port: str
    static: bool
    age_s: int


@dataclass(frozen=True, slots=True)
class Totals:
    """frames_in + copies + segments = frames_out + joined + drops + waiting, but for frames on their way meanwhile.

    segments: more frames than one that large ones became; joined: frames that became part of the one before; waiting:
    frames that wait for receive buffers.
    """

    frames_in: int
    frames_out: int
    copies: int
    segments: int
    joined: int
    drops: int
    waiting: int

    @property
    def rest(self) -> int:
        """Frames on their way while this was read; never lost ones, which are in drops."""
        gone = self.frames_out + self.joined + self.drops + self.waiting
        return self.frames_in + self.copies + self.segments - gone


@dataclass(frozen=True, slots=True)
class Snapshot:
    version: str
    time: float  # seconds of CLOCK_MONOTONIC: what rates divide by
    uptime_s: float
    totals: Totals
    ports: tuple[Port, ...]
    workers: tuple[Worker, ...]
    addresses: tuple[Address, ...]  # all of the guests, some of the wire

    def to_json(self) -> bytes:
        return _adapter().dump_json(self)

    @classmethod
    def from_json(cls, document: Any) -> "Snapshot":
        """The snapshot that another process took; ValueError if it is of another version."""
        return _adapter().validate_python(document)


@cache
def _adapter() -> TypeAdapter[Snapshot]:
    """A hundred guests have megabytes of it: by far quicker than dataclasses.asdict()."""
    return TypeAdapter(Snapshot)


def total(ports: Iterable[Port], gone: tuple[Traffic, Traffic] | None = None) -> Totals:
    """The bridge's books: what guests sent and the wire brought, against what was delivered, copied and lost.

    gone: the same of ports that were removed.
    """
    ways = [gone] if gone else []
    waiting = 0
    for port in ports:
        for queue in port.queues:
            ways.append((queue.tx, queue.rx) if port.guest else (queue.rx, queue.tx))
            waiting += queue.rx_ring.waiting if queue.rx_ring else 0
    return Totals(
        frames_in=sum(source.packets for source, _ in ways),
        frames_out=sum(sink.packets for _, sink in ways),
        copies=sum(source.copies for source, _ in ways),
        segments=sum(source.segments for source, _ in ways),
        joined=sum(source.joined for source, _ in ways),
        drops=sum(sum(source.drops.values()) + sum(sink.drops.values()) for source, sink in ways),
        waiting=waiting,
    )
