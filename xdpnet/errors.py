"""The errors that a person meets: each message names the object, and the remedy where there is one.

XdpnetError
 |- ConfigError       the configuration; holds every fault at once
 |- SetupError        something the machine lacks: an interface, a capability, a kernel feature, a package
 |- SocketPathError   a UNIX socket's path that we may not take
 `- ControlError      the running daemon did not answer on its control socket

The data path raises nothing, it counts. virtq.message.ProtocolError is of this tree too.
"""

from collections.abc import Iterable


class XdpnetError(Exception):
    """Any failure that is reported as one line, without a traceback."""


class ConfigError(XdpnetError):
    """A configuration with one fault or more; str() has a line for each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class SetupError(XdpnetError):
    """The machine lacks something; the remedy says how to get it."""

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}; {remedy}" if remedy else message)


class SocketPathError(XdpnetError):
    """A socket path that is taken, foreign or unusable."""

    def __init__(self, path: str, message: str, remedy: str = "") -> None:
        self.path = path
        self.message = message
        self.remedy = remedy
        super().__init__(f"socket {path}: {message}" + (f"; {remedy}" if remedy else ""))


class ControlError(XdpnetError):
    """No daemon answered on the control socket, or its answer was an error."""
