"""What one guest's frontend may take of what all share: the control thread's time, and the workers' standing still.

Legal messages cost others too: the control thread serves one at a time, and for many it parks all workers. So each is
charged what it took, and whoever has overdrawn is not read until the debt is paid. AT_ONCE_S is several times what QEMU
takes to start sixteen queue pairs; PER_S leaves the workers 98 % of their time beside a frontend that never rests.

Invariant: it belongs to the guest, not to a connection: who comes again finds what was left.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from xdpnet.core import Bridge
from xdpnet.ration import Clock, Ration

AT_ONCE_S = 0.5  # seconds of the control thread
PER_S = 0.1  # of each second
STANDSTILL = 5  # what a second of the workers counts: so 0.1 s at once, and 20 ms of each second


class Allowance:
    """One guest's."""

    def __init__(self, bridge: Bridge, clock: Clock = time.monotonic) -> None:
        self._bridge = bridge
        self._clock = clock
        self._ration = Ration(AT_ONCE_S, PER_S, clock)

    def wait_s(self) -> float:
        """How long nothing may be done for this guest; 0: something may."""
        return self._ration.wait_s()

    @contextmanager
    def charged(self) -> Iterator[None]:
        """What is done meanwhile is charged to the guest."""
        start, parked = self._clock(), self._bridge.parked_ns
        try:
            yield
        finally:
            standstill_s = (self._bridge.parked_ns - parked) / 1e9
            self._ration.spend(self._clock() - start + STANDSTILL * standstill_s)
