"""A file descriptor with one owner.

Invariant: a descriptor that came over a socket is inside an Fd from the first instant, and is closed exactly once: by
close(), or by whoever took it over with detach(). Dropping an Fd closes it too; that is the net, not the plan. Closing
is left to a Closer, for it may take as long as the sender likes.
"""

from types import TracebackType
from typing import Self

from xdpnet.closer import Closer


class Fd:
    """Owns one descriptor."""

    __slots__ = ("_closer", "_number")

    def __init__(self, number: int, closer: Closer) -> None:
        self._number = number
        self._closer = closer

    def fileno(self) -> int:
        if self._number < 0:
            raise ValueError("the descriptor is closed")
        return self._number

    def detach(self) -> int:
        """The bare descriptor, now the caller's to close."""
        number, self._number = self.fileno(), -1
        return number

    def close(self) -> None:
        """Has it closed; more than once does no harm."""
        number, self._number = self._number, -1
        if number >= 0:
            self._closer.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self._number})"


def number_of(fd: Fd | None) -> int:
    """The descriptor, or -1 for none, as the core has it."""
    return -1 if fd is None else fd.fileno()
