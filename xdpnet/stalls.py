"""Whether the workers go on, seen from a thread of its own: the control thread itself may wait for one that does not.

A worker publishes its turns and where it is (c/worker/worker.h, worker_is_at); asleep, it ends a turn ten times a
second. One that has neither ended its turn nor moved between looks is stalled: by memory that does not answer, for want
of a processor, or because somebody stopped it. It is named once, with whom it was at, and once more when it goes on.
Nothing is done about it here: a thread that waits for memory can be ended with its process alone, which is the service
manager's affair (control/watchdog.py).
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xdpnet import core
from xdpnet.ration import RationedLog

LOOK_S = 0.5
STALLED_S = 1.0
LOOKS = 2  # as well: after the whole process was stopped, or the machine slept, the time alone says nothing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stall:
    """Where a worker is stuck ("at guest web's tx ring 0", "asleep") and since when, in monotonic seconds."""

    where: str
    since: float


@dataclass
class _Seen:
    what: tuple[int, core.Place | None, core.Place | None]
    since: float
    looks: int = 0


class StallWatch:
    """Looks at every worker twice a second until it is closed, which is before the bridge is."""

    def __init__(
        self,
        bridge: core.Bridge,
        describe: Callable[[core.Place], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bridge = bridge
        self._describe = describe
        self._clock = clock
        self._logs = [RationedLog(log, f"worker {worker}") for worker in range(bridge.workers)]
        self._seen: dict[int, _Seen] = {}
        self._stalls: Mapping[int, Stall] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xdpnet-stalls", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    @property
    def stalls(self) -> Mapping[int, Stall]:
        """By worker; what was found at the last look. For any thread."""
        return self._stalls

    def _run(self) -> None:
        while not self._end.wait(LOOK_S):
            try:
                self.look()
            except Exception:  # the next look may do better
                log.exception("workers not looked at")

    def look(self) -> None:
        now = self._clock()
        stalls: dict[int, Stall] = {}
        for worker in range(self._bridge.workers):
            stats = self._bridge.worker_stats(worker)
            what = (stats.loops, stats.at, stats.to)
            seen = self._seen.get(worker)
            if stats.parked or seen is None or seen.what != what:
                self._seen[worker] = _Seen(what, now)
                continue
            seen.looks += 1
            if seen.looks < LOOKS or now - seen.since < STALLED_S:
                continue
            stalls[worker] = self._stalls.get(worker) or Stall(self._where(stats.at, stats.to), seen.since)
            if worker not in self._stalls:
                self._logs[worker].warning("%s for %.1f s: %s", stalls[worker].where, now - seen.since, _why(stats))
        for worker, stall in self._stalls.items():
            if worker not in stalls:
                self._logs[worker].warning("goes on after %.1f s %s", now - stall.since, stall.where)
        self._stalls = stalls

    def _where(self, at: core.Place | None, to: core.Place | None) -> str:
        if at is None:
            return "asleep"
        return f"at {self._describe(at)}" + (f", delivering to {self._describe(to)}" if to and to != at else "")


def _why(stats: core.WorkerStats) -> str:
    """By the state of the thread; proc(5), /proc/tid/stat."""
    try:
        state = Path(f"/proc/self/task/{stats.tid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "it does not run"
    reasons = {"R": "others have its processor", "T": "somebody has stopped it", "t": "a debugger has stopped it"}
    return reasons.get(state, "the memory there does not answer" if stats.at else "it does not wake")
