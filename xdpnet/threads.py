"""Threads that nobody waits for as they start.

threading.Thread.start() waits until the new thread says that it runs: for ever, if that dies before, for want of memory
(CPython, Thread._bootstrap_inner). The control thread cannot have that.
"""

import _thread
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

ANSWER_S = 5.0

T = TypeVar("T")


def start(run: Callable[[], None]) -> None:
    """Runs it in a thread. Raises RuntimeError if there is none to be had."""
    _thread.start_new_thread(run, ())


def answer(question: Callable[[], T]) -> T:
    """What it returns, or raises, in a short thread. Raises TimeoutError after ANSWER_S, RuntimeError as start()."""
    return ask(question).result(ANSWER_S)


def ask(question: Callable[[], T]) -> Future[T]:
    """The same, once it is there; it never will be if the thread dies as it starts."""
    given: Future[T] = Future()

    def run() -> None:
        try:
            result = question()
        except BaseException as error:
            given.set_exception(error)
        else:
            given.set_result(result)

    start(run)
    return given
