"""A scene for hostile guests: one of them, and two good ones that must not notice."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.rig.guests import MakeGuest, frame, mac
from tests.rig.rings import MODERN, SPLIT_REGIONS, WRITE, Ring
from tests.rig.waiting import eventually
from xdpnet import core

END = SPLIT_REGIONS[2].guest_addr + SPLIT_REGIONS[2].size
RINGS = {"tx": 1, "rx": 0}
each_ring = pytest.mark.parametrize("index", RINGS.values(), ids=RINGS.keys())


class Scene:
    """A hostile guest, and two good ones that talk to each other and to it."""

    def __init__(self, bridge: core.Bridge, guests: MakeGuest, features: int = MODERN, num: int = 16) -> None:
        self.bridge = bridge
        self.bad = guests(bridge, features=features, num=num, spans=SPLIT_REGIONS)
        self.good = [guests(bridge), guests(bridge)]
        for number, driver in enumerate([self.bad, *self.good]):
            driver.port.set_mac(mac(number), False)
            if number:
                driver.pair.fill()
        bridge.events()
        assert eventually(self.bad.pair.tx.waits)  # its worker writes no more to it, of its own accord
        self.bad.memory.watch()

    def ring(self, index: int) -> Ring:
        return self.bad.rings()[index]

    def use(self, index: int) -> None:
        """Make the device look at the ring: for the receive ring, a frame for the guest."""
        if index == core.TX:
            self.ring(index).kick(always=True)
        else:
            self.ring(index).publish()
            self.good[0].pair.send(frame(mac(0), mac(1)))
            assert self.good[0].pair.wait_sent()

    def others_are_undisturbed(self) -> None:
        one, two = self.good
        one.pair.send(frame(mac(2), mac(1), mark=b"there"))
        assert two.pair.frames() == [frame(mac(2), mac(1), mark=b"there")]
        two.pair.send(frame(mac(1), mac(2), mark=b"back"))
        assert one.pair.frames() == [frame(mac(1), mac(2), mark=b"back")]
        for driver in self.good:
            driver.pair.reap()
            driver.pair.fill()

    def is_broken(self, index: int, reason: str) -> None:
        """The ring is latched broken, everybody is told once, and nothing of it is touched any more."""
        state = self.bad.state
        assert eventually(lambda: state(index).broken != "")
        assert state(index).broken == reason
        assert self.ring(index).is_in_error()
        assert self.bad.stats(index).breaks == 1
        assert self.bridge.events() & core.EVENT_BROKEN
        assert self.bridge.broken_rings() == [core.BrokenRing(self.bad.port, index, reason)]
        assert state(1 - index).broken == ""
        before = self.bad.memory.snapshot()
        self.use(index)
        self.others_are_undisturbed()
        assert self.bad.memory.changes(before, [self.ring(index).parts()[1]]) == []
        assert self.bad.stats(index).breaks == 1

    def revives(self, index: int) -> None:
        self.bad.restart(index)
        assert self.bad.state(index).broken == ""
        self.both_ways_work(index)

    def both_ways_work(self, index: int) -> None:
        if index == core.TX:
            self.bad.pair.send(frame(mac(1), mac(0), mark=b"again"))
            assert frame(mac(1), mac(0), mark=b"again") in self.good[0].pair.frames()
            assert self.bad.pair.wait_sent()
        else:
            self.bad.pair.post(min(4, self.ring(index).room))
            self.good[0].pair.send(frame(mac(0), mac(1), mark=b"again"))
            assert self.bad.pair.frames() == [frame(mac(0), mac(1), mark=b"again")]
        self.others_are_undisturbed()

    def leaves_no_trace(self) -> None:
        """At the end, whatever the guest has done: the others are undisturbed, the device has written to nothing that
        it was not given, and a reset of its rings revives the guest."""
        self.bad.stop()
        for driver in self.good:
            driver.drain()
        self.others_are_undisturbed()
        self.no_strange_bytes()
        for index in range(2):
            self.revives(index)
        self.no_strange_bytes()

    def no_strange_bytes(self) -> None:
        device = [area for ring in self.bad.rings() for area in ring.device_areas()]
        assert self.bad.memory.strange(device) == []

    @contextmanager
    def nothing_is_written(self) -> Iterator[None]:
        """Outside the rings of the bad guest, of which the device has its parts."""
        before = self.bad.memory.snapshot()
        yield
        driver = [ring.parts()[1] for ring in self.bad.rings()]
        device = [area for ring in self.bad.rings() for area in ring.device_areas()]
        assert self.bad.memory.changes(before, driver + device) == []


def break_it(scene: Scene, index: int, reason: str) -> None:
    """The chain is written; show it, see the ring break, revive it."""
    with scene.nothing_is_written():
        scene.use(index)
        assert eventually(lambda: scene.bad.state(index).broken != "")
    scene.is_broken(index, reason)
    scene.revives(index)


def own_flags(index: int) -> int:
    return 0 if index == core.TX else WRITE
