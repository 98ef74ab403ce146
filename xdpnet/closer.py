"""Descriptors that others have sent us are closed where it does no harm if that takes long.

close() may wait as long as the sender likes: for unsent data (a TCP socket with SO_LINGER), for a server (a file on
FUSE), for a socket's queue in which such descriptors wait. So neither the control thread nor a worker ever closes one,
and a connection is closed here too, for its queue may hold some. Each guest has a closer of its own: one that waits
keeps only that guest's others waiting, and its frontends are turned away while MAX_PENDING of them do.

Invariant: what is handed over stays open, and is counted, until its close() has returned; the thread exists only while
there is something to close, and shortly afterwards.
"""

import contextlib
import os
import queue
import threading

from xdpnet import threads

MAX_PENDING = 128  # more than a frontend sends from start to end, with sixteen queue pairs
IDLE_S = 1.0  # until the thread ends


class Closer:
    """Closes one peer's descriptors, one after another."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.RLock()  # whoever holds it may be interrupted by the garbage collector's close()
        self._runs = False
        self.pending = 0

    @property
    def full(self) -> bool:
        """Whether so many wait already that no more may be taken in."""
        return self.pending >= MAX_PENDING

    def close(self, number: int) -> None:
        """Takes a descriptor over; it may be open for a while yet."""
        with self._lock:
            self.pending += 1
            self._queue.put(number)
            if self._runs:
                return
            self._runs = True
        try:
            threads.start(self._run)
        except RuntimeError:  # no thread to be had now: the next one that is handed over tries again
            self._runs = False

    def _run(self) -> None:
        try:
            self._close_all()
        except MemoryError:  # nor is there room for one: the same
            self._runs = False

    def _close_all(self) -> None:
        while True:
            try:
                number = self._queue.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._queue.empty():
                        self._runs = False
                        return
                continue
            # Linux frees the descriptor whatever close() says; what it says concerns files, not our kinds.
            with contextlib.suppress(OSError):
                os.close(number)
            with self._lock:
                self.pending -= 1
