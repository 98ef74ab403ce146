"""What signals and the operator ask of the daemon; no signal ends it without a word.

    SIGTERM, SIGINT, SIGQUIT   an orderly end
    SIGHUP                     the configuration is read again. If it is another one, and legal, the difference is made,
                               also where a guest has to connect anew for it, or, if there is no other way, the daemon
                               starts anew with it; else it says what is wrong and goes on. From a terminal, an orderly
                               end: it was closed (under nohup: nothing)
    others                     nothing, which is said

    apply                      {"config": a file's tables, "interrupt": whether guests may have to connect anew, "dry":
                               whether this is but asked}
    change                     {"kind": "guest" or "netdev", "action": "add", "set" or "remove", "table": its keys, as a
                               flag has them; "interrupt", "dry"}

The answer is {"done": a line for each step}, {"faults": why none was tried} or {"error": which has failed}.

Reference: signal(7); daemon(7) on SIGHUP.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeGuard

from xdpnet.config import IDENTITY, Config, Raw, parse, to_raw, with_table, without_table
from xdpnet.control import systemd
from xdpnet.control.changes import AnewError, Changes
from xdpnet.errors import ConfigError, XdpnetError

END = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
# Of those that end a process that knows nothing of them: what no fault, limit or debugger raises.
OTHERS = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)

log = logging.getLogger(__name__)


class Orders:
    """Wait for .given; then .following is the configuration to serve next, None: end."""

    def __init__(
        self,
        reread: Callable[[], Config] | None = None,
        vet: Callable[[Config], None] | None = None,
        locate: Callable[[Sequence[str]], Sequence[str]] = tuple,
    ) -> None:
        """reread: the configuration as it is now; vet: raises SetupError for one that cannot be served here; locate:
        has faults of what was read say where.
        """
        self._reread = reread
        self._vet = vet
        self._locate = locate
        self.given = asyncio.Event()
        self.following: Config | None = None
        self.ending = False
        self._changes: Changes | None = None  # of the daemon that is ready
        self._ready = asyncio.Event()
        self._rereading: asyncio.Task[None] | None = None

    def serve(self) -> None:
        """A daemon starts; orders are waited for again."""
        self.following = None
        if not self.ending:
            self.given.clear()

    def ready(self, changes: Changes) -> None:
        self._changes = changes
        self._ready.set()

    def not_ready(self) -> None:
        self._changes = None
        self._ready.clear()

    def end(self) -> None:
        self.following, self.ending = None, True
        self.given.set()

    @contextlib.contextmanager
    def by_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = [*END, *OTHERS]
        for number in END:
            loop.add_signal_handler(number, self._end, number)
        for number in OTHERS:
            loop.add_signal_handler(number, _ignore, number)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup(1)
            hang_up = (self._end, signal.SIGHUP) if os.isatty(2) else (self._read_again,)
            loop.add_signal_handler(signal.SIGHUP, *hang_up)
            handled.append(signal.SIGHUP)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        log.info("%s: stopping", _name(number))
        self.end()

    def _read_again(self) -> None:
        if self._reread is None or self.ending:
            return
        if self._rereading and not self._rereading.done():
            self._rereading.add_done_callback(lambda _: self._read_again())  # it may have read what is old by now
            return
        try:
            config = self._reread()
        except (XdpnetError, OSError) as error:
            _refuse(str(error).splitlines())
            return
        self._rereading = asyncio.get_running_loop().create_task(self._follow(config))

    async def _follow(self, config: Config) -> None:
        await self._ready.wait()
        changes = self._changes
        if changes is None:
            return  # the end has come first
        if config == changes.running:
            log.info("SIGHUP: the configuration is as it was")
            return
        systemd.notify(systemd.reloading())
        try:
            done = await changes.change(lambda _: config, interrupt=True)
            for line in done:
                log.info("SIGHUP: %s", line)
        except AnewError as error:
            log.info("SIGHUP: %s", "; ".join(fault.partition(";")[0] for fault in error.faults))
            self._start_anew(config, changes.running)
        except ConfigError as error:
            _refuse(self._locate(error.faults))
        except (XdpnetError, OSError) as error:
            _refuse(str(error).splitlines())
        except Exception:
            log.exception("SIGHUP: going on with the configuration as it was")
        if not self.given.is_set():
            systemd.notify("READY=1")

    def _start_anew(self, config: Config, running: Config) -> None:
        try:
            if any(guest.fd is not None for guest in (*config.guests, *running.guests)):
                raise ConfigError(["fd: an inherited connection cannot be taken up again"])
            if self._vet:
                self._vet(config)
        except (XdpnetError, OSError) as error:
            _refuse(self._locate(str(error).splitlines()))
            return
        log.info("SIGHUP: the configuration has changed: starting anew")
        self.following = config
        self.given.set()

    # ---- by the control socket ----

    def by_socket(self) -> dict[str, Callable[[Raw], Awaitable[Any]]]:
        return {"apply": self._apply, "change": self._change}

    async def _apply(self, asked: Raw) -> Any:
        wished = asked.get("config")
        if not isinstance(wished, dict):
            return {"error": "not an order: config has to be a table"}
        # The socket that this was asked by stays where it is, if nothing else is said.
        return await self._carry_out(lambda running: parse({"control": running.control or ""} | wished), asked)

    async def _change(self, asked: Raw) -> Any:
        kind, action, table = (asked.get(key) for key in ("kind", "action", "table"))
        if kind not in IDENTITY or action not in ("add", "set", "remove") or not is_flat(table):
            return {"error": "not an order: kind, action or table"}

        def wish(running: Config) -> Config:
            raw = to_raw(running)
            if action == "remove":
                return parse(without_table(raw, kind, table.get(IDENTITY[kind])))
            return parse(with_table(raw, kind, table, there=action == "set"))

        return await self._carry_out(wish, asked)

    async def _carry_out(self, wish: Callable[[Config], Config], asked: Raw) -> Any:
        changes = self._changes
        if changes is None or self.given.is_set():
            return {"error": "the daemon is starting or ending; ask again"}
        if changes.under_way:
            return {"error": "another change is under way; ask again"}
        dry = asked.get("dry") is True
        try:
            done = await changes.change(wish, interrupt=asked.get("interrupt") is True, dry=dry)
        except ConfigError as error:
            return {"faults": error.faults}
        except (XdpnetError, OSError) as error:
            log.error("order: %s", "; ".join(str(error).splitlines()))
            return {"error": str(error)}
        for line in () if dry else done:
            log.info("order: %s", line)
        return {"done": done}


def is_flat(table: object) -> TypeGuard[dict[str, str]]:
    """Keys and values as a flag has them."""
    return isinstance(table, dict) and all(isinstance(word, str) for pair in table.items() for word in pair)


def _refuse(faults: Sequence[str]) -> None:
    for line in faults:
        log.error("SIGHUP: %s", line)
    log.error("SIGHUP: going on with the configuration as it was")


def _ignore(number: int) -> None:
    log.warning("%s means nothing here: SIGTERM ends the daemon, SIGHUP has it read its configuration", _name(number))


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
