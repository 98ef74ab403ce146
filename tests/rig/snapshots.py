"""Snapshots made by hand, a guest and an interface whose books balance; and what is shown of them."""

from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from prometheus_client import generate_latest

from xdpnet.counters import Traffic, XdpStatistics
from xdpnet.metrics.collector import SnapshotCollector, registry
from xdpnet.metrics.snapshot import (
    Address,
    Guest,
    Netdev,
    Port,
    Queue,
    Ring,
    Snapshot,
    Worker,
    Xsk,
    total,
)

DROPS = dict.fromkeys(("short", "spoof", "no_port", "no_buffer", "no_frame"), 0)


def traffic(packets: int = 0, drops: dict[str, int] | None = None, **fields: int) -> Traffic:
    nothing: dict[str, Any] = dict.fromkeys((field.name for field in fields_of(Traffic)), 0)
    moved = {"packets": packets, "bytes": 64 * packets, "drops": {**DROPS, **(drops or {})}}
    return Traffic(**nothing | moved | fields)


def ring(**fields: Any) -> Ring:
    up = Ring(256, True, True, "", 0, 1010, 1000, 1011, 990, 1000, 0)
    return replace(up, **fields)


def guest_port(name: str = "web", number: int = 0, **fields: Any) -> Port:
    guest = Guest(
        socket="/run/web.sock", client=False, connected=True, mac="52:54:00:00:00:01", mtu=9000,
        features=("VIRTIO_F_VERSION_1", "VIRTIO_RING_F_EVENT_IDX"), messages=42, connects=1, rests=2, rarp_limited=3,
        errors={"size": 0, "order": 2}, refused={"busy": 1, "resources": 0},
    )  # fmt: skip
    rx = traffic(12_345_678, {"no_buffer": 22}, calls=900, calls_saved=99_000, waited=41)
    tx = traffic(1_000, {"spoof": 10}, copies=5, kicks=30, kicks_saved=970, unlearned=8)
    queues = (Queue(0, rx, tx, ring(), ring()),)
    return Port(name, number, queues, guest=replace(guest, **fields), given=1, learned=1)


def netdev_port(**fields: Any) -> Port:
    netdev = Netdev("eth1", 7, True, "native", False, "auto", {"guest": 12_345_700, "group": 0, "host": 17}, 6, 2, 1500)
    xsk = Xsk(True, False, XdpStatistics(*range(6)), 2048, 2040, 8, 3, 1 << 24)
    queue = Queue(0, traffic(12_345_700), traffic(995, kicks=40, kicks_saved=3), xsk=xsk)
    return Port("eth1", 1, (queue,), netdev=replace(netdev, **fields))


def worker(tid: int, **fields: Any) -> Worker:
    at_work = Worker(number=0, cpu=-1, tid=tid, loops=5_000, sleeps=100, busy_cycles=7, packets=999)
    return replace(at_work, **fields)


def snapshot(*ports: Port, tid: int = 1, **fields: Any) -> Snapshot:
    made = ports or (guest_port(), netdev_port())
    addresses = (Address("52:54:00:00:00:01", -1, "web", True, 0), Address("52:54:00:00:00:09", 0, "web", False, 3))
    whole = Snapshot("1.2.3", 1000.0, 3725.0, total(made), made, (worker(tid),), addresses)
    return replace(whole, **fields)


def exposition(shown: Snapshot) -> str:
    """As Prometheus is told it."""
    collector = SnapshotCollector()
    collector.snapshot = shown
    return generate_latest(registry(collector)).decode()
