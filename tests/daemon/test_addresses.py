"""What guests have taught survives the daemon: kept by guest, given back to it and to nobody else."""

import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.daemon import daemon, guest
from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, MULTICAST, frame, mac
from tests.rig.netns import needs_root, veth
from tests.rig.remote import RemoteGuest
from xdpnet import core
from xdpnet.addresses import SHARE, AddressBook


@pytest.fixture
def bridge() -> Iterator[core.Bridge]:
    with core.Bridge(max_macs=4) as made:
        yield made


def test_what_is_kept_is_restored_to_the_guest_of_that_name(bridge: core.Bridge, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    ports = {"web": bridge.add_guest(1), "db": bridge.add_guest(1)}
    ports["web"].remember(mac(1), 0)
    ports["web"].remember(mac(1), 5)
    ports["db"].remember(mac(2), 0)
    ports["db"].set_mac(mac(3), False)
    AddressBook(str(path)).keep(bridge, ports)
    assert json.loads(path.read_text()) == {
        "web": [["52:54:00:00:00:01", 0], ["52:54:00:00:00:01", 5]],
        "db": [["52:54:00:00:00:02", 0]],
    }
    assert path.stat().st_mode & 0o777 == 0o600
    with core.Bridge(max_macs=4) as later:
        others = {"new": later.add_guest(1), "web": later.add_guest(1)}
        AddressBook(str(path)).restore(later, others)
        assert later.taught() == {(others["web"], mac(1), 0), (others["web"], mac(1), 5)}


def test_the_file_is_written_when_something_has_changed_and_goes_when_there_is_nothing_to_keep(
    bridge: core.Bridge, tmp_path: Path
) -> None:
    path = tmp_path / "kept"
    ports = {"web": bridge.add_guest(1)}
    book = AddressBook(str(path), lambda: 0.0)
    book.keep(bridge, ports)
    assert not path.exists()
    ports["web"].remember(mac(1), 0)
    book.keep(bridge, ports)
    inode = path.stat().st_ino
    book.keep(bridge, ports)
    assert path.stat().st_ino == inode
    ports["web"].remember(mac(2), 0)
    book.keep(bridge, ports)
    assert path.stat().st_ino != inode
    ports["web"].flush()
    book.keep(bridge, ports)
    assert list(tmp_path.iterdir()) == []


def test_guests_that_change_what_they_have_taught_without_end_have_their_share_of_the_time(
    bridge: core.Bridge, tmp_path: Path
) -> None:
    """Each look here takes a second."""
    path, seconds = tmp_path / "kept", itertools.count()
    ports = {"web": bridge.add_guest(1)}
    book = AddressBook(str(path), lambda: float(next(seconds)))
    ports["web"].remember(mac(1), 0)
    book.keep(bridge, ports)
    before = path.stat().st_ino
    ports["web"].remember(mac(2), 0)
    looks = 0
    while path.stat().st_ino == before:
        book.keep(bridge, ports)
        looks += 1
    assert looks == 1 / SHARE
    before = path.stat().st_ino
    ports["web"].remember(mac(3), 0)
    book.keep(bridge, ports, last=True)
    assert path.stat().st_ino != before


def kept(taught: object) -> bytes:
    return json.dumps({"web": taught}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"web": 1}',
        kept([["52:54:00:00:00:01"]]),
        kept([["52:54:00:00:00:01", 4096]]),
        kept([["52:54:00:00:00:01", -1]]),
        kept([["52:54:00:00:00:01", 0], [BROADCAST.hex(":"), 0]]),
        kept([[MULTICAST.hex(":"), 0]]),
        kept([["00:00:00:00:00:00", 0]]),
        kept([["52:54:00:00:00", 0]]),
        b"[" * 100_000,
    ],
    ids=repr,
)
def test_a_file_that_is_not_as_it_was_written_is_said_and_left_out(
    bridge: core.Bridge, tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kept"
    path.write_bytes(text)
    path.chmod(0o600)
    AddressBook(str(path)).restore(bridge, {"web": bridge.add_guest(1)})
    assert bridge.taught() == frozenset()
    assert f"addresses {path}: not restored: not as it was written" in caplog.text


@pytest.mark.parametrize("fault", ["others may write", "another user's", "a link", "a directory", "a pipe"])
def test_a_file_that_may_be_somebody_elses_is_not_read(
    bridge: core.Bridge, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, there = tmp_path / "kept", tmp_path / "there"
    there.write_bytes(kept([["52:54:00:00:00:01", 0]]))
    there.chmod(0o620 if fault == "others may write" else 0o600)
    if fault == "a link":
        path.symlink_to(there)
    elif fault == "a directory":
        path.mkdir()
    elif fault == "a pipe":
        os.mkfifo(path, 0o600)
    else:
        there.rename(path)
    if fault == "another user's":
        if os.geteuid():
            pytest.skip("needs root: gives a file to another user")
        os.chown(path, 65534, -1)
    AddressBook(str(path)).restore(bridge, {"web": bridge.add_guest(1)})
    assert bridge.taught() == frozenset()
    assert f"addresses {path}: not restored: " in caplog.text


def test_a_guest_gets_back_no_more_than_is_its_to_use(bridge: core.Bridge, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(kept([[mac(number).hex(":"), 0] for number in range(1, 9)]))
    path.chmod(0o600)
    web, owner = bridge.add_guest(1), bridge.add_guest(1)
    owner.set_mac(mac(1), True)
    AddressBook(str(path)).restore(bridge, {"web": web, "owner": owner})
    assert bridge.taught() == {(web, mac(number), 0) for number in (2, 3, 4, 5)}


def test_a_neighbour_that_speaks_has_its_address_whatever_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(kept([[mac(1).hex(":"), 0]]))
    path.chmod(0o600)
    with core.Bridge() as bridge:
        web, neighbour = Driver(bridge).start(), Driver(bridge).start()
        AddressBook(str(path)).restore(bridge, {"web": web.port})
        bridge.start()
        neighbour.pair.send_all([frame(BROADCAST, mac(1))])
        assert bridge.taught() == {(neighbour.port, mac(1), 0)}
        web.close()
        neighbour.close()


def test_a_directory_that_is_gone_is_said_once(
    bridge: core.Bridge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ports = {"web": bridge.add_guest(1)}
    book = AddressBook(str(tmp_path / "gone" / "kept"), lambda: 0.0)
    ports["web"].remember(mac(1), 0)
    for _ in range(3):
        book.keep(bridge, ports)
    assert len(caplog.messages) == 1
    assert "not kept for a restart" in caplog.text
    (tmp_path / "gone").mkdir()
    book.keep(bridge, ports)
    assert (tmp_path / "gone" / "kept").exists()


@needs_root
@pytest.mark.net
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_46_after_a_restart_a_silent_guest_is_reached_as_before(tmp_path: Path, number: signal.Signals) -> None:
    sent = frame(mac(1), mac(2))
    with veth() as link, link.wire() as wire:
        words = ("--guest", guest(tmp_path), "--netdev", link.ifname)
        with daemon(tmp_path, *words) as running, RemoteGuest(tmp_path / "web.sock") as web:
            running.ready()
            web.start().pair.fill()
            web.pair.send_all([frame(BROADCAST, mac(1))])
            assert wire.receive() == frame(BROADCAST, mac(1))
            if number == signal.SIGKILL:
                running.until((tmp_path / "control.sock.addresses").exists, "addresses kept")
            running.end(number)
        with daemon(tmp_path, *words) as running:
            running.ready()
            with RemoteGuest(tmp_path / "web.sock") as web:
                web.start().pair.fill()
                running.until(lambda: running.port("web").queues[0].rx_ring.started, "ring")  # type: ignore[union-attr]
                wire.send(sent)
                assert web.pair.frames() == [sent]
