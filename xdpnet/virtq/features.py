"""Feature bits by their names in the specifications, and which of them we offer.

Owns the two tables of what a device offers; a later feature is one more line here. The length of the virtio_net_hdr and
everything else that a bit decides in the data path follows in the core from the negotiated bits.

Reference: virtio 1.2 sections 5.1.3 and 6; QEMU docs/interop/vhost-user.rst, "Protocol features".
"""

from collections.abc import Callable
from enum import IntEnum


class VirtioFeature(IntEnum):
    """Bits of GET_FEATURES and SET_FEATURES."""

    VIRTIO_NET_F_CSUM = 0
    VIRTIO_NET_F_GUEST_CSUM = 1
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 2
    VIRTIO_NET_F_MTU = 3
    VIRTIO_NET_F_MAC = 5
    VIRTIO_NET_F_GSO = 6
    VIRTIO_NET_F_GUEST_TSO4 = 7
    VIRTIO_NET_F_GUEST_TSO6 = 8
    VIRTIO_NET_F_GUEST_ECN = 9
    VIRTIO_NET_F_GUEST_UFO = 10
    VIRTIO_NET_F_HOST_TSO4 = 11
    VIRTIO_NET_F_HOST_TSO6 = 12
    VIRTIO_NET_F_HOST_ECN = 13
    VIRTIO_NET_F_HOST_UFO = 14
    VIRTIO_NET_F_MRG_RXBUF = 15
    VIRTIO_NET_F_STATUS = 16
    VIRTIO_NET_F_CTRL_VQ = 17
    VIRTIO_NET_F_CTRL_RX = 18
    VIRTIO_NET_F_CTRL_VLAN = 19
    VIRTIO_NET_F_CTRL_RX_EXTRA = 20
    VIRTIO_NET_F_GUEST_ANNOUNCE = 21
    VIRTIO_NET_F_MQ = 22
    VIRTIO_NET_F_CTRL_MAC_ADDR = 23
    VIRTIO_F_NOTIFY_ON_EMPTY = 24
    VHOST_F_LOG_ALL = 26
    VIRTIO_F_ANY_LAYOUT = 27
    VIRTIO_RING_F_INDIRECT_DESC = 28
    VIRTIO_RING_F_EVENT_IDX = 29
    VHOST_USER_F_PROTOCOL_FEATURES = 30
    VIRTIO_F_VERSION_1 = 32
    VIRTIO_F_ACCESS_PLATFORM = 33
    VIRTIO_F_RING_PACKED = 34
    VIRTIO_F_IN_ORDER = 35
    VIRTIO_F_ORDER_PLATFORM = 36
    VIRTIO_F_SR_IOV = 37
    VIRTIO_F_NOTIFICATION_DATA = 38
    VIRTIO_F_NOTIF_CONFIG_DATA = 39
    VIRTIO_F_RING_RESET = 40
    VIRTIO_NET_F_NOTF_COAL = 53
    VIRTIO_NET_F_GUEST_USO4 = 54
    VIRTIO_NET_F_GUEST_USO6 = 55
    VIRTIO_NET_F_HOST_USO = 56
    VIRTIO_NET_F_HASH_REPORT = 57
    VIRTIO_NET_F_GUEST_HDRLEN = 59
    VIRTIO_NET_F_RSS = 60
    VIRTIO_NET_F_RSC_EXT = 61
    VIRTIO_NET_F_STANDBY = 62
    VIRTIO_NET_F_SPEED_DUPLEX = 63


class ProtocolFeature(IntEnum):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

    VHOST_USER_PROTOCOL_F_MQ = 0
    VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1
    VHOST_USER_PROTOCOL_F_RARP = 2
    VHOST_USER_PROTOCOL_F_REPLY_ACK = 3
    VHOST_USER_PROTOCOL_F_NET_MTU = 4
    VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5
    VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 6
    VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 7
    VHOST_USER_PROTOCOL_F_PAGEFAULT = 8
    VHOST_USER_PROTOCOL_F_CONFIG = 9
    VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 10
    VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 11
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12
    VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15
    VHOST_USER_PROTOCOL_F_STATUS = 16
    VHOST_USER_PROTOCOL_F_XEN_MMAP = 17
    VHOST_USER_PROTOCOL_F_SHARED_OBJECT = 18
    VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19


Condition = Callable[[int, int | None], bool]


def _always(pairs: int, mtu: int | None) -> bool:  # noqa: ARG001
    return True


