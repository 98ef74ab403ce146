"""Frames that a stack hands to its card to be cut, and the frames of the wire that these are: a reference in Python.

Nothing is patched: each segment is made from its fields as a frame of its own, with its checksum in full. RFC 791,
8200, 9293, 768; what a cut leaves alone and what it counts up is as Linux has it (inet_gso_segment, tcp_gso_segment).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.rig.guests import mac

TCP, UDP, FRAGMENT = 6, 17, 44
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
MORE = 0x2000
TSO4, TSO6, UFO, USO, ECN = 1, 4, 3, 5, 0x80


def fold(data: bytes) -> int:
    """The ones' complement sum, RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    """Zero is sent as ones: UDP has to, and of TCP it is the same number."""
    return ~fold(data) & 0xFFFF or 0xFFFF


@dataclass(frozen=True)
class Segment:
    """A frame of TCP or UDP by its fields."""

    version: int = 4
    protocol: int = TCP
    payload: bytes = b""
    to: bytes = mac(2)
    source: bytes = mac(1)
    tags: bytes = b""
    tos: int = 0
    ttl: int = 64
    ident: int = 1
    fragment: int = 0x4000  # flags and offset; IPv4
    flow: int = 0  # IPv6
    ip_options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()  # of IPv6: kind, and what follows the next header field
    ports: tuple[int, int] = (1000, 2000)
    seq: int = 1
    ack: int = 2
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    options: bytes = b""  # of TCP
    addresses: tuple[int, int] = (1, 2)

    @property
    def ends(self) -> bytes:
        net = b"\x0a\x09\x00" if self.version == 4 else b"\xfd" + bytes(14)
        return b"".join(net + bytes([last]) for last in self.addresses)

    @property
    def l3(self) -> int:
        return 14 + len(self.tags)

    @property
    def l4(self) -> int:
        if self.version == 4:
            return self.l3 + 20 + len(self.ip_options)
        return self.l3 + 40 + sum(1 + len(body) for _, body in self.extensions)

    @property
    def headers(self) -> int:
        return self.l4 + (20 + len(self.options) if self.protocol == TCP else 8)

    @property
    def csum_offset(self) -> int:
        return 16 if self.protocol == TCP else 6

    def transport(self, partial: bool) -> bytes:
        """TCP or UDP; with the sum of the pseudo header alone, or all of it."""
        size = self.headers - self.l4 + len(self.payload)
        pseudo = self.ends + struct.pack(">IHBB", size, 0, 0, self.protocol)
        if self.protocol == TCP:
            words = 5 + len(self.options) // 4
            fields = (*self.ports, self.seq & 0xFFFFFFFF, self.ack, words << 12 | self.flags, self.window)
            head = struct.pack(">HHIIHHHH", *fields, 0, self.urgent) + self.options
        else:
            head = struct.pack(">HHHH", *self.ports, size, 0)
        value = fold(pseudo) if partial else checksum(pseudo + head + self.payload)
        at = self.csum_offset
        return head[:at] + struct.pack(">H", value) + head[at + 2 :] + self.payload

    def ip(self, inner: bytes) -> bytes:
        """The frame with these bytes behind its IP header."""
        if self.version == 4:
            size = 20 + len(self.ip_options) + len(inner)
            first = 0x40 + 5 + len(self.ip_options) // 4
            fields = (first, self.tos, size, self.ident & 0xFFFF, self.fragment, self.ttl, self.protocol)
            head = struct.pack(">BBHHHBBH", *fields, 0) + self.ends + self.ip_options
            head = head[:10] + struct.pack(">H", ~fold(head) & 0xFFFF) + head[12:]
            return self.ethernet(0x0800, head + inner)
        kinds = [kind for kind, _ in self.extensions] + [self.protocol]
        for kind, (_, body) in zip(kinds[:0:-1], reversed(self.extensions), strict=True):
            inner = bytes([kind]) + body + inner
        word = 6 << 28 | self.tos << 20 | self.flow
        return self.ethernet(0x86DD, struct.pack(">IHBB", word, len(inner), kinds[0], self.ttl) + self.ends + inner)

    def ethernet(self, kind: int, inner: bytes) -> bytes:
        return self.to + self.source + self.tags + struct.pack(">H", kind) + inner

    def frame(self, partial: bool = False) -> bytes:
        return self.ip(self.transport(partial))

    def header(self, gso_type: int = 0, gso_size: int = 0, hdr_len: int | None = None) -> bytes:
        """The 12 bytes of virtio_net_hdr that go with the frame whose checksum is partial."""
        length = (self.headers if gso_type else 0) if hdr_len is None else hdr_len
        return struct.pack("<BBHHHHH", 1, gso_type, length, gso_size, self.l4, self.csum_offset, 0)

    def cut(self, size: int) -> list["Segment"]:
        """The segments of `size` bytes of payload that it is."""
        parts = [self.payload[at : at + size] for at in range(0, len(self.payload), size)] or [b""]
        made = []
        for number, part in enumerate(parts):
            flags = self.flags
            if number < len(parts) - 1:
                flags &= ~(FIN | PSH)
            if number:
                flags &= ~CWR
            ident, seq = self.ident + number, self.seq + number * size
            made.append(replace(self, payload=part, flags=flags, ident=ident, seq=seq))
        return made

    def fragments(self, size: int, ident: int = 0) -> list[bytes]:
        """The fragments of `size` bytes behind the IP header, a multiple of 8, that it is; `ident` is of IPv6."""
        whole = self.transport(partial=False)
        made = []
        for at in range(0, len(whole), size):
            more = at + size < len(whole)
            if self.version == 4:
                made.append(replace(self, fragment=at // 8 | MORE * more).ip(whole[at : at + size]))
                continue
            body = struct.pack(">BHI", 0, at | more, ident)
            made.append(replace(self, extensions=((FRAGMENT, body),)).ip(whole[at : at + size]))
        return made


def wire(segments: Sequence[Segment]) -> list[bytes]:
    return [segment.frame() for segment in segments]
