"""Everything that is counted, and shown, of a running daemon: each thing once, with its name, unit and help.

A field that is annotated with a metric has that metric's value; those of Traffic, Work and XdpStatistics are fields of
c/xdpnet.h, by their names there. The core fills these classes, the Snapshot holds them, and what shows them (the table,
the Prometheus metrics) is made of what stands here. A new counter takes its field in C, its line here and the place
that counts; and its row in metrics/README.md, which a test asks for.

The names are the API and follow Prometheus' conventions: base units, _total for counters, one family for what may be
summed. Labels are bounded: ports by the configuration, the rest by the core's enumerations.

Reference: https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

Kind = Literal["counter", "gauge"]
# Who has it: every queue; guests' rings alone; these and what an interface sends by (its other queues have a zero).
Of = Literal["queues", "rings", "kicked"]


@dataclass(frozen=True, slots=True)
class Metric:
    """labels: of whose it is, and behind these what tells several values of it apart. unit: empty for a state.

    column: its heading in the table of `xdpnet stats`; empty: it is not there, or not in a column.
    """

    kind: Kind
    labels: tuple[str, ...]
    name: str  # without _total, which prometheus-client appends
    unit: str
    help: str
    column: str = ""
    of: Of = "queues"


EVERY: list[Metric] = []  # in the order of metrics/README.md


def _metric(
    kind: Kind,
    prefix: str,
    labels: tuple[str, ...],
    name: str,
    unit: str,
    text: str,
    column: str = "",
    of: Of = "queues",
) -> Metric:
    made = Metric(kind, labels, f"xdpnet_{prefix}{name}", unit, text, column, of)
    EVERY.append(made)
    return made


@cache
def declared(holder: type) -> Mapping[str, Metric]:
    """The metrics of a class, by the fields that hold them: a number, or one for each value of the last label."""
    hints = get_type_hints(holder, include_extras=True)
    found = {name: each for name, hint in hints.items() for each in getattr(hint, "__metadata__", ())}
    return MappingProxyType(found)


def values(holder: Any, of: type) -> dict[str, Any]:
    """What `holder` has in the fields of `of` that have a metric."""
    return {name: getattr(holder, name) for name in declared(of)}


_count = partial(_metric, "counter")
_gauge = partial(_metric, "gauge")

# fmt: off

# ---- the daemon and its workers ----

BUILD = _gauge("", ("version",), "build_info", "", "Version of the daemon.")
UPTIME = _gauge("", (), "uptime_seconds", "seconds", "Time since the daemon's start.")

_worker = partial(_count, "worker_", ("worker",))


@dataclass(frozen=True, slots=True)
class Work:
    """Of one worker: struct xn_worker_stats."""

    loops: Annotated[int, _worker("loops", "turns", "Turns of the worker's loop.", "Loops")]
    sleeps: Annotated[int, _worker("sleeps", "times", "Times that the worker went to sleep.", "Sleeps")]
    busy_cycles: Annotated[int, _worker("busy_cycles", "cycles", "TSC cycles of turns that moved something.")]
    packets: Annotated[int, _worker("packets", "frames", "Frames that the worker took from any port.", "Packets")]


CPU = _count(
    "worker_", ("worker",), "cpu_seconds", "seconds", "Time that the worker's thread has run for, spinning included.")
STALLED = _gauge(
    "worker_", ("worker",), "stalled_seconds", "seconds", "Time for which the worker has not gone on; 0: it does.")
BUSY = _count(
    "port_", ("port",), "busy_cycles", "cycles",
    "TSC cycles that the workers spent on the port: its part of their time, of all ports' together.")
ADDRESSES = _gauge("", ("port", "type"), "fdb_entries", "addresses", "Addresses in the forwarding table.")

# ---- queues ----

_QUEUE = ("port", "queue", "direction")
_queue = partial(_count, "queue_", _QUEUE)
_ring = partial(_gauge, "ring_")


@dataclass(frozen=True, slots=True)
class Traffic:
    """One direction of one queue: struct xn_queue_stats. drops has every reason, also those at zero."""

    packets: Annotated[int, _queue(
        "packets", "frames",
        "Frames that came in (guest tx, interface rx) or were delivered (guest rx, interface tx).", "Packets")]
    bytes: Annotated[int, _queue("bytes", "bytes", "Bytes of these frames, without virtio_net_hdr.", "Bytes")]
    drops: Annotated[dict[str, int], _count(
        "queue_", (*_QUEUE, "reason"), "drops", "frames", "Frames lost, by reason.")]
    copies: Annotated[int, _queue(
        "copies", "frames", "Copies beyond the first of frames that were flooded to several ports.")]
    bursts: Annotated[int, _queue("bursts", "polls", "Polls that found something.")]
    kicks: Annotated[int, _queue(
        "kicks", "kicks", "Guest queues: kicks taken. Interface tx: sendto() calls.", "Kicks\ntaken", "kicked")]
    kicks_saved: Annotated[int, _queue(
        "kicks_saved", "kicks", "Guest queues: buffers found without a kick. Interface tx: bursts without one.",
        "Kicks\nsaved", "kicked")]
    calls: Annotated[int, _queue("calls", "interrupts", "Interrupts sent to the guest.", "Calls\nsent", "rings")]
    calls_saved: Annotated[int, _queue(
        "calls_saved", "buffers", "Used buffers published for which the guest had asked no interrupt.",
        "Calls\nsaved", "rings")]
    chains: Annotated[int, _queue("chains", "chains", "Descriptor chains taken from the guest.", of="rings")]
    cut: Annotated[int, _queue(
        "frames_cut", "frames", "Frames that stood for many and were cut into frames of the wire.")]
    segments: Annotated[int, _queue("segments", "frames", "More frames than one that these became.")]
    joined: Annotated[int, _queue(
        "frames_joined", "frames",
        "Frames from the wire that became part of the one before, for the guest that took it.")]
    csum_computed: Annotated[int, _queue(
        "checksums_computed", "checksums", "Interface tx: checksums made as frames, or segments, were copied.")]
    csum_completed: Annotated[int, _queue(
        "checksums_completed", "checksums",
        "Checksums made for a guest that does not take partial ones, of frames or segments, or before fragmentation.")]
    csum_partial: Annotated[int, _queue(
        "checksums_partial", "checksums",
        "Frames or segments with a partial checksum handed to a guest that takes such. Interface tx: to the interface."
        )]
    csum_verified: Annotated[int, _queue(
        "checksums_verified", "checksums", "Checksums of frames from the wire that were found right.")]
    in_place: int  # is in SENT
    breaks: Annotated[int, _queue("breaks", "times", "Times that the ring was latched broken.", of="rings")]
    unlearned: Annotated[int, _queue(
        "unlearned", "times",
        "Times that a source address was not learned: the guest has taught as many as it may.", of="rings")]
    waited: Annotated[int, _queue(
        "waited", "frames", "Frames that found no receive buffer and waited for one.", of="rings")]
    left_out: Annotated[int, _queue(
        "left_out", "buffers",
        "Receive buffers handed back unused, for they lie in memory of the guest that is left out.", of="rings")]


RING_INDEX = _ring(
    (*_QUEUE, "index"), "index", "entries", "Indices of a guest's ring, modulo 65536, as they stand now.")
RING_SIZE = _ring(_QUEUE, "entries", "entries", "Size of a guest's ring; 0: not set up.")
RING_UP = _ring(_QUEUE, "up", "", "1 if a guest's ring is started, enabled and not broken.")
RING_BROKEN = _ring((*_QUEUE, "reason"), "broken", "", "1 if the ring is latched broken.")
WAITING = _ring(_QUEUE, "waiting_frames", "frames", "Frames that wait for receive buffers.")

# ---- AF_XDP sockets ----

_SOCKET = ("port", "queue")
_xsk = partial(_count, "xsk_", _SOCKET)


@dataclass(frozen=True, slots=True)
class XdpStatistics:
    """XDP_STATISTICS of a queue's sockets: the first fields of struct xn_xsk_stats."""

    rx_dropped: Annotated[int, _xsk(
        "rx_dropped", "frames", "Frames that the kernel dropped for reasons other than those counted apart.",
        "rx\ndropped")]
    rx_invalid_descs: Annotated[int, _xsk(
        "rx_invalid_descs", "descriptors", "Invalid descriptors in the fill ring.", "rx\ninvalid")]
    tx_invalid_descs: Annotated[int, _xsk(
        "tx_invalid_descs", "descriptors", "Invalid descriptors in the tx ring.", "tx\ninvalid")]
    rx_ring_full: Annotated[int, _xsk(
        "rx_ring_full", "frames", "Frames dropped because the rx ring was full.", "rx\nfull")]
    rx_fill_ring_empty_descs: Annotated[int, _xsk(
        "rx_fill_ring_empty_descs", "frames", "Frames dropped because the fill ring was empty.", "fill\nempty")]
    tx_ring_empty_descs: Annotated[int, _xsk(
        "tx_ring_empty_descs", "times", "Times that the kernel found the tx ring empty.", "tx\nempty")]


