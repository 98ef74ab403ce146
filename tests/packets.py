"""TCP and UDP packets byte by byte, and what the frames of the wire are that a large one stands for.

A reference of its own: nothing of the core is used here. RFC 1071, 791, 8200, 9293, 768; virtio 1.3, 5.1.6.2.
"""

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.guests import mac

TCP, UDP = 6, 17
FIN, SYN, PSH, ACK, URG, ECE, CWR = 0x01, 0x02, 0x08, 0x10, 0x20, 0x40, 0x80
NEEDS_CSUM, DATA_VALID = 1, 2
GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 1, 3, 4, 5, 0x80
V4 = [ipaddress.ip_address(f"10.9.0.{last}").packed for last in (1, 2)]
V6 = [ipaddress.ip_address(f"fd00::{last}").packed for last in (1, 2)]
ONE_TAG, TWO_TAGS = b"\x81\0\0\5", b"\x88\xa8\0\6\x81\0\0\5"
HOP_BY_HOP, DESTINATION = 0, 60


def fold(data: bytes) -> int:
    """The ones' complement sum."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Packet:
    """`extensions` of IPv6: kind and bytes behind the first two of each header, a multiple of 8 less 2."""

    version: int
    protocol: int
    payload: bytes
    to: bytes = mac(2)
    source: bytes = mac(1)
    tags: bytes = b""
    tos: int = 0
    ident: int = 7
    ttl: int = 64
    fragment: int = 0x4000
    ip_options: bytes = b""
    extensions: Sequence[tuple[int, bytes]] = ()
    seq: int = 1
    ack: int = 2
    flags: int = ACK
    window: int = 500
    options: bytes = b""
    port: int = 2000

    @property
    def l3(self) -> int:
        return 14 + len(self.tags)

    @property
    def l4(self) -> int:
        behind = len(self.ip_options) if self.version == 4 else sum(2 + len(body) for _, body in self.extensions)
        return self.l3 + (20 if self.version == 4 else 40) + behind

    @property
    def headers(self) -> int:
        return self.l4 + (20 + len(self.options) if self.protocol == TCP else 8)

    @property
    def csum_offset(self) -> int:
        return 16 if self.protocol == TCP else 6

    def frame(self, partial: bool = False) -> bytes:
        """With a right checksum, or with the sum of the pseudo header alone."""
        segment, at = self._segment(), self.csum_offset
        ends = b"".join(V4 if self.version == 4 else V6)
        pseudo = ends + struct.pack(">IHBB", len(segment), 0, 0, self.protocol)
        value = fold(pseudo) if partial else ~fold(pseudo + segment) & 0xFFFF or 0xFFFF
        return self._link() + self._ip(segment[:at] + struct.pack(">H", value) + segment[at + 2 :])

    def _link(self) -> bytes:
        return self.to + self.source + self.tags + (b"\x08\0" if self.version == 4 else b"\x86\xdd")

    def _segment(self) -> bytes:
        if self.protocol == UDP:
            return struct.pack(">HHHH", 1000, self.port, 8 + len(self.payload), 0) + self.payload
        words = 5 + len(self.options) // 4
        fields = (1000, self.port, self.seq & 0xFFFFFFFF, self.ack, words << 12 | self.flags, self.window, 0, 0)
        return struct.pack(">HHIIHHHH", *fields) + self.options + self.payload

    def _ip(self, behind: bytes) -> bytes:
        if self.version == 4:
            words, size = 0x45 + len(self.ip_options) // 4, 20 + len(self.ip_options) + len(behind)
            fields = (words, self.tos, size, self.ident & 0xFFFF, self.fragment, self.ttl, self.protocol, 0)
            header = struct.pack(">BBHHHBBH", *fields) + b"".join(V4) + self.ip_options
            return header[:10] + struct.pack(">H", ~fold(header) & 0xFFFF) + header[12:] + behind
        kinds = [kind for kind, _ in self.extensions] + [self.protocol]
        more = b"".join(
            bytes([then, (2 + len(body)) // 8 - 1]) + body
            for then, (_, body) in zip(kinds[1:], self.extensions, strict=True)
        )
        first = struct.pack(">IHBB", 6 << 28 | self.tos << 20, len(more) + len(behind), kinds[0], self.ttl)
        return first + b"".join(V6) + more + behind

    # ---- in one for many ----

    @property
    def gso_type(self) -> int:
        if self.protocol == UDP:
            return GSO_UDP_L4
        kind = GSO_TCPV4 if self.version == 4 else GSO_TCPV6
        return kind | (GSO_ECN if self.flags & CWR else 0)

    def header(self, gso_size: int = 0, gso_type: int | None = None, length: int = 12) -> bytes:
        """The virtio_net_hdr of frame(partial=True); num_buffers is zero."""
        kind = (self.gso_type if gso_type is None else gso_type) if gso_size else 0
        fields = (NEEDS_CSUM, kind, self.headers if gso_size else 0, gso_size, self.l4, self.csum_offset, 0)
        return struct.pack("<BBHHHHH", *fields)[:length]

    def segments(self, size: int) -> list["Packet"]:
        """As TCP and UDP segmentation have it: tcp_gso_segment, inet_gso_segment."""
        parts = [self.payload[at : at + size] for at in range(0, len(self.payload), size)] or [b""]
        made = []
        for number, part in enumerate(parts):
            flags = self.flags
            if number:
                flags &= ~CWR
            if number < len(parts) - 1:
                flags &= ~(FIN | PSH)
            made.append(
                replace(self, payload=part, seq=self.seq + number * size, ident=self.ident + number, flags=flags)
            )
        return made

    def fragments(self, size: int) -> list[bytes]:
        """As UDP fragmentation has it, of IPv4: the whole datagram's checksum, cut at multiples of 8 bytes."""
        size &= ~7
        behind = self.frame()[self.l4 :]
        made = []
        for at in range(0, len(behind), size):
            last = at + size >= len(behind)
            part = replace(self, fragment=at // 8 | (0 if last else 0x2000))
            made.append(part._link() + part._ip(behind[at : at + size]))
        return made
