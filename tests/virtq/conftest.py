"""A backend in the test's process, and whether it has closed what it opened."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.rig.descriptors import open_files
from tests.rig.waiting import until_equal

if TYPE_CHECKING:
    from tests.rig.backend import Backend, ControlThread, MakeBackend
    from xdpnet.core import Bridge


@pytest.fixture
def fds_unchanged() -> Iterator[None]:
    """Every descriptor that the test, or what it tests, has opened is closed, if need be by another thread."""
    before = open_files()
    yield
    until_equal(open_files, before)


# The fixtures below import late: --core has its say first.


@pytest.fixture(scope="module")
def bridge(control: "ControlThread") -> Iterator["Bridge"]:
    """A bridge of one worker, running; only the control thread may touch it."""
    with control.bridge() as made:
        yield made


@pytest.fixture
def make_backend(control: "ControlThread", bridge: "Bridge", fds_unchanged: None) -> Iterator["MakeBackend"]:
    """Makes guest ports, each behind a vhost-user socket of its own."""
    from tests.rig.backend import Backend

    made: list[Backend] = []

    def make(pairs: int = 1, mtu: int | None = None) -> Backend:
        made.append(Backend(control, bridge, pairs, mtu))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def backend(make_backend: "MakeBackend") -> "Backend":
    """A guest port of one queue pair."""
    return make_backend()
