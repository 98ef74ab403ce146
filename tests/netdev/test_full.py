"""An interface that takes no more frames: the guest waits for it, but not for ever, and what is lost is counted."""

import socket
from collections.abc import Iterator

import pytest

from tests.rig.guests import MakeBridge, MakeGuest, frame, mac
from tests.rig.netns import Held, Veth, needs_root, veth
from tests.rig.rings import MIB, Span
from tests.rig.waiting import eventually
from xdpnet import core
from xdpnet.counters import Traffic
from xdpnet.netdev.fitness import ETH_OVERHEAD

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

FAR = mac(99)
ROOM = (Span(0x4000_0000, 32 * MIB, 0x7F12_0000_0000, 0x1000),)
PATIENCE_US = 1_000_000  # that a guest is kept waiting, c/port/netdev_tx.c
FRAMES = 200  # more than the socket has room for


@pytest.fixture
def bridge(held_time: None, make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=1, frames_per_queue=256)


@pytest.fixture(params=[1500, 9000])
def mtu(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def pair(mtu: int) -> Iterator[Veth]:
    with veth(mtu=mtu) as made:
        yield made


def test_a_guest_waits_a_second_for_an_interface_that_takes_nothing_and_then_loses_frames(
    bridge: core.Bridge, guests: MakeGuest, pair: Veth, mtu: int
) -> None:
    held = Held(pair)
    for name in "hold0", "hold1", "hold":
        pair.namespace.run("ip", "link", "set", name, "mtu", "9000")
    shape = ("tbf", "rate", "8bit", "burst", "10000", "limit", "10mb")
    pair.namespace.run("tc", "qdisc", "replace", "dev", "hold0", "root", *shape)
    port = bridge.add_netdev(1)
    port.set_mac(FAR, False)
    port.open_queue(0, socket.if_nametoindex(pair.ifname), mtu + ETH_OVERHEAD)
    a = guests(bridge, num=512, spans=ROOM)

    def tx() -> Traffic:
        return port.queue_stats(0, core.TX)

    def is_full() -> bool:
        """And has been looked at since: the guest waits."""
        before = tx().packets
        bridge.time_advance(0)
        return port.xsk_stats(0).frames_free < 3 and tx().packets == before

    for i in range(FRAMES):
        a.pair.queue(frame(FAR, mac(1), mtu + 14, mark=i.to_bytes(4, "big")))
    a.pair.tx.kick()
    assert eventually(is_full)
    bridge.time_advance(PATIENCE_US)
    sent = tx().packets
    bridge.time_advance(0)
    assert tx().packets == sent < FRAMES
    assert tx().drops["no_frame"] == 0
    assert a.stats(core.TX).packets == sent
    bridge.time_advance(1)
    assert a.pair.wait_sent()
    assert tx().packets + tx().drops["no_frame"] == FRAMES
    assert tx().drops["no_frame"] > 0
    held.release()
    with pair.wire() as wire:

        def gets_through() -> bool:
            a.pair.send(frame(FAR, mac(1), mark=b"again"))
            return wire.receive(lambda each: b"again" in each, timeout=0.1) is not None

        assert eventually(gets_through)
