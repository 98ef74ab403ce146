"""What a frontend's messages cost others is charged to its guest; who has overdrawn is not read for a while."""

from pathlib import Path

import pytest

from tests.rig.backend import Backend, MakeBackend
from tests.rig.clock import Clock
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.waiting import until, until_equal
from xdpnet.virtq import connection, server
from xdpnet.virtq.allowance import AT_ONCE_S, PER_S, STANDSTILL, Allowance
from xdpnet.virtq.message import VERSION, Header, Request, VringState

pytestmark = pytest.mark.core

GET_FEATURES = Header(Request.GET_FEATURES, VERSION, 0).pack()


class Ticking(Clock):
    """Moves on by a millisecond whenever it is looked at."""

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes by the tests' clocks alone."""
    monkeypatch.setattr(connection, "REST_MOST_S", 0.01)
    monkeypatch.setattr(server, "ACCEPT_PAUSE_S", 0.01)


@pytest.fixture
def clock(backend: Backend) -> Clock:
    """That of the guest's allowance."""
    made = Clock()
    backend.device.allowance = Allowance(backend.bridge, made)
    return made


def spend(backend: Backend, clock: Clock, seconds: float) -> None:
    """As if messages had taken that long."""

    def pass_time() -> None:
        with backend.device.allowance.charged():
            clock.now += seconds

    backend.control.call(pass_time)


# ---- what is charged ----


def test_so_much_may_be_used_at_once_and_a_debt_is_waited_for(backend: Backend, clock: Clock) -> None:
    spend(backend, clock, AT_ONCE_S)
    assert backend.device.allowance.wait_s() == 0
    spend(backend, clock, 1)
    assert backend.device.allowance.wait_s() == pytest.approx((1 - PER_S) / PER_S)


def test_a_second_in_which_the_workers_stand_still_counts_several_times(backend: Backend, clock: Clock) -> None:
    spend(backend, clock, AT_ONCE_S)

    def stop_the_workers() -> tuple[int, float]:
        before = backend.bridge.parked_ns
        with backend.device.allowance.charged():
            for on in (True, False):
                backend.port.ring_enable(0, on)
        return backend.bridge.parked_ns - before, backend.device.allowance.wait_s()

    parked_ns, wait_s = backend.control.call(stop_the_workers)
    assert parked_ns > 0
    assert wait_s == pytest.approx(STANDSTILL * parked_ns / 1e9 / PER_S)


def test_what_changes_nothing_stops_no_worker(backend: Backend) -> None:
    frontend, _ = backend.connect()
    frontend.negotiate()
    with RingMemory() as memory:
        assert frontend.set_memory(memory) == 0
        frontend.start_ring(0, memory)
        assert frontend.set_event(Request.SET_VRING_CALL, 0, None) == 0
        before = backend.bridge.parked_ns
        for _ in range(10):
            assert frontend.tell(Request.SET_VRING_ENABLE, VringState(0, 1)) == 0
            assert frontend.tell(Request.SET_VRING_ENABLE, VringState(1, 0)) == 0
            assert frontend.set_event(Request.SET_VRING_CALL, 0, None) == 0
            assert frontend.set_event(Request.SET_VRING_ERR, 0, None) == 0
            assert frontend.tell(Request.SET_VRING_ADDR, memory.ring_addr(0, 256)) == 0
        assert backend.bridge.parked_ns == before
        assert frontend.tell(Request.SET_VRING_ENABLE, VringState(0, 0)) == 0
        assert backend.bridge.parked_ns > before


def test_a_device_that_is_bare_is_reset_and_released_without_stopping_a_worker(
    backend: Backend, tmp_path: Path
) -> None:
    path = str(tmp_path / "guest.sock")
    guest = backend.open(path)
    before = backend.bridge.parked_ns
    for count in range(1, 4):
        with Frontend.connect(path) as frontend:
            frontend.negotiate()
            assert frontend.tell(Request.RESET_DEVICE) == 0
        until_equal(lambda: guest.counters.disconnects, count)
    assert backend.bridge.parked_ns == before


# ---- what follows ----


def test_messages_of_a_guest_that_has_overdrawn_wait_until_it_has_not(backend: Backend, clock: Clock) -> None:
    frontend, guest = backend.connect()
    spend(backend, clock, AT_ONCE_S + 10 * PER_S)  # ten seconds to wait
    frontend.send_bytes(GET_FEATURES * 3)
    clock.now += 9.9
    before = guest.counters.rests
    until(lambda: guest.counters.rests > before + 2)
    assert guest.counters.messages == 0
    clock.now += 0.2
    assert [frontend.receive()[0] for _ in range(3)] == [Request.GET_FEATURES] * 3


def test_another_guest_is_served_meanwhile(make_backend: MakeBackend, backend: Backend, clock: Clock) -> None:
    frontend, guest = backend.connect()
    neighbour, _ = make_backend().connect()
    spend(backend, clock, 10)
    frontend.send_bytes(GET_FEATURES)
    until(lambda: guest.counters.rests)
    for _ in range(100):
        assert neighbour.ask_u64(Request.GET_FEATURES)
    assert guest.counters.messages == 0
    clock.now += 1000


def test_a_flood_of_messages_is_paid_for_by_who_sends_it(backend: Backend) -> None:
    backend.device.allowance = Allowance(backend.bridge, Ticking())
    frontend, guest = backend.connect()
    for _ in range(20):
        frontend.send_bytes(GET_FEATURES * 50)
        for _ in range(50):
            assert frontend.receive()[0] == Request.GET_FEATURES
    assert guest.counters.messages == 1000
    assert guest.counters.rests


def test_a_message_that_has_begun_is_read_to_its_end(backend: Backend, clock: Clock) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(GET_FEATURES[:5])
    backend.settle()
    spend(backend, clock, 10)
    frontend.send_bytes(GET_FEATURES[5:])
    assert frontend.receive()[0] == Request.GET_FEATURES
    frontend.send_bytes(GET_FEATURES)
    until(lambda: guest.counters.rests)
    assert guest.counters.messages == 1


def test_who_comes_again_finds_the_debt_that_was_left(backend: Backend, clock: Clock, tmp_path: Path) -> None:
    path = str(tmp_path / "guest.sock")
    guest = backend.open(path)
    with Frontend.connect(path) as first:
        assert first.ask_u64(Request.GET_FEATURES)
        spend(backend, clock, 10)
    until(lambda: guest.counters.rests or guest.counters.disconnects)
    with Frontend.connect(path) as second:
        backend.settle()
        assert guest.counters.connects == 1
        clock.now += 1000
        assert second.ask_u64(Request.GET_FEATURES)


def test_a_connection_that_ends_is_paid_for_too(backend: Backend, tmp_path: Path) -> None:
    clock = Ticking()
    backend.device.allowance = Allowance(backend.bridge, clock)
    path = str(tmp_path / "guest.sock")
    guest = backend.open(path)
    with Frontend.connect(path):
        until(lambda: guest.connected)
        looks = clock.now
        backend.control.call(guest.disconnect)
        assert clock.now > looks


def test_connections_without_end_wait_at_the_door(backend: Backend, tmp_path: Path) -> None:
    backend.device.door = Allowance(backend.bridge, clock := Clock())
    path = str(tmp_path / "guest.sock")
    guest = backend.open(path)

    def come_and_go() -> None:
        with backend.device.door.charged():
            clock.now += 10

    backend.control.call(come_and_go)
    with Frontend.connect(path) as frontend:
        backend.settle()
        assert not guest.counters.connects
        clock.now += 1000
        assert frontend.ask_u64(Request.GET_FEATURES)
