"""A daemon that is killed in the middle of traffic, again and again, behind packed rings whose driver goes on.

      "a" (a test's rings) -- xdpnet -- "b" (a test's rings)

The frontend tells each successor what it told the first, as QEMU does; where the rings stand has to be found in them.
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.driver import Layout
from tests.rig.frontend import Frontend
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.remote import PROTOCOL, RemoteGuest
from tests.rig.rings import IN_ORDER, MODERN, RING_PACKED, WRAP
from tests.rig.waiting import until

KILLS = 4


class Packed(RemoteGuest):
    """Its rings may be handed to a successor."""

    def __init__(self, path: Path, number: int, features: int, num: int, most: int) -> None:
        super().__init__(path, features, num)
        self.path = path
        self.features = features
        self.most = most  # descriptors of a chain
        self.mac = mac(number)

    def hand_over(self, base: int) -> None:
        self.frontend.close()
        self.frontend = Frontend.connect(str(self.path))
        self.frontend.negotiate(self.features | PROTOCOL)
        self.start(base)

    def send(self, dice: random.Random, mark: bytes = b"") -> None:
        pieces = dice.randint(1, self.most) - 1
        size = dice.choice([60, 900, 1500])
        self.pair.queue(frame(BROADCAST, self.mac, size, mark=mark), Layout("drawn", lambda _: [1] * pieces))

    def take(self) -> list[bytes]:
        """What has come; of a frame in several buffers the daemon may have handed back the first ones alone."""
        with contextlib.suppress(ValueError):
            return [packet.frame for packet in self.pair.packets()]
        return []

    def fill(self) -> None:
        room = self.pair.rx.room // self.most
        self.pair.post(room, 2048 if self.most > 1 else 400, [1] * (self.most - 1))

    def talk(self, dice: random.Random) -> None:
        with contextlib.suppress(MemoryError):  # the ring is full
            for _ in range(20):
                self.send(dice)
        self.pair.tx.kick()
        self.pair.reap()
        self.take()
        self.fill()


@contextlib.contextmanager
def killed_soon(running: Daemon, dice: random.Random) -> Iterator[None]:
    killer = threading.Timer(dice.uniform(0.02, 0.3), running.process.kill)
    killer.start()
    yield
    killer.join()
    running.process.wait()


def hears(listener: Packed, speaker: Packed, dice: random.Random, mark: bytes) -> bool:
    speaker.send(dice, mark)
    speaker.pair.tx.kick()
    assert speaker.pair.wait_sent()
    listener.pair.rx.sleep(time.monotonic() + 1)
    heard = any(mark in each for each in listener.take())
    listener.fill()
    return heard


@pytest.mark.parametrize("order", [0, IN_ORDER], ids=["any order", "in order"])
@pytest.mark.parametrize("most", [1, 4], ids=["single descriptors", "chains"])
@pytest.mark.parametrize("num", [100, 256])
def test_packed_rings_go_on_wherever_their_daemon_was_killed(tmp_path: Path, order: int, most: int, num: int) -> None:
    dice = random.Random(f"{order} {most} {num}")
    words = [word for name in "ab" for word in ("--guest", guest(tmp_path, name))]
    features = MODERN | RING_PACKED | order
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(daemon(tmp_path, *words)).ready()
        pair = [
            stack.enter_context(Packed(tmp_path / f"{name}.sock", number, features, num, most)).start()
            for number, name in enumerate("ab")
        ]
        for turn in range(KILLS):
            with killed_soon(running, dice):
                while running.process.poll() is None:
                    for each in pair:
                        each.talk(dice)
            running = stack.enter_context(daemon(tmp_path, *words)).ready()
            for each in pair:
                each.hand_over(dice.choice([WRAP * 0x10001, 0]))
            for each in pair:
                assert each.pair.wait_sent(), running.log
                each.take()
                each.fill()
            for each, other in (pair, pair[::-1]):
                until(lambda a=each, b=other, mark=b"turn %d" % turn: hears(a, b, dice, mark))  # type: ignore[misc]
        assert "broke" not in running.log
