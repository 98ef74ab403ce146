"""The AF_PACKET socket of a netdev port: group-addressed frames, which XDP cannot clone, and receive filters.

Owns one socket: a classic BPF filter lets in frames with the group bit of the destination, none that the host sends.
Nothing is queued before the filter is in place: the socket is made with protocol 0, which receives nothing. The
interface takes frames for the guests' unicast addresses, and all multicast, for as long as the socket lives.
Reference: packet(7).
"""

import array
import errno
import logging
import socket
import struct
from collections.abc import Iterable

log = logging.getLogger(__name__)

ETH_P_ALL = 3
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP = 1
PACKET_DROP_MEMBERSHIP = 2
PACKET_STATISTICS = 6
PACKET_AUXDATA = 8
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
PACKET_MR_ALLMULTI = 2
PACKET_MR_UNICAST = 3

RECEIVE_BUFFER = 4 << 20  # a broadcast storm of some milliseconds
SNAPLEN = 1 << 18

# struct sock_filter {u16 code; u8 jt; u8 jf; u32 k}
GROUP_FILTER = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 0),  # ldb [0]
        (0x45, 0, 1, 1),  # jset #1, next, next but one
        (0x06, 0, 0, SNAPLEN),  # ret
        (0x06, 0, 0, 0),  # ret #0
    )
)


class GroupSocket:
    """Open and bound from the start; close() ends it and what it asked of the interface."""

    def __init__(self, ifname: str, ifindex: int) -> None:
        self._ifindex = ifindex
        self._lost = 0
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        try:
            self._configure(ifname)
        except BaseException:
            self._socket.close()
            raise

    def _configure(self, ifname: str) -> None:
        code = array.array("B", GROUP_FILTER)
        address, length = code.buffer_info()
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", length // 8, address))
        self._socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self._socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)  # the kernel takes VLAN tags out of the frame
        # In front of each frame: where its checksum is partial, and of what size are those that are joined in it.
        self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        self._membership(PACKET_ADD_MEMBERSHIP, PACKET_MR_ALLMULTI, b"")
        self._socket.bind((ifname, ETH_P_ALL))
        bound = socket.if_nametoindex(ifname)
        if bound != self._ifindex:
            raise OSError(errno.ENODEV, f"bind AF_PACKET socket to {ifname}: the interface was replaced")

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def lost(self) -> int:
        """Frames so far that found the receive buffer full."""
        # struct tpacket_stats {u32 tp_packets, tp_drops}; reading sets both to zero
        _, drops = struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self._lost += drops
        return self._lost

    def add(self, macs: Iterable[bytes]) -> None:
        """Have the interface receive frames for these unicast addresses."""
        for mac in macs:
            self._membership(PACKET_ADD_MEMBERSHIP, PACKET_MR_UNICAST, mac)

    def drop(self, macs: Iterable[bytes]) -> None:
        for mac in macs:
            try:
                self._membership(PACKET_DROP_MEMBERSHIP, PACKET_MR_UNICAST, mac)
            except OSError as error:  # the kernel forgot it with the interface
                log.debug("drop receive filter %s: %s", mac.hex(":"), error)

    def _membership(self, option: int, kind: int, mac: bytes) -> None:
        request = struct.pack("=iHH8s", self._ifindex, kind, len(mac), mac)  # struct packet_mreq
        self._socket.setsockopt(SOL_PACKET, option, request)
