"""The daemon as a process on a veth pair, seen from outside: what the host keeps, and what is left when it is gone.

The guest is a frontend of ours (tests/rig/frontend.py); the tests in guest/ do the same with other people's.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.waiting import until_equal
from xdpnet.demo import await_listener, process, topology
from xdpnet.demo.backend import Backend, balanced

pytestmark = [pytest.mark.net, needs.root, needs.program("busybox", "busybox-static")]

MAC = "52:54:00:78:65:01"


@pytest.fixture
def net() -> Iterator[topology.Topology]:
    with topology.topology(queues=2) as made:
        yield made


@pytest.fixture
def daemon(net: topology.Topology, tmp_path: Path) -> Iterator[Backend]:
    backend = Backend(
        net.host, tmp_path, ["--netdev", topology.HOST_IF, "--guest", f"web,socket={tmp_path}/s,mac={MAC}"]
    )
    yield backend
    backend.kill()


def link(where: topology.Namespace, interface: str) -> dict[str, object]:
    """All that can be seen of an interface, but for its counters."""
    seen: dict[str, object] = json.loads(where.run("ip", "-j", "-d", "link", "show", "dev", interface))[0]
    seen["maddr"] = where.run("ip", "maddress", "show", "dev", interface)
    seen["features"] = where.run("ethtool", "-k", interface)
    seen["channels"] = where.run("ethtool", "-l", interface)
    seen["sockets"] = where.run("cat", "/proc/net/packet").count("\n")
    return seen


def serve(tmp_path: Path, daemon: Backend) -> Frontend:
    frontend = Frontend.connect(str(tmp_path / "s"))
    frontend.negotiate()
    return frontend


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_ends_the_daemon_the_interface_is_as_it_was(
    net: topology.Topology, daemon: Backend, tmp_path: Path, number: signal.Signals
) -> None:
    before = [link(where, name) for where, name in ends(net)]
    daemon.start()
    assert "xdp" in link(net.host, topology.HOST_IF)
    with RingMemory() as memory, serve(tmp_path, daemon) as frontend:
        frontend.set_memory(memory)
        frontend.start_ring(0, memory)
        frontend.start_ring(1, memory)
        os.kill(daemon.pid, number)
        status = daemon.wait()
        assert frontend.is_disconnected()
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    until_equal(lambda: [link(where, name) for where, name in ends(net)], before)
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("s")) + list(tmp_path.glob("*.control"))


def ends(net: topology.Topology) -> list[tuple[topology.Namespace, str]]:
    return [(net.host, topology.HOST_IF), (net.far, topology.FAR_IF)]


def test_the_host_goes_on_using_the_interface_while_guests_are_served(
    net: topology.Topology, daemon: Backend, tmp_path: Path
) -> None:
    daemon.start()
    for where, address in ((net.host, topology.FAR_ADDRESS), (net.far, topology.HOST_ADDRESS)):
        said = where.run("busybox", "ping", "-c", "20", "-i", "0.05", address)
        assert " 0% packet loss" in said, said
    server = net.far.spawn(["busybox", "nc", "-l", "-p", "9000", "-e", "busybox", "cat"], tmp_path / "nc.log")
    try:
        await_listener(net.far, 9000)
        sent = "x" * 300_000
        (tmp_path / "payload").write_text(sent)
        script = f"busybox nc {topology.FAR_ADDRESS} 9000 <{tmp_path}/payload"
        assert net.host.run("sh", "-c", script) == sent
    finally:
        process.end(server)
    port = daemon.port(topology.HOST_IF)
    assert port.netdev is not None
    assert port.netdev.verdicts["host"] >= 40
    assert all(queue.rx.packets == 0 for queue in port.queues if queue.number), "unicast to the host never comes to us"
    assert balanced(daemon.settled())


def test_frontends_that_come_and_go_leave_no_descriptor_and_no_thread_behind(daemon: Backend, tmp_path: Path) -> None:
    daemon.start()

    def held() -> tuple[int, int, int]:
        maps = Path(f"/proc/{daemon.pid}/maps").read_text().count("memfd:guest")
        return len(os.listdir(f"/proc/{daemon.pid}/fd")), len(os.listdir(f"/proc/{daemon.pid}/task")), maps

    def visit() -> None:
        with RingMemory() as memory, serve(tmp_path, daemon) as frontend:
            frontend.set_memory(memory)
            frontend.start_ring(0, memory)
            frontend.start_ring(1, memory)
            assert held()[2] > 0
        until_equal(lambda: daemon.port("web").guest.connected, False)  # type: ignore[union-attr]

    visit()
    before = held()
    for _ in range(20):
        visit()
    # No more than before: then, the connection that asked for the daemon's state may still have been open.
    until_equal(lambda: [now > then for now, then in zip(held(), before, strict=True)], [False] * 3)
    assert before[2] == 0


def test_daemons_start_and_end_on_the_same_interface_again_and_again(net: topology.Topology, daemon: Backend) -> None:
    for _ in range(5):
        daemon.start()
        assert daemon.stop() == 0
    for _ in range(3):
        daemon.start()
        daemon.kill()
    daemon.start()
    assert daemon.stop() == 0


def test_an_interface_that_is_deleted_under_the_daemon_does_not_end_it(
    net: topology.Topology, daemon: Backend, tmp_path: Path
) -> None:
    daemon.start()
    net.host.run("ip", "link", "delete", topology.HOST_IF)
    until_equal(lambda: daemon.port(topology.HOST_IF).netdev.alive, False)  # type: ignore[union-attr]
    with serve(tmp_path, daemon) as frontend:
        assert frontend.tell(3) in (0, 1)  # SET_OWNER: it still answers
    assert daemon.stop() == 0
