"""A Linux guest in QEMU that is sent from where its frames lie, and gives memory up and takes it back.

By a balloon that is told to grow and to shrink again, by free page reporting, which nobody has to tell, and by memory
that is unplugged and plugged again (virtio-mem).
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.descriptors import open_files
from tests.rig.qmp import Qmp
from tests.rig.waiting import until
from xdpnet.demo import await_listener, initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator
from xdpnet.metrics.snapshot import Queue

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

ADDRESS = topology.GUEST_ADDRESSES[0]
MIB = 1 << 20
MEMORY_MIB = 256
SMALL_MIB = 104  # with a balloon in it; less, and Linux ends processes for want of memory
# What an interface is to cut or to sum is copied.
PLAIN = "csum=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,gso=off"
BALLOON = "virtio-balloon-pci,id=balloon"
# What is plugged lies beyond 4 GiB, in ZONE_NORMAL: what a driver allocates is looked for there first.
PLUGGED_MIB = 128
VIRTIO_MEM = ["-m", "maxmem=1G", "-object", f"memory-backend-memfd,id=plugged,size={PLUGGED_MIB}M,share=on"]
VIRTIO_MEM += ["-device", "virtio-mem-pci,id=memory0,memdev=plugged,node=0,prealloc=on"]
MODULES = (*initramfs.MODULES, "virtio_balloon", "virtio_mem")
PORT = 9000
HELD_MIB = 16
TCP_HOLDS = {"tcp_mem": "32768 32768 32768", "tcp_wmem": "4096 67108864 67108864"}  # pages; bytes
RECEIVER = f"""
import hashlib, socket
with socket.create_server(("", {PORT})) as server:
    connection, _ = server.accept()
    print(hashlib.file_digest(connection.makefile("rb"), "md5").hexdigest())
