"""A daemon that is changed while it serves: all or nothing, and the others notice nothing of it."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_process import CONFIG, configured, descriptors_of, guests_of
from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.frontend import Frontend
from tests.rig.guests import frame, mac
from tests.rig.netns import needs_root, remove, veth
from tests.rig.remote import RemoteGuest
from tests.rig.waiting import PATIENCE_S
from xdpnet import descriptors
from xdpnet.config import parse
from xdpnet.control.client import ask
from xdpnet.control.server import CLIENTS
from xdpnet.errors import ControlError
from xdpnet.netdev.link import require_link
from xdpnet.origin import Origin

XDPNET = sys.executable, "-m", "xdpnet"
ROUNDS = int(os.environ.get("XDPNET_ROUNDS", "10"))


def xdpnet(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*XDPNET, *words], capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S)


def order(running: Daemon, *words: str) -> tuple[int, str]:
    """Its status and what it says, by which it succeeds or fails."""
    done = xdpnet(*words, "--control", running.control)
    return done.returncode, done.stdout + done.stderr


def table(directory: Path, name: str, more: str = "") -> str:
    return f'[[guest]]\nname = "{name}"\nsocket = "{directory}/{name}.sock"\n{more}'


def sockets(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.sock"))


# ---- orders ----


def test_a_guest_is_added_set_and_removed_by_orders(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        running.ready()
        before = descriptors_of(running)
        assert order(running, "guest", "add", guest(tmp_path, "db")) == (0, "guest db: added\n")
        assert sockets(tmp_path) == ["control.sock", "db.sock", "web.sock"]
        with RemoteGuest(tmp_path / "db.sock") as db:
            db.start()
            assert order(running, "guest", "set", "db,mac=52:54:00:00:00:02,max_memory=1GiB") == (
                0, "guest db: mac, max_memory\n",
            )  # fmt: skip
            assert running.port("db").given == 1
            assert order(running, "guest", "set", "db,mac=,max_memory=") == (0, "guest db: mac, max_memory\n")
            assert running.port("db").given == 0
            assert order(running, "guest", "set", f"db,socket={tmp_path}/other.sock") == (0, "guest db: socket\n")
            assert sockets(tmp_path) == ["control.sock", "other.sock", "web.sock"]
            found = running.port("db").guest
            assert found
            assert (found.connects, found.connected) == (1, True)
            assert order(running, "guest", "remove", "db") == (0, "guest db: removed\n")
            assert db.frontend.is_disconnected()
        assert sockets(tmp_path) == ["control.sock", "web.sock"]
        running.until(lambda: descriptors_of(running) == before, "nothing left open")
        assert running.end() == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("guest", "add", "web,socket=/run/x"), 'guest "web": is there already; change it with: xdpnet guest set'),
        (("guest", "set", "db,mtu=9000"), 'guest "db": there is none; there are: web'),
        (("guest", "remove", "db"), 'guest "db": there is none; there are: web'),
        (("guest", "remove", "web"), "guest: none given"),
        (("guest", "add", "db"), 'guest "db": socket: is missing'),
        (("guest", "add", "db,soket=/run/x"), 'guest "db": soket = "/run/x": unknown key, did you mean "socket"?'),
        (("guest", "add", "db,fd=3"), "guest db: fd: an inherited connection cannot be taken up again"),
        (("guest", "add", "db,socket=/no/such/db.sock"), "socket /no/such/db.sock: directory /no/such"),
        (("guest", "set", "web,user=no-such-user"), 'guest web: user = "no-such-user": there is none'),
        (("netdev", "add", "xdpn-none"), "interface xdpn-none: there is none of this name"),
        (("netdev", "remove", "eth1"), 'netdev "eth1": there is none; there are: none'),
    ],
)  # fmt: skip
def test_an_order_that_cannot_be_says_why_and_changes_nothing(
    tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        before = ask(running.ready().control, "show")
        status, said = order(running, *words)
        assert (status, told in said) == (2, True), said
        assert ask(running.control, "show") == before
        assert sockets(tmp_path) == ["control.sock", "web.sock"]


def test_what_a_driver_has_negotiated_is_changed_where_it_is_not_connected_or_may_be_interrupted(
    tmp_path: Path,
) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        running.ready()
        assert order(running, "guest", "set", "web,queues=2") == (0, "guest web: queues\n")
        with Frontend.connect(str(tmp_path / "web.sock")) as frontend:
            frontend.negotiate()
            status, said = order(running, "guest", "set", "web,queues=4")
            assert status == 2
            assert "guest web: queues: its driver has negotiated by what it was told; end its frontend before" in said
            assert len(running.port("web").queues) == 2
            assert order(running, "guest", "set", "web,queues=4", "--interrupt") == (0, "guest web: queues\n")
            assert frontend.is_disconnected()
        assert len(running.port("web").queues) == 4


# ---- apply, show ----


def test_a_file_is_applied_and_tried_before_and_what_is_shown_is_a_file_again(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file):
        new = tmp_path / "new.toml"
        new.write_text(f"spin_us = 7\nmetrics = '127.0.0.1:0'\n{table(tmp_path, 'db', 'mtu = 9000')}")
        steps = "bridge: spin_us, metrics\nguest db: added\nguest web: removed\n"
        assert order(running, "apply", str(new), "--dry-run") == (0, steps)
        assert guests_of(running) == ["web"]
        assert order(running, "apply", str(new)) == (0, steps)
        assert guests_of(running) == ["db"]
        assert running.get("/healthz")[0] == 200
        shown = tmp_path / "shown.toml"
        shown.write_text(xdpnet("show", "--control", running.control).stdout)
        assert Origin(str(shown)).read().guests == Origin(str(new)).read().guests
        assert order(running, "apply", str(shown)) == (0, "nothing to change\n")
        assert xdpnet("run", "--check", "--config", str(shown)).returncode == 0
        # The file that it was started with is the truth again when it is read again.
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: "SIGHUP: guest db: removed" in running.log, "read again")
        assert guests_of(running) == ["web"]
        assert xdpnet("show", "--control", running.control).stdout == file.read_text().lstrip().replace("[[", "\n[[")


def test_a_file_with_three_faults_leaves_all_as_it_was_and_names_all_three(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file):
        before = ask(running.control, "show")
        new = tmp_path / "new.toml"
        new.write_text(f"workrs = 1\n{CONFIG.format(directory=tmp_path)}queues = 17\n{table(tmp_path, 'db')}mtu = 1\n")
        # Of a file, and of a machine.
        for faults in (
            [
                "1: workrs = 1: unknown",
                '7: guest "web": queues = 17: must be 1..16',
                '11: guest "db": mtu = 1: must be',
            ],
            ["1: cpus: CPU 4095 not", '7: guest web: user = "no-such-user": there is', "10: guest db: socket /no/such"],
        ):
            for words in ("apply",), ("apply", "--dry-run"):
                status, said = order(running, *words, str(new))
                assert status == 2
                lines = said.splitlines()
                assert len(lines) == 3
                assert [fault for fault in faults if f"xdpnet: {new}:{fault}" not in said] == []
            assert ask(running.control, "show") == before
            assert sockets(tmp_path) == ["control.sock", "web.sock"]
            right = CONFIG.format(directory=tmp_path)
            new.write_text(f"cpus = '4095'\n{right}user = 'no-such-user'\n{table(Path('/no/such'), 'db')}")
        checked = xdpnet("check", "--config", str(new))
        assert (checked.returncode, len(checked.stderr.splitlines())) == (2, 2)
        assert xdpnet("check", "--config", str(file)).returncode == 0


def test_a_hundred_guests_come_and_go_by_one_file(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file):
        before = descriptors_of(running)
        names = [f"g{number}" for number in range(100)]
        new = tmp_path / "new.toml"
        new.write_text(file.read_text() + "".join(table(tmp_path, name) for name in names))
        status, said = order(running, "apply", str(new))
        assert (status, said.splitlines()) == (0, [f"guest {name}: added" for name in names])
        assert guests_of(running) == ["web", *names]
        with RemoteGuest(tmp_path / "g99.sock") as last:
            last.start()
        assert order(running, "apply", str(file))[0] == 0
        assert (guests_of(running), sockets(tmp_path)) == (["web"], ["control.sock", "web.sock"])
        running.until(lambda: descriptors_of(running) == before, "nothing left open")


def test_where_descriptors_may_run_out_by_a_guest_that_comes_that_is_said(tmp_path: Path) -> None:
    enough = descriptors.needed(parse({"guest": [{"name": "web", "socket": "/run/web.sock"}]}))
    words = "--guest", guest(tmp_path)
    with daemon(tmp_path, *words, prefix=("prlimit", f"--nofile={enough}")) as running:
        running.ready()
        assert "descriptors may be open" not in running.log
        assert order(running, "guest", "add", guest(tmp_path, "db"))[0] == 0
        assert f"at most {enough} descriptors may be open" in running.log


def test_a_path_or_address_that_is_in_use_is_named_with_its_line_and_nothing_is_done(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, file), socket.socket(socket.AF_UNIX) as taken, socket.socket() as port:
        taken.bind(str(tmp_path / "taken.sock"))
        taken.listen()
        port.bind(("127.0.0.1", 0))
        port.listen()
        before = ask(running.control, "show")
        new = tmp_path / "new.toml"
        right = file.read_text()
        new.write_text(right + table(tmp_path, "db") + table(tmp_path, "taken"))
        status, said = order(running, "apply", str(new))
        assert (status, said.startswith(f"xdpnet: {new}:11: guest taken: socket ")) == (2, True), said
        address = f"127.0.0.1:{port.getsockname()[1]}"
        new.write_text(f'spin_us = 1\nmetrics = "{address}"\n' + right + table(tmp_path, "db"))
        status, said = order(running, "apply", str(new))
        assert (status, f"bridge: spin_us, metrics: metrics {address}: " in said) == (1, True), said
        assert said.endswith("xdpnet: all is as it was\n")
        assert ask(running.control, "show") == before
        assert guests_of(running) == ["web"]


def test_what_takes_a_new_start_is_said_with_the_remedy_and_nothing_is_done(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, _):
        new = tmp_path / "new.toml"
        new.write_text(f"workers = 2\nmax_macs = 1\n{CONFIG.format(directory=tmp_path)}{table(tmp_path, 'db')}")
        status, said = order(running, "apply", str(new))
        assert status == 2
        assert [line.split(": ")[2] for line in said.splitlines()] == ["workers", "max_macs"]
        assert said.count("systemctl reload xdpnet (SIGHUP)") == 2
        assert guests_of(running) == ["web"]


# ---- a step that fails is undone with all before it ----


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Whoever holds a directory's lock keeps the daemon from binding there, which no look beforehand can tell."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def test_a_step_that_fails_is_undone_with_all_before_it(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, _):
        left = descriptors_of(running)
        before = ask(running.control, "show")
        with RemoteGuest(tmp_path / "web.sock") as web:
            web.start()
            locked = tmp_path / "locked"
            locked.mkdir()
            with lock(locked):
                new = tmp_path / "new.toml"
                head = "spin_us = 1\nmetrics = '127.0.0.1:0'\n" + CONFIG.format(directory=tmp_path)
                new.write_text(f"{head}mac = '52:54:00:00:00:09'\n{table(tmp_path, 'db')}{table(locked, 'last')}")
                status, said = order(running, "apply", str(new))
            assert status == 1
            assert f"guest last: added: socket {locked}/last.sock: directory {locked} is locked" in said
            assert said.splitlines()[-1] == "xdpnet: all is as it was"
            assert ask(running.control, "show") == before
            assert guests_of(running) == ["web"]
            assert sockets(tmp_path) == ["control.sock", "web.sock"]
            assert running.port("web").given == 0
            found = running.port("web").guest
            assert found
            assert (found.connects, found.connected) == (1, True)
        running.until(lambda: descriptors_of(running) == left, "nothing left open")


def remove_at_the_compiler(running: Daemon, ifname: str) -> None:
    """While its program is being compiled: the whole state was looked at and found to be right."""
    task = Path(f"/proc/{running.process.pid}/task")
    running.until(lambda: any((each / "children").read_text() for each in task.iterdir()), "compiler")
    remove(ifname)


@needs_root
@pytest.mark.net
def test_an_interface_that_vanishes_as_it_is_changed_is_gone_and_that_is_said(tmp_path: Path) -> None:
    with veth() as pair:
        words = "--guest", guest(tmp_path), "--netdev", pair.ifname
        with daemon(tmp_path, *words) as running:
            running.ready()
            asked = subprocess.Popen(
                [*XDPNET, "netdev", "set", f"{pair.ifname},zerocopy=off", "--control", running.control],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            remove_at_the_compiler(running, pair.ifname)
            said, _ = asked.communicate(timeout=2 * PATIENCE_S)
            assert asked.returncode == 1, said
            assert said.endswith(f"not undone: netdev {pair.ifname} is gone\n")
            assert "[[netdev]]" not in ask(running.control, "show")
            assert guests_of(running) == ["web"]
            status, said = order(running, "netdev", "remove", pair.ifname)
            assert (status, "there is none; there are: none" in said) == (2, True), said
            assert running.end() == 0


@needs_root
@pytest.mark.net
def test_an_interface_that_vanishes_as_it_is_added_undoes_the_guest_beside_it(tmp_path: Path) -> None:
    with configured(tmp_path) as (running, _), veth() as pair:
        new = tmp_path / "new.toml"
        more = f"[[netdev]]\ninterface = '{pair.ifname}'\n"
        new.write_text(f"spin_us = 1\n{CONFIG.format(directory=tmp_path)}{more}{table(tmp_path, 'db')}")
        before = ask(running.control, "show")
        asked = subprocess.Popen(
            [*XDPNET, "apply", str(new), "--control", running.control],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        remove_at_the_compiler(running, pair.ifname)
        said, _ = asked.communicate(timeout=2 * PATIENCE_S)
        assert asked.returncode == 1, said
        assert f"netdev {pair.ifname}: added: interface {pair.ifname}: there is none of this name" in said
        assert ask(running.control, "show") == before
        assert guests_of(running) == ["web"]


@needs_root
@pytest.mark.net
def test_an_interface_that_was_changed_is_again_what_it_was_when_a_later_step_fails(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    with veth() as pair:
        words = "--guest", guest(tmp_path), "--netdev", f"{pair.ifname},mode=generic"
        with daemon(tmp_path, *words) as running, lock(locked):
            before = ask(running.ready().control, "show")
            new = tmp_path / "new.toml"
            netdev = f"[[netdev]]\ninterface = '{pair.ifname}'\nmode = 'native'\n"
            new.write_text(table(tmp_path, "web") + netdev + table(locked, "last"))
            status, said = order(running, "apply", str(new))
            assert (status, said.splitlines()[-1]) == (1, "xdpnet: all is as it was"), said
            assert ask(running.control, "show") == before
            found = running.port(pair.ifname).netdev
            assert found
            assert (found.mode, found.alive) == ("generic", True)


# ---- the others ----


class Busy:
    """Two guests of whom one sends numbered frames, without end, and the other counts what arrives."""

    def __init__(self, directory: Path) -> None:
        self.a = RemoteGuest(directory / "a.sock").start()
        self.b = RemoteGuest(directory / "b.sock").start()
        self.sent = 0
        self.missing = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.b.pair.fill()
        while not self._end.is_set():
            mark = b"%08d" % self.sent
            self.a.pair.send(frame(mac(2), mac(1), mark=mark))
            self.sent += 1
            self.a.pair.tx.sleep(time.monotonic() + PATIENCE_S)
            self.a.pair.reap()
            if not self._arrives(frame(mac(2), mac(1), mark=mark)):
                self.missing += 1
                return

    def _arrives(self, wanted: bytes) -> bool:
        """Others may send to all."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.b.pair.rx.sleep(deadline)
            got = [packet.frame for packet in self.b.pair.packets()]
            self.b.pair.fill()
            if wanted in got:
                return True
        return False

    def end(self) -> None:
        self._end.set()
        self._thread.join()
        self.a.close()
        self.b.close()


