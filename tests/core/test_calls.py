"""Eventfds of a hostile frontend: whatever it does to a file that it shares with the core, the core never waits for it.

O_NONBLOCK is a flag of that file, so the frontend clears it after any check; a counter that is full then stops whoever
writes to it. Each test reads the counter at its end, so that a core which did wait goes on and the test can fail.
"""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, MakeGuest, Pair, both_layouts, frame, mac
from tests.rig.rings import EVENT_IDX, VERSION_1
from tests.rig.waiting import PATIENCE_S, eventually, until_equal
from xdpnet import core

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = [pytest.mark.core, both_layouts]

FULL = 2**64 - 2  # one more, and a write waits
BATCH = 32  # eventfds that are signalled by one system call


@contextlib.contextmanager
def blocking(fd: int, value: int = FULL) -> Iterator[None]:
    """The file waits for whoever writes to it; at the end it lets go."""
    os.set_blocking(fd, False)
    value_of(fd)
    os.eventfd_write(fd, value)
    os.set_blocking(fd, True)
    try:
        yield
    finally:
        os.set_blocking(fd, False)
        # Several may wait, each for the one before it.
        for _ in range(50):
            value_of(fd)
            time.sleep(0.002)


def value_of(fd: int) -> int:
    """Read without waiting, and so gone."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def returns(work: Callable[[], object]) -> bool:
    """Whether a call of the control thread's comes back."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def goes_on(pair: Pair) -> bool:
    """Whether the worker does: frames of two guests that have nothing to do with it arrive."""
    a, b = pair
    sent = [frame(mac(2), mac(1), mark=bytes([i])) for i in range(10)]
    got: list[bytes] = []

    def all_arrived() -> bool:
        got.extend(packet.frame for packet in b.pair.packets() if packet.frame[:6] == mac(2))
        return got == sent

    b.pair.fill()
    a.pair.send_all(sent)
    return eventually(all_arrived)


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event index"])
def test_a36_a_call_fd_that_is_full_and_blocks_holds_up_nobody(
    bridge: core.Bridge, guests: MakeGuest, pair: Pair, features: int
) -> None:
    evil = guests(bridge, features=features)
    evil.pair.fill()
    with blocking(evil.pair.rx.call_fd):
        for _ in range(4):
            evil.pair.packets()
            evil.pair.rx.want_call()
            pair[0].pair.send(frame(BROADCAST, mac(1)))
            assert goes_on(pair)
        assert eventually(lambda: evil.stats(core.RX).calls >= 2)
        assert returns(lambda: evil.port.ring_enable(0, True))


def test_a36_an_err_fd_that_is_full_and_blocks_holds_up_nobody(
    bridge: core.Bridge, guests: MakeGuest, pair: Pair
) -> None:
    evil = guests(bridge, features=VERSION_1)
    with blocking(evil.pair.tx.err_fd):
        evil.pair.tx.raw((0, 64, 0))  # outside of its memory
        evil.pair.tx.kick(always=True)
        assert eventually(lambda: evil.state(core.TX).broken == "addr")
        assert goes_on(pair)
        assert returns(lambda: evil.port.ring_stop(core.TX))


def test_a36_a_new_call_fd_that_is_full_and_blocks_holds_up_nobody(
    bridge: core.Bridge, guests: MakeGuest, pair: Pair
) -> None:
    evil = guests(bridge)
    new = os.eventfd(0)
    with blocking(new):
        assert returns(lambda: evil.port.ring_set_call(1, new))
        assert goes_on(pair)
    os.close(new)