"""


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    guest: Guest
    directory: Path

    @property
    def wire(self) -> Queue:
        return next(port.queues[0] for port in self.backend.snapshot().ports if port.netdev)

    @property
    def memory(self) -> int:
        """Bytes that the guest's memory takes of the host, or would if nobody had pinned it."""
        pid = self.guest.pid
        (fd,) = (fd for fd, link in open_files(pid).items() if "memory-backend-memfd" in link)
        return os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * 512

    def use_up(self, but_mib: int) -> None:
        """What the guest has free, but for so much; what it takes from then on is what it had given up."""
        self.shrink()
        self.guest.check(
            "mount -o remount,size=100% /tmp\n"
            "free=$(grep MemFree /proc/meminfo | tr -dc 0-9)\n"
            f"dd if=/dev/zero of=/tmp/used bs=1M count=$((free / 1024 - {but_mib})) 2>/dev/null"
        )

    def shrink(self) -> None:
        """The guest keeps no memory for frames to come."""
        self.guest.check("for cache in /sys/kernel/slab/*/shrink; do echo 1 >$cache; done")

    def is_found_out(self) -> None:
        """Its frames are copied, and the sockets hold nothing of its memory."""
        self.upload(HELD_MIB, held=True)
        until(lambda: self.wire.xsk is not None and self.wire.xsk.umem < MEMORY_MIB * MIB)
        assert "guest one: some of its memory was given up and taken back" in self.backend.log.read_text()
        before = self.wire.tx
        self.upload(1)
        after = self.wire.tx
        assert after.packets > before.packets
        assert after.in_place == before.in_place

    def upload(self, mib: int, held: bool = False) -> None:
        """TCP out of the guest; every byte arrives. Held: all of it is in the guest's frames before anybody reads.

        Linux makes frames of few pages, again and again, and never gives up the blocks in which these lie; holding this
        many it has to take others.
        """
        got = self.directory / "received"
        got.unlink(missing_ok=True)
        server = self.net.far.spawn([sys.executable, "-c", RECEIVER], got)
        try:
            await_listener(self.net.far, PORT)
            self.guest.check(f"dd if=/dev/urandom of=/tmp/data bs=1M count={mib} 2>/dev/null")
            wanted = self.guest.check("md5sum </tmp/data").split()[0]
            send = f"nc {topology.FAR_ADDRESS} {PORT} </tmp/data"
            if held:
                server.send_signal(signal.SIGSTOP)
                for name, values in TCP_HOLDS.items():
                    self.guest.check(f"echo {values} >/proc/sys/net/ipv4/{name}")
                self.guest.check(f"{send} >/dev/null 2>&1 &")
                until(lambda: self.unsent > (mib - 1) * MIB)
                server.send_signal(signal.SIGCONT)
            else:
                self.guest.check(send, timeout=120)
            assert server.wait(120) == 0
            self.guest.check("rm /tmp/data")
        finally:
            process.end(server)
        assert got.read_text().strip() == wanted

    @property
    def unsent(self) -> int:
        """Bytes in the guest's connection to the receiver that are not acknowledged."""
        rows = self.guest.check("cat /proc/net/tcp").splitlines()[1:]
        queues = (row.split()[4] for row in rows if row.split()[2].endswith(f":{PORT:04X}"))
        return sum(int(queue.partition(":")[0], 16) for queue in queues)


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs", modules=MODULES)
    accel = best_accelerator(kernel, initrd, tmp_path)
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        arguments = ["--netdev", f"{topology.HOST_IF},zerocopy=on", "--guest", f"one,socket={tmp_path}/socket"]
        backend = Backend(net.host, tmp_path, arguments).start()
        stack.callback(backend.stop)
        card = Card(tmp_path / "socket", "52:54:00:78:64:05", options=PLAIN)
        options = [*request.param, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
        guest = Guest(
            tmp_path, kernel, initrd, [card], accel=accel, memory_mib=MEMORY_MIB, prealloc=True, options=options
        )
        with closing(guest.start()):
            guest.configure(ADDRESS, topology.PREFIX)
            backend.await_guest("one")
            made = Stage(net, backend, guest, tmp_path)
            until(lambda: made.wire.xsk is not None and made.wire.xsk.umem > MEMORY_MIB * MIB)
            yield made
            snapshot = backend.settled()
            assert balanced(snapshot), snapshot.totals


@pytest.mark.parametrize("stage", [["-device", BALLOON]], indirect=True, ids=["balloon"])
def test_a_guest_whose_balloon_grows_and_shrinks_goes_on_sending_and_no_byte_is_another(stage: Stage) -> None:
    stage.upload(4)
    assert stage.wire.tx.in_place > 1000
    with Qmp(stage.directory / "qmp") as qmp:
        for _ in range(2):
            stage.shrink()
            qmp.run("balloon", value=SMALL_MIB * MIB)
            until(lambda: actual(qmp) == SMALL_MIB * MIB)
            assert stage.memory < (SMALL_MIB + 1) * MIB
            stage.use_up(but_mib=14)
            qmp.run("balloon", value=MEMORY_MIB * MIB)
            until(lambda: actual(qmp) == MEMORY_MIB * MIB)
            stage.upload(24)
            stage.guest.check("rm /tmp/used")
    stage.is_found_out()


@pytest.mark.parametrize("stage", [["-device", "pcie-root-port,id=behind,chassis=1"]], indirect=True, ids=["port"])
def test_a_guest_that_reports_free_pages_goes_on_sending_and_no_byte_is_another(stage: Stage) -> None:
    stage.upload(4)
    assert stage.wire.tx.in_place > 1000
    with Qmp(stage.directory / "qmp") as qmp:
        qmp.run("device_add", driver="virtio-balloon-pci", bus="behind", free_page_reporting=True)
    until(lambda: stage.memory < MEMORY_MIB // 2 * MIB)
    stage.use_up(but_mib=60)
    for _ in range(2):
        stage.upload(24)
    stage.is_found_out()


@pytest.mark.parametrize("stage", [VIRTIO_MEM], indirect=True, ids=["virtio-mem"])
def test_a_guest_whose_memory_is_unplugged_and_plugged_again_goes_on_sending_and_no_byte_is_another(
    stage: Stage,
) -> None:
    """At first there is nothing behind the region; a daemon that finds it whole lends of it."""
    stage.guest.check("echo online >/sys/devices/system/memory/auto_online_blocks")
    stage.upload(4)
    assert stage.wire.tx.in_place == 0
    with Qmp(stage.directory / "qmp") as qmp:
        plug(qmp, PLUGGED_MIB)
        until(lambda: plugged(qmp) == PLUGGED_MIB * MIB)
        stage.upload(4)
        assert stage.wire.tx.in_place == 0
        stage.backend.stop()
        stage.backend.start()
        stage.backend.await_guest("one")
        until(lambda: stage.wire.xsk is not None and stage.wire.xsk.umem > (MEMORY_MIB + PLUGGED_MIB) * MIB)
        stage.upload(4)
        assert stage.wire.tx.in_place > 1000
        for _ in range(2):
            stage.shrink()
            plug(qmp, 0)
            until(lambda: plugged(qmp) < PLUGGED_MIB // 2 * MIB)
            stage.upload(4)
            plug(qmp, PLUGGED_MIB)
            until(lambda: plugged(qmp) == PLUGGED_MIB * MIB)
            stage.upload(24)
    stage.is_found_out()


def plug(qmp: Qmp, mib: int) -> None:
    qmp.run("qom-set", path="/machine/peripheral/memory0", property="requested-size", value=mib * MIB)


def plugged(qmp: Qmp) -> int:
    answer = qmp.run("qom-get", path="/machine/peripheral/memory0", property="size")
    assert isinstance(answer, int)
    return answer


def actual(qmp: Qmp) -> int:
    return int(qmp.run("query-balloon")["actual"])
