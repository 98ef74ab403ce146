"""A running guest whose cards and memory come and go, by QEMU's monitor.

    peer (a test's rings) -- xdpnet -- "first"   its eth0, there from the beginning
                                   `- "second"   its eth1, plugged and unplugged; so are DIMMs meanwhile

Said in passing by QEMU, `vhost_set_mem_table failed: Input/output error` is what it makes of a connection that ended
while it was telling of a change of memory, or of a refusal; it goes on, and so do we.
"""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import needs, newer
from tests.rig.guests import mac
from tests.rig.qmp import Qmp
from tests.rig.remote import RemoteGuest
from tests.rig.rings import MODERN
from tests.rig.waiting import until
from xdpnet.demo import initramfs, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.newer_guest, pytest.mark.timeout(300)]

MIB = 1 << 20
ADDRESSES = {"eth0": "10.80.0.1", "eth1": "10.80.0.2"}


@dataclass
class Stage:
    backend: Backend
    guest: Guest
    qmp: Qmp
    peer: RemoteGuest
    directory: Path

    def answers(self, interface: str) -> bool:
        """Whether a question from the peer reaches the card, and its answer the peer."""
        target = socket.inet_aton(ADDRESSES[interface])
        question = b"\xff" * 6 + mac(1) + b"\x08\x06" + b"\0\1\x08\0\6\4\0\1" + mac(1)
        self.peer.pair.fill()
        self.peer.pair.send(question + socket.inet_aton("10.80.0.9") + bytes(6) + target)
        return any(frame[20:22] == b"\0\2" and frame[28:32] == target for frame in self.peer.pair.frames(timeout=1))

    def errors(self) -> dict[str, int]:
        counted = [guest.errors for port in self.backend.snapshot().ports if (guest := port.guest)]
        return {reason: number for errors in counted for reason, number in errors.items() if number}

    def restart(self, end: Callable[[Backend], object], meanwhile: Callable[[], None]) -> None:
        """The daemon goes, by `end`, and comes back; the guest and its QEMU go on."""
        end(self.backend)
        meanwhile()
        self.backend.start()
        self.peer.close()
        self.peer = RemoteGuest(self.directory / "peer.socket", MODERN).start()
        until(lambda: self.answers("eth0"))

    def plug_card(self) -> None:
        path = {"type": "unix", "data": {"path": f"{self.directory}/second.socket"}}
        backend = {"type": "socket", "data": {"addr": path, "server": False, "reconnect-ms": 100}}
        self.qmp.run("chardev-add", id="second", backend=backend)
        self.qmp.run("netdev_add", type="vhost-user", id="second", chardev="second")
        self.qmp.run(
            "device_add",
            driver="virtio-net-pci",
            id="card",
            netdev="second",
            bus="behind",
            romfile="",
            mac=mac(2).hex(":"),
        )
        self.guest.check("for i in $(seq 200); do [ -e /sys/class/net/eth1 ] && break; sleep 0.1; done")
        self.guest.configure(ADDRESSES["eth1"], 24, "eth1")
        until(lambda: self.answers("eth1"))

    def unplug_card(self) -> None:
        self.qmp.unplug("card")
        self.qmp.run("netdev_del", id="second")  # and with it the chardev

    def plug_dimm(self, **backend: object) -> None:
        before = self.guest.check("grep MemTotal /proc/meminfo")
        self.qmp.run("object-add", id="memory-of-dimm", size=128 * MIB, share=True, **backend)
        self.qmp.run("device_add", driver="pc-dimm", id="dimm", memdev="memory-of-dimm")
        # Asked to let go of it before it has taken it, Linux says nothing and keeps it.
        until(lambda: self.guest.check("grep MemTotal /proc/meminfo") != before)

    def plug_memfd(self) -> None:
        self.plug_dimm(qom_type="memory-backend-memfd")

    def unplug_dimm(self) -> None:
        self.qmp.unplug("dimm")
        self.qmp.run("object-del", id="memory-of-dimm")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("xdpn")
    kernel = newer.kernel()
    initrd = initramfs.build(kernel, directory / "initramfs")
    accel = best_accelerator(kernel, initrd, directory)
    with ExitStack() as stack:
        host = stack.enter_context(topology.namespace())
        words = [f"{name},socket={directory}/{name}.socket" for name in ("first", "second", "peer")]
        backend = Backend(host, directory, [word for guest in words for word in ("--guest", guest)]).start()
        stack.callback(backend.stop)
        options = ["-qmp", f"unix:{directory}/qmp,server=on,wait=off", "-m", "slots=4,maxmem=2G"]
        options += ["-device", "pcie-root-port,id=behind,chassis=1"]
        card = Card(directory / "first.socket", "52:54:00:78:66:09")
        guest = Guest(directory, kernel, initrd, [card], accel, name="xdpn-plug", qemu=newer.qemu(), options=options)
        stack.enter_context(closing(guest.start()))
        # What is plugged can be unplugged: no buffer of a driver is in it.
        guest.check("echo online_movable >/sys/devices/system/memory/auto_online_blocks")
        guest.check("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore")
        guest.configure(ADDRESSES["eth0"], 24)
        qmp = stack.enter_context(Qmp(directory / "qmp"))
        peer = RemoteGuest(directory / "peer.socket", MODERN).start()
        made = Stage(backend, guest, qmp, peer, directory)
        stack.callback(lambda: made.peer.close())
        until(lambda: made.answers("eth0"))
        yield made


def test_a_card_and_memory_are_plugged_and_unplugged_in_any_order(stage: Stage) -> None:
    for order in (
        (stage.plug_card, stage.plug_memfd, stage.unplug_card, stage.plug_card, stage.unplug_dimm, stage.unplug_card),
        (stage.plug_memfd, stage.plug_card, stage.unplug_dimm, stage.unplug_card),
    ) * 2:
        for step in order:
            step()
            assert stage.answers("eth0"), step
    assert stage.errors() == {}
    assert "vhost" not in stage.guest.log.read_text()


@contextlib.contextmanager
def file_on_disk() -> Iterator[str]:
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(__file__)) as file:
        file.truncate(128 * MIB)
        yield file.name


def test_memory_on_a_disk_is_left_out_and_the_cards_go_on(stage: Stage) -> None:
    with file_on_disk() as path:
        stage.plug_dimm(qom_type="memory-backend-file", mem_path=path)
        assert "not a file on tmpfs or hugetlbfs: left out" in stage.backend.log.read_text()
        assert stage.answers("eth0")
        stage.plug_card()
        stage.unplug_dimm()
        for interface in ADDRESSES:
            assert stage.answers(interface)
        stage.unplug_card()
    assert stage.errors() == {}


@pytest.mark.parametrize("end", [Backend.kill, Backend.stop])
def test_memory_that_comes_or_goes_while_the_daemon_is_away_is_known_to_it_when_it_is_back(
    stage: Stage, end: Callable[[Backend], object]
) -> None:
    """Then it is changed once more, by a frontend that takes its backend for one that knows."""
    stage.restart(end, meanwhile=stage.plug_memfd)
    stage.plug_card()
    stage.unplug_dimm()
    assert stage.answers("eth0")
    stage.plug_memfd()
    stage.restart(end, meanwhile=stage.unplug_dimm)
    until(lambda: stage.answers("eth1"))
    stage.plug_memfd()
    stage.unplug_dimm()
    stage.unplug_card()
    assert stage.answers("eth0")
    assert stage.errors() == {}
