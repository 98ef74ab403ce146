"""AF_XDP transmit on a veth pair, without an XDP program: what the guest sends is what the far end sees."""

import socket
from collections.abc import Iterator

import pytest

from tests.rig.driver import LAYOUTS, Layout
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, both_layouts, frame, mac
from tests.rig.netns import Veth, command, needs_root, remove, veth
from tests.rig.rings import INDIRECT_DESC, MODERN, VERSION_1
from tests.rig.waiting import eventually, once_free
from xdpnet import core
from xdpnet.counters import Traffic

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

FAR = mac(99)
LONGEST = 1518


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=4, frames_per_queue=256)


@pytest.fixture
def pair() -> Iterator[Veth]:
    with veth(queues=2) as made:
        yield made


def open_queue(port: core.Netdev, queue: int, ifname: str) -> None:
    once_free(lambda: port.open_queue(queue, socket.if_nametoindex(ifname), LONGEST))


@pytest.fixture
def port(bridge: core.Bridge, pair: Veth) -> core.Netdev:
    made = bridge.add_netdev(2)
    made.set_mac(FAR, False)
    open_queue(made, 0, pair.ifname)
    return made


def tx(bridge: core.Bridge, port: core.Netdev, queue: int = 0) -> Traffic:
    return port.queue_stats(queue, core.TX)


def drops(stats: Traffic) -> dict[str, int]:
    return {name: n for name, n in stats.drops.items() if n}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_frames_leave_byte_for_byte(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev, layout: Layout
) -> None:
    a = guests(bridge, features=VERSION_1 | INDIRECT_DESC)
    with pair.wire() as wire:
        for size in 60, 61, 64, 1000, 1514:
            a.pair.send(frame(FAR, mac(1), size), layout)
            assert wire.receive() == frame(FAR, mac(1), size)
    assert a.pair.wait_sent()
    assert (tx(bridge, port).packets, tx(bridge, port).bytes) == (5, 60 + 61 + 64 + 1000 + 1514)


@pytest.mark.parametrize("size", [14, 15, 32, 33, 59])
def test_c13_short_frames_are_padded_with_zeroes_never_with_another_s_bytes(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev, size: int
) -> None:
    a = guests(bridge)
    secret = b"secret" * 200
    with pair.wire() as wire:
        for _ in range(130):  # every frame of the arena has held it
            a.pair.send(frame(FAR, mac(1), 1200, mark=secret))
            assert a.pair.wait_sent()
        assert wire.count(lambda each: secret[:1000] in each, 130) == 130
        for _ in range(130):
            a.pair.send(frame(FAR, mac(1), size))
            assert wire.receive() == frame(FAR, mac(1), size).ljust(60, b"\0")


@pytest.mark.parametrize(("size", "passes"), [(LONGEST, True), (LONGEST + 1, False), (65535, False)])
def test_c14_a_frame_longer_than_the_interface_carries_is_dropped(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev, size: int, passes: bool
) -> None:
    a = guests(bridge)
    # 4 bytes more than header and MTU: those of a VLAN tag.
    sent = frame(FAR, mac(1), size, vlan=7)
    with pair.wire() as wire:
        a.pair.send(sent)
        assert a.pair.wait_sent()
        a.pair.send(frame(FAR, mac(1), mark=b"next"))
        assert wire.receive(lambda each: b"next" in each) is not None
    assert drops(tx(bridge, port)) == ({} if passes else {"oversize": 1})
    assert tx(bridge, port).packets == 1 + passes


@both_layouts
def test_b44_thousands_of_frames_leave_in_order_and_none_is_lost(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev
) -> None:
    """More than the arena has frames: the guest waits, it does not lose."""
    a = guests(bridge)
    sent = [frame(FAR, mac(1), 60, mark=i.to_bytes(4, "big")) for i in range(4000)]
    with pair.wire() as wire:
        for start in range(0, 4000, 500):
            a.pair.send_all(sent[start : start + 500])
            assert [wire.receive() for _ in range(500)] == sent[start : start + 500]
    assert drops(tx(bridge, port)) == {}
    assert eventually(lambda: port.xsk_stats(0).tx_invalid_descs == 0)


