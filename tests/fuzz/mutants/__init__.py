"""Checks that are taken away, one at a time, to see whether the targets find them gone.

A row of `*.toml` says which check, in which file, what its text is and what takes its place; `then` is a second place
of the same file. The change is made on a copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import corpus, targets
from ..build import CORE, OUT, ROOT, TARGETS, build

HERE = Path(__file__).resolve().parent


@dataclass
class Mutant:
    name: str
    file: str
    before: str
    after: str
    why: str = ""
    target: str = "guests"
    then: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The tree that its file is in."""
        return CORE if self.target in TARGETS else ROOT

    def apply(self, tree: Path) -> None:
        """Make the change under `tree`. Raises ValueError if the check is no longer there."""
        path = tree / self.file
        text = path.read_text()
        for change in ({"before": self.before, "after": self.after}, self.then):
            if not change:
                continue
            if text.count(change["before"]) != 1:
                raise ValueError(
                    f"{self.name}: {self.file} has {text.count(change['before'])} times {change['before']!r}"
                )
            text = text.replace(change["before"], change["after"])
        path.write_text(text)


def every() -> list[Mutant]:
    return [
        Mutant(**row) for table in sorted(HERE.glob("*.toml")) for row in tomllib.loads(table.read_text())["mutant"]
    ]


def hunt(mutant: Mutant, seconds: float, scratch: Path) -> tuple[float | None, str]:
    """Seconds until it was found, None if it was not; and what was found."""
    if mutant.target in TARGETS:
        shutil.copytree(CORE, scratch / "c")
        mutant.apply(scratch / "c")
        build(scratch / "c", scratch, (mutant.target,), unchanged=OUT)
    else:
        # Modules are looked for where a program is run first.
        shutil.copytree(ROOT / "xdpnet", scratch / "xdpnet")
        (scratch / "tests").symlink_to(ROOT / "tests")
        mutant.apply(scratch)
    inputs = scratch / "corpus"
    corpus.unpack(mutant.target, inputs)
    started = time.monotonic()
    running = targets.start(
        mutant.target,
        f"-max_total_time={round(seconds)}",
        "-timeout=5",
        str(inputs),
        log=scratch / "log",
        artifacts=scratch,
        out=scratch,
        where=ROOT if mutant.target in TARGETS else scratch,
    )
    try:
        code = running.process.wait(seconds + 30)
    except subprocess.TimeoutExpired:
        running.process.kill()
        running.process.wait()
        code = 0
    running.scratch.cleanup()
    took = time.monotonic() - started
    return (took if code else None), targets.reason(scratch / "log") if code else ""


def run(names: Sequence[str], seconds: float) -> int:
    mutants = [mutant for mutant in every() if not names or mutant.name in names]
    mutants.sort(key=lambda mutant: mutant.file.endswith(".h"))  # those last for which the whole core is compiled
    if any(mutant.target in TARGETS for mutant in mutants):
        build(targets=(*TARGETS,))
    missed = 0
    for mutant in mutants:
        with tempfile.TemporaryDirectory(prefix=f"xdpnet-mutant-{os.getpid()}-") as scratch:
            took, what = hunt(mutant, seconds, Path(scratch))
        missed += took is None
        print(f"{mutant.name:50} {'NOT FOUND' if took is None else f'{took:5.1f} s'}  {what[:90]}", flush=True)
    print(f"{len(mutants) - missed} of {len(mutants)} found", file=sys.stderr)
    return int(missed > 0)
