"""`xdpnet demo` as a person runs it: to its end, and interrupted."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.waiting import until

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]


@contextmanager
def demo(scratch: Path) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, "-m", "xdpnet", "demo", "--seconds", "1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def using(scratch: Path) -> list[str]:
    """Processes that name the demo's directory: the daemon, QEMU."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(scratch) in command:
            found.append(command)
    return found


def test_the_demo_reaches_its_end_without_loss_and_its_counts_add_up(tmp_path: Path) -> None:
    with demo(tmp_path) as running:
        said, _ = running.communicate(timeout=240)
    assert running.returncode == 0, said
    assert said.count(" 0% packet loss") == 2
    assert said.count("Mb/s") == 2
    assert "every frame accounted for" in said
    assert not list(tmp_path.iterdir())
    until(lambda: not using(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_no_process_and_no_interface(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path) as running:
        assert running.stdout is not None
        said = ""
        while "daemon:" not in said:
            line = running.stdout.readline()
            assert line, said
            said += line
        assert using(tmp_path)
        os.killpg(running.pid, number)  # as a terminal's Ctrl-C does
        rest, _ = running.communicate(timeout=60)
    assert running.returncode == (-number if number == signal.SIGKILL else 128 + number), rest
    assert "Traceback" not in rest
    until(lambda: not using(tmp_path))
    if number != signal.SIGKILL:  # which leaves its files
        assert not list(tmp_path.iterdir())
