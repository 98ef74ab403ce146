"""The Snapshot as Prometheus metrics, by prometheus-client.

families() is a pure function of a snapshot; the names are the API and follow Prometheus' conventions: base units,
_total for counters, one family for what may be summed. Labels are bounded: ports by the configuration, the rest by the
core's enumerations; names are checked where they are configured.

Reference: https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from xdpnet.metrics.snapshot import XDP_STATISTICS, Port, Ring, Snapshot, Traffic

QUEUE = ("port", "queue", "direction")

# counter -> field of Traffic, help
TRAFFIC = {
    "packets": ("packets", "Frames that came in (guest tx, interface rx) or were delivered (guest rx, interface tx)."),
    "bytes": ("bytes", "Bytes of these frames, without virtio_net_hdr."),
    "copies": ("copies", "Copies beyond the first of frames that were flooded to several ports."),
    "bursts": ("bursts", "Polls that found something."),
    "frames_cut": ("cut", "Frames that stood for many and were cut into frames of the wire."),
    "segments": ("segments", "More frames than one that these became."),
    "frames_joined": ("joined", "Frames from the wire that became part of the one before, for the guest that took it."),
    "checksums_computed": ("csum_computed", "Interface tx: checksums made as frames, or segments, were copied."),
    "checksums_completed": (
        "csum_completed",
        "Checksums made for a guest that does not take partial ones, of frames or segments, or before fragmentation.",
    ),
    "checksums_partial": (
        "csum_partial",
        "Frames or segments with a partial checksum handed to a guest that takes such. Interface tx: to the interface.",
    ),
    "checksums_verified": ("csum_verified", "Checksums of frames from the wire that were found right."),
}
# of guests' queues; of an interface, the kicks alone
RINGS = {
    "kicks": ("kicks", "Guest queues: kicks taken. Interface tx: sendto() calls."),
    "kicks_saved": ("kicks_saved", "Guest queues: buffers found without a kick. Interface tx: bursts without one."),
    "calls": ("calls", "Interrupts sent to the guest."),
    "calls_saved": ("calls_saved", "Used buffers published for which the guest had asked no interrupt."),
    "chains": ("chains", "Descriptor chains taken from the guest."),
    "breaks": ("breaks", "Times that the ring was latched broken."),
    "unlearned": ("unlearned", "Times that a source address was not learned: the guest has taught as many as it may."),
    "waited": ("waited", "Frames that found no receive buffer and waited for one."),
}
XSK_HELP = {
    "rx_dropped": "Frames that the kernel dropped for reasons other than those counted apart.",
    "rx_invalid_descs": "Invalid descriptors in the fill ring.",
    "tx_invalid_descs": "Invalid descriptors in the tx ring.",
    "rx_ring_full": "Frames dropped because the rx ring was full.",
    "rx_fill_ring_empty_descs": "Frames dropped because the fill ring was empty.",
    "tx_ring_empty_descs": "Times that the kernel found the tx ring empty.",
}
INDICES = ("available", "used", "available_event", "used_event", "last_available")


class SnapshotCollector(Collector):
    """Hands out the snapshot that was put into it last."""

    snapshot: Snapshot | None = None

    def collect(self) -> Iterable[Metric]:
        return families(self.snapshot) if self.snapshot else ()

    def describe(self) -> Iterable[Metric]:
        return ()


class StallCollector(Collector):
    """Of a daemon that can say no more than which workers do not go on, in seconds: it waits for them."""

    def __init__(self, stalls: Mapping[int, float]) -> None:
        self._stalls = stalls

    def collect(self) -> Iterable[Metric]:
        yield stalled(self._stalls)


def stalled(seconds: Mapping[int, float]) -> Metric:
    """By worker."""
    family = GaugeMetricFamily(
        "xdpnet_worker_stalled_seconds", "Time for which the worker has not gone on; 0: it does.", labels=["worker"]
    )
    for worker, value in seconds.items():
        family.add_metric([str(worker)], value)
    return family


def registry(collector: SnapshotCollector) -> CollectorRegistry:
    """A registry of our own, with the process metrics beside ours."""
    made = CollectorRegistry()
    made.register(collector)
    ProcessCollector(registry=made)
    return made


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Every metric of the daemon."""
    yield from _daemon(snapshot)
    yield from _traffic(snapshot)
    yield from _rings(snapshot)
    yield from _xsk(snapshot)
    yield from _netdevs(snapshot)
    yield from _guests(snapshot)


