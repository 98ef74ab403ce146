"""An interface and its far end, for tests to which any will do."""

from collections.abc import Iterator

import pytest

from tests.rig.netns import Veth, veth


@pytest.fixture
def pair() -> Iterator[Veth]:
    with veth() as made:
        yield made
