"""What the core reports: addresses are steered at once and then not too often."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from tests.waiting import PATIENCE_S
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


def with_bridge(steps: Callable[[core.Bridge, int, Interface], Awaitable[None]]) -> Interface:
    """Runs the steps beside a bridge with one guest, whose events are read."""
    interface = Interface()

    async def run() -> None:
        with core.Bridge() as bridge:
            port = bridge.add_guest(1)
            bridge.start()
            reports = Reports(bridge, {port: ("web", 1)}, {"eth1": interface}, lambda _: None)
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
    async def steps(bridge: core.Bridge, port: int, interface: Interface) -> None:
        bridge.set_mac(port, MAC, True)
        await settle(lambda: bool(interface.synced) and interface.synced[-1] == {MAC})

    with_bridge(steps)


def test_a_flood_of_changes_costs_few_updates_and_the_last_state_wins() -> None:
    """One at once, and one more each time that the pause is over, however long the changes take."""

    async def steps(bridge: core.Bridge, port: int, interface: Interface) -> None:
        begin = time.monotonic()
        for number in range(50):
            bridge.set_mac(port, MAC[:5] + bytes([number]), True)
            await asyncio.sleep(0)
        await settle(lambda: bool(interface.synced) and MAC[:5] + bytes([49]) in interface.synced[-1])
        assert len(interface.synced) <= 1 + (time.monotonic() - begin) / SETTLE_S

    with_bridge(steps)


def test_an_interface_that_cannot_take_the_addresses_stops_nothing() -> None:
    async def steps(bridge: core.Bridge, port: int, interface: Interface) -> None:
        interface.fails = True
        bridge.set_mac(port, MAC, True)
        await settle(lambda: len(interface.synced) == 1)
        await asyncio.sleep(2 * SETTLE_S)
        interface.fails = False
        bridge.set_mac(port, MAC[:5] + b"\x02", True)
        await settle(lambda: len(interface.synced) == 2)

    with_bridge(steps)
