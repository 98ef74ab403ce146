"""An interface for the daemon, and its far end."""

from collections.abc import Iterator

import pytest

from tests.rig.netns import Veth, veth


@pytest.fixture
def wire() -> Iterator[Veth]:
    with veth() as made:
        yield made
