"""User-mode Linux behind the daemon: a frontend that negotiates, signals and starts again in its own way.

    far (iperf3 -s) -- far0 === xdpn0 -- xdpnet -- user-mode Linux

It asks for an answer to the request that negotiates answers, sends a memory table with an empty place, has sockets for
calls, packed rings that begin at 0 by its word, no control queue, and sets rings up anew that it has only disabled.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import needs, uml
from tests.rig.waiting import until
from xdpnet.demo import iperf, process, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card

pytestmark = [
    pytest.mark.net,
    pytest.mark.guest,
    pytest.mark.usefixtures("books_balance"),
    needs.root,
    needs.uml,
    pytest.mark.timeout(300),
]

ADDRESS = topology.GUEST_ADDRESSES[0]


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    guest: uml.UserModeGuest
    initrd: Path
    directory: Path

    def features(self, name: str = "uml") -> set[str]:
        guest = self.backend.port(name).guest
        assert guest is not None
        return set(guest.features)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("xdpn")
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        path = directory / "uml.socket"
        guests = ["--guest", f"uml,socket={path}", "--guest", f"pairs,socket={directory / 'pairs.socket'},queues=2"]
        backend = Backend(net.host, directory, ["--netdev", topology.HOST_IF, *guests]).start()
        stack.callback(backend.stop)
        initrd = uml.build(directory)
        guest = uml.UserModeGuest(directory, uml.kernel(), initrd, [Card(path, "")], memory_mib=128, name="xdpn-uml")
        stack.enter_context(closing(guest.start()))
        guest.configure(ADDRESS, topology.PREFIX)
        yield Stage(net, backend, guest, initrd, directory)
        assert backend.stop() == 0, process.tail(backend.log)


def test_it_negotiates_packed_rings_and_no_announcing(stage: Stage) -> None:
    assert "VIRTIO_F_RING_PACKED" in stage.features()
    assert "VIRTIO_NET_F_GUEST_ANNOUNCE" not in stage.features()


@pytest.mark.parametrize("size", [18, 1472, 8000, 65000])
def test_pings_pass_both_ways(stage: Stage, size: int) -> None:
    assert " 0% packet loss" in stage.guest.check(f"ping -c 5 -i 0.1 -s {size} {topology.FAR_ADDRESS}")
    assert " 0% packet loss" in stage.net.far.run("busybox", "ping", "-c", "5", "-i", "0.1", "-s", str(size), ADDRESS)


def test_tcp_flows_both_ways(stage: Stage) -> None:
    for reverse in (False, True):
        assert iperf(stage.guest, stage.net, stage.directory, 2, reverse) > 0
    queue = stage.backend.port("uml").queues[0]
    assert queue.tx.calls
    assert queue.rx.calls


def test_its_driver_is_unbound_and_bound_again(stage: Stage) -> None:
    """Rings that were only disabled are set up anew, in other memory, at other indices."""
    for _ in range(3):
        stage.guest.check("cd /sys/bus/virtio/drivers/virtio_net && echo virtio0 >unbind && echo virtio0 >bind")
        stage.guest.configure(ADDRESS, topology.PREFIX)
        stage.net.far.run("ip", "neigh", "flush", "dev", topology.FAR_IF)
        until(lambda: " 0% packet loss" in stage.guest.check(f"ping -c 2 {topology.FAR_ADDRESS}; true"))
        assert " 0% packet loss" in stage.net.ping(ADDRESS, 2)


def test_a_guest_of_more_pairs_than_it_has_is_told_of_and_works_when_it_is_started_again(stage: Stage) -> None:
    """It asks what is offered before it says that it has one pair; its driver wants a control queue for more."""
    card = Card(stage.directory / "pairs.socket", "")
    guest = uml.UserModeGuest(stage.directory, uml.kernel(), stage.initrd, [card], memory_mib=128, name="xdpn-pairs")
    with closing(guest.start()):
        assert "not VIRTIO_NET_F_CTRL_VQ" in guest.check("dmesg")
    until(lambda: "set queues=1" in stage.backend.log.read_text())
    with closing(guest.start()):
        guest.configure(topology.GUEST_ADDRESSES[1], topology.PREFIX)
        assert " 0% packet loss" in guest.check(f"ping -c 2 {topology.FAR_ADDRESS}")
        assert "VIRTIO_NET_F_MQ" not in stage.features("pairs")


def test_it_loses_its_card_with_the_daemon_and_has_one_again_when_it_is_started_again(stage: Stage) -> None:
    stage.backend.kill()
    stage.backend.start()
    until(lambda: "eth0" not in stage.guest.check("ls /sys/class/net"))
    stage.guest.close()
    stage.guest.start()
    stage.guest.configure(ADDRESS, topology.PREFIX)
    assert " 0% packet loss" in stage.guest.check(f"ping -c 2 {topology.FAR_ADDRESS}")
