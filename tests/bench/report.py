"""What was measured, as JSON that grows row by row, a table, Markdown and plots."""

import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.lab import Row
from tests.bench.plot import Bar, bars, digits

OURS, PEER = "xdpnet", "DPDK"
NAME = "bench.json"

Runs = dict[str, dict[str, list[float]]]  # contender -> metric -> one number a run


@dataclass
class Result:
    """One row's numbers; skipped is the reason, by contender."""

    date: str
    runs: Runs
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Results:
    machine: str
    rows: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Results":
        """Those of earlier runs on this machine, to be added to; none if there are none."""
        results = cls(describe_machine())
        path = directory / NAME
        if path.exists():
            known = json.loads(path.read_text())
            if known["machine"] == results.machine:
                results.rows = {name: Result(**row) for name, row in known["rows"].items()}
        return results

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")


def today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def describe_machine() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}"


def spread(values: Sequence[float]) -> str:
    median = digits(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({digits(min(values))}-{digits(max(values))})"


HEADINGS = ("", "unit", OURS, PEER, "ratio", "others")


def lines(rows: Sequence[Row], results: Results) -> list[list[str]]:
    """One line for each metric of each row that was measured: title, unit, ours, the peer's, their ratio, others."""
    made = []
    for row in rows:
        if (result := results.rows.get(row.name)) is None or row.table:
            continue
        for metric, unit in row.units.items():
            got = {name: runs[metric] for name, runs in result.runs.items() if runs.get(metric)}
            ratio = ""
            if OURS in got and PEER in got and statistics.median(got[PEER]):
                ratio = f"{statistics.median(got[OURS]) / statistics.median(got[PEER]):.2f}"
            others = [
                f"{name.removeprefix(OURS + ' ')} {spread(got[name])}" for name in got if name not in (OURS, PEER)
            ]
            if metric == next(iter(row.units)):
                others += [f"{name}: {reason}" for name, reason in result.skipped.items()]
            if got:
                ours, peer = (spread(got[name]) if name in got else "" for name in (OURS, PEER))
                made.append([row.title, unit, ours, peer, ratio, "; ".join(others)])
    return made


def own_tables(rows: Sequence[Row], results: Results) -> list[list[list[str]]]:
    """Of rows that have one: headings, then a line for each row that was measured."""
    made: dict[str, list[list[str]]] = {}
    for row in rows:
        if not row.table or (result := results.rows.get(row.name)) is None:
            continue
        lines = made.setdefault(row.table, [[row.table, *row.units.values()]])
        got = result.runs.get(OURS) or {}
        cells = [spread(got[metric]) if metric in got else "" for metric in row.units]
        if reason := result.skipped.get(OURS):
            cells[0] = f"not here: {reason}"
        lines.append([row.title, *cells])
    return list(made.values())


def show(rows: Sequence[Row], results: Results) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if made := lines(rows, results):
        table = Table(title=results.machine)
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading in (OURS, PEER, "ratio") else "left")
        for line in made:
            table.add_row(*line)
        console.print(table)
    for headings, *own in own_tables(rows, results):
        table = Table(title=results.machine)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == headings[0] else "right")
        for line in own:
            table.add_row(*line)
        console.print(table)


def markdown(rows: Sequence[Row], results: Results) -> str:
    made = lines(rows, results)
    tables = [[list(HEADINGS), ["---", "---", "---:", "---:", "---:", "---"], *made]] if made else []
    tables += [
        [headings, ["---", *["---:"] * (len(headings) - 1)], *own] for headings, *own in own_tables(rows, results)
    ]
    dates = sorted(result.date for result in results.rows.values())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    text = "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in tables)
    return f"{text}\n\n{results.machine}, {when}. Medians (least-most); contenders took turns.\n"


# ---- plots ----


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    unit: str
    groups: dict[str, list[tuple[str, str]]]  # label -> row and metric of each series
    series: list[tuple[str, str]]  # label and contender of each


SIZES = (64, 256, 512, 1500, 4000, 9000)


def contenders(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


PLOTS = [
    Plot(
        "guest-to-guest",
        "Guest to guest, each way, by frame size in bytes",
        "M frames/s",
        {
            str(size): [(f"guest-to-guest-{size}{suffix}", "rate") for suffix in ("", "", "-packed", "-packed")]
            for size in SIZES
        },
        [("xdpnet, split", OURS), ("DPDK, split", PEER), ("xdpnet, packed", OURS), ("DPDK, packed", PEER)],
    ),
    Plot(
        "wire",
        "Guest and veth",
        "M frames/s",
        {
            f"{title}, {size} B": [(f"{row}-{size}", "rate")] * 3
            for row, title in (("guest-to-veth", "guest to veth"), ("veth-and-back", "and back"))
            for size in (64, 1500)
        },
        contenders(OURS, PEER, "raw AF_XDP"),
    ),
    Plot(
        "tcp",
        "TCP of Linux guests under emulation",
        "Gb/s",
        {
            title: [(f"tcp-{row}", "rate")] * 3
            for row, title in (
                ("guest-to-host", "guest to host"),
                ("host-to-guest", "host to guest"),
                ("guest-to-guest", "guest to guest"),
            )
        },
        contenders(OURS, PEER, "tap"),
    ),
    Plot(
        "ping-pong",
        "TCP ping-pong of a Linux guest, half a round trip, by where its server runs",
        "us",
        {
            f"{title}, {place}": [(f"ping-pong{suffix}", metric)] * 3
            for suffix, place in (("-beside-backend", "beside the backend"), ("-beside-guest", "beside the guest"))
            for metric, title in (("p50", "median"), ("p99", "99 %"))
        },
        contenders(OURS, PEER, "tap"),
    ),
    Plot(
        "many-guests",
        "One busy pair of guests beside idle ones, 64 B",
        "M frames/s each way",
        {str(idle): [(f"beside-{idle}-idle", "rate")] for idle in (0, 1, 4, 16, 64)},
        contenders(OURS),
    ),
]


def plot(results: Results, directory: Path) -> None:
    """The plots that there are numbers for."""

    def bar(row: str, contender: str, metric: str) -> Bar | None:
        result = results.rows.get(row)
        values = result.runs.get(contender, {}).get(metric) if result else None
        return Bar(statistics.median(values), min(values), max(values)) if values else None

    for wanted in PLOTS:
        series = {
            label: [bar(cells[place][0], contender, cells[place][1]) for cells in wanted.groups.values()]
            for place, (label, contender) in enumerate(wanted.series)
        }
        series = {label: row for label, row in series.items() if any(row)}
        if series:
            drawn = bars(wanted.title, wanted.unit, list(wanted.groups), series)
            (directory / f"{wanted.name}.svg").write_text(drawn)
