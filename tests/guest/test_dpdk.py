"""DPDK's virtio-user as the guest: a frontend and a driver that nobody here wrote, in both socket directions.

Counts are compared to the last frame: what testpmd says it sent, what the daemon says it took and passed on, and what
the kernel says arrived at the far end of the veth pair.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.dpdk import Pmd, frames
from tests.rig.waiting import until, until_equal
from xdpnet.demo import topology
from xdpnet.demo.backend import Backend, balanced

pytestmark = [pytest.mark.net, pytest.mark.dpdk, needs.root, needs.testpmd]

MAC = "52:54:00:00:00:01"
FRAMES = 20_000
TX_ONLY = ["--forward-mode=txonly", "--txpkts=64"]


@contextmanager
def backend(net: topology.Topology, directory: Path, *guests: str, netdev: bool = True) -> Iterator[Backend]:
    arguments = ["--netdev", topology.HOST_IF] if netdev else []
    for guest in guests:
        arguments += ["--guest", guest]
    daemon = Backend(net.host, directory, arguments).start()
    try:
        yield daemon
        assert balanced(daemon.settled())
    finally:
        assert daemon.stop() == 0


def sends(daemon: Backend, name: str, queues: int = 1, more_than: int = 0) -> bool:
    """On each of its queues, a while already."""
    return all(queue.tx.packets > more_than + 100 for queue in daemon.port(name).queues[:queues])


def virtio_user(path: Path, mac: str = MAC, number: int = 0, options: Mapping[str, int] | None = None) -> str:
    more = "".join(f",{key}={value}" for key, value in {"queue_size": 1024, **(options or {})}.items())
    return f"net_virtio_user{number},path={path},mac={mac}{more}"


@pytest.mark.parametrize("frontend_listens", [False, True], ids=["backend listens", "frontend listens"])
@pytest.mark.parametrize("options", [{}, {"mrg_rxbuf": 0}, {"in_order": 0}, {"packed_vq": 1}], ids=str)
def test_every_frame_that_dpdk_sends_is_counted_on_its_way_to_the_wire(
    net: topology.Topology, tmp_path: Path, frontend_listens: bool, options: dict[str, int]
) -> None:
    socket = tmp_path / "guest.socket"
    mode = ",client=true" if frontend_listens else ""
    if frontend_listens:
        options = options | {"server": 1}
    with (
        backend(net, tmp_path, f"dpdk,socket={socket},mac={MAC}{mode}") as daemon,
        Pmd(
            "client", tmp_path, [virtio_user(socket, options=options)], ["--forward-mode=txonly", "--txpkts=64"]
        ) as client,
    ):
        client.await_link()
        far, host = net.far.counters(topology.FAR_IF), net.host.counters(topology.HOST_IF)
        client.command("start")
        until(lambda: sends(daemon, "dpdk"))
        client.command("stop")
        sent = client.stats().tx_packets
        until_equal(lambda: daemon.port("dpdk").queues[0].tx.packets, sent)
        books = daemon.settled()
        (wire,) = (port.queues[0].tx for port in books.ports if port.netdev)
        assert sent > 0
        assert wire.packets + sum(wire.drops.values()) == sent
        arrived = net.far.counters(topology.FAR_IF)["rx"]["packets"] - far["rx"]["packets"]
        # The kernel may drop between the two ends, where the far end's backlog is full; it counts that itself.
        lost = net.host.counters(topology.HOST_IF)["tx"]["dropped"] - host["tx"]["dropped"]
        assert arrived + lost == wire.packets


@pytest.mark.parametrize("frontend_listens", [False, True], ids=["backend listens", "frontend listens"])
def test_every_frame_from_the_wire_reaches_dpdk_or_a_drop_counter(
    net: topology.Topology, tmp_path: Path, frontend_listens: bool
) -> None:
    socket = tmp_path / "guest.socket"
    mode, options = (",client=true", {"server": 1}) if frontend_listens else ("", {})
    with (
        backend(net, tmp_path, f"dpdk,socket={socket},mac={MAC}{mode}") as daemon,
        Pmd("client", tmp_path, [virtio_user(socket, options=options)], ["--forward-mode=rxonly"]) as client,
    ):
        client.await_link()
        client.command("start")
        daemon.await_guest("dpdk")
        blast = [sys.executable, "-m", "tests.rig.blast", topology.FAR_IF, MAC, str(FRAMES)]
        net.far.run(*blast)
        until_equal(lambda: delivered_and_dropped(daemon), FRAMES)
        until_equal(lambda: client.stats().rx_packets, daemon.port("dpdk").queues[0].rx.packets)
        client.command("stop")


def test_two_dpdk_guests_exchange_frames_without_an_interface(net: topology.Topology, tmp_path: Path) -> None:
    sockets = [tmp_path / "a.socket", tmp_path / "b.socket"]
    macs = [MAC, "52:54:00:00:00:02"]
    guests = [f"{name},socket={path},mac={mac}" for name, path, mac in zip("ab", sockets, macs, strict=True)]
    with (
        backend(net, tmp_path, *guests, netdev=False) as daemon,
        Pmd("sink", tmp_path, [virtio_user(sockets[1], macs[1])], ["--forward-mode=rxonly"], cpu=0) as sink,
        Pmd(
            "source",
            tmp_path,
            [virtio_user(sockets[0], macs[0])],
            [*TX_ONLY, f"--eth-peer=0,{macs[1]}"],
        ) as source,
    ):
        source.await_link()
        sink.await_link()
        sink.command("start")
        source.command("start")
        until(lambda: sends(daemon, "a") and daemon.port("b").queues[0].rx.packets)
        source.command("stop")
        sent = source.stats().tx_packets
        until_equal(lambda: daemon.port("a").queues[0].tx.packets, sent)
        daemon.settled()
        received = daemon.port("b").queues[0].rx
        assert received.packets + sum(received.drops.values()) == sent
        until_equal(lambda: sink.stats().rx_packets, received.packets)
        sink.command("stop")


# What a device option of virtio-user asks for: the feature, and whether it is asked for by default.
ASKED = {
    "packed_vq": ("VIRTIO_F_RING_PACKED", 0),
    "in_order": ("VIRTIO_F_IN_ORDER", 1),
    "mrg_rxbuf": ("VIRTIO_NET_F_MRG_RXBUF", 1),
}
SPLIT = [{"in_order": order, "mrg_rxbuf": merge} for order in (1, 0) for merge in (1, 0)]
PACKED = [{"packed_vq": 1, **options} for options in SPLIT]
LAYOUTS = [
    *((options, options, 64) for options in (*SPLIT, *PACKED)),
    *(({"vectorized": 1, **options}, {"vectorized": 1, **options}, 64) for options in (SPLIT[3], PACKED[0], PACKED[1])),
    *(({"queues": 2, **options}, {"queues": 2, **options}, 64) for options in (SPLIT[0], PACKED[2])),
    *(({"queues": 4, **options}, {"queues": 4, **options}, 256) for options in (SPLIT[2], PACKED[0])),
    # Frames in several buffers: chains, direct and in indirect tables, and merged receive buffers.
    *((options, options, 4000) for options in (SPLIT[0], SPLIT[2], PACKED[0], PACKED[2])),
    # Two that have little in common; the first listens.
    ({"server": 1, "packed_vq": 1, "queues": 2}, {"in_order": 0, "mrg_rxbuf": 0}, 1500),
    ({"server": 1, "in_order": 0, "queue_size": 256}, {"packed_vq": 1, "vectorized": 1, "mrg_rxbuf": 0}, 600),
    ({"server": 1, "packed_vq": 1, "in_order": 0}, {"server": 1, "packed_vq": 1, "queue_size": 64}, 1000),
]


# What makes DPDK say which of its receive and transmit functions it takes, and lets it take the vectorized ones.
VERBOSE = ["--log-level=pmd.net.virtio*:info", "--force-max-simd-bitwidth=512"]


def functions(wish: dict[str, int]) -> tuple[str, str]:
    """Those for a device's options (virtio_dev_configure and set_rxtx_funcs of DPDK 22.11)."""
    order, merge, vector = wish.get("in_order", 1), wish.get("mrg_rxbuf", 1), wish.get("vectorized", 0)
    plain = "mergeable buffer" if merge else "standard"
    if wish.get("packed_vq"):
        vector &= order and has_avx512()
        receive = f"packed ring {'vectorized' if vector and not merge else plain}"
        return receive, f"packed ring {'vectorized' if vector else 'standard'}"
    if order:
        return "inorder", "inorder"
    return "vectorized" if vector and not merge else plain, "standard"


