"""What the calls of the control side refuse: ports, rings and queues that are not there, or of the other kind."""

from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from tests.rig.guests import MakeBridge, mac
from tests.rig.rings import ONE_REGION
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = pytest.mark.core

Call = Callable[[core.Bridge, int, int], object]

REGION = core.Region(ONE_REGION[0].guest_addr, ONE_REGION[0].size, ONE_REGION[0].user_addr, 0, -1)
RING = core.RingConfig(num=256, base=0, desc_addr=0, avail_addr=0, used_addr=0)

OF_GUESTS: dict[str, Call] = {
    "set memory": lambda bridge, port, _: core.Guest(bridge, port).set_memory([]),
    "add region": lambda bridge, port, _: core.Guest(bridge, port).add_region(REGION),
    "remove region": lambda bridge, port, _: core.Guest(bridge, port).remove_region(REGION),
    "set features": lambda bridge, port, _: core.Guest(bridge, port).set_features(0),
    "set ips": lambda bridge, port, _: core.Guest(bridge, port).set_ips([IPv4Address("10.0.0.1")]),
    "remember": lambda bridge, port, _: core.Guest(bridge, port).remember(mac(1), 0),
    "stray": lambda bridge, port, _: core.Guest(bridge, port).stray(),
    "offence": lambda bridge, port, _: core.Guest(bridge, port).offence("spoof"),
    "faults": lambda bridge, port, _: core.Guest(bridge, port).faults(),
    "announce": lambda bridge, port, _: core.Guest(bridge, port).announce(mac(1)),
}
OF_RINGS: dict[str, Call] = {
    "start": lambda bridge, port, ring: core.Guest(bridge, port).ring_start(ring, RING),
    "stop": lambda bridge, port, ring: core.Guest(bridge, port).ring_stop(ring),
    "enable": lambda bridge, port, ring: core.Guest(bridge, port).ring_enable(ring, True),
    "set call": lambda bridge, port, ring: core.Guest(bridge, port).ring_set_call(ring, -1),
    "set err": lambda bridge, port, ring: core.Guest(bridge, port).ring_set_err(ring, -1),
    "state": lambda bridge, port, ring: core.Guest(bridge, port).ring_state(ring),
}
OF_NETDEVS: dict[str, Call] = {
    "add address": lambda bridge, port, _: core.Netdev(bridge, port).add_mac(mac(1)),
    "remove address": lambda bridge, port, _: core.Netdev(bridge, port).remove_mac(mac(1)),
    "look whether memory is lent": lambda bridge, port, _: core.Netdev(bridge, port).lends,
    "compare memory": lambda bridge, port, _: core.Netdev(bridge, port).is_stale("off"),
    "set group socket": lambda bridge, port, _: core.Netdev(bridge, port).set_group_fd(-1),
}
OF_QUEUES: dict[str, Call] = {
    "open": lambda bridge, port, queue: core.Netdev(bridge, port).open_queue(queue, 1, 1518),
    "close": lambda bridge, port, queue: core.Netdev(bridge, port).close_queue(queue),
    "socket": lambda bridge, port, queue: core.Netdev(bridge, port).queue_fd(queue),
    "socket statistics": lambda bridge, port, queue: core.Netdev(bridge, port).xsk_stats(queue),
}
OF_ANY: dict[str, Call] = {
    "remove": lambda bridge, port, _: core.Port(bridge, port).remove(),
    "set address": lambda bridge, port, _: core.Port(bridge, port).set_mac(mac(1), False),
    "cycles": lambda bridge, port, _: core.Port(bridge, port).cycles(),
    "flush": lambda bridge, port, _: core.Port(bridge, port).flush(),
    "statistics": lambda bridge, port, _: core.Port(bridge, port).queue_stats(0, core.RX),
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
    gone.remove()
    other.remove()
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
    assert port.queue_stats(core.MAX_NETDEV_QUEUES - 1, core.TX).packets == 0
    with pytest.raises(OSError, match="No such file"):
        port.queue_stats(core.MAX_NETDEV_QUEUES, core.TX)


def test_an_error_says_whose_port_it_is_and_of_one_without_a_name_its_number(bridge: core.Bridge) -> None:
    web, eth, plain = bridge.add_guest(1, "web"), bridge.add_netdev(1, "eth1"), bridge.add_guest(1)
    for port, label in (web, "guest web"), (eth, "interface eth1"), (plain, f"port {plain + 0}"):
        assert port.label == label
        with pytest.raises(OSError, match=f"read queue 9 of {label}: No such file"):
            port.queue_stats(9, core.RX)


def test_a_port_is_the_number_by_which_the_core_means_it(bridge: core.Bridge) -> None:
    guest = bridge.add_guest(1, "web")
    guest.set_mac(mac(1), True)
    assert [entry.port for entry in bridge.fdb_dump()] == [guest]
    assert {guest: "web"}[int(guest)] == "web"  # type: ignore[index]
