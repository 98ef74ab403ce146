"""Guests of a bridge under test: their addresses and the frames they send."""

from collections.abc import Callable

import pytest

from tests.rig.driver import Driver
from xdpnet import core

BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("01005e000001")

# The ring layouts that a test, or a module, is about; without a mark: split.
both_layouts = pytest.mark.layouts("split", "packed")
split_only = pytest.mark.layouts("split")
packed_only = pytest.mark.layouts("packed")

MakeGuest = Callable[..., Driver]
MakeBridge = Callable[..., core.Bridge]
Pair = tuple[Driver, Driver]


def mac(number: int) -> bytes:
    """The address of guest `number`."""
    return b"\x52\x54" + number.to_bytes(4, "big")


def frame(to: bytes, source: bytes, size: int = 64, vlan: int | None = None, mark: bytes = b"") -> bytes:
    """A frame of an experimental EtherType, its payload `mark` and then bytes that differ from each other."""
    tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2, "big")
    head = to + source + tag + b"\x88\xb5" + mark
    return (head + bytes((7 * i + len(head)) & 0xFF for i in range(max(0, size - len(head)))))[:size]


def rarp(source: bytes) -> bytes:
    """The announcement of this address: a reverse ARP request for its own, as QEMU and DPDK make it."""
    request = b"\0\1\x08\0\6\4\0\3" + source + bytes(4) + source + bytes(4)
    return (BROADCAST + source + b"\x80\x35" + request).ljust(60, b"\0")
