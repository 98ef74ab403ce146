"""Zero copy in the daemon: DPDK's guests in huge pages come and go, and every frame is accounted for."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.rig import dpdk, needs
from tests.rig.dpdk import Pmd
from tests.rig.waiting import until
from xdpnet.demo import topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.metrics.snapshot import Queue, Snapshot

pytestmark = [pytest.mark.net, pytest.mark.dpdk, needs.root, needs.testpmd]

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
HUGE_MIB = 640  # of two clients


def wire(daemon: Backend) -> Queue:
    (queue,) = (port.queues[0] for port in daemon.snapshot().ports if port.netdev)
    return queue


def told(books: Snapshot) -> dict[str, dict[str, int]]:
    """What every port has in each direction, but for zeroes."""
    return {
        f"{port.name} {way}": {"packets": traffic.packets, "copies": traffic.copies}
        | {reason: n for reason, n in traffic.drops.items() if n}
        for port in books.ports
        for way, traffic in (("rx", port.queues[0].rx), ("tx", port.queues[0].tx))
    }


def client(number: int, directory: Path, huge: Path, options: str, peer: str) -> Pmd:
    """To the one address that is known to be on the wire: what is flooded there is not counted while its sockets are
    opened anew, which may be at any time."""
    socket = directory / f"guest{number}.socket"
    device = f"net_virtio_user0,path={socket},mac={MACS[number]},queue_size=1024{options}"
    forwarding = ["--forward-mode=txonly", "--txpkts=1000", f"--eth-peer=0,{peer}"]
    return Pmd(f"client{number}", directory, [device], forwarding, huge=huge)


def send(sender: Pmd, daemon: Backend, number: int) -> None:
    port = f"guest{number}"
    before = daemon.port(port).queues[0].tx.packets
    sender.command("start")
    until(lambda: daemon.port(port).queues[0].tx.packets > before + 10_000)
    sender.command("stop")
    # What is still in the ring when a client ends is `disabled`.
    sent = sender.stats().tx_packets
    until(lambda: daemon.port(port).queues[0].tx.packets == sent)


@pytest.mark.parametrize(
    ("policy", "options"),
    [("auto", ""), ("on", ",in_order=0"), ("on", ",packed_vq=1"), ("auto", ",packed_vq=1,in_order=0")],
)
def test_guests_that_come_and_go_are_sent_in_place_and_no_frame_is_unaccounted_for(
    tmp_path: Path, policy: str, options: str
) -> None:
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        huge = stack.enter_context(dpdk.huge_pages(HUGE_MIB, tmp_path))
        arguments = ["--netdev", f"{topology.HOST_IF},zerocopy={policy}"]
        for number in range(2):
            arguments += ["--guest", f"guest{number},socket={tmp_path}/guest{number}.socket"]
        daemon = Backend(net.host, tmp_path, arguments).start()
        stack.callback(daemon.kill)
        (link,) = json.loads(net.host.run("ip", "-j", "link", "show", topology.HOST_IF))
        peer = link["address"]
        with client(0, tmp_path, huge, options, peer) as first:
            first.await_link()
            until(lambda: wire(daemon).xsk.umem > 64 << 20)  # type: ignore[union-attr]
            send(first, daemon, 0)
            books = daemon.settled()
            assert balanced(books)
            before = wire(daemon).tx.in_place
            assert before > 0
            assert before == first.stats().tx_packets, wire(daemon)
            first.command("start")
            with client(1, tmp_path, huge, options, peer) as second:
                second.await_link()
                send(second, daemon, 1)
            first.command("stop")
            books = daemon.settled()
            assert balanced(books)
            queue = wire(daemon)
            assert queue.tx.packets + sum(queue.tx.drops.values()) == sum(
                port.queues[0].tx.packets for port in books.ports if port.guest
            ), told(books)
            assert queue.tx.in_place > before
        until(lambda: wire(daemon).xsk.umem == 16 << 20)  # type: ignore[union-attr]
        assert daemon.stop() == 0
        assert not re.search("WARNING.*(not renewed|copied)", daemon.log.read_text())