@contextmanager
def busy(directory: Path) -> Iterator[Busy]:
    made = Busy(directory)
    try:
        yield made
    finally:
        made.end()


def neighbours(directory: Path) -> list[str]:
    macs = {"a": mac(1), "b": mac(2)}
    return [word for name, own in macs.items() for word in ("--guest", guest(directory, name, f",mac={own.hex(':')}"))]


def never_backwards(running: Daemon, names: str) -> Callable[[], None]:
    """Each time it is called, no counter of these guests, nor of the totals, is less than before."""
    before: dict[str, int] = {}

    def look() -> None:
        snapshot = running.snapshot()
        now = {f"totals {key}": getattr(snapshot.totals, key) for key in ("frames_in", "frames_out", "copies", "drops")}
        for port in snapshot.ports:
            if port.name in names:
                for way in "rx", "tx":
                    traffic = getattr(port.queues[0], way)
                    now |= {f"{port.name} {way} {key}": getattr(traffic, key) for key in ("packets", "bytes", "bursts")}
        assert [key for key, value in before.items() if now[key] < value] == []
        before.update(now)

    return look


def test_guests_come_and_go_beside_a_busy_neighbour_whose_frames_all_arrive(tmp_path: Path) -> None:
    with daemon(tmp_path, *neighbours(tmp_path), "--metrics", "127.0.0.1:0") as running:
        running.ready()
        look = never_backwards(running, "ab")
        with busy(tmp_path) as pair:
            for turn in range(ROUNDS):
                table = {"name": "c", "socket": f"{tmp_path}/c.sock", "mac": mac(3).hex(":")}
                ask(running.control, "change", kind="guest", action="add", table=table)
                with RemoteGuest(tmp_path / "c.sock") as third:
                    third.start()
                    third.pair.send(frame(b"\xff" * 6, mac(3)))
                    assert third.pair.wait_sent()
                    look()
                    if not turn:
                        assert 'port="c"' in running.get("/metrics")[1]
                    ask(
                        running.control,
                        "change",
                        kind="guest",
                        action="set",
                        table={"name": "c", "mac": mac(4).hex(":")},
                    )
                    ask(running.control, "change", kind="guest", action="remove", table={"name": "c"})
                look()
            assert 'port="c"' not in running.get("/metrics")[1]
            assert 'port="a"' in running.get("/metrics")[1]
            count = pair.sent
            running.until(lambda: pair.sent > count or pair.missing, "still busy")
        assert pair.missing == 0
        assert running.snapshot().totals.rest == 0
        assert running.end() == 0


