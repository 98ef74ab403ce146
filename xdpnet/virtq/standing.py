"""How a guest stands with its frontends: who is here, and what became of those who were.

Its state (states.py) is said in the log when it has become another one, and not each connection: a frontend that comes
again without a pause would fill the log, and the cause be lost in it. What stays the same while it comes and goes is
said once.

One that leaves at once when it was told how many queues there are, and comes back to ask again, wants more of them:
QEMU does that hundreds of times a second. It is held off for longer and longer.
"""

import asyncio
import logging
import time

from xdpnet.sockets import Peer
from xdpnet.states import NO_FRONTEND, Facts, Kind, State, state_of
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.session import Session

HASTE_S = 1.0  # within which a frontend leaves that does not like what it was told
HELD_FIRST_S, HELD_MAX_S = 0.05, 1.0
LOOK_S = 0.3  # after a frontend has come or gone: what it is about shows by then


class Standing:
    """One guest's; it outlives its frontends."""

    def __init__(self, device: GuestDevice) -> None:
        self._device = device
        self._session: Session | None = None
        self._peer: Peer | None = None
        self._began = 0.0
        self._hasty = 0  # connections in a row that were left at once
        self._held_until = 0.0
        self._refused = ""  # why the last connection was ended
        self._said: Kind = NO_FRONTEND.kind
        self._looking: asyncio.TimerHandle | None = None

    def came(self, peer: Peer, session: Session) -> None:
        self._peer, self._session, self._began = peer, session, time.monotonic()
        self._look_soon()

    def went(self, left: bool, refused: str) -> None:
        """left: by itself; refused: why we ended it, if it is its fault."""
        session, self._session, self._refused = self._session, None, refused
        now = time.monotonic()
        if left and session and session.asked_queues and not session.had_memory and now <= self._began + HASTE_S:
            self._hasty += 1
        else:
            self._hasty = 0
        if self._hasty > 1:
            self._held_until = now + min(HELD_FIRST_S * 2 ** min(self._hasty, 10), HELD_MAX_S)
            self.say()
        else:
            self._look_soon()

    def close(self) -> None:
        """Nothing more is said by itself; idempotent."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def held_s(self) -> float:
        """For how long no frontend is met, for the last ones left at once."""
        return max(0.0, self._held_until - time.monotonic())

    def state(self) -> State:
        device, session = self._device, self._session
        # What became of the last one is what it will be of this one, until it has stayed.
        stays = session is not None and time.monotonic() > self._began + HASTE_S
        faults = device.port.faults()
        return state_of(
            Facts(
                pairs=device.pairs,
                connected=session is not None,
                wants_more=self._hasty > 1 and not stays,
                refused=(session.refused if session else "") or ("" if stays else self._refused),
                lacks_memory=device.lacks_memory,
                running=any(ring.running for ring in device.rings),
                broken=faults.broken,
                broken_ring=faults.broken_ring,
                starved_ring=faults.starved_ring,
                starved_s=faults.starved_s,
            )
        )

    def say(self) -> None:
        """In the log, if it is another one than was said; asked for now and then."""
        state = self.state()
        if state.kind == self._said or (state.kind == "no_driver" and self._is_young):
            return
        self._said = state.kind
        if self._session and state.kind in ("up", "stalled"):
            self._session.refused = ""  # it has got over it
        if state.kind in ("refused", "broken"):
            return  # which was said where it happened
        level = logging.INFO if state.well else logging.WARNING
        frontend = f" (its frontend: {self._peer})" if state.kind != NO_FRONTEND.kind and self._peer else ""
        self._device.log.log(level, "%s%s", state, frontend)

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = None
        if self._is_young:
            self._look_soon()
        else:
            self.say()

    @property
    def _is_young(self) -> bool:
        """Its frontend may be gone before it has said what it wants."""
        return self._session is not None and time.monotonic() < self._began + LOOK_S
