"""The daemon as a process: it starts in order, serves, ends in order, and leaves nothing."""

import errno
import grp
import json
import os
import pty
import pwd
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.guests import frame
from tests.rig.netns import Veth, add_veth, command, needs_root, remove, veth
from tests.rig.refuse import USERFAULTFD
from tests.rig.remote import RemoteGuest
from tests.rig.traced import WALL, stopped
from tests.rig.waiting import PATIENCE_S, until_equal
from xdpnet.closer import MAX_PENDING
from xdpnet.control.orders import OTHERS
from xdpnet.control.server import CLIENTS
from xdpnet.daemon import END_S
from xdpnet.metrics.endpoint import CONNECTIONS
from xdpnet.virtq.message import Request

MAC = "52:54:00:00:00:01"

# ---- start and end ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_ends_it_in_order_and_no_socket_is_left(tmp_path: Path, number: int) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--guest", guest(tmp_path, "db")) as running:
        running.ready()
        assert sorted(path.name for path in tmp_path.glob("*.sock")) == ["control.sock", "db.sock", "web.sock"]
        assert running.end(number) == 0
    name = signal.Signals(number).name
    assert running.log.splitlines()[-2:] == [f"xdpnet: INFO: {name}: stopping", "xdpnet: INFO: stopped"]
    assert list(tmp_path.glob("*.sock")) == []


def test_no_signal_that_others_ignore_ends_it_and_each_is_named(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        running.ready()
        for number in OTHERS:
            running.process.send_signal(number)
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            running.until_said(f"WARNING: {name} means nothing here")
        assert guests_of(running) == ["web"]
        assert running.end() == 0


# ---- a new configuration ----


CONFIG = """
control = "{directory}/control.sock"
[[guest]]
name = "web"
socket = "{directory}/web.sock"
"""


@contextmanager
def configured(directory: Path, env: dict[str, str] | None = None) -> Iterator[tuple[Daemon, Path]]:
    """A daemon with a file, and that file."""
    file = directory / "xdpnet.toml"
    file.write_text(CONFIG.format(directory=directory))
    with daemon(directory, "--config", str(file), env=env) as running:
        yield running.ready(), file


def guests_of(running: Daemon) -> list[str]:
    return [port.name for port in running.snapshot().ports]


def test_sighup_has_it_serve_the_configuration_as_it_is_then(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file):
        before = descriptors_of(running)
        for count in range(1, 4):
            file.write_text(file.read_text() + f'[[guest]]\nname = "db{count}"\nsocket = "{tmp_path}/db{count}.sock"\n')
            running.process.send_signal(signal.SIGHUP)
            running.until_said(f"SIGHUP: guest db{count}: added")
            assert guests_of(running) == ["web", *(f"db{n}" for n in range(1, count + 1))]
        file.write_text(CONFIG.format(directory=tmp_path))
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: running.log.count(": removed") == 3, "removed")
        assert sorted(path.name for path in tmp_path.glob("*.sock")) == ["control.sock", "web.sock"]
        running.until(lambda: descriptors_of(running) == before, "nothing left open")
        assert running.log.count("ready: ") == 1
        assert running.end() == 0


