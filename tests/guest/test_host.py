"""Ways between the host and its guests, by the commands in deploy/README.md, with a Linux guest."""

import re
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.rig import needs
from xdpnet.demo import initramfs, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

MAC = "52:54:00:00:00:01"
GUEST, GUEST_AT_HOME = topology.GUEST_ADDRESSES[0], "192.0.2.1"


def commands(first: str) -> tuple[list[list[str]], list[str]]:
    """Of the block in the manual that begins so: those of ip, and xdpnet's options for interfaces."""
    readme = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
    block = next(block for block in re.findall(r"```\n(.*?)```", readme, re.DOTALL) if block.startswith(first))
    lines = [line.replace("eth1", topology.HOST_IF).split() for line in block.splitlines()]
    *made, run = lines
    assert all(words[0] == "ip" for words in made)
    assert run[:2] == ["xdpnet", "run"]
    return made, run[2 : run.index("--guest")]


@pytest.mark.parametrize("first", ["ip link add host0", "ip link add br0"], ids=["a second interface", "a bridge"])
def test_the_host_and_the_network_reach_a_guest(tmp_path: Path, first: str) -> None:
    made, netdevs = commands(first)
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs", programs=())
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        for words in made:
            net.host.run(*words)
        if "br0" in first:
            net.host.run("ip", "address", "flush", "dev", topology.HOST_IF)
            net.host.run("ip", "address", "add", f"{topology.HOST_ADDRESS}/{topology.PREFIX}", "dev", "br0")
        socket = tmp_path / "guest.socket"
        backend = Backend(net.host, tmp_path, [*netdevs, "--guest", f"web,socket={socket},mac={MAC}"]).start()
        stack.callback(backend.stop)
        guest = stack.enter_context(closing(Guest(tmp_path, kernel, initrd, [Card(socket, MAC)]).start()))
        guest.configure(GUEST, topology.PREFIX)
        guest.check(f"ip address add {GUEST_AT_HOME}/24 dev eth0")
        backend.await_guest("web")
        at_home = GUEST if "br0" in first else GUEST_AT_HOME
        assert " 0% packet loss" in net.host.run("busybox", "ping", "-c", "3", "-W", "10", at_home)
        assert " 0% packet loss" in net.ping(GUEST, 3)
        assert " 0% packet loss" in guest.check(f"ping -c 3 -W 10 {topology.FAR_ADDRESS}")
        assert backend.stop() == 0
