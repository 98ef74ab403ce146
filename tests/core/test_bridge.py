"""The bridge between guests: flooding, learning, ageing, own addresses, and where a frame is counted."""

from contextlib import closing

import pytest

from tests.rig.driver import Driver, ledger
from tests.rig.guests import BROADCAST, MULTICAST, MakeBridge, MakeGuest, frame, mac, rarp
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = pytest.mark.core

ZERO = bytes(6)


def three(bridge: core.Bridge, guests: MakeGuest) -> list[Driver]:
    made = [guests(bridge) for _ in range(3)]
    for driver in made:
        driver.pair.fill()
    return made


def known(bridge: core.Bridge) -> set[tuple[bytes, int, int]]:
    return {(entry.mac, entry.vlan, entry.port) for entry in bridge.fdb_dump()}


def send(driver: Driver, *frames: bytes) -> None:
    driver.pair.send_all(frames)


def received(driver: Driver) -> list[bytes]:
    """What is there once the sender's ring is empty: frames arrive before they are handed back."""
    return [packet.frame for packet in driver.pair.packets()]


# ---- flooding and learning ----


@pytest.mark.parametrize("to", [BROADCAST, MULTICAST, mac(99), ZERO], ids=["broadcast", "multicast", "unknown", "zero"])
def test_a_frame_for_all_goes_to_all_others_and_not_back(bridge: core.Bridge, guests: MakeGuest, to: bytes) -> None:
    drivers = three(bridge, guests)
    for source in range(3):
        send(drivers[source], frame(to, mac(source)))
        got = [received(driver) for driver in drivers]
        assert got == [[] if i == source else [frame(to, mac(source))] for i in range(3)]
        assert drivers[source].stats(core.TX).copies == 1


@pytest.mark.parametrize("before", [mac(1), mac(2), BROADCAST], ids=bytes.hex)
@pytest.mark.parametrize("ageing_s", [0, 300])
def test_the_address_of_all_zeroes_is_unknown_wherever_it_stands_in_a_burst(
    make_bridge: MakeBridge, guests: MakeGuest, before: bytes, ageing_s: int
) -> None:
    drivers = three(make_bridge(ageing_s=ageing_s), guests)
    send(drivers[2], frame(BROADCAST, mac(2)))
    for driver in drivers:
        received(driver)
    for frames in [frame(ZERO, mac(1))], [frame(before, mac(1)), frame(ZERO, mac(1))]:
        send(drivers[1], *frames)
        assert frame(ZERO, mac(1)) in received(drivers[0])
        assert frame(ZERO, mac(1)) in received(drivers[2])


def test_a_frame_to_an_address_that_was_learned_goes_there_alone(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    bridge.events()
    send(drivers[1], frame(BROADCAST, mac(1)))
    assert known(bridge) == {(mac(1), 0, drivers[1].port)}
    assert bridge.events() == core.EVENT_FDB
    for driver in drivers:
        received(driver)
    send(drivers[0], frame(mac(1), mac(0)))
    assert [received(driver) for driver in drivers] == [[], [frame(mac(1), mac(0))], []]
    assert drivers[0].stats(core.TX).copies == 0


def test_an_address_that_moves_is_followed(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    for place in (1, 2, 1):
        send(drivers[place], frame(BROADCAST, mac(7)))
        assert known(bridge) == {(mac(7), 0, drivers[place].port)}


def test_addresses_are_learned_per_vlan(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, mac(1), vlan=5))
    assert known(bridge) == {(mac(1), 5, drivers[1].port)}
    for driver in drivers:
        received(driver)
    send(drivers[0], frame(mac(1), mac(0), vlan=5))
    assert [len(received(driver)) for driver in drivers] == [0, 1, 0]
    send(drivers[0], frame(mac(1), mac(0), vlan=6), frame(mac(1), mac(0)))
    assert [len(received(driver)) for driver in drivers] == [0, 2, 2]


def test_priority_bits_are_no_part_of_the_vlan(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, mac(1), vlan=0xE005))
    assert known(bridge) == {(mac(1), 5, drivers[1].port)}


