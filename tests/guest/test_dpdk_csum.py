"""DPDK's testpmd between two networks, its checksums and segmentation left to us: its csum engine on two ports.

      far0 === xdpn0 -- xdpnet -- port 0   testpmd   port 1 -- xdpnet -- xdpn0 === far0

A client and a server with no idea of it talk through it: what either end gets, we have summed and cut for DPDK.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.test_dpdk import virtio_user
from tests.native import compile_program
from tests.rig import needs
from tests.rig.dpdk import Pmd
from tests.rig.waiting import until
from xdpnet.demo import await_listener, process, topology
from xdpnet.demo.backend import Backend, balanced

pytestmark = [pytest.mark.net, pytest.mark.dpdk, needs.root, needs.testpmd]

PORT = 5000
SIZE = 2 << 20
PINGS = 20
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
ADDRESSES = ("10.60.0.1", "10.60.0.2")
JOINED = ("udp_cksum", "tcp_cksum", "tcp_lro")
# What virtio-user does without, and what testpmd wants done to what it receives.
SETTINGS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "as it is": ({}, ()),
    "joined frames too": ({}, JOINED),
    "packed": ({"packed_vq": 1}, JOINED),
    "not in order": ({"in_order": 0}, ()),
    "one buffer a frame": ({"mrg_rxbuf": 0}, ()),
}


@dataclass
class Stage:
    nets: list[topology.Topology]
    backends: list[Backend]
    pmd: Pmd
    transfer: str

    def ping(self) -> None:
        said = self.nets[0].far.run("busybox", "ping", "-c", str(PINGS), "-i", "0.02", "-W", "10", ADDRESSES[1])
        assert f" {PINGS} packets received" in said, said

    def exchange(self) -> None:
        sizes = "1,18,1000,1472"
        run = self.nets[0].far.run
        run(self.transfer, "with", ADDRESSES[1], str(PORT), str(SIZE), str(SIZE // 16), sizes, timeout=120)


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    layout, wants = SETTINGS[request.param]
    with ExitStack() as stack:
        nets = [stack.enter_context(topology.topology()) for _ in MACS]
        backends, peers, vdevs = [], [], []
        for number, (net, mac) in enumerate(zip(nets, MACS, strict=True)):
            socket = tmp_path / f"{number}.socket"
            # What it forwards has its own address as source; what it answers to is the other end's.
            arguments = ["--netdev", topology.HOST_IF, "--guest", f"dpdk,socket={socket},mac={mac}"]
            backends.append(Backend(net.host, tmp_path, arguments, name=f"xdpnet{number}").start())
            stack.callback(backends[-1].stop)
            vdevs.append(virtio_user(socket, mac, number, layout))
            net.far.run("ip", "address", "replace", f"{ADDRESSES[number]}/24", "dev", topology.FAR_IF)
            neighbour = ("neigh", "add", ADDRESSES[1 - number], "lladdr", mac, "dev", topology.FAR_IF)
            net.far.run("ip", *neighbour)
            (link,) = json.loads(net.far.run("ip", "-j", "link", "show", "dev", topology.FAR_IF))
            peers.append(f"--eth-peer={number},{link['address']}")
        pmd = stack.enter_context(Pmd("csum", tmp_path, vdevs, ["--forward-mode=csum", *peers]))
        pmd.command("port stop all")
        for number in range(len(MACS)):
            for protocol in "tcp", "udp":
                assert f"{protocol.upper()} checksum offload is hw" in pmd.command(f"csum set {protocol} hw {number}")
            pmd.command(f"tso set 1400 {number}")
            for offload in wants:
                pmd.command(f"port config {number} rx_offload {offload} on")
        assert "Fail" not in pmd.command("port start all")
        pmd.command("start")
        transfer = str(compile_program("transfer", tmp_path))
        server = nets[1].far.spawn([transfer, "serve", str(PORT)], tmp_path / "server.log")
        stack.callback(process.end, server)
        await_listener(nets[1].far, PORT)
        yield Stage(nets, backends, pmd, transfer)
        for backend in backends:
            assert balanced(backend.settled())
            assert backend.stop() == 0


@pytest.mark.parametrize("stage", SETTINGS, indirect=True)
def test_what_dpdk_leaves_to_us_is_done_and_goes_on_after_its_ports_were_stopped(stage: Stage) -> None:
    for turn in range(3):
        if turn:
            for line in "stop", "port stop all", "port start all", "start":
                stage.pmd.command(line)
        stage.ping()
        stage.exchange()
    for backend in stage.backends:
        (queue,) = backend.port("dpdk").queues
        assert queue.tx.cut > 0
        assert not queue.rx.drops["no_buffer"]


def test_a_port_that_dpdk_itself_does_not_start_has_no_buffers(tmp_path: Path) -> None:
    """It asks for the checksum of IPv4, which virtio has not, and gives up; but its rings were handed over before."""
    with topology.topology() as net:
        arguments = ["--netdev", topology.HOST_IF, "--guest", f"dpdk,socket={tmp_path}/socket,mac={MACS[0]}"]
        backend = Backend(net.host, tmp_path, arguments).start()
        try:
            options = ["--forward-mode=csum", "--enable-rx-cksum"]
            with Pmd("refused", tmp_path, [virtio_user(tmp_path / "socket", MACS[0])], options) as pmd:
                assert "Fail to configure port 0" in pmd.log.read_text()
                net.far.run("ip", "neigh", "add", "10.77.0.9", "lladdr", MACS[0], "dev", topology.FAR_IF)
                net.far.run("sh", "-c", "busybox ping -c 3 -i 0.02 -W 1 10.77.0.9; true")
                until(lambda: backend.port("dpdk").queues[0].rx.drops["no_buffer"] >= 3)
        finally:
            assert backend.stop() == 0
