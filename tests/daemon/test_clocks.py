"""Time: only the monotonic clock measures it, and whatever that says the daemon goes on."""

import ast
import re
import sys
import time
from pathlib import Path

import pytest

from tests.rig.daemon import daemon, guest
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.netns import needs_root
from tests.rig.remote import RemoteGuest
from tests.rig.rings import MODERN
from tests.rig.waiting import until

PYTHON = sorted(Path("xdpnet").rglob("*.py"))
C = sorted(Path("c").rglob("*.[ch]"))
# What tells the time of day, which an administrator or NTP may set. The log's own lines have it from logging.
CLOCKS_IN_PYTHON = {"time", "time_ns", "localtime", "gmtime", "now", "utcnow", "today", "CLOCK_REALTIME", "CLOCK_TAI"}
CLOCKS_IN_C = re.compile(
    r"\bCLOCK_(?!MONOTONIC\b)\w+|\b(gettimeofday|time|ftime|timespec_get|localtime\w*|\w+_timedwait|\w+_timedlock)\s*\("
)
WRAP = 1 << 32  # seconds, as the core counts them
BEFORE_THE_WRAP_S = 8


def names(source: str) -> set[str]:
    """What a program takes from modules and objects: x.name, and from x import name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found


def without_comments(source: str) -> str:
    return re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_d29_no_part_in_python_measures_by_the_time_of_day(path: Path) -> None:
    source = path.read_text()
    # Snapshots have a field of that name, and it is monotonic: what is meant is a call. So is an event loop's.
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) != "loop.time"
    }
    assert not called & CLOCKS_IN_PYTHON
    assert not names(source) & {"CLOCK_REALTIME", "CLOCK_TAI", "datetime"}


@pytest.mark.parametrize("path", C, ids=str)
def test_d29_no_part_in_c_measures_by_the_time_of_day(path: Path) -> None:
    assert not CLOCKS_IN_C.search(without_comments(path.read_text()))


@needs_root
def test_d29_seconds_that_wrap_make_no_address_old(tmp_path: Path) -> None:
    """In a time namespace, where the machine has been up for 136 years but some seconds: then 32 bits are full."""
    offset = WRAP - BEFORE_THE_WRAP_S - int(time.monotonic())
    late = ("unshare", "--time", f"--monotonic={offset}", sys.executable)
    words = ("--guest", guest(tmp_path), "--guest", guest(tmp_path, "db"), "--guest", guest(tmp_path, "dns"))
    with daemon(tmp_path, *words, interpreter=late) as running:
        running.ready()
        if running.snapshot().time < WRAP - 10 * BEFORE_THE_WRAP_S:
            pytest.skip("needs a time namespace")
        guests = [RemoteGuest(tmp_path / f"{name}.sock", MODERN).start() for name in ("web", "db", "dns")]
        try:
            for one in guests:
                one.pair.fill()
            for number, one in enumerate(guests):
                one.pair.send(frame(BROADCAST, mac(number)))
                assert one.pair.wait_sent()
            until(lambda: running.snapshot().time > WRAP + 1)
            for one in guests:
                one.pair.packets()  # what the others have sent
            guests[0].pair.send(frame(mac(1), mac(0), mark=b"late"))
            assert guests[1].pair.frames() == [frame(mac(1), mac(0), mark=b"late")]
            assert guests[2].pair.packets() == []  # it was known where to
            addresses = running.snapshot().addresses
            assert len(addresses) == 3
            assert max(address.age_s for address in addresses) < 60
        finally:
            for one in guests:
                one.close()
        assert running.end() == 0
