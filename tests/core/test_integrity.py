"""Much data both ways at once, in frames of every size: what arrives is what was sent.

Between two guests it is a GiB each way; through a veth pair less, unless --wire-mib says more.
"""

import hashlib
import random
from contextlib import closing

import pytest

from tests.rig.guests import MakeBridge, MakeGuest, both_layouts, mac
from tests.rig.netns import needs_root, veth
from tests.rig.rings import MIB, Span
from xdpnet import core
from xdpnet.netdev.fitness import PLAIN_MTU
from xdpnet.netdev.port import Netdev

pytest_plugins = ["tests.rig.guest_fixtures"]
pytestmark = both_layouts

GIB = 1 << 30
RAM = (Span(0x4000_0000, 64 * MIB, 0x7F12_0000_0000, 0),)
BUFFER = 24 << 10  # a frame of 64 KiB takes three
WIRE_SIZES = [60, 255, 256, 1514, 2049, *[PLAIN_MTU + 14] * 12]
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
        driver.port.set_mac(mac(number), check_source=True)
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


@needs_root
@pytest.mark.net
@pytest.mark.timeout(600)
@pytest.mark.parametrize("zerocopy", ["off", "on"])
def test_what_crosses_a_veth_pair_arrives_whole(
    request: pytest.FixtureRequest, make_bridge: MakeBridge, guests: MakeGuest, packed: int, zerocopy: core.ZeroCopy
) -> None:
    wanted = request.config.getoption("--wire-mib") * MIB
    num = 255 if packed else 256
    bridge = make_bridge(netdev_queues=1, zerocopy=zerocopy)
    guest = guests(bridge, num=num, spans=RAM)
    guest.port.set_mac(mac(1), check_source=False)
    guest.pair.fill(4096)
    noise = random.Random(3).randbytes(MIB + PLAIN_MTU)
    dice = random.Random(4)
    out, far, back, came = (hashlib.sha1() for _ in range(4))
    bytes_out = bytes_back = 0
    with veth(mtu=PLAIN_MTU) as pair, closing(Netdev(bridge, pair.ifname, zerocopy=zerocopy)) as netdev:
        netdev.open()
        netdev.sync_macs([mac(1)])
        netdev.port.set_mac(mac(2), False)
        with pair.wire() as wire:
            while min(bytes_out, bytes_back) < wanted:
                sizes = [dice.choice(WIRE_SIZES) for _ in range(64)]
                for size in sizes:
                    at = dice.randrange(MIB)
                    each = mac(2) + mac(1) + b"\x88\xb5" + noise[at : at + size - 14]
                    out.update(each)
                    guest.pair.queue(each)
                guest.pair.tx.kick()
                for size in sizes:
                    at = dice.randrange(MIB)
                    each = mac(1) + mac(2) + b"\x88\xb5" + noise[at : at + size - 14]
                    back.update(each)
                    wire.send(each)
                for _ in sizes:
                    got = wire.receive()
                    assert got is not None
                    far.update(got)
                    bytes_out += len(got)
                frames = guest.pair.frames(len(sizes))
                assert len(frames) == len(sizes)
                for each in frames:
                    came.update(each)
                    bytes_back += len(each)
                guest.pair.fill(4096)
                assert guest.pair.wait_sent()
        tx = netdev.port.queue_stats(0, core.TX)
    assert far.hexdigest() == out.hexdigest()
    assert came.hexdigest() == back.hexdigest()
    assert (guest.stats(core.TX).bytes, guest.stats(core.RX).bytes) == (bytes_out, bytes_back)
    assert guest.drops(core.TX) == guest.drops(core.RX) == {}
    # Of six kinds of sizes the two shortest are copied in any case.
    assert tx.in_place == 0 if zerocopy == "off" else tx.in_place > 0.8 * tx.packets