@needs_root
@pytest.mark.net
@pytest.mark.timeout(180 + 20 * ROUNDS)  # each time the program is compiled
def test_an_interface_comes_and_goes_beside_a_busy_neighbour_and_carries_frames(tmp_path: Path) -> None:
    with daemon(tmp_path, *neighbours(tmp_path)) as running, veth() as link, link.wire() as wire:
        running.ready()
        before = descriptors_of(running)
        look = never_backwards(running, "ab")
        with busy(tmp_path) as pair:
            for turn in range(ROUNDS):
                mode = ("native", "generic")[turn % 2]
                assert order(running, "netdev", "add", f"{link.ifname},mode={mode}")[0] == 0
                assert running.port(link.ifname).netdev
                wire.send(frame(mac(1), mac(9)))
                running.until(lambda: running.port(link.ifname).queues[0].rx.packets, "a frame from the wire")
                look()
                if turn < 2:
                    assert order(running, "netdev", "set", f"{link.ifname},zerocopy=off")[0] == 0
                assert order(running, "netdev", "remove", link.ifname)[0] == 0
                look()
                assert guests_of(running) == ["a", "b"]
        assert pair.missing == 0
        running.until(lambda: require_link(link.ifname).xdp_id == 0, "the host's again")
        running.until(lambda: descriptors_of(running) == before, "nothing left open")
        assert running.end() == 0


