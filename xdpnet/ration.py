"""What somebody else can make us do is rationed: so much at once, then so much a second.

Invariant: whatever a peer does, its lines in the log are at most LINES at once and one more each LINE_PAUSE_S, and of
one kind LINES_A_KIND and one more each KIND_PAUSE_S, so that what is said again and again leaves room for what is not;
the next that is let through tells how many were held back. Nothing here sleeps: who may not go on is told for how long.
"""

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

LINES = 10  # at once: a frontend that comes, is refused something, goes and comes back is told whole
LINE_PAUSE_S = 5.0
LINES_A_KIND = 3
KIND_PAUSE_S = 60.0

Clock = Callable[[], float]


class Ration:
    """An amount that refills, `per_s` a second, up to `at_once`. It may be overdrawn: then one has to wait."""

    def __init__(self, at_once: float, per_s: float, clock: Clock = time.monotonic) -> None:
        self._at_once = self._left = at_once
        self._per_s = per_s
        self._clock = clock
        self._now = clock()

    def spend(self, amount: float) -> None:
        self._refill()
        self._left -= amount

    def wait_s(self, amount: float = 0) -> float:
        """How long until there is so much; 0: there is."""
        self._refill()
        return max(0.0, (amount - self._left) / self._per_s)

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._at_once, self._left + (now - self._now) * self._per_s)
        self._now = now


class RateLimit:
    """Lets so many lines through for each subject, then one each pause, and counts the others."""

    def __init__(self, pause_s: float, at_once: int = 1, clock: Clock = time.monotonic) -> None:
        self._pause = pause_s
        self._at_once = at_once
        self._clock = clock
        self._until: dict[Hashable, float] = {}  # the time that a subject's lines so far have used up
        self._held: dict[Hashable, int] = {}

    def is_open(self, subject: Hashable) -> bool:
        """Whether a line would be let through."""
        now = self._clock()
        return max(self._until.get(subject, now), now) <= now + (self._at_once - 1) * self._pause

    def spend(self, subject: Hashable) -> None:
        """A line of it is said."""
        now = self._clock()
        self._until[subject] = max(self._until.get(subject, now), now) + self._pause

    def allow(self, subject: Hashable) -> str | None:
        """What to add to the line, "" most of the time; None: say nothing now."""
        if not self.is_open(subject):
            self._held[subject] = self._held.get(subject, 0) + 1
            return None
        self.spend(subject)
        held = self._held.pop(subject, 0)
        return f" ({held} more since the last line)" if held else ""


class RationedLog(logging.LoggerAdapter[logging.Logger]):
    """A logger for what one peer can provoke: each line begins with its name, and there are only so many.

    A kind is a line without its arguments. about: what has the name, "guest" or "interface", for the journal's fields.
    """

    def __init__(self, log: logging.Logger, name: str, clock: Clock = time.monotonic, about: str = "") -> None:
        super().__init__(log, {"about": (about, name)})
        self._name = name
        self._all = RateLimit(LINE_PAUSE_S, LINES, clock)
        self._kinds = RateLimit(KIND_PAUSE_S, LINES_A_KIND, clock)
        self._held: dict[object, int] = {}

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        if not self.isEnabledFor(level):
            return
        if not (self._all.is_open(self._name) and self._kinds.is_open(msg)):
            self._held[msg] = self._held.get(msg, 0) + 1
            return
        self._all.spend(self._name)
        self._kinds.spend(msg)
        kwargs.setdefault("stacklevel", 2)  # whoever said it, for the journal
        super().log(level, f"%s: {msg}%s", self._name, *args, self._left_out(msg), **kwargs)

    def _left_out(self, kind: object) -> str:
        like, others = self._held.pop(kind, 0), sum(self._held.values())
        self._held.clear()
        words = [f"{like} more"] if like else []
        words += [f"{others} of other kinds"] if others else []
        return f" ({', '.join(words)} since the last line)" if words else ""
