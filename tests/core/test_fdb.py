"""The forwarding database: what it holds stays found, whatever else comes; nothing leaks for want of room."""

import subprocess
from pathlib import Path

import pytest

from tests.native import compile_program
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, frame, mac
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = pytest.mark.core

CORE = Path(__file__).parents[2] / "c"


@pytest.fixture(scope="module")
def fdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(
        "addresses", tmp_path_factory.mktemp("native"), "-pthread", f"-I{CORE}", str(CORE / "clock.c")
    )


def test_47_with_65536_addresses_known_no_frame_leaks(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    """Each of 16 guests teaches 16 addresses on 256 VLANs each, a router's usual setup and more."""
    bridge = make_bridge(max_macs=4096)
    teachers = [guests(bridge) for _ in range(16)]
    asker = guests(bridge)
    asker.port.set_mac(mac(1), True)

    def addresses(number: int) -> list[tuple[bytes, int]]:
        return [(mac(0x10000 | number << 8 | address), vlan) for address in range(16) for vlan in range(1, 4096, 16)]

    for number, teacher in enumerate(teachers):
        teacher.pair.send_all(frame(mac(1), address, vlan=vlan) for address, vlan in addresses(number))
        teacher.stop()  # what is for it is counted, and takes no time
    assert bridge.fdb_count()[1] == [4096] * 16 + [0] * (core.MAX_PORTS - 16)
    sent = 0
    for number, teacher in enumerate(teachers):
        some = addresses(number)[number % 8 :: 8]
        asker.pair.send_all(frame(address, mac(1), vlan=vlan) for address, vlan in some)
        assert teacher.drops(core.RX) == {"not_ready": len(some)}
        sent += len(some)
    stats = asker.stats(core.TX)
    assert (stats.packets, stats.copies, asker.drops(core.TX)) == (sent, 0, {})


def test_47_one_address_on_every_vlan_is_found_on_each(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    bridge = make_bridge(max_macs=4096)
    router, other, asker = (guests(bridge) for _ in range(3))
    asker.port.set_mac(mac(1), True)
    router.pair.send_all(frame(mac(1), mac(2), vlan=vlan) for vlan in range(4096))
    router.stop()
    asker.pair.send_all(frame(mac(2), mac(1), vlan=vlan) for vlan in range(4096))
    assert asker.stats(core.TX).copies == 0
    assert router.drops(core.RX) == {"not_ready": 4096}
    assert other.drops(core.RX) == {}


def test_46_four_times_as_many_stations_as_are_known_at_once_push_out_each_other_alone(fdb: Path) -> None:
    told = subprocess.run([fdb, "flood"], check=True, capture_output=True, text=True).stdout
    guests, given, stations, old, known, longest = map(int, told.split())
    assert (guests, given) == (4 * 64, 4 * 4096)
    # The last that came are there, those before the last but 65536 are not.
    assert (stations, old, known) == (core.MAX_STATIONS, 0, core.MAX_STATIONS)
    assert longest < 12


def test_what_stays_is_found_while_others_come_move_and_go(fdb: Path) -> None:
    told = subprocess.run([fdb, "race", "1"], check=True, capture_output=True, text=True).stdout
    changes, wrong = map(int, told.split())
    assert changes
    assert not wrong


def test_as_many_addresses_are_given_as_there_may_be_and_no_more(make_bridge: MakeBridge) -> None:
    bridge = make_bridge()
    port = bridge.add_netdev(1)
    for number in range(core.MAX_GIVEN):
        port.add_mac(mac(number))
    with pytest.raises(OSError, match="No space"):
        port.add_mac(mac(core.MAX_GIVEN))
    assert len(bridge.fdb_dump()) == bridge.fdb_count()[0][port] == core.MAX_GIVEN
    port.remove_mac(mac(7))
    port.add_mac(mac(core.MAX_GIVEN))
    port.remove()
    assert bridge.fdb_dump() == []


@pytest.mark.parametrize(("max_macs", "legal"), [(0, False), (1, True), (4096, True), (4097, False)])
def test_the_share_of_a_guest_has_limits(max_macs: int, legal: bool) -> None:
    if legal:
        core.Bridge(max_macs=max_macs).close()
    else:
        with pytest.raises(OSError, match="Invalid argument"):
            core.Bridge(max_macs=max_macs)


def test_a_guest_that_teaches_beyond_its_share_takes_nothing_from_another(
    make_bridge: MakeBridge, guests: MakeGuest
) -> None:
    bridge = make_bridge(max_macs=4096)
    one, two = guests(bridge), guests(bridge)
    two.pair.send_all(frame(BROADCAST, mac(i), vlan=5) for i in range(4096))
    one.pair.send_all(frame(BROADCAST, mac(i)) for i in range(5000, 10000))
    assert bridge.fdb_count()[1][: two.port + 1] == [4096, 4096]
    assert one.stats(core.TX).unlearned == 904
