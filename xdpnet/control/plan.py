"""What it takes to come from one configuration to another: steps, in an order in which each is possible.

Nothing here looks at the machine, at guests or at the core: two Configs go in, steps come out, and somebody else
carries them out (changes.py). A step is a guest, an interface or the bridge itself, as it was and as it is to be;
turned round it is what undoes it. What takes a new start is no step but a fault, with the remedy.

    removals of what others are to have, then changes, then additions, then all other removals

The last cannot fail, and are what cannot be undone without a guest's frontend noticing it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

from pydantic import BaseModel

from xdpnet.config import Config, GuestConfig, NetdevConfig
from xdpnet.core import MAX_PORTS

T = TypeVar("T", bound=BaseModel)

# Of a guest: what a driver was told before it chose its features. Its frontend has to connect anew for others.
NEGOTIATED = ("queues", "mtu", "guest_offloads")
# Of the bridge: what its memory, threads and sockets were made by.
ANEW = ("workers", "frames_per_queue", "max_macs", "control")


@dataclass(frozen=True)
class Step(Generic[T]):
    """From before to after; None: it is not there. The bridge is always."""

    before: T | None
    after: T | None

    @property
    def turned_round(self) -> Self:
        return type(self)(self.after, self.before)

    @property
    def removal(self) -> Self:
        """Of what was there before."""
        return type(self)(self.before, None)

    @property
    def keys(self) -> list[str]:
        """That change, if it is there before and after."""
        before, after = self.before, self.after
        if before is None or after is None:
            return []
        return [key for key in type(before).model_fields if getattr(before, key) != getattr(after, key)]

    @property
    def what(self) -> str:
        return "bridge"

    def __str__(self) -> str:
        said = "added" if self.before is None else "removed" if self.after is None else ", ".join(self.spelt_keys)
        return f"{self.what}: {said}"

    @property
    def spelt_keys(self) -> list[str]:
        """As the file has them."""
        there = self.after
        return [type(there).model_fields[key].alias or key for key in self.keys] if there else []


class GuestStep(Step[GuestConfig]):
    @property
    def what(self) -> str:
        there = self.after or self.before
        return f"guest {there.name}" if there else ""

    @property
    def rejoins(self) -> list[str]:
        """The keys for which a frontend that is connected has to connect anew."""
        return [key for key in self.keys if key in NEGOTIATED]


class NetdevStep(Step[NetdevConfig]):
    @property
    def what(self) -> str:
        there = self.after or self.before
        return f"netdev {there.interface}" if there else ""


class BridgeStep(Step[Config]):
    """What the daemon has once."""

    @property
    def keys(self) -> list[str]:
        return [key for key in super().keys if key not in ("guests", "netdevs")]


AnyStep = GuestStep | NetdevStep | BridgeStep


@dataclass(frozen=True)
class Plan:
    steps: Sequence[AnyStep]
    anew: Sequence[str] = field(default=())  # faults: what takes a new start, with the remedy
    never: Sequence[str] = field(default=())  # and what not even that can do


def plan(before: Config, after: Config) -> Plan:
    """The steps from one to the other."""
    guests = {guest.name: guest for guest in before.guests}
    wanted = {guest.name: guest for guest in after.guests}
    changed = [GuestStep(guests[name], guest) for name, guest in wanted.items() if guests.get(name, guest) != guest]
    added = [GuestStep(None, guest) for name, guest in wanted.items() if name not in guests]
    removed = [GuestStep(guest, None) for name, guest in guests.items() if name not in wanted]
    changed, exchanged = _in_order(changed)
    removed += [GuestStep(step.before, None) for step in exchanged]
    added += [GuestStep(None, step.after) for step in exchanged]

    have = {netdev.interface: netdev for netdev in before.netdevs}
    want = {netdev.interface: netdev for netdev in after.netdevs}
    netdevs_changed = [
        NetdevStep(have[name], netdev) for name, netdev in want.items() if have.get(name, netdev) != netdev
    ]
    netdevs_added = [NetdevStep(None, netdev) for name, netdev in want.items() if name not in have]
    netdevs_removed = [NetdevStep(netdev, None) for name, netdev in have.items() if name not in want]

    full = len(guests) + len(have) + len(added) + len(netdevs_added) > MAX_PORTS
    taken = frozenset[object]().union(*(_holds(step.after) for step in (*changed, *added)))
    first = [step for step in removed if full or taken & _holds(step.before)]
    # It may be the same interface by another name.
    netdevs_first = netdevs_removed if netdevs_added or full else []
    bridge = BridgeStep(before, after)
    steps: list[AnyStep] = [*first, *netdevs_first]
    if bridge.keys:
        steps.append(bridge)
    steps += [*changed, *netdevs_changed, *netdevs_added, *added]
    steps += [step for step in removed if step not in first]
    steps += [step for step in netdevs_removed if step not in netdevs_first]
    return Plan(steps, tuple(_anew(before, after)), tuple(_never(step) for step in (*changed, *added) if _never(step)))


def _anew(before: Config, after: Config) -> Iterable[str]:
    keys = [key for key in ANEW if key != "workers" and getattr(before, key) != getattr(after, key)]
    if before.worker_count != after.worker_count:
        keys.insert(0, "workers")
    for key in keys:
        yield (
            f"{key}: takes a new start of the daemon, in which every guest is without network for a moment; "
            "put it into the file that xdpnet run has, and systemctl reload xdpnet (SIGHUP)"
        )


def _never(step: GuestStep) -> str:
    """An inherited connection is taken up once, at the start."""
    before, after = (guest.fd if guest else None for guest in (step.before, step.after))
    if before != after and (step.before or after is not None):
        return f"{step.what}: fd: an inherited connection cannot be taken up again; end the daemon, and start another"
    return ""


def _holds(guest: GuestConfig | None) -> frozenset[object]:
    """What no other guest can have meanwhile."""
    return frozenset() if guest is None else frozenset({guest.socket, *guest.macs} - {None})


def _in_order(steps: Sequence[GuestStep]) -> tuple[list[GuestStep], list[GuestStep]]:
    """Such that each finds free what another gives up; and those that others wait for in a circle."""
    waiting, ordered, circle = list(steps), list[GuestStep](), list[GuestStep]()
    while waiting:
        held = {id(step): _holds(step.before) for step in waiting}
        for step in waiting:
            if not any(_holds(step.after) & held[id(other)] for other in waiting if other is not step):
                ordered.append(step)
                break
        else:
            step = waiting[0]
            circle.append(step)
        waiting.remove(step)
    return ordered, circle
