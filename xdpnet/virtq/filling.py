"""A guest's new memory on its way into the core.

What may be lent to an interface has all its pages in the page tables from the start (c/memory/arena.h), and to put them
there takes up to 0.2 s for each GiB, or seconds where the frontend has them allocated, and never touched. So a thread
beside does that, part by part, while this frontend waits for its answer and nobody else does.

Invariant: what is staged belongs to the thread from when it begins until it ends, and to the core once applied; a
change that is closed meanwhile leaves it to the thread.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence

from xdpnet.core import Region, Staged
from xdpnet.virtq.fd import Fd

PART = 4 << 20  # bytes at a time: while they are filled nobody maps anything
NICENESS = 5  # a worker that is busy comes first


class MemoryChange:
    """A table, or a region, that was examined and is to be applied, by whoever calls apply(), on the control thread."""

    def __init__(
        self, fds: Sequence[Fd], staged: dict[Region, Staged], apply: Callable[[dict[Region, Staged]], int]
    ) -> None:
        self.seconds = 0.0  # that it took to fill
        self._fds = fds
        self._staged = staged
        self._apply = apply
        self._lock = threading.Lock()
        self._begun = self._ended = self._closed = False

    @property
    def wants_filling(self) -> bool:
        return bool(self._staged)

    @property
    def begun(self) -> bool:
        """The thread was there, or is."""
        return self._begun

    @property
    def size(self) -> int:
        """Bytes to fill."""
        return sum(staged.length for staged in self._staged.values())

    def fill(self) -> None:
        """In a thread of its own: as much as there is to be had, until it is closed."""
        with self._lock:
            if self._closed:
                return
            self._begun = True
        began = time.monotonic()
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            for staged in self._staged.values():
                staged.filled = self._fill(staged)
        finally:
            self.seconds = time.monotonic() - began
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            if self._closed:
                self._drop()

    def _fill(self, staged: Staged) -> bool:
        for start in range(0, staged.length, PART):
            if self._closed or not staged.fill(start, min(PART, staged.length - start)):
                return False
        return True

    def apply(self) -> int:
        """How many of its regions the frontend can shrink. What raises a ProtocolError changes nothing."""
        try:
            return self._apply(self._staged)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """It is not to be applied."""
        with self._lock:
            self._closed = True
            if self._ended or not self._begun:
                self._drop()

    def _drop(self) -> None:
        for staged in self._staged.values():
            staged.close()
        for fd in self._fds:
            fd.close()