def test_sighup_has_it_start_anew_where_nothing_else_will_do(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file):
        before = descriptors_of(running)
        for workers in 2, 1:
            file.write_text(f"workers = {workers}\n" + CONFIG.format(directory=tmp_path))
            running.process.send_signal(signal.SIGHUP)
            running.until_said(f"workers {workers}\n", 1 + (workers == 1))
            assert len(running.snapshot().workers) == workers
        assert running.log.count("SIGHUP: workers: takes a new start of the daemon") == 2
        running.until(lambda: descriptors_of(running) == before, "nothing left open")
        assert running.end() == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("name =", "nam ="), 'guest 1: nam = "web": unknown key'),
        (("[[guest]]", "[[guest"), "not TOML"),
        (("[[guest]]", "cpus = '4095'\n[[guest]]"), "CPU 4095 not usable here"),
        (("[[guest]]", "[[netdev]]\ninterface = 'xdpn-none'\n[[guest]]"), "interface xdpn-none: "),
        (("[[guest]]", "[[guest]]\nuser = 'no-such-user'"), 'user = "no-such-user": there is none'),
        # What shows only when it is tried; the second, after a new start: what was served before is served again.
        (("[[guest]]", "metrics = '192.0.2.1:9100'\n[[guest]]"), "metrics 192.0.2.1:9100: "),
        (("[[guest]]", "workers = 2\nmetrics = '192.0.2.1:9100'\n[[guest]]"), "metrics 192.0.2.1:9100: "),
        (("/web.sock", "/no/such/web.sock"), "socket"),
        (("[[guest]]", ""), "guest: none given"),
    ],
)
def test_a_mistake_in_the_configuration_never_ends_a_running_daemon(
    tmp_path: Path, change: tuple[str, str], told: str
) -> None:
    with configured(tmp_path) as (running, file):
        right = file.read_text()
        file.write_text(right.replace(*change))
        assert file.read_text() != right
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: "going on with the configuration as it was" in running.log, "told")
        assert re.search(f"ERROR: .*{re.escape(told)}", running.log), running.log
        if not told.startswith(("metrics", "socket")):  # nothing was tried
            assert f"ERROR: SIGHUP: {file}:" in running.log, running.log
        running.until(lambda: (tmp_path / "control.sock").exists(), "served")
        running.until(lambda: running.log.count("ready: ") == 1 + running.log.count("starting anew"), "ready")
        assert guests_of(running) == ["web"]
        file.write_text(right)
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: "SIGHUP: the configuration is as it was" in running.log, "unchanged")
        assert running.end() == 0


def test_a_mistake_that_shows_only_when_it_is_tried_twice_is_told_twice(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file):
        file.write_text("workers = 2\nmetrics = '192.0.2.1:9100'\n" + file.read_text())
        for count in 1, 2:
            running.process.send_signal(signal.SIGHUP)
            running.until_said("going on with", count)
            running.until_said("ready: ", count + 1)
        assert running.end() == 0


def test_a_daemon_that_serves_an_inherited_connection_cannot_start_anew(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    file = tmp_path / "xdpnet.toml"
    file.write_text("workers = 1\n")
    words = "--fd", str(theirs.fileno()), "--config", str(file)
    with ours, theirs, daemon(tmp_path, *words, fds=(theirs.fileno(),)) as running:
        running.ready()
        file.write_text("workers = 2\n")
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: "an inherited connection cannot be taken up again" in running.log, "told")
        assert running.end() == 0


def test_without_a_file_there_is_nothing_new_to_read(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        running.ready().process.send_signal(signal.SIGHUP)
        running.until(lambda: "SIGHUP: the configuration is as it was" in running.log, "told")
        assert running.end() == 0


def said_until(terminal: int, words: bytes) -> str:
    said = b""
    while words not in said:
        assert select.select([terminal], [], [], PATIENCE_S)[0], said
        said += os.read(terminal, 1000)
    return said.decode()


@pytest.mark.parametrize(
    ("prefix", "told"),
    [((), "SIGHUP: stopping"), (("sh", "-c", 'trap "" HUP; exec "$@"', "sh"), "SIGTERM: stopping")],
    ids=["terminal", "nohup"],
)
def test_a_terminal_that_is_closed_ends_it_in_order_but_not_under_nohup(
    tmp_path: Path, prefix: tuple[str, ...], told: str
) -> None:
    ours, theirs = pty.openpty()
    words = [*prefix, sys.executable, "-m", "xdpnet", "run", "--control", "", "--guest", guest(tmp_path)]
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs) as running:
        os.close(theirs)
        try:
            said_until(ours, b"ready: ")
            for number in signal.SIGHUP, signal.SIGTERM:
                running.send_signal(number)
            assert told in said_until(ours, b"stopped")
            assert running.wait(PATIENCE_S) == 0
        finally:
            running.kill()
            os.close(ours)