@pytest.mark.parametrize("end", ["read", "full", "closed"])
def test_a36_a_socket_gets_a_call_in_eight_bytes_and_holds_up_nobody(
    bridge: core.Bridge, guests: MakeGuest, pair: Pair, end: str
) -> None:
    evil = guests(bridge, features=VERSION_1)
    evil.pair.fill()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if end == "full":
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(bytes(8))
            theirs.setblocking(True)
        elif end == "closed":
            ours.close()
        evil.port.ring_set_call(core.RX, theirs.fileno())
        calls = evil.stats(core.RX).calls
        for turn in range(4):
            evil.pair.packets()
            pair[0].pair.send(frame(BROADCAST, mac(1)))
            assert eventually(lambda turn=turn: evil.stats(core.RX).calls > calls + turn)  # type: ignore[misc]
            assert goes_on(pair)
        if end == "read":
            got = ours.recv(1 << 16)
            assert got == struct.pack("=Q", 1) * (len(got) // 8)
            assert len(got) // 8 >= 5  # one for the new socket
        assert returns(lambda: evil.port.ring_stop(core.RX))


@pytest.mark.parametrize("value", [FULL - 1, FULL], ids=["one below", "full"])
def test_a_counter_is_raised_up_to_its_limit_and_stays_readable(
    bridge: core.Bridge, guests: MakeGuest, value: int
) -> None:
    driver = guests(bridge)
    new = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(new, value)
    for _ in range(5):
        driver.port.ring_set_call(0, new)
    assert value_of(new) >= FULL
    os.close(new)


def test_a_call_fd_that_is_a_semaphore_is_raised_by_one_for_each_call(bridge: core.Bridge, guests: MakeGuest) -> None:
    driver = guests(bridge)
    new = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    for _ in range(3):
        driver.port.ring_set_call(0, new)
    assert [value_of(new) for _ in range(4)] == [1, 1, 1, 0]
    os.close(new)


def test_every_call_that_is_counted_has_raised_its_eventfd_by_one(
    held_time: None, bridge: core.Bridge, guests: MakeGuest, pair: Pair
) -> None:
    """Without event index each turn that brings something is a call."""
    sink = guests(bridge, features=VERSION_1)
    sink.pair.fill()
    for i in range(50):
        pair[0].pair.send(frame(BROADCAST, mac(1), mark=bytes([i])))
        bridge.time_advance(0)
        assert sink.pair.rx.pending() == i + 1
    assert goes_on(pair)
    stats = sink.stats(core.RX)
    assert (stats.calls, stats.calls_saved) == (50, 0)
    assert sink.pair.rx.calls() == 50


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 1])
def test_guests_that_are_called_in_one_turn_are_called_once_each(
    bridge: core.Bridge, guests: MakeGuest, count: int
) -> None:
    source = guests(bridge)
    sinks: list[Driver] = [guests(bridge, features=VERSION_1, num=4) for _ in range(count)]
    for sink in sinks:
        sink.pair.fill()
        sink.pair.rx.calls()
    source.pair.send(frame(BROADCAST, mac(1)))
    assert eventually(lambda: all(sink.stats(core.RX).calls == 1 for sink in sinks))
    assert eventually(lambda: all(sink.pair.rx.pending() == 1 for sink in sinks))
    bridge.stop()
    assert [sink.pair.rx.calls() for sink in sinks] == [1] * count


def test_an_err_fd_is_raised_once_for_each_time_its_ring_breaks(bridge: core.Bridge, guests: MakeGuest) -> None:
    driver = guests(bridge, features=VERSION_1)
    ring = driver.pair.tx
    for n in range(1, 4):
        ring.raw((0, 64, 0))
        ring.kick(always=True)
        until_equal(lambda: driver.stats(core.TX).breaks, n)
        assert ring.is_in_error()
        assert value_of(ring.err_fd) == 1
        driver.restart(core.TX)


def test_a_call_that_wakes_hundreds_of_watchers_keeps_no_other_guest_from_its_frames(
    bridge: core.Bridge, guests: MakeGuest
) -> None:
    """Each call of such a guest takes long; it gets them all, and the others theirs."""
    watched, other, sink = guests(bridge), guests(bridge), guests(bridge, num=1024)
    sink.port.set_mac(mac(5), False)
    sink.pair.fill()
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(select.epoll()).register(watched.pair.tx.call_fd, select.EPOLLIN)
        for number in range(64):
            watched.pair.send(frame(mac(5), mac(6), mark=bytes([number])))
            other.pair.send(frame(mac(5), mac(7), mark=bytes([number])))
            assert other.pair.wait_sent()
            assert watched.pair.wait_sent()
    got = sink.pair.frames(128)
    for number in 6, 7:
        assert [each for each in got if each[6:12] == mac(number)] == [
            frame(mac(5), mac(number), mark=bytes([i])) for i in range(64)
        ]
