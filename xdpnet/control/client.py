"""Asks the running daemon over its control socket; server.py says how."""

import json
import socket
from typing import Any

from xdpnet.errors import ConfigError, ControlError

ANSWER_S = 10.0  # a daemon that has many guests, or is joining a large one to its interfaces, takes a second or two
CHANGED_S = 120.0  # the program of an interface is compiled, and what just ended may hold a socket for two seconds


def ask(path: str, command: str, answer_s: float = ANSWER_S, **more: Any) -> Any:
    """The running daemon's answer; ConfigError holds the faults of what it was to become."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(answer_s)
            sock.connect(path)
            sock.sendall(json.dumps({"command": command, **more}).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.readline()
    except PermissionError as error:
        raise ControlError(f"control socket {path}: {error.strerror}; run as root or as the daemon's user") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ControlError(f"no daemon at {path}; start it with xdpnet run, or name its socket: --control") from error
    except TimeoutError as error:
        raise ControlError(
            f"control socket {path}: no answer in {answer_s:.0f} s; /healthz says what holds up the daemon"
        ) from error
    except OSError as error:
        raise ControlError(f"control socket {path}: {error.strerror or error}") from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise ControlError(f"control socket {path}: the daemon ended the connection without an answer") from error
    if isinstance(answer, dict) and "faults" in answer:
        raise ConfigError(answer["faults"])
    if isinstance(answer, dict) and "error" in answer:
        raise ControlError(f"control socket {path}: {answer['error']}")
    return answer
