"""What signals ask of the daemon; none of them ends it without a word.

    SIGTERM, SIGINT, SIGQUIT   an orderly end
    SIGHUP                     the configuration is read again. If it is another one, and legal, it is served from then
                               on; else the daemon says what is wrong and goes on. From a terminal, an orderly end: it
                               was closed (under nohup: nothing)
    others                     nothing, which is said

Reference: signal(7); daemon(7) on SIGHUP.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator

from xdpnet.config import Config
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

    def __init__(self, reread: Callable[[], Config] | None = None, vet: Callable[[Config], None] | None = None) -> None:
        """reread: the configuration as it is now; vet: raises SetupError for one that cannot be served here."""
        self._reread = reread
        self._vet = vet
        self.given = asyncio.Event()
        self.following: Config | None = None
        self.ending = False
        self.serving: Config | None = None

    def serve(self, config: Config) -> None:
        """This one is served now; orders are waited for again."""
        self.serving, self.following = config, None
        if not self.ending:
            self.given.clear()

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
        try:
            config = self._reread()
            if config == self.serving:
                log.info("SIGHUP: the configuration is as it was")
                return
            if any(guest.fd is not None for guest in (*config.guests, *(self.serving.guests if self.serving else ()))):
                raise ConfigError(["fd: an inherited connection cannot be taken up again"])
            if self._vet:
                self._vet(config)
        except (XdpnetError, OSError) as error:
            for line in str(error).splitlines():
                log.error("SIGHUP: %s", line)
            log.error("SIGHUP: going on with the configuration as it was")
            return
        log.info("SIGHUP: the configuration has changed: starting anew")
        self.following = config
        self.given.set()


def _ignore(number: int) -> None:
    log.warning("%s means nothing here: SIGTERM ends the daemon, SIGHUP has it read its configuration", _name(number))


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
