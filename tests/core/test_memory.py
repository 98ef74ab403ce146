"""Guest memory: which tables are taken, tables replaced under traffic, and files truncated under our feet."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest

from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, MakeBridge, MakeGuest, Pair, both_layouts, frame, mac
from tests.rig.rings import BORDER, MIB, MODERN, ONE_REGION, SPLIT_REGIONS, GuestMemory, Span
from tests.rig.waiting import eventually
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory() as made:
        yield made


def region(memory: GuestMemory, guest: int, size: int, user: int, offset: int = 0) -> core.Region:
    return core.Region(guest, size, user, offset, memory.fd)


# ---- tables ----


def test_sixty_four_regions_are_taken_and_one_more_is_not(bridge: core.Bridge, memory: GuestMemory) -> None:
    port = bridge.add_guest(1)
    regions = [region(memory, i << 20, 4096, i << 30, i << 12) for i in range(core.MAX_REGIONS + 1)]
    port.set_memory(regions[:-1])
    with pytest.raises(OSError, match="No space"):
        port.add_region(regions[-1])
    with pytest.raises(OSError, match="No space"):
        port.set_memory(regions)
    port.remove_region(regions[7])
    port.add_region(regions[-1])
    port.set_memory([])


@pytest.mark.parametrize(
    ("guest", "size", "user", "offset", "error"),
    [
        (0, 0, 0, 0, "Invalid argument"),
        (2**64 - 4096, 4096, 0, 0, "Invalid argument"),
        (0, 4096, 2**64 - 4096, 0, "Invalid argument"),
        (0, ONE_REGION[0].size + 4096 + 1, 0, 0, "Invalid argument"),
        (0, 1, 0, ONE_REGION[0].size + 4096, "Invalid argument"),
        (0, 4096, 0, 2**64 - 4096, "Invalid argument"),
        (0, 2**63, 0, 2**63, "Invalid argument"),
        (0, 2**64 - 1, 0, 0, "Invalid argument"),
    ],
)
def test_a_region_that_cannot_be_is_refused_and_the_table_stays(
    bridge: core.Bridge, guests: MakeGuest, guest: int, size: int, user: int, offset: int, error: str
) -> None:
    a = guests(bridge)
    bad = region(a.memory, guest, size, user, offset)
    with pytest.raises(OSError, match=error):
        a.port.set_memory([bad])
    with pytest.raises(OSError, match=f"{error}|File exists"):
        a.port.add_region(bad)
    assert a.state(core.TX).started
    a.pair.send(frame(BROADCAST, mac(1)))
    assert a.pair.wait_sent()


@pytest.mark.parametrize(
    ("guest", "user"),
    [(0x1000, 0x10000), (0x0, 0x20000), (0x1FFF, 0x20000), (0x8000, 0x10FFF), (0x8000, 0xF001)],
)
def test_regions_that_overlap_are_refused(bridge: core.Bridge, memory: GuestMemory, guest: int, user: int) -> None:
    port = bridge.add_guest(1)
    port.set_memory([region(memory, 0x1000, 4096, 0x10000)])
    size = 4097 if guest == 0 else 4096
    with pytest.raises(OSError, match="File exists"):
        port.add_region(region(memory, guest, size, user))


def test_regions_that_touch_are_taken(bridge: core.Bridge, memory: GuestMemory) -> None:
    port = bridge.add_guest(1)
    port.set_memory([region(memory, 0x1000, 4096, 0x10000)])
    port.add_region(region(memory, 0x0000, 4096, 0x11000))
    port.add_region(region(memory, 0x2000, 4096, 0xF000))


def test_a_region_is_removed_only_if_all_of_it_matches(bridge: core.Bridge, memory: GuestMemory) -> None:
    port = bridge.add_guest(1)
    port.set_memory([region(memory, 0x1000, 8192, 0x10000)])
    for guest, size, user in (0x2000, 8192, 0x10000), (0x1000, 4096, 0x10000), (0x1000, 8192, 0x11000):
        with pytest.raises(OSError, match=r"unmap region .*: No such file"):
            port.remove_region(region(memory, guest, size, user))
    port.remove_region(core.Region(0x1000, 8192, 0x10000, 0, -1))


def test_files_that_are_not_memory_are_refused(bridge: core.Bridge) -> None:
    port = bridge.add_guest(1)
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    with ours, theirs, tempfile.TemporaryFile() as file, open("/dev/zero", "r+b") as zero:
        file.truncate(1 << 20)
        read_only = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        for fd in ours.fileno(), reader, writer, zero.fileno(), read_only, bridge.event_fd, -1, 10**6:
            with pytest.raises(OSError, match="map 1 memory regions"):
                port.set_memory([core.Region(0, 4096, 0, 0, fd)])
        os.close(read_only)
    os.close(reader)
    os.close(writer)


def test_an_offset_need_not_be_a_page(bridge: core.Bridge, guests: MakeGuest) -> None:
    spans = [Span(0x1000_0000, 2 * MIB, 0x7000_0000_0000, 16 * 77)]
    a, b = guests(bridge, spans=spans), guests(bridge, spans=spans)
    b.pair.fill()
    a.pair.send(frame(BROADCAST, mac(1)))
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]


# ---- changes under traffic ----


def test_the_table_is_replaced_again_and_again_while_frames_flow(pair: Pair) -> None:
    a, b = pair
    sent = [frame(mac(2), mac(1), mark=i.to_bytes(4, "big")) for i in range(4000)]
    got: list[bytes] = []
    for start in range(0, len(sent), 100):
        for each in sent[start : start + 100]:
            a.pair.queue(each)
        a.pair.tx.kick()
        for driver in pair:
            driver.port.set_memory(driver.memory.regions())
        assert a.pair.wait_sent()
        got += b.pair.frames(100)
        b.pair.fill()
    assert got == sent


def test_a_region_comes_and_goes_while_frames_flow(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, spans=SPLIT_REGIONS), guests(bridge)
    spare = a.memory.regions()[2]
    b.pair.fill()
    for i in range(100):
        a.port.remove_region(spare)
        a.pair.queue(frame(BROADCAST, mac(1), mark=bytes([i])))
        a.pair.tx.kick()
        a.port.add_region(spare)
        assert b.pair.frames() == [frame(BROADCAST, mac(1), mark=bytes([i]))]
        assert a.pair.wait_sent()
        b.pair.fill()


def test_a_ring_whose_memory_is_removed_stops_and_the_others_go_on(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge, spans=SPLIT_REGIONS), guests(bridge)
    b.pair.fill()
    ring = a.memory.regions()[0]
    a.port.remove_region(ring)
    assert [a.state(index).started for index in range(2)] == [False, False]
    assert [b.state(index).started for index in range(2)] == [True, True]
    with pytest.raises(OSError, match="Bad address"):
        a.port.ring_start(1, a.pair.tx.config())
    a.port.add_region(ring)
    a.restart(0)
    a.restart(1)
    a.pair.send(frame(BROADCAST, mac(1)))
    assert b.pair.frames() == [frame(BROADCAST, mac(1))]


def test_a_buffer_whose_memory_is_removed_breaks_its_ring(bridge: core.Bridge, guests: MakeGuest) -> None:
    a, b = guests(bridge), guests(bridge, spans=SPLIT_REGIONS)
    b.pair.post_at(BORDER + 4096, 2048)
    b.port.remove_region(b.memory.regions()[1])
    a.pair.send(frame(BROADCAST, mac(1)))
    assert eventually(lambda: b.state(core.RX).broken == "addr")
    assert b.drops(core.RX) == {"broken": 1}


# ---- truncation ----


class Victim:
    """A guest whose memory goes away; its own views of it are left alone, for they would fault too."""

    def __init__(self, bridge: core.Bridge, guests: MakeGuest, **options: int) -> None:
        self.driver: Driver = guests(bridge, features=MODERN, **options)
        self.kick_fd = self.driver.pair.tx.kick_fd

    def truncate(self) -> None:
        os.ftruncate(self.driver.memory.fd, 0)

    def restore(self) -> None:
        """The file is long again, and empty: as a frontend that starts anew."""
        os.ftruncate(self.driver.memory.fd, self.driver.memory.size)


def all_broken(driver: Driver) -> bool:
    return [driver.state(index).broken for index in range(2)] == ["memory", "memory"]


def provoke(victim: Victim, one: Driver) -> None:
    """Traffic from both sides."""
    os.eventfd_write(victim.kick_fd, 1)
    one.pair.send(frame(mac(0), mac(1)))
    assert one.pair.wait_sent()


@pytest.fixture
def trio(bridge: core.Bridge, guests: MakeGuest) -> tuple[Victim, Driver, Driver]:
    victim = Victim(bridge, guests)
    one, two = guests(bridge), guests(bridge)
    for number, driver in enumerate([victim.driver, one, two]):
        driver.port.set_mac(mac(number), False)
        driver.pair.fill()
    bridge.events()
    return victim, one, two


def test_memory_truncated_under_traffic_breaks_the_rings_of_that_guest_alone(
    trio: tuple[Victim, Driver, Driver], bridge: core.Bridge
) -> None:
    victim, one, two = trio
    victim.driver.pair.send_all([frame(mac(1), mac(0), mark=bytes([i])) for i in range(20)])
    assert len(one.pair.frames(20)) == 20
    victim.truncate()
    for _ in range(3):
        provoke(victim, one)
    assert eventually(lambda: all_broken(victim.driver))
    assert victim.driver.pair.tx.is_in_error()
    assert victim.driver.pair.rx.is_in_error()
    assert bridge.events() & core.EVENT_MEMORY
    one.pair.send(frame(mac(2), mac(1), mark=b"on"))
    assert two.pair.frames() == [frame(mac(2), mac(1), mark=b"on")]
    victim.restore()


def test_a_guest_that_lost_its_memory_is_revived_by_new_memory_and_started_rings(
    trio: tuple[Victim, Driver, Driver], bridge: core.Bridge
) -> None:
    victim, one, _ = trio
    driver = victim.driver
    victim.truncate()
    provoke(victim, one)
    provoke(victim, one)
    assert eventually(lambda: all_broken(driver))
    victim.restore()
    bridge.events()
    # Started again in the lost memory, a ring breaks again.
    driver.restart(core.TX)
    assert eventually(lambda: driver.state(core.TX).broken == "memory")
    assert bridge.events() & core.EVENT_MEMORY
    driver.port.set_memory(driver.memory.regions())
    for index in range(2):
        driver.restart(index)
    driver.pair.fill()
    one.pair.packets()
    driver.pair.send(frame(mac(1), mac(0), mark=b"alive"))
    assert one.pair.frames() == [frame(mac(1), mac(0), mark=b"alive")]
    one.pair.send(frame(mac(0), mac(1), mark=b"alive"))
    assert driver.pair.frames() == [frame(mac(0), mac(1), mark=b"alive")]


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_truncated_in_the_middle_of_a_flood(make_bridge: MakeBridge, guests: MakeGuest, workers: int) -> None:
    bridge = make_bridge(workers=workers)
    one, two = guests(bridge, pairs=workers), guests(bridge, pairs=workers)
    for number, driver in (1, one), (2, two):
        driver.port.set_mac(mac(number), False)
        for each in driver.pairs:
            each.fill()
    for _ in range(5):
        victim = Victim(bridge, guests, pairs=workers)
        victim.driver.port.set_mac(mac(0), False)
        for each in victim.driver.pairs:
            each.fill()
        frames = [frame(mac(0), mac(1), 1000)] * 300
        thread = threading.Thread(target=victim.truncate)
        thread.start()
        one.pair.send_all(frames)
        thread.join()
        provoke(victim, one)
        assert eventually(lambda driver=victim.driver: driver.state(core.RX).broken == "memory")  # type: ignore[misc]
        victim.restore()
        victim.driver.port.remove()
        victim.driver.port = bridge.add_guest(1)  # for close()
        one.pair.send(frame(mac(2), mac(1)))
        assert frame(mac(2), mac(1)) in two.pair.frames()
        two.pair.fill()


def test_state_and_counters_of_a_guest_without_memory_can_be_read(
    trio: tuple[Victim, Driver, Driver], bridge: core.Bridge
) -> None:
    """The control thread looks into the rings as well."""
    victim, one, _ = trio
    victim.truncate()
    victim.driver.state(core.RX)
    victim.driver.state(core.TX)
    victim.driver.stats(core.RX)
    provoke(victim, one)
    assert eventually(lambda: all_broken(victim.driver))
    victim.restore()


def test_a_bus_error_elsewhere_is_still_one() -> None:
    """The handler takes care of guest memory and of nothing else."""
    program = """if True:
        import mmap, os, resource, signal
        from tests.rig.driver import Driver, core
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(20)
        with core.Bridge() as bridge:
            guest = Driver(bridge).start()
            os.ftruncate(guest.memory.fd, 0)
            guest.state(0)
            print("survived one", flush=True)
            fd = os.memfd_create("other")
            os.ftruncate(fd, 4096)
            view = mmap.mmap(fd, 4096)
            os.ftruncate(fd, 0)
            view[0]
        """
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert child.stdout == "survived one\n"
    assert child.returncode == -signal.SIGBUS