@pytest.mark.parametrize("change", ["spin_us = 1", "workers = 2"], ids=["live", "anew"])
def test_the_service_manager_hears_that_it_takes_a_new_configuration(tmp_path: Path, change: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        with configured(tmp_path, {"NOTIFY_SOCKET": str(tmp_path / "notify")}) as (running, file):
            assert manager.recv(100) == b"READY=1"
            file.write_text(f"{change}\n" + file.read_text())
            running.process.send_signal(signal.SIGHUP)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(100))
            assert manager.recv(100) == b"READY=1"
            assert running.end() == 0
            assert manager.recv(100) == b"STOPPING=1"


@needs_root
@pytest.mark.net
def test_what_starts_anew_leaves_nothing_of_what_it_was_and_goes_on(tmp_path: Path, wire: Veth) -> None:
    """With everything that there is to start and to end, and past the time that an end may take."""
    more = f"metrics = '127.0.0.1:0'\nmax_macs = {{macs}}\n{{before}}[[netdev]]\ninterface = '{wire.ifname}'\n"
    starts = 5

    def threads() -> int:
        return len(os.listdir(f"/proc/{running.process.pid}/task"))

    with configured(tmp_path, {"WATCHDOG_USEC": "10000000"}) as (running, file):
        before = file.read_text()
        for count in range(starts):
            file.write_text(more.format(macs=count + 1, before=before))
            running.process.send_signal(signal.SIGHUP)
            until_equal(lambda: running.log.count("ready: "), count + 2)
            if count == 0:
                once = descriptors_of(running), threads()
        # Some come and go; what each start leaves are more.
        most = [number + starts - 2 for number in once]
        running.until(lambda: descriptors_of(running) <= most[0] and threads() <= most[1], "nothing else is left")
        running.until(lambda: running.snapshot().uptime_s > END_S, "time goes by")
        assert running.end() == 0