def _daemon(snapshot: Snapshot) -> Iterator[Metric]:
    build = GaugeMetricFamily("xdpnet_build_info", "Version of the daemon.", labels=["version"])
    build.add_metric([snapshot.version], 1)
    yield build
    yield GaugeMetricFamily("xdpnet_uptime_seconds", "Time since the daemon's start.", value=snapshot.uptime_s)
    counters = {
        "loops": "Turns of the worker's loop.",
        "sleeps": "Times that the worker went to sleep.",
        "busy_cycles": "TSC cycles of turns that moved something.",
        "packets": "Frames that the worker took from any port.",
    }
    for name, text in counters.items():
        counter = CounterMetricFamily(f"xdpnet_worker_{name}", text, labels=["worker"])
        for worker in snapshot.workers:
            counter.add_metric([str(worker.number)], getattr(worker, name))
        yield counter
    yield stalled({worker.number: worker.stalled_s for worker in snapshot.workers})
    entries = GaugeMetricFamily("xdpnet_fdb_entries", "Addresses in the forwarding table.", labels=["port", "type"])
    for port in snapshot.ports:
        entries.add_metric([port.name, "static"], port.given)
        entries.add_metric([port.name, "learned"], port.learned)
    yield entries


def _directions(snapshot: Snapshot) -> Iterator[tuple[Port, list[str], Traffic, Ring | None]]:
    for port in snapshot.ports:
        for queue in port.queues:
            yield port, [port.name, str(queue.number), "rx"], queue.rx, queue.rx_ring
            yield port, [port.name, str(queue.number), "tx"], queue.tx, queue.tx_ring


def _traffic(snapshot: Snapshot) -> Iterator[Metric]:
    for name, (field, text) in (TRAFFIC | RINGS).items():
        counter = CounterMetricFamily(f"xdpnet_queue_{name}", text, labels=QUEUE)
        for port, labels, traffic, _ in _directions(snapshot):
            if port.guest or name in TRAFFIC or name.startswith("kicks"):
                counter.add_metric(labels, getattr(traffic, field))
        yield counter
    drops = CounterMetricFamily("xdpnet_queue_drops", "Frames lost, by reason.", labels=[*QUEUE, "reason"])
    for _, labels, traffic, _ in _directions(snapshot):
        for reason, count in traffic.drops.items():
            drops.add_metric([*labels, reason], count)
    yield drops


def _rings(snapshot: Snapshot) -> Iterator[Metric]:
    index = GaugeMetricFamily(
        "xdpnet_ring_index", "Indices of a guest's ring, modulo 65536, as they stand now.", labels=[*QUEUE, "index"]
    )
    size = GaugeMetricFamily("xdpnet_ring_entries", "Size of a guest's ring; 0: not set up.", labels=QUEUE)
    up = GaugeMetricFamily("xdpnet_ring_up", "1 if a guest's ring is started, enabled and not broken.", labels=QUEUE)
    broken = GaugeMetricFamily("xdpnet_ring_broken", "1 if the ring is latched broken.", labels=[*QUEUE, "reason"])
    waiting = GaugeMetricFamily("xdpnet_ring_waiting_frames", "Frames that wait for receive buffers.", labels=QUEUE)
    for _, labels, _, ring in _directions(snapshot):
        if ring is None:
            continue
        waiting.add_metric(labels, ring.waiting)
        for name in INDICES:
            index.add_metric([*labels, name], getattr(ring, name))
        size.add_metric(labels, ring.size)
        up.add_metric(labels, ring.started and ring.enabled and not ring.broken)
        if ring.broken:
            broken.add_metric([*labels, ring.broken], 1)
    yield from (index, size, up, broken, waiting)


def _xsk(snapshot: Snapshot) -> Iterator[Metric]:
    sockets = [(port, queue, queue.xsk) for port in snapshot.ports for queue in port.queues if queue.xsk]
    for name in XDP_STATISTICS:
        counter = CounterMetricFamily(f"xdpnet_xsk_{name}", XSK_HELP[name], labels=["port", "queue"])
        for port, queue, xsk in sockets:
            counter.add_metric([port.name, str(queue.number)], xsk.statistics[name])
        yield counter
    up = GaugeMetricFamily("xdpnet_xsk_up", "1 if the queue's AF_XDP socket is open.", labels=["port", "queue"])
    frames = GaugeMetricFamily(
        "xdpnet_xsk_frames", "Frames of the UMEM, by where they are.", labels=["port", "queue", "state"]
    )
    sent = CounterMetricFamily(
        "xdpnet_xsk_sent_frames",
        "Frames handed to the interface, by where they lay: in guest memory, or copied to a frame of the UMEM.",
        labels=["port", "queue", "how"],
    )
    umem = GaugeMetricFamily(
        "xdpnet_xsk_umem_bytes", "Size of the socket's UMEM, guest memory included.", labels=["port", "queue"]
    )
    for port, queue, xsk in sockets:
        labels = [port.name, str(queue.number)]
        sent.add_metric([*labels, "in_place"], queue.tx.in_place)
        sent.add_metric([*labels, "copied"], queue.tx.packets - queue.tx.in_place)
        umem.add_metric(labels, xsk.umem)
        up.add_metric(labels, xsk.open)
        frames.add_metric([*labels, "free"], xsk.frames_free)
        frames.add_metric([*labels, "fill"], xsk.frames_fill)
        frames.add_metric([*labels, "tx"], xsk.frames_tx - xsk.in_flight)
        frames.add_metric([*labels, "in_place"], xsk.in_flight)
    yield from (up, frames, sent, umem)


