"""What the calls of the control side refuse: ports, rings and queues that are not there, or of the other kind."""

from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from tests.guests import MakeBridge, mac
from tests.rings import ONE_REGION
from xdpnet import core

pytest_plugins = ["tests.guest_fixtures"]
pytestmark = pytest.mark.core

Call = Callable[[core.Bridge, int, int], object]

REGION = core.Region(ONE_REGION[0].guest_addr, ONE_REGION[0].size, ONE_REGION[0].user_addr, 0, -1)
RING = core.RingConfig(num=256, base=0, desc_addr=0, avail_addr=0, used_addr=0)

OF_GUESTS: dict[str, Call] = {
    "set memory": lambda bridge, port, _: bridge.guest_set_memory(port, []),
    "add region": lambda bridge, port, _: bridge.guest_add_region(port, REGION),
    "remove region": lambda bridge, port, _: bridge.guest_remove_region(port, REGION),
    "set features": lambda bridge, port, _: bridge.guest_set_features(port, 0),
    "set ips": lambda bridge, port, _: bridge.guest_set_ips(port, [IPv4Address("10.0.0.1")]),
    "remember": lambda bridge, port, _: bridge.guest_remember(port, mac(1), 0),
    "stray": lambda bridge, port, _: bridge.guest_stray(port),
    "announce": lambda bridge, port, _: bridge.guest_announce(port, mac(1)),
}
OF_RINGS: dict[str, Call] = {
    "start": lambda bridge, port, ring: bridge.ring_start(port, ring, RING),
    "stop": lambda bridge, port, ring: bridge.ring_stop(port, ring),
    "enable": lambda bridge, port, ring: bridge.ring_enable(port, ring, True),
    "set call": lambda bridge, port, ring: bridge.ring_set_call(port, ring, -1),
    "set err": lambda bridge, port, ring: bridge.ring_set_err(port, ring, -1),
    "state": lambda bridge, port, ring: bridge.ring_state(port, ring),
}
OF_NETDEVS: dict[str, Call] = {
    "add address": lambda bridge, port, _: bridge.netdev_add_mac(port, mac(1)),
    "remove address": lambda bridge, port, _: bridge.netdev_remove_mac(port, mac(1)),
    "compare memory": lambda bridge, port, _: bridge.netdev_is_stale(port, "off"),
    "set group socket": lambda bridge, port, _: bridge.netdev_set_group_fd(port, -1),
}
OF_QUEUES: dict[str, Call] = {
    "open": lambda bridge, port, queue: bridge.netdev_open_queue(port, queue, 1, 1518),
    "close": lambda bridge, port, queue: bridge.netdev_close_queue(port, queue),
    "socket": lambda bridge, port, queue: bridge.netdev_queue_fd(port, queue),
    "socket statistics": lambda bridge, port, queue: bridge.netdev_xsk_stats(port, queue),
}
OF_ANY: dict[str, Call] = {
    "remove": lambda bridge, port, _: bridge.remove_port(port),
    "set address": lambda bridge, port, _: bridge.set_mac(port, mac(1), False),
    "flush": lambda bridge, port, _: bridge.fdb_flush(port),
    "statistics": lambda bridge, port, _: bridge.queue_stats(port, 0, core.RX),
}
EVERY = OF_GUESTS | OF_RINGS | OF_NETDEVS | OF_QUEUES | OF_ANY


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=1)


def by_name(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", calls.values(), ids=calls)


def is_not_found(call: Call, bridge: core.Bridge, port: int, at: int = 0) -> None:
    with pytest.raises(OSError, match="No such file"):
        call(bridge, port, at)


@by_name(EVERY)
def test_a_port_that_is_not_there_or_no_longer_is_not_found(bridge: core.Bridge, call: Call) -> None:
    gone, other = bridge.add_guest(1), bridge.add_netdev(1)
    bridge.remove_port(gone)
    bridge.remove_port(other)
    for port in gone, other, core.MAX_PORTS - 1, core.MAX_PORTS, 0xFFFFFFFF:
        is_not_found(call, bridge, port)


@by_name(OF_GUESTS | OF_RINGS)
def test_a_netdev_is_no_guest(bridge: core.Bridge, call: Call) -> None:
    is_not_found(call, bridge, bridge.add_netdev(1))


@by_name(OF_NETDEVS | OF_QUEUES)
def test_a_guest_is_no_netdev(bridge: core.Bridge, call: Call) -> None:
    is_not_found(call, bridge, bridge.add_guest(1))


@by_name(OF_RINGS)
def test_a_guest_has_two_rings_a_pair_and_no_more(bridge: core.Bridge, call: Call) -> None:
    port = bridge.add_guest(2)
    for ring in 4, 0xFFFFFFFF:
        is_not_found(call, bridge, port, ring)


@by_name(OF_QUEUES)
def test_a_netdev_has_the_queues_it_was_made_with_and_no_more(bridge: core.Bridge, call: Call) -> None:
    port = bridge.add_netdev(2)
    for queue in 2, 0xFFFFFFFF:
        is_not_found(call, bridge, port, queue)


@pytest.mark.parametrize("queues", [0, core.MAX_NETDEV_QUEUES + 1])
def test_a_netdev_of_no_or_too_many_queues_is_refused(bridge: core.Bridge, queues: int) -> None:
    with pytest.raises(OSError, match=f"add netdev port of {queues} queues: Invalid argument"):
        bridge.add_netdev(queues)


def test_the_most_queues_that_a_netdev_can_have(bridge: core.Bridge) -> None:
    port = bridge.add_netdev(core.MAX_NETDEV_QUEUES)
    assert bridge.queue_stats(port, core.MAX_NETDEV_QUEUES - 1, core.TX).packets == 0
    with pytest.raises(OSError, match="No such file"):
        bridge.queue_stats(port, core.MAX_NETDEV_QUEUES, core.TX)
