"""A Linux guest that has some of its memory in a file on a disk, which we leave out, and its TCP.

As an NVDIMM it is no memory to Linux. From a DIMM in ZONE_MOVABLE comes nothing that a driver allocates; in ZONE_NORMAL
that is looked for there first: such a guest loses what lies there, a TCP stream for good, and its rings go on.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import needs, newer
from tests.rig.qmp import Qmp
from tests.rig.waiting import until
from xdpnet.demo import await_listener, initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator
from xdpnet.metrics.snapshot import Queue

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.newer_guest, pytest.mark.timeout(300)]

MIB = 1 << 20
SIZE = 128 * MIB
ADDRESS = topology.GUEST_ADDRESSES[0]
PORT = 9000
RECEIVER = f"""
import hashlib, socket
with socket.create_server(("", {PORT})) as server:
    connection, _ = server.accept()
    print(hashlib.file_digest(connection.makefile("rb"), "md5").hexdigest())
"""
SENDER = f"""
import hashlib, os, socket
data = os.urandom({4 * MIB})
with socket.create_server(("", {PORT})) as server:
    connection, _ = server.accept()
    connection.sendall(data)
print(hashlib.md5(data).hexdigest())
"""


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    guest: Guest
    directory: Path

    @property
    def queue(self) -> Queue:
        return self.backend.port("one").queues[0]

    def exchange(self, program: str, script: str) -> tuple[str, str]:
        """A program at the far end, and the guest's own with it; what both have said."""
        said = self.directory / "said"
        far = self.net.far.spawn([sys.executable, "-c", program], said)
        try:
            await_listener(self.net.far, PORT)
            here = self.guest.check(script, timeout=120)
            assert far.wait(60) == 0
        finally:
            process.end(far)
        return said.read_text().split()[-1], here.split()[0] if here else ""

    def tcp_runs(self) -> None:
        """Both ways, and every byte arrives."""
        self.guest.check("dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null")
        arrived, _ = self.exchange(RECEIVER, f"nc {topology.FAR_ADDRESS} {PORT} </tmp/data")
        assert arrived == self.guest.check("md5sum </tmp/data").split()[0]
        arrived, wanted_here = self.exchange(SENDER, f"nc {topology.FAR_ADDRESS} {PORT} </dev/null | md5sum")
        assert arrived == wanted_here

    def zone_has_memory(self, zone: str) -> bool:
        (present,) = self.guest.check(f"grep -A20 'zone *{zone}$' /proc/zoneinfo | grep -m1 present").split()[1:]
        return int(present) > 0

    def is_left_out(self) -> bool:
        return "not a file on tmpfs or hugetlbfs: left out" in self.backend.log.read_text()

    def goes_on(self) -> None:
        assert [self.queue.rx_ring, self.queue.tx_ring] != [None, None]
        for ring in self.queue.rx_ring, self.queue.tx_ring:
            assert ring is not None
            assert ring.started
            assert not ring.broken
        until(lambda: self.guest.run(f"ping -c 1 -W 1 {topology.FAR_ADDRESS}")[0] == 0)


@contextmanager
def start(directory: Path, options: list[str]) -> Iterator[Stage]:
    kernel = newer.kernel()
    initrd = initramfs.build(kernel, directory / "initramfs")
    accel = best_accelerator(kernel, initrd, directory)
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        arguments = ["--netdev", topology.HOST_IF, "--guest", f"one,socket={directory}/socket"]
        backend = Backend(net.host, directory, arguments).start()
        stack.callback(backend.stop)
        card = Card(directory / "socket", "52:54:00:78:67:01")
        options = ["-m", "slots=4,maxmem=2G", "-qmp", f"unix:{directory}/qmp,server=on,wait=off", *options]
        guest = Guest(directory, kernel, initrd, [card], accel, qemu=newer.qemu(), options=options)
        stack.enter_context(closing(guest.start()))
        guest.configure(ADDRESS, topology.PREFIX)
        backend.await_guest("one")
        yield Stage(net, backend, guest, directory)
        snapshot = backend.settled()
        assert balanced(snapshot), snapshot.totals


@pytest.fixture
def disk() -> Iterator[str]:
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(__file__)) as file:
        file.truncate(SIZE)
        yield file.name


@pytest.mark.parametrize("device", ["nvdimm", "pc-dimm"])
def test_with_memory_on_a_disk_from_the_beginning_tcp_runs(tmp_path: Path, disk: str, device: str) -> None:
    append = "console=ttyS0 panic=-1 quiet memhp_default_state=online_movable"
    options = ["-object", f"memory-backend-file,id=disk,mem-path={disk},size={SIZE},share=on"]
    options += ["-machine", "nvdimm=on", "-device", f"{device},memdev=disk", "-append", append]
    with start(tmp_path, options) as stage:
        assert stage.is_left_out()
        assert stage.zone_has_memory("Movable") == (device == "pc-dimm")
        stage.tcp_runs()
        stage.goes_on()


def test_with_memory_on_a_disk_that_its_driver_uses_a_guest_loses_what_lies_there_and_its_rings_go_on(
    tmp_path: Path, disk: str
) -> None:
    with start(tmp_path, []) as stage, Qmp(tmp_path / "qmp") as qmp:
        stage.tcp_runs()
        stage.guest.check("echo online >/sys/devices/system/memory/auto_online_blocks")
        backend = {"qom_type": "memory-backend-file", "mem_path": disk, "share": True, "size": SIZE}
        qmp.run("object-add", id="disk", **backend)
        qmp.run("device_add", driver="pc-dimm", id="dimm", memdev="disk")
        until(lambda: stage.zone_has_memory("Normal"))
        assert stage.is_left_out()
        # TCP sends from there, and sends from there again.
        server = stage.net.far.spawn([sys.executable, "-c", RECEIVER], tmp_path / "received")
        try:
            await_listener(stage.net.far, PORT)
            stage.guest.check(f"nc {topology.FAR_ADDRESS} {PORT} </dev/zero >/dev/null 2>&1 &")
            until(lambda: stage.queue.tx.drops["left_out"] > 0)
        finally:
            process.end(server)
        stage.guest.run("killall nc")
        stage.goes_on()
