"""The service manager: how far we are (sd_notify), and lines in its journal. Without one, nothing happens.

Reference: sd_notify(3), systemd.service(5) WatchdogSec=; priorities: sd-daemon(3), systemd.exec(5) on JOURNAL_STREAM.
"""

import logging
import os
import socket
import time

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Sends one datagram, as READY=1; a manager that does not listen must not stop us."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError as error:
        log.warning("service manager at %s: %s", path, error.strerror or error)


def reloading() -> str:
    """The state of one that starts anew in the same process; the next READY=1 ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def watchdog_s() -> float | None:
    """How often the manager wants to hear of us, at the latest; None if it does not."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6 if usec.isascii() and usec.isdigit() and int(usec) else None


def is_journal(fd: int) -> bool:
    """Whether what is written there goes to the journal; a service may have been given another stderr."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalFormatter(logging.Formatter):
    """Each line, of a traceback too, begins with its priority, which the journal takes off again. It knows the rest."""

    def format(self, record: logging.LogRecord) -> str:
        return prioritized(super().format(record), record.levelno)


def prioritized(text: str, level: int) -> str:
    return "\n".join(f"<{PRIORITIES.get(level, 6)}>{line}" for line in text.splitlines())
