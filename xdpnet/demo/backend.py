"""The daemon as a child process: started by its command line, asked over its control socket."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from xdpnet.control.client import ask
from xdpnet.demo import process
from xdpnet.demo.topology import Namespace
from xdpnet.errors import ControlError, SetupError
from xdpnet.metrics.snapshot import Port, Snapshot

START_PATIENCE = 20.0
SETTLE_PATIENCE = 20.0


class Backend:
    """`xdpnet run` in a namespace. May be started again after its end."""

    def __init__(self, host: Namespace, directory: Path, arguments: Sequence[str], name: str = "xdpnet") -> None:
        self.control = directory / f"{name}.control"
        self.log = directory / f"{name}.log"
        self._command = host.command(sys.executable, "-m", "xdpnet", "run", *arguments, "--control", str(self.control))
        self._process: process.Process | None = None

    def start(self) -> "Backend":
        self._process = process.spawn(self._command, self.log)
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(ControlError):
                ask(str(self.control), "stats")
                return self
            time.sleep(0.02)
        self.stop()
        raise SetupError(f"the daemon did not start: {process.tail(self.log)}", "see what it says; try xdpnet check")

    @property
    def pid(self) -> int:
        if self._process is None:
            raise SetupError("the daemon was never started")
        return self._process.pid

    def snapshot(self) -> Snapshot:
        return Snapshot.from_json(ask(str(self.control), "stats"))

    def port(self, name: str) -> Port:
        return next(port for port in self.snapshot().ports if port.name == name)

    def await_guest(self, name: str, patience: float = 30.0) -> None:
        """Wait until the guest's driver has its rings up."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            ring = self.port(name).queues[0].rx_ring
            if ring and ring.started and ring.enabled:
                return
            time.sleep(0.02)
        raise SetupError(f"guest {name}: its rings did not come up: {process.tail(self.log)}")

    def settled(self, patience: float = SETTLE_PATIENCE) -> Snapshot:
        """A snapshot with no frame on its way: the books balance, or `patience` seconds have passed."""
        deadline = time.monotonic() + patience
        while not balanced(snapshot := self.snapshot()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return snapshot

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return process.end(self._process) if self._process else 0

    def wait(self, patience: float = 20.0) -> int:
        """Its exit status, once it has ended by itself or by a signal from elsewhere; negative: that signal."""
        return self._process.wait(patience) if self._process else 0

    def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        if self._process:
            self._process.kill()
            self._process.wait()


def balanced(snapshot: Snapshot) -> bool:
    return snapshot.totals.rest == 0
