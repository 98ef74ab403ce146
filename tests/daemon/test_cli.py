"""The command line: what it refuses, what it answers without a daemon, how it shows a running one."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig.snapshots import snapshot
from xdpnet import __version__, cli, config, limits
from xdpnet.control.server import ControlServer
from xdpnet.control.systemd import JournalFormatter
from xdpnet.journal import JOURNAL
from xdpnet.metrics import table


def xdpnet(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "xdpnet", *words], capture_output=True, text=True, check=False, timeout=60
    )


def configure(*words: str) -> config.Config:
    return cli._origin(cli._parser().parse_args(["run", *words])).read()


@contextmanager
def daemon(path: str) -> Iterator[None]:
    """A control socket that answers as a daemon does."""
    loop = asyncio.new_event_loop()
    server = ControlServer(path, {"stats": lambda: snapshot().to_json()})
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(server.stop())
        loop.close()


# ---- run ----


def test_flags_alone_are_a_whole_configuration() -> None:
    made = configure(
        *("--netdev", "eth1,queues=2,mode=generic", "--netdev", "eth2", "--workers", "2", "--cpus", "1-2"),
        *("--guest", "web,socket=/run/a,mac=52:54:00:00:00:01,queues=4", "--guest", "db,socket=/run/b,client=true"),
        *("--metrics", "127.0.0.1:9100", "--control", "/run/c", "--spin-us", "0", "--ageing-s", "0"),
    )
    assert [(n.interface, n.queues, n.mode) for n in made.netdevs] == [("eth1", 2, "generic"), ("eth2", None, "auto")]
    assert [(g.name, g.queues, g.client) for g in made.guests] == [("web", 4, False), ("db", 1, True)]
    assert (made.worker_count, made.cpus, made.metrics) == (2, (1, 2), ("127.0.0.1", 9100))
    assert (made.control, made.spin_us, made.ageing_s) == ("/run/c", 0, 0)


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('workers = 1\ncontrol = "/run/file"\n[[guest]]\nname = "web"\nsocket = "/run/a"\n')
    made = configure("--config", str(file), "--workers", "3", "--guest", "web,queues=2")
    assert (made.workers, made.control, made.guests[0].socket, made.guests[0].queues) == (3, "/run/file", "/run/a", 2)


def test_the_example_configuration_is_legal_and_says_the_defaults() -> None:
    file = Path(__file__).parents[2] / "deploy" / "xdpnet.toml"
    made = configure("--config", str(file))
    assert made.guests
    text = file.read_text()
    for key, default in {
        "spin_us": limits.SPIN_US,
        "ageing_s": limits.AGEING_S,
        "frames_per_queue": limits.FRAMES_PER_QUEUE,
        "max_macs": limits.MACS_PER_PORT,
        "max_memory": '"256GiB"',
    }.items():
        assert f"\n# {key} = {default}\n" in text
    assert config.parse_size("256GiB") == limits.MAX_MEMORY


def test_every_key_of_the_models_is_in_the_example() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "xdpnet.toml").read_text()
    for model in (config.Config, config.GuestConfig, config.NetdevConfig):
        for name, field in model.model_fields.items():
            key = field.alias or name
            assert f"{key} =" in text or f"[[{key}]]" in text or key == "fd"  # fd: by flag alone


def test_a_wrong_configuration_ends_with_2_and_every_fault() -> None:
    done = xdpnet("run", "--guest", "a b,socket=/x,queues=99", "--workers", "0", "--metrics", "x")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        'xdpnet: workers = "0": must be 1..16',
        'xdpnet: metrics = "x": must be HOST:PORT, as 127.0.0.1:9100 or [::1]:9100',
        "xdpnet: guest \"a b\": name = \"a b\": must be 1..32 letters, digits, '_', '.' or '-'",
        'xdpnet: guest "a b": queues = "99": must be 1..16',
    ]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--guest", "web,socket=/no/such/web.sock"), 0, ""),
        (("--guest", "web,socket=/run/x,queues=17"), 2, 'xdpnet: guest "web": queues = "17": must be 1..16\n'),
        (
            ("--guest", "web,socket=/run/x,user=no-such-user"),
            1,
            'xdpnet: guest web: user = "no-such-user": there is none; name one of this machine, or a number\n',
        ),
    ],
)
def test_a_configuration_is_looked_at_without_a_start(words: tuple[str, ...], status: int, told: str) -> None:
    done = xdpnet("run", "--check", *words)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", told)


def test_options_without_a_command_run_as_the_backend_conventions_call_it() -> None:
    done = xdpnet("--socket-path=/run/x.sock", "--workers=99")
    assert done.returncode == 2
    assert done.stderr == 'xdpnet: workers = "99": must be 1..16\n'


def test_socket_path_and_fd_make_one_guest_and_no_control_socket() -> None:
    made = configure("--socket-path", "/run/vm.sock", "--netdev", "eth1")
    assert (made.guests[0].socket, made.guests[0].fd, made.control) == ("/run/vm.sock", None, None)
    made = configure("--fd", "7")
    assert (made.guests[0].socket, made.guests[0].fd, made.control) == (None, 7, None)
    assert configure("--fd", "7", "--control", "/run/c").control == "/run/c"


def test_socket_path_and_fd_exclude_each_other() -> None:
    done = xdpnet("--socket-path=/run/x.sock", "--fd=3")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr


@pytest.mark.parametrize("words", [["--print-capabilities"], ["run", "--print-capabilities", "--fd=3", "--nonsense"]])
def test_capabilities_are_printed_whatever_else_is_asked(words: list[str]) -> None:
    done = xdpnet(*words)
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"type": "net"}, "")


def test_the_vhost_user_json_file_names_the_same_type() -> None:
    file = Path(__file__).parents[2] / "deploy" / "50-xdpnet.json"
    document = json.loads(file.read_text())
    assert set(document) <= {"description", "type", "binary", "tags"}
    assert document["type"] == cli.CAPABILITIES["type"]
    assert document["binary"].startswith("/")


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"], ["stats", "--help"], ["nonsense"], ["--version"]])
def test_usage_is_told_without_a_traceback(words: list[str]) -> None:
    done = xdpnet(*words)
    assert done.returncode == (0 if {"--help", "--version"} & set(words) else 2)
    assert "Traceback" not in done.stderr


def test_the_version_is_told() -> None:
    assert xdpnet("--version").stdout == f"xdpnet {__version__}\n"


# ---- the journal ----


def said_on_a_socket(*words: str, journal: bool) -> list[str]:
    """Lines of a run whose stderr is a socket: the journal's, or another while the journal has its own."""
    ours, theirs = socket.socketpair()
    status = os.fstat((theirs if journal else ours).fileno())
    with ours, theirs:
        subprocess.run(
            ["prlimit", "--nofile=512:512", sys.executable, "-m", "xdpnet", "run", *words],
            stderr=theirs.fileno(), check=False, timeout=60,
            env=os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
        )  # fmt: skip
        theirs.close()
        with ours.makefile() as file:
            return file.read().splitlines()


