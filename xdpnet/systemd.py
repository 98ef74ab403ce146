"""sd_notify: tells the service manager how far we are. Without one, nothing happens.

Reference: sd_notify(3), systemd.service(5) WatchdogSec=.
"""

import logging
import os
import socket
import time

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
