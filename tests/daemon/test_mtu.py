"""A guest that was told more than an interface carries is told of: by the configuration, or by its frontend."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.daemon import daemon, guest
from tests.rig.netns import command, needs_root, veth
from tests.rig.remote import RemoteGuest
from xdpnet import core
from xdpnet.mtu import MtuWatch
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.message import U64, Request


class Interface:
    def __init__(self, mtu: int) -> None:
        self.mtu = mtu


@pytest.fixture
def bridge() -> Iterator[core.Bridge]:
    with core.Bridge() as made:
        yield made


def test_56_a_guest_with_a_larger_mtu_than_an_interface_is_named_once_with_the_remedy(
    bridge: core.Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"small": 1499, "same": 1500, "large": 1501, "huge": 65535, "own": None}
    guests = [GuestDevice(bridge, name, bridge.add_guest(1), 1, mtu) for name, mtu in sizes.items()]
    wide, narrow = Interface(9000), Interface(1500)
    watch = MtuWatch()
    interfaces = {"eth0": wide, "eth1": narrow}
    for _ in range(3):
        watch.look(guests, interfaces)
    dropped = "and interface eth1 carries 1500: longer frames are dropped there (oversize)"
    assert caplog.messages == [
        f"large: mtu = 1501, {dropped}; ip link set dev eth1 mtu 1501, or mtu = 1500",
        f"huge: mtu = 65535, {dropped}; mtu = 1500",
    ]
    caplog.clear()
    # Another MTU is another fault; one that is away has none, and where all is well it may begin anew.
    narrow.mtu = 0
    watch.look(guests, interfaces)
    assert [message.partition(":")[0] for message in caplog.messages] == ["huge"]
    caplog.clear()
    narrow.mtu = 1500
    watch.look(guests, interfaces)
    assert [message.partition(":")[0] for message in caplog.messages] == ["large", "huge"]


def test_34_what_a_frontend_has_told_its_guest_is_compared_too(
    bridge: core.Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    device = GuestDevice(bridge, "web", bridge.add_guest(1), 1)
    watch, interfaces = MtuWatch(), {"eth1": Interface(1500)}
    device.set_mtu(1500)
    watch.look([device], interfaces)
    assert caplog.messages == []
    device.set_mtu(9000)
    watch.look([device], interfaces)
    assert caplog.messages == [
        (
            "web: its frontend has told it an MTU of 9000 (QEMU: host_mtu), and interface eth1 carries 1500: longer "
            "frames are dropped there (oversize); ip link set dev eth1 mtu 9000, or host_mtu=1500 there"
        )
    ]
    caplog.clear()
    device.reset()
    assert device.told_mtu == 0
    watch.look([device], interfaces)
    device.set_mtu(9000)
    watch.look([device], interfaces)
    assert caplog.messages == []


def test_without_an_interface_any_mtu_will_do(bridge: core.Bridge, caplog: pytest.LogCaptureFixture) -> None:
    MtuWatch().look([GuestDevice(bridge, "web", bridge.add_guest(1), 1, 65535)], {})
    assert caplog.messages == []


@needs_root
@pytest.mark.net
def test_34_56_a_running_daemon_says_it_at_the_start_and_when_a_frontend_or_the_interface_changes_it(
    tmp_path: Path,
) -> None:
    with veth() as link:
        words: tuple[str, ...] = ("--guest", guest(tmp_path, more=",mtu=9000"), "--guest", guest(tmp_path, "db"))
        words += ("--netdev", link.ifname, "--metrics", "127.0.0.1:0")
        with daemon(tmp_path, *words) as running:
            running.ready()
            carries = f"and interface {link.ifname} carries"
            assert f"web: mtu = 9000, {carries} 1500" in running.log
            assert "db: " not in running.log
            with RemoteGuest(tmp_path / "db.sock") as db:
                db.tell(Request.NET_SET_MTU, U64(2000))
                told = f"db: its frontend has told it an MTU of 2000 (QEMU: host_mtu), {carries} 1500"
                running.until(lambda: told in running.log, told)
                page = running.get("/metrics")[1]
                for line in (
                    f'xdpnet_netdev_mtu{{interface="{link.ifname}"}} 1500.0',
                    'xdpnet_guest_mtu{port="web"} 9000.0',
                    'xdpnet_guest_mtu{port="db"} 2000.0',
                ):
                    assert line in page
                command("ip", "link", "set", link.ifname, "mtu", "1800")
                running.until(lambda: f"web: mtu = 9000, {carries} 1800" in running.log, "another MTU")
                assert running.log.count(f"web: mtu = 9000, {carries} 1500") == 1
            assert running.end() == 0
