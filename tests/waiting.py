"""Waiting for what happens soon, without a sleep that is too short or too long."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 30.0


def until(condition: Callable[[], object], patience: float = PATIENCE) -> float:
    """Wait until the condition holds; the time at which it did."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return time.monotonic()


def until_equal(value: Callable[[], T], wanted: T, patience: float = 10.0) -> None:
    deadline = time.monotonic() + patience
    while (now := value()) != wanted:
        assert time.monotonic() < deadline, f"{now}, not {wanted}"
        time.sleep(0.05)
