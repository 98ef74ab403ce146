"""Linux 6.12 in a newer QEMU: a real client for what Debian 12's own do not negotiate, USO before all.

      far (IPv4, IPv6) -- far0 === xdpn0 -- xdpnet -- "whole"   guest one, eth0: virtio-net as QEMU has it
                                                   |- "split"   guest one, eth1: USO
                                                   |- "plain"   guest two, eth0: without GUEST_ANNOUNCE
                                                   `- "packed"  guest two, eth2: USO, packed rings
      a test's driver -- a bridge in this process -- guest two, eth1: for UFO, which Linux takes but sends no more

No QEMU up to 11.1 lets virtio-net have USO with vhost-user: its peer has to say that it has it, and tap alone does. So
the cards with USO are QEMU's device for any backend, which offers the guest all that we offer: too much where a control
queue is needed, for it has none. That is taken away between the two (tests.rig.relay).

What the guests send and receive with is tests/native/datagrams.c.
"""

import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.native import compile_program
from tests.rig import needs, newer
from tests.rig.backend import Backend as InProcess
from tests.rig.backend import ControlThread
from tests.rig.driver import Driver
from tests.rig.guests import mac, rarp
from tests.rig.netns import Wire, call_in, packet_socket
from tests.rig.qmp import Qmp
from tests.rig.relay import relay
from tests.rig.remote import RemoteGuest
from tests.rig.rings import MODERN, RING_PACKED
from tests.rig.segments import UDP, UFO, Segment
from tests.rig.waiting import PATIENCE_S, until
from xdpnet.core import TX, Bridge
from xdpnet.counters import Traffic
from xdpnet.demo import initramfs, iperf, process, topology
from xdpnet.demo.backend import Backend
from xdpnet.demo.guest import Card, Guest, best_accelerator
from xdpnet.virtq.features import OFFERED, VirtioFeature, mask

pytestmark = [
    pytest.mark.net,
    pytest.mark.guest,
    pytest.mark.usefixtures("books_balance"),
    needs.root,
    needs.newer_guest,
    pytest.mark.timeout(300),
]

UDP_SEGMENT = 103
PORT = 7000
UFO_MAC = mac(2)  # and the addresses of tests.rig.segments
USO = {"VIRTIO_NET_F_HOST_USO", "VIRTIO_NET_F_GUEST_USO4", "VIRTIO_NET_F_GUEST_USO6"}
ANNOUNCE = "VIRTIO_NET_F_GUEST_ANNOUNCE"
FAR = {4: topology.FAR_ADDRESS, 6: "fd77::1"}

both_families = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
both_layouts = pytest.mark.parametrize("name", ["split", "packed"])


@dataclass(frozen=True)
class End:
    """A card inside its guest."""

    guest: Guest
    interface: str
    mac: str
    number: int
    net: str = "77"

    @property
    def addresses(self) -> dict[int, str]:
        return {4: f"10.{self.net}.0.{self.number}", 6: f"fd{self.net}::{self.number}"}

    def configure(self, addresses: Sequence[str]) -> None:
        conf = f"/proc/sys/net/ipv6/conf/{self.interface}"
        script = f"ip link set {self.interface} address {self.mac} && echo 0 >{conf}/accept_dad"
        script += f" && echo 0 >{conf}/disable_ipv6 && ip link set {self.interface} up"
        for address in addresses:
            script += f" && ip address add {address}/{64 if ':' in address else 24} dev {self.interface}"
        self.guest.check(script)
        # Linux leaves it off: virtnet_probe() turns on what belongs to TCP alone.
        self.guest.run(f"ethtool -K {self.interface} tx-udp-segmentation on")

    def send(self, address: str, segment: int, *totals: int) -> None:
        address = address if ":" in address else f"::ffff:{address}"
        self.guest.check(f"datagrams send {address} {PORT} {segment} {' '.join(map(str, totals))}")

    def listen(self, expected: int) -> None:
        """For so many bytes."""
        self.guest.check(f"datagrams receive {PORT} 20 {expected} /tmp/received")

    def received(self) -> list[tuple[int, int, int]]:
        """What each receive returned: bytes, size of the segments or 0, checksum."""
        wait = "for i in $(seq 200); do grep -q end /tmp/received && break; sleep 0.1; done"
        lines = self.guest.check(f"{wait}; cat /tmp/received").splitlines()
        assert lines.pop() == "end", lines
        return [(size, segment, adler) for size, segment, adler in (map(int, line.split()) for line in lines)]


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    ends: dict[str, End]
    directory: Path
    driver: Driver
    control: ControlThread

    def features(self, name: str) -> set[str]:
        guest = self.backend.port(name).guest
        assert guest is not None
        return set(guest.features)

    def sent(self, name: str) -> Traffic:
        return self.backend.port(name).queues[0].tx

    def wire(self) -> Wire:
        """Frames at the far end."""
        return Wire(call_in(self.net.far.path, lambda: packet_socket(topology.FAR_IF)))

    def far_socket(self, version: int) -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        made = call_in(self.net.far.path, lambda: socket.socket(family, socket.SOCK_DGRAM))
        made.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE
        made.settimeout(PATIENCE_S)
        return made


