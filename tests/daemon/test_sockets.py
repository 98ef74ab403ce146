"""Who may take a socket's path: nothing is ever unlinked but our own stale socket."""

import asyncio
import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.rig.needs import root as needs_root
from xdpnet import sockets
from xdpnet.errors import SocketPathError
from xdpnet.sockets import Access, listen_unix


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_a_free_path_is_taken_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen_unix(str(path), Access()) as listening:
        assert stat.S_ISSOCK(path.lstat().st_mode)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            accepted, _ = listening.socket.accept()
            accepted.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_the_permissions_are_exact_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    for umask in (0, 0o777):
        previous = os.umask(umask)
        try:
            with listen_unix(str(tmp_path / "s"), Access(mode=mode)):
                assert stat.S_IMODE((tmp_path / "s").lstat().st_mode) == mode
            now = os.umask(umask)
            assert now == umask
        finally:
            os.umask(previous)


def test_our_own_stale_socket_is_replaced(tmp_path: Path) -> None:
    leave_stale(tmp_path / "s")
    with listen_unix(str(tmp_path / "s"), Access()):
        pass


def test_a_live_socket_is_refused_and_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen_unix(path, Access()) as first:
        with pytest.raises(SocketPathError, match="another process listens on it; stop that process"):
            listen_unix(path, Access())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            first.socket.accept()[0].close()


def test_a_live_socket_with_a_full_backlog_is_alive_too(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path)
        server.listen(0)
        client.connect(path)
        with pytest.raises(SocketPathError, match="another process listens"):
            listen_unix(path, Access())


def test_a_live_datagram_socket_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        with pytest.raises(SocketPathError, match="another process listens"):
            listen_unix(path, Access())
    assert os.path.exists(path)


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link(path: Path) -> None:
    leave_stale(path.with_name("target"))
    path.symlink_to("target")


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_file, "exists and is not a socket"),
        (make_fifo, "exists and is not a socket"),
        (Path.mkdir, "exists and is not a socket"),
        (make_link, "is a symbolic link"),
        (make_dangling, "is a symbolic link"),
    ],
)
def test_what_is_not_our_socket_is_refused_and_stays(tmp_path: Path, make: object, reason: str) -> None:
    path = tmp_path / "s"
    make(path)  # type: ignore[operator]
    before = sorted((entry.name, entry.lstat().st_ino) for entry in tmp_path.iterdir())
    with pytest.raises(SocketPathError, match=reason):
        listen_unix(str(path), Access())
    assert sorted((entry.name, entry.lstat().st_ino) for entry in tmp_path.iterdir()) == before


@needs_root
def test_a_stale_socket_of_another_user_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    leave_stale(path)
    os.chown(path, 65534, 65534)
    with pytest.raises(SocketPathError, match="belongs to user 65534"):
        listen_unix(str(path), Access())
    assert path.exists()


@needs_root
@pytest.mark.parametrize(("access", "owner"), [(Access(65534, 65533, 0o600), (65534, 65533)), (Access(gid=5), (0, 5))])
def test_a_socket_is_given_to_who_may_use_it(tmp_path: Path, access: Access, owner: tuple[int, int]) -> None:
    with listen_unix(str(tmp_path / "s"), access):
        found = (tmp_path / "s").lstat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (*owner, access.mode)


@needs_root
def test_a_socket_that_cannot_be_given_away_is_not_left_behind(open_path: Path) -> None:
    path = open_path / "s"
    open_path.chmod(0o777)
    os.seteuid(65534)
    try:
        with pytest.raises(SocketPathError, match=r"give it to user 0, group -1: .*; run with CAP_CHOWN"):
            listen_unix(str(path), Access(uid=0))
    finally:
        os.seteuid(0)
    assert list(path.parent.iterdir()) == []


@needs_root
def test_a_stale_socket_that_was_given_away_is_replaced(tmp_path: Path) -> None:
    leave_stale(tmp_path / "s")
    os.chown(tmp_path / "s", 65534, 65534)
    with listen_unix(str(tmp_path / "s"), Access(uid=65534)):
        pass


def test_a_path_of_107_bytes_is_taken_and_one_of_108_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listen_unix("s" * 107, Access()):
        assert os.listdir() == ["s" * 107]
    with pytest.raises(SocketPathError, match="108 bytes long, at most 107"):
        listen_unix("s" * 108, Access())
    with pytest.raises(SocketPathError, match="108 bytes long"):
        listen_unix("é" * 54, Access())


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(SocketPathError, match="not a path"):
        listen_unix(path, Access())


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match=r"directory .*/none: No such file or directory; create the directory"):
        listen_unix(str(tmp_path / "none" / "s"), Access())


def test_close_leaves_a_successor_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_unix(str(path), Access())
    path.unlink()
    with listen_unix(str(path), Access()):
        first.close()
        assert path.exists()


def test_close_after_somebody_removed_the_path_is_quiet(tmp_path: Path) -> None:
    first = listen_unix(str(tmp_path / "s"), Access())
    (tmp_path / "s").unlink()
    first.close()


def test_a_directory_that_somebody_keeps_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "LOCK_S", 0.0)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(SocketPathError, match="is locked by another process"):
            listen_unix(str(tmp_path / "s"), Access())
    finally:
        os.close(fd)


def test_of_many_that_race_for_a_stale_path_exactly_one_gets_it(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def race() -> list[object]:
        racers = (asyncio.to_thread(listen_unix, path, Access()) for _ in range(8))
        return list(await asyncio.gather(*racers, return_exceptions=True))

    for _ in range(10):
        leave_stale(tmp_path / "s")
        outcomes = asyncio.run(race())
        winners = [outcome for outcome in outcomes if isinstance(outcome, sockets.ListeningSocket)]
        assert len(winners) == 1
        assert all(isinstance(outcome, sockets.ListeningSocket | SocketPathError) for outcome in outcomes)
        winners[0].close()


def test_a_refusal_leaks_no_descriptor(tmp_path: Path) -> None:
    make_file(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(SocketPathError):
            listen_unix(str(tmp_path / "s"), Access())
    assert len(os.listdir("/proc/self/fd")) == before
