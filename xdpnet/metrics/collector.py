"""The Snapshot as Prometheus metrics, by prometheus-client: their names, labels and help are those of counters.py.

families() is a pure function of a snapshot. A metric has one value for whoever has its labels, or several, by what its
last labels tell them apart by.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from xdpnet import counters
from xdpnet.counters import Metric, Traffic, VhostUser, Work, XdpStatistics, declared
from xdpnet.metrics.snapshot import Guest, Netdev, Port, Ring, Snapshot, Worker, Xsk

Value = float | Mapping[Any, float]  # by one label, or a tuple of them
T = TypeVar("T")
Values = Mapping[Metric, Callable[[T], Value]]


def _fields(holder: type, within: str = "") -> dict[Metric, Callable[[object], Value]]:
    return {metric: attrgetter(within + name) for name, metric in declared(holder).items()}


WORKER: Values[Worker] = {
    **_fields(Work),
    counters.CPU: lambda worker: worker.cpu_s,
    counters.STALLED: lambda worker: worker.stalled_s,
}
PORT: Values[Port] = {
    counters.BUSY: lambda port: port.busy_cycles,
    counters.ADDRESSES: lambda port: {"static": port.given, "learned": port.learned},
}
TRAFFIC: Values[Traffic] = _fields(Traffic)
INDICES = ("available", "used", "available_event", "used_event", "last_available")
RING: Values[Ring] = {
    counters.RING_INDEX: lambda ring: {name: getattr(ring, name) for name in INDICES},
    counters.RING_SIZE: lambda ring: ring.size,
    counters.RING_UP: lambda ring: ring.started and ring.enabled and not ring.broken,
    counters.RING_BROKEN: lambda ring: {ring.broken: 1} if ring.broken else {},
    counters.WAITING: lambda ring: ring.waiting,
}
XSK: Values[Xsk] = {
    **_fields(XdpStatistics, "statistics."),
    counters.XSK_UP: lambda xsk: xsk.open,
    counters.XSK_FRAMES: lambda xsk: {
        "free": xsk.frames_free,
        "fill": xsk.frames_fill,
        "tx": xsk.frames_tx - xsk.in_flight,
        "in_place": xsk.in_flight,
    },
    counters.UMEM: lambda xsk: xsk.umem,
}
SOCKET: Values[Traffic] = {
    counters.SENT: lambda tx: {"in_place": tx.in_place, "copied": tx.packets - tx.in_place},
}
NETDEV: Values[Netdev] = {
    counters.NETDEV_UP: lambda netdev: netdev.alive,
    counters.XDP_INFO: lambda netdev: {(netdev.mode, str(netdev.zerocopy).lower(), netdev.policy): 1},
    counters.VERDICTS: lambda netdev: netdev.verdicts,
    counters.GROUP_LOST: lambda netdev: netdev.group_lost,
    counters.UNSERVED: lambda netdev: netdev.unserved,
    counters.NETDEV_MTU: lambda netdev: netdev.mtu,
}
GUEST: Values[Guest] = {
    counters.CONNECTED: lambda guest: guest.connected,
    counters.FEATURE: lambda guest: dict.fromkeys(guest.features, 1),
    counters.GUEST_MTU: lambda guest: guest.mtu,
    counters.GUEST_STATE: lambda guest: {guest.state.kind: 1},
    **_fields(VhostUser),
}


class SnapshotCollector(Collector):
    """Hands out the snapshot that was put into it last."""

    snapshot: Snapshot | None = None

    def collect(self) -> Iterable[Family]:
        return families(self.snapshot) if self.snapshot else ()

    def describe(self) -> Iterable[Family]:
        return ()


class StallCollector(Collector):
    """Of a daemon that can say no more than which workers do not go on, in seconds: it waits for them."""

    def __init__(self, stalls: Mapping[int, float]) -> None:
        self._stalls = stalls

    def collect(self) -> Iterable[Family]:
        yield _family(counters.STALLED, (((str(worker),), value) for worker, value in self._stalls.items()))


def registry(collector: SnapshotCollector) -> CollectorRegistry:
    """A registry of our own, with the process metrics beside ours."""
    made = CollectorRegistry()
    made.register(collector)
    ProcessCollector(registry=made)
    return made


def families(snapshot: Snapshot) -> Iterator[Family]:
    """Every metric of the daemon."""
    yield _family(counters.BUILD, [((), {snapshot.version: 1})])
    yield _family(counters.UPTIME, [((), snapshot.uptime_s)])
    yield from _families(WORKER, [((str(worker.number),), worker) for worker in snapshot.workers])
    ports = snapshot.ports
    yield from _families(PORT, [((port.name,), port) for port in ports])
    directions = [(port, *each) for port in ports for each in _directions(port)]
    for metric, read in TRAFFIC.items():
        whose = ((at, traffic) for port, at, traffic, _ in directions if port.guest or metric.of != "rings")
        yield _family(metric, ((at, read(traffic)) for at, traffic in whose))
    yield from _families(RING, [(at, ring) for _, at, _, ring in directions if ring])
    queues = [((port.name, str(queue.number)), queue) for port in ports for queue in port.queues if queue.xsk]
    yield from _families(XSK, [(at, queue.xsk) for at, queue in queues if queue.xsk])
    yield from _families(SOCKET, [(at, queue.tx) for at, queue in queues])
    yield from _families(NETDEV, [((port.name,), port.netdev) for port in ports if port.netdev])
    yield from _families(GUEST, [((port.name,), port.guest) for port in ports if port.guest])


def _directions(port: Port) -> Iterator[tuple[tuple[str, str, str], Traffic, Ring | None]]:
    for queue in port.queues:
        yield (port.name, str(queue.number), "rx"), queue.rx, queue.rx_ring
        yield (port.name, str(queue.number), "tx"), queue.tx, queue.tx_ring


def _families(values: Values[T], holders: Iterable[tuple[tuple[str, ...], T]]) -> Iterator[Family]:
    """holders: with their labels."""
    for metric, read in values.items():
        yield _family(metric, ((labels, read(holder)) for labels, holder in holders))


def _family(metric: Metric, values: Iterable[tuple[tuple[str, ...], Value]]) -> Family:
    """values: with the labels of whose they are."""
    made = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
        metric.name, metric.help, labels=metric.labels
    )
    for labels, value in values:
        if isinstance(value, Mapping):
            for which, number in value.items():
                made.add_metric([*labels, *((which,) if isinstance(which, str) else which)], number)
        else:
            made.add_metric(labels, value)
    return made
