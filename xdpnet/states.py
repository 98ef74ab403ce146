"""The state that a guest is in, in words: the one place that the log, `xdpnet stats`, its JSON, the metric
`xdpnet_guest_state` and the alerts have it from.

A guest is in one state at a time, of several the one that the others follow from, in the order of state_of().
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["too_few_queues", "refused", "no_frontend", "broken", "no_memory", "no_driver", "stalled", "up"]

STARVED_S = 2.0  # a frame waits for a second: whoever has had no buffer for longer loses what comes


@dataclass(frozen=True, slots=True)
class State:
    """`kind` is the label of the metric and the key of the alerts; `words` and `remedy` are for people."""

    kind: Kind
    words: str
    remedy: str = ""

    @property
    def well(self) -> bool:
        """There is nothing to be done about it on this side."""
        return self.kind in ("no_frontend", "no_driver", "up")

    def __str__(self) -> str:
        return f"{self.words}; {self.remedy}" if self.remedy else self.words


UP = State("up", "up")
NO_FRONTEND = State("no_frontend", "waiting for a frontend")
NO_DRIVER = State("no_driver", "waiting for a driver")
NO_MEMORY = State(
    "no_memory",
    "memory is not shared (share=on)",
    "give its QEMU -object memory-backend-memfd,share=on, and use that for all of its memory",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a guest. Rings are numbered as vhost-user does.

    wants_more: its frontend leaves whenever it hears how many queue pairs there are. refused: what the frontend that
    is here, or was last, was refused, and has not got over. running: a ring is. starved_s: for how long starved_ring
    has had no buffer for frames that came.
    """

    pairs: int
    connected: bool = False
    wants_more: bool = False
    refused: str = ""
    lacks_memory: bool = False
    running: bool = False
    broken: str = ""
    broken_ring: int = 0
    starved_ring: int = 0
    starved_s: float = 0.0


def state_of(facts: Facts) -> State:
    if not facts.running and facts.wants_more:
        plural = "s" if facts.pairs > 1 else ""
        return State(
            "too_few_queues",
            f"asks for more than the {facts.pairs} queue pair{plural} that it has",
            "`queues` of its network card and of the guest in our configuration have to be the same",
        )
    if not facts.running and facts.refused:
        return State("refused", f"refused: {facts.refused}")
    if not facts.connected:
        return NO_FRONTEND
    if facts.broken:
        broken = f"broken: {_ring(facts.broken_ring)}, {facts.broken}"
        return State("broken", broken, "a reset of its driver revives it")
    if facts.lacks_memory:
        return NO_MEMORY
    if not facts.running:
        return NO_DRIVER
    if facts.starved_s >= STARVED_S:
        where = f" in {_ring(facts.starved_ring)}" if facts.pairs > 1 else ""
        return State(
            "stalled",
            f"stalled: no receive buffer{where} for {facts.starved_s:.0f} s",
            "its driver takes no frames: its interface is down, or the guest hangs or is paused",
        )
    return UP


def _ring(number: int) -> str:
    pair, direction = divmod(number, 2)
    return f"{'tx' if direction else 'rx'} ring {pair}"
