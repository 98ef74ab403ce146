"""Workers that do not go on are seen, named with whom they are at, and seen to go on."""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.clock import Clock
from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.driver import Driver
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.guests import MakeBridge, MakeGuest, frame, mac
from tests.rig.rings import VERSION_1, WRITE
from tests.rig.slow import core_memory, slow, untouched, userfaultfd
from tests.rig.traced import stopped
from tests.rig.waiting import eventually, until_equal
from xdpnet import core
from xdpnet.control.watchdog import Watchdog
from xdpnet.metrics.snapshot import Worker
from xdpnet.stalls import LOOKS, STALLED_S, Stall, StallWatch
from xdpnet.virtq.message import Request, VringState

pytest_plugins = ["tests.rig.guest_fixtures"]

PAGE = 4096


class Watched:
    """A watch that looks when it is told to; the time passes from look to look."""

    def __init__(self, bridge: core.Bridge) -> None:
        self.clock = Clock()
        self.watch = StallWatch(bridge, lambda place: f"{place.port}/{place.queue}", self.clock)

    def look(self, times: int = 1, after_s: float = STALLED_S) -> dict[int, str]:
        for _ in range(times):
            self.clock.now += after_s
            self.watch.look()
        return {worker: stall.where.removeprefix("at ") for worker, stall in self.watch.stalls.items()}


@contextlib.contextmanager
def stuck(bridge: core.Bridge, driver: Driver) -> Iterator[None]:
    """Its next frame lies in memory that does not answer; the worker is there."""
    with slow(core_memory(driver)):
        driver.pair.tx.raw((untouched(driver), 80, 0))
        driver.pair.tx.kick(always=True)
        assert eventually(lambda: is_stuck(bridge))
        yield


def is_stuck(bridge: core.Bridge) -> bool:
    """Its thread waits, and not for events."""
    stats = bridge.worker_stats(0)
    return state_of(stats.tid) in "SD" and stats.at is not None and stats.loops == bridge.worker_stats(0).loops


def let_move(bridge: core.Bridge) -> None:
    """Until every worker has ended a turn, as one that sleeps does ten times a second."""
    for worker in range(bridge.workers):
        before = bridge.worker_stats(worker).loops
        assert eventually(lambda worker=worker, before=before: bridge.worker_stats(worker).loops != before)  # type: ignore[misc]


@pytest.mark.core
@userfaultfd
def test_d14_a_worker_that_waits_for_memory_is_named_with_its_guest_until_it_goes_on(
    bridge: core.Bridge, guests: MakeGuest, caplog: pytest.LogCaptureFixture
) -> None:
    other, driver = guests(bridge), guests(bridge, features=VERSION_1)
    watched = Watched(bridge)
    for _ in range(5):
        assert watched.look() == {}
        let_move(bridge)
    with stuck(bridge, driver):
        assert watched.look(LOOKS) == {}
        assert watched.look() == {0: f"{driver.port}/1"}
        assert watched.look(10) == {0: f"{driver.port}/1"}
        assert watched.watch.stalls[0].since == watched.clock.now - (LOOKS + 10) * STALLED_S
    assert eventually(lambda: driver.stats(core.TX).packets == 1)
    assert watched.look() == {}
    other.pair.send(frame(mac(1), mac(2)))
    assert other.pair.wait_sent()
    where = f"at {driver.port}/1"
    assert caplog.messages == [
        f"worker 0: {where} for {LOOKS * STALLED_S:.1f} s: the memory there does not answer",
        f"worker 0: goes on after {(LOOKS + 11) * STALLED_S:.1f} s {where}",
    ]


