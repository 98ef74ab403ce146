"""What guests without a `mac` have taught the bridge, kept in a file so that a restart of the daemon does not lose it.

Until a guest speaks again nobody could reach it otherwise, for frames to unknown addresses go to the host. The file is
beside the control socket, as JSON: {"web": [["52:54:00:00:00:01", 0]]}, each address with its VLAN. It gives a guest
what it had taught itself and no more: another one that speaks from there, or a station of the wire, has it at once.

Invariant: the file is ours alone, or it is not read; a reader of it sees an old or a new one, never a part.
"""

import json
import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from xdpnet.config import Mac
from xdpnet.core import Bridge, Guest

SHARE = 0.02  # of the control thread's time
MAX_BYTES = 64 << 20  # 127 guests that have taught 4096 addresses each are 16 MiB

_Taught = dict[str, list[tuple[Mac, Annotated[int, Field(ge=0, le=4095)]]]]

log = logging.getLogger(__name__)


class AddressBook:
    """The file of one daemon."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._not_before = clock()
        self._kept: frozenset[tuple[int, bytes, int]] = frozenset()
        self._said = ""

    def restore(self, bridge: Bridge, ports: Mapping[str, Guest]) -> None:
        """Teaches the bridge what it knew of these guests, by name; what cannot be read is said and goes."""
        try:
            kept = self._read()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("addresses %s: not restored: %s", self._path, error)
            return
        for name, taught in kept.items():
            for mac, vlan in taught:
                with suppress(OSError):  # not the guest's to use any more, or more than its share
                    if name in ports:
                        ports[name].remember(mac, vlan)
        self._kept = bridge.taught()
        log.info("addresses %s: restored: %d", self._path, len(self._kept))

    def _read(self) -> dict[str, list[tuple[bytes, int]]]:
        with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
                raise ValueError("not a file of this user that nobody else may write")
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        try:
            return TypeAdapter(_Taught).validate_json(text)
        except ValidationError as error:
            raise ValueError(f"not as it was written: {error.errors()[0]['msg']}") from error

    def keep(self, bridge: Bridge, ports: Mapping[str, int], last: bool = False) -> None:
        """Writes what the guests have taught by now, if that is not what the file has.

        As often as guests change it, but for no more than SHARE of the time, unless it is the last chance.
        """
        start = self._clock()
        if start < self._not_before and not last:
            return
        self._keep(bridge, ports)
        end = self._clock()
        self._not_before = end + (end - start) / SHARE

    def _keep(self, bridge: Bridge, ports: Mapping[str, int]) -> None:
        taught = bridge.taught()
        if taught == self._kept:
            return
        names = {port: name for name, port in ports.items()}
        kept: dict[str, list[tuple[str, int]]] = {}
        for port, mac, vlan in sorted(taught):
            if port in names:
                kept.setdefault(names[port], []).append((mac.hex(":"), vlan))
        try:
            self._write(kept)
        except OSError as error:  # tried again at the next look
            if str(error) != self._said:
                log.warning("addresses %s: not kept for a restart: %s", self._path, error)
            self._said = str(error)
        else:
            self._kept, self._said = taught, ""

    def _write(self, kept: Any) -> None:
        if not kept:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            return
        new = f"{self._path}.new"
        with suppress(FileNotFoundError):
            os.unlink(new)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(kept, file)
        os.replace(new, self._path)
