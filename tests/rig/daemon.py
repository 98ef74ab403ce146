"""`xdpnet run` as a child process."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.rig.waiting import PATIENCE_S
from xdpnet.control.client import ask
from xdpnet.metrics.snapshot import Port, Snapshot

READY = re.compile(r"ready: ")

T = TypeVar("T")


class Daemon:
    """A child process; what it says is in .log."""

    def __init__(
        self,
        directory: Path,
        words: tuple[str, ...],
        fds: tuple[int, ...],
        env: dict[str, str],
        prefix: tuple[str, ...],
        interpreter: tuple[str, ...],
    ) -> None:
        self.control = str(directory / "control.sock")
        self._log = directory / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *interpreter, "-m", "xdpnet", "run", "--control", self.control, *words],
                stderr=log, stdout=log, pass_fds=fds, env={**os.environ, **env},
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text()

    def until(self, holds: Callable[[], T | None], what: str = "") -> T:
        """The first true answer."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := holds()):
            assert time.monotonic() < deadline, f"never: {what}\n{self.log}"
            time.sleep(0.02)
        return found

    def until_said(self, words: str, times: int = 1) -> None:
        self.until(lambda: self.log.count(words) == times, words)

    def ready(self) -> "Daemon":
        self.until(lambda: READY.search(self.log) or self.process.poll() is not None, "ready")
        assert self.process.poll() is None, self.log
        return self

    def snapshot(self) -> Snapshot:
        return Snapshot.from_json(ask(self.control, "stats"))

    def port(self, name: str) -> Port:
        return next(port for port in self.snapshot().ports if port.name == name)

    def get(self, path: str) -> tuple[int, str]:
        found = self.until(lambda: re.search(r"metrics: http://([^:]+):(\d+)/", self.log), "metrics address")
        connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=PATIENCE_S)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE_S)


@contextmanager
def daemon(
    directory: Path,
    *words: str,
    fds: tuple[int, ...] = (),
    env: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    interpreter: tuple[str, ...] = (sys.executable,),
) -> Iterator[Daemon]:
    """`prefix`: the words of a program that runs it."""
    made = Daemon(directory, words, fds, env or {}, prefix, interpreter)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
        made.process.wait()


def guest(directory: Path, name: str = "web", more: str = "") -> str:
    """The words after --guest."""
    return f"{name},socket={directory}/{name}.sock{more}"