def test_an_interface_that_is_down_loses_frames_in_a_counter_and_recovers(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev
) -> None:
    a = guests(bridge)
    bridge.events()
    command("ip", "link", "set", pair.ifname, "down")
    for _ in range(5):
        a.pair.send(frame(FAR, mac(1)))
        assert a.pair.wait_sent()
    assert eventually(lambda: drops(tx(bridge, port)).get("not_ready", 0) >= 1)
    assert bridge.events() & core.EVENT_SOCKET
    assert tx(bridge, port).packets + sum(tx(bridge, port).drops.values()) == 5
    command("ip", "link", "set", pair.ifname, "up")
    with pair.wire() as wire:

        def gets_through() -> bool:
            a.pair.send(frame(FAR, mac(1), mark=b"back"))
            return wire.receive(lambda each: b"back" in each, timeout=0.1) is not None

        assert eventually(gets_through)
    assert bridge.events() & core.EVENT_SOCKET


def test_an_interface_that_goes_away_stops_no_guest(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev
) -> None:
    a, b = guests(bridge), guests(bridge)
    b.port.set_mac(mac(2), False)
    b.pair.fill()
    remove(pair.ifname)
    for _ in range(5):
        a.pair.send(frame(FAR, mac(1)))
        assert a.pair.wait_sent()
    assert eventually(lambda: drops(tx(bridge, port)).get("not_ready", 0) >= 1)
    a.pair.send(frame(mac(2), mac(1)))
    assert b.pair.frames() == [frame(mac(2), mac(1))]
    port.close_queue(0)
    a.pair.send(frame(FAR, mac(1)))
    assert a.pair.wait_sent()


def test_a_queue_is_closed_and_opened_again_while_frames_flow(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev
) -> None:
    a = guests(bridge)
    for _ in range(5):
        for _ in range(64):
            a.pair.queue(frame(FAR, mac(1)))
        a.pair.tx.kick()
        port.close_queue(0)
        assert a.pair.wait_sent()
        open_queue(port, 0, pair.ifname)
    assert tx(bridge, port).packets + sum(tx(bridge, port).drops.values()) == 5 * 64
    with pair.wire() as wire:
        a.pair.send(frame(FAR, mac(1), mark=b"on"))
        assert wire.receive(lambda each: b"on" in each) is not None


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_on_several_or_shared_sockets(
    make_bridge: MakeBridge, guests: MakeGuest, pair: Veth, workers: int
) -> None:
    bridge = make_bridge(workers=workers, netdev_queues=2, frames_per_queue=1024)
    port = bridge.add_netdev(2)
    port.set_mac(FAR, False)
    for queue in range(2):
        open_queue(port, queue, pair.ifname)
    a = guests(bridge, pairs=workers)
    sent = [frame(FAR, mac(1), mark=bytes([number, i])) for number in range(workers) for i in range(100)]
    with pair.wire() as wire:
        for number, each in enumerate(a.pairs):
            for i in range(100):
                each.queue(sent[100 * number + i])
        for each in a.pairs:
            each.tx.kick()
        for each in a.pairs:
            assert each.wait_sent()
        got = [wire.receive() for _ in sent]
    for number in range(workers):
        mine = [each for each in got if each is not None and each[14] == number]
        assert mine == sent[100 * number : 100 * number + 100]
    assert sum(tx(bridge, port, queue).packets for queue in range(2)) == len(sent)


def test_the_limits_of_opening_a_socket(make_bridge: MakeBridge, pair: Veth) -> None:
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256)
    port = bridge.add_netdev(2)
    index = socket.if_nametoindex(pair.ifname)
    with pytest.raises(OSError, match="No such device"):
        port.open_queue(0, 999999, LONGEST)
    with pytest.raises(OSError, match="No such file"):
        port.open_queue(2, index, LONGEST)
    open_queue(port, 0, pair.ifname)
    with pytest.raises(OSError, match="already"):
        port.open_queue(0, index, LONGEST)
    stats = port.xsk_stats(0)
    assert (stats.open, stats.frames_fill, stats.frames_free + stats.frames_tx) == (True, 128, 128)


def test_a_broadcast_goes_to_the_wire_and_to_the_other_guests(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, port: core.Netdev
) -> None:
    a, b = guests(bridge, features=MODERN), guests(bridge)
    b.pair.fill()
    with pair.wire() as wire:
        a.pair.send(frame(BROADCAST, mac(1)))
        assert wire.receive() == frame(BROADCAST, mac(1))
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]
    assert a.stats(core.TX).copies == 1