def _multiqueue(pairs: int, mtu: int | None) -> bool:  # noqa: ARG001
    return pairs > 1


def _mtu_known(pairs: int, mtu: int | None) -> bool:  # noqa: ARG001
    return mtu is not None


# The control queue and the configuration space stay with the frontend: QEMU and DPDK's virtio-user add CTRL_VQ, STATUS
# and MAC themselves. A frontend that passed the control queue on would hang its guest if we offered CTRL_VQ without
# serving it, so MQ comes alone; QEMU asks the backend for MQ, MTU and the ring's own bits (hw/net/vhost_net.c,
# user_feature_bits). QEMU's host_mtu works with and without our MTU bit, and reaches us as NET_SET_MTU either way.
# GUEST_ANNOUNCE costs us nothing: where it is negotiated, QEMU asks the guest to announce itself (configuration space
# and control queue), in all its VLANs and with its IP addresses, and sends us no SEND_RARP (hw/virtio/vhost-user.c,
# vhost_user_migration_done); not offered, QEMU takes the bit away from the guest. RARP is for the other guests.
# Linux refuses a card with what takes a control queue and without one (drivers/net/virtio_net.c, virtnet_validate), and
# user-mode Linux and cloud-hypervisor pass on what they know. So GUEST_ANNOUNCE is for frontends that have asked for
# RARP before, as QEMU does, and MQ for those that have several pairs: for_frontend().
# LOG_ALL is between us and the frontend, to which a guest without it is one that cannot move (QEMU, vhost_dev_init); no
# driver knows it.
# RING_RESET is not offered, though rings stop and start one by one: QEMU would let the guest reset a ring and tell no
# vhost-user backend of it (hw/net/virtio-net.c, virtio_net_queue_reset); the ring would be polled in memory given back.
OFFERED: dict[VirtioFeature, Condition] = {
    VirtioFeature.VIRTIO_F_VERSION_1: _always,
    VirtioFeature.VIRTIO_F_ANY_LAYOUT: _always,
    VirtioFeature.VIRTIO_RING_F_EVENT_IDX: _always,
    VirtioFeature.VIRTIO_RING_F_INDIRECT_DESC: _always,
    VirtioFeature.VIRTIO_F_RING_PACKED: _always,
    VirtioFeature.VIRTIO_F_IN_ORDER: _always,  # the core hands every chain back in the order in which it took them
    VirtioFeature.VIRTIO_F_ORDER_PLATFORM: _always,  # its barriers are those of the processor, not only the compiler's
    VirtioFeature.VIRTIO_NET_F_MRG_RXBUF: _always,
    VirtioFeature.VIRTIO_NET_F_CSUM: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_CSUM: _always,
    VirtioFeature.VIRTIO_NET_F_HOST_TSO4: _always,
    VirtioFeature.VIRTIO_NET_F_HOST_TSO6: _always,
    VirtioFeature.VIRTIO_NET_F_HOST_ECN: _always,
    VirtioFeature.VIRTIO_NET_F_HOST_UFO: _always,
    VirtioFeature.VIRTIO_NET_F_HOST_USO: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_TSO4: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_TSO6: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_ECN: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_UFO: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_USO4: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_USO6: _always,
    VirtioFeature.VIRTIO_NET_F_GUEST_ANNOUNCE: _always,
    VirtioFeature.VIRTIO_NET_F_MQ: _multiqueue,
    VirtioFeature.VIRTIO_NET_F_MTU: _mtu_known,
    VirtioFeature.VHOST_F_LOG_ALL: _always,
    VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES: _always,
}

OFFERED_PROTOCOL: tuple[ProtocolFeature, ...] = (
    ProtocolFeature.VHOST_USER_PROTOCOL_F_MQ,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_RARP,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_NET_MTU,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ProtocolFeature.VHOST_USER_PROTOCOL_F_STATUS,
)


