"""Waiting for what happens soon, without a sleep that is too short or too long."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# Nothing takes so long that works, however busy the machine is.
PATIENCE_S = 60.0


def eventually(true: Callable[[], object], timeout: float = PATIENCE_S) -> bool:
    """Whether it comes true, for what no file descriptor tells of."""
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def until(condition: Callable[[], object], patience: float = PATIENCE_S) -> float:
    """Wait until the condition holds; the time at which it did."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return time.monotonic()


def until_equal(value: Callable[[], T], wanted: T, patience: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience
    while (now := value()) != wanted:
        assert time.monotonic() < deadline, f"{now}, not {wanted}"
        time.sleep(0.005)


def once_free(take: Callable[[], T]) -> T:
    """What comes of it when it is not busy any more, as the queue of a socket that was closed is for a moment."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return take()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
