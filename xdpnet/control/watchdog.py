"""The service manager's watchdog, fed by a thread of its own while everybody goes on.

Everybody is the control thread, which says so by beat(), and the workers (stalls.py). Whoever has stood still for the
whole of the manager's period starves the watchdog; another period later the process is ended, and started again. Not
sooner: while a frontend punches a hole into its memory (0.3 s for each GiB), whoever reads there waits, and so does the
control thread for its worker. With a period of 30 s it would take 200 GiB at once to have the daemon restarted by that;
stalls that end in between, however many, do not count.

Reference: sd_watchdog_enabled(3).
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from xdpnet.control import systemd
from xdpnet.stalls import Stall

log = logging.getLogger(__name__)


class Watchdog:
    """Feeds from start() to close()."""

    def __init__(
        self, period_s: float, stalls: Callable[[], Mapping[int, Stall]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """stalls: what StallWatch found last, for any thread."""
        self._period_s = period_s
        self._stalls = stalls
        self._clock = clock
        self._beat = clock()
        self._starving = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xdpnet-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def beat(self) -> None:
        """The control thread goes on."""
        self._beat = self._clock()

    def _run(self) -> None:
        while not self._end.wait(self._period_s / 3):
            self.feed()

    def feed(self) -> bool:
        """Whether there was reason to."""
        still = self._clock() - min([self._beat, *(stall.since for stall in self._stalls().values())])
        if still < self._period_s:
            systemd.notify("WATCHDOG=1")
        elif not self._starving:
            log.error("stood still for %.1f s: the service manager's watchdog is not fed any more", still)
        self._starving = still >= self._period_s
        return not self._starving
