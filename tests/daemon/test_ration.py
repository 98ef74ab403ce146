"""What a peer can make us do is rationed, and so is what is said about it."""

import logging

import pytest

from tests.rig.clock import Clock
from xdpnet.ration import KIND_PAUSE_S, LINE_PAUSE_S, LINES, LINES_A_KIND, RateLimit, Ration, RationedLog


def test_a_ration_is_there_at_once_and_then_refills() -> None:
    clock = Clock()
    ration = Ration(10, 2, clock)
    for _ in range(10):
        assert ration.wait_s(1) == 0
        ration.spend(1)
    assert ration.wait_s(1) == 0.5
    clock.now += 0.5
    assert ration.wait_s(1) == 0
    clock.now += 3600
    ration.spend(11)  # no more than what is there at once was saved
    assert ration.wait_s() == 0.5


def test_a_ration_that_is_overdrawn_is_waited_for() -> None:
    clock = Clock()
    ration = Ration(1, 0.5, clock)
    ration.spend(3)
    assert ration.wait_s() == 4
    clock.now += 4
    assert ration.wait_s() == 0


def test_the_first_line_passes_and_the_next_after_the_pause_tells_how_many_did_not() -> None:
    clock = Clock()
    limit = RateLimit(5.0, clock=clock)
    assert limit.allow("ring 0") == ""
    clock.now += 4.9
    assert limit.allow("ring 0") is None
    assert limit.allow("ring 0") is None
    assert limit.allow("ring 1") == ""
    clock.now += 0.1
    assert limit.allow("ring 0") == " (2 more since the last line)"
    clock.now += 5.0
    assert limit.allow("ring 0") == ""


def test_so_many_lines_pass_at_once_where_it_was_quiet() -> None:
    clock = Clock()
    limit = RateLimit(5.0, 3, clock)
    assert [limit.allow("web") for _ in range(5)] == ["", "", "", None, None]
    clock.now += 5.0
    assert [limit.allow("web"), limit.allow("web")] == [" (2 more since the last line)", None]
    clock.now += 3600.0
    assert [limit.allow("web") for _ in range(5)] == [" (1 more since the last line)", "", "", None, None]


def test_a_flood_of_lines_about_one_peer_is_a_few_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    web = RationedLog(logging.getLogger("xdpnet"), "web", clock)
    with caplog.at_level(logging.INFO):
        for number in range(1000):
            web.info(f"kind {number % 50} of %d", number)
        clock.now += LINE_PAUSE_S
        web.warning("its %s is gone", "frontend")
    assert len(caplog.messages) == LINES + 1
    assert caplog.messages[0] == "web: kind 0 of 0"
    assert caplog.messages[-1] == f"web: its frontend is gone ({1000 - LINES} of other kinds since the last line)"


def test_lines_of_one_kind_leave_room_for_others_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    web = RationedLog(logging.getLogger("xdpnet"), "web", clock)
    with caplog.at_level(logging.INFO):
        for number in range(1000):
            web.info("frontend %d connected", number)
        web.warning("the cause")
        web.info("frontend %d connected", 1000)
        clock.now += KIND_PAUSE_S - 0.1
        web.info("frontend %d connected", 1001)
        clock.now += 0.1
        web.info("frontend %d connected", 1002)
    assert caplog.messages == [
        *(f"web: frontend {number} connected" for number in range(LINES_A_KIND)),
        f"web: the cause ({1000 - LINES_A_KIND} of other kinds since the last line)",
        "web: frontend 1002 connected (2 more since the last line)",
    ]


def test_what_is_held_back_is_told_by_its_kind_and_of_others(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    web = RationedLog(logging.getLogger("xdpnet"), "web", clock)
    with caplog.at_level(logging.INFO):
        for _ in range(LINES_A_KIND + 4):
            web.info("one")
        for _ in range(LINES_A_KIND + 2):
            web.info("another")
        clock.now += KIND_PAUSE_S
        web.info("another")
    # Of the first ones "another" has told.
    assert caplog.messages[LINES_A_KIND] == "web: another (4 of other kinds since the last line)"
    assert caplog.messages[-1] == "web: another (2 more since the last line)"


def test_a_line_that_nobody_would_see_counts_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    web = RationedLog(logging.getLogger("xdpnet"), "web", Clock())
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            web.debug("a detail")
        web.info("heard")
    assert caplog.messages == ["web: heard"]