# ---- who may ----


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: asks as another user")
def test_an_order_without_right_is_refused_whatever_the_permissions(tmp_path: Path, open_path: Path) -> None:
    with daemon(open_path, "--guest", guest(open_path)) as running:
        running.ready()
        os.chmod(running.control, 0o666)
        request = json.dumps({"command": "change", "kind": "guest", "action": "remove", "table": {"name": "web"}})
        program = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "s.sendall(sys.argv[2].encode() + b'\\n'); print(s.makefile().readline())"
        )
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", program]
        done = subprocess.run([*words, running.control, request], capture_output=True, text=True, check=False)
        assert re.search("user 65534 may not ask|Broken pipe|reset", done.stdout + done.stderr), done
        assert guests_of(running) == ["web"]


def test_a_slow_or_silent_client_harms_nobody_and_what_is_no_order_is_said(tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path)) as running:
        running.ready()
        silent = [socket.socket(socket.AF_UNIX) for _ in range(CLIENTS - 1)]
        for sock in silent:
            sock.connect(running.control)
            sock.send(b'{"command": "apply", "config": {')
        assert order(running, "guest", "add", guest(tmp_path, "db"))[0] == 0
        orders: list[dict[str, Any]] = [
            {}, {"config": 1}, {"config": []}, {"kind": "guest"}, {"kind": "bridge", "action": "add", "table": {}},
            {"kind": "guest", "action": "mend", "table": {}}, {"kind": "guest", "action": "add", "table": {"name": 1}},
        ]  # fmt: skip
        for wrong in orders:
            command = "apply" if "config" in wrong else "change"
            with pytest.raises(ControlError, match="not an order"):
                ask(running.control, command, **wrong)
        for sock in silent:
            sock.close()
        assert guests_of(running) == ["web", "db"]