@pytest.fixture(scope="module")
def bridge(control: ControlThread) -> Iterator[Bridge]:
    with control.bridge() as made:
        yield made


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, control: ControlThread, bridge: Bridge) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("xdpn")
    kernel = newer.kernel()
    datagrams = compile_program("datagrams", directory)
    initrd = initramfs.build(kernel, directory / "initramfs", (*initramfs.PROGRAMS, str(datagrams)))
    accel = best_accelerator(kernel, initrd, directory)
    macs = {name: f"52:54:00:78:66:0{number}" for number, name in enumerate(("whole", "split", "plain", "packed"))}
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        net.far.run("sysctl", "-qw", f"net.ipv6.conf.{topology.FAR_IF}.disable_ipv6=0")
        net.far.run("ip", "address", "add", f"{FAR[6]}/64", "dev", topology.FAR_IF, "nodad")
        arguments = ["--netdev", topology.HOST_IF]
        for name, address in macs.items():
            arguments += ["--guest", f"{name},socket={directory}/{name}.socket,mac={address}"]
        backend = Backend(net.host, directory, arguments).start()
        stack.callback(backend.stop)

        ufo = InProcess(control, bridge, 1, None)
        stack.callback(ufo.close)
        ufo.open(str(directory / "ufo.socket"))
        sends = mask(VirtioFeature.VIRTIO_NET_F_CSUM, VirtioFeature.VIRTIO_NET_F_HOST_UFO)
        driver = control.call(lambda: Driver(bridge, MODERN | sends).start())
        stack.callback(lambda: control.call(driver.close))

        def card(name: str, options: str = "") -> Card:
            address = macs.get(name, UFO_MAC.hex(":"))
            return Card(directory / f"{name}.socket", address, options=f"id={name}{options}")

        def boot(guest: str, cards: Sequence[Card], with_uso: str, hidden: int) -> Guest:
            path = directory / f"{with_uso}.relay"
            stack.enter_context(relay(path, directory / f"{with_uso}.socket", mask(VirtioFeature[ANNOUNCE]) | hidden))
            options = ["-qmp", f"unix:{directory}/{guest}.qmp,server=on,wait=off"]
            options += ["-chardev", f"socket,id=any,path={path}"]
            options += ["-device", f"{newer.ANY_DEVICE},virtio-id=1,num_vqs=2,vq_size=256,chardev=any"]
            made = Guest(directory, kernel, initrd, cards, accel, name=guest, qemu=newer.qemu(), options=options)
            return stack.enter_context(closing(made.start()))

        one = boot("xdpn-one", [card("whole")], "split", RING_PACKED)
        two = boot("xdpn-two", [card("plain", ",guest_announce=off"), card("ufo")], "packed", 0)
        ends = {
            "whole": End(one, "eth0", macs["whole"], 12, net="78"),
            "split": End(one, "eth1", macs["split"], 10),
            "plain": End(two, "eth0", macs["plain"], 13, net="79"),
            "ufo": End(two, "eth1", UFO_MAC.hex(":"), 2),
            "packed": End(two, "eth2", macs["packed"], 11),
        }
        for name, end in ends.items():
            end.configure(["10.9.0.2", "fd00::2"] if name == "ufo" else [*end.addresses.values()])
            if name in macs:
                backend.await_guest(name)
            # Each answers for its own card alone.
            end.guest.check("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore")
        # In the net of "plain" too.
        one.check("ip address add 10.79.0.10/24 dev eth1 && ip address add fd79::10/64 dev eth1")
        yield Stage(net, backend, ends, directory, driver, control)
        assert backend.stop() == 0, process.tail(backend.log)


