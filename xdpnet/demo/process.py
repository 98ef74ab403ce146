"""Child processes that cannot outlive us: the kernel kills them when we die, however we die (PR_SET_PDEATHSIG)."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TETHER = Path(__file__).with_name("tether.py")

Process = subprocess.Popen[bytes]


def tethered(command: Sequence[str]) -> list[str]:
    """The command, wrapped so that it dies with this process; start it from the main thread, whose death it is."""
    return [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command]


def spawn(command: Sequence[str], log: Path, pass_fds: Sequence[int] = ()) -> Process:
    """Start a command in the background, tethered, its output into a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            tethered(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=True,  # a terminal's Ctrl-C is for us; we end them in order
        )


def end(process: Process, patience: float = 5.0) -> int:
    """Ask it to stop, insist after `patience` seconds; its exit status. A stopped process is no error."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def cpu_seconds(pid: int) -> float:
    """Processor time used so far, user and system, by all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int, but: str = "/memfd:memory-backend") -> int:
    """Resident memory, but for the mappings of guests' memory: files whose name begins with `but`."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if "-" in key:  # a mapping's first line: range, permissions, offset, device, inode, path
            counted = not line.partition("/")[2].startswith(but[1:])
        elif counted and key == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total


def tail(log: Path, lines: int = 15) -> str:
    with contextlib.suppress(FileNotFoundError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


def raise_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the stack, as SIGINT does."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
