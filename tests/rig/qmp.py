"""QEMU's monitor: commands that have to succeed, and events that are waited for; QEMU docs/interop/qmp-spec.rst."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.rig.waiting import PATIENCE_S


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A connection to a monitor that listens (`-qmp unix:PATH,server=on,wait=off`)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rw")
        self._events: list[dict[str, Any]] = []
        self._read()
        self.run("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def run(self, command: str, **arguments: Any) -> Any:
        """`_` in the name of an argument is a `-` of QEMU's."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": given}) + "\n")
        self._stream.flush()
        while "return" not in (said := self._read()):
            if "error" in said:
                raise QmpError(f"{command} {given}: {said['error']['desc']}")
        return said["return"]

    def wait(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """For an event, from those on that have come since the last that was waited for."""
        while True:
            while self._events:
                if holds(event := self._events.pop(0)):
                    return event
            self._read()

    def unplug(self, device: str) -> None:
        """Until the guest has let go of it."""
        self._events.clear()
        self.run("device_del", id=device)
        event = self.wait(
            lambda event: (
                event["event"] in ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
                and event["data"].get("device") == device
            )
        )
        if event["event"] != "DEVICE_DELETED":
            raise QmpError(f"the guest keeps {device}")

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise QmpError("QEMU has gone")
        said: dict[str, Any] = json.loads(line)
        if "event" in said:
            self._events.append(said)
        return said