XSK_UP = _gauge("xsk_", _SOCKET, "up", "", "1 if the queue's AF_XDP socket is open.")
XSK_FRAMES = _gauge("xsk_", (*_SOCKET, "state"), "frames", "frames", "Frames of the UMEM, by where they are.")
SENT = _count(
    "xsk_", (*_SOCKET, "how"), "sent_frames", "frames",
    "Frames handed to the interface, by where they lay: in guest memory, or copied to a frame of the UMEM.")
UMEM = _gauge("xsk_", _SOCKET, "umem_bytes", "bytes", "Size of the socket's UMEM, guest memory included.")

# ---- interfaces ----

_NETDEV = ("interface",)

NETDEV_UP = _gauge("netdev_", _NETDEV, "up", "", "1 if the interface is there and attached to.")
XDP_INFO = _gauge(
    "xdp_", (*_NETDEV, "mode", "zerocopy", "policy"), "info", "", "How XDP is attached to the interface.")
VERDICTS = _count(
    "xdp_", (*_NETDEV, "verdict"), "verdicts", "frames", "Frames that the XDP program saw, by its verdict.")
GROUP_LOST = _count(
    "netdev_", _NETDEV, "group_frames_lost", "frames",
    "Broadcast and multicast frames that found the buffer of the AF_PACKET socket full.")