def has_avx512() -> int:
    return int("avx512f" in Path("/proc/cpuinfo").read_text())


def spelled(value: object) -> str:
    return " ".join(f"{key}={option}" for key, option in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("left", "right", "length"), LAYOUTS, ids=spelled)
def test_two_dpdk_ports_of_any_ring_layouts_bounce_frames_and_every_one_is_counted(
    tmp_path: Path, net: topology.Topology, left: dict[str, int], right: dict[str, int], length: int
) -> None:
    macs, wishes, names = (MAC, "52:54:00:00:00:02"), (left, right), ("left", "right")
    queues = [wish.get("queues", 1) for wish in wishes]
    guests, devices = [], []
    for number, (name, mac, wish) in enumerate(zip(names, macs, wishes, strict=True)):
        path = tmp_path / f"{name}.socket"
        mode = ",client=true" if wish.get("server") else ""
        guests.append(f"{name},socket={path},mac={mac},queues={queues[number]}{mode}")
        devices.append(virtio_user(path, mac, number, wish))
    options = ["--forward-mode=io", *frames(length), f"--eth-peer=0,{macs[1]}", f"--eth-peer=1,{macs[0]}"]
    options += [f"--rxq={min(queues)}", f"--txq={min(queues)}"]
    with (
        backend(net, tmp_path, *guests, netdev=False) as daemon,
        Pmd("client", tmp_path, devices, options, eal=VERBOSE) as client,
    ):
        said = client.log.read_text()
        for number, wish in enumerate(wishes):
            client.await_link(number)
            for direction, function in zip(("Rx", "Tx"), functions(wish), strict=True):
                assert f"using {function} {direction} path on port {number}\n" in said
        for name, wish in zip(names, wishes, strict=True):
            port = daemon.port(name)
            assert port.guest is not None
            for option, (feature, default) in ASKED.items():
                assert (feature in port.guest.features) == bool(wish.get(option, default)), port.guest.features
            assert ("VIRTIO_NET_F_MQ" in port.guest.features) == (wish.get("queues", 1) > 1)
            assert port.queues[0].tx_ring is not None
            assert port.queues[0].tx_ring.size == wish.get("queue_size", 1024)
        client.command("start tx_first 4")
        until(lambda: all(sends(daemon, name, min(queues)) for name in names))
        client.command("stop")
        daemon.settled()
        client.command("set fwd rxonly")  # takes what is still in the rings, and sends nothing
        client.command("start")
        until_equal(lambda: [client.stats(number).rx_packets for number in range(2)], received(daemon, names))
        client.command("stop")
        sent = [client.stats(number).tx_packets for number in range(2)]
        ports = [daemon.port(name) for name in names]
        assert sent == [sum(queue.tx.packets for queue in port.queues) for port in ports]
        lost = [sum(sum(queue.rx.drops.values()) for queue in port.queues) for port in ports]
        assert sent == [got + gone for got, gone in zip(received(daemon, names)[::-1], lost[::-1], strict=True)]
        for port in ports:
            assert all(queue.tx.packets > 0 for queue in port.queues[: min(queues)])
            assert all(queue.tx_ring is not None and not queue.tx_ring.broken for queue in port.queues)
            assert all(queue.tx.bytes == queue.tx.packets * length for queue in port.queues)


