"""The log in systemd's journal: an entry with fields for each line; what it does not take goes where it went before."""

import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig.clock import Clock
from tests.rig.daemon import daemon, guest
from tests.rig.frontend import Frontend
from tests.rig.waiting import PATIENCE_S
from xdpnet import journal
from xdpnet.control.client import ask
from xdpnet.ration import RationedLog
from xdpnet.virtq.message import Request

log = logging.getLogger("xdpnet.test")


class Otherwise(logging.Handler):
    """Remembers what the journal did not take."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def entry(data: bytes) -> dict[str, str]:
    """As the journal reads it: every field with its length."""
    fields = {}
    while data:
        name, _, rest = data.partition(b"\n")
        (size,) = struct.unpack("<Q", rest[:8])
        fields[name.decode()] = rest[8 : 8 + size].decode()
        assert rest[8 + size : 9 + size] == b"\n"
        data = rest[9 + size :]
    return fields


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.bind(str(path))
        yield sock


@pytest.fixture
def otherwise(tmp_path: Path) -> Iterator[Otherwise]:
    """Where the lines of `log` go that the journal at tmp_path/journal does not take."""
    instead = Otherwise()
    handler = journal.JournalHandler(instead, str(tmp_path / "journal"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield instead
    log.removeHandler(handler)
    handler.close()


SAYS = """
import logging, sys
from xdpnet import journal
journal.set_up(logging.INFO, sys.argv[1])
logging.getLogger("xdpnet.test").warning("no %s", "room")
"""


def test_an_entry_has_the_line_alone_for_its_message(tmp_path: Path) -> None:
    """The level and the part of the program are fields."""
    ours, theirs = socket.socketpair()
    status = os.fstat(theirs.fileno())
    with ours, theirs, listening(tmp_path / "journal") as sock:
        subprocess.run(
            [sys.executable, "-c", SAYS, str(tmp_path / "journal")],
            stderr=theirs.fileno(), check=True, timeout=60,
            env=os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )  # fmt: skip
        assert entry(sock.recv(1 << 16))["MESSAGE"] == "no room"


def test_a_line_is_an_entry_with_what_it_is_about_in_fields(tmp_path: Path, otherwise: Otherwise) -> None:
    with listening(tmp_path / "journal") as sock:
        log.warning("guest %s: %s ring %d broke: %s", "web", "tx", 3, "addr")
        log.error("interface %s: steer %d addresses: %s", "eth1", 7, "no room")
        log.info("worker %d is at queue %d of interface %s, at %d %%", 1, 2, "eth1", 50)
        log.debug("stopped")
        entries = [entry(sock.recv(65536)) for _ in range(4)]
    names = ("MESSAGE", "PRIORITY", "GUEST", "PORT", "QUEUE", "WORKER")
    assert [{name: each[name] for name in names if name in each} for each in entries] == [
        {
            "MESSAGE": "guest web: tx ring 3 broke: addr", "PRIORITY": "4",
            "GUEST": "web", "PORT": "web", "QUEUE": "3",
        },
        {"MESSAGE": "interface eth1: steer 7 addresses: no room", "PRIORITY": "3", "PORT": "eth1"},
        {
            "MESSAGE": "worker 1 is at queue 2 of interface eth1, at 50 %", "PRIORITY": "6",
            "PORT": "eth1", "QUEUE": "2", "WORKER": "1",
        },
        {"MESSAGE": "stopped", "PRIORITY": "7"},
    ]  # fmt: skip
    assert {each["SYSLOG_IDENTIFIER"] for each in entries} == {"xdpnet"}
    assert otherwise.lines == []


def test_what_a_peer_says_is_in_the_message_and_in_no_field_of_its_own(tmp_path: Path, otherwise: Otherwise) -> None:
    evil = "x\nGUEST=db\nPRIORITY=0\nguest db: ring 9"
    web = RationedLog(log, "web", Clock(), about="guest")
    with listening(tmp_path / "journal") as sock:
        web.warning("%s refused: %s", evil, evil)
        told = entry(sock.recv(65536))
    assert told["MESSAGE"] == f"web: {evil} refused: {evil}"
    assert (told["GUEST"], told["PORT"], told["PRIORITY"]) == ("web", "web", "4")
    assert "QUEUE" not in told


def test_a_traceback_is_in_its_entry(tmp_path: Path, otherwise: Otherwise) -> None:
    with listening(tmp_path / "journal") as sock:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("internal error")
        told = entry(sock.recv(65536))
    assert told["MESSAGE"].startswith("internal error\nTraceback")
    assert told["MESSAGE"].endswith("ValueError: two\nlines")


def test_without_a_journal_or_with_a_full_one_a_line_goes_where_it_went_before(
    tmp_path: Path, otherwise: Otherwise
) -> None:
    log.info("nobody is there")
    assert otherwise.lines == ["nobody is there"]
    with listening(tmp_path / "journal") as sock:
        sent = 0
        while len(otherwise.lines) == 1:  # nobody reads
            log.info("line %d", sent)
            sent += 1
        assert otherwise.lines[1:] == [f"line {sent - 1}"]
        assert entry(sock.recv(65536))["MESSAGE"] == "line 0"
        log.info("%s", "x" * 10_000_000)
    assert len(otherwise.lines[2]) == 10_000_000


def test_the_level_of_a_running_daemon_is_asked_for_and_set(tmp_path: Path) -> None:
    """With debug the vhost-user conversation is in the log."""
    with daemon(tmp_path, "--guest", guest(tmp_path)) as served:
        served.ready()
        assert ask(served.control, "log") == {"level": "info"}
        assert ask(served.control, "log debug") == {"level": "debug", "before": "info"}
        served.until_said("the log has level debug now, it had info")
        with Frontend.connect(str(tmp_path / "web.sock")) as frontend:
            frontend.ask_u64(Request.GET_FEATURES)
            served.until_said("guest web: GET_FEATURES Nothing(), descriptors 0")
            served.until_said("guest web: GET_FEATURES is answered U64(value=")
            assert ask(served.control, "log warning")["before"] == "debug"
            frontend.ask_u64(Request.GET_FEATURES)
        served.until_said("the log has level warning now, it had debug")
        assert ask(served.control, "log") == {"level": "warning"}
        assert served.log.count("GET_FEATURES is answered") == 1
        assert served.end() == 0
    assert "stopped" not in served.log