def payload(size: int, number: int = 0) -> bytes:
    """What `datagrams send` sends as its send of this number."""
    return bytes((31 * i + (i >> 8) + number) & 0xFF for i in range(size))


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_all_that_is_offered_is_negotiated_by_one_or_the_other(stage: Stage) -> None:
    elsewhere = {
        "VHOST_F_LOG_ALL",  # while it moves: guest/test_migration.py
        "VIRTIO_F_ANY_LAYOUT",  # of devices before virtio 1.0
        "VIRTIO_F_IN_ORDER",  # Linux 6.12 does not ask for it: guest/test_dpdk.py
        "VIRTIO_NET_F_MQ",  # guest/test_linux.py
        "VIRTIO_NET_F_MTU",  # guest/test_mtu.py
    }
    offered = {bit.name for bit in OFFERED} - elsewhere
    protocol, packed = "VHOST_USER_F_PROTOCOL_FEATURES", "VIRTIO_F_RING_PACKED"
    not_in_virtio_net = USO | {packed, "VIRTIO_F_ORDER_PLATFORM"}  # of QEMU
    assert stage.features("whole") == offered - not_in_virtio_net
    assert stage.features("plain") == offered - not_in_virtio_net - {ANNOUNCE}
    assert stage.features("split") | {protocol} == offered - {packed, ANNOUNCE}
    assert stage.features("packed") | {protocol} == offered - {ANNOUNCE}


