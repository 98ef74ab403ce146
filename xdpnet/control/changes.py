"""The wished-for state of a running daemon, and how it becomes another: all or nothing.

Knows configurations and steps (plan.py), neither guests nor the core: whoever serves these is asked what stands against
a step, and carries it out. First the whole new state is looked at, and every fault is told at once; then it is
made, step by step; if one fails, those before it are undone, the last first.

Invariant: `running` is what is served whenever no change is under way; at most one is.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from xdpnet.config import Config, GuestConfig, NetdevConfig
from xdpnet.control.plan import AnyStep, BridgeStep, GuestStep, plan
from xdpnet.errors import ConfigError, SetupError, XdpnetError

log = logging.getLogger(__name__)


class Hands(Protocol):
    """Whoever serves guests and interfaces."""

    def faults(self, after: Config, steps: Sequence[AnyStep], interrupt: bool) -> list[str]:
        """What stands against these, as far as it can be told before; interrupt: a guest may have to connect anew."""
        ...

    async def carry_out(self, step: AnyStep) -> None:
        """All or nothing; XdpnetError, OSError. LostError: neither what was nor what was to be is there."""
        ...

    def served(self) -> None:
        """The whole change is made: what may be said of it."""
        ...


class AnewError(ConfigError):
    """What can be changed by a new start alone."""


class LostError(SetupError):
    """A step has failed, and what was there before it could not be had again."""


class Changes:
    """Of one daemon."""

    def __init__(self, running: Config, hands: Hands) -> None:
        self.running = running
        self._hands = hands
        self._lock = asyncio.Lock()

    @property
    def under_way(self) -> bool:
        return self._lock.locked()

    async def change(self, wish: Callable[[Config], Config], interrupt: bool = False, dry: bool = False) -> list[str]:
        """What was done, or with `dry` would be, a line each; none: it is as it is wished.

        wish: what is to be, of what is. ConfigError: it cannot be, and nothing was tried. AnewError: a new start
        alone could do it. SetupError: a step has failed, and what was done before is undone.
        """
        async with self._lock:
            after = wish(self.running)
            planned = plan(self.running, after)
            found = [*planned.never, *self._hands.faults(after, planned.steps, interrupt)]
            if found:
                raise ConfigError([*planned.anew, *found])
            if planned.anew:
                raise AnewError(planned.anew)
            if not dry:
                await self._make(planned.steps)
                self.running = after
                self._hands.served()
            return [str(step) for step in planned.steps]

    async def _make(self, steps: Sequence[AnyStep]) -> None:
        done: list[AnyStep] = []
        for step in steps:
            try:
                await self._hands.carry_out(step)
            except Exception as error:
                left = await self._undo(done)
                if isinstance(error, LostError):
                    self.running = _without(self.running, step.removal)
                    left.append(f"{step.what} is gone")
                elif not isinstance(error, XdpnetError | OSError):
                    raise
                end = f"not undone: {', '.join(left)}" if left else "all is as it was"
                raise SetupError(f"{step}: {error}\n{end}") from error
            done.append(step)

    async def _undo(self, done: Sequence[AnyStep]) -> list[str]:
        """What could not be: `running` is without it then, for so it is."""
        left = []
        for step in reversed(done):
            try:
                await self._hands.carry_out(step.turned_round)
            except Exception as error:
                log.exception("%s: not undone", step)
                left.append(f"{step}: {error}")
                self.running = _without(self.running, step.removal if isinstance(error, LostError) else step)
        return left


def _without(config: Config, step: AnyStep) -> Config:
    """As it is when the step could not be undone."""
    if isinstance(step, BridgeStep):
        return (
            step.after.model_copy(update={"guests": config.guests, "netdevs": config.netdevs}) if step.after else config
        )
    ports: dict[str, tuple[GuestConfig, ...] | tuple[NetdevConfig, ...]]
    if isinstance(step, GuestStep):
        kept = tuple(guest for guest in config.guests if guest != step.before)
        ports = {"guests": (*kept, step.after) if step.after else kept}
    else:
        others = tuple(netdev for netdev in config.netdevs if netdev != step.before)
        ports = {"netdevs": (*others, step.after) if step.after else others}
    return config.model_copy(update=ports)