def _netdevs(snapshot: Snapshot) -> Iterator[Metric]:
    up = GaugeMetricFamily("xdpnet_netdev_up", "1 if the interface is there and attached to.", labels=["interface"])
    info = GaugeMetricFamily(
        "xdpnet_xdp_info", "How XDP is attached to the interface.", labels=["interface", "mode", "zerocopy", "policy"]
    )
    verdicts = CounterMetricFamily(
        "xdpnet_xdp_verdicts", "Frames that the XDP program saw, by its verdict.", labels=["interface", "verdict"]
    )
    lost = CounterMetricFamily(
        "xdpnet_netdev_group_frames_lost",
        "Broadcast and multicast frames that found the buffer of the AF_PACKET socket full.",
        labels=["interface"],
    )
    unserved = GaugeMetricFamily(
        "xdpnet_netdev_unserved_queues",
        "Receive queues of the interface without an AF_XDP socket: guests' frames on them go to the host.",
        labels=["interface"],
    )
    mtu = GaugeMetricFamily("xdpnet_netdev_mtu", "MTU of the interface in bytes; 0: it is away.", labels=["interface"])
    for port in snapshot.ports:
        if port.netdev is None:
            continue
        up.add_metric([port.name], port.netdev.alive)
        netdev = port.netdev
        info.add_metric([port.name, netdev.mode, str(netdev.zerocopy).lower(), netdev.policy], 1)
        for verdict, count in port.netdev.verdicts.items():
            verdicts.add_metric([port.name, verdict], count)
        lost.add_metric([port.name], netdev.group_lost)
        unserved.add_metric([port.name], netdev.unserved)
        mtu.add_metric([port.name], netdev.mtu)
    yield from (up, info, verdicts, lost, unserved, mtu)


def _guests(snapshot: Snapshot) -> Iterator[Metric]:
    connected = GaugeMetricFamily("xdpnet_guest_connected", "1 if a frontend is connected.", labels=["port"])
    feature = GaugeMetricFamily("xdpnet_guest_feature", "1 for each negotiated feature.", labels=["port", "feature"])
    mtu = GaugeMetricFamily(
        "xdpnet_guest_mtu", "What the guest was told that it may send, bytes; 0: nothing.", labels=["port"]
    )
    lacks_memory = GaugeMetricFamily(
        "xdpnet_guest_lacks_memory", "1 if its rings are ready and its frontend has shared no memory.", labels=["port"]
    )
    errors = CounterMetricFamily(
        "xdpnet_vhost_user_errors", "Messages of the frontend that were refused.", labels=["port", "reason"]
    )
    refused = CounterMetricFamily(
        "xdpnet_vhost_user_refused_connections", "Connections turned away.", labels=["port", "reason"]
    )
    counters = {
        name: CounterMetricFamily(f"xdpnet_vhost_user_{name}", text, labels=["port"])
        for name, text in (
            ("messages", "Messages of the frontend."),
            ("connects", "Connections made."),
            ("disconnects", "Connections ended."),
            (
                "rests",
                "Times that nothing more was read for a while: messages had cost others too much.",
            ),
            ("rarp_limited", "Requests to announce the guest that came too soon after others."),
            ("unsealed_regions", "Memory regions taken whose file the frontend can still shrink."),
        )
    }
    for port in snapshot.ports:
        guest = port.guest
        if guest is None:
            continue
        connected.add_metric([port.name], guest.connected)
        mtu.add_metric([port.name], guest.mtu)
        lacks_memory.add_metric([port.name], guest.lacks_memory)
        for name in guest.features:
            feature.add_metric([port.name, name], 1)
        for reason, count in guest.errors.items():
            errors.add_metric([port.name, reason], count)
        for reason, count in guest.refused.items():
            refused.add_metric([port.name, reason], count)
        for name, counter in counters.items():
            counter.add_metric([port.name], getattr(guest, name))
    yield from (connected, feature, mtu, lacks_memory, errors, refused, *counters.values())