def test_the_reserved_vlan_4095_makes_no_address_that_lasts(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(max_macs=4, ageing_s=1)
    drivers = three(bridge, guests)
    send(drivers[1], *(frame(BROADCAST, mac(i), vlan=0xFFF) for i in range(10, 20)))
    assert not any(entry.is_static for entry in bridge.fdb_dump())
    assert len(bridge.fdb_dump()) == 4
    for driver in drivers:
        received(driver)
    # Nor one that keeps others from using theirs.
    send(drivers[2], frame(BROADCAST, mac(10)))
    assert drivers[2].drops(core.TX) == {}
    send(drivers[0], frame(mac(10), mac(0)))
    assert frame(mac(10), mac(0)) in received(drivers[2])
    for driver in drivers:
        driver.stop()
    bridge.time_advance(2_000_000)
    assert bridge.fdb_dump() == []


def test_addresses_of_a_guest_that_is_gone_age_and_are_flooded_again(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(ageing_s=300)
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, mac(1)))
    bridge.time_advance(1_000_000_000)
    assert len(bridge.fdb_dump()) == 1
    drivers[1].stop()

    def flooded() -> bool:
        received(drivers[2])
        send(drivers[0], frame(mac(1), mac(0)))
        return len(received(drivers[2])) == 1

    assert not flooded()
    bridge.time_advance(300_000_000)
    assert not flooded()
    bridge.time_advance(1_000_000)
    assert flooded()
    assert known(bridge) == {(mac(0), 0, drivers[0].port)}


def test_46_what_a_guest_has_taught_is_known_while_it_is_here_however_silent_it_is(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(ageing_s=1)
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, mac(1)), frame(BROADCAST, mac(1), vlan=5))
    for driver in drivers:
        received(driver)
    bridge.time_advance(3600 * 1_000_000)
    for vlan in (None, 5):
        send(drivers[0], frame(mac(1), mac(0), vlan=vlan))
    assert [len(received(driver)) for driver in drivers] == [0, 2, 0]
    # A driver's reset takes a moment.
    for ring in range(2):
        drivers[1].restart(ring)
    bridge.time_advance(1_000_000)
    assert (mac(1), 5, drivers[1].port) in known(bridge)
    # Until another has it.
    send(drivers[2], frame(BROADCAST, mac(1)))
    assert {port for address, vlan, port in known(bridge) if address == mac(1)} == {drivers[1].port, drivers[2].port}


