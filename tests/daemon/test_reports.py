"""What the core reports: addresses are steered at once and then not too often."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest

from tests.rig.driver import Driver
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.rings import VERSION_1, Buffer
from tests.rig.waiting import PATIENCE_S, eventually
from xdpnet import core
from xdpnet.reports import SETTLE_S, Reports

MAC = bytes.fromhex("525400000001")


class Interface:
    """Remembers what it was told to steer."""

    def __init__(self) -> None:
        self.synced: list[frozenset[bytes]] = []
        self.fails = False

    def sync_macs(self, macs: frozenset[bytes]) -> None:
        self.synced.append(macs)
        if self.fails:
            raise OSError(7, "map full")

    def poke(self) -> None:
        raise NotImplementedError

    def memory_changed(self) -> None:
        raise NotImplementedError


def with_bridge(
    steps: Callable[[core.Bridge, core.Guest, Interface], Awaitable[None]],
    spent: Callable[[], float] = time.thread_time,
) -> Interface:
    """Runs the steps beside a bridge with one guest, whose events are read."""
    interface = Interface()

    async def run() -> None:
        with core.Bridge() as bridge:
            port = bridge.add_guest(1)
            bridge.start()
            reports = Reports(bridge, {port: "web"}, {"eth1": interface}, lambda _: None, spent=spent)
            try:
                await steps(bridge, port, interface)
            finally:
                reports.close()

    asyncio.run(run())
    return interface


async def settle(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(SETTLE_S)


def test_an_address_that_comes_is_steered_without_being_asked_for() -> None:
    async def steps(bridge: core.Bridge, port: core.Guest, interface: Interface) -> None:
        port.set_mac(MAC, True)
        await settle(lambda: bool(interface.synced) and interface.synced[-1] == {MAC})

    with_bridge(steps)


def test_a_flood_of_changes_costs_few_updates_and_the_last_state_wins() -> None:
    """One at once, and one more each time that the pause is over, however long the changes take."""

    async def steps(bridge: core.Bridge, port: core.Guest, interface: Interface) -> None:
        begin = time.monotonic()
        for number in range(50):
            port.set_mac(MAC[:5] + bytes([number]), True)
            await asyncio.sleep(0)
        await settle(lambda: bool(interface.synced) and MAC[:5] + bytes([49]) in interface.synced[-1])
        assert len(interface.synced) <= 1 + (time.monotonic() - begin) / SETTLE_S

    with_bridge(steps)


def test_an_interface_that_cannot_take_the_addresses_stops_nothing() -> None:
    async def steps(bridge: core.Bridge, port: core.Guest, interface: Interface) -> None:
        interface.fails = True
        port.set_mac(MAC, True)
        await settle(lambda: len(interface.synced) == 1)
        await asyncio.sleep(2 * SETTLE_S)
        interface.fails = False
        port.set_mac(MAC[:5] + b"\x02", True)
        await settle(lambda: len(interface.synced) == 2)

    with_bridge(steps)


@pytest.mark.parametrize(("cost_s", "more"), [(0.0, True), (1000.0, False)], ids=["cheap", "dear"])
def test_the_more_an_update_costs_the_longer_the_next_one_waits(cost_s: float, more: bool) -> None:
    """Of a thousand seconds of work one has to recover for hours."""
    clock = itertools.count(0.0, cost_s)

    async def steps(bridge: core.Bridge, port: core.Guest, interface: Interface) -> None:
        for number in range(20):
            port.set_mac(MAC[:5] + bytes([number]), True)
            await asyncio.sleep(SETTLE_S)

    assert (len(with_bridge(steps, lambda: next(clock)).synced) > 1) is more


def test_64_what_a_guest_sends_first_goes_out_when_its_address_is_steered() -> None:
    """Before that the answer, which can be there in no time, would go to the host."""
    early: list[bool] = []

    class Late(Interface):
        def sync_macs(self, macs: frozenset[bytes]) -> None:
            super().sync_macs(macs)
            early.append(bool(receiver.pair.frames(timeout=0.1)))

    interface = Late()

    async def run() -> None:
        reports = Reports(bridge, {sender.port: "web", receiver.port: "db"}, {"eth1": interface}, lambda _: None)
        reports.sync_addresses()
        early.clear()
        for number in (1, 2):
            sent = frame(BROADCAST, mac(number))
            sender.pair.send(sent)
            await settle(lambda: bool(interface.synced) and mac(number) in interface.synced[-1])  # noqa: B023
            assert receiver.pair.frames() == [sent]
        reports.close()

    core.time_hold()  # nobody waits for ever
    try:
        with core.Bridge() as bridge, contextlib.closing(Driver(bridge).start()) as sender:
            receiver = Driver(bridge).start()
            receiver.pair.fill()
            bridge.start()
            asyncio.run(run())
            bridge.stop()
            receiver.close()
    finally:
        core.time_release()
    assert early
    assert not any(early)


def test_36_a_guest_whose_frames_are_dropped_for_their_source_is_told_of_once_with_the_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)

    async def run() -> None:
        names = {driver.port: name for driver, name in zip(drivers, ("web", "db", "odd"), strict=True)}
        reports = Reports(bridge, names, {}, lambda _: None, {drivers[0].port})
        for _ in range(3):
            reports.say_strays()
            for driver, source in zip(drivers, (mac(9), mac(1), BROADCAST), strict=True):
                driver.pair.send_all([frame(BROADCAST, source), frame(BROADCAST, mac(1)[:5] + bytes([driver.port]))])
        reports.say_strays()
        reports.close()

    with contextlib.ExitStack() as stack:
        bridge = stack.enter_context(core.Bridge())
        drivers = [stack.enter_context(contextlib.closing(Driver(bridge).start())) for _ in range(3)]
        drivers[0].port.set_macs([mac(1), mac(0)], True)
        bridge.start()
        asyncio.run(run())
    assert caplog.messages == [
        (
            "guest web: frames from 52:54:00:00:00:09 are dropped (spoof): it is not its mac; if it is a bridge for "
            "other stations, name them too (mac=MAC+MAC) or set check_source=false"
        ),
        (
            "guest db: frames from 52:54:00:00:00:01 are dropped (spoof): that is another guest's mac, or the host's "
            "address on an interface; give it one of its own"
        ),
        "guest odd: frames from ff:ff:ff:ff:ff:ff are dropped (spoof): that is no station's address; see to its driver",
    ]


# ---- broken rings ----


def broken_rings(*of_each: Sequence[int], restart: int = -1) -> list[int]:
    """Breaks these rings of each guest at once and has it reported; connections that were to be ended, by port."""
    ended: list[int] = []

    async def run() -> None:
        with contextlib.ExitStack() as stack:
            bridge = stack.enter_context(core.Bridge())
            drivers = [
                stack.enter_context(contextlib.closing(Driver(bridge, VERSION_1, num=4, pairs=core.MAX_PAIRS).start()))
                for _ in of_each
            ]
            bridge.start()
            broken = [(driver, ring) for driver, rings in zip(drivers, of_each, strict=True) for ring in rings]
            for driver, ring in broken:
                driver.rings()[ring].raw((0, 64, 0))  # outside of its memory
                driver.rings()[ring].kick(always=True)
            assert eventually(lambda: all(driver.state(ring).broken for driver, ring in broken))
            if restart >= 0:
                drivers[0].restart(restart)
            names = {driver.port: f"vm{number}" for number, driver in enumerate(drivers)}
            reports = Reports(bridge, names, {}, ended.append)
            await asyncio.sleep(2 * SETTLE_S)
            reports.close()

    asyncio.run(run())
    return ended


def test_all_rings_of_a_guest_that_break_together_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert broken_rings((3, 7, 31), (), (1,)) == []
    assert caplog.messages == [
        "guest vm0: tx ring 1 broke: addr, and 2 of its other rings; a reset of its driver revives it",
        "guest vm2: tx ring 0 broke: addr; a reset of its driver revives it",
    ]


def test_a_ring_that_was_reset_before_it_was_named_is_said_to_have_been_broken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    broken_rings((1,), restart=1)
    assert caplog.messages == ["guest vm0: tx ring 0 broke and was reset; a reset of its driver revives it"]


def test_what_a_report_of_broken_rings_costs_is_what_broke(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No ring is asked how it is."""
    monkeypatch.setattr(core.Port, "queue_stats", lambda *_: pytest.fail("asked for counters"))
    caplog.set_level(logging.WARNING)
    broken_rings((1,))
    assert len(caplog.messages) == 1


