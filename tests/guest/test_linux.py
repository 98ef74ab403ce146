"""Real Linux guests in QEMU, served by the daemon over a veth pair.

      far (iperf3 -s) -- far0 === xdpn0 -- xdpnet -- "one"   (we listen, one queue pair)
                                                  |- "two"   (QEMU listens, two queue pairs)
                                 `- "packed" (we listen, packed rings, two queue pairs; only while its tests run)

Each guest boots once; each test leaves them as it found them. After every test the daemon's books balance.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.waiting import PATIENCE_S, until
from xdpnet.demo import initramfs, iperf, process, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest, best_accelerator
from xdpnet.virtq.features import VirtioFeature

pytestmark = [
    pytest.mark.net,
    pytest.mark.guest,
    pytest.mark.usefixtures("books_balance"),
    needs.root,
    needs.guest,
    pytest.mark.timeout(300),
]

MACS = {"one": "52:54:00:78:64:01", "two": "52:54:00:78:64:02"}
PACKED_MAC = "52:54:00:78:64:03"
ADDRESSES = dict(zip((*MACS, "packed"), topology.GUEST_ADDRESSES, strict=False))
UNBIND_AND_BIND = (
    "cd /sys/bus/virtio/drivers/virtio_net && echo virtio0 > unbind && [ ! -e /sys/class/net/eth0 ] &&"
    " echo virtio0 > bind"
)
MIB = 1 << 20


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    one: Guest
    two: Guest
    directory: Path
    boot: Callable[[str, Card], Guest]

    @property
    def packed_socket(self) -> Path:
        return self.directory / "packed.socket"

    def configure(self, name: str, guest: Guest | None = None) -> None:
        guest = guest or getattr(self, name)
        guest.check("ip address flush dev eth0")
        guest.configure(ADDRESSES[name], topology.PREFIX)
        self.backend.await_guest(name)

    def tcp(self, guest: Guest, reverse: bool = False, streams: int = 1) -> float:
        return iperf(guest, self.net, self.directory, 2, reverse, streams)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("xdpn")
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, directory / "initramfs")
    accel = best_accelerator(kernel, initrd, directory)
    sockets = {name: directory / f"{name}.socket" for name in MACS}
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        arguments = [
            "--netdev", topology.HOST_IF,
            "--guest", f"one,socket={sockets['one']},mac={MACS['one']}",
            "--guest", f"two,socket={sockets['two']},mac={MACS['two']},queues=2,client=true",
            "--guest", f"packed,socket={directory}/packed.socket,mac={PACKED_MAC},queues=2",
        ]  # fmt: skip
        backend = Backend(net.host, directory, arguments).start()
        stack.callback(backend.stop)

        def boot(name: str, card: Card) -> Guest:
            return Guest(directory, kernel, initrd, [card], accel=accel, cpus=card.queues, name=f"xdpn-{name}").start()

        one = stack.enter_context(closing(boot("one", Card(sockets["one"], MACS["one"], level_interrupts=True))))
        two = stack.enter_context(closing(boot("two", Card(sockets["two"], MACS["two"], queues=2, server=True))))
        made = Stage(net, backend, one, two, directory, boot)
        made.configure("one")
        made.configure("two")
        yield made
        assert backend.stop() == 0, process.tail(backend.log)


@pytest.fixture(scope="class")
def packed(stage: Stage) -> Iterator[Guest]:
    guest = stage.boot("packed", Card(stage.packed_socket, PACKED_MAC, queues=2, packed=True))
    with closing(guest):
        stage.configure("packed", guest)
        yield guest


def loses_nothing(said: str) -> bool:
    return " 0% packet loss" in said


def test_a_guest_pings_the_network_and_the_network_the_guest(stage: Stage) -> None:
    for guest in (stage.one, stage.two):
        assert loses_nothing(guest.check(f"ping -c 5 {topology.FAR_ADDRESS}"))
    for name in MACS:
        assert loses_nothing(stage.net.ping(ADDRESSES[name]))


def test_full_frames_and_fragments_of_larger_packets_pass(stage: Stage) -> None:
    for size in (18, 1472, 1473, 8000):
        said = stage.one.check(f"ping -c 3 -s {size} {topology.FAR_ADDRESS}")
        assert loses_nothing(said), said


def test_tcp_flows_both_ways(stage: Stage) -> None:
    for reverse in (False, True):
        assert stage.tcp(stage.one, reverse) > 0


def test_two_guests_talk_to_each_other(stage: Stage) -> None:
    def received(name: str) -> int:
        return sum(queue.rx.packets for queue in stage.backend.port(name).queues)

    before = {name: received(name) for name in MACS}
    assert loses_nothing(stage.one.check(f"ping -c 5 {ADDRESSES['two']}"))
    stage.two.check("iperf3 -s -D -1")
    stage.one.check(f"iperf3 -c {ADDRESSES['two']} -t 2")
    for name in MACS:
        assert received(name) > before[name]


def test_a_card_without_msi_x_is_served_by_level_interrupts(stage: Stage) -> None:
    def interrupts() -> tuple[int, str]:
        lines = [line.split() for line in stage.one.check("grep virtio /proc/interrupts").splitlines()]
        assert len(lines) == 1, lines  # one line for the whole card, none for each queue
        return int(lines[0][1]), " ".join(lines[0][2:])

    before, kind = interrupts()
    assert "fasteoi" in kind
    assert loses_nothing(stage.one.check(f"ping -c 5 {topology.FAR_ADDRESS}"))
    assert interrupts()[0] >= before + 5


def test_several_queue_pairs_all_carry_traffic_and_can_be_turned_off_and_on(stage: Stage) -> None:
    stage.two.check("ethtool -L eth0 combined 2")

    def moved() -> list[int]:
        """Both ways: what the guest gets is spread by flow, though there is one worker."""
        queues = stage.backend.port("two").queues
        return [traffic.packets for queue in queues for traffic in (queue.tx, queue.rx)]

    before = moved()
    stage.two.check(f"taskset 1 ping -c 3 {topology.FAR_ADDRESS}")
    stage.two.check(f"taskset 2 ping -c 3 {topology.FAR_ADDRESS}")
    stage.tcp(stage.two, streams=8)
    stage.tcp(stage.two, reverse=True, streams=16)
    assert all(now > then for now, then in zip(moved(), before, strict=True)), moved()
    stage.two.check("ethtool -L eth0 combined 1")
    assert loses_nothing(stage.two.check(f"ping -c 3 {topology.FAR_ADDRESS}"))
    assert loses_nothing(stage.net.ping(ADDRESSES["two"], 3))


def test_the_driver_is_unbound_and_bound_again(stage: Stage) -> None:
    for _ in range(3):
        stage.one.check(UNBIND_AND_BIND)
        stage.configure("one")
        assert loses_nothing(stage.one.check(f"ping -c 2 {topology.FAR_ADDRESS}"))


def test_no_guest_can_take_a_ring_away_that_we_are_not_told_of(stage: Stage) -> None:
    """QEMU takes VIRTIO_F_RING_RESET for itself if it is offered, and keeps the resets to itself too."""
    assert "VIRTIO_F_RING_RESET" not in features(stage, "one")
    status, _ = stage.one.run("ethtool -G eth0 rx 128 tx 128")
    assert status != 0
    assert loses_nothing(stage.one.check(f"ping -c 3 {topology.FAR_ADDRESS}"))


class TestPackedRings:
    def test_qemu_and_linux_negotiate_them(self, stage: Stage, packed: Guest) -> None:
        bits = packed.check("cat /sys/bus/virtio/devices/virtio0/features")
        negotiated = {number for number, bit in enumerate(bits) if bit == "1"}
        assert VirtioFeature.VIRTIO_F_RING_PACKED in negotiated
        # What the driver sees and we do not is the frontend's own: its control queue and configuration space.
        ours = {VirtioFeature[name].value for name in features(stage, "packed")}
        assert ours - {VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES} <= negotiated
        assert VirtioFeature.VIRTIO_F_RING_PACKED in ours

    @pytest.mark.parametrize("name", ["one", "packed"])
    def test_linux_uses_all_of_the_other_ring_features_that_qemu_passes_on(
        self, stage: Stage, packed: Guest, name: str
    ) -> None:
        """IN_ORDER is not among them: for that there is DPDK."""
        wanted = {"VIRTIO_F_VERSION_1", "VIRTIO_RING_F_EVENT_IDX", "VIRTIO_RING_F_INDIRECT_DESC"}
        assert wanted | {"VIRTIO_NET_F_MRG_RXBUF"} <= set(features(stage, name))

    def test_pings_and_tcp_pass_both_ways(self, stage: Stage, packed: Guest) -> None:
        assert loses_nothing(packed.check(f"ping -c 5 -s 8000 {topology.FAR_ADDRESS}"))
        assert loses_nothing(stage.net.ping(ADDRESSES["packed"]))
        for reverse in (False, True):
            assert stage.tcp(packed, reverse, streams=4) > 0

    def test_a_guest_with_split_rings_talks_to_it(self, stage: Stage, packed: Guest) -> None:
        packed.check("iperf3 -s -D -1")
        stage.one.check(f"iperf3 -c {ADDRESSES['packed']} -t 1 && ping -c 3 {ADDRESSES['packed']}")

    def test_every_queue_pair_carries_traffic(self, stage: Stage, packed: Guest) -> None:
        before = [queue.tx.packets for queue in stage.backend.port("packed").queues]
        packed.check("ethtool -L eth0 combined 2")
        packed.check(f"taskset 1 ping -c 3 {topology.FAR_ADDRESS} && taskset 2 ping -c 3 {topology.FAR_ADDRESS}")
        stage.tcp(packed, streams=8)
        after = [queue.tx.packets for queue in stage.backend.port("packed").queues]
        assert all(now > then for now, then in zip(after, before, strict=True)), after

    def test_the_driver_is_unbound_and_bound_again_at_whatever_index(self, stage: Stage, packed: Guest) -> None:
        for _ in range(2):
            packed.check(UNBIND_AND_BIND)
            stage.configure("packed", packed)
            assert loses_nothing(packed.check(f"ping -c 2 {topology.FAR_ADDRESS}"))

    @pytest.mark.parametrize(
        ("end", "way"),
        [(Backend.kill, "-R"), (Backend.kill, ""), (Backend.stop, "")],
        ids=["killed while it receives", "killed while it sends", "ended"],
    )
    def test_it_goes_on_behind_the_next_daemon(
        self, stage: Stage, packed: Guest, end: Callable[[Backend], object], way: str
    ) -> None:
        """QEMU keeps no index of a packed ring: what it says to the next daemon is what it said to the first."""
        net = stage.net
        packed.check("rm -f /tmp/[0-9]")
        for turn in range(2):
            server = net.far.spawn(["iperf3", "-s", "-B", topology.FAR_ADDRESS], stage.directory / f"server-{turn}.log")
            try:
                before = bytes_moved(stage, "packed")
                client = f"iperf3 -c {topology.FAR_ADDRESS} {way} -t 60"
                packed.check(f"(until [ -e /tmp/{turn} ] || {client}; do sleep 0.1; done) >/dev/null 2>&1 &")
                until(lambda before=before: bytes_moved(stage, "packed") > before + MIB)  # type: ignore[misc]
                end(stage.backend)
                stage.backend.start()
                until(lambda: pings(net, ADDRESSES["packed"]))
                packed.check(f"touch /tmp/{turn}; killall iperf3; true")
            finally:
                process.end(server)
            assert loses_nothing(packed.check(f"ping -c 3 -s 4000 {topology.FAR_ADDRESS}"))
        for reverse in (False, True):
            assert stage.tcp(packed, reverse) > 0

    def test_it_reboots(self, stage: Stage, packed: Guest) -> None:
        packed.reboot()
        stage.configure("packed", packed)
        assert loses_nothing(packed.check(f"ping -c 3 {topology.FAR_ADDRESS}"))


def test_a_guest_reboots_and_is_served_again(stage: Stage) -> None:
    before = stage.backend.port("one").queues[0].tx.packets
    stage.one.reboot()
    stage.configure("one")
    assert loses_nothing(stage.one.check(f"ping -c 3 {topology.FAR_ADDRESS}"))
    assert loses_nothing(stage.two.check(f"ping -c 3 {ADDRESSES['one']}"))
    assert stage.backend.port("one").queues[0].tx.packets > before  # counters survive


def test_a_daemon_killed_under_load_leaves_the_host_alone_and_its_successor_serves_the_same_guests(
    stage: Stage, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    net = stage.net
    server = net.far.spawn(["iperf3", "-s", "-B", topology.FAR_ADDRESS], stage.directory / "kill-server.log")
    ping_log = stage.directory / "host-ping.log"
    host_ping = net.host.spawn(["busybox", "ping", "-i", "0.1", "-c", "60", topology.FAR_ADDRESS], ping_log)
    try:
        assert xdp_attached(net)
        stage.two.check(f"(sleep 0.3; iperf3 -c {topology.FAR_ADDRESS} -t 5) >/dev/null 2>&1 &")
        before = stage.backend.port("two").queues[0].tx.packets
        until(lambda: stage.backend.port("two").queues[0].tx.packets > before + 1000)
        stage.backend.kill()
        until(lambda: not xdp_attached(net))
        restarted = time.monotonic()
        stage.backend.start()
        answered = until(lambda: pings(net, ADDRESSES["two"]))
        took = answered - restarted
        record_property("served_again_after_s", round(took, 2))
        with capsys.disabled():
            print(f"\n    the restarted daemon serves the running guest after {took:.2f} s")
        until(lambda: pings(net, ADDRESSES["one"]))  # QEMU connects anew each second
        stage.two.check("killall iperf3; true")
        host_ping.wait(PATIENCE_S)
        assert loses_nothing(ping_log.read_text()), ping_log.read_text()
    finally:
        process.end(server)
        process.end(host_ping)
    assert loses_nothing(stage.two.check(f"ping -c 3 {topology.FAR_ADDRESS}"))
    assert stage.tcp(stage.two) > 0


@pytest.mark.parametrize("server", [False, True], ids=["we listen", "QEMU listens"])
def test_a_card_with_more_queues_than_the_guest_has_here_is_told_of_once(
    stage: Stage, tmp_path: Path, server: bool
) -> None:
    """QEMU itself says so, in its own log, and tries again without a pause."""
    words = f"many,socket={tmp_path}/many.socket,client={str(server).lower()}"
    backend = Backend(stage.net.host, tmp_path, ["--guest", words]).start()
    card = Card(tmp_path / "many.socket", "52:54:00:78:64:09", queues=4, server=server)
    guest = Guest(tmp_path, stage.one.kernel, stage.one.initrd, [card], accel=stage.one.accel, name="xdpn-many")
    qemu = process.spawn(guest.command(), tmp_path / "qemu.log")

    def connects() -> int:
        found = backend.port("many").guest
        assert found is not None
        return found.connects

    try:
        until(lambda: connects() >= 6)
        assert backend.log.read_text().count("asks for more than the 1 queue pair that it has") == 1
    finally:
        process.end(qemu)
        backend.stop()


def test_an_idle_daemon_takes_little_memory_and_next_to_no_processor_time(
    stage: Stage, record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 10
    before = process.cpu_seconds(stage.backend.pid)
    time.sleep(seconds)
    used = process.cpu_seconds(stage.backend.pid) - before
    resident = process.resident_bytes(stage.backend.pid)
    record_property("idle_cpu", used / seconds)
    record_property("resident_mib", resident / MIB)
    with capsys.disabled():
        print(f"\n    idle: {used / seconds:.2%} of a core, {resident / MIB:.0f} MiB resident")
    assert resident < 100 * MIB
    assert used < 0.05 * seconds  # a daemon that spins would take it all


def features(stage: Stage, name: str) -> tuple[str, ...]:
    guest = stage.backend.port(name).guest
    assert guest is not None
    return guest.features


def bytes_moved(stage: Stage, name: str) -> int:
    queues = stage.backend.port(name).queues
    return sum(queue.rx.bytes + queue.tx.bytes for queue in queues)


def xdp_attached(net: topology.Topology) -> bool:
    return '"xdp"' in net.host.run("ip", "-j", "link", "show", topology.HOST_IF)


def pings(net: topology.Topology, address: str) -> bool:
    with contextlib.suppress(topology.CommandError):
        net.far.run("busybox", "ping", "-c", "1", "-W", "1", address)
        return True
    return False
