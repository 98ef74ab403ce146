"""A GiB each way between two guests, at once, in frames of every size: what arrives is what was sent."""

import hashlib
import random

from tests.guests import MakeBridge, MakeGuest, both_layouts, mac
from tests.rings import MIB, Span
from xdpnet import core

pytest_plugins = ["tests.guest_fixtures"]
pytestmark = both_layouts

GIB = 1 << 30
RAM = (Span(0x4000_0000, 64 * MIB, 0x7F12_0000_0000, 0),)
BUFFER = 24 << 10  # a frame of 64 KiB takes three
SIZES = [60, 1514, 9014, 40_000, 65_000, *[65_535 + 14] * 12]


def test_a_gib_each_way_arrives_whole(make_bridge: MakeBridge, guests: MakeGuest, packed: int) -> None:
    num = 509 if packed else 512
    bridge = make_bridge(workers=2)
    both = [guests(bridge, num=num, spans=RAM) for _ in range(2)]
    noise = random.Random(1).randbytes(2 * MIB)
    dice = random.Random(2)
    sent, received = ([hashlib.sha1() for _ in both] for _ in range(2))
    got = [0, 0]
    for number, driver in enumerate(both):
        bridge.set_mac(driver.port, mac(number), check_source=True)
        driver.pair.post(num, BUFFER)
    while min(got) < GIB:
        sizes = [dice.choice(SIZES) for _ in range(64)]
        for number, driver in enumerate(both):
            head = mac(1 - number) + mac(number) + b"\x88\xb5"
            for size in sizes:
                at = dice.randrange(MIB)
                each = head + noise[at : at + size - 14]
                sent[number].update(each)
                driver.pair.queue(each)
            driver.pair.tx.kick()
        for number, driver in enumerate(both):
            frames = driver.pair.frames(len(sizes))
            assert len(frames) == len(sizes)
            for each in frames:
                received[1 - number].update(each)
                got[number] += len(each)
            driver.pair.post(driver.pair.rx.room, BUFFER)
        for driver in both:
            assert driver.pair.wait_sent()
    assert [h.hexdigest() for h in received] == [h.hexdigest() for h in sent]
    for number, driver in enumerate(both):
        assert driver.stats(core.RX).bytes == got[number]
        assert driver.drops(core.RX) == driver.drops(core.TX) == {}
