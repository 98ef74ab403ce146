"""Options of the test run: which C core, which skips are expected, and whether traces on the machine are an error."""

import fnmatch
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.rig import traces

if TYPE_CHECKING:
    from tests.rig.backend import ControlThread


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", type=Path, metavar="PATH", help="load this build of the C core as xdpnet._core")
    parser.addoption("--expected-skips", type=Path, metavar="FILE", help="fail on a skip that FILE does not list")
    parser.addoption(
        "--transfer", type=size, default="1M", metavar="SIZE", help="of each transfer by a Linux guest: 1G"
    )
    parser.addoption(
        "--log-rounds", type=int, default=200, metavar="N", help="times that a dirty log is started and checked"
    )
    parser.addoption("--nothing-left", action="store_true", help="fail if interfaces, processes or files remain")
    parser.addoption(
        "--wire-mib", type=int, default=64, metavar="N", help="MiB each way through a veth pair, checked whole"
    )


def size(text: str) -> int:
    """Bytes, of "65537", "4M" or "1G"."""
    unit = {"M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("MG")) * unit


def pytest_configure(config: pytest.Config) -> None:
    # A job in the background, or under nohup, ignores them, and so would all that it starts.
    for number, usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    if path := config.getoption("--core"):
        load_core(path)
    if path := config.getoption("--expected-skips"):
        config.pluginmanager.register(SkipPolice(path))
    if config.getoption("--nothing-left") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(NothingLeft())


def load_core(path: Path) -> None:
    import xdpnet

    loader = importlib.machinery.ExtensionFileLoader("xdpnet._core", str(path))
    spec = importlib.util.spec_from_file_location("xdpnet._core", path, loader=loader)
    if spec is None:
        raise pytest.UsageError(f"--core {path}: not an extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["xdpnet._core"] = module
    xdpnet._core = module


class SkipPolice:
    """Turns a skip that nobody expects into a failed run. The file's lines are `TEST-PATTERN: REASON-PATTERN`."""

    def __init__(self, path: Path) -> None:
        lines = (line.strip() for line in path.read_text().splitlines())
        self._expected = [line for line in lines if line and not line.startswith("#")]
        self._surprises: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        line = f"{report.nodeid}: {re.sub('^Skipped: ', '', reason)}"
        if not any(fnmatch.fnmatchcase(line, pattern) for pattern in self._expected):
            self._surprises.append(line)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._surprises and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._surprises:
            terminalreporter.write_line(f"UNEXPECTED SKIP {line}", red=True)


class NothingLeft:
    """What the machine had before the first test is what it has after the last, or the run has failed."""

    def __init__(self) -> None:
        self._before = traces.take()
        self._left: list[str] = []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._left = traces.settle(self._before)
        if self._left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._left:
            terminalreporter.write_line(f"LEFT BEHIND {line}", red=True)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that other users may pass. pytest's own is closed to them again by whoever runs pytest next."""
    with tempfile.TemporaryDirectory(prefix=f"xdpn{os.getpid()}-", dir="/tmp") as directory:
        path = Path(directory)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="session")
def control() -> Iterator["ControlThread"]:
    """The thread of the control loop."""
    from tests.rig.backend import ControlThread  # late: --core has its say first

    thread = ControlThread()
    yield thread
    thread.close()
