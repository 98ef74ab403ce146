"""The control socket: one question, one answer, and nobody can make the daemon wait."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rig.waiting import PATIENCE_S
from xdpnet import clients
from xdpnet.control.client import ask
from xdpnet.control.server import CLIENTS, DEADLINE_S, REQUEST_BYTES, ControlServer, directory_of
from xdpnet.errors import ControlError, SocketPathError


@asynccontextmanager
async def serving(path: str, **commands: Callable[[], Any]) -> AsyncIterator[str]:
    with directory_of(path):
        server = ControlServer(path, commands or {"stats": lambda: {"answer": 42}})
        await server.start()
        try:
            yield path
        finally:
            await server.stop()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "control.sock")


def test_a_question_is_answered(path: str) -> None:
    async def exchange() -> Any:
        async with serving(path):
            return await asyncio.to_thread(ask, path, "stats")

    assert asyncio.run(exchange()) == {"answer": 42}


def test_an_answer_of_megabytes_arrives_whole(path: str) -> None:
    big = {"text": "x" * (4 << 20)}

    async def exchange() -> Any:
        async with serving(path, stats=lambda: big):
            return await asyncio.to_thread(ask, path, "stats")

    assert asyncio.run(exchange()) == big


def test_the_directory_is_made_for_owner_and_group_the_socket_for_the_owner_and_both_go_at_the_end(path: str) -> None:
    async def modes() -> tuple[int, int]:
        async with serving(path):
            return stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode), stat.S_IMODE(os.stat(path).st_mode)

    umask = os.umask(0)
    try:
        assert asyncio.run(modes()) == (0o750, 0o600)
    finally:
        os.umask(umask)
    assert not os.path.exists(os.path.dirname(path))


def test_a_directory_that_was_there_or_is_in_use_stays(path: str) -> None:
    async def nothing(busy: bool) -> None:
        async with serving(path):
            if busy:
                (Path(path).parent / "guest.sock").touch()

    asyncio.run(nothing(busy=True))
    assert os.listdir(os.path.dirname(path)) == ["guest.sock"]
    asyncio.run(nothing(busy=False))
    assert os.listdir(os.path.dirname(path)) == ["guest.sock"]


def test_a_directory_whose_parent_is_missing_is_named(tmp_path: Path) -> None:
    async def start() -> None:
        async with serving(str(tmp_path / "a" / "b" / "control.sock")):
            pass

    with pytest.raises(SocketPathError, match="a/b: No such file or directory"):
        asyncio.run(start())


def test_without_a_daemon_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"no daemon at .*; start it with xdpnet run"):
        ask(str(tmp_path / "none.sock"), "stats")


@pytest.mark.parametrize(
    "request_",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"7\n",
        b'{"command": "stop"}\n',
        b'{"command": []}\n',
        b'{"command": "stats"\n',
        b"\xff\n",
        b"[" * 3000 + b"\n",
        b"x" * (REQUEST_BYTES + 1) + b"\n",
        b"",
    ],
)
def test_what_is_no_request_gets_an_error_and_the_next_one_an_answer(path: str, request_: bytes) -> None:
    async def exchange() -> tuple[Any, Any]:
        async with serving(path):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(request_)
            writer.write_eof()
            answer = json.loads(await reader.readline())
            writer.close()
            return answer, await asyncio.to_thread(ask, path, "stats")

    answer, afterwards = asyncio.run(exchange())
    assert list(answer) == ["error"]
    assert afterwards == {"answer": 42}


def test_an_error_of_the_daemon_is_raised_with_its_text(path: str) -> None:
    async def exchange() -> None:
        async with serving(path):
            await asyncio.to_thread(ask, path, "nonsense")

    with pytest.raises(ControlError, match=r"not a request; ask .* with stats"):
        asyncio.run(exchange())


def test_a_client_that_asks_nothing_is_cut_off_and_disturbs_nobody(path: str) -> None:
    async def exchange() -> tuple[Any, bytes]:
        async with serving(path):
            reader, writer = await asyncio.open_unix_connection(path)
            answer = await asyncio.to_thread(ask, path, "stats")
            cut_off = await reader.read()
            writer.close()
            return answer, cut_off

    assert asyncio.run(exchange()) == ({"answer": 42}, b"")


def test_a_client_that_takes_a_long_answer_slowly_gets_it_whole(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "BYTES_PER_S", (2 << 20) / PATIENCE_S)

    async def exchange() -> int:
        async with serving(path, stats=lambda: "x" * (2 << 20)):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b'{"command": "stats"}\n')
            taken = 0
            while piece := await reader.read(1 << 16):
                taken += len(piece)
                await asyncio.sleep(1.5 * DEADLINE_S / 32)
            writer.close()
            return taken

    assert asyncio.run(exchange()) == (2 << 20) + 3


def test_a_client_that_never_reads_is_cut_off(path: str) -> None:
    async def exchange() -> bool:
        async with serving(path, stats=lambda: "x" * (8 << 20)):
            with socket.socket(socket.AF_UNIX) as slow:
                slow.connect(path)
                slow.sendall(b'{"command": "stats"}\n')
                slow.setblocking(False)
                while True:  # until the daemon's end is gone: then writing fails
                    try:
                        slow.send(b"x")
                    except (BrokenPipeError, ConnectionResetError):
                        return True
                    except BlockingIOError:
                        pass
                    await asyncio.sleep(0.05)

    assert asyncio.run(exchange())


def test_sixteen_clients_are_served_at_once_and_the_next_when_one_of_them_has_gone(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdpnet.control.server.DEADLINE_S", PATIENCE_S)  # nobody makes room by being cut off

    async def exchange() -> tuple[Any, Any]:
        async with serving(path):
            silent = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS - 1)]
            sixteenth = await asyncio.to_thread(ask, path, "stats")
            silent.append(await asyncio.open_unix_connection(path))
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b'{"command": "stats"}\n')
            silent[0][1].close()
            seventeenth = json.loads(await reader.readline())
            for _, each in [*silent[1:], (reader, writer)]:
                each.close()
            return sixteenth, seventeenth

    assert asyncio.run(exchange()) == ({"answer": 42}, {"answer": 42})


def test_a_command_that_fails_ends_its_connection_and_no_other(path: str) -> None:
    async def exchange() -> Any:
        async with serving(path, stats=lambda: {"answer": 42}, broken=lambda: 1 // 0):
            with pytest.raises(ControlError, match="without an answer"):
                await asyncio.to_thread(ask, path, "broken")
            return await asyncio.to_thread(ask, path, "stats")

    assert asyncio.run(exchange()) == {"answer": 42}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused_even_if_the_permissions_let_him_in(open_path: Path) -> None:
    path = str(open_path / "run" / "control.sock")

    async def exchange() -> Any:
        async with serving(path):
            os.chmod(os.path.dirname(path), 0o755)
            os.chmod(path, 0o666)
            child = await asyncio.create_subprocess_exec(
                "/usr/bin/python3", "-c", STRANGER, path, user=65534, group=65534, stdout=asyncio.subprocess.PIPE
            )
            output, _ = await child.communicate()
            return json.loads(output), await asyncio.to_thread(ask, path, "stats")

    # What it sent has a descriptor in its queue whose close() waits: we do not.
    refusal = {"error": "user 65534 may not ask; run as root or as user 0"}
    assert asyncio.run(exchange()) == (refusal, {"answer": 42})


STRANGER = """
import socket, struct, sys
server = socket.create_server(("127.0.0.1", 0))
slow = socket.create_connection(server.getsockname())
slow.setblocking(False)
slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
try:
    while True:
        slow.send(bytes(65536))
except BlockingIOError:
    pass
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    try:
        socket.send_fds(sock, [b'{"command": "stats"}\\n'], [slow.fileno()])
    except BrokenPipeError:
        pass  # refused already
    print(sock.makefile().readline())
"""
