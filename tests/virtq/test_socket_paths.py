"""Where a guest's socket may be, who is served on it, and how the two sides find each other again."""

import logging
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.rig import needs
from tests.rig.backend import Backend, MakeBackend
from tests.rig.clock import Clock
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.waiting import PATIENCE_S, eventually, until_equal
from xdpnet import sockets
from xdpnet.errors import SetupError, SocketPathError
from xdpnet.ration import LINES_A_KIND, RationedLog
from xdpnet.sockets import Access
from xdpnet.virtq import server, standing
from xdpnet.virtq.message import Request
from xdpnet.virtq.server import GuestSocket

pytestmark = pytest.mark.core
NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "guest.sock")


def stale_socket(path: str) -> None:
    """A socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def serves(path: str) -> bool:
    with Frontend.connect(path) as frontend:
        return frontend.ask_u64(Request.GET_FEATURES) != 0


def gone(guest: GuestSocket) -> bool:
    return eventually(lambda: not guest.connected)


# ---- whose path it is ----


def test_a_free_path_becomes_a_socket_for_owner_and_group(backend: Backend, path: str) -> None:
    backend.open(path)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o660
    assert serves(path)


def test_our_own_stale_socket_is_replaced(backend: Backend, path: str) -> None:
    stale_socket(path)
    backend.open(path)
    assert serves(path)


def refused(backend: Backend, path: str, text: str) -> bool:
    before = os.lstat(path) if os.path.lexists(path) else None
    with pytest.raises(SocketPathError, match=text) as caught:
        backend.open(path)
    assert path in str(caught.value)
    after = os.lstat(path) if os.path.lexists(path) else None
    return (before and (before.st_ino, before.st_mode)) == (after and (after.st_ino, after.st_mode))


def test_a_path_that_another_listens_on_is_refused(backend: Backend, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        assert refused(backend, path, "listens")


def test_a_second_daemon_is_refused_and_the_first_serves_on(make_backend: MakeBackend, path: str) -> None:
    make_backend().open(path)
    assert refused(make_backend(), path, "listens")
    assert serves(path)


def test_a_full_backlog_is_not_taken_for_a_stale_socket(backend: Backend, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(path)
        other.listen(0)
        waiting.connect(path)
        assert refused(backend, path, "listens")


def test_a_datagram_socket_is_refused(backend: Backend, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        assert refused(backend, path, "listens")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a socket of another user")
def test_a_stale_socket_of_another_user_is_refused(backend: Backend, path: str) -> None:
    stale_socket(path)
    os.chown(path, NOBODY, NOBODY)
    assert refused(backend, path, "belongs to user")


def test_a_file_is_refused_and_left_alone(backend: Backend, path: str) -> None:
    with open(path, "w") as file:
        file.write("precious")
    assert refused(backend, path, "not a socket")
    with open(path) as file:
        assert file.read() == "precious"


def test_a_directory_is_refused(backend: Backend, path: str) -> None:
    os.mkdir(path)
    assert refused(backend, path, "not a socket")


@pytest.mark.parametrize("target", ["guest.real", "nowhere"])
def test_a_symbolic_link_is_refused_whatever_it_points_to(
    backend: Backend, path: str, tmp_path: Path, target: str
) -> None:
    stale_socket(str(tmp_path / "guest.real"))
    os.symlink(target, path)
    assert refused(backend, path, "symbolic link")
    assert os.path.lexists(tmp_path / "guest.real")


def test_a_missing_directory_is_refused_with_the_remedy(backend: Backend, tmp_path: Path) -> None:
    assert refused(backend, str(tmp_path / "nowhere" / "guest.sock"), "create the directory")


def of_length(tmp_path: Path, length: int) -> str:
    return str(tmp_path / "s").ljust(length, "s")


def test_a_path_of_107_bytes_is_legal_and_one_of_108_is_refused(backend: Backend, tmp_path: Path) -> None:
    backend.open(of_length(tmp_path, sockets.PATH_MAX))
    with pytest.raises(SocketPathError, match="107"):
        backend.open(of_length(tmp_path, sockets.PATH_MAX + 1))
    with pytest.raises(SocketPathError, match="107"):
        backend.open(of_length(tmp_path, sockets.PATH_MAX + 1), client=True)


def test_the_path_is_given_back_at_the_end(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    backend.control.run(guest.stop())
    assert not os.path.lexists(path)


def test_a_path_that_somebody_else_has_taken_meanwhile_is_left_to_them(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    os.unlink(path)
    stale_socket(path)
    backend.control.run(guest.stop())
    assert os.path.lexists(path)


def test_nothing_but_the_socket_is_ever_in_the_directory(backend: Backend, path: str, tmp_path: Path) -> None:
    backend.open(path)
    assert os.listdir(tmp_path) == ["guest.sock"]


# ---- one frontend at a time ----


def test_a_second_frontend_is_turned_away_and_the_first_not_disturbed(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    with Frontend.connect(path) as first, RingMemory() as memory:
        first.negotiate()
        assert first.set_memory(memory) == 0
        first.start_ring(0, memory)
        for count in range(1, 4):
            with Frontend.connect(path) as second:
                assert second.is_disconnected()
            assert guest.counters.refused["busy"] == count
        assert first.ask_u64(Request.GET_FEATURES)
        assert backend.started(0)
        assert guest.counters.connects == 1


def test_the_port_listens_again_when_its_frontend_has_gone(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    for count in range(1, 21):
        assert serves(path)
        assert gone(guest)
        assert guest.counters.connects == guest.counters.disconnects == count
    assert guest.counters.refused["busy"] == 0


def test_a_frontend_that_comes_and_goes_without_end_leaves_a_few_lines_and_a_count(
    backend: Backend, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend.device.log = RationedLog(logging.getLogger("xdpnet"), "guest", Clock())
    with caplog.at_level(logging.INFO):
        guest = backend.open(path)
        for count in range(1, 101):
            with Frontend.connect(path) as frontend:
                frontend.send_bytes(bytes(12))  # refused, with a line of its own
                assert frontend.is_disconnected()
            until_equal(lambda: guest.counters.disconnects, count)
        assert backend.control.call(guest.standing.state).words == "refused: version 0, expected 1"
    assert len(caplog.messages) == LINES_A_KIND
    assert caplog.messages[0] == "guest: the frontend is disconnected: version 0, expected 1"


def test_a_frontend_that_stays_is_said_with_who_it_is_and_so_is_its_end(
    backend: Backend, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    guest = backend.open(path)
    with Frontend.connect(path) as frontend:
        assert frontend.ask_u64(Request.GET_FEATURES)
        until_equal(lambda: len(caplog.messages), 1)
        assert backend.control.call(guest.standing.state).kind == "no_driver"
    until_equal(lambda: len(caplog.messages), 2)
    who = f"process {os.getpid()}, user {os.geteuid()}, group {os.getegid()}"
    assert caplog.messages == [
        f"guest: waiting for a driver (its frontend: {who})",
        "guest: waiting for a frontend",
    ]


def test_a_thousand_connections_without_a_word_are_not_said(
    backend: Backend, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    guest = backend.open(path)
    for count in range(1, 1001):
        Frontend.connect(path).close()
        until_equal(lambda: guest.counters.disconnects, count)
    assert caplog.messages == []


WANTS_MORE = "asks for more than the 1 queue pair that it has"


def ask_and_leave(frontend: Frontend) -> None:
    """As QEMU whose card has more queues than there are."""
    with frontend:
        frontend.negotiate()
        frontend.ask_u64(Request.GET_QUEUE_NUM)


@pytest.mark.parametrize("client", [False, True], ids=["we listen", "it listens"])
def test_a_frontend_that_wants_more_queues_is_told_of_once(
    backend: Backend, path: str, caplog: pytest.LogCaptureFixture, client: bool
) -> None:
    guest = backend.open(path, client=client)
    meet = Frontend.accept if client else Frontend.connect
    for count in range(1, 5):
        ask_and_leave(meet(path))
        until_equal(lambda: guest.counters.disconnects, count)
        until_equal(lambda: caplog.text.count(WANTS_MORE), int(count > 1))
    # One that stays is as welcome as ever.
    with meet(path) as frontend, RingMemory() as memory:
        frontend.negotiate()
        frontend.ask_u64(Request.GET_QUEUE_NUM)
        assert frontend.set_memory(memory) == 0
    assert eventually(lambda: guest.counters.disconnects == 5)
    assert guest.standing.held_s() == 0
    ask_and_leave(meet(path))
    assert eventually(lambda: guest.counters.disconnects == 6)
    assert guest.standing.held_s() == 0
    assert caplog.text.count(WANTS_MORE) == 1


def test_a_frontend_that_wants_more_queues_is_held_off_for_longer_and_longer(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(standing, "time", SimpleNamespace(monotonic=clock))
    guest = backend.open(path)
    held = []
    for count in range(1, 8):
        clock.now += guest.standing.held_s()
        ask_and_leave(Frontend.connect(path))
        until_equal(lambda: guest.counters.disconnects, count)
        held.append(guest.standing.held_s())
    assert held == pytest.approx([0, 0.2, 0.4, 0.8, 1, 1, 1])
    with Frontend.connect(path) as frontend:
        backend.settle()
        assert guest.counters.connects == 7  # it waits in the kernel
        clock.now += 1
        assert frontend.ask_u64(Request.GET_FEATURES)


def test_a_frontend_that_comes_back_before_we_saw_it_go_is_served(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    first = Frontend.connect(path)
    assert first.ask_u64(Request.GET_FEATURES)
    # The control thread sees both in one turn, the newcomer first.
    both = threading.Event()
    backend.control.loop.call_soon_threadsafe(both.wait, PATIENCE_S)
    with Frontend.connect(path) as second:
        first.close()
        both.set()
        assert second.ask_u64(Request.GET_FEATURES)
    assert guest.counters.refused["busy"] == 0


def test_a_frontend_that_breaks_the_protocol_makes_room_for_the_next(backend: Backend, path: str) -> None:
    backend.open(path)
    with Frontend.connect(path) as broken:
        broken.send_bytes(bytes(12))
        assert broken.is_disconnected()
    assert serves(path)


def test_stopping_ends_the_connection(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    with Frontend.connect(path) as frontend:
        frontend.ask_u64(Request.GET_FEATURES)
        backend.control.run(guest.stop())
        assert frontend.is_disconnected()
    assert not guest.connected


def test_a_stopped_socket_can_be_started_again(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    backend.control.run(guest.stop())
    backend.control.run(guest.start())
    assert serves(path)


def test_a_disconnected_frontend_may_come_back(backend: Backend, path: str) -> None:
    guest = backend.open(path)
    with Frontend.connect(path) as frontend:
        frontend.ask_u64(Request.GET_FEATURES)
        backend.control.call(guest.disconnect)
        assert frontend.is_disconnected()
    assert serves(path)


def test_when_no_descriptor_is_left_to_accept_with_we_pause_and_go_on(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ACCEPT_PAUSE_S", 0.05)
    guest = backend.open(path)
    with Frontend(socket.socket(socket.AF_UNIX)) as frontend:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            frontend.socket.connect(path)
            failed = eventually(lambda: guest.counters.refused["resources"] >= 2)
            backend.settle()
            tries = guest.counters.refused["resources"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert failed
        assert tries < 10
        assert frontend.ask_u64(Request.GET_FEATURES)


# ---- who may have it ----


ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    if sys.argv[2] == "listen":
        sock.bind(sys.argv[1])
        sock.listen()
        sock.settimeout(10)
        sock, _ = sock.accept()
    else:
        sock.connect(sys.argv[1])
    try:
        sock.sendall(bytes.fromhex("01000000" "01000000" "00000000"))
        print(len(sock.recv(100)))
    except ConnectionError:
        print(0)
"""


