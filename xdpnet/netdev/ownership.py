"""Whose the addresses on an interface are: the host's are kept from guests, guests' are steered to them.

Owns the program's map of addresses and what the bridge was told of the host's; while attached, the receive filters of
the AF_PACKET socket. None of the host's own addresses on the interface is steered to a guest.
"""

import errno
import logging
import struct
from collections.abc import Iterable

from xdpnet import core
from xdpnet.bpf import loader
from xdpnet.netdev.group import GroupSocket
from xdpnet.netdev.link import Link, host_addresses
from xdpnet.ration import RationedLog

log = logging.getLogger(__name__)


class Addresses:
    """Of one netdev port. All calls from the control thread."""

    def __init__(self, name: str) -> None:
        self.stacked = False  # something may have come onto the interface whose address a guest has
        self._name = name
        self._log = RationedLog(log, name, about="interface")  # for what guests can provoke
        self._port: core.Netdev | None = None
        self._program: loader.Program | None = None
        self._group: GroupSocket | None = None
        self._own: frozenset[bytes] = frozenset()  # the host's addresses on the interface, as found last
        self._guarded: set[bytes] = set()  # of these, the bridge keeps from guests
        self._unguarded: set[bytes] = set()  # and what it could not, as was said
        self._macs: set[bytes] = set()  # in the program's map
        self._wanted_macs: frozenset[bytes] = frozenset()
        self._refused: frozenset[bytes] = frozenset()

    def open(self, port: core.Netdev, program: loader.Program) -> None:
        self._port, self._program = port, program

    def close(self) -> None:
        """With the port, and what the bridge knows of it, and the program."""
        self._program = None
        self._macs.clear()
        self._guarded.clear()

    def attach(self, link: Link, group: GroupSocket) -> None:
        """Before frames flow; OSError, SetupError."""
        self._claim(host_addresses(link))
        group.add(self._macs)
        self._group = group

    def detach(self) -> None:
        """What the interface was to receive goes with the socket."""
        self._group = None

    def follow(self, link: Link) -> None:
        """Look at the host's addresses anew; SetupError if the question failed, OSError if a filter is missing."""
        self._claim(self._look(link))

    def _look(self, link: Link) -> frozenset[bytes]:
        """The host's addresses on the interface. What the interface receives for guests is listed with them.

        So an address that a guest had first is the host's too if it stays listed without us. That is tried when there
        is a reason to: for a card that filters is deaf to guests meanwhile, for a millisecond.
        """
        if not self.stacked or self._group is None:
            return host_addresses(link) - self._macs | {link.address}
        self._group.drop(self._macs)
        try:
            found = host_addresses(link)
            self.stacked = False
            return found
        finally:
            self._group.add(self._macs)

    def _claim(self, own: frozenset[bytes]) -> None:
        """The host's own addresses are no guest's to use: neither does the bridge let one, nor are they steered."""
        port = self._port
        if port is None:
            return
        for mac in self._guarded - own:
            port.remove_mac(mac)
            self._guarded.discard(mac)
        self._unguarded &= own
        for mac in sorted(own - self._guarded):
            try:
                port.add_mac(mac)
                self._guarded.add(mac)
                self._unguarded.discard(mac)
            except OSError as error:
                # EEXIST: of another interface too, as those of a bond have it; or of a guest, which sync() says.
                if mac not in self._unguarded and error.errno != errno.EEXIST:
                    log.warning(
                        "%s: the host's address %s is not kept from guests: %s", self._name, mac.hex(":"), error
                    )
                self._unguarded.add(mac)
        if own != self._own:
            self._own = own
            self.sync(self._wanted_macs)

    def sync(self, macs: Iterable[bytes]) -> None:
        """Steer exactly these unicast addresses to the guests; remembered while the interface is away."""
        self._wanted_macs = frozenset(macs)
        if self._program is None:
            return
        wanted = {mac for mac in self._wanted_macs if len(mac) == 6 and not mac[0] & 1 and any(mac)}
        refused = self._wanted_macs & self._own
        for mac in refused - self._refused:
            self._log.warning("a guest uses %s, the host's own address; its frames stay the host's", mac.hex(":"))
        self._refused = refused
        wanted -= refused
        kept = self._macs & wanted
        added = sorted(wanted - kept)
        room = self._program.max_macs - len(kept)
        if len(added) > room:
            self._log.warning("%d guest addresses more than the program holds", len(added) - room)
            del added[room:]
        removed = self._macs - kept
        for mac in removed:
            core.bpf_map_delete(self._program.macs_fd, mac_key(mac))
            self._macs.discard(mac)
        for mac in added:
            core.bpf_map_update(self._program.macs_fd, mac_key(mac), struct.pack("=I", 1))
            self._macs.add(mac)
        if self._group:
            self._group.drop(removed)
            self._group.add(added)


def mac_key(mac: bytes) -> bytes:
    return mac + b"\0\0"  # struct mac_key