def test_46_of_a_share_that_is_full_what_has_aged_gives_way_the_longest_silent_first(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(max_macs=3, ageing_s=300)
    drivers = three(bridge, guests)
    for number in (10, 11, 12):
        send(drivers[1], frame(BROADCAST, mac(number)))
        bridge.time_advance(1_000_000)
    bridge.time_advance(300_000_000)
    send(drivers[1], frame(BROADCAST, mac(11)))
    for number in (13, 14, 15):
        send(drivers[1], frame(BROADCAST, mac(number)))
    assert {address for address, _, _ in known(bridge)} == {mac(11), mac(13), mac(14)}
    assert drivers[1].stats(core.TX).unlearned == 1


def test_46_what_a_guest_taught_an_earlier_bridge_is_known_to_this_one(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[1].port.remember(mac(1), 0)
    drivers[1].port.remember(mac(1), 4095)
    assert bridge.events() == core.EVENT_FDB
    assert bridge.taught() == {(drivers[1].port, mac(1), 0), (drivers[1].port, mac(1), 4095)}
    send(drivers[0], frame(mac(1), mac(0)))
    assert [len(received(driver)) for driver in drivers] == [0, 1, 0]


def test_46_no_guest_remembers_what_is_not_its_own(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(max_macs=2)
    checked, free, owner = three(bridge, guests)
    checked.port.set_mac(mac(0), True)
    owner.port.set_mac(mac(9), False)
    for port, address in ((checked.port, mac(1)), (checked.port, mac(0)), (free.port, mac(9)), (free.port, mac(0))):
        with pytest.raises(PermissionError):
            port.remember(address, 0)
    for wrong, vlan in ((BROADCAST, 0), (MULTICAST, 0), (ZERO, 0), (mac(1), 4096), (mac(1), 0xFFFF)):
        with pytest.raises(OSError, match="Invalid argument"):
            free.port.remember(wrong, vlan)
    with pytest.raises(FileNotFoundError):
        core.Guest(bridge, 77).remember(mac(1), 0)
    with pytest.raises(ValueError, match="5 bytes"):
        free.port.remember(bytes(5), 0)
    for number in (1, 2):
        free.port.remember(mac(number), 0)
    with pytest.raises(OSError, match="No space"):
        free.port.remember(mac(3), 0)
    assert bridge.taught() == {(free.port, mac(1), 0), (free.port, mac(2), 0)}


def test_without_ageing_nothing_is_forgotten(held_time: None, make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(ageing_s=0)
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, mac(1)))
    bridge.time_advance(3600 * 24 * 365 * 1_000_000)
    assert len(bridge.fdb_dump()) == 1


def test_c32_a_port_teaches_only_its_share_of_addresses(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(max_macs=4)
    drivers = three(bridge, guests)
    send(drivers[1], *(frame(BROADCAST, mac(i)) for i in range(10, 15)))
    assert known(bridge) == {(mac(i), 0, drivers[1].port) for i in range(10, 14)}
    assert drivers[1].drops(core.TX) == {}  # what is not learned still goes its way
    assert drivers[1].stats(core.TX).unlearned == 1
    send(drivers[1], frame(BROADCAST, mac(13)))
    assert drivers[1].stats(core.TX).unlearned == 1
    send(drivers[2], frame(BROADCAST, mac(20)))
    assert (mac(20), 0, drivers[2].port) in known(bridge)


def test_addresses_that_have_aged_are_no_part_of_the_share(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """Nobody dumps the database meanwhile, which would remove them."""
    bridge = make_bridge(max_macs=2, ageing_s=300)
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, mac(10)), frame(BROADCAST, mac(11)))
    bridge.events()

    def learns_another() -> bool:
        send(drivers[1], frame(BROADCAST, mac(12)))
        for driver in drivers:
            received(driver)
            driver.pair.fill()
        return bool(bridge.events() & core.EVENT_FDB)

    bridge.time_advance(300_000_000)
    assert not learns_another()
    bridge.time_advance(1_000_000)
    assert learns_another()
    assert (mac(12), 0, drivers[1].port) in known(bridge)


def test_addresses_of_some_ports_are_those_of_the_dump(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[0].port.set_mac(mac(0), False)
    send(drivers[1], frame(BROADCAST, mac(1)), frame(BROADCAST, mac(1), vlan=7), frame(BROADCAST, mac(11)))
    send(drivers[2], frame(BROADCAST, mac(2)))
    assert bridge.addresses_of([drivers[0].port, drivers[1].port]) == {mac(0), mac(1), mac(11)}
    assert bridge.addresses_of([drivers[2].port]) == {mac(2)}
    assert bridge.addresses_of([]) == set()


def test_flush_forgets_what_a_port_taught_and_keeps_its_own_address(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[1].port.set_mac(mac(1), False)
    send(drivers[1], frame(BROADCAST, mac(1)), frame(BROADCAST, mac(11)))
    send(drivers[2], frame(BROADCAST, mac(2)))
    drivers[1].port.flush()
    assert known(bridge) == {(mac(1), 0xFFFF, drivers[1].port), (mac(2), 0, drivers[2].port)}


def test_a_removed_port_takes_its_addresses_along(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    port = bridge.add_guest(1)
    port.set_mac(mac(5), True)
    assert (mac(5), 0xFFFF, port) in known(bridge)
    port.remove()
    assert known(bridge) == set()
    send(drivers[0], frame(mac(5), mac(0)))
    assert len(received(drivers[1])) == 1


@pytest.mark.parametrize("size", [64, 30000])
@pytest.mark.parametrize("others", [1, 40])
def test_47_an_unknown_unicast_is_not_flooded_to_guests_that_have_their_own_addresses_only(
    bridge: core.Bridge, guests: MakeGuest, size: int, others: int
) -> None:
    """Of which there can be so many that a frame to all is sent in parts."""
    sender, free = guests(bridge), guests(bridge)
    free.pair.fill()
    checked = [guests(bridge) for _ in range(others)]
    for number, driver in enumerate(checked):
        driver.port.set_mac(mac(number), True)
        driver.pair.fill()
    to_all, to_nobody = (frame(to, mac(1000), size) for to in (BROADCAST, mac(999)))
    send(sender, to_all, to_nobody, to_nobody, to_all)
    assert free.pair.frames(4) == [to_all, to_nobody, to_nobody, to_all]
    for driver in checked:
        assert driver.pair.frames(2) == [to_all, to_all]
    assert sender.stats(core.TX).copies == 2 * others
    free.stop()
    send(sender, to_nobody)
    assert sender.drops(core.TX) == {"no_port": 1}
    into, out = ledger(bridge, {driver.port: 1 for driver in (sender, free, *checked)})
    assert into == out


# ---- steering ----


def test_64_a_guest_that_has_taught_an_address_waits_until_it_is_steered(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge()
    drivers = three(bridge, guests)

    def passes(driver: Driver, sent: bytes) -> bool:
        driver.pair.send(sent)
        bridge.time_advance(0)
        return driver.pair.wait_sent(0)

    # Where nobody steers there is nothing to wait for.
    assert passes(drivers[0], frame(BROADCAST, mac(0)))
    changes = bridge.fdb_changes()
    assert changes == 1
    bridge.fdb_steered(changes)
    assert passes(drivers[0], frame(BROADCAST, mac(0)))
    # The guest that it is of, and no other; until all that it has taught is steered.
    assert not passes(drivers[1], frame(BROADCAST, mac(1)))
    assert not passes(drivers[1], frame(mac(0), mac(1)))
    assert passes(drivers[0], frame(BROADCAST, mac(0)))
    bridge.fdb_steered(changes)
    assert not passes(drivers[1], frame(mac(0), mac(1)))
    changes = bridge.fdb_changes()
    assert changes == 2
    for driver in drivers:
        received(driver)
    bridge.fdb_steered(changes)
    assert drivers[1].pair.wait_sent()
    assert sorted(received(drivers[0])) == sorted([frame(BROADCAST, mac(1)), *[frame(mac(0), mac(1))] * 2])
    # From one guest to another an address is steered all the time.
    assert passes(drivers[2], frame(BROADCAST, mac(1)))
    assert bridge.fdb_changes() == changes
    # A control thread that is late is not waited for.
    assert not passes(drivers[2], frame(BROADCAST, mac(2)))
    bridge.time_advance(999_000)
    assert not drivers[2].pair.wait_sent(0)
    bridge.time_advance(1_000)
    assert drivers[2].pair.wait_sent()


# ---- own addresses ----


def test_a_port_with_an_own_address_gets_its_frames_on_every_vlan(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[1].port.set_mac(mac(1), False)
    frames = [frame(mac(1), mac(0), vlan=vlan) for vlan in (None, 0, 1, 4094, 4095)]
    send(drivers[0], *frames)
    assert received(drivers[1]) == frames
    assert received(drivers[2]) == []


def test_c22_nobody_else_can_teach_an_own_address(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[1].port.set_mac(mac(1), False)
    send(drivers[2], frame(BROADCAST, mac(1)), frame(BROADCAST, mac(1), vlan=7))
    assert drivers[2].drops(core.TX) == {"spoof": 2}
    assert known(bridge) == {(mac(1), 0xFFFF, drivers[1].port)}
    assert received(drivers[0]) == []


@pytest.mark.parametrize("source", [mac(2), ZERO, BROADCAST, MULTICAST], ids=bytes.hex)
def test_c22_a_checked_port_sends_from_its_own_address_alone(
    bridge: core.Bridge, guests: MakeGuest, source: bytes
) -> None:
    drivers = three(bridge, guests)
    drivers[1].port.set_mac(mac(1), True)
    good = [frame(BROADCAST, mac(1)), frame(mac(9), mac(1), vlan=3)]
    bad = frame(BROADCAST, source)
    send(drivers[1], good[0], bad, good[1], bad, bad)
    assert received(drivers[0]) == good
    assert drivers[1].drops(core.TX) == {"spoof": 3}
    assert drivers[1].stats(core.TX).packets == 5


@pytest.mark.parametrize("source", [ZERO, BROADCAST, MULTICAST], ids=bytes.hex)
def test_c22_no_guest_sends_from_an_address_that_is_none(bridge: core.Bridge, guests: MakeGuest, source: bytes) -> None:
    drivers = three(bridge, guests)
    send(drivers[1], frame(BROADCAST, source))
    assert drivers[1].drops(core.TX) == {"spoof": 1}
    assert known(bridge) == set()


def reserved(last: int) -> bytes:
    """An address of IEEE 802.1Q, table 8-1: of the next bridge, that is, and of no other."""
    return bytes.fromhex("0180c20000") + bytes([last])


@pytest.mark.parametrize("last", range(16))
def test_c21_what_is_for_the_next_bridge_alone_goes_no_further(
    bridge: core.Bridge, guests: MakeGuest, last: int
) -> None:
    drivers = three(bridge, guests)
    good = frame(BROADCAST, mac(1))
    send(drivers[1], frame(reserved(last), mac(7)), good, frame(reserved(last), mac(8), vlan=5))
    assert [received(driver) for driver in drivers] == [[good], [], [good]]
    assert drivers[1].drops(core.TX) == {"policy": 2}
    assert drivers[1].stats(core.TX).packets == 3
    assert known(bridge) == {(mac(1), 0, drivers[1].port)}


@pytest.mark.parametrize("to", ["0180c2000010", "0180c2000021", "0180c2000100", "0180c3000001", "0380c2000001"])
def test_c21_addresses_beside_the_reserved_ones_are_groups_as_any(
    bridge: core.Bridge, guests: MakeGuest, to: str
) -> None:
    drivers = three(bridge, guests)
    sent = frame(bytes.fromhex(to), mac(1))
    send(drivers[1], sent)
    assert [received(driver) for driver in drivers] == [[sent], [], [sent]]


@pytest.mark.parametrize("to", [mac(2), mac(99), BROADCAST, reserved(1)], ids=bytes.hex)
def test_c21_a_guest_pauses_nobody_s_card(bridge: core.Bridge, guests: MakeGuest, to: bytes) -> None:
    drivers = three(bridge, guests)
    pause, others = [(to + mac(1) + kind + b"\0\1\xff\xff").ljust(60, b"\0") for kind in (b"\x88\x08", b"\x88\x09")]
    send(drivers[1], pause)
    assert drivers[1].drops(core.TX) == {"policy": 1}
    send(drivers[1], others)
    assert received(drivers[2]) == ([] if to == reserved(1) else [others])


def test_an_address_is_given_once(bridge: core.Bridge, guests: MakeGuest) -> None:
    one, two, _ = three(bridge, guests)
    one.port.set_mac(mac(1), True)
    two.port.set_mac(mac(2), True)
    with pytest.raises(OSError, match=r"set address .*: File exists"):
        two.port.set_mac(mac(1), True)
    # And what was, stays.
    assert known(bridge) == {(mac(1), 0xFFFF, one.port), (mac(2), 0xFFFF, two.port)}
    two.port.set_mac(mac(3), True)
    assert known(bridge) == {(mac(1), 0xFFFF, one.port), (mac(3), 0xFFFF, two.port)}


def test_36_a_port_has_up_to_16_addresses_of_its_own_and_no_more(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    many = [mac(number) for number in range(1, 17)]
    drivers[1].port.set_macs(many, True)
    assert known(bridge) == {(each, 0xFFFF, drivers[1].port) for each in many}
    send(drivers[0], *(frame(each, mac(99), vlan=7) for each in many))
    assert [len(received(driver)) for driver in drivers] == [0, 16, 0]
    send(drivers[1], *(frame(BROADCAST, each) for each in [*many, mac(17)]))
    assert drivers[1].drops(core.TX) == {"spoof": 1}
    assert drivers[1].port.stray() == mac(17)
    assert drivers[1].port.stray() is None
    send(drivers[2], frame(BROADCAST, many[15]))
    assert drivers[2].drops(core.TX) == {"spoof": 1}
    for wrong in ([*many, mac(17)], [mac(1), ZERO], [BROADCAST]):
        with pytest.raises(OSError, match="Invalid argument"):
            drivers[1].port.set_macs(wrong, True)
    # All of them or none.
    drivers[2].port.set_macs([mac(30), mac(31)], True)
    with pytest.raises(OSError, match="File exists"):
        drivers[2].port.set_macs([mac(40), mac(16)], True)
    given = {(each, 0xFFFF, drivers[1].port) for each in many}
    assert known(bridge) >= given | {(mac(30), 0xFFFF, drivers[2].port), (mac(31), 0xFFFF, drivers[2].port)}
    drivers[1].port.set_macs(many[:2], True)
    drivers[2].port.set_macs([mac(31), mac(16)], True)
    assert known(bridge) - {(mac(99), 7, drivers[0].port)} == {
        (mac(1), 0xFFFF, drivers[1].port),
        (mac(2), 0xFFFF, drivers[1].port),
        (mac(31), 0xFFFF, drivers[2].port),
        (mac(16), 0xFFFF, drivers[2].port),
    }


def test_what_the_workers_spend_on_a_port_is_in_its_account_and_the_next_port_has_none_of_it(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """While time is held, what it would take."""
    bridge = make_bridge()
    one, two, _ = three(bridge, guests)
    before = one.port.cycles(), two.port.cycles()
    send(one, *(frame(BROADCAST, mac(1)) for _ in range(100)))
    bridge.time_advance(0)
    spent = one.port.cycles() - before[0], two.port.cycles() - before[1]
    assert spent[0] > spent[1]
    gone = int(bridge.add_guest(1))
    with closing(Driver(bridge).start()) as last:
        send(last, *(frame(BROADCAST, mac(9)) for _ in range(100)))
        bridge.time_advance(0)
        assert last.port.cycles() > 0
        number = int(last.port)
    core.Port(bridge, gone).remove()
    again = {int(port): port for port in (bridge.add_guest(1), bridge.add_guest(1))}
    assert again[number].cycles() == 0


def test_of_what_a_guest_may_not_send_the_last_is_kept_with_its_age(
    held_time: None, make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """Also once it was asked for, and beside other guests."""
    bridge = make_bridge()
    drivers = three(bridge, guests)
    port = drivers[0].port
    port.set_mac(mac(1), True)
    assert port.offence("spoof") is None
    send(drivers[0], frame(BROADCAST, mac(7)), frame(mac(3), mac(9)), frame(BROADCAST, mac(1)))
    bridge.time_advance(3_000_000)
    for _ in range(2):
        last = port.offence("spoof")
        assert last is not None
        assert (last.source, last.destination, last.ip) == (mac(9), mac(3), None)
        assert last.age_s == pytest.approx(3, abs=0.1)
        port.stray()
    assert port.offence("policy") is None
    send(drivers[0], frame(reserved(14), mac(1)))
    last = port.offence("policy")
    assert last is not None
    assert (last.source, last.destination, last.ip) == (mac(1), reserved(14), None)
    assert [driver.port.offence("spoof") for driver in drivers[1:]] == [None, None]
    with pytest.raises(OSError, match="Invalid argument"):
        port.offence("no_buffer")


@pytest.mark.parametrize("address", [ZERO, BROADCAST, MULTICAST], ids=bytes.hex)
def test_a_port_cannot_have_a_group_address(bridge: core.Bridge, address: bytes) -> None:
    port = bridge.add_guest(1)
    with pytest.raises(OSError, match="Invalid argument"):
        port.set_mac(address, False)


# ---- where frames are counted ----


def test_a_frame_to_oneself_or_to_nobody_is_counted_as_such(bridge: core.Bridge, guests: MakeGuest) -> None:
    a = guests(bridge)
    send(a, frame(BROADCAST, mac(1)), frame(mac(1), mac(1)))
    assert a.drops(core.TX) == {"no_port": 2}


def test_a_flood_passes_over_ports_that_are_not_up(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[2].stop()
    send(drivers[0], frame(BROADCAST, mac(0)))
    assert len(received(drivers[1])) == 1
    assert drivers[0].stats(core.TX).copies == 0
    assert drivers[2].drops(core.RX) == {}


def test_a_frame_for_a_port_that_is_not_up_is_counted_there(bridge: core.Bridge, guests: MakeGuest) -> None:
    drivers = three(bridge, guests)
    drivers[1].port.set_mac(mac(1), False)
    drivers[1].stop()
    send(drivers[0], frame(mac(1), mac(0)))
    assert drivers[1].drops(core.RX) == {"not_ready": 1}


def test_15_a_netdev_has_any_number_of_addresses_and_they_are_no_guests(
    make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(netdev_queues=1, frames_per_queue=256)
    one, two = guests(bridge), guests(bridge)
    port = bridge.add_netdev(1)
    for number in range(3):
        port.add_mac(mac(number + 1))
        port.add_mac(mac(number + 1))
    two.pair.fill()
    for number, passes in ((0, True), (1, False), (2, False), (3, False), (4, True)):
        one.pair.send(frame(BROADCAST, mac(number), mark=b"x"))
        assert one.pair.wait_sent()
        assert len(two.pair.packets()) == passes
    port.remove_mac(mac(2))
    one.pair.send(frame(BROADCAST, mac(2), mark=b"x"))
    assert one.pair.wait_sent()
    assert len(two.pair.packets()) == 1
    assert one.drops(core.TX) == {"spoof": 3}
    # What a guest taught gives way; what it was given does not.
    port.add_mac(mac(2))
    two.port.set_mac(mac(7), False)
    for number, wrong in ((port, mac(7)), (two.port, mac(8)), (99, mac(8)), (port, bytes(6)), (port, BROADCAST)):
        with pytest.raises(OSError, match=r"exists|No such|Invalid"):
            core.Netdev(bridge, number).add_mac(wrong)
    for number, wrong in ((port, mac(7)), (port, mac(0)), (port, bytes(6)), (two.port, mac(7)), (99, mac(1))):
        with pytest.raises(OSError, match="No such"):
            core.Netdev(bridge, number).remove_mac(wrong)
    with pytest.raises(ValueError, match="5 bytes"):
        port.add_mac(bytes(5))
    with pytest.raises(ValueError, match="7 bytes"):
        port.remove_mac(bytes(7))
    assert {entry.mac for entry in bridge.fdb_dump() if entry.port == port} == {mac(1), mac(2), mac(3)}
    port.remove()
    assert {entry.mac for entry in bridge.fdb_dump() if entry.is_static} == {mac(7)}


def test_a_netdev_that_has_no_socket_yet_counts_what_it_should_have_sent(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    a = guests(bridge)
    netdev = bridge.add_netdev(2)
    netdev.set_mac(mac(9), False)
    send(a, frame(mac(9), mac(1)), frame(mac(9), mac(1)))
    assert netdev.queue_stats(0, core.TX).drops["not_ready"] == 2


def test_the_most_ports_there_can_be(bridge: core.Bridge) -> None:
    ports = [bridge.add_guest(core.MAX_PAIRS) for _ in range(core.MAX_PORTS)]
    assert sorted(ports) == list(range(core.MAX_PORTS))
    with pytest.raises(OSError, match="No space"):
        bridge.add_guest(1)
    with pytest.raises(OSError, match="No space"):
        bridge.add_netdev(1)
    ports[5].remove()
    assert bridge.add_guest(1) == ports[5]


@pytest.mark.parametrize("pairs", [0, core.MAX_PAIRS + 1])
def test_a_port_of_no_or_too_many_pairs_is_refused(bridge: core.Bridge, pairs: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        bridge.add_guest(pairs)


def test_what_does_not_exist_is_not_found(bridge: core.Bridge) -> None:
    port = bridge.add_guest(2)
    netdev = bridge.add_netdev(1)
    for call in (
        lambda: port.queue_stats(2, core.RX),
        lambda: port.queue_stats(0, 2),
        lambda: core.Port(bridge, core.MAX_PORTS).queue_stats(0, core.RX),
        lambda: netdev.queue_stats(1, core.RX),
        lambda: port.ring_state(4),
        lambda: core.Guest(bridge, netdev).ring_stop(0),
        lambda: port.ring_enable(0xFFFFFFFF, True),
        lambda: port.ring_set_call(4, -1),
        lambda: core.Guest(bridge, netdev).set_memory([]),
        lambda: core.Port(bridge, 77).remove(),
        lambda: core.Port(bridge, 77).flush(),
        lambda: netdev.queue_fd(0),
        lambda: core.Netdev(bridge, port).close_queue(0),
        lambda: bridge.worker_stats(1),
    ):
        with pytest.raises(OSError, match="No such file"):
            call()


# ---- storms, loops and floods of addresses ----


def test_c31_a_storm_of_broadcasts_is_lost_where_it_is_not_taken_and_others_talk(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    stormy, *others, aside = (guests(bridge) for _ in range(4))
    one, two = others
    one.port.set_mac(mac(1), False)
    two.port.set_mac(mac(2), False)
    aside.pair.post(8)
    for each in others:
        each.pair.fill()
    for round_ in range(40):
        for _ in range(64):
            stormy.pair.queue(frame(BROADCAST, mac(0)))
        stormy.pair.tx.kick()
        for source, to, names in ((one, two, (1, 2)), (two, one, (2, 1))):
            sent = frame(mac(names[1]), mac(names[0]), mark=bytes([round_]))
            source.pair.send(sent)
            while sent not in (got := to.pair.frames()):
                assert got
                to.pair.fill()
            to.pair.fill()
        assert stormy.pair.wait_sent()
    into, out = ledger(bridge, {each.port: 1 for each in (stormy, *others, aside)})
    assert into == out
    assert aside.drops(core.RX)["no_buffer"] + aside.waiting() == 40 * 64 - 8
    assert stormy.drops(core.TX) == {}


def test_c31_guests_that_send_back_whatever_they_get_make_a_loop_of_their_own_frames_alone(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    """Each time round it takes a guest's doing: when they stop, it is over."""
    one, two = guests(bridge), guests(bridge)
    looping = frame(BROADCAST, mac(7))
    one.pair.fill()
    two.pair.fill()
    send(one, looping)
    for _ in range(100):
        for each in two, one:
            assert each.pair.frames() == [looping]
            each.pair.fill()
            send(each, looping)
    assert two.pair.frames() == [looping]
    assert [driver.stats(core.TX).packets for driver in (one, two)] == [101, 100]
    assert one.pair.frames(timeout=0.1) == []
    assert known(bridge) == {(mac(7), 0, one.port)}


def test_c32_the_table_has_a_bound_and_a_guest_s_own_address_stays_in_it(
    make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    """A guest may teach what it is told, 4096 at most, and has that: here 4 of them try for more."""
    bridge = make_bridge(max_macs=4096)
    drivers = [guests(bridge) for _ in range(5)]
    drivers[4].port.set_mac(mac(4), True)
    for number, driver in enumerate(drivers[:4]):
        driver.pair.send_all(frame(mac(4), mac(number << 16 | i)) for i in range(1 << 8, 4400 + (1 << 8)))
        assert driver.stats(core.TX).packets == 4400
    entries = bridge.fdb_dump()
    taught = [sum(entry.port == driver.port for entry in entries) for driver in drivers]
    assert taught == [4096, 4096, 4096, 4096, 1]
    assert (mac(4), 0xFFFF, drivers[4].port) in known(bridge)


# ---- announcements ----


@pytest.mark.parametrize("workers", [1, 2])
def test_an_announced_guest_is_known_to_all_others(make_bridge: MakeBridge, guests: MakeGuest, workers: int) -> None:
    bridge = make_bridge(workers=workers)
    drivers = three(bridge, guests)
    drivers[0].port.announce(mac(7))
    assert [driver.pair.frames() for driver in drivers[1:]] == [[rarp(mac(7))]] * 2
    assert received(drivers[0]) == []
    stats = drivers[0].stats(core.TX)
    assert (stats.packets, stats.bytes, stats.copies, stats.chains) == (1, 60, 1, 0)
    assert known(bridge) == {(mac(7), 0, drivers[0].port)}
    assert bridge.events() & core.EVENT_FDB


def test_a_guest_is_announced_before_its_rings_run(bridge: core.Bridge, guests: MakeGuest) -> None:
    idle, other = guests(bridge, started=False), guests(bridge)
    other.pair.fill()
    idle.port.announce(mac(1))
    assert other.pair.frames() == [rarp(mac(1))]


def test_an_announcement_that_nobody_hears_is_counted_as_lost(bridge: core.Bridge, guests: MakeGuest) -> None:
    alone = guests(bridge)
    alone.port.announce(mac(1))
    assert (alone.stats(core.TX).packets, alone.drops(core.TX)) == (1, {"no_port": 1})


def test_an_announcement_before_the_workers_run_is_not_lost() -> None:
    with core.Bridge() as bridge, closing(Driver(bridge)) as one, closing(Driver(bridge)) as two:
        two.start()
        two.pair.fill()
        one.port.announce(mac(1))
        assert two.pair.frames() == [rarp(mac(1))]


def test_hostile_a40_only_an_address_of_its_own_is_announced(bridge: core.Bridge, guests: MakeGuest) -> None:
    checked, free, other = three(bridge, guests)
    checked.port.set_mac(mac(0), True)
    checked.port.announce(mac(0))
    assert [driver.pair.frames() for driver in (free, other)] == [[rarp(mac(0))]] * 2
    refused = [(checked, mac(1)), (free, mac(0)), (free, MULTICAST), (free, BROADCAST), (free, ZERO)]
    for driver, address in refused:
        with pytest.raises(PermissionError):
            driver.port.announce(address)
    assert [received(driver) for driver in (checked, free, other)] == [[], [], []]
    assert [driver.stats(core.TX).packets for driver in (checked, free)] == [1, 0]


def test_only_guests_are_announced(bridge: core.Bridge) -> None:
    with pytest.raises(FileNotFoundError):
        core.Guest(bridge, 0).announce(mac(1))
    with pytest.raises(FileNotFoundError):
        core.Guest(bridge, core.MAX_PORTS).announce(mac(1))


# ---- ports that come and go ----


def test_the_books_balance_when_ports_have_gone_and_no_sum_runs_backwards(bridge: core.Bridge) -> None:
    drivers = three(bridge, lambda bridge: Driver(bridge).start())
    send(drivers[0], *[frame(BROADCAST, mac(0))] * 5)
    send(drivers[1], frame(mac(0), mac(1)), frame(mac(1), mac(1)))
    assert bridge.gone()[0].packets == bridge.gone()[1].packets == 0
    for count, driver in enumerate(drivers):
        before = bridge.gone()
        sent, received = (driver.port.queue_stats(0, way) for way in (core.TX, core.RX))
        driver.close()
        into, out = bridge.gone()
        assert into.packets == before[0].packets + sent.packets, count
        assert out.packets == before[1].packets + received.packets
        assert into.drops["no_port"] == before[0].drops["no_port"] + sent.drops["no_port"]
    into, out = bridge.gone()
    assert (into.packets, into.copies) == (7, 5)
    assert into.packets + into.copies == out.packets + sum(into.drops.values()) + sum(out.drops.values())


def test_a_port_without_addresses_of_its_own_is_as_one_that_never_had_any(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    one, two = guests(bridge), guests(bridge)
    two.pair.fill()
    one.port.set_macs([mac(1), mac(2)], True)
    one.port.set_macs([], False)
    two.port.set_mac(mac(1), True)
    send(one, frame(mac(1), mac(1)), frame(mac(1), mac(9)))
    assert [each[6:12] for each in received(two)] == [mac(9)]
    assert one.stats(core.TX).drops["spoof"] == 1


def test_addresses_age_by_what_was_told_last(held_time: None, make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(ageing_s=300)
    port = bridge.add_guest(1)
    port.remember(mac(1), 0)
    bridge.time_advance(100 * 1_000_000)
    assert known(bridge) == {(mac(1), 0, port)}
    bridge.tune(spin_us=0, ageing_s=99)
    assert known(bridge) == set()
