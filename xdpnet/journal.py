"""The log: lines for a terminal, entries with fields for systemd's journal; its level, also at run time.

Lines name what they are about first, as `guest web: ...`, `interface eth1: ...`, `tx ring 0`. In the journal that is in
fields as well, GUEST, PORT (a guest or an interface), QUEUE, WORKER, which journalctl selects by: they are taken from
the arguments of a line, never from its text, in which others may have a say. Nothing here waits: what the journal does
not take at once goes to the standard error output.

Reference: systemd's "Native Journal Protocol" (JOURNAL_NATIVE_PROTOCOL); sd-daemon(3); systemd.journal-fields(7).
"""

import logging
import re
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from functools import partial

from xdpnet.control import systemd

JOURNAL = "/run/systemd/journal/socket"
LEVELS = ("debug", "info", "warning", "error")
# What a placeholder of a line is about, by the word before it.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "guest": ("GUEST", "PORT"),
    "interface": ("PORT",),
    "ring": ("QUEUE",),
    "queue": ("QUEUE",),
    "worker": ("WORKER",),
}
_PLACEHOLDER = re.compile(r"(?:(\w+) )?%[-#0-9.]*([a-z%])")

log = logging.getLogger("xdpnet")


def set_up(level: int, path: str = JOURNAL) -> None:
    """Of the journal, if standard error is its."""
    logging.raiseExceptions = False  # a closed stderr is no reason to stop serving
    errors = logging.StreamHandler(sys.stderr)
    handler: logging.Handler = errors
    if systemd.is_journal(2):
        errors.setFormatter(systemd.JournalFormatter())
        handler = JournalHandler(errors, path)
        handler.setFormatter(logging.Formatter())  # its fields say the rest
    else:
        errors.setFormatter(logging.Formatter("xdpnet: %(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def level() -> str:
    return logging.getLevelName(logging.getLogger().level).lower()


def set_level(name: str) -> dict[str, str]:
    """From now on, until it is told otherwise or ends; what it was, and is."""
    before = level()
    logging.getLogger().setLevel(name.upper())
    if name != before:
        log.log(max(logging.INFO, logging.getLogger().level), "the log has level %s now, it had %s", name, before)
    return {"level": name, "before": before}


# Of the control socket: `log` asks, `log debug` sets.
COMMANDS: dict[str, Callable[[], dict[str, str]]] = {"log": lambda: {"level": level()}}
COMMANDS |= {f"log {name}": partial(set_level, name) for name in LEVELS}


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """What the line is about."""
    what, whose = getattr(record, "about", ("", ""))
    found = dict.fromkeys(FIELDS.get(what, ()), whose)
    arguments = record.args if isinstance(record.args, tuple) else ()
    placeholders = (match for match in _PLACEHOLDER.finditer(str(record.msg)) if match[2] != "%")
    for match, value in zip(placeholders, arguments, strict=False):
        for name in FIELDS.get(match[1] or "", ()):
            found.setdefault(name, str(value))
    return found


class JournalHandler(logging.Handler):
    """One datagram for each entry, a traceback included; what does not go there is `otherwise`'s."""

    def __init__(self, otherwise: logging.Handler, path: str = JOURNAL) -> None:
        super().__init__()
        self._otherwise = otherwise
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        entry = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(systemd.PRIORITIES.get(record.levelno, 6)),
            "SYSLOG_IDENTIFIER": "xdpnet",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            **fields_of(record),
        }
        try:
            self._socket.sendto(b"".join(_field(name, value) for name, value in entry.items()), self._path)
        except OSError:  # it is not there, or full, or the entry is too long for it
            self._otherwise.handle(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _field(name: str, value: str) -> bytes:
    """With its length: a value may have line feeds in it."""
    data = value.encode(errors="replace")
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
