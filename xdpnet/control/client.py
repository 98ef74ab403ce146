"""Asks the running daemon over its control socket; server.py says how."""

import json
import socket
from typing import Any

from xdpnet.errors import ControlError

ANSWER_S = 10.0  # a daemon that has many guests, or is joining a large one to its interfaces, takes a second or two


def ask(path: str, command: str) -> Any:
    """The running daemon's answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(path)
            sock.sendall(json.dumps({"command": command}).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.readline()
    except PermissionError as error:
        raise ControlError(f"control socket {path}: {error.strerror}; run as root or as the daemon's user") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ControlError(f"no daemon at {path}; start it with xdpnet run, or name its socket: --control") from error
    except TimeoutError as error:
        raise ControlError(
            f"control socket {path}: no answer in {ANSWER_S:.0f} s; /healthz says what holds up the daemon"
        ) from error
    except OSError as error:
        raise ControlError(f"control socket {path}: {error.strerror or error}") from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise ControlError(f"control socket {path}: the daemon ended the connection without an answer") from error
    if isinstance(answer, dict) and "error" in answer:
        raise ControlError(f"control socket {path}: {answer['error']}")
    return answer
