"""Threads: what they answer, and that nobody waits for ever for one that died as it started."""

import _thread

import pytest

from xdpnet import threads


def test_an_answer_or_an_error_of_another_thread_is_ones_own() -> None:
    assert threads.answer(_thread.get_ident) != _thread.get_ident()
    with pytest.raises(ZeroDivisionError):
        threads.answer(lambda: 1 // 0)


def test_d25_a_thread_that_dies_as_it_starts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "ANSWER_S", 0.1)
    monkeypatch.setattr(threads, "start", lambda _: None)
    with pytest.raises(TimeoutError):
        threads.answer(lambda: "never asked")
