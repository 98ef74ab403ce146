"""What `xdpnet fdb` and `xdpnet ring` show: one part of the Snapshot, whole. Pure functions, as in table.py."""

from collections.abc import Iterable

from rich.console import Group
from rich.text import Text

from xdpnet.counters import Traffic, declared
from xdpnet.errors import ControlError
from xdpnet.metrics.snapshot import Address, Queue, Ring, Snapshot
from xdpnet.metrics.table import NOTHING, Table, duration, ring_state

RING = (
    ("available", "index that the guest has made available up to"),
    ("last_available", "index that is taken next"),
    ("used", "index handed back up to"),
    ("available_event", "index at which a kick is wanted"),
    ("used_event", "index at which the guest wants an interrupt"),
    ("waiting", "frames that wait for receive buffers"),
)


# ---- addresses ----


def addresses(now: Snapshot, ports: Iterable[str] = ()) -> list[Address]:
    """Of these ports, or of all; those that were given first."""
    wanted = set(ports)
    found = [address for address in now.addresses if not wanted or address.port in wanted]
    return sorted(found, key=lambda address: (not address.static, address.port, address.mac, address.vlan))


def fdb(now: Snapshot, ports: Iterable[str] = ()) -> Group:
    table = Table(" Address", "VLAN", "Port", "Kind", ">Last seen")
    shown = addresses(now, ports)
    for each in shown:
        vlan = "any" if each.vlan < 0 else "-" if each.vlan == 0 else str(each.vlan)
        kind = Text("given", style="green") if each.static else "learned"
        table.add_row(f" {each.mac}", vlan, each.port, kind, "-" if each.static else duration(each.age_s))
    known = sum(port.given + port.learned for port in now.ports)
    return Group(
        table, Text(f"\n {len(shown):,} of {known:,} addresses; of the wire at most 1,024 are shown", style="dim")
    )


# ---- a guest's rings ----


def queue_of(now: Snapshot, guest: str, number: int) -> Queue:
    """A guest's queue pair; ControlError names those that are there."""
    guests = {port.name: port for port in now.ports if port.guest}
    if guest not in guests:
        raise ControlError(f"no guest {guest}; there are: {', '.join(guests) or 'none'}")
    queues = {queue.number: queue for queue in guests[guest].queues}
    if number not in queues:
        raise ControlError(f"guest {guest} has no queue pair {number}; it has 0 to {max(queues)}")
    return queues[number]


def ring(queue: Queue) -> Table:
    """Both rings side by side: their state and indices, and every counter with what it means."""
    table = Table(" ", ">rx", ">tx", "What it is", least=24)
    sides = queue.rx_ring, queue.tx_ring
    table.add_row(" state", *map(_state, sides), "of the ring; rx: what the guest receives by")
    table.add_row(" layout", *map(_layout, sides), "and entries")
    table.add_row(" worker", *(str(side.worker) if side else NOTHING for side in sides), "that serves it")
    for name, meaning in RING:
        table.add_row(f" {name}", *(f"{getattr(side, name):,}" if side else NOTHING for side in sides), meaning)
    table.add_section()
    for name, metric in declared(Traffic).items():
        if name != "drops":
            values = (f"{getattr(traffic, name):,}" for traffic in (queue.rx, queue.tx))
            table.add_row(f" {name}", *values, metric.help)
    table.add_section()
    for reason in queue.rx.drops:
        lost = queue.rx.drops[reason], queue.tx.drops.get(reason, 0)
        if any(lost):
            cells = (Text(f"{number:,}", style="yellow") if number else NOTHING for number in lost)
            table.add_row(f" {reason}", *cells, "frames lost")
    return table


def _state(side: Ring | None) -> Text:
    return ring_state(side) if side else NOTHING


def _layout(side: Ring | None) -> str:
    return f"{'packed' if side.packed else 'split'} {side.size}" if side and side.size else "-"
