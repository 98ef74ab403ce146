"""The targets, and what is done with them: run, replay, keep, measure."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import corpus
from .build import CORE, OUT, ROOT, TARGETS, build

SELF = "XDPNET_FUZZ_SELF"  # for a module: what to start when it wants itself in another process

# Targets in Python, each a module here that runs by itself.
SCRIPTS = ("sessions", "daemon", "settings")
NAMES: tuple[str, ...] = (*TARGETS, *SCRIPTS)
FOUND = OUT / "findings"
MOST_BYTES = 512
COMMON = [
    "-len_control=0",
    "-entropic=0",
    "-timeout=20",
    "-rss_limit_mb=4096",
    "-detect_leaks=1",
    "-print_final_stats=1",
]


@dataclass
class Running:
    target: str
    process: subprocess.Popen[bytes]
    log: Path
    scratch: tempfile.TemporaryDirectory[str]  # libFuzzer ends its process without a word to what would clean up


def learned(target: str) -> Path:
    """Where what a target has found interesting is gathered, beside what is kept."""
    return OUT / "corpus" / target


def command(target: str, *, artifacts: Path, out: Path = OUT) -> list[str]:
    where = f"-artifact_prefix={artifacts}/{target}-"
    if target in TARGETS:
        return [str(out / target), f"-max_len={MOST_BYTES}", *COMMON, where]
    return [str(script(target, out)), f"-max_len={MOST_BYTES}", *COMMON, "-timeout=60", where]


def script(target: str, out: Path) -> Path:
    """A program that runs the module, wherever it is started: libFuzzer starts itself anew to merge."""
    path = out / target
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{SELF}="$0" exec {shlex.quote(sys.executable)} -m tests.fuzz.{target} "$@"\n')
    path.chmod(0o755)
    return path


def start(
    target: str, *arguments: str, log: Path, artifacts: Path = FOUND, out: Path = OUT, where: Path = ROOT
) -> Running:
    artifacts.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=f"xdpnet-fuzz-{os.getpid()}-")
    with log.open("wb") as to:
        process = subprocess.Popen(
            [*command(target, artifacts=artifacts, out=out), *arguments],
            cwd=where,
            stdout=to,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FUZZ_REPORT": "1", "TMPDIR": scratch.name},
        )
    return Running(target, process, log, scratch)


def reason(log: Path) -> str:
    """The first line of a log that says what was found."""
    for line in log.read_text(errors="replace").splitlines():
        if re.search(r"^FOUND:|ERROR: |runtime error:|Traceback|^\w*Error: ", line) and "deadly signal" not in line:
            return line.strip()
    return "see the log"


def artifact(log: Path) -> Path | None:
    written = re.findall(r"Test unit written to (\S+)", log.read_text(errors="replace"))
    return Path(written[-1]) if written else None


def explain(done: Running) -> None:
    found = artifact(done.log)
    print(f"\nfuzz: {done.target} found: {reason(done.log)}", file=sys.stderr)
    print(f"  log    {done.log}", file=sys.stderr)
    if found:
        print(f"  input  {found}", file=sys.stderr)
        print(f"  replay .venv/bin/python -m tests.fuzz replay {done.target} {found}", file=sys.stderr)


def figures(log: Path) -> str:
    text = log.read_text(errors="replace")
    runs = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text)
    rate = re.findall(r"stat::average_exec_per_sec:\s+(\d+)", text)
    moved = re.findall(r"frames were delivered in (\d+) of (\d+) runs", text)
    line = f"{runs[-1]} runs, {rate[-1]} a second" if runs and rate else "no figures"
    return line + (f", {100 * int(moved[-1][0]) // max(1, int(moved[-1][1]))} % delivered frames" if moved else "")


def run(names: Sequence[str], minutes: float) -> int:
    """The kept corpus of each, then new inputs for its share of the time, on all processors. 1: something was found."""
    native = [name for name in names if name in TARGETS]
    if native:
        build(targets=tuple(native))
    cpus = os.cpu_count() or 1
    # Each target has a processor for its share.
    share = max(5, round(minutes * 60 * min(cpus, len(names)) / len(names)))
    left, failed = list(names), False
    running: list[Running] = []
    while left or running:
        while left and len(running) < cpus:
            name = left.pop(0)
            kept = corpus.unpack(name, learned(name))
            print(f"fuzz: {name} for {share} s, from {kept} kept inputs", file=sys.stderr)
            running.append(start(name, f"-max_total_time={share}", str(learned(name)), log=OUT / f"{name}.log"))
        time.sleep(0.2)
        for done in [one for one in running if one.process.poll() is not None]:
            running.remove(done)
            done.scratch.cleanup()
            if done.process.returncode:
                failed = True
                explain(done)
            else:
                print(f"fuzz: {done.target}: {figures(done.log)}, nothing found", file=sys.stderr)
    return int(failed)


def replay(name: str, path: Path) -> int:
    if name in TARGETS:
        build(targets=(name,))
    if path.is_dir():
        return subprocess.run([*command(name, artifacts=FOUND), "-runs=0", str(path)], cwd=ROOT).returncode
    return subprocess.run([*command(name, artifacts=FOUND), str(path.resolve())], cwd=ROOT).returncode


def keep(names: Sequence[str]) -> int:
    for name in names:
        if name in TARGETS:
            build(targets=(name,))
        corpus.unpack(name, learned(name))
        with tempfile.TemporaryDirectory(prefix=f"xdpnet-fuzz-{os.getpid()}-") as scratch:
            done = subprocess.run(
                [*command(name, artifacts=FOUND), "-merge=1", scratch, str(learned(name))],
                cwd=ROOT,
                capture_output=True,
            )
            if done.returncode:
                sys.stderr.write(done.stderr.decode(errors="replace")[-2000:])
                return 1
            size = corpus.pack(name, Path(scratch))
            print(f"{name}: {len(list(Path(scratch).iterdir()))} inputs, {size} bytes")
        shutil.rmtree(learned(name))
    return 0


def coverage() -> int:
    """What of c/ the kept corpus of the native targets reaches, as llvm-cov counts it."""
    out = OUT / "coverage"
    build(out=out, coverage=True)
    raw = []
    for name in TARGETS:
        inputs = out / "corpus" / name
        corpus.unpack(name, inputs)
        raw.append(str(out / f"{name}.profraw"))
        subprocess.run(
            [*command(name, artifacts=FOUND, out=out), "-runs=0", str(inputs)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env={**os.environ, "LLVM_PROFILE_FILE": raw[-1]},
        )
    merged = out / "all.profdata"
    subprocess.run(["llvm-profdata", "merge", "-o", str(merged), *raw], check=True)
    objects = [str(out / "guests"), "-object", str(out / "oracle")]
    sources = [str(path) for path in sorted(CORE.glob("*.[ch]"))]
    exported = subprocess.run(
        ["llvm-cov", "export", "--summary-only", f"-instr-profile={merged}", *objects, *sources],
        check=True,
        capture_output=True,
        text=True,
    )
    data = json.loads(exported.stdout)["data"][0]
    for file in [*data["files"], {"filename": "all", "summary": data["totals"]}]:
        lines, branches = file["summary"]["lines"], file["summary"]["branches"]
        print(
            f"{Path(file['filename']).name:16} lines {lines['percent']:5.1f} %  branches {branches['percent']:5.1f} %"
        )
    return 0
