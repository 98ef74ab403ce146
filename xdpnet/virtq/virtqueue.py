"""What the frontend has said about one ring.

    stopped --SET_VRING_KICK--> started --size, addresses and memory known--> running (the core has it)
       ^                           |                                             |
       +--------GET_VRING_BASE, reset, disconnect--------------------------------+

Enabled is independent of the three. The parts of a ring may come in any order; memory that goes away takes a ring from
running back to started, memory that returns takes it forward again. Owns the ring's three event descriptors.

Reference: QEMU docs/interop/vhost-user.rst, "Ring states".
"""

from xdpnet.core import RingConfig
from xdpnet.virtq.fd import Fd, number_of
from xdpnet.virtq.message import VringAddr


class Virtqueue:
    """One ring's configuration; even indices are receive rings, odd ones transmit rings."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.num = 0
        self.base = 0
        self.addr: VringAddr | None = None
        self.kick: Fd | None = None
        self.call: Fd | None = None
        self.err: Fd | None = None
        self.enabled = False
        self.started = False
        self.running = False

    def config(self) -> RingConfig | None:
        """What the core starts it with; None as long as a part is missing."""
        if not self.started or self.num == 0 or self.addr is None:
            return None
        return RingConfig(
            num=self.num,
            base=self.base,
            desc_addr=self.addr.desc,
            avail_addr=self.addr.avail,
            used_addr=self.addr.used,
            kick_fd=number_of(self.kick),
            call_fd=number_of(self.call),
            err_fd=number_of(self.err),
            logs=self.addr.logged,
            log_addr=self.addr.log,
        )

    def start(self, kick: Fd | None) -> None:
        """SET_VRING_KICK: takes the descriptor over; None: the ring is polled."""
        self.kick = _replace(self.kick, kick)
        self.started = True

    def stop(self) -> None:
        """Stopped; all but the kick is kept for the next start."""
        self.kick = _replace(self.kick, None)
        self.started = False

    def set_call(self, fd: Fd | None) -> None:
        self.call = _replace(self.call, fd)

    def set_err(self, fd: Fd | None) -> None:
        self.err = _replace(self.err, fd)

    def forget(self) -> None:
        """A stopped ring, as it was in the beginning."""
        self.set_call(None)
        self.set_err(None)
        self.num = self.base = 0
        self.addr = None


def _replace(old: Fd | None, new: Fd | None) -> Fd | None:
    if old is not None:
        old.close()
    return new