@pytest.fixture
def common() -> Iterator[str]:
    """A path in a directory that everybody may use."""
    with tempfile.TemporaryDirectory(prefix=f"xdpn{os.getpid()}-") as directory:
        os.chmod(directory, 0o777)
        yield f"{directory}/guest.sock"


def ask_as_nobody(path: str, how: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", ASK, path, how]
    return subprocess.run(words, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, timeout=20)


def nobody(path: str, how: str = "connect") -> int:
    """How many bytes of an answer another user gets, as a frontend that asks for the features."""
    done = ask_as_nobody(path, how)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@needs.root
def test_a_guests_user_and_root_are_served_and_nobody_else(backend: Backend, common: str) -> None:
    for user, served in ((NOBODY, True), (NOBODY - 1, False)):
        guest = backend.open(common, access=Access(uid=user, mode=0o666))
        assert (nobody(common) > 0) is served
        assert guest.counters.refused["peer"] == (0 if served else 1)
        assert gone(guest)
        assert serves(common)
        backend.control.run(guest.stop())


@needs.root
def test_a_socket_of_another_user_cannot_be_connected_to(backend: Backend, common: str) -> None:
    backend.open(common, access=Access(uid=NOBODY - 1, mode=0o600))
    assert "Permission denied" in ask_as_nobody(common, "connect").stderr


@needs.root
def test_a_stranger_does_not_disturb_the_frontend_that_is_served(
    backend: Backend, common: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.0)
    guest = backend.open(common, access=Access(uid=NOBODY - 1, mode=0o666))
    with Frontend.connect(common) as first:
        assert first.ask_u64(Request.GET_FEATURES)
        assert nobody(common) == 0
        assert first.ask_u64(Request.GET_FEATURES)
    assert guest.counters.connects == 1


@needs.root
def test_a_client_serves_the_guests_user_and_nobody_else_who_listens(backend: Backend, common: str) -> None:
    for user, served in ((NOBODY, True), (NOBODY - 1, False)):
        guest = backend.open(common, client=True, access=Access(uid=user))
        assert (nobody(common, "listen") > 0) is served
        assert bool(guest.counters.refused["peer"]) is not served
        backend.control.run(guest.stop())
        os.unlink(common)


@needs.root
def test_an_inherited_connection_is_the_guests_users_or_is_refused(backend: Backend, common: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(common)
        listener.listen()
        os.chmod(common, 0o666)
        for user, served in ((NOBODY, True), (NOBODY - 1, False)):
            words = [sys.executable, "-c", ASK, common, "connect"]
            with subprocess.Popen(words, user=NOBODY, stdout=subprocess.PIPE) as asking:
                accepted = listener.accept()[0].detach()
                if served:
                    backend.open(None, fd=accepted, access=Access(uid=user))
                else:
                    with pytest.raises(SetupError, match=f"the other end is not of user {user}, nor of root"):
                        backend.open(None, fd=accepted, access=Access(uid=user))
                assert (int(asking.communicate()[0]) > 0) is served


def test_a_frontend_that_never_hands_over_memory_makes_room_for_another(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = backend.open(path)
    monkeypatch.setattr(server, "HANDSHAKE_S", 3600.0)
    with Frontend.connect(path) as first:
        assert first.ask_u64(Request.GET_FEATURES)
        with Frontend.connect(path) as second:
            assert second.is_disconnected()
        assert first.ask_u64(Request.GET_FEATURES)
    assert gone(guest)
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.0)
    with Frontend.connect(path) as first:
        assert first.ask_u64(Request.GET_FEATURES)
        with Frontend.connect(path) as second:
            assert second.ask_u64(Request.GET_FEATURES)
            assert first.is_disconnected()
    assert (guest.counters.refused["busy"], guest.counters.errors["timeout"]) == (1, 1)


def test_a_frontend_that_handed_over_memory_makes_room_for_nobody(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.0)
    backend.open(path)
    with Frontend.connect(path) as first, RingMemory() as memory:
        first.negotiate()
        assert first.set_memory(memory) == 0
        with Frontend.connect(path) as second:
            assert second.is_disconnected()
        assert first.ask_u64(Request.GET_FEATURES)


def test_a_frontend_that_waits_for_its_guest_is_left_in_peace_while_nobody_else_comes(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.0)
    backend.open(path)
    with Frontend.connect(path) as waiting:
        for _ in range(3):
            assert waiting.ask_u64(Request.GET_FEATURES)
            backend.settle()


# ---- the frontend listens ----


def test_a_client_waits_for_its_frontend_and_serves_it(backend: Backend, path: str) -> None:
    guest = backend.open(path, client=True)
    backend.settle()
    assert not guest.connected
    with Frontend.accept(path) as frontend:
        assert frontend.ask_u64(Request.GET_FEATURES)
        assert guest.connected


def test_a_client_comes_back_to_the_frontend_again_and_again(backend: Backend, path: str) -> None:
    guest = backend.open(path, client=True)
    for count in range(1, 4):
        with Frontend.accept(path) as frontend:
            assert frontend.ask_u64(Request.GET_FEATURES)
        assert gone(guest)
        assert guest.counters.disconnects == count


def test_a_client_leaves_whatever_is_at_its_path_alone(backend: Backend, path: str) -> None:
    stale_socket(path)
    guest = backend.open(path, client=True)
    backend.settle()
    backend.control.run(guest.stop())
    assert os.path.lexists(path)


def test_a_client_is_back_within_a_second_by_its_own_numbers() -> None:
    assert server.RETRY_MAX_S < 1


# ---- inherited sockets ----


def test_an_inherited_connection_is_served_and_its_end_is_the_end(backend: Backend) -> None:
    frontend, guest = backend.connect()
    assert frontend.ask_u64(Request.GET_FEATURES)
    assert not guest.ended.is_set()
    frontend.close()
    assert eventually(guest.ended.is_set)


def test_an_inherited_listening_socket_is_served_again_and_again(backend: Backend, path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    guest = backend.open(None, fd=listener.detach())
    for _ in range(3):
        assert serves(path)
        assert gone(guest)
    assert not guest.ended.is_set()


@pytest.mark.parametrize("kind", [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)])
def test_an_inherited_socket_of_another_kind_is_refused(
    backend: Backend, kind: tuple[socket.AddressFamily, socket.SocketKind]
) -> None:
    fd = socket.socket(*kind).detach()
    with pytest.raises(SetupError, match="not a UNIX stream socket"):
        backend.open(None, fd=fd)


def test_an_inherited_descriptor_that_is_no_socket_is_refused(backend: Backend) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(SetupError, match=f"descriptor {fd}"):
            backend.open(None, fd=fd)
    finally:
        os.close(fd)


def test_a_guest_has_a_path_or_a_descriptor_and_not_both(backend: Backend, path: str) -> None:
    for wrong in ({"path": None}, {"path": path, "fd": 3}):
        with pytest.raises(ValueError, match="path or a descriptor"):
            GuestSocket(backend.device, **wrong)