@both_layouts
@both_families
def test_large_sends_arrive_at_the_host_as_the_datagrams_that_they_are(stage: Stage, name: str, version: int) -> None:
    end = stage.ends[name]
    most = 1500 - (28 if version == 4 else 48)
    sends = [
        (most, 43 * most + 705),
        (most, most + 1),
        (1001, 7 * 1001 + 333),
        (999, 8 * 999),
        (8, 128 * 8),
    ]
    before = stage.sent(name)
    with stage.far_socket(version) as far:
        far.bind((FAR[version], PORT))
        for size, total in sends:
            end.send(FAR[version], size, total)
            wanted = cut(payload(total), size)
            assert [far.recv(65536) for _ in wanted] == wanted, (size, total)
    after = stage.sent(name)
    assert after.cut - before.cut == len(sends)
    assert after.segments - before.segments == sum((total - 1) // size for size, total in sends)
    assert after.drops == before.drops


@both_layouts
def test_segments_below_the_least_size_are_dropped_and_counted(stage: Stage, name: str) -> None:
    """Linux would send such (hostile-inputs C2)."""
    end = stage.ends[name]
    before = stage.sent(name)
    end.send(FAR[4], 7, 70)
    until(lambda: stage.sent(name).drops["gso_size"] == before.drops["gso_size"] + 1)
    assert stage.sent(name).cut == before.cut


@both_families
@pytest.mark.parametrize(("source", "sink"), [("split", "packed"), ("packed", "split")])
def test_between_guests_that_agree_a_large_send_passes_whole(
    stage: Stage, source: str, sink: str, version: int
) -> None:
    sends = [(1400, 44 * 1400 + 7), (1001, 7 * 1001 + 333), (8, 128 * 8)]
    before = stage.sent(source)
    stage.ends[sink].listen(sum(total for _, total in sends))
    for size, total in sends:
        stage.ends[source].send(stage.ends[sink].addresses[version], size, total)
    assert stage.ends[sink].received() == [(total, size, zlib.adler32(payload(total))) for size, total in sends]
    after = stage.sent(source)
    assert (after.cut, after.segments, after.drops) == (before.cut, before.segments, before.drops)


@both_families
def test_a_guest_without_it_gets_the_datagrams(stage: Stage, version: int) -> None:
    sends = [(1400, 44 * 1400 + 7), (1001, 7 * 1001 + 333), (8, 128 * 8)]
    before = stage.sent("split")
    stage.ends["plain"].listen(sum(total for _, total in sends))
    for size, total in sends:
        stage.ends["split"].send(stage.ends["plain"].addresses[version], size, total)
    # Its stack may have joined them again, for the socket asks for that.
    received = stage.ends["plain"].received()
    assert sum(size for size, _, _ in received) == sum(total for _, total in sends)
    after = stage.sent("split")
    assert after.cut - before.cut == len(sends)
    assert after.segments - before.segments == sum((total - 1) // size for size, total in sends)


@both_layouts
@both_families
def test_bursts_from_the_host_are_joined_and_arrive_whole_and_in_order(stage: Stage, name: str, version: int) -> None:
    size, total, bursts = 1200, 40 * 1200 + 77, 10
    end = stage.ends[name]
    joined = stage.backend.port(topology.HOST_IF).queues[0].rx.joined
    end.listen(bursts * total)
    with stage.far_socket(version) as far:
        far.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        for number in range(bursts):
            far.sendto(payload(total, number), (end.addresses[version], PORT))
    received = end.received()
    assert stage.backend.port(topology.HOST_IF).queues[0].rx.joined > joined
    # Whatever was joined: the bytes of each receive are the next ones.
    wanted = b"".join(payload(total, number) for number in range(bursts))
    assert sum(length for length, _, _ in received) == len(wanted)
    at = 0
    for length, segment, adler in received:
        assert adler == zlib.adler32(wanted[at : at + length])
        assert segment in (0, size)
        at += length
    assert any(segment for _, segment, _ in received)


@both_layouts
def test_tcp_flows_both_ways(stage: Stage, name: str) -> None:
    for reverse in (False, True):
        assert iperf(stage.ends[name].guest, stage.net, stage.directory, 1, reverse) > 0


def announce(stage: Stage, name: str) -> None:
    """QEMU is told to announce this card, as at the end of a migration."""
    with Qmp(stage.directory / f"{stage.ends[name].guest.name}.qmp") as qmp:
        qmp.run("announce-self", initial=50, max=100, rounds=2, step=10, interfaces=[name], id=name)


def test_a_guest_that_can_announces_itself(stage: Stage) -> None:
    end = stage.ends["whole"]
    own = bytes.fromhex(end.mac.replace(":", ""))
    ipv4 = socket.inet_pton(socket.AF_INET, end.addresses[4])
    ipv6 = socket.inet_pton(socket.AF_INET6, end.addresses[6])

    def gratuitous_arp(frame: bytes) -> bool:
        return frame[6:14] == own + b"\x08\x06" and frame[28:32] == frame[38:42] == ipv4

    def unsolicited_advertisement(frame: bytes) -> bool:
        return frame[6:14] == own + b"\x86\xdd" and frame[54] == 136 and frame[62:78] == ipv6

    with stage.wire() as wire:
        announce(stage, "whole")
        seen = [wire.receive(gratuitous_arp), wire.receive(unsolicited_advertisement)]
    assert None not in seen


def test_a_guest_that_cannot_is_announced(stage: Stage) -> None:
    own = bytes.fromhex(stage.ends["plain"].mac.replace(":", ""))
    with stage.wire() as wire:
        announce(stage, "plain")
        assert wire.receive(lambda frame: frame[6:14] == own + b"\x80\x35") == rarp(own)


@both_families
def test_a_datagram_of_ufo_arrives_whole(stage: Stage, version: int) -> None:
    end, driver = stage.ends["ufo"], stage.driver
    sizes = (1473, 20_001, 65_000)
    end.listen(sum(sizes))
    for number, size in enumerate(sizes):
        whole = Segment(version, UDP, payload(size, number), UFO_MAC, mac(1), ports=(PORT, PORT))
        driver.pair.send(whole.frame(partial=True), header=whole.header(UFO, 1480))
    assert driver.pair.wait_sent()
    wanted = [(size, 0, zlib.adler32(payload(size, number))) for number, size in enumerate(sizes)]
    assert end.received() == wanted
    assert stage.control.call(lambda: driver.drops(TX)) == {}


class Unshared(Guest):
    """As libvirt and people start it who know nothing of vhost-user."""

    def command(self) -> list[str]:
        return [word.replace("-memfd,", "-ram,").replace("share=on", "share=off") for word in super().command()]


def test_a_guest_whose_memory_is_not_shared_is_told_of(stage: Stage, tmp_path: Path) -> None:
    backend = Backend(stage.net.host, tmp_path, ["--guest", f"one,socket={tmp_path}/one.socket"]).start()
    one = stage.ends["whole"].guest
    card = Card(tmp_path / "one.socket", "52:54:00:78:66:09")
    with ExitStack() as stack:
        stack.callback(backend.stop)
        guest = Unshared(tmp_path, one.kernel, one.initrd, [card], one.accel, name="xdpn-unshared", qemu=newer.qemu())
        stack.enter_context(closing(guest.start()))
        until(lambda: (found := backend.port("one").guest) and found.state.kind == "no_memory")
        until(lambda: backend.log.read_text().count("one: memory is not shared (share=on); give its QEMU") == 1)


@pytest.mark.parametrize("client", [False, True], ids=["we listen", "QEMU listens"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_goes_on_behind_the_next_daemon(stage: Stage, tmp_path: Path, packed: bool, client: bool) -> None:
    """After the first, the index that QEMU sends is as old as the guest's driver."""
    arguments = ["--guest", f"next,socket={tmp_path}/next.socket,client={str(client).lower()}"]
    arguments += ["--guest", f"peer,socket={tmp_path}/peer.socket"]
    backend = Backend(stage.net.host, tmp_path, arguments).start()
    one = stage.ends["whole"].guest
    card = Card(tmp_path / "next.socket", "52:54:00:78:66:09", packed=packed, server=client)
    with ExitStack() as stack:
        stack.callback(backend.stop)
        guest = Guest(tmp_path, one.kernel, one.initrd, [card], one.accel, name="xdpn-next", qemu=newer.qemu())
        stack.enter_context(closing(guest.start()))
        guest.configure("10.80.0.1", 24)
        target = socket.inet_aton("10.80.0.1")
        question = b"\xff" * 6 + mac(1) + b"\x08\x06" + b"\0\1\x08\0\6\4\0\1" + mac(1)
        question += socket.inet_aton("10.80.0.2") + bytes(6) + target

        def answers(peer: RemoteGuest) -> bool:
            peer.pair.fill()
            peer.pair.send(question)
            return any(frame[20:22] == b"\0\2" and frame[28:32] == target for frame in peer.pair.frames(timeout=1))

        for turn in range(5):
            with RemoteGuest(tmp_path / "peer.socket", MODERN).start() as peer:
                until(lambda peer=peer: answers(peer))  # type: ignore[misc]
                # Frames that are on their way when it ends, and rings that stand anywhere.
                guest.check(f"ping -c {100 * turn + 7} -i 0.001 -W 1 10.80.0.2 >/dev/null 2>&1 &")
            backend.kill()
            backend.start()
