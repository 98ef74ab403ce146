"""Snapshots made by hand: a guest and an interface whose books balance."""

from dataclasses import replace
from typing import Any

from xdpnet.metrics.snapshot import (
    XDP_STATISTICS,
    Address,
    Guest,
    Netdev,
    Port,
    Queue,
    Ring,
    Snapshot,
    Traffic,
    Worker,
    Xsk,
    total,
)

DROPS = dict.fromkeys(("short", "spoof", "no_port", "no_buffer", "no_frame"), 0)


def traffic(packets: int = 0, drops: dict[str, int] | None = None, **fields: int) -> Traffic:
    zero = Traffic(packets, 64 * packets, {**DROPS, **(drops or {})}, *[0] * 18)
    return replace(zero, **fields)  # type: ignore[arg-type]  # all of them are int


def ring(**fields: Any) -> Ring:
    up = Ring(256, True, True, "", 0, 1010, 1000, 1011, 990, 1000, 0)
    return replace(up, **fields)


def guest_port(name: str = "web", number: int = 0, **fields: Any) -> Port:
    guest = Guest(
        "/run/web.sock", False, True, "52:54:00:00:00:01", ("VIRTIO_F_VERSION_1", "VIRTIO_RING_F_EVENT_IDX"),
        *(42, 1, 0, 0, 2, 3), {"size": 0, "order": 2}, {"busy": 1, "resources": 0}, 9000,
    )  # fmt: skip
    rx = traffic(12_345_678, {"no_buffer": 22}, calls=900, calls_saved=99_000, waited=41)
    tx = traffic(1_000, {"spoof": 10}, copies=5, kicks=30, kicks_saved=970, unlearned=8)
    queues = (Queue(0, rx, tx, ring(), ring()),)
    return Port(name, number, queues, guest=replace(guest, **fields), given=1, learned=1)


def netdev_port(**fields: Any) -> Port:
    netdev = Netdev("eth1", 7, True, "native", False, "auto", {"guest": 12_345_700, "group": 0, "host": 17}, 6, 2, 1500)
    xsk = Xsk(True, False, {name: at for at, name in enumerate(XDP_STATISTICS)}, 2048, 2040, 8, 3, 1 << 24)
    queue = Queue(0, traffic(12_345_700), traffic(995, kicks=40, kicks_saved=3), xsk=xsk)
    return Port("eth1", 1, (queue,), netdev=replace(netdev, **fields))


def snapshot(*ports: Port, tid: int = 1, **fields: Any) -> Snapshot:
    made = ports or (guest_port(), netdev_port())
    addresses = (Address("52:54:00:00:00:01", -1, "web", True, 0), Address("52:54:00:00:00:09", 0, "web", False, 3))
    whole = Snapshot("1.2.3", 1000.0, 3725.0, total(made), made, (Worker(0, -1, tid, 5_000, 100, 7, 999),), addresses)
    return replace(whole, **fields)