def test_a_guest_whose_memory_moves_is_told_of_once_and_the_interfaces_look(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the daemon meets the new pages: here it passes a frame to another guest."""
    caplog.set_level(logging.WARNING)
    looks: list[int] = []

    async def run() -> None:
        with contextlib.ExitStack() as stack:
            bridge = stack.enter_context(core.Bridge(netdev_queues=1, frames_per_queue=256, zerocopy="on"))
            bridge.start()
            still, moves = (stack.enter_context(contextlib.closing(Driver(bridge).start())) for _ in range(2))
            bridge.events()
            interface = Interface()
            monkeypatch.setattr(interface, "memory_changed", lambda: looks.append(1))
            names = {still.port: "still", moves.port: "moves"}
            reports = Reports(bridge, names, {"eth1": interface}, lambda _: None)
            stack.callback(reports.close)
            page = moves.memory.reserve(4096, 4096)
            still.pair.fill()
            for guest in (still, moves):
                guest.pair.send(frame(BROADCAST, mac(1)))
            await asyncio.sleep(SETTLE_S)
            assert caplog.messages == []
            moves.memory.give_up(page, 4096)
            moves.memory.write(page, bytes(12) + frame(BROADCAST, mac(2)))
            moves.pair.tx.add([Buffer(page, 12 + 60)], writable=False, owned=False)
            moves.pair.tx.kick()
            moves.pair.send(frame(BROADCAST, mac(3)))
            await settle(lambda: bool(caplog.messages and looks))
            assert eventually(lambda: still.pair.frames()[-1:] == [frame(BROADCAST, mac(3))])

    asyncio.run(run())
    (line,) = caplog.messages
    assert line.startswith("guest moves: some of its memory was given up and taken back")