UNSERVED = _gauge(
    "netdev_", _NETDEV, "unserved_queues", "queues",
    "Receive queues of the interface without an AF_XDP socket: guests' frames on them go to the host.")
NETDEV_MTU = _gauge("netdev_", _NETDEV, "mtu", "bytes", "MTU of the interface in bytes; 0: it is away.")

# ---- guests ----

_GUEST = ("port",)
_socket = partial(_count, "vhost_user_", _GUEST)

CONNECTED = _gauge("guest_", _GUEST, "connected", "", "1 if a frontend is connected.")
FEATURE = _gauge("guest_", (*_GUEST, "feature"), "feature", "", "1 for each negotiated feature.")
GUEST_MTU = _gauge(
    "guest_", _GUEST, "mtu", "bytes", "What the guest was told that it may send, bytes; 0: nothing.")
GUEST_STATE = _gauge(
    "guest_", (*_GUEST, "state"), "state", "", "1 for the state that it is in; the table below has them.")


@dataclass(slots=True)
class VhostUser:
    """Of one vhost-user socket; it outlives every connection and never runs backwards."""

    messages: Annotated[int, _socket("messages", "messages", "Messages of the frontend.")] = 0
    connects: Annotated[int, _socket("connects", "times", "Connections made.")] = 0
    disconnects: Annotated[int, _socket("disconnects", "times", "Connections ended.")] = 0
    unsealed_regions: Annotated[int, _socket(
        "unsealed_regions", "regions", "Memory regions taken whose file the frontend can still shrink.")] = 0
    rests: Annotated[int, _socket(
        "rests", "times", "Times that nothing more was read for a while: messages had cost others too much.")] = 0
    rarp_limited: Annotated[int, _socket(
        "rarp_limited", "messages", "Requests to announce the guest that came too soon after others.")] = 0
    errors: Annotated[dict[str, int], _count(
        "vhost_user_", (*_GUEST, "reason"), "errors", "messages", "Messages of the frontend that were refused.",
    )] = field(default_factory=dict)
    refused: Annotated[dict[str, int], _count(
        "vhost_user_", (*_GUEST, "reason"), "refused_connections", "connections", "Connections turned away.",
    )] = field(default_factory=dict)