def received(daemon: Backend, names: Sequence[str]) -> list[int]:
    return [sum(queue.rx.packets for queue in daemon.port(name).queues) for name in names]


def test_dpdk_may_come_and_go(net: topology.Topology, tmp_path: Path) -> None:
    socket = tmp_path / "guest.socket"
    with backend(net, tmp_path, f"dpdk,socket={socket},mac={MAC}") as daemon:
        before = 0
        for visit in range(2):
            with Pmd(f"visit{visit}", tmp_path, [virtio_user(socket)], TX_ONLY) as client:
                client.await_link()
                client.command("start")
                until(lambda: sends(daemon, "dpdk", more_than=before))  # noqa: B023
                client.command("stop")
                sent = client.stats().tx_packets
                until_equal(lambda: daemon.port("dpdk").queues[0].tx.packets, before + sent)
                before += sent


@pytest.mark.parametrize("end", [Backend.kill, Backend.stop], ids=["killed", "ended"])
@pytest.mark.parametrize("options", [{}, {"packed_vq": 1}, {"queues": 2, "in_order": 0}], ids=str)
def test_39_dpdk_goes_on_behind_the_next_daemon_under_traffic(
    net: topology.Topology, tmp_path: Path, options: dict[str, int], end: Callable[[Backend], object]
) -> None:
    """It listens, so that it is connected to again; both ways."""
    socket, queues = tmp_path / "guest.socket", options.get("queues", 1)
    device = virtio_user(socket, options=options | {"server": 1})
    words = [*TX_ONLY, f"--rxq={queues}", f"--txq={queues}"]
    with (
        backend(net, tmp_path, f"dpdk,socket={socket},mac={MAC},queues={queues},client=true") as daemon,
        Pmd("client", tmp_path, [device], words) as client,
    ):
        client.await_link()
        client.command("start")
        for _ in range(3):
            until(lambda: sends(daemon, "dpdk", queues))
            end(daemon)
            daemon.start()
        until(lambda: sends(daemon, "dpdk", queues))
        client.command("stop")
        client.command("set fwd rxonly")
        client.command("start")
        net.far.run(sys.executable, "-m", "tests.rig.blast", topology.FAR_IF, MAC, str(FRAMES))
        until_equal(lambda: delivered_and_dropped(daemon) >= FRAMES, True)
        until(lambda: client.stats().rx_packets > 0)
        client.command("stop")
        ports = daemon.port("dpdk").queues
        assert not any(ring.broken for queue in ports for ring in (queue.rx_ring, queue.tx_ring) if ring)


def delivered_and_dropped(daemon: Backend) -> int:
    """Frames from the wire, wherever they ended: in the guest, in a drop counter of ours or in one of the kernel's."""
    snapshot = daemon.snapshot()
    (netdev,) = (port for port in snapshot.ports if port.netdev)
    xsk = netdev.queues[0].xsk
    assert xsk is not None
    lost = ("rx_dropped", "rx_ring_full", "rx_fill_ring_empty_descs")
    of_the_kernel: int = sum(getattr(xsk.statistics, name) for name in lost)
    return snapshot.totals.frames_out + snapshot.totals.drops + of_the_kernel
