"""What guests leave to the device, or take undone from it: feature bits, headers that ask, a segment of each kind."""

import random
import struct
from dataclasses import replace

from tests.rig.segments import ECN, TSO4, TSO6, UDP, UFO, USO, Segment, checksum
from xdpnet.virtq.features import VirtioFeature, mask

V = VirtioFeature
CSUM, GUEST_CSUM = mask(V.VIRTIO_NET_F_CSUM), mask(V.VIRTIO_NET_F_GUEST_CSUM)
HOST = {
    TSO4: mask(V.VIRTIO_NET_F_HOST_TSO4),
    TSO6: mask(V.VIRTIO_NET_F_HOST_TSO6),
    ECN: mask(V.VIRTIO_NET_F_HOST_ECN),
    UFO: mask(V.VIRTIO_NET_F_HOST_UFO),
    USO: mask(V.VIRTIO_NET_F_HOST_USO),
}
GUEST = {
    TSO4: mask(V.VIRTIO_NET_F_GUEST_TSO4),
    TSO6: mask(V.VIRTIO_NET_F_GUEST_TSO6),
    ECN: mask(V.VIRTIO_NET_F_GUEST_ECN),
    UFO: mask(V.VIRTIO_NET_F_GUEST_UFO),
    USO: mask(V.VIRTIO_NET_F_GUEST_USO4, V.VIRTIO_NET_F_GUEST_USO6),
}
SENDS = CSUM | sum(HOST.values())
TAKES = GUEST_CSUM | sum(GUEST.values())


def data(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def kind_of(segment: Segment) -> int:
    if segment.protocol == UDP:
        return USO
    return TSO4 if segment.version == 4 else TSO6


TCP4 = Segment(payload=data(3000))
TCP6 = replace(TCP4, version=6)
UDP4 = replace(TCP4, protocol=UDP)
UDP6 = replace(TCP4, version=6, protocol=UDP)


def asks(start: int, offset: int) -> bytes:
    """A virtio_net_hdr: the sum from `start` on is to be put `offset` bytes behind that."""
    return struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0)


def summed(sent: bytes, start: int, offset: int) -> bytes:
    """The frame as the device is to make it of what asks() says."""
    at = start + offset
    return sent[:at] + struct.pack(">H", checksum(sent[start:])) + sent[at + 2 :]
