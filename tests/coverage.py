"""Lines and branches of the C core that tests run: builds it with counters, runs pytest, prints a table.

python -m tests.coverage [--report] [--missing] [PYTEST ARGUMENT...]; by default what is marked core or net.

--report runs nothing and prints what has been counted so far; --missing adds what nobody took, line by line. Needs
gcov, which comes with gcc. The core in xdpnet/ is the counting one meanwhile, since processes that tests start load
that; in the end the plain one is built again. A process that is killed leaves no counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "c"
COUNTS = ROOT / "coverage"
DEFAULT = ["-m", "(core or net) and not guest and not dpdk"]


@dataclass
class Source:
    """Of one file: how often each line ran, and each way out of a condition, by line and number on it."""

    lines: Counter[int] = field(default_factory=Counter)
    branches: Counter[tuple[int, int]] = field(default_factory=Counter)

    def share(self) -> tuple[int, int, int, int]:
        """Lines that ran, lines, branches taken, branches."""
        return (
            sum(map(bool, self.lines.values())), len(self.lines),
            sum(map(bool, self.branches.values())), len(self.branches),
        )  # fmt: skip


def build(*flags: str) -> None:
    subprocess.run([sys.executable, CORE / "build.py", *flags], cwd=ROOT, check=True)


def read() -> dict[str, Source]:
    """What has been counted; a header's inline function counts once, whoever includes it."""
    sources: defaultdict[str, Source] = defaultdict(Source)
    for notes in sorted(COUNTS.rglob("*.gcno")):
        told = subprocess.run(
            ["gcov", "--json-format", "--branch-probabilities", "--stdout", notes],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        for file in json.loads(told)["files"]:
            path = (ROOT / file["file"]).resolve()
            if path.is_relative_to(CORE):
                add(sources[str(path.relative_to(CORE))], file["lines"])
    return dict(sorted(sources.items()))


def add(source: Source, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        number = line["line_number"]
        source.lines[number] += line["count"]
        for which, branch in enumerate(line["branches"]):
            source.branches[number, which] += branch["count"]


def show(sources: dict[str, Source], missing: bool) -> None:
    print(f"{'':24}{'lines':>12}{'%':>7}{'branches':>14}{'%':>7}")
    total = [sum(column) for column in zip(*(source.share() for source in sources.values()), strict=True)]
    for name, row in [*((name, source.share()) for name, source in sources.items()), ("total", total)]:
        lines_hit, lines, taken, branches = row
        percent = [100 * part / whole if whole else 100 for part, whole in ((lines_hit, lines), (taken, branches))]
        print(f"{name:24}{lines_hit:6}/{lines:<5}{percent[0]:7.1f}{taken:8}/{branches:<5}{percent[1]:7.1f}")
    if not missing:
        return
    for name, source in sources.items():
        text = (CORE / name).read_text().splitlines()
        for number in sorted(source.lines):
            ways = [count for (line, _), count in source.branches.items() if line == number]
            if not source.lines[number]:
                print(f"{name}:{number}: never: {text[number - 1].strip()}")
            elif not all(ways):
                signs = "".join("+" if count else "-" for count in ways)
                print(f"{name}:{number}: {signs}: {text[number - 1].strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing, print what has been counted")
    parser.add_argument("--missing", action="store_true", help="also print the lines and branches that nothing took")
    options, arguments = parser.parse_known_args()
    code = 0
    if not shutil.which("gcov"):
        parser.error("needs gcov: Debian's package gcc")
    if not options.report:
        shutil.rmtree(COUNTS, ignore_errors=True)
        build("--coverage", str(ROOT))
        try:
            code = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", *(arguments or DEFAULT)],
                cwd=ROOT, env={**os.environ, "XDPNET_COUNTS": str(COUNTS)},
            ).returncode  # fmt: skip
        finally:
            build()
    if not (sources := read()):
        parser.error(f"{COUNTS}: nothing has been counted; run tests first, without --report")
    show(sources, options.missing)
    return code


if __name__ == "__main__":
    sys.exit(main())
