"""What is counted stands once, in xdpnet/counters.py: the core, the metrics and their README agree with it."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.rig.snapshots import exposition, guest_port, netdev_port, ring, snapshot, traffic
from xdpnet import core, counters
from xdpnet.counters import EVERY, Metric, Traffic, VhostUser, Work, XdpStatistics, declared
from xdpnet.metrics.snapshot import Port, Queue
from xdpnet.states import Kind
from xdpnet.virtq.counters import Counters

README = Path(__file__).parents[2] / "xdpnet" / "metrics" / "README.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under these headings."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|\n\|[-|]+\|\n((?:\|.*\n)+)", README.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def row(metric: Metric) -> list[str]:
    total = "_total" if metric.kind == "counter" else ""
    return [f"`{metric.name}{total}`", metric.kind, ", ".join(metric.labels), metric.unit, metric.help]


@pytest.mark.parametrize(
    ("struct", "holder"),
    [
        ("xn_queue_stats", Traffic),
        ("xn_xsk_stats", core.XskStats),
        ("xn_worker_stats", core.WorkerStats),
    ],
)
def test_each_field_of_the_core_is_one_here_and_each_here_is_one_of_the_core(struct: str, holder: type) -> None:
    of_core = [name for name, _ in core.ffi.typeof(f"struct {struct}").fields]
    assert [field.name for field in fields(holder) if field.name != "parked"] == of_core  # which is said in `at`


def test_every_counter_has_a_metric_but_frames_sent_in_place_which_are_told_with_the_others() -> None:
    for holder in Traffic, Work, XdpStatistics, VhostUser:
        assert {field.name for field in fields(holder)} - set(declared(holder)) <= {"in_place"}
    assert counters.SENT in EVERY


def test_every_metric_is_shown_and_none_is_shown_that_is_not_here() -> None:
    broken = Port("db", 2, (Queue(0, traffic(), traffic(), ring(broken="loop")),))
    shown = text_string_to_metric_families(exposition(snapshot(guest_port(), netdev_port(), broken)))
    names = {family.name for family in shown if family.name.startswith("xdpnet_")}
    assert names == {metric.name for metric in EVERY}
    assert len(EVERY) == len(names)


def test_every_refusal_is_counted_from_the_start() -> None:
    assert set(Counters().errors.values()) == set(Counters().refused.values()) == {0}


def test_the_readme_has_a_row_for_every_metric_as_it_stands_here() -> None:
    found = rows("metric | type | labels | unit | what it is")
    wanted = [row(metric) for metric in EVERY]
    missing = [f"| {' | '.join(each)} |" for each in wanted if each not in found]
    assert not missing, f"{README.name} lacks, after each other:\n" + "\n".join(missing)
    assert found == wanted


def test_the_readme_says_of_every_drop_reason_what_the_frame_was() -> None:
    named = [name for cells in rows("drop reason | the frame") for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted(core.DROP_NAMES)
    assert all(cells[1] for cells in rows("drop reason | the frame"))


def test_the_readme_says_of_every_state_of_a_guest_what_it_is() -> None:
    named = [cells[0].strip("`") for cells in rows("state | in words | that is")]
    assert named == list(get_args(Kind))
