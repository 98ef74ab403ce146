"""The state that a guest is in: of several that hold, the one that the others follow from, in words with a remedy."""

from dataclasses import replace
from typing import get_args

import pytest

from xdpnet.states import NO_DRIVER, NO_FRONTEND, NO_MEMORY, STARVED_S, UP, Facts, Kind, state_of

RUNS = Facts(pairs=1, connected=True, running=True)
EVERY: dict[Kind, Facts] = {
    "too_few_queues": Facts(pairs=1, wants_more=True),
    "refused": Facts(pairs=1, refused="SET_FEATURES: features not offered: VIRTIO_NET_F_RSS"),
    "no_frontend": Facts(pairs=1),
    "broken": replace(RUNS, broken="addr", broken_ring=3),
    "no_memory": Facts(pairs=1, connected=True, lacks_memory=True),
    "no_driver": Facts(pairs=1, connected=True),
    "stalled": replace(RUNS, starved_s=12.4),
    "up": RUNS,
}


def test_every_state_is_had_by_some_facts() -> None:
    assert {kind: state_of(facts).kind for kind, facts in EVERY.items()} == {kind: kind for kind in get_args(Kind)}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("too_few_queues", "asks for more than the 1 queue pair that it has"),
        ("refused", "refused: SET_FEATURES: features not offered: VIRTIO_NET_F_RSS"),
        ("no_frontend", "waiting for a frontend"),
        ("broken", "broken: tx ring 1, addr"),
        ("no_memory", "memory is not shared (share=on)"),
        ("no_driver", "waiting for a driver"),
        ("stalled", "stalled: no receive buffer for 12 s"),
        ("up", "up"),
    ],
)
def test_a_state_is_said_in_words(kind: Kind, words: str) -> None:
    assert state_of(EVERY[kind]).words == words


def test_what_somebody_has_to_do_something_about_has_a_remedy_and_the_rest_has_none() -> None:
    for kind, facts in EVERY.items():
        state = state_of(facts)
        assert bool(state.remedy) is not (state.well or kind == "refused"), kind
        assert str(state) == (f"{state.words}; {state.remedy}" if state.remedy else state.words)


def test_a_guest_is_stalled_once_it_has_had_no_buffer_for_longer_than_a_frame_waits() -> None:
    assert STARVED_S == 2
    assert state_of(replace(RUNS, starved_s=1.99)) == UP
    assert state_of(replace(RUNS, starved_s=2.0)).kind == "stalled"


def test_of_several_rings_the_one_without_buffers_is_named() -> None:
    words = "stalled: no receive buffer in rx ring 3 for 5 s"
    assert state_of(replace(RUNS, pairs=4, starved_ring=6, starved_s=5)).words == words


def test_a_guest_that_runs_has_got_over_what_it_was_refused() -> None:
    assert state_of(replace(RUNS, refused="NET_SET_MTU: MTU 9000", wants_more=True)) == UP


def test_what_keeps_a_guest_from_starting_is_told_before_that_it_has_not() -> None:
    waits = Facts(pairs=2, connected=True)
    assert state_of(waits) == NO_DRIVER
    assert state_of(replace(waits, lacks_memory=True)) == NO_MEMORY
    assert state_of(replace(waits, lacks_memory=True, refused="SET_MEM_TABLE: no")).kind == "refused"
    assert state_of(replace(waits, connected=False)) == NO_FRONTEND
    assert state_of(replace(waits, connected=False, refused="x", wants_more=True)).kind == "too_few_queues"
