"""`xdpnet stats --watch`: a page that is drawn again and again, of which a terminal shows a part.

What stands on top stays there: the heading and the books, and the headings of the table that the first visible row is
of. The keys are those of less(1). Without a terminal, one page after the other.
"""

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from xdpnet.errors import ControlError
from xdpnet.metrics.snapshot import Snapshot
from xdpnet.metrics.table import SORTS, Line, Sort, Table, View, render

KEY = re.compile(rb"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
UP, DOWN = (b"\x1b[A", b"\x1bOA", b"k"), (b"\x1b[B", b"\x1bOB", b"j")
PAGE_UP, PAGE_DOWN = (b"\x1b[5~", b"b"), (b"\x1b[6~", b" ", b"f")
HOME, END = (b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"g"), (b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"G")
SORT, QUIT = (b"s",), (b"q",)
LEAST_ROWS = 6  # of the page, however small the terminal is
HEADINGS = 4  # the most that a table has, with the blank line above and the rule below


class Screen:
    """The page, from the row `top` on. Belongs to whoever calls key()."""

    def __init__(self) -> None:
        self.page: Group = Group()
        self.note = ""  # below, in place of the keys
        self.top = 0
        self._rows = self._room = self._last = 0  # as they were drawn

    def key(self, key: bytes) -> None:
        """What it does to the part that is shown; others do nothing."""
        page = max(self._room - HEADINGS, 1)
        moves = {UP: -1, DOWN: 1, PAGE_UP: -page, PAGE_DOWN: page, HOME: -self.top, END: self._rows}
        self.top += sum(rows for keys, rows in moves.items() if key in keys)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fixed, *parts = [_lines(console, options, part) for part in self.page.renderables] or [([], [])]
        above = [*fixed[0], *fixed[1]]
        rows = [line for head, body in parts for line in (*head, *body)]
        height = options.height or console.size.height
        self._rows, self._room = len(rows), max(height - len(above) - 1, LEAST_ROWS)
        fits = self._rows <= self._room
        self.top = 0 if fits else max(0, min(self.top, self._rows - self._room + HEADINGS))
        pinned = _headings_at(parts, self.top)
        shown = rows[self.top : self.top + self._room - len(pinned)]
        self._last = self.top + len(shown)
        blank: Line = []
        filling = [blank] * (self._room - len(pinned) - len(shown))
        for line in (*above, *pinned, *shown, *filling):
            yield from Segment.adjust_line_length(line, options.max_width)
            yield Segment.line()
        yield Text(self._status(), style="yellow" if self.note else "dim", no_wrap=True, overflow="crop", end="")

    def _status(self) -> str:
        if self.note or self._rows <= self._room:
            return self.note or "s sorts, q ends"
        return f"rows {self.top + 1}-{self._last} of {self._rows}; arrows and pages, s sorts, q ends"


def _lines(console: Console, options: ConsoleOptions, part: object) -> tuple[list[Line], list[Line]]:
    """Headings, of a table, and rows."""
    if isinstance(part, Table):
        return part.lines(console, options.max_width)
    return [], console.render_lines(part, options.update(height=None), pad=False)  # type: ignore[arg-type]


def _headings_at(parts: list[tuple[list[Line], list[Line]]], top: int) -> list[Line]:
    """Those of the table that this row is of, if they are above it."""
    start = 0
    for head, body in parts:
        end = start + len(head) + len(body)
        if start + len(head) <= top < end and start < top:
            return head
        start = end
    return []


def watch(console: Console, take: Callable[[], Snapshot], seconds: float, view: View) -> None:
    """Until it is interrupted, or told to end; a daemon that restarts is waited for. Raises ControlError at first."""
    before = now = take()
    screen = Screen()
    screen.page = render(now, None, view)
    if not console.is_terminal:
        console.print(screen.page)
        while True:
            time.sleep(seconds)
            try:
                before, now = now, take()
                console.print(render(now, before, view))
            except ControlError as error:
                console.print(Text(f"xdpnet: {error}", style="yellow"))
    with _keys() as keys, Live(screen, console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + seconds
        while True:
            live.refresh()
            for key in keys(due - time.monotonic()):
                if key in QUIT:
                    return
                if key in SORT:
                    view = replace(view, sort=_after(view.sort))
                    screen.page = render(now, before if before is not now else None, view)
                screen.key(key)
            if time.monotonic() < due:
                continue
            due = time.monotonic() + seconds
            try:
                before, now = now, take()
                screen.page, screen.note = render(now, before, view), ""
            except ControlError as error:
                screen.note = f"xdpnet: {error}"


def _after(sort: Sort | None) -> Sort:
    return SORTS[(SORTS.index(sort) + 1) % len(SORTS)] if sort else SORTS[1]


def _none(seconds: float) -> list[bytes]:
    time.sleep(max(seconds, 0))
    return []


@contextmanager
def _keys() -> Iterator[Callable[[float], list[bytes]]]:
    """Waits for so many seconds, or until there is one; no terminal has none."""
    fd = sys.stdin.fileno() if sys.stdin and not sys.stdin.closed else -1
    if fd < 0 or not os.isatty(fd):
        yield _none
        return
    before = termios.tcgetattr(fd)

    def wait(seconds: float) -> list[bytes]:
        ready, _, _ = select.select([fd], [], [], max(seconds, 0))
        return KEY.findall(os.read(fd, 256)) if ready else []

    try:
        tty.setcbreak(fd)
        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
