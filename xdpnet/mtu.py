"""What guests believe that they may send, against what the interfaces carry: said once, with the remedy.

A guest takes its MTU from `mtu` or from its frontend (QEMU's host_mtu, which NET_SET_MTU tells us); an interface has
its own, which may change. Frames that are longer are dropped as `oversize`, and the guest hears of nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from xdpnet.core import MAX_MTU
from xdpnet.virtq.device import GuestDevice


class Carrier(Protocol):
    """What is needed of an interface; its MTU is 0 while it is away."""

    @property
    def mtu(self) -> int: ...


class MtuWatch:
    """Compares when it is asked to, and says what it has not said yet."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, str, int]] = {}

    def look(self, guests: Iterable[GuestDevice], interfaces: Mapping[str, Carrier]) -> None:
        """At these, which come and go."""
        carried = [(netdev.mtu, name) for name, netdev in interfaces.items() if netdev.mtu]
        if not carried:
            return
        least, interface = min(carried)
        for guest in guests:
            told = guest.told_mtu
            if told <= least:
                if told:  # else its frontend is away, and may come back as it was
                    self._said.pop(guest.name, None)
            elif self._said.get(guest.name) != (told, interface, least):
                self._said[guest.name] = told, interface, least
                guest.log.warning("%s", describe(guest, interface, least))


def describe(guest: GuestDevice, interface: str, least: int) -> str:
    """What is wrong and what helps."""
    told = guest.told_mtu
    who = f"its frontend has told it an MTU of {told} (QEMU: host_mtu)" if guest.guest_mtu else f"mtu = {told}"
    less = f"host_mtu={least} there" if guest.guest_mtu else f"mtu = {least}"
    more = f"ip link set dev {interface} mtu {told}, or " if told <= MAX_MTU else ""
    return f"{who}, and interface {interface} carries {least}: longer frames are dropped there (oversize); {more}{less}"