@needs_root
def test_an_end_that_hangs_is_cut_and_says_where(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        tid = running.ready().snapshot().workers[0].tid
        with stopped(tid):
            running.process.terminate()
            running.until(lambda: "Timeout (0:00:0" in running.log, "told")
            os.waitpid(tid, WALL)  # a process has not ended while somebody may still look at one of its threads
        assert running.process.wait(timeout=PATIENCE_S) == 1
        assert "bridge.py" in running.log


def test_a_later_step_that_fails_undoes_the_earlier_ones(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with daemon(tmp_path, "--guest", guest(tmp_path), "--metrics", address) as running:
            assert running.process.wait(timeout=PATIENCE_S) == 1
    assert running.log == f"xdpnet: metrics {address}: Address already in use; name another HOST:PORT with --metrics\n"
    assert list(tmp_path.glob("*.sock")) == []


def test_a_second_daemon_at_the_same_socket_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as first:
        first.ready()
        other = tmp_path / "other"
        other.mkdir()
        with daemon(other, "--guest", guest(tmp_path)) as second:
            assert second.process.wait(timeout=PATIENCE_S) == 1
        assert "web.sock: another process listens on it; stop that process, or name another path" in second.log
        assert first.snapshot().ports[0].name == "web"


def test_after_kill_9_the_stale_sockets_are_taken_over(tmp_path: Path) -> None:
    for _ in range(2):
        with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
            running.ready()
            running.end(signal.SIGKILL)
        assert (tmp_path / "web.sock").exists()


def test_guests_sockets_may_be_in_the_directory_that_is_made_for_the_control_socket(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with daemon(tmp_path, "--guest", guest(made), "--control", str(made / "c.sock")) as running:
        running.ready()
        assert sorted(path.name for path in made.iterdir()) == ["c.sock", "web.sock"]
        assert running.end() == 0
    assert not made.exists()


def test_a_cpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--cpus", "4095") as running:
        assert running.process.wait(timeout=PATIENCE_S) == 1
    assert re.fullmatch(r"xdpnet: cpus: CPU 4095 not usable here; choose of CPU [0-9, ]+\n", running.log)


def test_an_interface_that_is_not_there_is_named(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--netdev", "xdpn-none") as running:
        assert running.process.wait(timeout=PATIENCE_S) == 1
    assert re.match(r"xdpnet: interface xdpn-none: .*; ", running.log)
    assert len(running.log.splitlines()) == 1


def test_the_service_manager_hears_of_every_stage(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        with daemon(tmp_path, "--guest", guest(tmp_path), env=env) as running:
            assert manager.recv(100) == b"READY=1"
            assert manager.recv(100) == b"WATCHDOG=1"
            running.process.terminate()
            while (said := manager.recv(100)) == b"WATCHDOG=1":
                pass
            assert said == b"STOPPING=1"
            assert running.process.wait(timeout=PATIENCE_S) == 0


def test_a_service_manager_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), env={"NOTIFY_SOCKET": str(tmp_path / "gone")}) as running:
        assert running.ready().end() == 0


# ---- guests ----


def test_a_frontend_is_served_and_its_rings_are_shown(tmp_path: Path) -> None:
    words = ("--guest", guest(tmp_path, more=f",mac={MAC},queues=2"), "--metrics", "127.0.0.1:0")
    with daemon(tmp_path, *words) as running, RingMemory() as memory:
        running.ready()
        with Frontend.connect(str(tmp_path / "web.sock")) as frontend:
            frontend.negotiate()
            frontend.set_memory(memory)
            frontend.start_ring(0, memory, num=128, base=7)
            port = running.port("web")
            assert port.guest is not None
            assert port.guest.connected
            assert "VIRTIO_F_VERSION_1" in port.guest.features
            assert port.guest.messages > 0
            ring = port.queues[0].rx_ring
            assert ring is not None
            assert (ring.size, ring.started, ring.last_available) == (128, True, 7)
            assert len(port.queues) == 2
            assert 'xdpnet_guest_connected{port="web"} 1.0' in running.get("/metrics")[1]
        running.until(lambda: not running.port("web").guest.connected, "disconnected")  # type: ignore[union-attr]
        assert running.snapshot().addresses[0].mac == MAC
        assert running.end() == 0


def publish(memory: RingMemory, index: int, num: int, available: int) -> None:
    """Sets the available index of a ring, as its driver would."""
    offset = memory.ring_addr(index, num).avail - memory.user_addr
    memory.map[offset + 2 : offset + 4] = struct.pack("<H", available & 0xFFFF)


def test_a_ring_that_breaks_is_named_once_and_the_next_frontend_starts_anew(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running, RingMemory() as memory:
        running.ready()
        with Frontend.connect(str(tmp_path / "web.sock")) as frontend:
            frontend.negotiate()
            frontend.set_memory(memory)
            kick, _ = frontend.start_ring(1, memory, num=16)
            publish(memory, 1, 16, 17)
            os.eventfd_write(kick, 1)
            running.until(lambda: "tx ring 0 broke: avail_jump" in running.log, "the ring broke")
            ring = running.port("web").queues[0].tx_ring
            assert ring is not None
            assert ring.broken == "avail_jump"
            os.eventfd_write(kick, 1)
            assert running.log.count("broke") == 1
        with Frontend.connect(str(tmp_path / "web.sock")) as frontend:
            frontend.negotiate()
            frontend.set_memory(memory)
            publish(memory, 1, 16, 0)
            frontend.start_ring(1, memory, num=16)
            ring = running.port("web").queues[0].tx_ring
            assert ring is not None
            assert (ring.started, ring.broken) == (True, "")
        assert running.end() == 0


def test_a_guest_whose_memory_is_taken_away_loses_its_connection_and_no_other_does(tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--guest", guest(tmp_path), "--guest", guest(tmp_path, "db")) as running,
        RingMemory(seal=False) as shrinking,
        Frontend.connect(str(tmp_path / "web.sock")) as bad,
        Frontend.connect(str(tmp_path / "db.sock")) as good,
    ):
        good.negotiate()
        bad.negotiate()
        bad.set_memory(shrinking)
        kick, _ = bad.start_ring(1, shrinking, num=16)
        os.ftruncate(shrinking.fd, 0)
        os.eventfd_write(kick, 1)
        assert bad.is_disconnected()
        good.negotiate()
        assert "guest web: its memory was taken away; ending the connection" in running.log
        with Frontend.connect(str(tmp_path / "web.sock")) as again:
            again.negotiate()
        assert running.end() == 0


def test_36_a_guest_behind_whose_card_others_live_is_told_of_while_it_runs(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path, more=f",mac={MAC}")) as running:
        running.ready()
        with RemoteGuest(tmp_path / "web.sock") as web:
            web.start()
            web.pair.send(frame(b"\xff" * 6, bytes.fromhex("52540000000a")))
            told = "guest web: frames from 52:54:00:00:00:0a are dropped (spoof): it is not its mac; if it is a bridge"
            running.until(lambda: told in running.log, "told")
        assert running.end() == 0


def test_13_each_guest_has_its_own_limit_of_memory_or_that_of_all(tmp_path: Path) -> None:
    with daemon(
        tmp_path,
        "--max-memory",
        "64MiB",
        "--guest",
        guest(tmp_path),
        "--guest",
        guest(tmp_path, "big", ",max_memory=65MiB"),
    ) as running:
        running.ready()
        for name, mib in (("web", 64), ("big", 65)):
            with Frontend.connect(str(tmp_path / f"{name}.sock")) as frontend:
                frontend.negotiate()
                for size, fits in ((mib << 20, True), ((mib << 20) + 4096, False)):
                    with RingMemory(size=size) as memory:
                        assert (frontend.set_memory(memory) == 0) is fits
        assert running.log.count("max_memory of the guest is") == 2


def test_14_rings_are_polled_for_the_guest_that_may_poll_alone(tmp_path: Path) -> None:
    more = guest(tmp_path, "may", ",poll=true")
    with daemon(tmp_path, "--guest", guest(tmp_path), "--guest", more) as running:
        running.ready()
        for name, allowed in (("web", False), ("may", True)):
            with Frontend.connect(str(tmp_path / f"{name}.sock")) as frontend:
                frontend.negotiate()
                assert (frontend.set_event(Request.SET_VRING_KICK, 0, None) == 0) is allowed
        assert "poll = true of the guest allows that" in running.log


def test_an_inherited_connection_is_served_and_its_end_is_the_daemons(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs, daemon(tmp_path, "--fd", str(theirs.fileno()), fds=(theirs.fileno(),)) as running:
        with Frontend(ours) as frontend:
            frontend.negotiate()
        theirs.close()
        assert running.process.wait(timeout=PATIENCE_S) == 0


def test_a_descriptor_that_is_no_socket_is_named(tmp_path: Path) -> None:
    with daemon(tmp_path, "--fd", "987") as running:
        assert running.process.wait(timeout=PATIENCE_S) == 1
    assert "descriptor 987 is not an open socket; pass one with --fd" in running.log


def test_health_and_metrics_are_served_while_it_runs(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--metrics", "127.0.0.1:0", "--workers", "2") as running:
        running.ready()
        assert running.get("/healthz") == (200, "ok\n")
        assert 'xdpnet_worker_loops_total{worker="1"}' in running.get("/metrics")[1]
        assert running.end() == 0


@needs_root
def test_a_guests_socket_is_its_users(tmp_path: Path) -> None:
    words = ("--guest", guest(tmp_path, more=",user=nobody"), "--guest", guest(tmp_path, "db", ",group=2,mode=0620"))
    with daemon(tmp_path, *words) as running:
        running.ready()
        found = [(tmp_path / f"{name}.sock").stat() for name in ("web", "db")]
        assert [(each.st_uid, each.st_gid, each.st_mode & 0o777) for each in found] == [
            (pwd.getpwnam("nobody").pw_uid, os.getegid(), 0o600),
            (os.geteuid(), 2, 0o620),
        ]
        assert running.end() == 0


CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


@needs_root
def test_58_the_socket_of_a_guest_may_be_another_groups_and_a_directory_that_bars_it_is_named(open_path: Path) -> None:
    def connects(name: str, group: int) -> bool:
        words = [sys.executable, "-c", CONNECT, str(open_path / f"{name}.sock")]
        child = subprocess.run(words, user=65534, group=group, extra_groups=[], check=False, capture_output=True)
        return child.returncode == 0

    words = ("--guest", guest(open_path, more=",group=daemon"), "--guest", guest(open_path, "db", ",user=nobody"))
    for mode, warned in ((0o711, False), (0o750, True)):
        open_path.chmod(mode)
        with daemon(open_path, *words) as running:
            running.ready()
            found = (open_path / "web.sock").stat()
            assert (found.st_gid, found.st_mode & 0o777) == (grp.getgrnam("daemon").gr_gid, 0o660)
            assert connects("web", found.st_gid) is not warned
            assert connects("web", found.st_gid + 1) is False
            for name, whom in (("web", "group daemon"), ("db", "user nobody")):
                line = f"guest {name}: its socket is for {whom}, who may not pass {open_path}; chmod o+x {open_path}"
                assert (line in running.log) is warned
            assert running.end() == 0


def test_a_user_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path, more=",user=no-such-user")) as running:
        assert running.process.wait(timeout=PATIENCE_S) == 1
    assert 'guest web: user = "no-such-user": there is none; name one of this machine, or a number' in running.log


def descriptors_of(running: Daemon) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def connect_many(family: int, address: tuple[str, int] | str, count: int) -> list[socket.socket]:
    """As many as the backlog takes, or more: nobody waits."""
    made = [socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(count)]
    for sock in made:
        sock.connect_ex(address)
    return made


def test_strangers_who_connect_without_end_take_few_descriptors_and_none_of_a_guests(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--metrics", "127.0.0.1:0") as running:
        running.ready()
        running.get("/healthz")
        url = re.search(r"metrics: http://([^:]+):(\d+)/", running.log)
        assert url is not None
        with Frontend.connect(str(tmp_path / "web.sock")) as frontend:
            frontend.negotiate()
            before = descriptors_of(running)
            strangers = connect_many(socket.AF_INET, (url[1], int(url[2])), 300)
            strangers += connect_many(socket.AF_UNIX, running.control, 300)
            most = before + CONNECTIONS + CLIENTS  # but for what was being closed when we looked
            running.until(lambda: descriptors_of(running) >= most - 2, "all places taken")
            for _ in range(100):
                assert frontend.set_event(Request.SET_VRING_CALL, 0, frontend.event()) == 0
                assert descriptors_of(running) <= most + MAX_PENDING
            for sock in strangers:
                sock.close()
        running.until(lambda: running.get("/healthz") == (200, "ok\n"), "served again")
        assert running.end() == 0


def limits(running: Daemon) -> tuple[str, str]:
    found = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{running.process.pid}/limits").read_text())
    assert found is not None
    return found[1], found[2]


def test_the_limit_of_descriptors_is_raised_as_far_as_it_goes_and_named_if_that_is_too_low(
    tmp_path: Path,
) -> None:
    for hard, told in ((4096, False), (512, True)):
        words = ("--guest", guest(tmp_path))
        with daemon(tmp_path, *words, prefix=("prlimit", f"--nofile=256:{hard}")) as running:
            running.ready()
            assert limits(running) == (str(hard), str(hard))
            assert ("at most 512 descriptors may be open" in running.log) is told
            assert running.end() == 0


def test_the_daemon_is_small(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--metrics", "127.0.0.1:0") as running:
        running.ready()
        running.get("/metrics")
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        assert int(found[1]) < 60 * 1024


# ---- interfaces ----


@needs_root
@pytest.mark.net
def test_an_interface_is_attached_shown_and_released(tmp_path: Path, wire: Veth) -> None:
    words = ("--guest", guest(tmp_path, more=f",mac={MAC}"), "--netdev", wire.ifname, "--metrics", "127.0.0.1:0")
    with daemon(tmp_path, *words) as running:
        port = running.ready().port(wire.ifname)
        assert port.netdev is not None
        assert (port.netdev.mode, port.netdev.alive) == ("native", True)
        assert port.queues[0].xsk is not None
        assert port.queues[0].xsk.open
        _, text = running.get("/metrics")
        assert f'xdpnet_xdp_info{{interface="{wire.ifname}",mode="native",policy="auto",zerocopy="false"}} 1.0' in text
        assert xdp_of(wire.ifname)
        assert running.end() == 0
    assert not xdp_of(wire.ifname)


@needs_root
@pytest.mark.net
@pytest.mark.parametrize(("policy", "said"), [("on", True), ("auto", False)])
def test_without_a_way_to_notice_that_memory_moves_nothing_is_sent_in_place_and_who_wants_that_is_told(
    tmp_path: Path, wire: Veth, policy: str, said: bool
) -> None:
    refused = (sys.executable, "-m", "tests.rig.refuse", str(USERFAULTFD), str(errno.EPERM))
    words = ("--guest", guest(tmp_path), "--netdev", f"{wire.ifname},zerocopy={policy}")
    with daemon(tmp_path, *words, prefix=refused) as running:
        assert running.ready().port(wire.ifname).queues[0].xsk is not None
        assert ("frames are copied all the same" in running.log) == said
        assert running.end() == 0


@needs_root
@pytest.mark.net
def test_kill_9_leaves_no_program_at_the_interface(tmp_path: Path, wire: Veth) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--netdev", wire.ifname) as running:
        running.ready()
        assert xdp_of(wire.ifname)
        running.end(signal.SIGKILL)
        running.until(lambda: not xdp_of(wire.ifname), "no program")


@needs_root
@pytest.mark.net
def test_an_interface_that_vanishes_is_ill_health_until_it_is_back(tmp_path: Path, wire: Veth) -> None:
    words = ("--guest", guest(tmp_path), "--netdev", wire.ifname, "--metrics", "127.0.0.1:0")
    with daemon(tmp_path, *words) as running:
        running.ready()
        remove(wire.ifname)
        running.until(lambda: running.get("/healthz") == (503, f"interface {wire.ifname} is gone\n"), "ill")
        add_veth(wire.ifname, wire.namespace)
        running.until(lambda: running.get("/healthz") == (200, "ok\n"), "well")
        running.until(lambda: xdp_of(wire.ifname), "attached again")
        assert running.end() == 0


@needs_root
@pytest.mark.net
@pytest.mark.parametrize("limit", ["", ",queues=1"], ids=["room for all", "room for one"])
def test_d19_an_interface_gets_more_queues_than_room_and_that_shows(tmp_path: Path, limit: str) -> None:
    with veth(queues=2) as pair:
        pair.namespace.run("ethtool", "-L", pair.peer, "tx", "1")
        command("ethtool", "-L", pair.ifname, "rx", "1")
        words = ("--guest", guest(tmp_path), "--netdev", pair.ifname + limit, "--metrics", "127.0.0.1:0")
        with daemon(tmp_path, *words) as running:
            assert len(running.ready().port(pair.ifname).queues) == 1
            command("ethtool", "-L", pair.ifname, "rx", "2")
            if limit:
                told = f'xdpnet_netdev_unserved_queues{{interface="{pair.ifname}"}} 1.0'
                running.until(lambda: told in running.get("/metrics")[1], "told of")
            else:
                running.until(lambda: len(running.port(pair.ifname).queues) == 2, "both served")
                running.until(lambda: all(queue.xsk for queue in running.port(pair.ifname).queues), "open")
            running.until(lambda: running.get("/healthz") == (200, "ok\n"), "well")
            assert running.end() == 0


@needs_root
@pytest.mark.net
def test_the_guests_addresses_are_steered(tmp_path: Path, wire: Veth) -> None:
    words = ("--guest", guest(tmp_path, more=f",mac={MAC}"), "--netdev", wire.ifname)
    with daemon(tmp_path, *words) as running, wire.wire() as far:
        running.ready()
        frame = bytes.fromhex(MAC.replace(":", "")) + wire.peer_mac + b"\x88\xb5" + bytes(50)
        for _ in range(10):
            far.send(frame)
        running.until(lambda: running.port(wire.ifname).queues[0].rx.packets >= 10, "frames")
        totals = running.snapshot().totals
        assert totals.frames_in == 10
        assert totals.drops == 10  # no driver is there to take them
        assert running.end() == 0


@needs_root
@pytest.mark.net
def test_an_address_that_ages_when_its_guest_has_gone_is_the_hosts_again(tmp_path: Path, wire: Veth) -> None:
    """Nothing tells of that but time."""
    words = ("--guest", guest(tmp_path), "--netdev", wire.ifname, "--ageing-s", "1")
    with daemon(tmp_path, *words) as running, wire.wire() as far:
        running.ready()
        with RemoteGuest(tmp_path / "web.sock") as web:
            web.start()
            web.pair.send(frame(b"\xff" * 6, bytes.fromhex(MAC.replace(":", ""))))
            assert far.receive()

        def verdict(name: str) -> int:
            netdev = running.port(wire.ifname).netdev
            assert netdev is not None
            return netdev.verdicts[name]

        def goes_to(name: str) -> bool:
            before = verdict(name)
            far.send(frame(bytes.fromhex(MAC.replace(":", "")), wire.peer_mac))
            return verdict(name) > before

        running.until(lambda: goes_to("host"), "the host's")
        assert running.end() == 0


@needs_root
@pytest.mark.net
def test_a_frame_that_the_kernel_loses_is_in_one_of_its_counters(tmp_path: Path, wire: Veth) -> None:
    words = ("--guest", guest(tmp_path, more=f",mac={MAC}"), "--netdev", wire.ifname, "--frames-per-queue", "256")
    with daemon(tmp_path, *words) as running, wire.wire() as far:
        tid = running.ready().snapshot().workers[0].tid

        def seen() -> tuple[int, int, dict[str, int]]:
            """Frames for guests that the XDP program saw; those that came here; what the kernel lost of them."""
            port = running.port(wire.ifname)
            assert port.netdev is not None
            assert port.queues[0].xsk is not None
            lost = {name: n for name, n in asdict(port.queues[0].xsk.statistics).items() if name.startswith("rx_")}
            return port.netdev.verdicts["redirected"], port.queues[0].rx.packets, lost

        frame = bytes.fromhex(MAC.replace(":", "")) + wire.peer_mac + b"\x88\xb5" + bytes(50)
        with stopped(tid):
            for _ in range(1000):
                far.send(frame)
            running.until(lambda: seen()[2]["rx_fill_ring_empty_descs"], "no frame left")
        running.until(lambda: seen()[0] == seen()[1] + sum(seen()[2].values()), "each in one place")
        assert seen()[2]["rx_dropped"] == 0
        assert running.end() == 0


@needs_root
@pytest.mark.net
def test_64_the_answer_to_the_first_frame_from_an_address_reaches_the_guest(tmp_path: Path, wire: Veth) -> None:
    """However soon it is there: the far end sends each frame back, its addresses swapped, before it is received."""
    words = ("--guest", guest(tmp_path), "--netdev", wire.ifname)
    reflector = wire.namespace.popen(sys.executable, "-m", "tests.bench.reflect", wire.peer)
    shown = ("ip", "-n", wire.namespace.name, "link", "show", "dev", wire.peer)
    try:
        with daemon(tmp_path, *words) as running:
            running.ready()
            running.until(lambda: "xdp" in command(*shown), "reflector")
            with RemoteGuest(tmp_path / "web.sock") as web:
                web.start().pair.fill()
                for number in range(30):
                    address = bytes.fromhex("02000000aa") + bytes([number])
                    web.pair.send(frame(b"\xff" * 6, address))
                    assert [got[:6] for got in web.pair.frames()] == [address]
    finally:
        reflector.kill()
        reflector.communicate()


def xdp_of(ifname: str) -> bool:
    (link,) = json.loads(command("ip", "-json", "link", "show", "dev", ifname))
    return "xdp" in link
