"""Run the benchmark: contenders take turns, a row is the median of several runs; a table, JSON and plots come out.

python -m tests.bench [--list] [--runs N] [--seconds S] [--output DIRECTORY] [ROW...]

A ROW may be a shell pattern. Rows that were measured before and are not now are kept in the report.
"""

import argparse
import fnmatch
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tests.bench import bulk, latency, neighbours, plot, report, scale, throughput
from tests.bench.lab import Cores, Lab, Row
from tests.rig import dpdk
from xdpnet.demo import process
from xdpnet.errors import XdpnetError

ROWS = [*throughput.ROWS, *bulk.ROWS, *latency.ROWS, *scale.ROWS, *neighbours.ROWS]
HUGE_MIB = 640
# What ends a contender's turns, and is said in the report: it cannot do this here.
FAILURES = (XdpnetError, ChildProcessError, TimeoutError)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure xdpnet beside DPDK and tap.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names or patterns; all by default")
    parser.add_argument("--list", action="store_true", help="say which rows there are")
    parser.add_argument("--runs", type=int, default=5, help="runs of each contender (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="directory (%(default)s)")
    options = parser.parse_args()
    if options.list:
        for row in ROWS:
            print(f"{row.name:32}{row.title}: {', '.join(row.contenders)}")
        return 0
    for pattern in options.rows:
        if not fnmatch.filter([row.name for row in ROWS], pattern):
            parser.error(f"no such row: {pattern}; --list names them")
    if os.geteuid() != 0:
        parser.error("needs root: it makes network namespaces and AF_XDP sockets")
    if reason := dpdk.missing():
        parser.error(reason)
    process.raise_on_signals()
    rows = [row for row in ROWS if not options.rows or any(fnmatch.fnmatch(row.name, p) for p in options.rows)]
    results = report.Results.load(options.output)
    measure(rows, options.runs, options.seconds, results, options.output)
    report.show(rows, results)
    (options.output / "bench.md").write_text(report.markdown(ROWS, results))
    report.plot(results, options.output)
    print(f"{options.output}/: {report.NAME}, bench.md, plots")
    return 0


def measure(rows: list[Row], runs: int, seconds: float, results: report.Results, output: Path) -> None:
    console = Console(stderr=True, highlight=False, width=200)
    started, turns, turn = time.monotonic(), runs * sum(len(row.contenders) for row in rows), 0
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"xdpn{os.getpid()}-")))
        huge = stack.enter_context(dpdk.huge_pages(HUGE_MIB, base))
        cores = Cores(base)
        for row in rows:
            result = report.Result(report.today(), {name: {} for name in row.contenders})
            for run in range(runs):
                for name, contend in row.contenders.items():
                    turn += 1
                    if name in result.skipped:
                        continue
                    directory = base / str(turn)
                    directory.mkdir()
                    try:
                        lab = Lab(directory, huge, seconds)
                        values = cores.run(contend, lab) if row.near else contend(lab)
                    except FAILURES as error:
                        result.skipped[name] = str(error).partition("\n")[0].partition(";")[0]
                        console.print(f"{row.name} {name} skipped: {error}")
                        continue
                    finally:
                        shutil.rmtree(directory)
                    for metric, value in values.items():
                        result.runs[name].setdefault(metric, []).append(value)
                    said = ", ".join(f"{plot.digits(value)} {row.units[metric]}" for metric, value in values.items())
                    left = (time.monotonic() - started) / turn * (turns - turn) / 60
                    console.print(f"{row.name}, {name}, run {run + 1}/{runs}: {said}  [dim]({left:.0f} min left)[/]")
            results.rows[row.name] = result
            results.save(output)


if __name__ == "__main__":
    sys.exit(main())
