"""Fixtures for tests of the C core: bridges with running workers, and guests on them.

A plugin: test modules name it in pytest_plugins; those that want another bridge define `bridge`.
"""

import contextlib
from collections.abc import Iterator

import pytest

from tests.rig.descriptors import open_files
from tests.rig.driver import Driver
from tests.rig.guests import MakeBridge, MakeGuest, Pair, mac
from tests.rig.rings import MODERN, RING_PACKED
from xdpnet import core


@pytest.fixture
def held_time() -> Iterator[None]:
    """The core's time stands still but for bridge.time_advance(); a test names it before its bridges."""
    core.time_hold()
    yield
    core.time_release()


@pytest.fixture
def make_bridge() -> Iterator[MakeBridge]:
    """Makes bridges with running workers; no file descriptor is left of them."""
    before = open_files()
    with contextlib.ExitStack() as stack:

        def make(**options: int) -> core.Bridge:
            made = stack.enter_context(core.Bridge(**options))  # type: ignore[arg-type]
            made.start()
            return made

        yield make
    assert open_files().keys() <= before.keys()


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test once for each layout that the nearest of its marks names (split_only, packed_only, both_layouts)."""
    mark = metafunc.definition.get_closest_marker("layouts")
    if mark and "packed" in metafunc.fixturenames:
        bits = [RING_PACKED * (name == "packed") for name in mark.args]
        metafunc.parametrize("packed", bits, indirect=True, ids=mark.args)


@pytest.fixture
def packed(request: pytest.FixtureRequest) -> int:
    """The feature bit of packed rings, or 0: what `guests` adds to the features that a test asks for."""
    return getattr(request, "param", 0)


@pytest.fixture
def guests(make_bridge: MakeBridge, packed: int) -> Iterator[MakeGuest]:
    """Makes guests with started rings: guests(bridge, features=..., ...). They are closed before their bridge."""
    with contextlib.ExitStack() as stack:

        def make(bridge: core.Bridge, started: bool = True, features: int = MODERN, **options: object) -> Driver:
            made = Driver(bridge, features | packed, **options)  # type: ignore[arg-type]
            stack.callback(made.close)
            return made.start() if started else made

        yield make


@pytest.fixture
def pair(bridge: core.Bridge, guests: MakeGuest) -> Pair:
    """Two guests that know each other: their addresses are mac(1) and mac(2), the second has receive buffers."""
    a, b = guests(bridge), guests(bridge)
    a.port.set_mac(mac(1), False)
    b.port.set_mac(mac(2), False)
    b.pair.fill()
    a.pair.fill()
    return a, b