@pytest.mark.core
@userfaultfd
def test_d14_of_a_worker_that_delivers_to_slow_memory_both_guests_are_named(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    sender, slow_one = guests(bridge), guests(bridge, features=VERSION_1)
    slow_one.port.set_mac(mac(2), False)
    watched = Watched(bridge)
    with slow(core_memory(slow_one)):
        slow_one.pair.post_at(untouched(slow_one), 2048)
        sender.pair.send(frame(mac(2), mac(1)))
        assert eventually(lambda: is_stuck(bridge))
        assert watched.look(LOOKS + 1) == {0: f"{sender.port}/1, delivering to {slow_one.port}/0"}
    assert slow_one.pair.frames() == [frame(mac(2), mac(1))]
    assert watched.look() == {}


@pytest.mark.core
@userfaultfd
def test_time_alone_stalls_nobody(bridge: core.Bridge, guests: MakeGuest) -> None:
    """As after the whole process was stopped: at the first look the worker is where it was, and much later."""
    with stuck(bridge, guests(bridge, features=VERSION_1)):
        watched = Watched(bridge)
        watched.look()
        assert watched.look(after_s=1000) == {}
        assert watched.look() != {}
        quick = Watched(bridge)
        assert quick.look(10, after_s=0) == {}


@pytest.mark.core
@userfaultfd
def test_a_stall_that_moved_on_and_came_back_is_another(bridge: core.Bridge, guests: MakeGuest) -> None:
    driver, watched = guests(bridge, features=VERSION_1), Watched(bridge)
    for n in range(1, 4):
        with stuck(bridge, driver):
            assert watched.look(LOOKS + 1) == {0: f"{driver.port}/1"}
        until_equal(lambda: driver.stats(core.TX).packets, n)
        driver.pair.reap()


@pytest.mark.core
def test_workers_that_sleep_spin_or_are_parked_are_not_stalled(make_bridge: MakeBridge, guests: MakeGuest) -> None:
    for spin_us in 0, 10_000_000:
        bridge = make_bridge(spin_us=spin_us, workers=2)
        driver = guests(bridge, pairs=2)
        watched = Watched(bridge)
        for _ in range(5):
            driver.pair.send(frame(mac(1), mac(2)))
            assert driver.pair.wait_sent()
            driver.port.ring_enable(0, True)
            let_move(bridge)
            assert watched.look() == {}
        bridge.stop()
        assert watched.look(5) == {}


@pytest.mark.core
@userfaultfd
@pytest.mark.parametrize("ring", [core.RX, core.TX], ids=["rx", "tx"])
def test_d14_userfaults_of_the_frontend_are_the_frontends_alone(
    bridge: core.Bridge, guests: MakeGuest, ring: int
) -> None:
    """They are of an address space, not of the file: where the frontend waits is a hole for us, full of zeroes."""
    driver, other = guests(bridge, features=VERSION_1), guests(bridge)
    driver.port.set_mac(mac(2), False)
    own = ctypes.addressof(ctypes.c_char.from_buffer(driver.memory.map))
    addr = untouched(driver)
    with slow([(own + driver.memory.offset(addr), PAGE)]):
        driver.rings()[ring].raw((addr, 2048 if ring == core.RX else 80, WRITE if ring == core.RX else 0))
        driver.rings()[ring].kick(always=True)
        if ring == core.RX:
            other.pair.send(frame(mac(2), mac(1)))
        assert eventually(lambda: driver.stats(ring).packets == 1)
    assert os.pread(driver.memory.fd, 2, driver.memory.offset(addr)) == bytes(2)


# ---- the watchdog ----


class Manager:
    """Of services: systemd's part."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening

    def fed(self) -> int:
        """How often the watchdog was, since this was last asked."""
        times = 0
        with contextlib.suppress(BlockingIOError):
            while said := self._listening.recv(100, socket.MSG_DONTWAIT):
                times += said == b"WATCHDOG=1"
        return times


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield Manager(listening)


def test_the_watchdog_starves_when_somebody_has_stood_still_for_a_whole_period(manager: Manager) -> None:
    clock, stalls = Clock(), dict[int, Stall]()
    watchdog = Watchdog(30, lambda: stalls, clock)
    clock.now += 29.9
    assert watchdog.feed()
    clock.now += 0.2
    assert not watchdog.feed()
    watchdog.beat()
    assert watchdog.feed()
    stalls[1] = Stall("asleep", clock.now)
    for still, fed in (29.9, True), (0.2, False), (3600, False):
        clock.now += still
        watchdog.beat()
        assert watchdog.feed() is fed
    stalls.clear()
    assert watchdog.feed()
    assert manager.fed() == 4


def test_e11_a_guest_that_holds_up_workers_again_and_again_does_not_starve_the_watchdog(manager: Manager) -> None:
    """Nor does the control thread, which waits for them."""
    clock, stalls = Clock(), dict[int, Stall]()
    watchdog = Watchdog(30, lambda: stalls, clock)
    for _ in range(100):
        stalls[0] = Stall("at guest web's tx ring 0", clock.now)
        clock.now += 29.9
        assert watchdog.feed()
        assert manager.fed() == 1
        stalls.clear()
        watchdog.beat()


# ---- the daemon ----


@contextlib.contextmanager
def served(directory: Path, env: dict[str, str] | None = None) -> Iterator[tuple[Daemon, Frontend, int]]:
    """A daemon and a frontend with one transmit ring, and its kick: for a second after one the ring is polled."""
    words = "--guest", guest(directory), "--metrics", "127.0.0.1:0", "--spin-us", "1000000"
    with (
        daemon(directory, *words, env=env) as running,
        RingMemory() as memory,
        Frontend.connect(str(directory / "web.sock")) as frontend,
    ):
        running.ready()
        frontend.negotiate()
        frontend.set_memory(memory)
        kick, _ = frontend.start_ring(1, memory, num=16)
        yield running, frontend, kick


def state_of(tid: int) -> str:
    """Of a thread; proc(5), stat."""
    return Path(f"/proc/{tid}/stat").read_text().rpartition(") ")[2][0]


def worker_of(running: Daemon) -> Worker:
    return running.snapshot().workers[0]


@needs.root
@pytest.mark.parametrize(("busy", "where"), [(True, "at guest web's tx ring 0"), (False, "asleep")])
def test_a_worker_that_does_not_go_on_makes_the_daemon_ill_until_it_does(
    tmp_path: Path, manager: Manager, busy: bool, where: str
) -> None:
    with served(tmp_path, {"WATCHDOG_USEC": "300000"}) as (running, _, kick):
        assert running.get("/healthz") == (200, "ok\n")
        tid = worker_of(running).tid
        if busy:
            os.eventfd_write(kick, 1)
        else:
            running.until(lambda: state_of(tid) == "S", "asleep")
        with stopped(tid):
            running.until(lambda: worker_of(running).stalled_at, "stalled")
            manager.fed()
            status, text = running.get("/healthz")
            assert status == 503
            assert f"worker 0 has been {where} for " in text
            assert 'xdpnet_worker_stalled_seconds{worker="0"} 0.0' not in running.get("/metrics")[1]
            assert running.log.count(f"worker 0: {where} for ") == 1
            assert "a debugger has stopped it" in running.log
            then = worker_of(running).stalled_s
            running.until(lambda: worker_of(running).stalled_s > then + 1, "more than a tick")
            assert manager.fed() == 0
            assert running.log.count("the service manager's watchdog is not fed any more") == 1
        running.until(lambda: not worker_of(running).stalled_at, "it goes on")
        assert running.get("/healthz") == (200, "ok\n")
        assert 'xdpnet_worker_stalled_seconds{worker="0"} 0.0' in running.get("/metrics")[1]
        assert running.log.count("worker 0: goes on after ") == 1
        running.until(manager.fed, "the watchdog is fed")
        assert running.end() == 0


@needs.root
def test_a_control_thread_that_waits_for_such_a_worker_is_no_riddle(tmp_path: Path) -> None:
    """It has to, before it changes what the worker may be using; who is to blame is told all the same."""
    with served(tmp_path) as (running, frontend, kick), ThreadPoolExecutor() as pool:
        tid = worker_of(running).tid
        os.eventfd_write(kick, 1)
        with stopped(tid):
            answer = pool.submit(frontend.tell, Request.SET_VRING_ENABLE, VringState(1, 0))
            told = 503, "the control thread does not answer\nworker 0 is at guest web's tx ring 0\n"
            running.until(lambda: running.get("/healthz") == told, "told")
            status, page = running.get("/metrics")
            assert status == 200
            (line,) = (line for line in page.splitlines() if not line.startswith("#"))
            name, seconds = line.split()
            assert name == 'xdpnet_worker_stalled_seconds{worker="0"}'
            assert float(seconds) > 0
            assert running.log.count("worker 0: at guest web's tx ring 0 for ") == 1
        assert answer.result() == 0
        running.until(lambda: running.get("/healthz") == (200, "ok\n"), "well again")
        assert running.end() == 0
