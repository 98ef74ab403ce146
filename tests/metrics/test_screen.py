"""`xdpnet stats --watch` in a terminal: what stands on top stays, the rest is scrolled; the keys, and the end."""

import asyncio
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tests.rig.snapshots import guest_port, netdev_port, snapshot
from tests.rig.waiting import PATIENCE_S
from xdpnet.control.server import ControlServer
from xdpnet.metrics.screen import DOWN, END, HOME, PAGE_DOWN, PAGE_UP, UP, Screen
from xdpnet.metrics.snapshot import Snapshot
from xdpnet.metrics.table import render

GUESTS, HEIGHT = 64, 24


def many() -> Snapshot:
    return snapshot(*(guest_port(f"guest-{number:02}", number) for number in range(GUESTS)), netdev_port())


def drawn(screen: Screen, width: int = 100, height: int = HEIGHT) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(screen, end="")
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def screen_of(shown: Snapshot) -> Screen:
    screen = Screen()
    screen.page = render(shown)
    drawn(screen)
    return screen


def test_the_books_and_the_headings_stay_on_top_and_every_guest_is_reached() -> None:
    screen = screen_of(many())
    seen: set[str] = set()
    for _ in range(GUESTS):
        lines = drawn(screen)
        assert len(lines) == HEIGHT
        assert lines[0].startswith("xdpnet 1.2.3")
        assert lines[1].startswith("  in 12,409,700 + copies 320")
        rows = {line.split()[0] for line in lines[2:-1] if line.startswith(" guest-")}
        if any("waiting" in line or line.endswith(" up") for line in lines):
            assert any(line.startswith(" Port") for line in lines)
        seen |= rows
        screen.key(PAGE_DOWN[0])
    assert len(seen) == GUESTS
    assert f"of {screen._rows}; arrows and pages" in drawn(screen)[-1]


def test_no_row_is_skipped_from_one_page_to_the_next() -> None:
    screen = screen_of(many())
    pages: list[list[str]] = []
    while not pages or pages[-1] != drawn(screen):
        pages.append(drawn(screen))
        screen.key(PAGE_DOWN[0])
    told = "\n".join("\n".join(page[2:-1]) for page in pages)
    whole = Console(file=io.StringIO(), width=100)
    whole.print(screen.page)
    assert isinstance(whole.file, io.StringIO)
    for line in whole.file.getvalue().splitlines()[2:]:
        assert line.rstrip() in told


def test_the_ends_of_the_page_are_where_scrolling_ends() -> None:
    screen = screen_of(many())
    first = drawn(screen)
    for key in (UP[0], PAGE_UP[0], HOME[0]):
        screen.key(key)
        assert drawn(screen) == first
    screen.key(END[0])
    last = drawn(screen)
    for key in (DOWN[0], PAGE_DOWN[0], END[0], b"?"):
        screen.key(key)
        assert drawn(screen) == last
    screen.key(UP[2])
    assert drawn(screen) != last
    screen.key(DOWN[2])
    assert drawn(screen) == last
    screen.key(HOME[0])
    assert drawn(screen) == first


def test_a_page_that_fits_is_not_scrolled() -> None:
    screen = Screen()
    screen.page = render(snapshot())
    lines = drawn(screen, height=200)
    screen.key(DOWN[0])
    assert drawn(screen, height=200) == lines
    assert lines[-1] == "s sorts, q ends"


def test_a_guest_that_goes_while_the_end_is_shown_leaves_the_new_end() -> None:
    screen = screen_of(many())
    screen.key(END[0])
    drawn(screen)
    screen.page = render(snapshot())
    assert "every frame accounted for" in drawn(screen)[1]


# ---- in a terminal ----


@contextmanager
def served(path: str) -> Iterator[None]:
    """A control socket that answers with the same snapshot again and again."""
    loop = asyncio.new_event_loop()
    server = ControlServer(path, {"stats": lambda: many().to_json()})
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(PATIENCE_S)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Terminal:
    """A pseudo terminal with a child on it, and all that it has shown."""

    def __init__(self, words: list[str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.child = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
        )
        self.shown = ""

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def until(self, words: str) -> None:
        """From here on."""
        while not re.search(words, self.shown):
            self.shown += os.read(self._master, 65536).decode(errors="replace")
        self.shown = ""

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.slave)
        os.close(self._master)


@pytest.mark.parametrize("interrupt", [False, True], ids=["q", "interrupt"])
def test_keys_scroll_and_sort_and_end_it_and_the_terminal_is_as_it_was(tmp_path: Path, interrupt: bool) -> None:
    path = str(tmp_path / "c")
    words = [sys.executable, "-m", "xdpnet", "stats", "--watch", "0.2", "--control", path]
    with served(path), closing(Terminal(words)) as terminal:
        terminal.until(r"rows 1-\d+ of \d+")
        terminal.press(b"\x1b[6~")
        terminal.until(r"rows (?!1-)\d+-\d+ of \d+")
        terminal.press(b"g")
        terminal.until(r"rows 1-\d+ of \d+")
        terminal.press(b"s")
        terminal.until(r"rows 1-\d+ of \d+")
        if interrupt:
            terminal.child.send_signal(signal.SIGINT)
        else:
            terminal.press(b"q")
        assert terminal.child.wait(PATIENCE_S) == (130 if interrupt else 0)
        assert termios.tcgetattr(terminal.slave) == terminal.before
