"""Takes the Snapshot: reads the counters of the core, the guests' sessions and the interfaces, and freezes them.

Called on the control thread, which alone may call the core; workers go on meanwhile, so that a frame on its way may be
counted in and not yet out.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from xdpnet import __version__, core
from xdpnet.counters import Work, XdpStatistics, values
from xdpnet.metrics.snapshot import (
    Address,
    Guest,
    Netdev,
    Offence,
    Port,
    Queue,
    Ring,
    Snapshot,
    Worker,
    Xsk,
    total,
)
from xdpnet.stalls import Stall

STATIONS = 1024  # of the wire that are shown; the others are counted
OFFENCES = ("spoof", "policy")  # drop reasons of which the core keeps the last frame's addresses


@dataclass(frozen=True, slots=True)
class GuestSource:
    """Where a guest's part comes from."""

    name: str
    port: core.Guest
    pairs: int
    guest: Guest


class NetdevSource(Protocol):
    """What take() reads of an interface."""

    @property
    def port(self) -> core.Netdev: ...
    @property
    def queues(self) -> int: ...
    @property
    def queues_had(self) -> int: ...
    @property
    def unserved(self) -> int: ...
    @property
    def mtu(self) -> int: ...
    @property
    def ifindex(self) -> int: ...
    @property
    def mode(self) -> str: ...
    @property
    def zerocopy(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def group_lost(self) -> int: ...
    def verdicts(self) -> Mapping[str, int]: ...


def take(
    bridge: core.Bridge,
    workers: int,
    guests: Iterable[GuestSource],
    netdevs: Mapping[str, NetdevSource],
    started: float,
    stalls: Mapping[int, Stall],
) -> Snapshot:
    """Reads everything once. Called on the control thread, which alone may call the core."""
    ports = [_guest_port(source) for source in guests]
    ports += [_netdev_port(name, source) for name, source in netdevs.items()]
    given, learned = bridge.fdb_count()
    ports = [
        replace(
            port,
            given=given[port.number],
            learned=learned[port.number],
            busy_cycles=core.Port(bridge, port.number).cycles(),
        )
        for port in ports
    ]
    names = {port.number: port.name for port in ports}
    now = time.monotonic()
    return Snapshot(
        version=__version__,
        time=now,
        uptime_s=now - started,
        totals=total(ports, bridge.gone()),
        ports=tuple(ports),
        workers=tuple(_worker(bridge, number, stalls.get(number), now) for number in range(workers)),
        addresses=tuple(_address(entry, names) for entry in bridge.fdb_dump(STATIONS)),
    )


def _guest_port(source: GuestSource) -> Port:
    queues = tuple(
        Queue(
            number=pair,
            rx=source.port.queue_stats(pair, core.RX),
            tx=source.port.queue_stats(pair, core.TX),
            rx_ring=_ring(source.port.ring_state(2 * pair)),
            tx_ring=_ring(source.port.ring_state(2 * pair + 1)),
        )
        for pair in range(source.pairs)
    )
    guest = replace(source.guest, offences=tuple(_offences(source.port)))
    return Port(source.name, source.port, queues, guest=guest)


def _offences(port: core.Guest) -> Iterator[Offence]:
    for reason in OFFENCES:
        if (last := port.offence(reason)) is not None:
            ip = str(last.ip) if last.ip is not None else ""
            yield Offence(reason, last.source.hex(":"), last.destination.hex(":"), last.type, ip, last.age_s)


def _netdev_port(name: str, source: NetdevSource) -> Port:
    queues = tuple(
        Queue(
            number=queue,
            rx=source.port.queue_stats(queue, core.RX),
            tx=source.port.queue_stats(queue, core.TX),
            xsk=_xsk(source.port.xsk_stats(queue)) if queue < source.queues else None,
        )
        for queue in range(source.queues_had)
    )
    netdev = Netdev(
        interface=name,
        ifindex=source.ifindex,
        alive=source.alive,
        mode=source.mode,
        zerocopy=any(queue.xsk.zerocopy for queue in queues if queue.xsk),
        policy=source.zerocopy,
        verdicts=dict(source.verdicts()),
        group_lost=source.group_lost,
        unserved=source.unserved,
        mtu=source.mtu,
    )
    return Port(name, source.port, queues, netdev=netdev)


def _ring(state: core.RingState) -> Ring:
    return Ring(
        size=state.num,
        started=bool(state.started),
        enabled=bool(state.enabled),
        broken=state.broken,
        worker=state.worker,
        available=state.avail_idx,
        used=state.used_idx,
        available_event=state.avail_event,
        used_event=state.used_event,
        last_available=state.last_avail,
        waiting=state.waiting,
        packed=state.packed,
    )


def _xsk(stats: core.XskStats) -> Xsk:
    return Xsk(
        open=bool(stats.open),
        zerocopy=bool(stats.zerocopy),
        statistics=XdpStatistics(**values(stats, XdpStatistics)),
        frames_free=stats.frames_free,
        frames_fill=stats.frames_fill,
        frames_tx=stats.frames_tx,
        in_flight=stats.in_flight,
        umem=stats.umem,
    )


def _worker(bridge: core.Bridge, number: int, stall: Stall | None, now: float) -> Worker:
    stats = bridge.worker_stats(number)
    return Worker(
        number=number,
        cpu=stats.cpu,
        tid=stats.tid,
        **values(stats, Work),
        cpu_s=_ran_s(stats.tid),
        stalled_s=now - stall.since if stall else 0.0,
        stalled_at=stall.where if stall else "",
    )


def _ran_s(tid: int) -> float:
    """Of one of our threads, by the kernel's books: proc(5), /proc/tid/stat; 0: it does not run."""
    try:
        fields = Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _address(entry: core.FdbEntry, names: Mapping[int, str]) -> Address:
    return Address(
        mac=entry.mac.hex(":"),
        vlan=-1 if entry.vlan == core.ANY_VLAN else entry.vlan,
        port=names.get(entry.port, str(entry.port)),
        static=bool(entry.is_static),
        age_s=entry.age_s,
    )
