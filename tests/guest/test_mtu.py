"""A Linux guest that is told an MTU of 9000, behind an interface that has it."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.waiting import eventually
from xdpnet.demo import initramfs, iperf, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

MAC = "52:54:00:78:64:04"
ADDRESS = topology.GUEST_ADDRESSES[0]


def test_frames_of_mtu_9000_pass_both_ways(tmp_path: Path) -> None:
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs")
    accel = best_accelerator(kernel, initrd, tmp_path)
    with topology.topology(mtu=9000) as net:
        guests = f"one,socket={tmp_path}/socket,mac={MAC},mtu=9000"
        backend = Backend(net.host, tmp_path, ["--netdev", topology.HOST_IF, "--guest", guests]).start()
        try:
            card = Card(tmp_path / "socket", MAC, mtu=9000)
            with closing(Guest(tmp_path, kernel, initrd, [card], accel=accel).start()) as guest:
                guest.configure(ADDRESS, topology.PREFIX)
                backend.await_guest("one")
                assert guest.check("cat /sys/class/net/eth0/mtu").strip() == "9000"
                before = backend.port("one").queues[0].tx
                for size in (3798, 8972):
                    assert " 0% packet loss" in guest.check(f"ping -c 5 -s {size} {topology.FAR_ADDRESS}")
                after = backend.port("one").queues[0].tx
                # One frame each, not fragments.
                assert after.packets - before.packets < 20
                assert after.bytes - before.bytes > 5 * (3798 + 8972)
                for reverse in (False, True):
                    assert iperf(guest, net, tmp_path, 2, reverse) > 0
                snapshot = backend.settled()
                assert balanced(snapshot), snapshot.totals
        finally:
            backend.stop()


def test_34_a_guest_that_qemu_alone_has_told_9000_is_named_with_the_remedy(tmp_path: Path) -> None:
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs")
    accel = best_accelerator(kernel, initrd, tmp_path)
    with topology.topology() as net:
        guests = f"one,socket={tmp_path}/socket,mac={MAC}"
        backend = Backend(net.host, tmp_path, ["--netdev", topology.HOST_IF, "--guest", guests]).start()
        try:
            card = Card(tmp_path / "socket", MAC, mtu=9000)
            with closing(Guest(tmp_path, kernel, initrd, [card], accel=accel).start()) as guest:
                guest.configure(ADDRESS, topology.PREFIX)
                backend.await_guest("one")
                assert guest.check("cat /sys/class/net/eth0/mtu").strip() == "9000"
                told = (
                    f"one: its frontend has told it an MTU of 9000 (QEMU: host_mtu), and interface {topology.HOST_IF}"
                )
                assert eventually(lambda: told in backend.log.read_text())
                assert backend.port("one").guest.mtu == 9000  # type: ignore[union-attr]
        finally:
            backend.stop()