@pytest.mark.skipif(os.path.exists(JOURNAL), reason="systemd's journal is here, and would take the lines itself")
def test_the_journal_gets_each_line_with_its_priority_and_others_do_not() -> None:
    words = "--control", "/no/such/directory/c", "--guest", "web,socket=/no/such/directory/s"
    warning, error = said_on_a_socket(*words, journal=True)
    assert warning.startswith("<4>at most 512 descriptors may be open")
    assert error.startswith("<3>socket /no/such/directory/c: ")
    assert said_on_a_socket(*words, journal=False) == [f"xdpnet: WARNING: {warning[3:]}", f"xdpnet: {error[3:]}"]
    assert said_on_a_socket("--workers", "0", "--guest", "web,socket=/x", journal=True) == [
        '<3>workers = "0": must be 1..16'
    ]


def test_every_line_of_a_traceback_has_the_priority_of_its_record() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", logging.CRITICAL, "", 0, "what %s", ("happened",), sys.exc_info())
    lines = JournalFormatter().format(record).splitlines()
    assert lines[0] == "<2>what happened"
    assert lines[-2:] == ["<2>ValueError: two", "<2>lines"]
    assert all(line.startswith("<2>") for line in lines)


# ---- stats ----


def test_stats_without_a_daemon_names_the_remedy(tmp_path: Path) -> None:
    done = xdpnet("stats", "--control", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr == (
        f"xdpnet: no daemon at {tmp_path}/none; start it with xdpnet run, or name its socket: --control\n"
    )


def test_stats_shows_the_table(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with daemon(path):
        done = xdpnet("stats", "--control", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "every frame accounted for" in done.stdout
    assert "…" not in done.stdout


def test_stats_of_a_port_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with daemon(path):
        one = xdpnet("stats", "--port", "web", "--sort", "drops", "--control", path)
        none = xdpnet("stats", "--port", "webb", "--control", path)
    assert (one.returncode, one.stderr) == (0, "")
    assert "web" in one.stdout
    assert "eth1" not in one.stdout
    assert (none.returncode, none.stderr) == (1, "xdpnet: no port webb; there are: web, eth1\n")


def test_fdb_shows_the_addresses_and_those_of_a_port(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with daemon(path):
        every = xdpnet("fdb", "--control", path)
        none = xdpnet("fdb", "--port", "eth1", "--control", path)
        told = xdpnet("fdb", "--json", "--port", "web", "--control", path)
    assert (every.returncode, every.stderr) == (0, "")
    rows = [line.split() for line in every.stdout.splitlines() if "52:54" in line]
    assert rows == [
        ["52:54:00:00:00:01", "any", "web", "given", "-"],
        ["52:54:00:00:00:09", "-", "web", "learned", "0", "min", "03", "s"],
    ]
    assert "52:54" not in none.stdout
    assert [each["mac"] for each in json.loads(told.stdout)] == ["52:54:00:00:00:01", "52:54:00:00:00:09"]


def test_ring_shows_both_rings_of_a_pair_and_names_the_guests_and_pairs_that_there_are(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with daemon(path):
        shown = xdpnet("ring", "web", "0", "--control", path)
        told = xdpnet("ring", "web", "0", "--json", "--control", path)
        stranger = xdpnet("ring", "eth1", "0", "--control", path)
        beyond = xdpnet("ring", "web", "1", "--control", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:3] for line in shown.stdout.splitlines() if line.strip()}
    assert rows["state"] == ["up", "up"]
    assert rows["available"] == ["1,010", "1,010"]
    assert rows["packets"] == ["12,345,678", "1,000"]
    assert rows["no_buffer"] == ["22", "-"]
    assert "no_port" not in rows
    assert json.loads(told.stdout)["tx"]["drops"]["spoof"] == 10
    assert (stranger.returncode, stranger.stderr) == (1, "xdpnet: no guest eth1; there are: web\n")
    assert (beyond.returncode, beyond.stderr) == (1, "xdpnet: guest web has no queue pair 1; it has 0 to 0\n")


def test_the_command_line_knows_how_the_table_can_be_sorted() -> None:
    assert cli.SORTS == table.SORTS


def test_stats_as_json_is_the_snapshot(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    with daemon(path):
        done = xdpnet("stats", "--json", "--control", path)
    assert json.loads(done.stdout) == json.loads(snapshot().to_json())


@pytest.mark.parametrize("words", [["--watch", "0.1"], ["--json", "--watch", "0.1"]])
def test_watch_goes_on_and_a_reader_that_leaves_ends_it_quietly(tmp_path: Path, words: list[str]) -> None:
    path = str(tmp_path / "c")
    with (
        daemon(path),
        subprocess.Popen(
            [sys.executable, "-m", "xdpnet", "stats", "--control", path, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as child,
    ):  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        seen = 0
        while seen < 3:
            seen += "no_buffer" in child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait() == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x"])
def test_watch_wants_a_number_of_seconds(seconds: str) -> None:
    assert xdpnet("stats", "--watch", seconds).returncode == 2


# ---- check ----


def test_check_names_each_fault_with_its_remedy_and_ends_with_1() -> None:
    done = xdpnet("check", "xdpn-none")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "xdpn-none" in line]
    assert line.startswith("FAIL")


def test_a_full_disk_behind_stdout_is_no_traceback() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "xdpnet", "--print-capabilities"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode != 0