# What a feature is worth nothing without: one of these. It is not refused: QEMU passes on what a driver takes, and
# Linux takes TSO of a card without checksums (csum=off), to make no use of it.
REQUIRED: dict[VirtioFeature, tuple[VirtioFeature, ...]] = {
    VirtioFeature.VIRTIO_NET_F_HOST_TSO4: (VirtioFeature.VIRTIO_NET_F_CSUM,),
    VirtioFeature.VIRTIO_NET_F_HOST_TSO6: (VirtioFeature.VIRTIO_NET_F_CSUM,),
    VirtioFeature.VIRTIO_NET_F_HOST_UFO: (VirtioFeature.VIRTIO_NET_F_CSUM,),
    VirtioFeature.VIRTIO_NET_F_HOST_USO: (VirtioFeature.VIRTIO_NET_F_CSUM,),
    VirtioFeature.VIRTIO_NET_F_HOST_ECN: (VirtioFeature.VIRTIO_NET_F_HOST_TSO4, VirtioFeature.VIRTIO_NET_F_HOST_TSO6),
    VirtioFeature.VIRTIO_NET_F_GUEST_TSO4: (VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,),
    VirtioFeature.VIRTIO_NET_F_GUEST_TSO6: (VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,),
    VirtioFeature.VIRTIO_NET_F_GUEST_UFO: (VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,),
    VirtioFeature.VIRTIO_NET_F_GUEST_USO4: (VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,),
    VirtioFeature.VIRTIO_NET_F_GUEST_USO6: (VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,),
    VirtioFeature.VIRTIO_NET_F_GUEST_ECN: (
        VirtioFeature.VIRTIO_NET_F_GUEST_TSO4,
        VirtioFeature.VIRTIO_NET_F_GUEST_TSO6,
    ),
}


def mask(*bits: int) -> int:
    """The word with exactly these bits set."""
    return sum(1 << bit for bit in set(bits))


VERSION_1 = mask(VirtioFeature.VIRTIO_F_VERSION_1)
PROTOCOL_FEATURES = mask(VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES)
RING_PACKED = mask(VirtioFeature.VIRTIO_F_RING_PACKED)
LOG_ALL = mask(VirtioFeature.VHOST_F_LOG_ALL)
MULTIQUEUE = mask(VirtioFeature.VIRTIO_NET_F_MQ)
# What a guest takes from us undone. By its control queue it may go back on that (CTRL_GUEST_OFFLOADS), as Linux does
# for a native XDP program; but QEMU keeps the control queue and tells no vhost-user backend.
GUEST_OFFLOADS = mask(
    VirtioFeature.VIRTIO_NET_F_GUEST_CSUM,
    VirtioFeature.VIRTIO_NET_F_GUEST_TSO4,
    VirtioFeature.VIRTIO_NET_F_GUEST_TSO6,
    VirtioFeature.VIRTIO_NET_F_GUEST_ECN,
    VirtioFeature.VIRTIO_NET_F_GUEST_UFO,
    VirtioFeature.VIRTIO_NET_F_GUEST_USO4,
    VirtioFeature.VIRTIO_NET_F_GUEST_USO6,
)
# The bits that may change while a ring runs: neither alters the layout of anything.
CHANGEABLE_LIVE = PROTOCOL_FEATURES | LOG_ALL


def effective(bits: int) -> int:
    """These without what lacks a feature that it requires (virtio 1.2, 5.1.3.1): such count as not negotiated."""
    for feature, alternatives in REQUIRED.items():
        if not bits & mask(*alternatives):
            bits &= ~mask(feature)
    return bits


def modern_only(bits: int) -> int:
    """Those that no legacy driver can have, for it has 32 bits: none of them goes without VERSION_1."""
    return bits >> (VirtioFeature.VIRTIO_F_VERSION_1 + 1) << (VirtioFeature.VIRTIO_F_VERSION_1 + 1)


def offered(pairs: int, mtu: int | None, guest_offloads: bool = True) -> int:
    """The answer to GET_FEATURES of a device with so many queue pairs and this MTU, if one is known."""
    bits = mask(*(bit for bit, condition in OFFERED.items() if condition(pairs, mtu)))
    return bits if guest_offloads else bits & ~GUEST_OFFLOADS


def for_frontend(bits: int, rarp: bool, multiqueue: bool) -> int:
    """Those of the offered ones that a frontend is told of: has it negotiated RARP (by now), has it several pairs?"""
    lacking = ((VirtioFeature.VIRTIO_NET_F_GUEST_ANNOUNCE, rarp), (VirtioFeature.VIRTIO_NET_F_MQ, multiqueue))
    return bits & ~mask(*(feature for feature, wanted in lacking if not wanted))


def offered_protocol() -> int:
    """The answer to GET_PROTOCOL_FEATURES."""
    return mask(*OFFERED_PROTOCOL)


def names(bits: int, kind: type[VirtioFeature] | type[ProtocolFeature] = VirtioFeature) -> list[str]:
    """The names of the set bits, lowest first; a bit without a name shows as "bit N"."""
    known = {member.value: member.name for member in kind}
    return [known.get(bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]
