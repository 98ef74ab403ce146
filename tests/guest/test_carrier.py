"""What a Linux guest in QEMU sees of the link: that is QEMU's to say, and it goes by the connection to us."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.qmp import Qmp
from tests.rig.waiting import until
from xdpnet.demo import initramfs, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

MAC = "52:54:00:78:64:06"


def test_the_carrier_is_lost_while_the_daemon_is_away_and_not_while_the_interface_is_down(tmp_path: Path) -> None:
    """vhost-user has a message for it (CONFIG_CHANGE_MSG), but QEMU asks nobody for a network card's configuration."""
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs")
    accel = best_accelerator(kernel, initrd, tmp_path)
    with topology.topology() as net:
        arguments = ["--netdev", topology.HOST_IF, "--guest", f"one,socket={tmp_path}/socket,mac={MAC}"]
        backend = Backend(net.host, tmp_path, arguments).start()
        try:
            card, monitor = Card(tmp_path / "socket", MAC), ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
            with (
                closing(Guest(tmp_path, kernel, initrd, [card], accel=accel, options=monitor).start()) as guest,
                Qmp(tmp_path / "qmp") as qmp,
            ):
                guest.configure(topology.GUEST_ADDRESSES[0], topology.PREFIX)
                backend.await_guest("one")

                def carrier() -> tuple[str, int]:
                    now, changes = guest.check("cd /sys/class/net/eth0; cat carrier carrier_down_count").split()
                    return now, int(changes)

                _, before = carrier()
                net.host.run("ip", "link", "set", topology.HOST_IF, "down")
                until(lambda: f"{topology.HOST_IF}: down" in backend.log.read_text())
                assert carrier() == ("1", before)
                # The way that there is.
                qmp.run("set_link", name="net0", up=False)
                until(lambda: carrier() == ("0", before + 1))
                qmp.run("set_link", name="net0", up=True)
                until(lambda: carrier() == ("1", before + 1))
                before += 1
                net.host.run("ip", "link", "set", topology.HOST_IF, "up")
                backend.stop()
                until(lambda: carrier() == ("0", before + 1))
                backend.start()
                until(lambda: carrier() == ("1", before + 1))
                backend.await_guest("one")
                assert " 0% packet loss" in guest.check(f"ping -c 3 {topology.FAR_ADDRESS}")
        finally:
            backend.stop()
