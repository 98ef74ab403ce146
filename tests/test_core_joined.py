"""TCP that the kernel has joined, as generic XDP hands it over: of either version of IP, and with CWR."""

import os
import socket
import struct

import pytest

from tests.guests import MakeBridge, MakeGuest
from tests.netns import Veth, needs_root
from tests.rings import MODERN
from tests.segments import CWR, ECN, TSO4, TSO6
from tests.test_core_csum import PARTIAL, TCP, over
from tests.test_large_frames import GUEST, TSO, guest_on, jumbo
from xdpnet import core
from xdpnet.virtq.features import VirtioFeature, mask

pytest_plugins = ["tests.guest_fixtures"]
pytestmark = [needs_root, pytest.mark.net, pytest.mark.core]

FLAGS = 13  # of a TCP header
TAKES = {
    "nothing": 0,
    "large": TSO,
    "large with ecn": TSO | mask(VirtioFeature.VIRTIO_NET_F_GUEST_ECN),
}


@pytest.fixture
def bridge(make_bridge: MakeBridge) -> core.Bridge:
    return make_bridge(netdev_queues=2, frames_per_queue=256)


def send(pair: Veth, whole: bytes, kind: int, l4: int) -> None:
    """One frame that stands for many, from the far end."""

    def inside() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.setsockopt(263, 15, 1)  # PACKET_VNET_HDR
            raw.bind((pair.peer, 3))
            raw.send(struct.pack("=BBHHHH", 1, kind, l4 + 20, 1400, l4, 16) + whole)

    pair.namespace.call(inside)


@pytest.mark.parametrize("takes", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("reduced", [False, True], ids=["plain", "cwr"])
@pytest.mark.parametrize("version", [4, 6])
def test_c30_joined_tcp_is_one_frame_for_who_takes_that_and_many_for_others(
    bridge: core.Bridge, guests: MakeGuest, version: int, reduced: bool, takes: int
) -> None:
    l4, kind = (34, TSO4) if version == 4 else (54, TSO6)
    kind |= ECN * reduced
    payload = os.urandom(20000)
    whole = bytearray(over(version, TCP, payload, PARTIAL, to=GUEST))
    whole[l4 + FLAGS] |= CWR * reduced
    size = 1500 - (l4 - 14) - 20
    with jumbo(bridge, 1500, mode="generic") as (pair, _):
        guest = guest_on(bridge, guests, MODERN | takes)
        send(pair, bytes(whole), kind, l4)
        is_whole = takes and (not reduced or takes != TSO)
        got = guest.pair.receive(1 if is_whole else -(-len(payload) // size))
    assert b"".join(packet.frame[l4 + 20 :] for packet in got) == payload
    # The mark is the first segment's alone (RFC 3168, 6.1.2).
    assert [bool(packet.frame[l4 + FLAGS] & CWR) for packet in got] == [reduced] + [False] * (len(got) - 1)
    if is_whole:
        assert got[0].header[:10] == struct.pack("<BBHHHH", 1, kind, l4 + 20, size, l4, 16)
