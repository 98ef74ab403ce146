"""Both ends of a wire, and what holds of a daemon after each test with a guest."""

from collections.abc import Iterator
from typing import Protocol

import pytest

from xdpnet.demo import topology
from xdpnet.demo.backend import Backend, balanced


class Stage(Protocol):
    """Of a module's fixture `stage`: whatever else it has."""

    backend: Backend


@pytest.fixture
def net() -> Iterator[topology.Topology]:
    with topology.topology() as made:
        yield made


@pytest.fixture
def books_balance(stage: Stage) -> Iterator[None]:
    """Every frame is accounted for."""
    yield
    snapshot = stage.backend.settled()
    assert balanced(snapshot), snapshot.totals
