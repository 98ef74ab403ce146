"""A Linux guest without a `mac` that says nothing by itself: whoever knows its address reaches it all the same."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.waiting import until
from xdpnet.demo import initramfs, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

MAC = "52:54:00:78:64:07"
ADDRESS = topology.GUEST_ADDRESSES[0]
AGEING_S = 1


@pytest.mark.parametrize("end", [Backend.kill, Backend.stop], ids=["killed", "ended"])
def test_46_a_silent_guest_is_reached_after_it_has_aged_and_after_a_restart(
    tmp_path: Path, end: Callable[[Backend], object]
) -> None:
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs")
    accel = best_accelerator(kernel, initrd, tmp_path)
    with topology.topology() as net:
        words = ["--ageing-s", str(AGEING_S), "--netdev", topology.HOST_IF, "--guest", f"one,socket={tmp_path}/socket"]
        backend = Backend(net.host, tmp_path, words).start()
        try:
            card = Card(tmp_path / "socket", MAC)
            with closing(Guest(tmp_path, kernel, initrd, [card], accel=accel).start()) as guest:
                guest.configure(ADDRESS, topology.PREFIX)
                backend.await_guest("one")
                assert " 0% packet loss" in guest.check(f"ping -c 1 {topology.FAR_ADDRESS}")
                # Neither end asks for the other: nothing is said but what is to be answered.
                known = f"ip neigh replace {ADDRESS} lladdr {MAC} dev {topology.FAR_IF} nud permanent"
                net.far.run(*known.split())
                (far,) = json.loads(net.far.run("ip", "-j", "link", "show", "dev", topology.FAR_IF))
                guest.check(f"arp -s {topology.FAR_ADDRESS} {far['address']}")
                guest.check("echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6")
                time.sleep(AGEING_S + 3)
                assert " 0% packet loss" in net.ping(ADDRESS)
                until((tmp_path / "xdpnet.control.addresses").exists)
                end(backend)
                backend.start()
                backend.await_guest("one")
                assert " 0% packet loss" in net.ping(ADDRESS)
                snapshot = backend.settled()
                assert balanced(snapshot), snapshot.totals
        finally:
            backend.stop()
